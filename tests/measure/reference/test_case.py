"""The cases that kernels are judged on, and their inputs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch

from bncli.measure.reference.case import Case, away_from_the_kink, cases, inputs

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


def test_the_interpreter_is_spared_many_contiguous_channels_alone() -> None:
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
