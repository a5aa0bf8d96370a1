"""What ran, in words that the plan or torch itself gives."""

from __future__ import annotations

import pytest
import torch

from bncli.kernels.fused.tiling import Processors, plan
from bncli.measure.profile import candidates
from bncli.measure.reference.case import timed
from bncli.results import profile

H200 = Processors(132, cooperative=True)
CPU = torch.device("cpu")


def way(shape: tuple[int, int, int], **options: bool) -> str:
    found = plan(shape, contiguous=True, itemsize=2, backward=False, processors=H200, **options)
    return candidates.way(found, **options)


def test_a_plan_is_told_in_a_word() -> None:
    assert way((32, 512, 49)) == "on-chip"
    assert way((256, 64, 3136)).startswith("cooperative (")
    assert way((32, 512, 49), given=True) == "streaming"
    one_program = plan((256, 64, 3136), contiguous=True, itemsize=2, backward=False, processors=Processors(132, False))
    assert candidates.way(one_program) == "two launches"


def test_a_team_that_holds_a_part_says_how_much() -> None:
    found = plan((4096, 64, 3136), contiguous=True, itemsize=2, backward=True, processors=H200)
    if found.barrier == "grid":
        assert found.overflow
        assert "% on-chip" in candidates.way(found)
    else:
        assert candidates.way(found) == "two launches"


@pytest.mark.parametrize("affine", ["wide", "same"])
def test_torch_is_asked_which_of_its_batch_norms_runs(affine: str) -> None:
    case = timed(profile.Case((4, 8, 6, 6), "bn", "fp32", affine=affine))
    assert candidates.native_backend(case, CPU) == "Native"
    assert candidates.ran(case, "native", CPU) == "ATen"


def test_what_is_not_known_stays_unknown() -> None:
    case = timed(profile.Case((4, 8, 6, 6), "bn", "fp32"))
    assert candidates.native_backend(timed(profile.Case((4, 8, 6, 6), affine="none")), CPU) == "unknown"
    assert candidates.ran(case, "mine:norm", CPU) is None
    assert candidates.plan_words(case, CPU) == "unknown"


@pytest.mark.cuda
def test_on_a_gpu_native_and_fused_say_what_ran() -> None:
    device = torch.device("cuda")
    case = timed(profile.Case((32, 64, 56, 56), "bn", "fp16", "channels_last"))
    assert candidates.ran(case, "native", device) in ("cuDNN", "ATen")
    assert candidates.ran(case, "fused", device)
    assert "unknown" not in candidates.plan_words(case, device)
