"""Folder of a run: nothing lost, one writer at a time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import bncli
from bncli.errors import BncliError, UsageError
from bncli.report.compare.folder import load_comparison
from bncli.report.files import event_line
from bncli.report.folder import ResumedFolder, RunFolder
from bncli.results.train import Evaluated, Evaluation, Event, Probed, ProbePoint, RunFinished, RunStarted, StepDone
from tests.report.conftest import refusal_to_an_ordinary_user

STATE = b"bncli checkpoint 1 sha256 of a test"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(bncli.__file__).parent.parent)}


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
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen(each, stdin=pipe, stdout=pipe, text=True, cwd=cwd, env=ENVIRONMENT) for each in commands
    ]
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
    (tmp_path / "plan.json").touch()
    with pytest.raises(UsageError, match="contains a comparison; choose another folder"):
        RunFolder(tmp_path, "small", overwrite=True).begin("data: {}")


@contextlib.contextmanager
def full_disk(most: int) -> Iterator[None]:
    """No file grows beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_names_the_file_and_keeps_what_was_saved(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", "name") as folder:
        folder.begin("train: {}\n")
        folder.metrics(STARTED)
        folder.save["checkpoint"](STATE)
        with full_disk(1000):
            for write in (lambda: folder.save["checkpoint"](bytes(2000)), lambda: folder.metrics(done(10**1000))):
                with pytest.raises(
                    BncliError, match=r"run/(checkpoint.pt|metrics.jsonl): cannot be written: File too"
                ) as full:
                    write()
                assert full.value.exit_code == 1
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == STATE
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"checkpoint.pt", "metrics.jsonl", "recipe.yaml"}


def test_a_folder_that_is_removed_while_its_run_goes_on_is_not_made_again(tmp_path: Path, make_result) -> None:
    with RunFolder(tmp_path / "run", "name") as folder:
        folder.begin("train: {}\n")
        shutil.rmtree(tmp_path / "run")
        folder.metrics(STARTED)
        for write in (lambda: folder.save["model"](b"weights"), lambda: folder.finish(make_result(100.0))):
            with pytest.raises(BncliError, match=r"the run's folder .*/run was removed or renamed while it was in use"):
                write()
    assert list(tmp_path.iterdir()) == []


# --- continued ----------------------------------------------------------------------------------------------------

STARTED = RunStarted("mine", "cpu", 1, 60, 1, None)


def done(step: int) -> StepDone:
    return StepDone(step, 0.5, 0.1, 1e4, None)


def evaluated(step: int) -> Evaluated:
    return Evaluated(Evaluation(step, 0.5, 0.7, None), 0.1)


def probed(step: int) -> Probed:
    return Probed((ProbePoint("loss", None, step, {"training": 0.5}),), 0.1)


# What an uninterrupted run yields, in this order.
EVENTS: list[Event] = [evaluated(0), probed(0), done(20), evaluated(20), probed(20), done(40), evaluated(40), done(60)]


def write(path: Path, events: Sequence[Event], checkpoint: bytes | None = STATE) -> Path:
    """The folder of a run that was killed after those events."""
    with RunFolder(path, "mine") as folder:
        folder.begin("train: {steps: 60}\n")
        for event in (STARTED, *events):
            folder.metrics(event)
        if checkpoint is not None:
            folder.save["checkpoint"](checkpoint)
    return path


