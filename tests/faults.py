"""Calls of the command line under a fault: limits, streams, folders, names. Each is a fork of a process that has torch.

No torch and no pytest here, since the process that forks imports this module.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECIPE = """
data: {source: synthetic, shape: [8], classes: 3, examples: 120, held_out: 60, noise: 0.5}
model: {kind: mlp, hidden: [16], activation: relu}
optimizer: {kind: sgd, lr: 0.5}
train: {steps: 10, batch_size: 20, evaluate_every: 5, target: {value: 0.9}}
arms:
  plain: {}
  normed: {norm: batch}
grid: {optimizer.lr: [0.1, 0.5]}
seeds: {tune: 3, report: 2}
"""
NOBODY = 65534
MIB = 1 << 20


@dataclass(frozen=True)
class Call:
    """A command in a new folder that holds small.yaml.

    setup: called there first. limits: of the process; RLIMIT_AS is beyond what it has. ordinary: as a user without
    rights. streams: the files behind 0, 1 and 2, or "closed". api: a path for `load_recipe` instead of a command.
    """

    arguments: tuple[str, ...]
    setup: Callable[[], object] | None = None
    limits: dict[int, int] = field(default_factory=dict)
    ordinary: bool = False
    streams: dict[int, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    environment: dict[str, str] = field(default_factory=dict)
    api: bool = False


def prepare() -> None:
    """Load what the commands load, which a user without rights may not be able to read."""
    import torch

    torch.set_num_threads(1)
    for name in ("cli", "engine.train", "measure.compare.summary", "measure.profile.run", "measure.gradcheck.run"):
        importlib.import_module(f"bncli.{name}")
    for name in ("encodings.utf_8_sig", "encodings.latin_1", "encodings.idna", "report.compare.page", "report.figure"):
        importlib.import_module(name if name.startswith("encodings") else f"bncli.{name}")


def run(call: Call, folder: str) -> tuple[int, str, str]:
    """The exit code, the output and the messages of a call. It changes this process for good."""
    os.chdir(folder)
    os.chmod(folder, 0o777)
    Path("small.yaml").write_text(RECIPE)
    if call.setup:
        call.setup()
    os.environ.update({"COLUMNS": "100", **call.environment})
    tempfile.tempdir = None
    kept = [tempfile.TemporaryFile() for _ in range(3)]  # noqa: SIM115
    for number, file in enumerate(kept):
        opened = file.fileno()
        if (name := call.streams.get(number)) and name != "closed":
            opened = os.open(name, os.O_WRONLY if number else os.O_RDONLY)
        os.dup2(opened, number)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), call.encoding)
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(  # type: ignore[misc]
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)), call.encoding, "backslashreplace", line_buffering=True
    )
    for number in [number for number, name in call.streams.items() if name == "closed"]:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    if call.ordinary and os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    before = {which: resource.getrlimit(which) for which in call.limits}
    for which, most in call.limits.items():
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(which, (most + size * (which == resource.RLIMIT_AS), before[which][1]))
    code = _exit_code(call)
    for which, limit in before.items():
        resource.setrlimit(which, limit)
    texts = []
    for file in kept[1:]:
        file.seek(0)
        texts.append(file.read().decode(call.encoding, "replace"))
    return code, texts[0], texts[1]


def _exit_code(call: Call) -> int:
    from bncli.cli import main
    from bncli.errors import BncliError
    from bncli.recipe.load import load

    sys.argv = ["bncli", *call.arguments]
    code: Any = 0
    try:
        if call.api:
            load(call.arguments[0])
        else:
            main()
    except SystemExit as left:
        code = left.code or 0
    except BncliError as error:  # of the Python API
        print(f"bncli: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        with contextlib.suppress(Exception):
            traceback.print_exc()
        return 70
    try:
        sys.stdout.flush()
    except OSError:
        return 120  # as Python, at its end
    return int(code)
