"""What the fused kernel in Triton alone has: plans of every form, addresses of 64 bits, numerics by each plan."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli import kernels
from bncli.kernels import native
from bncli.kernels.fused.tiling import Plan, Processors, plan
from bncli.kernels.layout import is_channels_last, sizes
from bncli.names import KINKED_ACTIVATIONS
from tests.kernels.fused.checks import EPS, ROUNDOFF, assert_right, case

triton = pytest.importorskip("triton")
device_kernels = pytest.importorskip("bncli.kernels.fused.triton")
triton_launch = pytest.importorskip("bncli.kernels.fused.triton_launch")

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")


def fused(device: torch.device) -> kernels.Kernel:
    """The kernel in Triton, compiled or interpreted."""
    return kernels.get("fused" if device.type == "cuda" else "fused-interpreted", device)


# --- every plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """Small tiles of `rows` lines, `held` of them in registers; a team of programs, as two launches if it has several.

    one_for_all: one team does all slices in turn, as where there are more slices than a device has room for.
    """

    rows: int
    held: int
    team: int
    one_for_all: bool = False

    def of(self, x: Tensor, *, backward: bool) -> Plan:
        cut = plan(
            sizes(x), contiguous=not is_channels_last(x), itemsize=x.element_size(), backward=backward,
            processors=Processors(1, cooperative=False),
        )  # fmt: skip
        columns = cut.columns if cut.contiguous else 8
        slices = -(-x.size(1) // columns)
        cut = replace(cut, rows=self.rows, held=self.held, columns=columns, slices=slices)
        team = min(self.team, cut.tiles)
        return replace(
            cut, team=team, teams=1 if self.one_for_all else slices, barrier="launch" if team > 1 else "none"
        )


FORMS = {
    "several tiles": Form(8, 3, 1),
    "overflow": Form(8, 1, 1),
    "a team": Form(8, 2, 3),
    "a team with overflow": Form(8, 1, 2),
    "one program for all slices": Form(8, 4, 1, one_for_all=True),
    "one team for all slices": Form(8, 2, 2, one_for_all=True),
    "idle programs": Form(8, 2, 5),
}


def planned(form: str) -> Any:
    """The launchers as a kernel, by a plan of that form."""

    def run(
        x: Tensor, weight: Any, bias: Any, eps: float, residual: Any, activation: str | None, statistics: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return Planned.apply(x, weight, bias, residual, activation or "none", form)  # type: ignore[no-any-return]

    return run


class Planned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, activation: str, form: str) -> Any:
        keep = residual is not None and activation in KINKED_ACTIVATIONS
        y, mean, var, signs = triton_launch.forward(
            x, weight, bias, residual, None, EPS, activation, keep, plan=FORMS[form].of(x, backward=False)
        )
        ctx.save_for_backward(x, weight, bias, residual if activation == "silu" else None, mean, var, signs)
        ctx.rest = (activation, form, keep, residual is not None)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        x, weight, bias, residual, mean, var, signs = ctx.saved_tensors
        activation, form, keep, added = ctx.rest
        dx, dweight, dbias, dresidual = triton_launch.backward(
            dy, x, weight, bias, residual, (mean, var), signs if keep else None, EPS, activation, False, added,
            plan=FORMS[form].of(x, backward=True),
        )  # fmt: skip
        return dx, dweight, dbias, dresidual if added else None, None, None


SIGNS_AND_SILU = [(form, "relu", True) for form in FORMS]
SIGNS_AND_SILU += [(form, "silu", False) for form in ("overflow", "a team with overflow", "one team for all slices")]


@pytest.mark.parametrize(("form", "activation", "residual"), SIGNS_AND_SILU)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_plan_gives_the_same(
    form: str, channels_last: bool, activation: str, residual: bool, device: torch.device
) -> None:
    """13 channels are two slices where they are last."""
    shape, fused = (5, 13 if channels_last else 3, 2, 4), {"activation": activation, "residual": residual}
    assert_right(planned(form), case(shape, torch.float32, device, channels_last=channels_last, **fused))  # type: ignore[arg-type]


def test_a_team_of_more_programs_than_a_tile_has_rows_merges_in_steps(device: torch.device) -> None:
    x = case((40, 8), torch.float32, device).x
    cut = replace(FORMS["a team"].of(x, backward=False), rows=2, held=1, team=7, barrier="launch")
    y, mean, var, _ = triton_launch.forward(x, None, None, None, None, EPS, "none", False, plan=cut)
    expected, expected_mean, expected_var = native.batch_norm(x, None, None, EPS)
    torch.testing.assert_close((y, mean, var), (expected, expected_mean, expected_var))


@pytest.mark.parametrize("form", ["a team", "a team with overflow"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_plan_serves_every_dtype(form: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_right(planned(form), case((5, 2, 15), dtype, device, activation="relu", residual=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_64_bit_addresses_give_the_same(
    channels_last: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tensors of more than 2**31 elements need them."""
    monkeypatch.setattr(triton_launch, "MOST_OF_32_BITS", 0)
    triton_launch.launch_for.cache_clear()
    given = case((4, 3, 2, 4), torch.float32, device, channels_last=channels_last, activation="relu", residual=True)
    assert_right(fused(device), given)
    triton_launch.launch_for.cache_clear()


