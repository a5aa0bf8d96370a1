"""Words and figures of a profile: cells, and each kind of note and remark word for word."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest

from bncli.report.profile.export import to_csv
from bncli.report.profile.text import (
    error_words,
    memory_column,
    norms_words,
    note_lines,
    note_words,
    of_native,
    percent,
    quartiles,
    remark_words,
    samples_cell,
    speedup_cell,
)
from bncli.report.text import Cell
from bncli.results.environment import Interval
from bncli.results.finding import Finding
from bncli.results.profile import (
    Case,
    KernelCost,
    NormLayers,
    NormRemark,
    Note,
    NoteKind,
    Profile,
    RemarkKind,
    Speedup,
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


def test_a_speedup_in_words_says_slower_below_1_and_nothing_where_it_is_unclear() -> None:
    clear, slower = Speedup(2.31, Interval(2.24, 2.38)), Speedup(0.5, Interval(0.4, 0.8))
    assert of_native(clear) == "2.31 times faster than native (2.24–2.38)"
    assert of_native(slower, 0.5) == "2.00! times slower than native (1.25–2.50)"
    assert of_native(Speedup(1.96, Interval(0.188, 3.2)), 0.5) == (
        "not distinguishable from native (1.96x!, 0.188–3.20)"
    )
    assert of_native(replace(clear, of_medians=0.9)) == "not distinguishable from native (2.31x*, 2.24–2.38)"


def test_a_speedup_that_other_programs_disturbed_has_a_mark_and_no_colour() -> None:
    clear = Speedup(2.31, Interval(2.24, 2.38))
    assert speedup_cell(clear) == Cell("2.31x", "2.24–2.38", "bold green")
    assert speedup_cell(clear, None, 0.5) == Cell("2.31x!", "2.24–2.38", "bold")


def test_a_share_that_rounds_to_nothing_is_not_nothing() -> None:
    assert [percent(0.001), percent(0.0), percent(None)] == ["< 1%", "0%", "–"]


# --- notes --------------------------------------------------------------------------------------------------------

CASES = tuple(Case((4, 3, 5, side), "bn+relu", "fp32") for side in (7, 8, 9))
NOTES = {
    Note("channels sampled", cases=CASES): "a sample of the channels|fp32 contiguous bn+relu 4x3x5x7 and 2 more",
    Note("peak needs compilation", "compiled"): "compiled: no peak memory|another compilation",
    Note("peak unknown", "native", CASES[:1], reason="it hung"): "native: peak memory|it hung: fp32 contiguous bn+relu",
    Note("few rounds", count=6): "fewer than the 6 rounds",
    Note("compilation", "good", seconds=7.04): "good: 7.0 s of compilation",
    Note("host bound", count=3, of=40): "waited for the host in 3 of 40 samples",
    Note("same work", arm="plain", others=("faster", "other start")): "plain also represents faster, other start",
    Note("model compiled", arm="plain"): "plain is compiled|counts as other",
    Note("layers not traced", arm="plain"): "plain is compiled: the trace cannot name its layers",
    Note("random data", arm="mine:make"): "mine:make is trained on random inputs",
    Note("memory unknown", "fused", arm="plain", reason="exit code -9"): "plain, fused: memory unknown: exit code -9",
    Note("memory unknown", arm="plain", reason="x"): "plain, no kernel: memory unknown: x",
    Note("norms not watched", arm="plain", reason="no room"): "plain: the norm layers|no room",
    Note("not folded", arm="plain", reason="no graph"): "plain: evaluation|folded: no graph",
    Note("norms watched", arm="plain", count=5, of=35): "plain: |5 training steps; running statistics|after 35",
    Note("norms watched", arm="plain", count=35, of=35): "plain: the norm layers were observed for 35 training steps",
    Note("norms watched", arm="bn", count=1, of=1): "bn: the norm layers were observed for 1 training step",
}


def test_a_note_of_each_kind_has_its_facts() -> None:
    for note, facts in NOTES.items():
        assert [fact for fact in facts.split("|") if fact not in note_words(note)] == []
    *_, watched = NOTES
    assert note_words(watched) == NOTES[watched]  # and no end, which it has reached
    assert {note.kind for note in NOTES} == {*get_args(NoteKind)}
    assert note_lines(step_profile()) == [note_words(note) for note in step_profile().notes]


@pytest.mark.parametrize("made", [one_case(), step_profile()])
def test_other_programs_are_said_once_with_the_most_cores_that_a_row_lacked(made: Profile) -> None:
    native, fused, *others = made.rows
    for lacked in (None, 0.0, 0.1):
        rows = (replace(native, cores_lacked=lacked), replace(fused, cores_lacked=lacked), *others)
        assert not [line for line in note_lines(replace(made, rows=rows)) if line.startswith("!")]  # type: ignore[arg-type]
    rows = (replace(native, cores_lacked=0.31), replace(fused, cores_lacked=1.42), *others)
    (said,) = [line for line in note_lines(replace(made, rows=rows)) if line.startswith("!")]  # type: ignore[arg-type]
    assert "other programs used the cores: up to 1.4 threads at a time waited for one" in said
    assert "measure again on idle cores" in said
    assert samples_cell([2.0, 2.0], 0.31).main == "2.00!"
    assert samples_cell([2.0, 2.0], 0.05).main == "2.00"


def test_a_ratio_that_the_medians_contradict_is_marked_and_explained_once() -> None:
    row = replace(one_case().rows[1], faster=Speedup(0.895, Interval(0.85, 0.95), of_medians=1.386))
    assert row.faster is not None
    assert speedup_cell(row.faster).main == "0.895x*"
    said = note_lines(replace(one_case(), rows=(row,)))[0]
    assert said.startswith(f"*: the two medians give another ratio ({row.key}: 1.39x). Trust the marked one")
    agreed = replace(row, faster=replace(row.faster, of_medians=0.9))
    assert speedup_cell(agreed.faster).main == "0.895x"
    assert not [line for line in note_lines(replace(one_case(), rows=(agreed,))) if line.startswith("*")]


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
        (FUSED_NORMS, "19 batch norms (9 fused with relu, 9 fused with residual add + relu, 1 not fused)"),
        ((native,), "1 batch norm"),
        ((NormLayers("batch norm", 2, "fused"),), "2 batch norms, 2 on the fused kernel"),
        ((unchanged, twice), "3 batch norms (2 not converted, 1 fused with relu or not fused, depending on the call)"),
        ((native, *others), "1 batch norm, 2 GroupNorm, 1 LayerNorm"),
        (others, "2 GroupNorm, 1 LayerNorm"),
        ((), ""),
    ):
        assert norms_words(norms) == words


def remark(kind: Any, channels: tuple[int, ...] = (), source: str | None = None, **figures: float) -> NormRemark:
    return NormRemark("arm", kind, "1", 0, figures, channels, "bfloat16", source)


SHORT, LONG = {"momentum": 0.9, "half_life_steps": 0.30103}, {"momentum": 0.001, "half_life_steps": 692.8}
BUDGET = {"budget_steps": 500, "kept": 0.606}
REMARKS = (
    (remark("one value"), "one value per channel: a batch of 1", "use batches of 2"),
    (
        remark("constant channels", (0, 3, 4, 9, 11), of_channels=16, eps=1e-5),
        "5 of 16 channels: 0, 3, 4, 9, ... (1 more)",
        "1/sqrt(eps) = 316: remove",
    ),
    (
        remark("large mean", (2, 5), of_channels=8, deviations=5012.4, limit=1000),
        "a mean of 5,012 standard deviations in 2 of 8 channels: 2, 5",
        "above 1,000 the variance loses digits in bfloat16: center the input first",
    ),
    (remark("cumulative average"), "momentum None: ", "set a momentum"),
    (remark("short half-life", **SHORT), "momentum 0.9: |half-life of 0.3 steps", "0.1 may be what was meant"),
    (
        remark("long half-life", **LONG, **BUDGET),
        "momentum 0.001: |half-life of 693 steps, and training has 500",
        "at the end 61% of it is still its initial 0 and 1: raise the momentum",
    ),
    (
        remark("long half-life", momentum=0.0, half_life_steps=math.inf),
        "momentum 0: |half-life of inf steps",
        "at the end 100% of it",
    ),
    (
        remark("running mean off", (7,), of_channels=8, steps=10005, deviations=20.1),
        "after 10,005 steps |is 20 standard deviations off |in 1 of 8 channels: 7",
        "estimate the statistics again",
    ),
    (
        replace(remark("bias without effect", source="0", parameters=8), source_class="Conv2d"),
        "the bias of layer 0 (Conv2d) |8 unused parameters",
        "bias=False in layer 0 (Conv2d): ",
    ),
    (remark("last batch of one", raises=1.0), "1 example: torch raises in training", "drop_last=True"),
    (remark("last batch of one", raises=0.0), "1 example: its statistics are those of one example", "drop_last=True"),
)


def test_a_remark_of_each_kind_says_what_is_wrong_and_what_to_do() -> None:
    for made, finding, advice in REMARKS:
        words = remark_words(made)
        assert [fact for fact in finding.split("|") if fact not in words.finding] == []
        assert advice in words.advice
    assert {made.kind for made, _, _ in REMARKS} == {*get_args(RemarkKind)}


def test_a_remark_names_the_first_layer_and_how_many_more() -> None:
    for layer, more, words in (
        ("blocks.0.norm", 0, "blocks.0.norm"),
        ("blocks.0.norm", 3, "blocks.0.norm and 3 more"),
        ("1", 2, "layer 1 (BatchNorm2d) and 2 more"),
        ("features.1", 0, "layer features.1 (BatchNorm2d)"),
        ("", 0, "(the model)"),
    ):
        made = replace(remark("one value"), layer=layer, more_layers=more, layer_class="BatchNorm2d")
        assert remark_words(made).layer == words
