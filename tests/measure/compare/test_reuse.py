"""Runs of earlier calls: used where nothing that they depend on has changed, counted with the reason where it has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import pytest

from bncli.errors import BncliError
from bncli.measure.compare.plan import Study, collect, named_runs
from bncli.measure.compare.reuse import (
    PACKAGE,
    identity,
    not_reused,
    of_one_code,
    report_of_runs,
    says_more,
    sources_digest,
    usable,
)
from bncli.measure.compare.summary import summarise
from bncli.report.compare.notes import sentences
from bncli.results.compare import BegunComparison, Comparison, RunRecord
from bncli.results.serialize import to_plain
from tests.conftest import tiny
from tests.measure.compare.conftest import carried_out, changed, failed, record

IDENTITY = {"bncli": "0 one", "torch": "2", "device": "cpu", "data": "d"}


@pytest.fixture
def asked(asked: Study) -> Study:
    return of(asked)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def of(study: Study, **changes: str) -> Study:
    """The same study under another identity."""
    return replace(study, identity=IDENTITY | changes, _jobs={})


def done(study: Study, **code: str) -> list[RunRecord]:
    """The tuning runs of a study, as a call leaves them."""
    return [
        replace(record(job, 100.0), recipe_key=job.recipe_key, identity=study.identity, code=code)
        for job in named_runs(study, {}).jobs
    ]


# --- identity -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("engine/train.py", True),
        ("engine/deeper/new.py", True),
        ("kernels/fused/cpu.cpp", True),
        ("recipe/sections.py", True),
        ("report/table.py", False),
        ("engine/train.pyc", False),
    ],
)
def test_a_change_of_engine_kernels_or_recipe_makes_other_runs(tmp_path: Path, file: str, changes: bool) -> None:
    def write(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return sources_digest(tmp_path)

    for name in ("engine/train.py", "kernels/fused/cpu.cpp", "recipe/sections.py", "report/table.py"):
        before = write(name, "old")
    assert sources_digest(tmp_path) == before
    assert (write(file, "new") != before) == changes


def test_bnclis_own_code_is_part_of_a_runs_identity() -> None:
    found = identity("cpu", tiny())
    assert sources_digest(PACKAGE) in found["bncli"]
    assert found["device"] == "cpu"


@pytest.mark.parametrize("part", IDENTITY)
def test_a_change_of_anything_in_the_identity_makes_other_keys(asked: Study, part: str) -> None:
    before, after = named_runs(asked, {}).jobs, named_runs(of(asked, **{part: "another"}), {}).jobs
    assert not {job.key for job in before} & {job.key for job in after}
    assert [job.recipe_key for job in before] == [job.recipe_key for job in after]


# --- what may be used ---------------------------------------------------------------------------------------------


def net(folder: Path, text: str) -> dict[str, str]:
    """net.py with that text, and what a run that loads it records."""
    (folder / "net.py").write_text(text)
    return {"net.py": hashlib.sha256(text.encode()).hexdigest()}


def test_a_run_is_used_while_all_code_that_it_loaded_stands_as_it_was(asked: Study, here: Path) -> None:
    old = done(asked, **net(here, "old"))
    assert list(usable(old).values()) == old
    new = done(asked, **net(here, "new"))
    assert usable(old) == {}
    assert list(usable([*new, *old]).values()) == new
    (here / "net.py").unlink()
    assert usable([*new, *old]) == {}


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("bncli", "bncli's own code has changed since"),
        ("torch", "torch has another version"),
        ("device", "they ran on another device"),
        ("data", "the data have changed"),
        ("code", "the model's code has changed"),
    ],
)
def test_runs_that_are_not_used_are_counted_with_the_reason(asked: Study, here: Path, part: str, reason: str) -> None:
    kept = done(asked, **net(here, "old"))
    assert not_reused(named_runs(asked, {}).jobs, kept, IDENTITY) == []
    if part == "code":
        net(here, "new")
    study = asked if part == "code" else of(asked, **{part: "another"})
    jobs = named_runs(study, {}).jobs
    for count, runs in ((18, "18 earlier runs are"), (1, "1 earlier run is")):
        said = sentences(not_reused(jobs, kept[:count], study.identity))
        assert said == [f"{runs} not reused: {reason} ({count})"]
    assert not_reused(jobs, [*kept, *done(study)], study.identity) == []


def test_several_reasons_are_each_counted(asked: Study, here: Path) -> None:
    kept = [*done(of(asked, bncli="0 zero"))[:8], *done(asked, **net(here, "old"))[8:12], *done(asked)[12:]]
    net(here, "new")
    assert sentences(not_reused(named_runs(asked, {}).jobs, kept, asked.identity)) == [
        "12 earlier runs are not reused: bncli's own code has changed since (8), the model's code has changed (4)"
    ]


# --- threads ------------------------------------------------------------------------------------------------------


def test_runs_with_other_threads_give_their_steps_and_not_their_cost(asked: Study) -> None:
    found = carried_out(asked, lambda job: 100.0)
    assert not any("thread" in note for note in sentences(summarise(asked.plan, found, 28, 1).notes))
    found = changed(found, lambda one: one.arm == "plain" or one.seed == 10, threads=4, ms_per_step=9.0)
    plain, normed = (made := summarise(asked.plan, found, 28, 1)).arms
    assert (plain.hits, plain.steps.value) == (8, pytest.approx(100))
    assert plain.seconds is None
    assert (plain.samples_per_s, plain.ms_per_step, plain.peak_memory_mib) == (None, None, None)
    assert (normed.ms_per_step, normed.peak_memory_mib) == (1.0, 300.0)
    assert sentences(made.notes)[-1] == (
        "29 of 50 runs were made with 4 and not 1 thread: their steps are used, their seconds, samples/s and memory "
        "are not"
    )
    assert summarise(made.plan, made.runs, 28, made.threads) == made
    assert summarise(asked.plan, found, 28).arms[0].ms_per_step == 9.0


# --- the report of a comparison that was killed -------------------------------------------------------------------


def of_keys(kept: list[RunRecord]) -> Callable[[Collection[str]], list[RunRecord]]:
    """What a folder finds among the runs that it holds."""
    return lambda keys: [record for record in kept if record.key in keys]


def begun(study: Study) -> BegunComparison:
    return BegunComparison(study.plan, study.identity, 1, ("small.yaml",))


@pytest.fixture
def finished(asked: Study) -> list[RunRecord]:
    return [one for one in carried_out(asked, lambda job: 100.0) if one.compared]


@pytest.mark.parametrize("count", [0, 5, 20, 28])
def test_the_report_of_a_plan_and_its_runs_is_that_of_the_call(
    asked: Study, finished: list[RunRecord], count: int
) -> None:
    records = {one.key: one for one in finished[:count]}
    expected = summarise(asked.plan, collect(asked, records), named_runs(asked, records).planned, 1)
    report = report_of_runs(begun(asked), of_keys(finished[:count]), failed(finished[:2]) if count > 2 else [])
    assert to_plain(report) == to_plain(expected)


def test_failed_runs_are_part_of_the_report(asked: Study, finished: list[RunRecord]) -> None:
    said = sentences(report_of_runs(begun(asked), of_keys([]), failed(finished[-2:])).notes)
    assert said[0].startswith("0 of 28 runs are done, 2 failed")


def test_runs_by_earlier_code_are_left_out(asked: Study, finished: list[RunRecord]) -> None:
    def dated(one: RunRecord, date: str, **code: str) -> RunRecord:
        made = replace(one.result, environment=replace(one.result.environment, date=date))
        return replace(one, result=made, code={**code, "common.py": "same"})

    runs = finished[-3:]
    kept = [dated(runs[0], "2026-02", net="new"), dated(runs[1], "2026-01", net="old"), dated(runs[2], "2026-01")]
    assert sorted(one.key for one in of_one_code(kept)) == sorted(one.key for one in (runs[0], runs[2]))

    def report(kept: list[RunRecord]) -> Comparison:
        return report_of_runs(begun(asked), of_keys(kept), [])

    now = report(kept)
    assert {run.key for run in now.runs} == {runs[0].key, runs[2].key}
    answer = report([dated(one, "2026-01", net="old") for one in runs])
    assert says_more(now, answer)
    assert not says_more(answer, answer)
    assert not says_more(report(kept[2:]), replace(answer, runs=tuple(kept)))


def test_a_plan_whose_recipes_this_bncli_does_not_know_is_refused(asked: Study) -> None:
    recipes = {**asked.plan.recipes, "normed": {"norm": "of another kind"}}
    with pytest.raises(BncliError, match="its recipes are not as this bncli has them; run compare again"):
        report_of_runs(replace(begun(asked), plan=replace(asked.plan, recipes=recipes)), of_keys([]), [])