# --- launches -----------------------------------------------------------------------------------------------------


class FakeKernel:
    """One of the device kernels: its launches through the binder (with tensors), and those without (with addresses)."""

    def __init__(self, kernel: Any, refuses: str = "") -> None:
        self.signature, self.refuses = inspect.signature(kernel.fn), refuses
        self.arg_names, self.pre_run_hooks = list(self.signature.parameters), []
        self.error = "Triton Error [CUDA]: too many blocks in cooperative launch"
        self.bound: list[dict[str, Any]] = []
        self.direct: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int]) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            if self.refuses and self.refuses == named["STAGE"]:
                raise RuntimeError(self.error)
            ours = {name: value for name, value in named.items() if name in self.arg_names}
            self.bound.append({"grid": (*grid, 1, 1), **self.signature.bind(*arguments, **ours).arguments})
            return SimpleNamespace(run=self.run, function="function", packed_metadata="packed")

        return launch

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        assert rest[:6] == (0, "function", "packed", None, None, None)  # a stream; neither metadata nor hooks
        self.direct.append({"grid": (x, y, z), **dict(zip(self.arg_names, rest[6:], strict=True))})


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[FakeKernel, FakeKernel]]]:
    """Device kernels that only record, as on an H200."""

    def fake(refuses: str = "") -> tuple[FakeKernel, FakeKernel]:
        kernels = tuple(FakeKernel(getattr(device_kernels, name), refuses) for name in ("forward", "backward"))
        module = SimpleNamespace(**vars(device_kernels) | {"forward": kernels[0], "backward": kernels[1]})
        monkeypatch.setattr(triton_launch, "triton", module)
        return kernels  # type: ignore[return-value]

    cooperative = lru_cache(lambda _: Processors(132, cooperative=not triton_launch.REFUSED))
    monkeypatch.setattr(triton_launch, "COMPILED", True)
    monkeypatch.setattr(triton_launch, "REFUSED", set())
    monkeypatch.setattr(triton_launch, "processors", cooperative)
    triton_launch.launch_for.cache_clear()
    yield fake
    triton_launch.launch_for.cache_clear()


