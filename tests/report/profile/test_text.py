"""Words and figures of a profile: cells, and each kind of note and remark word for word."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from bncli.report.profile.export import to_csv
from bncli.report.profile.text import (
    busy_words,
    error_words,
    memory_column,
    norms_words,
    note_lines,
    note_words,
    percent,
    quartiles,
    remark_words,
    samples_cell,
)
from bncli.report.text import Cell
from bncli.results.finding import Finding
from bncli.results.profile import (
    Case,
    Ceilings,
    KernelCost,
    NormLayers,
    NormRemark,
    Note,
    NoteKind,
    RemarkKind,
    StepDifference,
)
from tests.report.made_up_costs import FUSED_NORMS, one_case, step_profile


def test_memory_below_a_mib_is_in_kib() -> None:
    for values, unit, cells in (
        ([0.5, None, 0.00618], "KiB", ["512", "–", "6.33"]),
        ([0.5, 2.0], "MiB", ["0.500", "2.00"]),
        ([None], "MiB", ["–"]),
    ):
        column = memory_column("peak", values)
        assert column.name == f"peak {unit}"
        assert [cell.main for cell in column.cells] == cells


def test_quartiles_are_of_the_samples_and_one_sample_has_no_spread() -> None:
    assert quartiles((1.0, 2.0, 3.0, 4.0, 5.0)) == (2.0, 3.0, 4.0)
    assert samples_cell((1.0, 2.0, 3.0, 4.0, 5.0)) == Cell("3.00", "±33%")
    assert samples_cell((7.0,)) == Cell("7.00")
    assert samples_cell(()) == Cell("–")


def test_a_share_that_rounds_to_nothing_is_not_nothing() -> None:
    assert [percent(0.001), percent(0.0), percent(None)] == ["< 1%", "0%", "–"]


# --- notes --------------------------------------------------------------------------------------------------------

CASES = tuple(Case((4, 3, 5, side), "bn+relu", "fp32") for side in (7, 8, 9))
NOTES = {
    Note("channels sampled", cases=CASES): (
        "checked on a sample of the channels, from the first to the last, and timed on all: "
        "fp32 contiguous bn+relu 4x3x5x7 and 2 more"
    ),
    Note("peak needs compilation", "compiled"): (
        "compiled: no peak memory, which would need another compilation in a separate process"
    ),
    Note("peak unknown", "native", CASES[:1], reason="it hung"): (
        "native: peak memory unknown: it hung: fp32 contiguous bn+relu 4x3x5x7"
    ),
    Note("few rounds", count=6): "fewer than the 6 rounds that an interval needs",
    Note("compilation", "good", seconds=7.04): "good: 7.0 s of compilation, not included in any row",
    Note("host bound", count=3, of=40): "the device waited for the host in 3 of 40 samples",
    Note("same work", arm="plain", others=("faster", "other start")): (
        "plain stands for faster, other start as well: their steps do the same work"
    ),
    Note("model compiled", arm="plain"): "plain is compiled: everything that torch.compile fused counts as other",
    Note("random data", arm="mine:make"): (
        "mine:make is trained on random inputs; its loss is the mean square of its output"
    ),
    Note("memory unknown", "fused", arm="plain", reason="its process ended with exit code -9"): (
        "plain, fused: memory unknown: its process ended with exit code -9"
    ),
    Note("memory unknown", arm="plain", reason="x"): "plain, no kernel: memory unknown: x",
    Note("norms not watched", arm="plain", reason="no room"): (
        "plain: the norm layers could not be observed: no room"
    ),
    Note("norms watched", arm="plain", count=5, of=35): (
        "plain: the norm layers were observed for 5 training steps; running statistics are judged after 35"
    ),
    Note("norms watched", arm="plain", count=35, of=35): (
        "plain: the norm layers were observed for 35 training steps"
    ),
}  # fmt: skip


def test_a_note_of_each_kind_is_a_sentence() -> None:
    assert {note: note_words(note) for note in NOTES} == NOTES
    assert {note.kind for note in NOTES} == {*get_args(NoteKind)}
    assert note_lines(step_profile()) == [note_words(note) for note in step_profile().notes]


def test_a_small_copy_that_is_slower_than_a_large_one_shows_other_programs() -> None:
    busy = replace(one_case(), ceilings=Ceilings(((2**18, 0.07), (2**28, 8.9)), None))
    for idle in (
        replace(busy, ceilings=Ceilings(((2**18, 13.0), (2**28, 27.0)), None)),
        replace(busy, ceilings=Ceilings((), None)),
        # Launches bound small copies of a GPU.
        replace(busy, environment=replace(busy.environment, device="cuda:0 NVIDIA X")),
    ):
        assert busy_words(idle) is None
    said = busy_words(busy)
    assert said is not None
    assert "a copy of 256 KiB reached 0.07 GB/s, the largest 8.9 GB/s" in said
    assert note_lines(busy)[0] == said


# --- errors of rows -----------------------------------------------------------------------------------------------


def test_a_wrong_step_names_its_worst_tensor() -> None:
    off = StepDifference("gradient", "stem.weight", 2, 0.1234, 4.2e-8, in_float64=True)
    row = replace(step_profile().rows[0], error="wrong result", wrong=True, difference=off)
    assert error_words(row) == (
        "wrong: the gradient of stem.weight (and 2 more) differs from native's in float64: relative error 1.2e-01, "
        "allowed 4.2e-08"
    )
    loss = replace(row, difference=StepDifference("loss", "", 0, float("nan"), 0.1, in_float64=False))
    assert error_words(loss) == "wrong: the loss differs from native's: relative error nan, allowed 1.0e-01"
    assert "the gradient of stem.weight" in to_csv(replace(step_profile(), rows=(row,)))


def test_a_wrong_kernel_names_its_worst_place_and_the_small_case_that_shows_it() -> None:
    off = Finding("off", "dx", 7.0, at=(0, 1), found=1.5, expected=2.0)
    row = KernelCost(Case((4, 3), "bn", "fp32"), "mine:norm", 1, None, error="wrong result", wrong=True, finding=off)
    assert error_words(row) == "dx[0, 1] is 1.5; expected 2"
    small = replace(row, wrong_case="train/float16/contiguous/11x3/plain")
    assert error_words(small) == "dx[0, 1] is 1.5; expected 2, in the case train/float16/contiguous/11x3/plain"


def test_another_error_is_its_own_text_on_one_line() -> None:
    assert error_words(replace(step_profile().rows[0], error="out of\nmemory")) == "out of memory"
    assert error_words(step_profile().rows[0]) is None


# --- norm layers --------------------------------------------------------------------------------------------------


def test_norm_layers_are_counted_with_what_each_is_one_call_with() -> None:
    native = NormLayers("batch norm", 1, "native")
    unchanged = NormLayers("batch norm", 2, "native", True)
    twice = NormLayers("batch norm", 1, "fused", True, (("relu",), ()))
    others = (NormLayers("GroupNorm", 2), NormLayers("LayerNorm", 1))
    for norms, words in (
        (FUSED_NORMS, "19 batch norms (9 with relu, 9 with residual add + relu, 1 alone)"),
        ((native,), "1 batch norm"),
        ((NormLayers("batch norm", 2, "fused"),), "2 batch norms, 2 on the fused kernel"),
        ((unchanged, twice), "3 batch norms (2 unchanged, 1 with relu, alone)"),
        ((native, *others), "1 batch norm, 2 GroupNorm, 1 LayerNorm"),
        (others, "2 GroupNorm, 1 LayerNorm"),
        ((), ""),
    ):
        assert norms_words(norms) == words


MEAN = {"of_channels": 8, "deviations": 5012.4, "limit": 1000}
REMARKS = (
    (
        NormRemark("arm", "one value", "1"),
        "one value per channel: a batch of 1 without positions",
        "use batches of 2",
    ),
    (
        NormRemark("arm", "constant channels", "0", 0, {"of_channels": 16, "eps": 1e-5}, (0, 3, 4, 9, 11)),
        "constant within a batch: 5 of 16 channels: 0, 3, 4, 9, ... (1 more)",
        "gradients are multiplied by 1/sqrt(eps) = 316: remove",
    ),
    (
        NormRemark("arm", "large mean", "0", 0, MEAN, (2, 5), "bfloat16"),
        "a mean of 5,012 standard deviations in 2 of 8 channels: 2, 5",
        "above 1,000 the variance loses digits in bfloat16: center the input first",
    ),
    (
        NormRemark("arm", "cumulative average", "1"),
        "momentum None: the running statistics are the cumulative average of all steps",
        "set a momentum",
    ),
    (
        NormRemark("arm", "short half-life", "1", 0, {"momentum": 0.9, "half_life_steps": 0.30103}),
        "momentum 0.9: the running average has a half-life of 0.3 steps",
        "0.1 may be what was meant",
    ),
    (
        NormRemark(
            "arm", "long half-life", "1", 0,
            {"momentum": 0.001, "half_life_steps": 692.8, "budget_steps": 500, "kept": 0.606},
        ),
        "momentum 0.001: the running average has a half-life of 693 steps, and training has 500",
        "at the end 61% of it is still its initial 0 and 1: raise the momentum",
    ),
    (
        NormRemark("arm", "long half-life", "1", 0, {"momentum": 0.0, "half_life_steps": float("inf")}),
        "momentum 0: the running average has a half-life of inf steps",
        "at the end 100% of it",
    ),
    (
        NormRemark("arm", "running mean off", "0", 0, {"of_channels": 8, "steps": 10005, "deviations": 20.1}, (7,)),
        "after 10,005 steps the running mean is 20 standard deviations off the batches' in 1 of 8 channels: 7",
        "estimate the statistics again",
    ),
    (
        NormRemark("arm", "bias without effect", "1", 0, {"parameters": 8}, source="0"),
        "the bias of 0 has no effect, since the norm subtracts it (8 unused parameters)",
        "set bias=False in 0: the norm has a bias of its own",
    ),
    (
        NormRemark("arm", "last batch of one", "1", 0, {"raises": 1.0}),
        "the last batch of an epoch would have 1 example: torch raises in training",
        "drop_last=True",
    ),
    (
        NormRemark("arm", "last batch of one", "1", 0, {"raises": 0.0}),
        "the last batch of an epoch would have 1 example: its statistics are those of one example",
        "drop_last=True",
    ),
)  # fmt: skip


@pytest.mark.parametrize(("remark", "finding", "advice"), REMARKS, ids=[remark.kind for remark, _, _ in REMARKS])
def test_a_remark_says_what_is_wrong_and_what_to_do(remark: NormRemark, finding: str, advice: str) -> None:
    words = remark_words(remark)
    assert words.finding == finding
    assert advice in words.advice


def test_every_kind_of_remark_has_its_sentence() -> None:
    assert {remark.kind for remark, _, _ in REMARKS} == {*get_args(RemarkKind)}


def test_a_remark_names_the_first_layer_and_how_many_more() -> None:
    remark = NormRemark("arm", "one value", "blocks.0.norm")
    assert remark_words(remark).layer == "blocks.0.norm"
    assert remark_words(replace(remark, more_layers=3)).layer == "blocks.0.norm and 3 more"
    assert remark_words(replace(remark, layer="")).layer == "(the model)"
