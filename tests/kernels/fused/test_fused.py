"""The fused kernel against torch's own in float64: every stage, layout, dtype and fusion, forward and all gradients.

On the CPU Triton's interpreter runs the same source. It rounds to bfloat16 by truncation, which the tolerance allows.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import bncli
from bncli import kernels
from bncli.errors import Unavailable
from bncli.kernels import fused, native
from bncli.kernels.fused import triton_launch
from bncli.kernels.fused.tiling import Plan, Processors, plan
from bncli.kernels.layout import is_rows, sign_bytes, sizes
from tests.kernels.fused import share_kernel

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

EPS = 1e-5
ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
# Positions of 3 and 15 values are aligned to one element, of 12 to four, of 8 to eight.
SHAPES = [(6, 13), (9, 3, 1), (5, 3, 3), (3, 2, 3, 5), (2, 9, 2, 6), (3, 5, 2, 2, 2), (4, 8, 4)]
FUSED = [
    (activation, residual) for activation in (None, "relu", "leaky_relu", "silu") for residual in (False, True)
]  # fmt: skip


@dataclass
class Case:
    """Inputs of one call, all on one device, and the gradient that comes from above."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    statistics: tuple[Tensor, Tensor] | None
    dy: Tensor
    activation: str | None

    def inputs(self, dtype: torch.dtype | None = None) -> list[Tensor | None]:
        """x, weight, bias and residual as fresh leaves."""
        found = (self.x, self.weight, self.bias, self.residual)
        return [None if each is None else each.detach().to(dtype or each.dtype).requires_grad_() for each in found]


def lay(tensor: Tensor, channels_last: bool) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else tensor.contiguous()


def case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    *,
    channels_last: bool = False,
    activation: str | None = None,
    residual: bool = False,
    given: bool = False,
    affine: bool = True,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    vector = torch.promote_types(dtype, torch.float32)
    channels = shape[1]
    weight, bias = (0.5 + normal(2, channels).abs()).to(device, vector) if affine else (None, None)
    return Case(
        lay((2 * normal(*shape) + 1).to(device, dtype), channels_last),
        weight,
        bias,
        lay(normal(*shape).to(device, dtype), channels_last) if residual else None,
        (normal(channels).to(device, vector), (0.5 + normal(channels).abs()).to(device, vector)) if given else None,
        lay(normal(*shape).to(device, dtype), channels_last),
        activation,
    )


def outcome(kernel: Any, case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """y and every gradient, in float64 on the CPU."""
    inputs = case.inputs(dtype)
    x, weight, bias, residual = inputs
    assert x is not None
    statistics = case.statistics
    if dtype is not None and statistics is not None:
        statistics = (statistics[0].to(dtype), statistics[1].to(dtype))
    y, mean, var = kernel(x, weight, bias, EPS, residual, case.activation, statistics)
    y.backward(case.dy.to(y.dtype))
    found = {"y": y, "mean": mean, "var": var}
    names = ("dx", "dweight", "dbias", "dresidual")
    found |= {name: each.grad for name, each in zip(names, inputs, strict=True) if each is not None}
    return {name: each.detach().double().cpu() for name, each in found.items()}


def assert_right(kernel: Any, case: Case) -> None:
    """Each result within twice native's own error, or a few roundings of the dtype at the result's largest value.

    The roundings: the result's own, twice where the interpreter truncates, and 64 of the accumulation's (16 additions
    that lie on the way of any of these sums, four operations each).
    """
    truth, ours = outcome(native.batch_norm, case, torch.float64), outcome(kernel, case)
    theirs = outcome(native.batch_norm, case)
    assert truth.keys() == ours.keys()
    for name, exact in truth.items():
        assert ours[name].shape == exact.shape, name
        scale = max(exact.abs().max().item(), case.dy.abs().max().item())
        stored = ROUNDOFF[case.x.dtype] if name in ("y", "dx", "dresidual") else 0.0
        accumulated = ROUNDOFF[torch.promote_types(case.x.dtype, torch.float32)]
        floor = (2 * stored + 64 * accumulated) * scale
        bound = max(2 * (theirs[name] - exact).abs().max().item(), floor)
        error = (ours[name] - exact).abs().max().item()
        assert error <= bound, f"{name}: error {error:.3g}, bound {bound:.3g}"


# --- every shape, layout, dtype, mode and fusion ------------------------------------------------------------------

ALL = [
    (shape, channels_last, dtype, activation, residual, given)
    for shape, channels_last, dtype, (activation, residual), given in itertools.product(
        SHAPES, (False, True), ROUNDOFF, FUSED, (False, True)
    )
    if len(shape) > 2 or not channels_last
]
# Every shape, dtype, fusion and mode meets some of the others: each in turn with the next of them.
SOME = [ALL[i] for i in range(0, len(ALL), 23)]


@pytest.mark.parametrize(("shape", "channels_last", "dtype", "activation", "residual", "given"), SOME)
def test_forward_and_all_gradients_are_natives_of_float64(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, activation: str | None, residual: bool,
    given: bool, device: torch.device,
) -> None:  # fmt: skip
    assert_right(
        fused.batch_norm,
        case(shape, dtype, device, channels_last=channels_last, activation=activation, residual=residual, given=given),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "channels_last", "dtype", "activation", "residual", "given"), ALL)
