"""Fuzzes what bncli reads: `python -m tests.fuzz --minutes 10`. Prints a table; exit code 1 if anything was found.

The same seed and kinds give the same inputs. Each finding's input and traceback are saved under --out, and
`--replay FILE` tries one again.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.fuzz import NAMES, AtHand

EVERY = {"from": 2, "run-record": 2, "plan": 2, "answer": 2}  # rounds of batches in which a slow kind takes part
SECONDS = 5.0  # of CPU time that one input may take
WAITS_S = 60.0  # without progress and without work: it waits for something


class Died(Exception):
    """The process ended, or was ended, while it read an input."""

    def __init__(self, what: str, tries: int, data: bytes) -> None:
        super().__init__(what)
        self.what, self.tries, self.data = what, tries, data


class Worker:
    """The process that reads the inputs. A context; a new one begins after a death."""

    def __init__(self, seed: int, seconds: float, folder: Path) -> None:
        self.seconds, self.at_hand = seconds, folder / "at-hand"
        self.at_hand.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.fuzz.worker", str(seed), str(seconds), str(self.at_hand)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self._answer(limit_s=600)

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def batch(self, kind: str, number: int, known: Sequence[str]) -> dict[str, Any]:
        """The answer to one batch. Raises Died."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"kind": kind, "batch": number, "known": list(known)}) + "\n")
        self.process.stdin.flush()
        return self._answer(limit_s=WAITS_S)

    def _answer(self, limit_s: float) -> dict[str, Any]:
        tries, cpu_s, since = -1, 0.0, 0.0
        while True:
            try:
                line = self._lines.get(timeout=0.5)
            except queue.Empty:
                now = AtHand.read(self.at_hand)[0]
                used_s = self._cpu_s()
                if now != tries:
                    tries, cpu_s, since = now, used_s, time.monotonic()
                elif used_s - cpu_s > 2 * self.seconds + 30 * (now == 0):  # torch is loaded first
                    self._kill(f"more than {2 * self.seconds:g} CPU seconds")
                elif time.monotonic() - since > limit_s and used_s - cpu_s < 1:
                    self._kill("waits")
                continue
            if line:
                found: dict[str, Any] = json.loads(line)
                return found
            code = self.process.wait()
            if code >= 0:
                raise RuntimeError(f"the process that reads the inputs failed by itself with {code}, see above")
            raise Died(f"killed by {signal.Signals(-code).name}", *AtHand.read(self.at_hand))

    def _cpu_s(self) -> float:
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def _kill(self, why: str) -> None:
        self.process.kill()
        self.process.wait()
        raise Died(why, *AtHand.read(self.at_hand))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()  # it ends after the batch at hand
        self.process.wait()


@dataclass
class Tally:
    """What the inputs of one kind did."""

    tried: int = 0
    accepted: int = 0
    refused: int = 0
    cpu_s: float = 0.0
    found: Counter[str] = field(default_factory=Counter)  # signature -> how often

    def add(self, answer: dict[str, Any]) -> None:
        for name in ("tried", "accepted", "refused"):
            setattr(self, name, getattr(self, name) + answer.get(name, 0))
        self.found.update({key.removeprefix("found "): n for key, n in answer.items() if key.startswith("found ")})


def fuzz(
    kinds: Sequence[str], seed: int, seconds: float, out: Path, inputs: float = math.inf, minutes: float = math.inf
) -> dict[str, Tally]:
    """Batches of the kinds in turn, up to so many inputs or minutes; findings are saved in `out`."""
    end = time.monotonic() + 60 * minutes
    tallies = {name: Tally() for name in kinds}
    known: dict[str, list[str]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(seed, seconds, Path(folder))
        for number in itertools.count():
            for name in kinds:
                if sum(each.tried for each in tallies.values()) >= inputs or time.monotonic() > end:
                    worker.close()
                    return tallies
                if number % EVERY.get(name, 1) and len(kinds) > 1:
                    continue
                tally, began_s = tallies[name], worker._cpu_s()
                try:
                    answer = worker.batch(name, number, known[name])
                    tally.cpu_s += worker._cpu_s() - began_s
                    for each in answer.pop("findings"):
                        known[name].append(each["signature"])
                        save(out, name, len(known[name]), each["signature"], each["details"], each["input"])
                    tally.add(answer)
                    memory = any("MiB" in each for each in answer)  # the peak stays for the rest of the process
                except Died as death:
                    tally.add({"tried": 1, f"found {death.what}": 1})
                    if death.what not in known[name]:
                        known[name].append(death.what)
                        encoded = base64.b64encode(death.data).decode()
                        save(out, name, len(known[name]), death.what, "", encoded)
                    memory = True
                except KeyboardInterrupt:  # what has been tried so far is shown
                    end, memory = 0.0, False
                if memory:
                    worker.close()
                    worker = Worker(seed, seconds, Path(folder))
    raise AssertionError("the loop ends by its limits")


def save(out: Path, kind: str, number: int, signature: str, details: str, encoded: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{kind}-{number}"
    file.write_bytes(base64.b64decode(encoded))
    file.with_suffix(".txt").write_text(f"{signature}\n\n{details}\n", errors="backslashreplace")
    print(f"found: {kind}: {signature}; saved as {file}", file=sys.stderr, flush=True)


def table(tallies: dict[str, Tally]) -> str:
    lines = [f"{'kind':12} {'inputs':>8} {'accepted':>9} {'refused':>9} {'findings':>9} {'inputs per CPU s':>17}"]
    total = Tally()
    for name, tally in tallies.items():
        lines.append(_row(name, tally))
        for each in ("tried", "accepted", "refused", "cpu_s"):
            setattr(total, each, getattr(total, each) + getattr(tally, each))
        total.found.update({f"{name}: {signature}": count for signature, count in tally.found.items()})
    lines.append(_row("all", total))
    lines += [f"  {signature} ({count} inputs)" for signature, count in total.found.most_common()]
    return "\n".join(lines)


def _row(name: str, tally: Tally) -> str:
    speed = tally.tried / tally.cpu_s if tally.cpu_s else 0
    counts = f"{tally.tried:8,} {tally.accepted:9,} {tally.refused:9,} {len(tally.found):9,}"
    return f"{name:12} {counts} {speed:17,.0f}"


def replay(file: Path, seconds: float) -> int:
    """Try one saved input in this process; its name begins with its kind."""
    from tests.fuzz.worker import Fuzzer

    data, kind = file.read_bytes(), file.name.rpartition("-")[0]
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), 0, seconds, Path(folder) / "at-hand")
        found = fuzzer.try_one(fuzzer.kind(kind), data)
        os.chdir(Path(folder).anchor)
    print(f"{found.signature}\n\n{found.details}" if found else "accepted or refused: no finding")
    return int(found is not None)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="how long")
    parser.add_argument("--inputs", type=int, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", choices=NAMES, help="this kind; may be repeated")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of CPU time that an input may take")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="folder for the inputs of findings")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="try one saved input again")
    asked = parser.parse_args(arguments)
    if asked.replay:
        return replay(asked.replay, asked.seconds)
    if asked.minutes is None and asked.inputs is None:
        parser.error("give --minutes or --inputs")
    most = {name: getattr(asked, name) for name in ("inputs", "minutes") if getattr(asked, name) is not None}
    tallies = fuzz(asked.only or NAMES, asked.seed, asked.seconds, asked.out, **most)
    print(table(tallies))
    return int(any(tally.found for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
