"""Notes in words."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from bncli.measure.compare.reuse import IDENTITY
from bncli.report.compare.notes import CHANGED, OF_ARMS, SENTENCES, WARNINGS, sentences, warnings
from bncli.report.compare.text import footnotes
from bncli.results.compare import Note, NoteKind


def test_every_kind_of_note_has_its_words_in_one_table():
    assert sorted([*SENTENCES, *OF_ARMS]) == sorted(get_args(NoteKind))
    assert set(get_args(NoteKind)) >= WARNINGS
    assert set(CHANGED) == {*IDENTITY, "code"}


@pytest.mark.parametrize(
    ("note", "words"),
    [
        (Note.of("unfinished", done=3, planned=9, failed=0), "3 of 9 runs are done; the figures are based on those"),
        (
            Note.of("failed", failure="it died", runs=1, arms=["plain"], run="lr 1, seed 2"),
            "Failed: plain (lr 1, seed 2): it died",
        ),
        (
            Note.of("failed", failure="it died", runs=20, arms=["plain", "normed"], run=None),
            "Failed: plain, normed (20 runs): it died",
        ),
        (Note.of("few seeds", seeds=1, ratio=1.5, needed=None), "Few seeds per arm: 1"),
        (
            Note.of("not told apart", arms=["a", "b"], reference="plain", comparisons=2),
            "Not distinguishable from plain by the 95 % interval (not corrected for 2 comparisons): a, b",
        ),
        (
            Note.of("few evaluations", "plain", fewest=10, evaluate_every=1),
            "Fewer than 10 evaluations before the target: plain (set train.evaluate_every to 1)",
        ),
        (
            Note.of("every second evaluation", "plain", thinned=0.5, ratio=1.25),
            "Every second evaluation alone gives another ratio: plain (2.00x more, not 1.25x fewer); evaluate more "
            "often or hold more examples out",
        ),
        (
            Note.of("not reused", runs=3, changed={"torch": 2, "code": 1}),
            "3 earlier runs are not reused: torch has another version (2), the model's code has changed (1)",
        ),
        (
            Note.of("disturbed", cores_lacked={"plain": 0.25, "bn": 0.5}),
            "!: measured while other programs used the cores: up to 0.50 threads at a time waited for one, so these "
            "times are too long; measure again on idle cores (plain, bn)",
        ),
        (
            Note.of("earlier answer", file="comparison-1.json"),
            "the folder's earlier result, of another plan, is kept as comparison-1.json",
        ),
    ],
)
def test_a_note_is_a_sentence(note, words):
    assert sentences([note]) == [words]


def test_notes_of_one_kind_about_several_arms_are_one_line_that_lists_them():
    edges = [("plain", "optimizer.lr", 10), ("plain", "model.init.std", 0.1), ("b", "optimizer.lr", 3)]
    notes = [Note.of("at edge", arm, field=field, value=each, smallest=each < 1) for arm, field, each in edges]
    few = [Note.of("few steps", arm, fewest=10) for arm in ("plain", "b")]
    differ = [Note.of("arms differ", field=field, values={"plain": 1, "b": 2}) for field in ("train.tf32", "schedule")]
    assert sentences([*notes, *few, *differ]) == [
        "At the edge of the grid: plain (optimizer.lr 10; model.init.std 0.1), b (optimizer.lr 3); add values beyond",
        "Fewer than 10 steps to the target: plain, b; choose a harder one",
        "The arms differ in train.tf32: plain 1, b 2",
        "The arms differ in schedule: plain 1, b 2",
    ]


def test_a_note_is_either_a_warning_or_a_footnote(examples):
    found = examples["two arms"]
    notes = (Note.of("paper"), Note.of("few seeds", seeds=2, ratio=1.5, needed=5), *found.notes)
    found = replace(found, notes=notes)
    assert warnings(found) == sentences(notes[1:2])
    assert [note.rstrip(".") for note in footnotes(found)[:2]] == [
        each.rstrip(".") for each in sentences((notes[0], *notes[2:]))
    ]
