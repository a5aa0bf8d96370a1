"""The process that reads the inputs: one batch after another, each decided by the seed, the kind and its number.

Lines of JSON: in {"kind", "batch", "known"}, out {"tried", "accepted", "refused", "findings"}. The input at hand is in
the file that the driver reads if this process dies.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase

from tests.fuzz import AtHand
from tests.fuzz.guard import Finding, Guard
from tests.fuzz.kinds import KINDS, Kind
from tests.fuzz.mutate import mutated
from tests.fuzz.structured import changed

BATCH = 40  # inputs of each way of making them
SETTINGS = hypothesis.settings(
    max_examples=BATCH,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
    verbosity=hypothesis.Verbosity.quiet,
)


class _Found(Exception):
    """Ends hypothesis's search; it then shrinks the input."""


class Fuzzer:
    """Tries inputs in this process. at_hand: the file that holds the number of tries and the input being read."""

    def __init__(self, folder: Path, seed: int, seconds: float, at_hand: Path) -> None:
        self.folder, self.seed, self.known = folder, seed, set[str]()
        self._kinds: dict[str, Kind] = {}
        self._counts, self._findings = Counter[str](), list[dict[str, str]]()  # of the batch at hand
        self._at_hand = AtHand(at_hand)
        self.guard = Guard(folder, seconds)

    def kind(self, name: str) -> Kind:
        """The kind, its good files tried once, so that what they load lazily is loaded."""
        if name not in self._kinds:
            here = self.folder / name
            here.mkdir()
            os.chdir(here)
            self._kinds[name] = kind = KINDS[name](here)
            for data in kind.good:
                try:
                    kind.attempt(data)
                except Exception as error:
                    if not name.startswith("recipe"):  # some name what is not there
                        raise AssertionError(f"{name}: a good file is refused: {error}") from error
            self.guard.allow(kind.libraries)
        kind = self._kinds[name]
        self.guard.may_compile = kind.compiles
        os.chdir(self.folder / name)
        return kind

    def batch(self, name: str, number: int) -> dict[str, Any]:
        kind, self._counts, self._findings = self.kind(name), Counter[str](), list[dict[str, str]]()
        random = Random(f"{self.seed} {name} {number}")
        for _ in range(BATCH):
            aimed = kind.make is not None and random.random() < 0.6
            data = kind.make(random) if kind.make and aimed else mutated(random, kind.good, kind.words)
            if found := self.try_one(kind, data):
                self._keep(found, data)
        if kind.trees:
            self._shrinking(kind, random.getrandbits(32))
        return {**self._counts, "findings": self._findings}

    def _shrinking(self, kind: Kind, seed: int) -> None:
        last: tuple[Finding, bytes] | None = None
        first: str | None = None

        @hypothesis.seed(seed)
        @SETTINGS
        @hypothesis.given(changed(kind.trees))
        def search(tree: Any) -> None:
            nonlocal last, first
            data = kind.written(tree)
            found = self.try_one(kind, data)
            if found and found.signature not in self.known and first in (None, found.signature):
                first, last = found.signature, (found, data)
                raise _Found

        try:
            search()
        except (_Found, hypothesis.errors.Flaky):
            assert last is not None
            self._keep(*last)

    def try_one(self, kind: Kind, data: bytes) -> Finding | None:
        self._at_hand.put(data)
        found = self.guard.result_of(kind.attempt, data)
        self._counts["tried"] += 1
        self._counts["accepted"] += found is True
        self._counts["refused"] += found is False
        if isinstance(found, Finding):
            self._counts[f"found {found.signature}"] += 1
            return found
        return None

    def _keep(self, found: Finding, data: bytes) -> None:
        if found.signature not in self.known:
            self.known.add(found.signature)
            shown = {"signature": found.signature, "details": found.details}
            self._findings.append({**shown, "input": base64.b64encode(data).decode()})


def main(arguments: list[str]) -> int:
    seed, seconds, file = int(arguments[0]), float(arguments[1]), Path(arguments[2])
    warnings.simplefilter("ignore")  # of names that are twice in an archive
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing that is printed must get between the lines
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        fuzzer = Fuzzer(Path(folder).resolve(), seed, seconds, file)
        out.write('{"ready": true}\n')
        for line in sys.stdin:
            order = json.loads(line)
            fuzzer.known.update(order["known"])
            out.write(json.dumps(fuzzer.batch(order["kind"], order["batch"])) + "\n")
        os.chdir(file.parent)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
