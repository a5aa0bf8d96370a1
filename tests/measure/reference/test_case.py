"""The cases that kernels are judged on, and their inputs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from bncli.kernels.definition import definition
from bncli.measure.reference.case import (
    DTYPES,
    FUSIONS,
    OPERATIONS,
    Case,
    arguments,
    away_from_the_kink,
    cases,
    divisible,
    floor_bytes,
    flops,
    inputs,
    timed,
    timed_inputs,
    with_layout,
    with_positive_weight,
)
from bncli.names import CHECKED_NORMS
from bncli.results import profile

CPU = torch.device("cpu")


def test_at_a_kink_the_upstream_gradient_is_zero() -> None:
    case = Case("train", "bfloat16", "contiguous", (8, 3, 16, 16), "relu")
    given = inputs(case, CPU)
    cut = given.smooth == 0
    assert 0 < int(cut.sum()) < cut.numel() / 4
    assert bool((given.g[cut] == 0).all())


def test_identifiers_are_unique_and_every_combination_is_in_the_full_run() -> None:
    for effort in ("quick", "default", "full"):
        names = [case.identifier for case in cases(effort, "batch", True, True)]
        assert len(names) == len(set(names))
    every = {(case.mode, case.dtype, case.layout, case.fusion) for case in cases("full", "batch", True, True)}
    assert len(every) == 2 * 4 * 2 * 8
    quick = {(case.mode, case.fusion) for case in cases("quick", "batch", True, True)}
    assert len(quick) == 2 * 8


def test_many_channels_and_many_values_are_in_every_run() -> None:
    for effort in ("quick", "default", "full"):
        found = cases(effort, "batch", True, True)
        assert {(case.layout, case.mode) for case in found if case.shape[1] == 67} == set(
            itertools.product(("contiguous", "channels_last"), ("train", "eval"))
        )
        assert any(case.m > 4096 for case in found)
    found = cases("default", "batch", True, True)
    assert {case.layout for case in found if case.shape[1] == 130} == {"contiguous", "channels_last"}
    assert any(case.m > 20_000 for case in found)


def test_the_interpreter_skips_many_contiguous_channels_only() -> None:
    every, spared = (cases("default", "batch", True, True, interpreted) for interpreted in (False, True))
    left_out = [case for case in every if case not in spared]
    assert left_out
    assert all(case.layout == "contiguous" and case.shape[1] > 64 for case in left_out)


def test_at_nan_the_upstream_gradient_of_a_kinked_activation_is_kept() -> None:
    case = Case("eval", "float32", "contiguous", (4, 3, 5, 7), "relu")
    given = inputs(case, CPU)
    x = given.x.clone()
    x[1, 1, 2, 3] = math.nan
    found = away_from_the_kink(replace(given, x=x), case)
    assert found.g[1, 1, 2, 3] == given.g[1, 1, 2, 3] != 0
    assert int((found.g == 0).sum()) == int((given.g == 0).sum())


def test_what_the_quick_run_checks_the_default_run_checks_too() -> None:
    for norm in CHECKED_NORMS:
        quick, default, full = (
            {case.identifier for case in cases(effort, norm, True, True)} for effort in ("quick", "default", "full")
        )
        names = {identifier.rsplit("/", 1)[0] for identifier in default}  # the operations of a call are taken in turn
        assert {identifier.rsplit("/", 1)[0] for identifier in quick} <= names
        assert len(quick) < len(default) < len(full)


def test_no_case_asks_for_what_the_candidate_does_not_have() -> None:
    found = cases("full", "batch", fuses=False, evaluates=False)
    assert {case.fusion for case in found} == {"plain"}
    assert {case.mode for case in found} == {"train"}
    assert {case.mode for case in cases("full", "layer", True, True)} == {"train"}
    for norm in CHECKED_NORMS:
        assert all(
            not case.too_few_values and case.m > 1 and case.norm == norm for case in cases("full", norm, True, True)
        )


def test_a_covariance_needs_more_values_than_channels_and_groups_that_divide_them() -> None:
    pairs = [Case("train", "float32", "contiguous", (m, 4), norm="whiten") for m in (2, 3)]
    assert [case.too_few_values for case in pairs] == [True, False]
    assert [replace(case, norm="batch").too_few_values for case in pairs] == [False, False]
    assert [divisible(channels, "whiten") for channels in (1, 3, 4, 67)] == [2, 4, 4, 68]
    assert [divisible(channels, "batch") for channels in (1, 3, 4, 67)] == [1, 3, 4, 67]


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_the_identifier_is_the_seed() -> None:
    case = Case("train", "float32", "contiguous", (4, 3, 5))
    x = inputs(case, CPU).x
    assert torch.equal(inputs(case, CPU).x, x)
    others = [replace(case, repeat=2), replace(case, mode="eval"), replace(case, fusion="relu")]
    assert not any(torch.equal(inputs(other, CPU).x, x) for other in others)
    assert case.identifier == "train/float32/contiguous/4x3x5/plain"
    assert replace(case, repeat=2).identifier == "train/float32/contiguous/4x3x5/plain~2"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "shape"), [("contiguous", (4, 3, 5, 7)), ("channels_last", (2, 3, 3, 5, 2))])
def test_inputs_have_the_dtype_the_layout_and_the_operations_of_their_case(
    dtype: str, layout: str, shape: tuple[int, ...]
) -> None:
    given = inputs(Case("train", dtype, layout, shape, "relu+residual"), CPU)
    assert given.residual is not None
    assert given.v is not None
    for tensor in (given.x, given.residual, given.g, given.v):
        assert (tensor.shape, tensor.dtype) == (shape, DTYPES[dtype])
        assert tensor.is_contiguous() == (layout == "contiguous")
        assert tensor.movedim(1, -1).is_contiguous() == (layout == "channels_last")
    for vector in (given.weight, given.bias, given.running_mean, given.running_var):
        assert vector is not None
        assert vector.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    assert inputs(Case("train", dtype, layout, shape, "relu"), CPU).residual is None


def test_vectors_are_left_out_or_narrow_where_the_case_says_so() -> None:
    case = Case("train", "bfloat16", "contiguous", (4, 3, 5), affine="same")
    same = inputs(case, CPU)
    none = inputs(replace(case, affine="none", tracked=False), CPU)
    assert same.weight is not None
    assert same.weight.dtype == torch.bfloat16
    assert (none.weight, none.bias, none.running_mean, none.running_var) == (None,) * 4
    layer = inputs(Case("train", "float32", "contiguous", (4, 3, 5), norm="layer"), CPU)
    assert (layer.running_mean, layer.running_var) == (None, None)


def test_a_mean_is_at_most_about_three_deviations_from_zero() -> None:
    x = inputs(Case("train", "float64", "contiguous", (64, 40, 8, 8)), CPU).x
    deviation, mean = torch.std_mean(x, (0, 2, 3))
    assert 0.09 < float(deviation.min()) < float(deviation.max()) < 3.3
    assert 1 < float((mean / deviation).abs().max()) < 3.3


def test_a_strided_tensor_has_the_same_values_at_every_second_place() -> None:
    t = torch.arange(24.0).reshape(2, 3, 4)
    strided = with_layout(t, "strided")
    assert torch.equal(strided, t)
    assert strided.stride() == (24, 8, 2)
    assert with_layout(t[0, :, 0], "strided").is_contiguous()  # a vector of channels


def test_wide_inputs_are_copies_and_leaves_the_tensors_themselves() -> None:
    given = inputs(Case("train", "float64", "contiguous", (4, 3, 5)), CPU)
    wide = given.wide()
    wide.x.zero_()
    assert bool(given.x.any())
    leaves = given.leaves()
    assert list(leaves) == ["dx", "dweight", "dbias"]
    assert leaves["dx"] is given.x
    assert given.x.requires_grad


def test_a_smooth_activation_keeps_every_upstream_gradient() -> None:
    case = Case("train", "bfloat16", "contiguous", (8, 3, 16, 16), "silu")
    given = inputs(case, CPU)
    assert given.smooth is not None
    assert bool(given.smooth.all())
    assert away_from_the_kink(given, case) is given


def test_where_g_is_kept_the_activations_input_keeps_its_sign() -> None:
    """The rule of the kink: a kernel that rounds otherwise takes the same side wherever a gradient comes in."""
    case = Case("eval", "bfloat16", "contiguous", (8, 3, 16, 16), "relu")
    given = inputs(case, CPU)
    exact = definition("batch")(*arguments(replace(case, fusion="plain"), given.wide()))
    rounded = definition("batch")(*arguments(replace(case, fusion="plain"), given))
    kept = given.g != 0
    assert torch.equal(exact.sign()[kept], rounded.double().sign()[kept])
    assert given.smooth is not None
    assert torch.equal(kept, (given.smooth != 0) & (given.g != 0))


def test_the_kink_is_recomputed_for_positive_weights() -> None:
    case = Case("train", "bfloat16", "contiguous", (8, 3, 16, 16), "relu")
    given = inputs(case, CPU)
    assert given.weight is not None
    assert bool((given.weight < 0).any())
    found = with_positive_weight(given, case)
    assert found.weight is not None
    assert torch.equal(found.weight, given.weight.abs())
    assert found.smooth is not None
    assert given.smooth is not None
    assert not torch.equal(found.smooth, given.smooth)
    without = replace(given, weight=None)
    assert with_positive_weight(without, case) is without


# --- shapes that are timed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_timed_shape_is_a_case_with_the_same_operations(operation: str) -> None:
    case = timed(profile.Case((4, 8, 6, 6), operation, "bf16", "channels_last", affine="same"))
    assert (case.adds, case.activation) == OPERATIONS[operation]
    assert case.fusion in FUSIONS
    assert (case.stored, case.layout, case.affine) == (torch.bfloat16, "channels_last", "same")
    assert timed(profile.Case((4, 8), operation, training=False, tracked=False)).tracked  # evaluation needs them


def test_inputs_of_a_timed_shape_follow_from_the_seed_and_have_its_layout() -> None:
    case = timed(profile.Case((4, 8, 6, 6), "bn+add+relu", "fp16", "channels_last"))
    given, again, other = (timed_inputs(case, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(given.x, again.x)
    assert not torch.equal(given.x, other.x)
    assert given.residual is not None
    for tensor in (given.x, given.residual, given.g):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert tensor.dtype == torch.float16
    assert given.v is None


def test_the_floor_reads_and_writes_each_tensor_once() -> None:
    plain, added = (profile.Case((4, 8, 6, 6), operation, "bf16") for operation in ("bn", "bn+add+relu"))
    elements = 4 * 8 * 6 * 6
    assert floor_bytes(plain, "forward") == 2 * 2 * elements  # x, y
    assert floor_bytes(plain, "backward") == 3 * 2 * elements  # x, dy, dx
    assert floor_bytes(added, "forward") == 3 * 2 * elements + elements / 8  # and the residual, and ReLU's signs
    assert floor_bytes(added, "backward") == 4 * 2 * elements + elements / 8
    for case in (plain, added):
        assert floor_bytes(case, "both") == floor_bytes(case, "forward") + floor_bytes(case, "backward")


def test_evaluation_takes_fewer_operations_than_training_and_an_activation_more() -> None:
    case = profile.Case((4, 8, 6, 6), "bn", "fp32")
    assert flops(case, "forward") == (4 + 2 + 2) * case.elements
    assert flops(replace(case, affine="none"), "forward") == (4 + 2) * case.elements
    assert flops(replace(case, training=False), "forward") == (2 + 2) * case.elements
    assert flops(replace(case, operation="bn+add+relu"), "forward") == (4 + 2 + 2 + 1 + 1) * case.elements
    assert flops(case, "backward") == (2 + 3 + 5) * case.elements
    assert flops(case, "both") == flops(case, "forward") + flops(case, "backward")
