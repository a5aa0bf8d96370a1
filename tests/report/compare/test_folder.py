"""Folder of a comparison: nothing lost, one writer at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bncli.errors import BncliError, UsageError
from bncli.report.compare.folder import ComparisonFolder, load_comparison
from bncli.report.files import to_json
from bncli.results.compare import BegunComparison, Comparison, ComparisonPlan, RunRecord
from bncli.results.environment import RUNS_VERSION
from bncli.results.train import Target


def record(make_result, key: str, failure: str | None = None) -> RunRecord:
    return RunRecord(key, "plain", {}, 0, "report", None if failure else make_result(100.0), failure)


GRID = {"optimizer.lr": (0.1, 1)}
PLAN = ComparisonPlan("small", ("plain", "normed"), {}, GRID, "plain", (0,), (1, 2), Target("accuracy", 0.9), 100, "")
BEGUN = BegunComparison(PLAN, {"torch": "2.13"}, 1, ("/recipes/small.yaml",))


def answer(plan: ComparisonPlan = PLAN) -> Comparison:
    return Comparison(plan, (), (), (), 6)


def test_records_come_back_by_key_and_failures_are_tried_again(tmp_path: Path, make_result) -> None:
    with ComparisonFolder(tmp_path / "runs") as folder:
        folder.save(record(make_result, "good"))
        folder.save(record(make_result, "bad", "it died"))
    with ComparisonFolder(tmp_path / "runs") as folder:
        assert set(folder.finished()) == {"good"}
        assert set(folder.failed()) == {"bad"}
        folder.begin(BEGUN)
        assert not list((tmp_path / "runs/failed").iterdir())
    assert ComparisonFolder(tmp_path / "runs").begun() == BEGUN


def test_a_folder_in_which_nothing_began_is_removed_unless_it_was_there(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        with ComparisonFolder(tmp_path / name) as folder:
            assert folder.path.is_dir()
    with ComparisonFolder(tmp_path / "begun") as folder:
        folder.begin(BEGUN)
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "begun"}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format_version": 99}', b"\xff\x00"])
def test_a_run_whose_file_cannot_be_read_is_done_again(tmp_path: Path, make_result, content: bytes) -> None:
    with ComparisonFolder(tmp_path) as folder:
        folder.save(record(make_result, "good"))
        (tmp_path / "runs/damaged.json").write_bytes(content)
        assert set(folder.finished()) == {"good"}


def test_runs_of_different_user_code_are_both_kept(tmp_path: Path, make_result) -> None:
    made = [replace(record(make_result, "key"), code={"net.py": digest}) for digest in ("one", "two")]
    with ComparisonFolder(tmp_path) as folder:
        for each in made:
            folder.save(each)
        assert list(folder.finished().values()) in (made, made[::-1])


def test_other_files_in_a_comparisons_folder_stay_as_they_are(tmp_path: Path, make_result) -> None:
    good, other = (to_json(record(make_result, key, why)) for key, why in (("good", None), ("other", "it died")))
    mine = {
        "failed/notes.json": '{"mine": 1}',
        "failed/bad.json": other,  # a run under another run's name
        "failed/copy.json": other,
        "runs/good.json": good.replace(f'"format_version": {RUNS_VERSION}', '"format_version": 99'),
        ".lock": "mine",
        "notes.txt": "mine",
    }
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with ComparisonFolder(tmp_path) as folder:
        assert not folder.finished()
        assert not folder.failed()
        folder.begin(BEGUN)
        folder.save(record(make_result, "good"))
        folder.save(record(make_result, "bad", "it died"))
        assert set(folder.finished()) == {"good"}
        assert set(folder.failed()) == {"bad"}
    moved = {"failed/bad.json": "failed/bad-1.json", "runs/good.json": "runs/good-1.json"}
    assert {name: (tmp_path / moved.get(name, name)).read_text() for name in mine} == mine


@pytest.mark.parametrize("file", ["comparison.json", "plan.json"])
@pytest.mark.parametrize("content", ["[]", '{"format_version": 99}', "mine"])
def test_an_unreadable_answer_or_plan_is_refused(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UsageError, match=rf"{file} was not written by this version of bncli and is never overwritten"):
        ComparisonFolder(tmp_path).__enter__()
    assert sorted(each.name for each in tmp_path.iterdir()) == [".lock", file]
    assert (tmp_path / file).read_text() == content


@pytest.mark.parametrize("link", [".lock", "comparison.json", "plan.json", "runs/key.json"])
def test_a_link_is_not_followed(tmp_path: Path, make_result, link: str) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x/runs").mkdir(parents=True)
    (tmp_path / "x" / link).symlink_to(tmp_path / "precious")
    try:
        with ComparisonFolder(tmp_path / "x") as folder:
            folder.begin(BEGUN)
            folder.save(record(make_result, "key"))
            folder.finish(answer())
    except UsageError:
        assert link != "runs/key.json"
    assert (tmp_path / "precious").read_text() == "mine"


def test_an_answer_to_another_plan_is_kept_under_another_name(tmp_path: Path) -> None:
    with ComparisonFolder(tmp_path) as folder:
        assert folder.keep_other(PLAN) is None
        for seeds, name in (((1, 2), None), ((1, 2, 3), "comparison-1.json"), ((1, 2), "comparison-2.json")):
            plan = replace(PLAN, report_seeds=seeds)
            for repeat in (False, True):
                beside = folder.keep_other(plan)
                assert (beside and beside.name) == (None if repeat else name)
                folder.finish(answer(plan))
        assert load_comparison(tmp_path / "comparison-1.json").plan.report_seeds == (1, 2)
        assert load_comparison(tmp_path / "comparison-2.json").plan.report_seeds == (1, 2, 3)
        assert load_comparison(tmp_path).plan.report_seeds == (1, 2)


def test_a_second_writer_is_refused_while_the_first_is_there(tmp_path: Path) -> None:
    with ComparisonFolder(tmp_path), pytest.raises(BncliError, match="another comparison is writing here"):
        ComparisonFolder(tmp_path).__enter__()
    with ComparisonFolder(tmp_path):
        pass
