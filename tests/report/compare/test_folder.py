"""Folder of a comparison: nothing lost, any number of writers."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bncli.errors import FileError, UsageError
from bncli.report.compare.folder import ComparisonFolder, load_comparison
from bncli.report.files import to_json
from bncli.results.compare import BegunComparison, Comparison, ComparisonPlan, RunRecord
from bncli.results.environment import RUNS_VERSION
from bncli.results.train import Target
from tests.report.conftest import refusal_to_an_ordinary_user


def record(make_result, recipe: str, failure: str | None = None) -> RunRecord:
    """A run of some recipe, whose key is a digest."""
    key, recipe_key = (hashlib.sha256(text.encode()).hexdigest()[:20] for text in (f"{recipe} here", recipe))
    result = None if failure else make_result(100.0)
    return RunRecord(key, "plain", {}, 0, "report", result, failure, recipe_key=recipe_key)


def file_of(made: RunRecord) -> str:
    return f"{made.recipe_key}-{made.key}.json"


GRID = {"optimizer.lr": (0.1, 1)}
PLAN = ComparisonPlan("small", ("plain", "normed"), {}, GRID, "plain", (0,), (1, 2), Target("accuracy", 0.9), 100, "")
BEGUN = BegunComparison(PLAN, {"torch": "2.13"}, 1, ("/recipes/small.yaml",))


def answer(plan: ComparisonPlan = PLAN) -> Comparison:
    return Comparison(plan, (), (), (), 6)


def test_a_folder_that_is_removed_meanwhile_hides_no_error(tmp_path: Path) -> None:
    def removed() -> None:
        with ComparisonFolder(tmp_path / "new"):
            shutil.rmtree(tmp_path / "new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        removed()


def test_records_come_back_by_key_and_failures_are_tried_again(tmp_path: Path, make_result) -> None:
    with ComparisonFolder(tmp_path / "runs") as folder:
        folder.save(good := record(make_result, "good"))
        folder.save(bad := record(make_result, "bad", "it died"))
    with ComparisonFolder(tmp_path / "runs") as folder:
        assert folder.finished([good.key, bad.key, good.recipe_key]) == folder.finished([good.recipe_key]) == [good]
        assert folder.failed() == {file_of(bad): bad}
        assert (folder.count, folder.unfit) == (1, {})
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


def test_a_run_whose_file_cannot_be_used_is_as_if_it_were_not_done_and_is_told(tmp_path: Path, make_result) -> None:
    made = record(make_result, "good")
    text = to_json(made)
    damaged = {
        b"": "is not JSON",
        b"[]": "is JSON, but not a run",
        b"\xff\x00": "decode",
        text.replace('"seed": 0', '"seed": 1').encode(): "was changed after bncli wrote it",
        text.replace("\n", "").encode(): "was changed after bncli wrote it",
        text.replace(f'"format_version": {RUNS_VERSION}', '"format_version": 2').encode(): "is not a known field",
        text.replace(f'"format_version": {RUNS_VERSION}', '"format_version": 99').encode(): "update bncli",
        to_json(record(make_result, "other")).encode(): "holds another run than its name says",
    }
    (tmp_path / "runs").mkdir()
    for content, why in damaged.items():
        (tmp_path / "runs" / file_of(made)).write_bytes(content)
        folder = ComparisonFolder(tmp_path)
        assert folder.finished([made.key, made.recipe_key]) == []
        assert folder.count == 1
        assert why in folder.unfit.pop(f"runs/{file_of(made)}")
        assert not folder.unfit


def test_files_of_format_2_are_read_by_their_shorter_names_and_without_a_digest(tmp_path: Path, make_result) -> None:
    made = record(make_result, "old")
    (tmp_path / "runs").mkdir()
    plain = json.loads(to_json(made)) | {"format_version": 2}
    del plain["sha256"]
    (tmp_path / f"runs/{made.key}.json").write_text(json.dumps(plain))
    (tmp_path / "runs/0123456789abcdef0123.json").write_text("{")
    folder = ComparisonFolder(tmp_path)
    assert folder.finished([made.key]) == folder.finished([made.recipe_key]) == [made]
    assert folder.count == 2


def test_a_file_with_flipped_bits_or_an_end_cut_off_is_never_taken_for_the_run(tmp_path: Path, make_result) -> None:
    made, dice = record(make_result, "good"), random.Random(0)
    whole = to_json(made).encode()
    (tmp_path / "runs").mkdir()
    for number in range(300):
        damaged = bytearray(whole)
        if number % 3:
            damaged[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
        else:
            del damaged[dice.randrange(len(whole)) :]
        (tmp_path / "runs" / file_of(made)).write_bytes(damaged)
        folder = ComparisonFolder(tmp_path)
        assert folder.finished([made.key]) == []
        assert len(folder.unfit) == 1


def test_runs_of_different_user_code_are_both_kept(tmp_path: Path, make_result) -> None:
    made = [replace(record(make_result, "key"), code={"net.py": digest}) for digest in ("one", "two")]
    with ComparisonFolder(tmp_path) as folder:
        for each in made:
            folder.save(each)
        assert folder.finished([made[0].key]) in (made, made[::-1])


def test_other_files_in_a_comparisons_folder_stay_as_they_are(tmp_path: Path, make_result) -> None:
    good, bad = record(make_result, "good"), record(make_result, "bad", "it died")
    other = to_json(record(make_result, "other", "it died"))
    mine = {
        "failed/notes.json": '{"mine": 1}',
        f"failed/{file_of(bad)}": other,  # a run under another run's name
        "failed/copy.json": other,
        f"runs/{file_of(good)}": to_json(good).replace('"seed": 0', '"seed": 1'),
        "calls/notes.txt": "mine",
        "notes.txt": "mine",
    }
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with ComparisonFolder(tmp_path) as folder:
        assert not folder.finished([good.key])
        assert not folder.failed()
        folder.begin(BEGUN)
        folder.save(good)
        folder.save(bad)
    folder = ComparisonFolder(tmp_path)
    assert folder.finished([good.key]) == [good]
    assert folder.failed() == {file_of(bad): bad}
    moved = {name: name.replace(".json", "-1.json") for name in (f"failed/{file_of(bad)}", f"runs/{file_of(good)}")}
    assert {name: (tmp_path / moved.get(name, name)).read_text() for name in mine} == mine


def test_what_killed_processes_left_half_written_is_swept_once_nobody_else_writes(tmp_path: Path) -> None:
    left = [tmp_path / folder / ".a.json.0123456789ab" for folder in ("", "runs", "failed", "checkpoints")]
    for file in left:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    with ComparisonFolder(tmp_path):
        assert not any(file.exists() for file in left)
        left[1].touch()
        with ComparisonFolder(tmp_path):
            assert left[1].exists()
    assert not left[1].exists()


def test_a_checkpoint_is_deleted_once_its_run_is_saved(tmp_path: Path, make_result) -> None:
    runs = record(make_result, "ended"), record(make_result, "failed", "it died"), record(make_result, "other")
    with ComparisonFolder(tmp_path) as folder:
        for run in runs:
            (tmp_path / f"checkpoints/{run.key}.pt").touch()
        for run in runs[:2]:
            folder.save(run)
    assert {file.stem for file in (tmp_path / "checkpoints").iterdir()} == {runs[1].key, runs[2].key}


@pytest.mark.parametrize("file", ["comparison.json", "plan.json"])
@pytest.mark.parametrize("content", ["[]", '{"format_version": 99}', "mine"])
def test_an_unreadable_answer_or_plan_is_refused(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(UsageError, match=rf"{file} was not written by .*, and is never overwritten; move it away"):
        ComparisonFolder(tmp_path).__enter__()
    assert [each.name for each in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == content


@pytest.mark.parametrize("link", ["comparison.json", "plan.json", "runs/{}"])
def test_a_link_is_not_followed(tmp_path: Path, make_result, link: str) -> None:
    made = record(make_result, "key")
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x/runs").mkdir(parents=True)
    (tmp_path / "x" / link.format(file_of(made))).symlink_to(tmp_path / "precious")
    try:
        with ComparisonFolder(tmp_path / "x") as folder:
            folder.begin(BEGUN)
            folder.save(made)
            folder.finish(answer())
    except UsageError:
        assert link != "runs/{}"
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["runs", "failed", "checkpoints", "logs", "calls"])
def test_a_folder_that_is_a_link_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match=f"{name}: is a symbolic link, which is not followed here"):
        ComparisonFolder(tmp_path / "x")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_pipe_in_the_place_of_a_run_is_not_waited_for(tmp_path: Path, make_result) -> None:
    made = record(make_result, "key")
    (tmp_path / "runs").mkdir()
    os.mkfifo(pipe := tmp_path / "runs" / file_of(made))
    with ComparisonFolder(tmp_path) as folder:
        assert folder.finished([made.key]) == []
        folder.save(made)
    assert ComparisonFolder(tmp_path).finished([made.key]) == [made]
    assert pipe.with_name(f"{pipe.stem}-1.json").is_fifo()


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


def test_two_calls_share_the_runs_and_see_what_the_other_ended(tmp_path: Path, make_result) -> None:
    good, bad = record(make_result, "good"), record(make_result, "bad", "it died")
    keys = {good.key, bad.key}
    with ComparisonFolder(tmp_path) as one, ComparisonFolder(tmp_path) as other:
        assert not one.alone()
        for run in (good, bad):
            assert one.lease(run.key, run.recipe_key, False)
            assert not other.lease(run.key, run.recipe_key, False)
        assert other.free(keys) == set()
        one.save(good)
        one.save(bad)
        assert other.free(keys) == keys
        assert other.finished(keys) == [good]
        assert other.failures == {bad.key: bad}
        other.begin(BEGUN)  # a new call tries again what failed
        assert not other.failed()
    assert {file.name for file in (tmp_path / "runs").iterdir()} == {file_of(good)}
    assert not list((tmp_path / "calls").iterdir())


def test_a_run_that_another_call_has_ended_is_found_when_its_lease_is_taken(tmp_path: Path, make_result) -> None:
    plain, own = record(make_result, "plain"), replace(record(make_result, "own"), code={"net.py": "one"})
    with ComparisonFolder(tmp_path) as one, ComparisonFolder(tmp_path) as other:
        assert not one.finished([plain.key, own.key])
        for run in (plain, own):
            other.save(run)
            assert one.lease(run.key, run.recipe_key, bool(run.code))
            assert one.finished([run.key]) == [run]
        other.save(bad := record(make_result, "bad", "it died"))
        assert one.lease(bad.key, bad.recipe_key, False)
        assert one.lease("9" * 20, "8" * 20, own_code=True)  # of which there is no file yet
        assert one.failures == {bad.key: bad}
        assert plain.result is not None
        other.save(
            longer := replace(plain, result=replace(plain.result, steps_run=1))
        )  # as one that was given up first
        assert one.lease(plain.key, plain.recipe_key, False)
        assert one.finished([plain.key]) == [longer]


def test_a_call_that_began_nothing_leaves_the_folder_to_another(tmp_path: Path) -> None:
    with ComparisonFolder(tmp_path / "new") as one, ComparisonFolder(tmp_path / "new"):
        pass
    assert one.path.is_dir() is False
    with ComparisonFolder(tmp_path / "new"):
        one.__enter__()
    assert one.path.is_dir()
    one.__exit__(None, None, None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="rights")
@pytest.mark.parametrize("inside", ["", "runs"])
def test_a_folder_that_is_not_writable_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    with ComparisonFolder(tmp_path / "x") as folder:
        folder.begin(BEGUN)
    (tmp_path / "x" / inside).chmod(0o555)
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    assert "is not writable" in refusal_to_an_ordinary_user(lambda: ComparisonFolder(Path("x")).__enter__())