def step(x: Tensor, weight: Tensor, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One call of each launcher; returns their results by the names of the kernels' arguments."""
    bias, running_mean, running_var = (torch.ones(x.size(1)) for _ in range(3))
    y, mean, var, signs = triton_launch.forward(
        x, weight, bias, x, None, EPS, "relu", True, running=(running_mean, running_var, 0.1), **options
    )
    results = triton_launch.backward(x, x, weight, bias, None, (mean, var), signs, EPS, "relu", False, True, **options)
    written = {"y": y, "mean": mean, "var": var, "signs": signs, "bias": bias, "running_mean": running_mean}
    read = {"mean": mean, "var": var, "signs": signs, "bias": bias}
    named = zip(("dx", "dweight", "dbias", "dr"), results, strict=True)
    return written | {"running_var": running_var}, read | dict(named)


ONE_PROGRAM, A_TEAM = (4, 8, 4, 4), (32, 64, 56, 56)  # for a channel, on an H200


@pytest.mark.parametrize(("shape", "stage"), [(ONE_PROGRAM, "alone"), (A_TEAM, "team")])
def test_a_second_call_passes_what_the_binder_passes(shape: tuple[int, ...], stage: str, faked: Any) -> None:
    kernels, x, weight = faked(), torch.zeros(shape), torch.ones(shape[1])
    kept = step(x, weight)  # so that the second call's tensors are at other addresses
    for kernel, before, now in zip(kernels, kept, step(x, weight), strict=True):
        (bound,), (direct,) = kernel.bound, kernel.direct
        assert bound["STAGE"] == stage
        assert all(bound[name] is tensor for name, tensor in before.items())
        expected = {name: each.data_ptr() if isinstance(each, Tensor) else each for name, each in (bound | now).items()}
        assert direct == expected


def test_what_the_binder_tells_apart_is_left_to_it(faked: Any) -> None:
    kernels, x, weight = faked(), torch.zeros(ONE_PROGRAM), torch.ones(9)
    calls = [(x, weight[1:]), (x, weight[1:]), (x, weight[:8]), (x, weight[:8].double()), (x, weight[:8])]
    for call in calls:
        step(*call)
    for kernel in kernels:
        assert (len(kernel.bound), len(kernel.direct)) == (4, 1)
        kernel.pre_run_hooks.append("a hook")
    step(*calls[-1])
    assert [(len(kernel.bound), len(kernel.direct)) for kernel in kernels] == [(5, 1)] * 2


def test_a_device_that_refuses_a_cooperative_launch_gets_two_launches(faked: Any) -> None:
    kernels, x, weight = faked(refuses="team"), torch.zeros(A_TEAM), torch.ones(64)
    team = triton_launch.plan_for(x, Processors(132, cooperative=True))
    with pytest.raises(RuntimeError, match="too many blocks"):
        triton_launch.forward(x, weight, None, None, None, EPS, "none", False, plan=team)
    assert not triton_launch.REFUSED  # whoever asks for a team gets one, or the reason
    step(x, weight)
    assert {x.get_device()} == triton_launch.REFUSED
    for kernel in kernels:
        assert [bound["STAGE"] for bound in kernel.bound] == ["statistics", "normalize"]


def test_other_errors_of_a_launch_are_not_retried(faked: Any) -> None:
    kernels = faked(refuses="alone")
    kernels[0].error = "Triton Error [CUDA]: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal"):
        step(torch.zeros(ONE_PROGRAM), torch.ones(8))
    assert not triton_launch.REFUSED


# --- numerics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "bound"), [(1e3, 1e-6), (1e4, 5e-6)])
@pytest.mark.parametrize("form", [None, "a team", "overflow"])
def test_the_variance_keeps_its_digits_beside_a_large_mean(
    ratio: float, bound: float, form: str | None, device: torch.device
) -> None:
    x = (torch.randn(32, 2, 4, 5, generator=torch.Generator().manual_seed(3)) + ratio).to(device)
    run = planned(form) if form else fused(device)
    _, mean, var = run(x, None, None, EPS, None, None, None)
    exact = x.double().var((0, 2, 3), correction=0)
    assert ((var.double() - exact).abs() / exact).max().item() <= bound
    assert (mean.double() - x.double().mean((0, 2, 3))).abs().max().item() <= ROUNDOFF[torch.float32] * ratio


@pytest.mark.parametrize("form", [None, "a team", "overflow"])
def test_a_constant_channel_becomes_its_bias(form: str | None, device: torch.device) -> None:
    """Where the mean of equal values is rounded, dividing what is left by sqrt(eps) gives +-1 (pytorch 5410)."""
    x = torch.full((7, 2, 9), 10000.1, device=device)
    bias = torch.tensor([0.5, -2.0], device=device)
    run = planned(form) if form else fused(device)
    y, _, var = run(x, None, bias, EPS, None, None, None)
    assert torch.equal(y, bias.view(1, 2, 1).expand_as(x))
    assert var.max() < 1e-3 * EPS  # a GPU's division is good to two units in the last place


@pytest.mark.parametrize("form", [None, "a team", "overflow"])
def test_values_whose_squares_overflow_become_the_bias_as_in_torch(form: str | None, device: torch.device) -> None:
    x = 1e30 * torch.randn(7, 2, 9, generator=torch.Generator().manual_seed(7)).to(device)
    bias = torch.tensor([0.5, -2.0], device=device)
    run = planned(form) if form else fused(device)
    y, _, var = run(x, None, bias, EPS, None, None, None)
    assert torch.equal(y, bias.view(1, 2, 1).expand_as(x))
    assert var.isinf().all()
