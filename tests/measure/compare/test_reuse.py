"""Runs of earlier calls: used where nothing that they depend on has changed, counted with the reason where it has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bncli.errors import BncliError
from bncli.measure.compare.plan import Study, collect, planned_runs, wanted
from bncli.measure.compare.reuse import (
    PACKAGE,
    fits,
    identity,
    not_reused,
    of_one_code,
    report_of_runs,
    says_more,
    sources_digest,
    usable,
)
from bncli.measure.compare.summary import summarise
from bncli.results.compare import BegunComparison, RunRecord
from bncli.results.serialize import to_plain
from tests.conftest import tiny
from tests.measure.compare.test_plan import ARMS, BASE, record, sentences, study_of

IDENTITY = {"bncli": "0 one", "torch": "2", "device": "cpu", "data": "d"}


def asked(folder: Path, arms: str = ARMS, **changes: str) -> Study:
    return replace(study_of(folder, BASE + arms), identity=IDENTITY | changes, _jobs={})


def done(study: Study, **code: str) -> list[RunRecord]:
    """The tuning runs of a study, as a call leaves them."""
    return [
        replace(record(job, 100.0), recipe_key=job.recipe_key, identity=study.identity, code=code)
        for job in wanted(study, {})
    ]


# --- identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("engine/train.py", True),
        ("engine/deeper/new.py", True),
        ("kernels/fused/cpu.c", True),
        ("recipe/sections.py", True),
        ("report/table.py", False),
        ("engine/train.pyc", False),
    ],
)
def test_a_change_of_the_engine_the_kernels_or_the_recipe_makes_other_runs(
    tmp_path: Path, file: str, changes: bool
) -> None:
    for name in ("engine/train.py", "kernels/fused/cpu.c", "recipe/sections.py", "report/table.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    before = sources_digest(tmp_path)
    assert sources_digest(tmp_path) == before
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("new")
    assert (sources_digest(tmp_path) != before) == changes


def test_bnclis_own_code_is_part_of_a_runs_identity() -> None:
    found = identity("cpu", tiny())
    assert sources_digest(PACKAGE) in found["bncli"]
    assert found["device"] == "cpu"


@pytest.mark.parametrize("part", IDENTITY)
def test_a_change_of_anything_in_the_identity_makes_other_keys(tmp_path: Path, part: str) -> None:
    before, after = asked(tmp_path), asked(tmp_path, **{part: "another"})
    assert not {job.key for job in wanted(before, {})} & {job.key for job in wanted(after, {})}
    assert [job.recipe_key for job in wanted(before, {})] == [job.recipe_key for job in wanted(after, {})]


# --- what may be used ---------------------------------------------------------------------------------------------


def net(folder: Path, text: str) -> dict[str, str]:
    """net.py with that text, and what a run that loads it records."""
    (folder / "net.py").write_text(text)
    return {"net.py": hashlib.sha256(text.encode()).hexdigest()}


def test_a_run_is_used_while_all_code_that_it_loaded_stands_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = asked(tmp_path)
    old = done(study, **net(tmp_path, "old"))
    assert list(usable(old).values()) == old
    new = done(study, **net(tmp_path, "new"))
    assert usable(old) == {}
    assert list(usable([*new, *old]).values()) == new
    (tmp_path / "net.py").unlink()
    assert usable([*new, *old]) == {}


CHANGES: dict[str, Callable[[Path], tuple[Study, str]]] = {
    "bncli": lambda folder: (asked(folder, bncli="0 two"), "bncli's own code has changed since (18)"),
    "torch": lambda folder: (asked(folder, torch="3"), "torch is another version (18)"),
    "device": lambda folder: (asked(folder, device="cuda"), "they ran on another device (18)"),
    "data": lambda folder: (asked(folder, data="e"), "the data have changed (18)"),
    "code": lambda folder: (net(folder, "new") and asked(folder), "the model's code has changed (18)"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("part", CHANGES)
def test_runs_that_are_not_used_are_counted_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = done(asked(tmp_path), **net(tmp_path, "old"))
    assert not_reused(wanted(asked(tmp_path), {}), kept, IDENTITY) == []
    study, reason = CHANGES[part](tmp_path)
    said = sentences(not_reused(wanted(study, {}), kept, study.identity))
    assert said == [f"18 earlier runs are not reused: {reason}"]
    again = done(study)
    assert not_reused(wanted(study, {}), [*kept, *again], study.identity) == []


def test_several_reasons_are_counted_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    study = asked(tmp_path)
    kept = [*done(asked(tmp_path, bncli="0 zero"))[:8], *done(study, **net(tmp_path, "old"))[8:12], *done(study)[12:]]
    net(tmp_path, "new")
    assert sentences(not_reused(wanted(study, {}), kept, study.identity)) == [
        "12 earlier runs are not reused: bncli's own code has changed since (8), the model's code has changed (4)"
    ]


def test_one_run_is_said_as_one(tmp_path: Path) -> None:
    kept = done(asked(tmp_path, torch="1"))[:1]
    study = asked(tmp_path)
    assert sentences(not_reused(wanted(study, {}), kept, study.identity)) == [
        "1 earlier run is not reused: torch is another version (1)"
    ]


@pytest.mark.parametrize(
    ("arms", "fit"),
    [
        (ARMS, True),
        (ARMS.replace("tune: 3", "tune: 4"), True),
        (ARMS.replace("normed: {norm: batch}", "layer: {norm: layer}"), True),
        (ARMS.replace("0.1, 1, 10", "3, 30"), True),
        (ARMS.replace("grid: {optimizer.lr: [0.1, 1, 10]}", ""), True),
        (ARMS.replace("plain:", "plain: {norm: group}").replace("norm: batch", "norm: layer"), False),
    ],
)
def test_runs_fit_a_study_that_shares_an_arm_with_theirs(tmp_path: Path, arms: str, fit: bool) -> None:
    kept = done(asked(tmp_path, bncli="0 zero"))
    assert fits(asked(tmp_path, arms), kept) is fit


def test_runs_of_a_grid_over_a_field_that_there_is_not_do_not_fit(tmp_path: Path) -> None:
    kept = [replace(each, point={"optimizer.betas": [0.9]}) for each in done(asked(tmp_path))]
    assert not fits(asked(tmp_path), kept)


# --- threads ------------------------------------------------------------------------------------------------------


def with_threads(one: RunRecord, threads: int) -> RunRecord:
    assert one.result
    return replace(
        one, result=replace(one.result, environment=replace(one.result.environment, threads=threads), ms_per_step=9.0)
    )


def finished(study: Study) -> list[RunRecord]:
    records: dict[str, RunRecord] = {}
    while to_do := [job for job in wanted(study, records) if job.key not in records]:
        records.update({job.key: record(job, 100.0) for job in to_do})
    return collect(study, records)


def test_the_steps_of_runs_with_other_threads_are_used_and_their_cost_is_not(tmp_path: Path) -> None:
    study = asked(tmp_path)
    found = [with_threads(one, 4) if one.arm == "plain" or one.seed == 10 else one for one in finished(study)]
    plain, normed = (made := summarise(study.plan, found, 28, 1)).arms
    assert (plain.hits, plain.steps.value) == (8, pytest.approx(100))
    assert plain.seconds is None
    assert (plain.samples_per_s, plain.ms_per_step, plain.peak_memory_mib) == (None, None, None)
    assert (normed.ms_per_step, normed.peak_memory_mib) == (1.0, 300.0)
    assert sentences(made.notes)[-1] == (
        "27 of 48 runs were made with 4 and not 1 thread: their steps are used, their seconds, samples/s and memory "
        "are not"
    )
    assert summarise(made.plan, made.runs, 28, made.threads) == made
    assert summarise(study.plan, found, 28).arms[0].ms_per_step == 9.0


def test_runs_with_the_threads_that_are_asked_for_are_not_mentioned(tmp_path: Path) -> None:
    study = asked(tmp_path)
    assert not any("thread" in note for note in sentences(summarise(study.plan, finished(study), 28, 1).notes))


# --- the report of a comparison that was killed -------------------------------------------------------------------


def begun(study: Study) -> BegunComparison:
    return BegunComparison(study.plan, study.identity, 1, ("small.yaml",))


@pytest.mark.parametrize("count", [0, 5, 20, 28])
def test_the_report_of_a_plan_and_its_runs_is_the_one_that_the_call_would_have_given(
    tmp_path: Path, count: int
) -> None:
    study = asked(tmp_path)
    records = {one.key: one for one in finished(study)[:count]}
    expected = summarise(study.plan, collect(study, records), planned_runs(study, records), 1)
    failed = [replace(one, result=None, failure="it died") for one in finished(study)[:2]]
    again = report_of_runs(begun(study), records.values(), failed if count > 2 else [])
    assert to_plain(again) == to_plain(expected)


def test_failed_runs_are_part_of_the_report(tmp_path: Path) -> None:
    study = asked(tmp_path)
    failed = [replace(one, result=None, failure="it died") for one in finished(study)[-2:]]
    assert sentences(report_of_runs(begun(study), [], failed).notes)[0].startswith("0 of 28 runs are done, 2 failed")


def test_runs_by_earlier_code_are_left_out(tmp_path: Path) -> None:
    def dated(one: RunRecord, date: str, **code: str) -> RunRecord:
        assert one.result
        made = replace(one.result, environment=replace(one.result.environment, date=date))
        return replace(one, result=made, code={**code, "common.py": "same"})

    runs = finished(asked(tmp_path))[-3:]
    kept = [dated(runs[0], "2026-02", net="new"), dated(runs[1], "2026-01", net="old"), dated(runs[2], "2026-01")]
    assert sorted(one.key for one in of_one_code(kept)) == sorted(one.key for one in (runs[0], runs[2]))
    report = report_of_runs(begun(asked(tmp_path)), kept, [])
    assert {run.key for run in report.runs} == {runs[0].key, runs[2].key}
    answer = report_of_runs(begun(asked(tmp_path)), [dated(one, "2026-01", net="old") for one in runs], [])
    assert says_more(report, answer)
    assert not says_more(answer, answer)
    assert not says_more(report_of_runs(begun(asked(tmp_path)), kept[2:], []), replace(answer, runs=tuple(kept)))


def test_a_plan_whose_recipes_this_bncli_does_not_know_is_said(tmp_path: Path) -> None:
    study = asked(tmp_path)
    recipes: dict[str, Any] = {**study.plan.recipes, "normed": {"norm": "of another kind"}}
    with pytest.raises(BncliError, match="its recipes are not as this bncli has them; run compare again"):
        report_of_runs(replace(begun(study), plan=replace(study.plan, recipes=recipes)), [], [])