def test_all_of_them(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, activation: str | None, residual: bool,
    given: bool, device: torch.device,
) -> None:  # fmt: skip
    test_forward_and_all_gradients_are_natives_of_float64(
        shape, channels_last, dtype, activation, residual, given, device
    )


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
            sizes(x), planes=not is_rows(x), itemsize=x.element_size(), backward=backward,
            processors=Processors(1, cooperative=False),
        )  # fmt: skip
        columns = cut.columns if cut.planes else 8
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
    """The seam's signature over the launchers, by a plan of that form."""

    def run(
        x: Tensor, weight: Any, bias: Any, eps: float, residual: Any, activation: str | None, statistics: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return Planned.apply(x, weight, bias, residual, activation or "none", form)  # type: ignore[no-any-return]

    return run


class Planned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, residual: Any, activation: str, form: str) -> Any:
        keep = residual is not None and activation in fused.SIGN_IS_ENOUGH
        y, mean, var, signs = triton_launch.forward(
            x, weight, bias, residual, None, EPS, activation, keep, cut=FORMS[form].of(x, backward=False)
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
            cut=FORMS[form].of(x, backward=True),
        )  # fmt: skip
        return dx, dweight, dbias, dresidual if added else None, None, None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("activation", "residual"), [("relu", True), ("silu", False)])
def test_every_plan_gives_the_same(
    form: str, channels_last: bool, activation: str, residual: bool, device: torch.device
) -> None:
    """Rows of 13 channels are two slices."""
    given = case((5, 13 if channels_last else 3, 2, 4), torch.float32, device, channels_last=channels_last,
                 activation=activation, residual=residual)  # fmt: skip
    assert_right(planned(form), given)


def test_a_team_of_more_programs_than_a_tile_has_rows_merges_in_steps(device: torch.device) -> None:
    x = case((40, 8), torch.float32, device).x
    cut = replace(FORMS["a team"].of(x, backward=False), rows=2, held=1, team=7, barrier="launch")
    y, mean, var, _ = triton_launch.forward(x, None, None, None, None, EPS, "none", False, cut=cut)
    expected, expected_mean, expected_var = native.batch_norm(x, None, None, EPS)
    torch.testing.assert_close((y, mean, var), (expected, expected_mean, expected_var))


