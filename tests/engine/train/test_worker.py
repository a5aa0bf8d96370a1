"""The process that takes runs: its protocol, what it refuses, and that it dies with its driver."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.recipe.load import plain
from bncli.recipe.sections import Recipe
from bncli.results.serialize import from_plain
from bncli.results.train import RunResult
from tests.conftest import OWN, tiny


class Driver:
    def __init__(self, device: str = "cpu", cwd: Path | None = None) -> None:
        command = [sys.executable, "-m", "bncli.engine.train.worker", "--device", device, "--threads", "1"]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=cwd)

    def give(self, key: str, recipe: Recipe) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"key": key, "recipe": plain(recipe)}) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return dict(json.loads(self.process.stdout.readline()))

    def outcome(self) -> dict[str, Any]:
        """The next message that is not about progress."""
        while "step" in (message := self.hear()):
            pass
        return message


@pytest.fixture
def driver() -> Iterator[Driver]:
    started = Driver()
    yield started
    started.process.kill()
    with started.process:
        pass


def test_a_worker_says_hello_then_takes_many_runs(driver: Driver) -> None:
    assert driver.hear() == {"hello": "cpu", "gpus": 0}
    for key in ("one", "two"):
        driver.give(key, tiny())
        message = driver.outcome()
        result = from_plain(RunResult, message["result"])
        assert message["key"] == key
        assert result.status == "reached"
        assert result.environment.threads == 1


def own(folder: Path, act: str) -> Recipe:
    (folder / "mine.py").write_text(OWN.format(act=act))
    return tiny(model={"kind": "module", "module": "mine:make"}, norm={"kind": "none"})


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("raise ValueError('two\\nlines')", "raised ValueError: two lines, in {folder}/mine.py:5. It is given batches"),
        ("import sys; sys.exit(0)", "raised SystemExit: 0, in {folder}/mine.py:5."),
        ("x = x[:, 1:]", "raised RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_a_run_that_raises_is_a_failure_with_its_reason_and_the_worker_goes_on(
    tmp_path: Path, act: str, reason: str
) -> None:
    worker = Driver(cwd=tmp_path)
    worker.hear()
    worker.give("bad", own(tmp_path, act))
    failure = worker.outcome()
    assert failure["key"] == "bad"
    assert reason.format(folder=tmp_path) in failure["failure"]
    worker.give("good", tiny())
    assert worker.outcome()["result"]["status"] == "reached"
    worker.process.kill()
    worker.process.communicate()


def test_a_result_says_which_files_of_the_users_own_were_loaded_by_the_forward_pass_too(tmp_path: Path) -> None:
    worker = Driver(cwd=tmp_path)
    worker.hear()
    (tmp_path / "late.py").write_text("")
    worker.give("built-in", tiny())
    assert worker.outcome()["code"] == {}
    worker.give("own", own(tmp_path, "import late"))
    assert sorted(worker.outcome()["code"]) == ["late.py", "mine.py"]
    worker.give("built-in again", tiny())
    assert worker.outcome()["code"] == {}
    worker.process.kill()
    worker.process.communicate()


def test_a_model_that_cannot_be_built_is_a_failure_and_not_the_end_of_all_runs(tmp_path: Path) -> None:
    worker = Driver(cwd=tmp_path)
    worker.hear()
    (tmp_path / "mine.py").write_text("def make(shape, classes, norm): raise OSError('no weights')")
    worker.give("bad", tiny(model={"kind": "module", "module": "mine:make"}, norm={"kind": "none"}))
    assert "mine:make raised OSError: no weights" in worker.outcome()["failure"]
    worker.process.kill()
    worker.process.communicate()


def test_data_that_are_decoded_by_child_processes_are_read(tmp_path: Path, driver: Driver) -> None:
    """A child closes sys.stdin when it starts, and waited for ever where the worker was reading from it."""
    image = pytest.importorskip("PIL.Image")
    for split in ("train", "test"):
        for label in ("a", "b"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for number in range(12):
                image.new("L", (8, 8), 200 * (label == "b") + number).save(folder / f"{number}.png")
    data = {
        "source": "hub",
        "name": str(tmp_path),
        "shape": [1, 8, 8],
        "classes": 2,
        "in_memory_gib": 0.0,
        "workers": 2,
    }
    driver.hear()
    driver.give("streamed", tiny(data=data, train={"steps": 4, "batch_size": 6, "evaluate_every": 2, "target": None}))
    assert driver.outcome()["result"]["status"] == "budget"


def test_missing_data_refuse_every_run_with_the_exit_code(driver: Driver, tmp_path: Path) -> None:
    driver.hear()
    missing = str(tmp_path / "none.npz")
    driver.give("run", tiny(data={"source": "npz", "path": missing, "held_out": 5}))
    message = driver.outcome()
    assert missing in message["refused"][0]
    assert message["exit_code"] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_absent_device_is_refused_before_any_run() -> None:
    absent = Driver("cuda")
    message = absent.hear()
    absent.process.communicate()
    assert message["exit_code"] == 3
    assert message["refused"][0].startswith("this torch")
    assert (message["field"], message["value"]) == ("device", "cuda")


def test_a_worker_in_the_middle_of_a_run_dies_when_its_driver_is_gone(driver: Driver) -> None:
    driver.hear()
    driver.give("long", tiny(train={"steps": 10**9, "target": None}))
    assert "step" in driver.hear()
    assert driver.process.stdin is not None
    driver.process.stdin.close()
    assert driver.process.wait(timeout=20) == 0


def test_what_a_users_model_prints_stays_out_of_the_protocol(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "from torch import nn\n"
        "def make(shape, classes, norm):\n    print('hello {')\n    return nn.Linear(shape[0], classes)\n"
    )
    loud = Driver(cwd=tmp_path)
    loud.hear()
    loud.give("run", tiny(model={"kind": "module", "module": "loud:make"}, norm={"kind": "none"}))
    assert loud.outcome()["key"] == "run"
    loud.process.kill()
    assert "hello {" in loud.process.communicate()[1]
