"""The C++ autograd node: without it autograd is in Python, with it every bit, refusal and rule of autograd is the same.

What the node shares with the other implementations is in test_fused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli.errors import Unavailable
from bncli.kernels import fused
from bncli.kernels.fused import build, cpu
from bncli.measure.profile import sources
from bncli.measure.reference import case as measured
from tests.kernels.fused.checks import EPS, lay


def normalized(
    x: Tensor, activation: str | None = "silu", affine: bool = True
) -> tuple[Tensor, list[Tensor], tuple[Tensor, ...]]:
    """y, the leaves that it depends on, and the mean, the variance and the running statistics."""
    vectors = [torch.linspace(0.5, 2, x.size(1), requires_grad=True) for _ in range(2)] if affine else [None, None]
    leaf, running = x.detach().requires_grad_(), (torch.zeros(x.size(1)), torch.ones(x.size(1)))
    y, *statistics = fused.batch_norm(leaf, *vectors, EPS, None, activation, None, (*running, 0.1))
    assert [each._version for each in running] == [1, 1]
    return y, [leaf, *(each for each in vectors if each is not None)], (*statistics, *running)


def test_it_is_not_used_until_it_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu.compiled(torch.float32)
    monkeypatch.setenv("BNCLI_CACHE", str(tmp_path / "cache"))
    cpu.node.cache_clear()
    assert cpu.node() is None
    assert type(normalized(torch.randn(4, 3))[0].grad_fn).__name__ == "FusedBatchNormBackward"
    cpu.node.cache_clear()
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: no header' >&2; exit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(Unavailable, match="could not build it: error: no header"):
        build.node(or_compile=True)


@pytest.fixture
def both(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """The result of a function, or its error, with autograd in Python and with the node."""

    def run(function: Callable[[], Any]) -> list[Any]:
        results = []
        for found in (None, request.getfixturevalue("node")):
            monkeypatch.setattr(cpu, "node", lambda found=found: found)
            try:
                results.append(function())
            except (RuntimeError, TypeError, IndexError) as error:
                results.append(f"{type(error).__name__}: {error}")
        return results

    return run


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 5), (2, 4), (7, 1, 3), (4, 3, 5, 5), (3, 4, 1, 1), (2, 3, 2, 2, 2)])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("affine", [True, False])
def test_its_results_have_the_bits_of_the_path_in_python(
    shape: tuple[int, ...], activation: str | None, affine: bool, both: Callable[..., list[Any]]
) -> None:
    x, dy = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    nodes: list[str] = []

    def run() -> list[Tensor]:
        y, leaves, statistics = normalized(x, activation, affine)
        nodes.append(type(y.grad_fn).__name__)
        gradients = [torch.autograd.grad(y, leaves, lay(dy, last), retain_graph=True) for last in (False, True)]
        return [y, *statistics, *gradients[0], *gradients[1]]

    one, two = both(run)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert nodes == ["FusedBatchNormBackward", "CppFunction"]


def twice(y: Tensor, leaves: list[Tensor]) -> Any:
    y.sum().backward()
    y.sum().backward()


def written(y: Tensor, leaves: list[Tensor]) -> Any:
    with torch.no_grad():
        leaves[0].add_(1)
    y.sum().backward()


def twice_differentiated(y: Tensor, leaves: list[Tensor]) -> Any:
    first = torch.autograd.grad((y**3).sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum((each**2).sum() for each in first), leaves)


def seen_by_a_mode(y: Tensor, leaves: list[Tensor]) -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
            names.append(str(function))
            return function(*arguments, **(kwargs or {}))

    names: list[str] = []
    with Names():
        y.sum().backward()
    assert "bncli.fused_batch_norm_backward.default" in names
    return leaves[0].grad


@pytest.mark.slow
@pytest.mark.parametrize(("use", "words"), [(twice, "graph a second time"), (written, "by an inplace operation")])
def test_autograd_refuses_a_second_pass_and_a_tensor_that_changed(
    use: Callable[..., Any], words: str, both: Callable[..., list[Any]]
) -> None:
    one, two = both(lambda: use(*normalized(torch.randn(6, 5))[:2]))
    assert words in one
    assert words in two


@pytest.mark.slow
@pytest.mark.parametrize("use", [twice_differentiated, seen_by_a_mode])
def test_second_derivatives_and_modes_are_given_the_operator(
    use: Callable[..., Any], both: Callable[..., list[Any]]
) -> None:
    one, two = both(lambda: use(*normalized(torch.randn(6, 5, generator=torch.Generator().manual_seed(3)))[:2]))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.slow
def test_hooks_of_saved_tensors_see_what_it_saves(both: Callable[..., list[Any]]) -> None:
    def run() -> list[Any]:
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each.clone(), Tensor.clone):
            y, leaves, _ = normalized(torch.randn(6, 5, generator=torch.Generator().manual_seed(3)))
        return [*saved, *torch.autograd.grad(y.sum(), leaves)]

    one, two = both(run)
    assert len(one) == 5 + 3
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        {"weight": torch.ones(6)},
        {"bias": torch.ones(5, device="meta")},
        {"x": torch.ones(5)},
        {"x": torch.ones(6, 5, dtype=torch.int64)},
        {"running": (torch.zeros(5), torch.ones(5, requires_grad=True), 0.1)},
        {"running": (torch.zeros(2), torch.ones(5), 0.1)},
    ],
)
def test_it_refuses_what_the_path_in_python_refuses(wrong: dict[str, Any], both: Callable[..., list[Any]]) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(6, 5), "weight": None, "bias": None, "eps": EPS}
    one, two = both(lambda: fused.batch_norm(**{**arguments, **wrong}))
    assert isinstance(one, str)
    assert one == two


@pytest.mark.slow
def test_the_profile_names_it(node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "node", lambda: node)
    words = [
        sources.ran(measured.Case("train", "float32", layout, (4, 8, 6, 6)), "fused", torch.device("cpu")) or ""
        for layout in ("contiguous", "channels_last")
    ]
    assert [each.endswith(", C++ autograd node") for each in words] == [True, False]
