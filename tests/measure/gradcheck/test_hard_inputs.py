"""Hard inputs: that each is as hard as its name says, and what a kernel that breaks on it gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli.measure.gradcheck import hard_inputs
from bncli.measure.gradcheck.hard_inputs import FOR_ANY_NORM, NOT_FINITE, ROWS, STRIDED_G, STRIDED_X, Input
from bncli.measure.reference.candidate import NATIVE
from bncli.measure.reference.case import Inputs, inputs
from bncli.measure.reference.judge import Check, CheckContext
from bncli.names import CHECKED_NORMS
from bncli.results.finding import Finding
from tests.measure.gradcheck.conftest import CPU, context_of, context_with


def member(row: str, name: str) -> Input:
    return next(each for each in ROWS[row] if each.name == name)


def made(each: Input, mode: str = "train", dtype: str | None = None) -> tuple[Inputs, Inputs]:
    """The plain inputs of its case, and the hard ones."""
    case = each.case(mode, dtype or each.dtypes[0])
    return inputs(case, CPU), each.of(inputs(case, CPU))


def checks(context: CheckContext, *refused: str) -> dict[str, Check]:
    return {check.identifier: check for plan in hard_inputs.plans(context, refused) for check in plan.checks}


def found(context: CheckContext, beginning: str) -> dict[str, Finding]:
    """Identifier -> finding of the checks whose identifiers begin so."""
    chosen = {name: check for name, check in checks(context).items() if name.startswith(beginning)}
    assert chosen
    return {name: check.run().findings[""] for name, check in chosen.items()}


# --- each input is hard -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_the_names_in_a_row_tell_its_inputs_apart(row: str) -> None:
    names = [(each.name, dtype, mode) for each in ROWS[row] for dtype in each.dtypes for mode in each.modes]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("ratio", "dtype"), [(1e2, "float32"), (1e3, "float32"), (1e4, "float32"), (1e2, "bfloat16")])
def test_far_from_zero_every_channel_has_that_mean_over_its_deviation(ratio: float, dtype: str) -> None:
    _, given = made(member("large mean over deviation", f"{ratio:g}"), dtype=dtype)
    deviation, mean = torch.std_mean(given.x.double(), (0, 2, 3), correction=0)
    assert (mean / deviation).tolist() == pytest.approx([ratio] * 3, rel=0.05)
    assert mean.tolist() == pytest.approx([ratio] * 3, rel=1e-3)


def test_one_channel_is_constant_and_the_others_are_not() -> None:
    plain, given = made(member("constant channel", "one"))
    spread = given.x.amax((0, 2, 3)) - given.x.amin((0, 2, 3))
    assert (spread == 0).tolist() == [False, True, False]
    assert torch.equal(given.x[:, ::2], plain.x[:, ::2])


def test_tiny_values_have_a_variance_below_eps_and_huge_ones_a_square_far_above() -> None:
    for each in ROWS["tiny values"]:
        _, given = made(each)
        assert 0 < float(given.x.double().var((0, 2, 3)).max()) < 10 * each.eps
        assert bool((given.x != 0).all())
    smallest = made(member("tiny values", "1e-20"))[1].x
    assert float(smallest.abs().max() ** 2) < torch.finfo(torch.float32).tiny  # a square is no normal number
    huge = made(member("huge values", "1e9"))[1].x
    assert float(huge.square().mean()) > 1e16
    assert bool(huge.square().sum().isfinite())


def test_float16_values_have_squares_and_sums_that_overflow() -> None:
    for each in ROWS["squares past float16"]:
        x = made(each)[1].x
        assert x.dtype == torch.float16
        assert bool(x.isfinite().all())
        assert float(x.square().isinf().float().mean()) > 0.9
    assert made(member("squares past float16", "300-1000"))[1].x.sum(dtype=torch.float32) > 65504


@pytest.mark.parametrize("each", ROWS[NOT_FINITE], ids=lambda each: each.name)
def test_one_value_of_one_channel_is_nan_or_infinite(each: Input) -> None:
    plain, given = made(each)
    name = "residual" if each.name.partition("-in-")[2].startswith("residual") else "x"
    for field in ("x", "residual"):
        before, after = getattr(plain, field), getattr(given, field)
        if after is not None:
            assert (~after.isfinite()).nonzero().tolist() == ([[1, 1, 0, 3]] if field == name else [])
            assert torch.equal(after[after.isfinite()], before[after.isfinite()])
            assert after.stride() == before.stride()
    value = getattr(given, name)[1, 1, 0, 3]
    assert bool(value.isinf() if each.name == "inf" else value.isnan())


def test_a_transposed_and_a_stepped_tensor_hold_the_same_numbers_by_other_strides() -> None:
    for name in ("transposed", "stepped"):
        plain, given = made(member(STRIDED_X, name))
        assert torch.equal(given.x, plain.x)
        assert not given.x.is_contiguous()
        assert not given.x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(given.g, plain.g)
    _, stepped = made(member(STRIDED_X, "stepped+residual"))
    for tensor in (stepped.x, stepped.residual):
        assert tensor is not None
        assert tensor.stride()[-1] == 2
        between = tensor.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() + 1)
        assert bool(between.isnan().all())  # so that a read between the numbers is seen
    plain, given = made(member(STRIDED_G, "transposed"))
    assert torch.equal(given.g, plain.g)
    assert given.g.stride() != plain.g.stride() == given.x.stride()


def test_a_broadcast_tensor_has_strides_of_zero() -> None:
    _, given = made(member(STRIDED_X, "broadcast"))
    assert (given.x.stride()[0], given.g.stride()[0], given.g.stride()[2:]) == (0, 0, (0, 0))
    assert bool(given.x.double().var((0, 2, 3)).all())
    _, given = made(member(STRIDED_G, "expanded"))
    assert given.g.shape == given.x.shape
    assert given.g.stride()[1:] == (0, 0, 0)
    assert given.x.is_contiguous()


@pytest.mark.parametrize("name", ["channels_last-for-contiguous", "contiguous-for-channels_last"])
def test_the_upstream_gradient_has_another_layout_than_x(name: str) -> None:
    _, given = made(member(STRIDED_G, name))
    layouts = [tensor.is_contiguous() for tensor in (given.x, given.g)]
    assert layouts == [name.endswith("contiguous"), not name.endswith("contiguous")]


def test_vectors_have_gaps() -> None:
    plain, given = made(member(STRIDED_X, "vectors"))
    for name in ("weight", "bias"):
        assert getattr(given, name).stride() == (2,)
        assert torch.equal(getattr(given, name), getattr(plain, name))


VECTORS = ("weight", "bias", "running_mean", "running_var")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_vectors_are_in_half_precision(dtype: str) -> None:
    _, given = made(member("half-precision x and vectors", "all-half"), dtype=dtype)
    assert {getattr(given, name).dtype for name in ("x", *VECTORS)} == {getattr(torch, dtype)}


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("no-weight", {"weight"}),
        ("no-bias", {"bias"}),
        ("neither", {"weight", "bias"}),
        ("no-running-statistics", {"running_mean", "running_var"}),
    ],
)
def test_what_is_left_out_is_what_the_name_says(name: str, missing: set[str]) -> None:
    each = member("no weight, no bias", name)
    _, given = made(each)
    assert {field for field in VECTORS if getattr(given, field) is None} == missing
    assert "running_mean" not in missing or each.modes == ("train",)  # evaluation cannot do without


# --- as checks --------------------------------------------------------------------------------------------------------


def test_identifiers_are_unique_and_what_is_refused_or_not_offered_is_in_none() -> None:
    plans = list(hard_inputs.plans(context_of(effort="default"), ()))
    identifiers = [check.identifier for plan in plans for check in plan.checks]
    assert len(set(identifiers)) == len(identifiers)
    assert [plan.rows[""] for plan in plans][: len(ROWS)] == list(ROWS)
    left = checks(context_of(effort="default"), "float16", "silu", "eval")
    assert left.keys() < set(identifiers)
    assert not [name for name in left if "float16/" in name + "/" and "bfloat16" not in name]
    cases = [check.case for check in left.values() if check.case]
    assert not any("silu" in case.fusion or case.mode == "eval" or case.dtype == "float16" for case in cases)


def test_other_norms_have_the_rows_that_do_not_ask_for_channels() -> None:
    for norm in set(CHECKED_NORMS) - {"batch"}:
        plans = list(hard_inputs.plans(context_of(norm=norm, effort="default"), ()))
        assert [plan.rows[""] for plan in plans] == [row for row in ROWS if row in FOR_ANY_NORM]
        assert all(check.case and check.case.mode == "train" for plan in plans for check in plan.checks)


def test_without_an_evaluation_or_fused_operations_there_is_none_of_either() -> None:
    training = checks(context_of("right_without_evaluation", effort="default")).values()
    assert {check.case.mode for check in training if check.case} == {"train"}
    assert "hard/empty/eval" not in {check.identifier for check in training}
    plain = checks(context_of("right", effort="default")).values()
    assert {check.case.fusion for check in plain if check.case} == {"plain"}


def with_a_leak(x: Tensor, *others: Any) -> Tensor:
    """What is no number in one channel is in all."""
    return NATIVE(x, *others) + 0 * x.sum()


def reading_as_contiguous(x: Tensor, *others: Any) -> Tensor:
    """The numbers that follow each other in x's memory, whatever its strides."""
    memory = x.as_strided(x.shape, torch.empty(x.shape).stride()) if 0 not in x.stride() else x
    return NATIVE(memory, *others)


