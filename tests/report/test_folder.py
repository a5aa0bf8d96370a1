"""Folders of results: whole files, nothing lost, one writer at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import bncli
from bncli.errors import BncliError, UsageError
from bncli.report.files import to_json
from bncli.report.folder import ComparisonFolder, RunFolder, load_comparison
from bncli.results.compare import BegunComparison, Comparison, ComparisonPlan, RunRecord
from bncli.results.environment import RUNS_VERSION
from bncli.results.train import Evaluated, Evaluation, RunStarted, Target


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


def test_metrics_can_be_read_while_the_run_goes_on(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", "name") as folder:
        folder.begin("train: {}\n")
        folder.metrics(Evaluated(Evaluation(0, 0.1, float("nan"), None), 0.5))
        line = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert (line["event"], line["step"], line["loss"]) == ("evaluated", 0, "NaN")
    assert (tmp_path / "run/recipe.yaml").read_text().split("\n", 1)[1] == "train: {}\n"


def test_each_run_without_a_name_gets_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(3):
        with RunFolder(None, "small") as folder:
            folder.begin("")
            paths.append(folder.path)
    assert len(set(paths)) == 3
    assert all(str(path).startswith("runs/small/") for path in paths)


# A process that is ready, waits for the others, and then begins a run; how it ended is its output.
BEGIN = """
import sys
from pathlib import Path
from bncli.errors import BncliError
from bncli.report.folder import RunFolder
from bncli.results.train import RunStarted
try:
    with RunFolder(Path(sys.argv[1]) if sys.argv[1] else None, "small", sys.argv[2] == "force") as folder:
        print("ready", flush=True)
        sys.stdin.readline()  # as a command does that loads torch in between
        folder.begin(f"seed: {sys.argv[3]}")
        folder.metrics(RunStarted(sys.argv[3], "cpu", 1, 1, 1, None))
        print(folder.path, flush=True)
        sys.stdin.readline()  # the run goes on
except BncliError as error:
    print(f"refused: {error}", flush=True)
"""


def begun_at_once(count: int, cwd: Path, out: str = "", force: str = "") -> list[str]:
    """What as many processes say that begin a run at the same time, all of them still there."""
    commands = [[sys.executable, "-c", BEGIN, out, force, str(number)] for number in range(count)]
    pipe, paths = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(Path(bncli.__file__).parent.parent)}
    started = [subprocess.Popen(each, stdin=pipe, stdout=pipe, text=True, cwd=cwd, env=paths) for each in commands]
    said = []
    for step in ("ready", "begun"):
        said = [one.stdout.readline().strip() for one in started if one.stdout]
        for one in started if step == "ready" else ():
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
    for one in started:
        one.communicate("\n")
    return said


def test_twenty_runs_that_begin_at_once_get_twenty_folders(tmp_path: Path) -> None:
    said = begun_at_once(20, tmp_path)
    assert len(set(said)) == 20
    for number, folder in enumerate(said):
        assert (tmp_path / folder / "recipe.yaml").read_text().endswith(f"seed: {number}")
        assert json.loads((tmp_path / folder / "metrics.jsonl").read_text())["name"] == str(number)


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "an earlier run"])
def test_one_of_two_runs_for_the_same_folder_is_refused(tmp_path: Path, before: str) -> None:
    if before == "an earlier run":
        begun_at_once(1, tmp_path, "run")
    elif before == "an empty folder":
        (tmp_path / "run").mkdir()
    said = begun_at_once(2, tmp_path, "run", "force" if before == "an earlier run" else "")
    assert sorted(line.startswith("refused: out run: ") for line in said) == [False, True]
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 1


def begin(path: Path, overwrite: bool = False, recipe: str = "train: {}\n") -> None:
    with RunFolder(path, "name", overwrite) as folder:
        folder.begin(recipe)
        folder.metrics(RunStarted("name", "cpu", 1, 1, 1, None))


def test_a_run_that_was_killed_is_written_over_only_when_forced(tmp_path: Path, make_result) -> None:
    begin(tmp_path)
    with pytest.raises(
        UsageError,
        match=r"already contains an unfinished run; choose another folder, or overwrite it with overwrite=True",
    ):
        RunFolder(tmp_path, "name")
    begin(tmp_path, overwrite=True, recipe="train: {seed: 1}\n")
    assert "seed: 1" in (tmp_path / "recipe.yaml").read_text()
    with RunFolder(tmp_path, "name", overwrite=True) as folder:
        folder.begin("")
        folder.finish(make_result(100.0))
    with pytest.raises(UsageError, match="already contains a run"):
        RunFolder(tmp_path, "name")


def edited(folder: Path) -> None:
    begin(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "# my notes\n")


STRANGERS: dict[str, Callable[[Path], object]] = {
    "a recipe": lambda folder: (folder / "recipe.yaml").write_text("# my notes\ntrain: {}\n"),
    "an edited recipe": edited,
    "other metrics": lambda folder: (folder / "metrics.jsonl").write_text('{"loss": 1}\n'),
    "no JSON": lambda folder: (folder / "metrics.jsonl").write_text("loss\n"),
    "another result": lambda folder: (folder / "result.json").write_text("[]"),
    "no text": lambda folder: (folder / "result.json").write_bytes(b"\xff\x00"),
    "a link": lambda folder: (folder / "metrics.jsonl").symlink_to(folder / "recipe.yaml"),
    "a broken link": lambda folder: (folder / "metrics.jsonl").symlink_to("nowhere"),
    "a folder": lambda folder: (folder / "recipe.yaml").mkdir(),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_file_that_bncli_did_not_write_is_never_written_over(tmp_path: Path, stranger: str, overwrite: bool) -> None:
    STRANGERS[stranger](tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with pytest.raises(UsageError, match="was not written by bncli, or was edited since, and is never overwritten"):
        begin(tmp_path, overwrite)
    assert {file: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_other_files_of_the_folder_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    begin(tmp_path)
    begin(tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_cannot_be_made_read_or_shared_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"out .*file/run: cannot be created: Not a directory"):
        RunFolder(tmp_path / "file/run", "name").begin("")
    with pytest.raises(
        UsageError,
        match=r"comparison.json: cannot be read: No such file or directory; give the folder",
    ):
        load_comparison(tmp_path)
    with ComparisonFolder(tmp_path) as folder:
        folder.begin(BEGUN)
    with pytest.raises(UsageError, match="contains a comparison; choose another folder"):
        RunFolder(tmp_path, "small", overwrite=True).begin("data: {}")


def test_a_full_disk_in_a_run_names_the_file_of_its_events(tmp_path):
    with pytest.raises(OSError, match="No space left") as full, RunFolder(tmp_path / "run", "digits"):
        raise OSError(28, "No space left on device")
    assert full.value.filename == str(tmp_path / "run" / "metrics.jsonl")
