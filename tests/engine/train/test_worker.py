"""The process that takes runs: its protocol, what it refuses, and that it dies with its driver."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import bncli.engine.train as engine
from bncli.engine.train import worker as worker_process
from bncli.recipe.load import plain
from bncli.recipe.sections import Recipe
from bncli.results.serialize import from_plain
from bncli.results.train import RunResult
from tests.conftest import OWN, tiny


class Driver:
    """The other end of a worker's pipes; its standard error goes to a file."""

    def __init__(self, folder: Path, device: str = "cpu", threads: str = "1") -> None:
        command = [sys.executable, "-m", "bncli.engine.train.worker", "--device", device, "--threads", threads]
        self.log, pipe = folder / "worker.log", subprocess.PIPE
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, cwd=folder)
        self.first = self.hear()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.communicate()

    def give(self, key: str, recipe: Recipe, check: bool = False, checkpoint: Path | None = None) -> None:
        run = {"key": key, "recipe": plain(recipe), "checkpoint": checkpoint and str(checkpoint)}
        self.send(runs=[run], check=check, together=False)

    def send(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def outcome(self, key: str, recipe: Recipe, check: bool = False, checkpoint: Path | None = None) -> dict[str, Any]:
        """The message about a run that is not about its progress."""
        self.give(key, recipe, check, checkpoint)
        while "step" in (message := self.hear()):
            pass
        return message


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worker")


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Driver]:
    """One process that takes the runs of all the tests that do not end it."""
    with Driver(folder) as started:
        yield started


def own(folder: Path, name: str, code: str) -> Recipe:
    """A recipe of the `make` in that code, which is the module `name` in the folder."""
    (folder / f"{name}.py").write_text(code)
    return tiny(model={"kind": "module", "module": f"{name}:make"}, norm={"kind": "none"})


def test_a_worker_says_hello_then_takes_many_runs(worker: Driver) -> None:
    assert worker.first == {"hello": "cpu", "gpus": 0}
    for key in ("one", "two"):
        message = worker.outcome(key, tiny())
        result = from_plain(RunResult, message["result"])
        assert (message["key"], message["code"]) == (key, {})
        assert result.status == "reached"
        assert result.environment.threads == 1


def test_a_run_alone_that_is_given_up_ends_soon_and_says_so(worker: Driver) -> None:
    long = tiny(train={"steps": 10**6, "batch_size": 20, "evaluate_every": 5, "stop_at_target": False})
    worker.give("long", long)
    while "step" not in worker.hear():
        pass
    worker.send(**{"give up": ["long", "another"]})
    while "step" in (message := worker.hear()):
        assert message["below"].keys() <= {"long"}
    result = from_plain(RunResult, message["result"])
    assert (message["key"], result.status) == ("long", "given up")
    assert 0 < result.steps_run < 10**6
    assert worker.outcome("long", tiny())["result"]["status"] == "reached"


BUILT = "from torch import nn\ndef make(shape, classes, norm):\n    {}\n    return nn.Linear(shape[0], classes)\n"


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        (
            "raising",
            OWN.format(act="raise ValueError('two\\nlines')"),
            "raised ValueError: two lines, in {folder}/raising.py:5",
        ),
        ("leaving", OWN.format(act="import sys; sys.exit(0)"), "raised SystemExit: 0, in {folder}/leaving.py:5"),
        ("misshapen", OWN.format(act="x = x[:, 1:]"), "raised RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("unbuilt", BUILT.format("raise OSError('no weights')"), "unbuilt:make raised OSError: no weights"),
    ],
)
def test_a_run_that_raises_is_a_failure_and_the_worker_goes_on(
    worker: Driver, folder: Path, name: str, code: str, reason: str
) -> None:
    failure = worker.outcome("bad", own(folder, name, code))
    assert failure["key"] == "bad"
    assert reason.format(folder=folder) in failure["failure"]
    assert ("It takes batches (N, *shape)" in failure["failure"]) == (name == "misshapen")  # of shapes alone
    assert worker.outcome("good", tiny())["result"]["status"] == "reached"


def test_a_check_makes_the_first_step_and_finds_what_would_end_every_run(worker: Driver, folder: Path) -> None:
    passed = worker.outcome("passed", tiny(train={"steps": 10**9, "target": None}), check=True)
    assert (passed["key"], passed["result"]["steps_run"]) == ("passed", 1)
    wide = BUILT.format("classes += 1")
    failure = worker.outcome("wide", own(folder, "wide", wide), check=True)["failure"]
    assert failure == (
        "model.module: wide:make: the output for a batch of 20 examples is of shape (20, 4); expected a tensor of "
        "shape (20, 3), a logit for each example and class"
    )


def test_a_result_names_the_users_files_loaded_by_the_forward_pass_too(worker: Driver, folder: Path) -> None:
    (folder / "late.py").write_text("")
    loaded = worker.outcome("own", own(folder, "importing", OWN.format(act="import late")))["code"]
    assert {"importing.py", "late.py"} <= set(loaded) == {file.name for file in folder.glob("*.py")}
    assert worker.outcome("built-in again", tiny())["code"] == {}


def test_what_a_users_model_prints_stays_out_of_the_protocol(worker: Driver, folder: Path) -> None:
    assert worker.outcome("loud", own(folder, "loud", BUILT.format("print('hello {')")))["key"] == "loud"
    assert worker.outcome("next", tiny())["key"] == "next"
    assert "hello {" in worker.log.read_text()


