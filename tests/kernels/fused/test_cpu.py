"""What the fused kernel in C++ alone has: threads, sums in parts, compilation. For the rest see test_fused."""

from __future__ import annotations

import itertools
import platform
import threading
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from bncli import kernels
from bncli.engine import device as devices
from bncli.engine.device import cpu_threads
from bncli.errors import Unavailable
from bncli.kernels import api, fused, native
from bncli.kernels.fused import build, cpu
from tests.kernels.fused.checks import EPS, ROUNDOFF, lay


def forget_what_is_compiled() -> None:
    for cached in (build.library, cpu.unavailable_reason, cpu.compiled, cpu.node, fused.launcher):
        cached.cache_clear()


def outputs(
    x: Tensor, activation: str | None, residual: Tensor | None, dy: Tensor, run: kernels.Kernel = fused.batch_norm
) -> list[Tensor]:
    """y, mean, var and the gradients of x, a weight, a bias and the residual."""
    channels = x.size(1)
    vector = torch.promote_types(x.dtype, torch.float32)
    weight, bias = torch.linspace(-1.5, 2, channels, dtype=vector), torch.linspace(1, -1, channels, dtype=vector)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    y, mean, var = run(*leaves[:3], EPS, *leaves[3:] or [None], activation)
    return [y.detach(), mean, var, *torch.autograd.grad(y, leaves, dy)]


def natives(x: Tensor, activation: str | None, residual: Tensor | None, dy: Tensor) -> list[Tensor]:
    """The same by torch's own kernel in float64."""
    added = None if residual is None else residual.double()
    return outputs(x.double(), activation, added, dy.double(), native.batch_norm)


SPLIT = [
    ((1, 3, 200, 400), False),  # planes of few channels: each in parts
    ((1, 1, 300_000), False),
    ((2, 2, 640, 450), False),  # a channel that no cache holds: plane after plane
    ((3, 2, 500, 401), False),
    ((700, 1, 19, 13), False),
    ((9, 40, 40, 37), True),  # rows: in parts
    ((3000, 3, 7, 5), True),  # several rows abreast
    ((1, 130, 64, 65), True),  # a single sample
    ((70_000, 5), False),
]


@pytest.mark.parametrize(("shape", "channels_last"), SPLIT)
@pytest.mark.parametrize("activation", [None, "relu"])
def test_the_number_of_threads_changes_no_bit(
    shape: tuple[int, ...], channels_last: bool, activation: str | None
) -> None:
    source = torch.Generator().manual_seed(1)
    x, residual, dy = (lay(torch.randn(shape, generator=source), channels_last) for _ in range(3))
    found = []
    for count in (1, 2, 3):
        with cpu_threads(count):
            found.append(outputs(x, activation, residual, dy))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize(("shape", "channels_last"), SPLIT)
def test_values_in_many_parts_give_natives_of_float64(shape: tuple[int, ...], channels_last: bool) -> None:
    source = torch.Generator().manual_seed(2)
    x, dy = (lay(torch.randn(shape, generator=source), channels_last) for _ in range(2))
    ours, exact = outputs(x, "silu", None, dy), natives(x, "silu", None, dy)
    for one, two in zip(ours, exact, strict=True):
        many = (x.numel() / x.size(1)) ** 0.5 if one.dim() == 1 else 1.0  # a sum of so many terms of size 1
        assert (one.double() - two).abs().max() <= 1e-6 * max(many, two.abs().max().item())


@pytest.mark.parametrize(("ratio", "bound"), [(1e3, 1e-6), (1e4, 5e-6)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(32, 2, 4, 5), (64, 3, 50, 50), (1, 1, 500, 500)])
def test_the_variance_keeps_its_digits_beside_a_large_mean(
    ratio: float, bound: float, channels_last: bool, shape: tuple[int, ...]
) -> None:
    x = lay(torch.randn(shape, generator=torch.Generator().manual_seed(3)) + ratio, channels_last)
    _, mean, var = fused.batch_norm(x, None, None, EPS)
    exact = x.double().var((0, 2, 3), correction=0)
    assert ((var.double() - exact).abs() / exact).max().item() <= bound
    assert (mean.double() - x.double().mean((0, 2, 3))).abs().max().item() <= ROUNDOFF[torch.float32] * ratio


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("odd", [slice(0, 2), slice(2, 4), slice(30, 32)])
def test_a_few_samples_far_from_all_others_cost_the_variance_no_digits(channels_last: bool, odd: slice) -> None:
    """The shift is the mean of the first values; the sums are about it."""
    x = torch.randn((32, 3, 40, 41), generator=torch.Generator().manual_seed(4))
    x[odd] += 1e4
    _, _, var = fused.batch_norm(lay(x, channels_last), None, None, EPS)
    exact = x.double().var((0, 2, 3), correction=0)
    assert ((var.double() - exact).abs() / exact).max().item() <= 1e-6


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_constant_channel_becomes_its_bias(channels_last: bool) -> None:
    x = lay(torch.full((7, 2, 9, 3), 10000.1), channels_last)
    bias = torch.tensor([0.5, -2.0])
    y, _, var = fused.batch_norm(x, None, bias, EPS)
    assert torch.equal(y, bias.view(1, 2, 1, 1).expand_as(x))
    assert var.max() == 0


