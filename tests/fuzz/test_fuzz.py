"""The fuzzer: a fixed number of inputs is survived, and what an input must not do is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz import NAMES, AtHand
from tests.fuzz.__main__ import fuzz, main, table

INPUTS = 2000
# What an attempt does, and how a finding is called.
FORBIDDEN = {
    "raise KeyError(3)": "KeyError",
    "sys.exit(0)": "SystemExit",
    "while True: pass": "more than 3 CPU seconds",
    "open('/tmp/the-canary', 'w')": "open outside the folder",
    "Path('../out').mkdir()": "os.mkdir outside the folder",
    "os.rename('in', '../in')": "os.rename outside the folder",
    "os.system('true')": "os.system",
    "subprocess.run(['true'])": "subprocess.Popen",
    "importlib.import_module('the_canary')": "import of 'the_canary'",
    "pickle.loads(pickle.dumps(os.getcwd))": "unpickling of posix.getcwd",
    "\ntry: open('/tmp/the-canary', 'w')\nexcept Exception: pass": "open outside the folder",  # swallowed
    "bytearray(1200 << 20)": "more than 1024 MiB",  # the last: the peak stays
}
GUARDED = """
import importlib, json, os, pickle, subprocess, sys
from pathlib import Path
from bncli.errors import UsageError
from tests.fuzz.guard import Finding, Guard
folder = Path(sys.argv[1]).resolve()
os.chdir(folder)
guard, found = Guard(folder, 3.0), {}
def attempt(data):
    exec(data.decode(), globals())
for code in json.loads(sys.argv[2]):
    result = guard.result_of(attempt, code.encode())
    found[code] = result.signature if isinstance(result, Finding) else result
print(json.dumps(found))
"""


def test_a_fixed_number_of_inputs_is_survived(tmp_path: Path) -> None:
    tallies = fuzz(NAMES, seed=0, seconds=5.0, out=tmp_path, inputs=INPUTS)
    assert sum(tally.tried for tally in tallies.values()) >= INPUTS
    assert all(tally.accepted or name == "run-recipe" for name, tally in tallies.items())
    assert not any(tally.found for tally in tallies.values()), table(tallies)


def test_what_an_input_must_not_do_is_seen(tmp_path: Path) -> None:
    fine = {"Path('in').write_text('')": True, "raise UsageError('no')": False, "import numpy.linalg": True}
    codes = json.dumps([*fine, *FORBIDDEN])
    done = subprocess.run([sys.executable, "-c", GUARDED, str(tmp_path), codes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {code: found.pop(code) for code in fine} == fine
    assert {code: name for code, name in found.items() if not str(name).startswith(FORBIDDEN[code])} == {}
    assert not Path("/tmp/the-canary").exists()


def test_the_last_input_of_a_dead_process_is_known(tmp_path: Path) -> None:
    file = tmp_path / "at-hand"
    assert AtHand.read(file) == (0, b"")
    if os.fork() == 0:
        at_hand = AtHand(file)
        at_hand.put(b"the first, a longer one")
        at_hand.put(b"the last")
        os.kill(os.getpid(), 9)
    os.wait()
    assert AtHand.read(file) == (2, b"the last")


def test_a_number_of_inputs_or_minutes_is_asked_for() -> None:
    with pytest.raises(SystemExit):
        main([])