def test_data_that_are_decoded_by_child_processes_are_read(worker: Driver, tmp_path: Path) -> None:
    """A child closes sys.stdin when it starts, and waited for ever where the worker was reading from it."""
    image = pytest.importorskip("PIL.Image")
    for number in range(48):
        place = tmp_path / ("train", "test")[number % 2] / ("a", "b")[number // 2 % 2]
        place.mkdir(parents=True, exist_ok=True)
        image.new("L", (8, 8), 5 * number).save(place / f"{number}.png")
    data = {"source": "hub", "name": str(tmp_path), "shape": [1, 8, 8], "classes": 2, "in_memory_gib": 0.0}
    recipe = tiny(data=data, train={"steps": 4, "batch_size": 6, "evaluate_every": 2, "target": None})
    assert recipe.data.workers > 0  # type: ignore[union-attr]
    assert worker.outcome("streamed", recipe)["result"]["status"] == "budget"


def test_a_worker_of_two_threads_takes_them_for_a_small_step_too_and_missing_data_refuse_every_run(
    tmp_path: Path,
) -> None:
    missing = str(tmp_path / "none.npz")
    with Driver(tmp_path, threads="2") as worker:
        assert worker.outcome("one", tiny())["result"]["environment"]["threads"] == 2
        message = worker.outcome("run", tiny(data={"source": "npz", "path": missing, "held_out": 5}))
    assert missing in message["refused"][0]
    assert message["exit_code"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_device_is_refused_before_any_run(tmp_path: Path) -> None:
    with Driver(tmp_path, "cuda") as worker:
        message = worker.first
    assert message["exit_code"] == 3
    assert message["refused"][0].startswith("this torch")
    assert (message["field"], message["value"]) == ("device", "cuda")


SAVED = {"steps": 6000, "target": None, "evaluate_every": 500, "checkpoint": {"every": 1000}}  # each waits for the disk


@pytest.mark.slow  # tests/cli/test_compare.py has a whole comparison that goes on from checkpoints
def test_a_run_goes_on_from_its_checkpoint_in_another_worker_and_ends_as_without_interruption(
    worker: Driver, tmp_path: Path
) -> None:
    def evaluations(message: dict[str, Any]) -> list[Any]:
        return message["result"]["evaluations"]

    recipe, file = tiny(train=SAVED), tmp_path / "long.pt"
    whole = evaluations(worker.outcome("whole", recipe))
    with Driver(tmp_path) as first:
        first.give("long", recipe, checkpoint=file)
        assert "step" in first.hear()
        while not file.exists():
            pass
        first.send(stop=True)
        while "step" in (message := first.hear()):
            pass
        assert message["key"] == "long"
        assert 0 < message["stopped"] < 6000
    saved = file.read_bytes()
    assert evaluations(worker.outcome("long", recipe, checkpoint=file)) == whole
    for content in (saved[:-1], b"mine"):
        file.write_bytes(content)
        assert evaluations(worker.outcome("long", recipe, checkpoint=file)) == whole
    file.write_bytes(saved)
    other = tiny(train=SAVED | {"seed": 3, "steps": 1000})
    assert evaluations(worker.outcome("other", other, checkpoint=file)) == evaluations(worker.outcome("other", other))
    assert "No such file" in worker.outcome("unsaved", recipe, checkpoint=tmp_path / "gone" / "x.pt")["failure"]
    log = worker.log.read_text()
    assert log.count("the run begins again") == 3
    assert "train.seed was 0 when the run began, and is 3 now" in log


def test_a_worker_in_the_middle_of_a_run_dies_when_its_driver_is_gone(tmp_path: Path) -> None:
    with Driver(tmp_path) as worker:
        worker.give("long", tiny(train={"steps": 10**9, "target": None}))
        assert "step" in worker.hear()
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        assert worker.process.wait(timeout=120) == 0
        worker.process.stdin = None


def test_runs_of_a_batch_that_raises_are_tried_alone_once_its_memory_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[tuple[int, bool]] = []  # runs, and whether the tensors of the batch before are still held
    held: list[weakref.ref[torch.Tensor]] = []

    def train_together(recipes: Sequence[Recipe], *_: Any, **__: Any) -> Iterator[Any]:
        batches.append((len(recipes), any(each() is not None for each in held)))
        held.append(weakref.ref(tensor := torch.zeros(1)))
        yield from ()
        raise RuntimeError(f"out of memory with {tensor.shape}")

    monkeypatch.setattr(engine, "train_together", train_together)
    orders, out = worker_process.Orders(), io.StringIO()
    runs = [{"key": key, "recipe": plain(tiny()), "checkpoint": None} for key in "ab"]
    orders.runs.put({"runs": runs, "check": False, "together": True})
    orders.runs.put({"runs": []})  # which ends it here
    with pytest.raises(KeyError):
        worker_process.serve(orders, out, "cpu", torch.get_num_threads())
    assert batches == [(2, False), (1, False), (1, False)]
    ended = [json.loads(line) for line in out.getvalue().splitlines()[1:]]
    assert [(message["key"], "out of memory" in message["failure"]) for message in ended] == [("a", True), ("b", True)]