@pytest.mark.parametrize("channels_last", [False, True])
def test_values_whose_squares_overflow_become_the_bias_as_in_torch(channels_last: bool) -> None:
    x = lay(torch.tensor([1e30, -1e30, 3e30, 0.0]).repeat(6, 2, 1, 1).contiguous(), channels_last)
    ours, theirs = (run(x, None, torch.ones(2), EPS)[0] for run in (fused.batch_norm, native.batch_norm))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    strategies.lists(strategies.integers(1, 37), min_size=1, max_size=2)
    | strategies.lists(strategies.integers(1, 12), min_size=3, max_size=3),
    strategies.integers(1, 70),
    strategies.booleans(),
    strategies.sampled_from([*sorted(native.ACTIVATIONS), None]),
    strategies.booleans(),
    strategies.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_any_size_gives_natives_of_float64(
    sizes: list[int], channels: int, channels_last: bool, activation: str | None, added: bool, dtype: torch.dtype
) -> None:
    shape = (sizes[0] + 7, channels, *sizes[1:])  # of fewer values dx is a difference of near equals
    source = torch.Generator().manual_seed(5)
    x, residual, dy = (lay(torch.randn(shape, generator=source).to(dtype), channels_last) for _ in range(3))
    held_to = residual if added else None
    ours = outputs(x, activation, held_to, dy)
    exact = natives(x, activation, held_to, dy)
    for k, (one, two) in enumerate(zip(ours, exact, strict=True)):
        scale = max(1.0, two.abs().max().item())
        rounding = 300 if k < 3 or activation in (None, "silu") else 0  # at a kink one side or the other
        if rounding:
            assert (one.double() - two).abs().max() <= rounding * ROUNDOFF[dtype] * scale
        assert one.stride() == (x.stride() if one.shape == x.shape else one.stride())


SLOW = pytest.mark.slow


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names levels of x86-64")
@pytest.mark.parametrize("level", ["v3", pytest.param("v2", marks=SLOW), pytest.param("v4", marks=SLOW)])
@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(each, marks=SLOW) for each in list(ROUNDOFF)[2:])])
def test_other_processors_vectors_give_natives_of_float64_too(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BNCLI_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FOR_THIS_CPU", ((f"-march=x86-64-{level}",),))
    forget_what_is_compiled()
    for shape, activation, channels_last in itertools.product(
        [(5, 3, 7, 9), (64, 20), (3, 2, 190, 200), (40, 33, 11, 7)], [None, "relu", "silu"], [False, True]
    ):
        source = torch.Generator().manual_seed(8)
        x, residual, dy = (lay(torch.randn(shape, generator=source).to(dtype), channels_last) for _ in range(3))
        ours = outputs(x, activation, residual, dy)
        exact = natives(x, activation, residual, dy)
        for k, (one, two) in enumerate(zip(ours, exact, strict=True)):
            many = (x.numel() / x.size(1)) ** 0.5 if one.dim() == 1 else 1.0
            if k < 3 or activation != "relu":  # at a kink one side or the other
                assert (one.double() - two).abs().max() <= 100 * ROUNDOFF[dtype] * max(many, two.abs().max().item())
    forget_what_is_compiled()


@pytest.mark.parametrize(
    ("shape", "threads", "words"),
    [
        ((8, 16, 40, 40), 2, "by channel"),
        ((8, 3, 200, 200), 2, "channels in parts"),
        ((8, 3, 200, 200), 1, "by channel"),
        ((8, 3, 20, 20), 2, "by channel"),
        ((60, 100), 2, "rows in parts"),
    ],
)
def test_the_division_between_threads_is_described(shape: tuple[int, ...], threads: int, words: str) -> None:
    with cpu_threads(threads):
        assert cpu.thread_division(torch.empty(shape, device="meta")) == words


def test_threads_of_python_can_run_it_at_once() -> None:
    x = torch.randn(64, 33, 9, 9, generator=torch.Generator().manual_seed(6))
    expected = outputs(x, "relu", x, x)
    wrong: list[str] = []

    def run() -> None:
        for _ in range(30):
            found = outputs(x, "relu", x, x)
            if not all(torch.equal(one, two) for one, two in zip(found, expected, strict=True)):
                wrong.append("other bits")

    several = [threading.Thread(target=run) for _ in range(3)]
    for thread in several:
        thread.start()
    for thread in several:
        thread.join()
    assert not wrong


def test_a_vector_on_another_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match="x is on cpu; weight is on meta"):
        fused.batch_norm(torch.ones(4, 3), torch.ones(3, device="meta"), None, EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_running_statistics_of_another_dtype_move_too(dtype: torch.dtype) -> None:
    x = torch.randn(9, 3, 5, generator=torch.Generator().manual_seed(7)).to(torch.bfloat16)
    running = torch.full((2, 3), 2.0, dtype=dtype)
    api.batch_norm(x, *running.unbind(), training=True, momentum=0.25, kernel="fused")
    var, mean = torch.var_mean(x.double(), (0, 2))
    expected = 1.5 + 0.25 * torch.stack([mean, var])
    torch.testing.assert_close(running.double(), expected, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=0)


def test_without_a_compiler_it_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BNCLI_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    forget_what_is_compiled()
    with pytest.raises(Unavailable, match=r"the fused kernel cannot run: there is no C\+\+ compiler.*No other kernel"):
        kernels.get("fused", devices.resolve("cpu"))
    forget_what_is_compiled()


@pytest.mark.parametrize("differentiated", [False, True])
def test_a_profile_shows_it_by_name(differentiated: bool) -> None:
    x = torch.randn(8, 3, 5, requires_grad=differentiated)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        fused.batch_norm(x, None, None, EPS)
    assert {event.key for event in seen.key_averages()} & {"bncli::fused_batch_norm", "FusedBatchNorm"}
