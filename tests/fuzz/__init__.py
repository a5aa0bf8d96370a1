"""Fuzzing of everything that bncli reads: `python -m tests.fuzz --minutes 10`.

An input is accepted, or refused with one of bncli's own errors. Another exception, a hang, more than 1 GB of memory,
code of the input that runs, and a file written outside the folder at hand are findings.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

NAMES = (
    "recipe", "set", "npz", "shapes-csv", "shape", "baseline", "from", "run-record", "plan", "answer", "run-result",
    "run-metrics", "run-recipe", "checkpoint", "safetensors", "cache",
)  # fmt: skip
HEAD = struct.Struct("<QQ")


class AtHand:
    """A file with the number of inputs tried and the last of them, for when the process that wrote it is dead."""

    def __init__(self, file: Path) -> None:
        self._descriptor, self._tries = os.open(file, os.O_RDWR | os.O_CREAT), 0

    def put(self, data: bytes) -> None:
        self._tries += 1
        os.pwrite(self._descriptor, HEAD.pack(self._tries, len(data)) + data, 0)

    @staticmethod
    def read(file: Path) -> tuple[int, bytes]:
        content = file.read_bytes() if file.exists() else b""
        if len(content) < HEAD.size:
            return 0, b""
        tries, size = HEAD.unpack(content[: HEAD.size])
        return tries, content[HEAD.size : HEAD.size + size]