@pytest.mark.parametrize(("lines", "rows", "programs"), [(72_765_788, 4096, 132), (2**30 - 1, 4096, 132), (100, 64, 2)])
def test_programs_that_do_not_exist_have_no_share(lines: int, rows: int, programs: int, device: torch.device) -> None:
    """Their numbers times a program's lines pass 32 bits, and what is left of that must not look like a share."""
    shares = torch.empty(rows, dtype=torch.float64, device=device)
    share_kernel.write_shares[(1,)](shares, programs, lines, -(-lines // (rows * programs)), R=rows)
    assert shares.sum() == lines
    assert not shares[programs:].any()


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
    triton_launch.prepared.cache_clear()
    given = case((4, 3, 2, 4), torch.float32, device, channels_last=channels_last, activation="relu", residual=True)
    assert_right(fused.batch_norm, given)
    triton_launch.prepared.cache_clear()


# --- numerics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "bound"), [(1e3, 1e-6), (1e4, 5e-6)])
@pytest.mark.parametrize("form", [None, "a team", "overflow"])
def test_the_variance_keeps_its_digits_beside_a_large_mean(
    ratio: float, bound: float, form: str | None, device: torch.device
) -> None:
    x = (torch.randn(32, 2, 4, 5, generator=torch.Generator().manual_seed(3)) + ratio).to(device)
    run = planned(form) if form else fused.batch_norm
    _, mean, var = run(x, None, None, EPS, None, None, None)
    exact = x.double().var((0, 2, 3), correction=0)
    assert ((var.double() - exact).abs() / exact).max().item() <= bound
    assert (mean.double() - x.double().mean((0, 2, 3))).abs().max().item() <= ROUNDOFF[torch.float32] * ratio


@pytest.mark.parametrize("form", [None, "a team", "overflow"])
def test_a_constant_channel_becomes_its_bias(form: str | None, device: torch.device) -> None:
    """Where the mean of equal values is rounded, dividing what is left by sqrt(eps) gives +-1 (pytorch 5410)."""
    x = torch.full((7, 2, 9), 10000.1, device=device)
    bias = torch.tensor([0.5, -2.0], device=device)
    run = planned(form) if form else fused.batch_norm
    y, _, var = run(x, None, bias, EPS, None, None, None)
    assert torch.equal(y, bias.view(1, 2, 1).expand_as(x))
    assert var.max() < 1e-3 * EPS  # a GPU's division is good to two units in the last place


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_nan_and_infinity_pass_as_in_torch_and_stay_in_their_channel(
    poison: float, activation: str | None, device: torch.device
) -> None:
    x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(4)).to(device)
    x[2, 1, 3] = poison
    ours, theirs = (run(x, None, None, EPS, None, activation)[0] for run in (fused.batch_norm, native.batch_norm))
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert ours[:, 1].isnan().all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize(("poisoned", "added"), [("x", False), ("x", True), ("residual", True)])
@pytest.mark.parametrize("given", [False, True])
def test_gradients_beside_a_nan_are_torchs(
    channels_last: bool, activation: str, poisoned: str, added: bool, given: bool, device: torch.device
) -> None:
    """Its relu lets dy pass at a NaN, its leaky_relu scales it: computed again, kept as bits, differentiated twice."""
    asked: dict[str, Any] = {"activation": activation, "residual": added, "given": given}
    inputs = case((4, 9, 5, 8), torch.float32, device, channels_last=channels_last, **asked)
    getattr(inputs, poisoned)[1, 1, 0, 3] = float("nan")

    def gradients(kernel: Any) -> list[Tensor]:
        leaves = inputs.inputs()
        y = kernel(*leaves[:3], EPS, leaves[3], activation, inputs.statistics)[0]
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = torch.autograd.grad(y, wanted, inputs.dy, create_graph=True)
        again = torch.autograd.grad(found[0].square().sum(), wanted[:2]) if poisoned != "x" else ()
        return [*found, *again]

    ours, theirs = gradients(fused.batch_norm), gradients(native.batch_norm)
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("momentum", [0.3, 1.0])
def test_running_statistics_move_as_torchs_do(
    dtype: torch.dtype, compiled: bool, momentum: float, device: torch.device
) -> None:
    """In the kernel where plain autograd runs in float32, beside it elsewhere. The old ones leave no trace at 1."""
    x = 1e-4 * case((5, 3, 4), dtype, device).x

    def step(kernel: str) -> tuple[Tensor, Tensor]:
        mean, var = torch.full((3,), 1e4, dtype=dtype, device=device), torch.full((3,), 2.0, dtype=dtype, device=device)
        bncli.batch_norm(x, mean, var, training=True, momentum=momentum, kernel=kernel)
        return mean, var

    torch.use_deterministic_algorithms(False)
    ours = (torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step)("fused")
    torch.testing.assert_close(ours, step("native"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", [None, "a team", "overflow"])
def test_values_whose_squares_overflow_become_the_bias_as_in_torch(form: str | None, device: torch.device) -> None:
    x = 1e30 * torch.randn(7, 2, 9, generator=torch.Generator().manual_seed(7)).to(device)
    bias = torch.tensor([0.5, -2.0], device=device)
    run = planned(form) if form else fused.batch_norm
    y, _, var = run(x, None, bias, EPS, None, None, None)
    assert torch.equal(y, bias.view(1, 2, 1).expand_as(x))
    assert var.isinf().all()


def test_two_runs_agree_bit_for_bit(device: torch.device) -> None:
    given = case((5, 3, 2, 3), torch.float32, device, activation="silu", residual=True)
    one, other = outcome(fused.batch_norm, given), outcome(fused.batch_norm, given)
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- what it keeps, what it leaves alone --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "residual", "extra"),
    [("relu", False, "nothing"), ("relu", True, "signs"), ("silu", True, "residual"), (None, True, "nothing")],
)
def test_backward_needs_x_and_two_vectors_and_a_bit_an_element_at_most(
    activation: str | None, residual: bool, extra: str, device: torch.device
) -> None:
    given = case((4, 3, 5, 5), torch.float32, device, activation=activation, residual=residual)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        x, weight, bias, added = given.inputs()
        fused.batch_norm(x, weight, bias, EPS, added, activation)  # type: ignore[arg-type]
    kept = sum(each.numel() * each.element_size() for each in saved)
    vectors = 4 * 3 * 4  # mean, var, weight, bias
    tensor = given.x.numel() * 4
    beside = {"nothing": 0, "signs": sign_bytes(given.x), "residual": tensor}[extra]
    assert kept == tensor + vectors + beside
    assert sign_bytes(given.x) <= given.x.numel() / 8 + 3


def test_nothing_is_written_into_an_input(device: torch.device) -> None:
    given = case((4, 3, 6), torch.float32, device, activation="relu", residual=True)
    before = [None if each is None else each.clone() for each in (given.x, given.weight, given.bias, given.residual)]
    outcome(fused.batch_norm, given)
    for each, was in zip((given.x, given.weight, given.bias, given.residual), before, strict=True):
        assert each is None or torch.equal(each, was)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels_last", [False, True])
def test_results_lie_as_the_input_does(channels_last: bool, device: torch.device) -> None:
    given = case((4, 3, 2, 5), torch.float32, device, channels_last=channels_last)
    x = given.x.requires_grad_()
    y = fused.batch_norm(x, None, None, EPS)[0]
    y.backward(lay(given.dy, not channels_last))  # a gradient in the other layout is converted
    assert x.grad is not None
    assert y.stride() == x.stride() == x.grad.stride()
    alone = case((4, 3, 2, 5), torch.float32, device, channels_last=channels_last)
    torch.testing.assert_close(x.grad.double().cpu(), outcome(fused.batch_norm, replace_affine(alone))["dx"])


def replace_affine(given: Case) -> Case:
    return replace(given, weight=None, bias=None)


@pytest.mark.parametrize("strides", ["transposed", "stepped", "expanded"])
def test_other_strides_give_the_same(strides: str, device: torch.device) -> None:
    base = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(5)).to(device)
    x = {
        "transposed": base.transpose(0, 2),
        "stepped": base[:, :, ::2],
        "expanded": base[:, :, :1].expand(6, 4, 5),
    }[strides]
    y = fused.batch_norm(x, None, None, EPS, activation="relu")[0]
    torch.testing.assert_close(y, native.batch_norm(x, None, None, EPS, activation="relu")[0], rtol=1e-5, atol=1e-5)


