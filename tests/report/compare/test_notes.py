"""Notes in words."""

from __future__ import annotations

from typing import get_args

import pytest

from bncli.measure.compare.reuse import IDENTITY
from bncli.report.compare.notes import CHANGED, SENTENCES, sentence
from bncli.results.compare import Note, NoteKind


def test_every_kind_of_note_has_a_sentence():
    assert set(SENTENCES) == set(get_args(NoteKind))
    assert set(CHANGED) == {*IDENTITY, "code"}


@pytest.mark.parametrize(
    ("note", "words"),
    [
        (Note.of("unfinished", done=3, planned=9, failed=0), "3 of 9 runs are done; the figures are based on those"),
        (
            Note.of("failed", failure="it died", runs=1, arms=["plain"], run="lr 1, seed 2"),
            "plain: lr 1, seed 2 failed: it died",
        ),
        (
            Note.of("failed", failure="it died", runs=20, arms=["plain", "normed"], run=None),
            "plain, normed: 20 runs failed: it died",
        ),
        (Note.of("few seeds", seeds=1, ratio=1.5, needed=None), "1 seed per arm is few"),
        (
            Note.of("not told apart", arms=["a", "b"], reference="plain", comparisons=2),
            "not distinguishable from plain by the 95 % interval (not corrected for 2 comparisons): a, b",
        ),
        (
            Note.of("few evaluations", "plain", fewest=10, evaluate_every=1),
            "plain: fewer than 10 evaluations before its target; set train.evaluate_every to 1",
        ),
        (
            Note.of("not reused", runs=3, changed={"torch": 2, "code": 1}),
            "3 earlier runs are not reused: torch has another version (2), the model's code has changed (1)",
        ),
        (
            Note.of("earlier answer", file="comparison-1.json"),
            "the folder's earlier result, of another plan, is kept as comparison-1.json",
        ),
    ],
)
def test_a_note_is_a_sentence_behind_its_arm(note, words):
    assert sentence(note) == words