def lines(path: Path) -> list[str]:
    return (path / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("killed", range(len(EVENTS) + 1))
def test_a_run_that_goes_on_ends_with_the_lines_of_one_without_interruption(
    tmp_path: Path, make_result, killed: int
) -> None:
    end = RunFinished(replace(make_result(100.0), steps_run=60))
    whole = lines(write(tmp_path / "whole", [*EVENTS, end]))
    for saved in sorted({0, killed // 2, killed}):
        for torn in ("", '{"event": "step_done", "st', "finished"):
            run = write(tmp_path / f"{saved}-{torn[:3]}", [*EVENTS[:killed], *[end] * (torn == "finished")])
            with open(run / "metrics.jsonl", "a") as metrics:
                metrics.write(torn * (torn != "finished"))
            with ResumedFolder(run) as folder:
                assert (folder.name, folder.checkpoint) == (STARTED.name, STATE)
                folder.begin("train: {steps: 60}\n")
                for event in (STARTED, *EVENTS[saved:], end):
                    folder.metrics(event)
            assert lines(run) == whole


def test_a_run_that_goes_on_is_unchanged_until_its_first_event(tmp_path: Path) -> None:
    run = write(tmp_path / "run", EVENTS)
    (run / ".checkpoint.pt.0123456789ab").write_bytes(b"of a writer that was killed")
    before = {file.name: file.read_bytes() for file in run.iterdir() if not file.name.startswith(".")}
    with ResumedFolder(run) as folder:
        folder.begin("train: {steps: 60}\n")
        folder.metrics(STARTED)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_more_steps_are_in_the_recipe_and_in_the_first_event(tmp_path: Path) -> None:
    run = write(tmp_path / "run", EVENTS)
    with ResumedFolder(run) as folder:
        folder.begin("train: {steps: 120}\n")
        folder.metrics(replace(STARTED, budget=120))
        folder.metrics(done(80))
    assert (run / "recipe.yaml").read_text().endswith("train: {steps: 120}\n")
    assert json.loads(lines(run)[0])["budget"] == 120
    assert len(lines(run)) == 1 + len(EVENTS) + 1


def test_the_result_of_fewer_steps_is_gone_once_a_run_goes_on(tmp_path: Path, make_result) -> None:
    run = write(tmp_path / "run", EVENTS)
    for recipe, status, ended in (("60", "budget", True), ("60", "interrupted", False), ("120", "budget", False)):
        with ResumedFolder(run) as folder:
            folder.finish(replace(make_result(100.0), status=status))
            assert (folder.finished(f"train: {{steps: {recipe}}}\n") is not None) is ended
    with ResumedFolder(run) as folder:
        folder.begin("train: {steps: 120}\n")  # and is killed
    with ResumedFolder(run) as folder:
        assert folder.finished("train: {steps: 120}\n") is None


def test_a_run_goes_on_in_one_process_at_a_time_and_also_after_its_first_event(tmp_path: Path) -> None:
    run = write(tmp_path / "run", EVENTS)
    with ResumedFolder(run) as folder:
        for _ in range(2):
            with pytest.raises(UsageError, match="another run is writing there; wait for it"):
                ResumedFolder(run)
            folder.begin("train: {steps: 60}\n")
            folder.metrics(STARTED)
            folder.metrics(done(60))
    with ResumedFolder(run):
        pass


def changed(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    def apply(run: Path) -> None:
        (run / name).unlink()
        change(run / name)

    return apply


FOREIGN = "was not written by bncli, or was edited since, and is never overwritten; restore it, or move it away"
BEGAN = event_line(STARTED).encode() + b"\n"
UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no checkpoint": (lambda run: (run / "checkpoint.pt").unlink(), "has no checkpoint.pt to continue from"),
    "no metrics": (lambda run: (run / "metrics.jsonl").unlink(), "is not the folder of a run: it has no metrics.jsonl"),
    "no folder": (shutil.rmtree, "is not the folder of a run: it has no recipe.yaml"),
    "an edited recipe": (changed("recipe.yaml", lambda file: file.write_text("train: {steps: 9}\n")), FOREIGN),
    **{
        f"metrics with {line[:20]!r}": (
            lambda run, line=line: (run / "metrics.jsonl").write_bytes(BEGAN + line + b'\n{"event": "done"}\n'),
            "metrics.jsonl:2: is not an event of a run",
        )
        for line in (b'{"ev', b"\xff", b"[" * 10**5, b'{"event": "a", "step": Infinity}', b'{"points": []}', b"[]")
    },
    **{
        f"metrics of {first!r}": (
            lambda run, first=first: (run / "metrics.jsonl").write_bytes(first),
            "metrics.jsonl:1: is not an event of a run",
        )
        for first in (b"", BEGAN.replace(b"name", b"x"), BEGAN.replace(b'"mine"', b"3"), BEGAN[:-4])
    },
    **{
        f"{kind} for {name}": (changed(name, change), FOREIGN)
        for name in ("checkpoint.pt", "metrics.jsonl", "recipe.yaml")
        for kind, change in {
            "a link": lambda file: file.symlink_to("/etc/hostname"),
            "a pipe": os.mkfifo,
            "a folder": Path.mkdir,
        }.items()
    },
    "a link for TensorBoard": (lambda run: (run / "tensorboard").symlink_to("/tmp"), FOREIGN),
    "a link for a model": (lambda run: (run / "model.safetensors").symlink_to("/etc/hostname"), FOREIGN),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_what_cannot_go_on_is_refused_with_what_to_do(tmp_path: Path, unfit: str) -> None:
    run = write(tmp_path / "run", EVENTS)
    change, message = UNFIT[unfit]
    change(run)
    with pytest.raises(BncliError, match=re.escape(message)) as refused:
        ResumedFolder(run)
    assert refused.value.exit_code == 2


def test_a_run_that_is_written_over_leaves_nothing_of_its_own_behind(tmp_path: Path) -> None:
    run = write(tmp_path / "run", EVENTS)
    with pytest.raises(UsageError, match="already contains an unfinished run; continue it; choose another folder, or"):
        RunFolder(run, "mine")
    header = b'{"__metadata__":{"bncli":"0.1.0"}}'
    (run / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    begin(run, overwrite=True)
    assert {file.name for file in run.iterdir()} == {"metrics.jsonl", "recipe.yaml"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="rights")
def test_a_folder_that_is_not_writable_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o555)
    refusal = refusal_to_an_ordinary_user(lambda: RunFolder(Path("run"), "name"))
    assert "is not writable; change its mode, or choose another folder" in refusal