def test_vectors_with_gaps_are_read_where_their_values_are(device: torch.device) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(6)).to(device)
    vectors = torch.full((4, 6), float("nan"), device=device)
    vectors[:, ::2] = torch.tensor([[1.0, 2, 3], [4, 5, 6], [0, 1, -1], [1, 2, 4]], device=device)
    weight, bias, mean, var = vectors[:, ::2]
    for statistics in (None, (mean, var)):
        y, _, _ = fused.batch_norm(x, weight, bias, EPS, statistics=statistics)
        expected, _, _ = native.batch_norm(x, weight, bias, EPS, statistics=statistics)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_gives_empty_results(device: torch.device) -> None:
    x = torch.zeros(0, 3, 4, device=device, requires_grad=True)
    weight = torch.ones(3, device=device, requires_grad=True)
    y = fused.batch_norm(x, weight, None, EPS)[0]
    y.sum().backward()
    assert y.shape == (0, 3, 4)
    assert weight.grad is not None
    assert not weight.grad.any()


# --- derivatives, compilers, contexts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "residual", "given"),
    [
        (None, False, False),
        ("silu", True, False),
        pytest.param("relu", True, False, marks=pytest.mark.slow),
        pytest.param("leaky_relu", False, True, marks=pytest.mark.slow),
    ],
)
def test_first_and_second_derivatives_are_those_of_finite_differences(
    activation: str | None, residual: bool, given: bool, device: torch.device
) -> None:
    made = case((3, 2, 2), torch.float64, device, residual=residual, given=given, seed=1)
    inputs = [each for each in made.inputs() if each is not None]

    def run(x: Tensor, weight: Tensor, bias: Tensor, *added: Tensor) -> Tensor:
        return fused.batch_norm(x, weight, bias, 1e-2, *added[:1] or (None,), activation, made.statistics)[0]

    torch.use_deterministic_algorithms(False)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def composed(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, (0, 2), correction=0, keepdim=True)
    return torch.nn.functional.silu((x - mean) / torch.sqrt(var + 1e-2))


def test_third_derivatives_are_those_of_differentiable_operators(device: torch.device) -> None:
    """Not native's: torch's second derivative takes the saved mean and deviation for constants."""
    found = []
    for run in (composed, lambda x: fused.batch_norm(x, None, None, 1e-2, activation="silu")[0]):
        x = case((4, 2, 3), torch.float64, device).x.requires_grad_()
        value = run(x).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.pow(2).sum()
        found.append(gradient)
    torch.testing.assert_close(*found)


