"""Sentences of a profile: each kind of note and remark, word for word."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from bncli.report.profile.export import to_csv
from bncli.report.profile.notes import (
    busy_words,
    difference_words,
    error_words,
    norms_words,
    note_lines,
    note_words,
    remark_words,
)
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

CASES = tuple(Case((4, 3, 5, side), "bn+relu", "fp32") for side in (7, 8, 9))
NOTES = {
    Note("channels sampled", cases=CASES): (
        "run whole, and judged on some of the channels, from the first to the last: "
        "fp32 contiguous bn+relu 4x3x5x7 and 2 more"
    ),
    Note("peak needs compilation", "compiled"): (
        "compiled: no peak of memory, which would take another compilation in a process of its own"
    ),
    Note("peak unknown", "native", CASES[:1], reason="it hung"): (
        "native: no peak of memory: it hung: fp32 contiguous bn+relu 4x3x5x7"
    ),
    Note("few rounds", count=6): "fewer rounds than the 6 of an interval",
    Note("compilation", "good", seconds=7.04): "good: 7.0 s of compilation, which are in no row",
    Note("host bound", count=3, of=40): "in 3 of 40 samples the device waited for the host",
    Note("same work", arm="plain", others=("faster", "other start")): (
        "plain stands for faster, other start as well: their steps take the same work"
    ),
    Note("model compiled", arm="plain"): (
        "plain is compiled: what torch.compile fused counts as other, whatever it holds"
    ),
    Note("random data", arm="mine:make"): (
        "mine:make is trained on random numbers: the loss is the mean of its output's squares"
    ),
    Note("memory unknown", "fused", arm="plain", reason="its process ended with exit code -9"): (
        "plain, fused: its memory is unknown: its process ended with exit code -9"
    ),
    Note("norms not watched", arm="plain", reason="no room"): "plain: its norms could not be watched: no room",
    Note("norms watched", arm="plain", count=5, of=35): (
        "plain: its norms were watched for 5 training steps; running statistics are judged after 35"
    ),
}


@pytest.mark.parametrize(("note", "sentence"), NOTES.items(), ids=lambda value: getattr(value, "kind", ""))
def test_a_note_is_a_sentence(note, sentence):
    assert note_words(note) == sentence


def test_every_kind_of_note_has_its_sentence():
    assert {note.kind for note in NOTES} == {*get_args(NoteKind)}


def test_a_memory_without_a_kernel_and_norms_watched_long_enough_say_so():
    assert note_words(Note("memory unknown", arm="plain", reason="x")) == "plain, no kernel: its memory is unknown: x"
    watched = Note("norms watched", arm="plain", count=35, of=35)
    assert note_words(watched) == "plain: its norms were watched for 35 training steps"


def test_a_small_copy_that_takes_as_long_as_a_large_one_tells_of_other_programs():
    idle = Ceilings(((2**18, 13.0), (2**28, 27.0)), None)
    busy = Ceilings(((2**18, 0.07), (2**28, 8.9)), None)
    assert busy_words(replace(one_case(), ceilings=idle)) is None
    assert busy_words(replace(one_case(), ceilings=Ceilings((), None))) is None
    on_gpu = replace(one_case(), ceilings=busy, environment=replace(one_case().environment, device="cuda:0 NVIDIA X"))
    assert busy_words(on_gpu) is None  # where launches bound small copies
    profile = replace(one_case(), ceilings=busy)
    said = busy_words(profile)
    assert said is not None
    assert "a copy of 256 KiB reached 0.07 GB/s, the largest 8.9 GB/s" in said
    assert note_lines(profile)[0] == said
    assert note_lines(step_profile()) == [note_words(note) for note in step_profile().notes]


def test_a_wrong_step_is_told_by_its_worst_tensor():
    off = StepDifference("gradient", "stem.weight", 2, 0.1234, 4.2e-8, in_float64=True)
    row = replace(step_profile().rows[0], error="wrong result", wrong=True, difference=off)
    assert error_words(row) == (
        "wrong: the gradient of stem.weight (and 2 more) is 1.2e-01 of its size off native's, in float64; "
        "4.2e-08 is allowed"
    )
    loss = StepDifference("loss", "", 0, float("nan"), 0.1, in_float64=False)
    assert difference_words(loss) == "wrong: the loss is nan of its size off native's; 1.0e-01 is allowed"
    assert "the gradient of stem.weight" in to_csv(replace(step_profile(), rows=(row,)))


def test_another_error_is_its_own_text_on_one_line():
    assert error_words(replace(step_profile().rows[0], error="out of\nmemory")) == "out of memory"
    assert error_words(step_profile().rows[0]) is None


# --- norm layers ------------------------------------------------------------------------------------------------------


def test_norm_layers_are_counted_with_what_each_is_one_call_with():
    left = NormLayers("batch norm", 2, "native", True)
    twice = NormLayers("batch norm", 1, "fused", True, (("relu",), ()))
    others = (NormLayers("GroupNorm", 2), NormLayers("LayerNorm", 1))
    assert norms_words(FUSED_NORMS) == "19 batch norms (9 with relu, 9 with residual add + relu, 1 alone)"
    assert norms_words((NormLayers("batch norm", 1, "native"),)) == "1 batch norm"
    assert norms_words((NormLayers("batch norm", 2, "fused"),)) == "2 batch norms, 2 on the fused kernel"
    assert norms_words((left, twice)) == "3 batch norms (2 left as it was, 1 with relu, alone)"
    assert norms_words((NormLayers("batch norm", 1, "native"), *others)) == "1 batch norm, 2 GroupNorm, 1 LayerNorm"
    assert norms_words(others) == "2 GroupNorm, 1 LayerNorm"
    assert norms_words(()) == ""


MEAN = {"of_channels": 8, "deviations": 5012.4, "limit": 1000}
REMARKS = {
    "one value": (NormRemark("arm", "one value", "1"), "one value a channel: a batch of 1, and no positions", "use ba"),
    "constant channels": (
        NormRemark("arm", "constant channels", "0", 0, {"of_channels": 16, "eps": 1e-5}, (0, 3, 4, 9, 11)),
        "5 of 16 channels are constant in a batch: 0, 3, 4, 9, ... (1 more)",
        "gradients pass times 1/sqrt(eps) = 316: leave",
    ),
    "large mean": (
        NormRemark("arm", "large mean", "0", 0, MEAN, (2, 5), "bfloat16"),
        "a mean of 5,012 deviations in 2 of 8 channels: 2, 5",
        "beyond 1,000 in bfloat16 digits of the variance are lost",
    ),
    "cumulative average": (
        NormRemark("arm", "cumulative average", "1"),
        "momentum None: the running statistics are the cumulative average of all steps",
        "give a momentum",
    ),
    "short half-life": (
        NormRemark("arm", "short half-life", "1", 0, {"momentum": 0.9, "half_life_steps": 0.30103}),
        "momentum 0.9: the running average's half-life is 0.3 steps",
        "0.1 may be what was meant",
    ),
    "long half-life": (
        NormRemark(
            "arm", "long half-life", "1", 0,
            {"momentum": 0.001, "half_life_steps": 692.8, "budget_steps": 500, "kept": 0.606},
        ),
        "momentum 0.001: the running average's half-life is 693 steps, and training has 500",
        "at the end 61% of it is still its initial 0 and 1: raise the momentum",
    ),
    "running mean off": (
        NormRemark("arm", "running mean off", "0", 0, {"of_channels": 8, "steps": 10005, "deviations": 20.1}, (7,)),
        "after 10,005 steps the running mean is 20 deviations off the batches' in 1 of 8 channels: 7",
        "re-estimate the statistics",
    ),
    "bias without effect": (
        NormRemark("arm", "bias without effect", "1", 0, {"parameters": 8}, source="0"),
        "the bias of 0 right in front is subtracted again (8 dead parameters)",
        "give 0 bias=False: the norm's own bias does its work",
    ),
    "last batch of one": (
        NormRemark("arm", "last batch of one", "1", 0, {"raises": 1.0}),
        "an epoch's last batch would have 1 example: torch raises there in training",
        "drop_last=True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REMARKS)
def test_a_remark_says_what_is_wrong_and_what_to_do(kind):
    remark, finding, advice = REMARKS[kind]
    words = remark_words(remark)
    assert remark.kind == kind
    assert words.finding == finding
    assert advice in words.advice


def test_every_kind_of_remark_has_its_sentence():
    assert {*REMARKS} == {*get_args(RemarkKind)}


def test_an_unknown_budget_an_endless_average_and_a_batch_of_one_that_runs_are_told():
    endless = NormRemark("arm", "long half-life", "1", 0, {"momentum": 0.0, "half_life_steps": float("inf")})
    assert remark_words(endless).finding == "momentum 0: the running average's half-life is inf steps"
    assert remark_words(endless).advice.startswith("at the end 100% of it")
    runs = remark_words(NormRemark("arm", "last batch of one", "1", 0, {"raises": 0.0}))
    assert runs.finding.endswith("its statistics are those of one example")


def test_a_remark_names_the_first_layer_and_how_many_more():
    remark = NormRemark("arm", "one value", "blocks.0.norm")
    assert remark_words(remark).layer == "blocks.0.norm"
    assert remark_words(replace(remark, more_layers=3)).layer == "blocks.0.norm and 3 more"
    assert remark_words(replace(remark, layer="")).layer == "(the model)"


def test_a_wrong_kernel_is_told_with_its_worst_place_and_the_small_case_that_shows_it() -> None:
    off = Finding("off", "dx", 7.0, at=(0, 1), found=1.5, expected=2.0)
    row = KernelCost(Case((4, 3), "bn", "fp32"), "mine:norm", 1, None, error="wrong result", wrong=True, finding=off)
    assert error_words(row) == "dx[0, 1] is 1.5; expected 2"
    small = replace(row, wrong_case="train/float16/contiguous/11x3/plain")
    assert error_words(small) == "dx[0, 1] is 1.5; expected 2, in the case train/float16/contiguous/11x3/plain"
