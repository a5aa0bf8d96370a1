"""`torchrun -m bncli train` as a user meets it: one voice, one folder, and what happens when a rank dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bncli.cli import main
from tests.cli.conftest import bncli
from tests.ranks import started

OWN = """
import os, signal
from torch import nn
class Own(nn.Sequential):
    calls = 0
    def forward(self, x):
        self.calls += self.training
        if self.calls == 23 and os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if os.environ.get("DIES") == "mistake":
                raise ValueError("my own mistake")
            if os.environ.get("DIES"):
                os.kill(os.getpid(), getattr(signal, os.environ["DIES"]))
        return super().forward(x)
def make(shape, classes, norm):
    return Own(nn.Linear(shape[0], 16), norm(16), nn.ReLU(), nn.Linear(16, classes))
"""
ARGUMENTS = [
    *("small.yaml", "--set", "model={kind: module, module: 'mine:make'}", "--set", "norm=batch", "--allow-code"),
    *("--threads", "1", "--set", "train.checkpoint.every=10", "--set", "train.stop_at_target=false"),
]


@pytest.fixture
def own(recipe: str) -> None:
    Path("mine.py").write_text(OWN)


def command(_: Connection, arguments: tuple[str, ...], environment: dict[str, str], folder: str) -> None:
    """`python -m bncli` as a rank, its output in files."""
    os.chdir(folder)
    os.environ |= {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_RESTART_COUNT": "0", **environment}
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["bncli", *arguments]
    try:
        main()
    except SystemExit as left:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(left.code or 0))


def in_ranks(count: int, *arguments: str, **environment: str) -> list[tuple[int | None, str, str]]:
    """Exit code, stdout and stderr of each rank of one start, in the environment that torchrun makes."""
    _, ranks = started(command, count, arguments, environment, os.getcwd())
    for rank in ranks:
        rank.join(100)
        rank.kill()
    said = [[Path(f"{name}{rank}").read_text() for name in ("out", "err")] for rank in range(count)]
    assert not [text for both in said for text in both if "Traceback" in text]
    return [(rank.exitcode, *both) for rank, both in zip(ranks, said, strict=True)]


def test_a_rank_that_dies_ends_the_others_with_a_sentence_and_one_process_goes_on(own: None) -> None:
    (code, _, error), (killed, *_) = in_ranks(2, "train", *ARGUMENTS, "--out", "run", "-q", DIES="SIGKILL")
    assert (code, killed) == (1, -9)
    assert "bncli: another rank has ended, or did not answer" in error
    assert "torchrun --nproc-per-node 2 -m bncli train --resume run" in error
    resumed = bncli("train", "--resume", "run", "--allow-code")
    assert resumed.code == 0
    assert "the run began with 2 ranks and goes on with 1" in resumed.err
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "evaluated"] == [*range(0, 61, 5)]


def test_one_rank_prints_and_writes(recipe: str) -> None:
    (code, out, error), (follower, *silence) = in_ranks(2, "train", recipe, "--set", "norm=batch", "--out", "run")
    assert (code, follower, silence) == (0, 0, ["", ""])
    assert "2, batch statistics of each by itself" in " ".join(out.split())
    assert "Saved in run" in error


def test_the_mistake_of_one_rank_is_said_by_that_rank(own: None) -> None:
    (code, _, error), (failed, _, mistake) = in_ranks(2, "train", *ARGUMENTS, "--out", "run", "-q", DIES="mistake")
    assert (code, failed) == (1, 1)
    assert "bncli: rank 1: model.module: mine:make raised ValueError: my own mistake" in mistake
    assert "another rank has ended" in error


def test_only_train_is_for_torchrun(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    monkeypatch.setenv("RANK", "0")
    said = bncli("compare", recipe)
    assert said.code == 2
    assert "start compare without it" in said.err
    monkeypatch.setenv("RANK", "1")
    assert bncli("compare", recipe) == type(said)(2, "", "")
    assert bncli("train", recipe, "--dry-run") == type(said)(0, "", "")


def test_restarts_need_a_folder(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "RANK": "0", "TORCHELASTIC_MAX_RESTARTS": "1"}.items():
        monkeypatch.setenv(name, value)
    said = bncli("train", recipe)
    assert said.code == 2
    assert "--out: torchrun --max-restarts continues the run in its folder; name one" in said.err


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_ends_with_the_same_bits(own: None) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1"]
    began = time.monotonic()
    for out, dies in (("whole", ""), ("died", "SIGKILL")):
        command = [*torchrun, "-m", "bncli", "train", *ARGUMENTS, "--out", out]
        ran = subprocess.run(command, env=os.environ | {"DIES": dies}, capture_output=True, text=True, timeout=200)
        assert ran.returncode == 0, ran.stderr
        assert ("another rank has ended" in ran.stderr) == bool(dies)
    whole, died = (load_file(f"{out}/model.safetensors") for out in ("whole", "died"))
    assert all(torch.equal(whole[name], died[name]) for name in whole)
    assert time.monotonic() - began < 300