def test_a_forward_that_kept_no_signs_still_gives_the_gradient(device: torch.device) -> None:
    given = case((4, 3, 5), torch.float64, device, activation="relu", residual=True)

    def operator(x: Tensor, weight: Any, bias: Any, eps: float, residual: Any, *_: Any) -> Any:
        return torch.ops.bncli.fused_batch_norm(x, weight, bias, residual, None, None, eps, "relu", False)[:3]

    assert_right(operator, given)


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_operators_keep_the_rules_of_custom_operators(channels_last: bool, device: torch.device) -> None:
    given = case((3, 4, 2, 2), torch.float32, device, channels_last=channels_last, residual=True)
    x, weight, bias, residual = given.inputs()
    found = torch.library.opcheck(fused._forward, (x, weight, bias, residual, None, None, EPS, "relu", True))
    assert set(found.values()) == {"SUCCESS"}


def test_torch_compile_takes_it_whole(device: torch.device) -> None:
    given = case((4, 3, 5), torch.float32, device, residual=True)

    def step(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return bncli.batch_norm(
            2 * x, None, None, weight, bias, True, residual=residual, activation="relu", kernel="fused"
        ).square()

    torch.use_deterministic_algorithms(False)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = given.inputs()
        run(*inputs).sum().backward()  # type: ignore[arg-type]
        results.append([each.grad for each in inputs if each is not None])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_half_precision_activations_take_float32_weights(device: torch.device) -> None:
    with torch.autocast(device.type, torch.bfloat16):
        x = torch.randn(8, 3, device=device, requires_grad=True)
        weight = torch.ones(3, device=device, requires_grad=True)
        y = bncli.batch_norm(x.bfloat16(), None, None, weight, training=True, kernel="fused")
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


# --- where it cannot run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"weight": torch.ones(2)}, ValueError, "a vector of 2 values for 3 channels"),
        ({"residual": torch.ones(4, 1)}, ValueError, r"a residual of shape \(4, 1\) for x of shape \(4, 3\)"),
        ({"statistics": (torch.zeros(3), torch.ones(3, requires_grad=True))}, RuntimeError, "not differentiable in"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_pointer_is_followed(
    wrong: dict[str, Any], error: type[Exception], words: str, device: torch.device
) -> None:
    arguments: dict[str, Any] = {"weight": None, "bias": None, "eps": EPS}
    with pytest.raises(error, match=words):
        fused.batch_norm(torch.ones(4, 3, device=device), **{**arguments, **wrong})


def test_the_operator_refuses_an_input_with_gaps(device: torch.device) -> None:
    x = torch.ones(4, 3, 6, device=device)[:, :, ::2]
    with pytest.raises(ValueError, match="neither contiguous nor channels last"):
        torch.ops.bncli.fused_batch_norm(x, None, None, None, None, None, EPS, "none", False)


def test_whoever_saved_running_statistics_learns_that_they_moved(device: torch.device) -> None:
    x, mean, var = case((6, 3), torch.float32, device).x.requires_grad_(), torch.zeros(3), torch.ones(3)
    mean, var = mean.to(device), var.to(device)
    y = bncli.batch_norm(x, mean, var, kernel="fused")
    bncli.batch_norm(x, mean, var, training=True, kernel="fused")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_forward_mode_derivative_is_refused_and_not_zero(device: torch.device) -> None:
    x = torch.randn(4, 3, device=device)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: fused.batch_norm(x, None, None, EPS)[0], (x,), (x,))


def test_a_dispatch_mode_sees_the_operator(device: torch.device) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(function))
            return function(*arguments, **(kwargs or {}))

    with Names() as names:
        fused.batch_norm(torch.randn(4, 3, device=device), None, None, EPS)
    assert "bncli.fused_batch_norm.default" in names.seen


def test_a_dtype_it_does_not_have_is_refused(device: torch.device) -> None:
    with pytest.raises(TypeError, match="takes float32, float16, bfloat16, float64; x is int64"):
        fused.batch_norm(torch.ones(4, 3, dtype=torch.int64, device=device), None, None, EPS)


def test_on_another_device_it_is_refused_with_the_reason() -> None:
    with pytest.raises(
        Unavailable, match=r"a CPU or an NVIDIA GPU, and was asked to run on mps\. Nothing else"
    ) as error:
        kernels.get("fused", torch.device("mps"))
    assert error.value.exit_code == 3


def test_without_triton_it_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "INTERPRETED", True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fused.why_not(None) == "it is written in Triton, which is not installed (pip install triton)"