def in_the_dtype_of_x(x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, training: bool, *others: Any) -> Tensor:
    """Its sum of squares overflows in float16."""
    y = NATIVE(x, mean, var, weight, bias, training, *others)
    return y + 0 * x.square().sum().to(y.dtype) if training else y


@pytest.mark.parametrize(
    ("call", "beginning", "wrong"),
    [
        (with_a_leak, "hard/NaN", {"nan", "nan+relu", "nan+leaky_relu"}),
        (reading_as_contiguous, "hard/x-not-contiguous", {"transposed", "stepped", "stepped+residual"}),
        (in_the_dtype_of_x, "hard/squares", {"300-1000", "-60000-60000"}),
    ],
)
def test_a_kernel_that_breaks_on_an_input_fails_there(call: Any, beginning: str, wrong: set[str]) -> None:
    context = context_with(call)
    failed = {name.split("/")[2] for name, finding in found(context, beginning).items() if finding.failed}
    assert failed >= wrong
    right = found(context_with(NATIVE), beginning)
    assert not any(finding.failed for finding in right.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_channel_with_nan_must_be_nan(value: float) -> None:
    """A kernel that gives numbers there, where the definition has none, is wrong."""

    def swallows(*given: Any) -> Tensor:
        return NATIVE(given[0].nan_to_num(0.0, 0.0, 0.0), *given[1:])

    name = "nan" if math.isnan(value) else "inf"
    context = context_with(swallows, effort="default")
    for finding in found(context, f"hard/NaN-and-infinity-stay-in-their-channel/{name}/").values():
        assert finding.failed


def test_the_worst_quantity_of_an_input_is_reported() -> None:
    def wrong_gradient(*given: Any) -> Tensor:
        y = NATIVE(*given)
        y.register_hook(lambda g: 1.5 * g)
        return y

    (finding,) = found(context_with(wrong_gradient), "hard/huge-values/1e9/train/float32").values()
    assert finding.failed
    assert finding.quantity in ("dx", "dweight", "dbias")


# --- rules of their own -----------------------------------------------------------------------------------------------


def test_the_variance_of_one_pass_is_wrong_by_the_square_of_the_ratio() -> None:
    right, wrong = (
        found(context_of(name, effort="default"), "hard/variance/") for name in ("right", "one_pass_variance")
    )
    assert not any(finding.failed for finding in right.values())
    assert all(finding.failed for finding in wrong.values())
    relative = [finding.relative for finding in wrong.values()]
    assert all(error is not None for error in relative)
    hundred, thousand, _ = (float(error or 0) for error in relative)
    assert 20 < thousand / hundred < 500


def test_where_the_variance_overflows_the_other_channels_stay_right() -> None:
    def overflows(x: Tensor, *others: Any) -> Tensor:
        """NaN where values are huge, as an infinite variance times zero gives."""
        hole = torch.where(x.abs().amax((0, 2, 3), keepdim=True) > 1e20, math.nan, 0.0)
        return NATIVE(x, *others) + hole

    def spreads(x: Tensor, *others: Any) -> Tensor:
        """0 times infinity, everywhere."""
        return NATIVE(x, *others) + 0 * x.square().sum()

    for context, fails in ((context_of(), False), (context_with(overflows), False), (context_with(spreads), True)):
        assert found(context, "hard/huge/")["hard/huge/1e30"].failed is fails


def test_one_value_per_channel_has_to_be_a_value_error() -> None:
    def refuses(*given: Any) -> Tensor:
        raise RuntimeError("no")

    accepted = found(context_of("one_value_taken"), "hard/one-value/")
    assert {(finding.kind, finding.failed) for finding in accepted.values()} == {("accepted", True)}
    for finding in found(context_with(refuses), "hard/one-value/").values():
        assert (finding.kind, finding.exception) == ("wrong_exception", "RuntimeError")
    assert {finding.kind for finding in found(context_of(), "hard/one-value/").values()} == {"right"}


def test_an_empty_batch_moves_nothing_and_has_gradients_of_zero() -> None:
    def moves(*given: Any) -> Tensor:
        if given[5]:
            given[1].add_(1)
        return NATIVE(*given)

    def ones(*given: Any) -> Tensor:
        return Ones.apply(NATIVE(*given), given[3])

    finding = found(context_with(moves), "hard/empty/train")["hard/empty/train"]
    assert (finding.kind, finding.names) == ("running_moved_by_nothing", ("running_mean",))
    finding = found(context_with(ones), "hard/empty/train")["hard/empty/train"]
    assert (finding.kind, finding.quantity) == ("not_zero", "dweight")
    assert {finding.kind for finding in found(context_of(), "hard/empty/").values()} == {"right"}


class Ones(torch.autograd.Function):
    """y itself, and a gradient of ones in the weight."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (weight,) = ctx.saved_tensors
        return gradients[0], torch.ones_like(weight)
