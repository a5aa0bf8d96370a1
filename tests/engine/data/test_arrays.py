"""Data in memory once: one process reads, the others map, and none sees what another writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bncli.engine.data import MEMORY_FORMATS, load
from bncli.engine.data.arrays import ALIGNMENT, Arrays, Place, arrays, in_memory, shared
from bncli.errors import DataError
from bncli.recipe.sections import Digits, Npz, Synthetic

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no files in memory here")


@pytest.fixture
def memory() -> Iterator[int]:
    made = os.memfd_create("test")
    yield made
    os.close(made)


def small(place: Place) -> Arrays:
    return arrays(place, (3,), train=70, held_out=5, classes=2)


def filled(value: float, make: Callable[[Place], Arrays] = small) -> Callable[[Place], Arrays]:
    def read(place: Place) -> Arrays:
        made = make(place)
        made.x.fill_(value)
        return made

    return read


def never(place: Place) -> Arrays:
    raise AssertionError("it is there already")


def test_held_out_examples_begin_where_a_new_tensor_could() -> None:
    """Matrix products of a tensor that begins elsewhere may differ in their last bits."""
    for shape, as_bytes, train in (((3,), False, 70), ((1, 3, 5), True, 65), ((2, 2, 2), False, 64)):
        made = arrays(in_memory, shape, train, 7, 2, as_bytes)
        assert made.x[made.held_out :].data_ptr() % ALIGNMENT == made.x.data_ptr() % ALIGNMENT == 0
        assert len(made.x) - made.held_out == len(made.y) - made.held_out == 7


def test_the_rows_of_a_set_are_each_used_once() -> None:
    made = small(in_memory)
    train, held_out = made.rows(3)
    assert made.rows_of_whole(3).sort().values.tolist() == [*train.tolist(), *held_out.sort().values.tolist()]
    assert held_out.min() == made.held_out == 128


def test_what_one_has_read_another_maps_and_no_write_reaches_the_other(memory: int) -> None:
    made = filled(1.0, lambda place: arrays(place, (2, 2, 2), 9, 9, 4, as_bytes=True))
    one, other = shared(memory, "a", made), shared(memory, "a", never)
    one.x[0] = 7
    assert (other.x == 1).all()
    again = shared(memory, "a", never)
    assert (again.x == 1).all()
    assert (again.x.shape, again.x.dtype, again.train, again.classes) == ((73, 2, 2, 2), torch.uint8, 9, 4)


def test_other_data_are_read_into_memory_of_their_own(memory: int) -> None:
    shared(memory, "a", filled(1.0))
    assert (shared(memory, "b", filled(2.0)).x == 2).all()
    assert (shared(memory, "a", never).x == 1).all()


def test_what_is_not_held_in_memory_and_what_failed_leave_nothing(memory: int) -> None:
    assert shared(memory, "streamed", lambda place: "decoded on demand") == "decoded on demand"

    def fail(place: Place) -> Arrays:
        small(place).x.fill_(9.0)
        raise DataError("the file is damaged")

    with pytest.raises(DataError, match="damaged"):
        shared(memory, "a", fail)
    assert (shared(memory, "a", filled(1.0)).x == 1).all()


def child(work: Callable[[], object]) -> int:
    """A process that does the work and ends with 0, or with 1 where it raises."""
    if (pid := os.fork()) == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return pid


def test_processes_wait_for_the_one_that_reads_and_read_anew_if_it_dies(memory: int) -> None:
    begun, go_on = os.pipe(), os.pipe()

    def read(place: Place) -> Arrays:
        made = small(place)
        made.x.fill_(9.0)
        os.write(begun[1], b"!")
        os.read(go_on[0], 1)
        return made

    dying = child(lambda: shared(memory, "a", read))
    os.read(begun[0], 1)
    waiting = child(lambda: shared(memory, "a", filled(1.0)))  # until the other has died
    os.kill(dying, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(dying, 0)[1]) == -signal.SIGKILL
    assert os.waitpid(waiting, 0)[1] == 0
    assert (shared(memory, "a", never).x == 1).all()
    memory = os.memfd_create("another")
    reading = child(lambda: shared(memory, "b", read))
    os.read(begun[0], 1)
    waiting = child(lambda: (os.write(begun[1], b"!"), shared(memory, "b", never)))
    os.read(begun[0], 1)
    time.sleep(0.2)  # without a lock it would read by now
    os.write(go_on[1], b"!")
    assert [os.waitpid(pid, 0)[1] for pid in (reading, waiting)] == [0, 0]
    assert (shared(memory, "b", never).x == 9).all()
    os.close(memory)


SPECS: dict[str, dict[str, Any]] = {
    "digits": {},
    "synthetic": {"shape": (2, 4, 4), "examples": 30, "held_out": 9},
    "npz": {"path": "set.npz", "held_out": 8, "augment": "crop-flip"},
}


@pytest.mark.parametrize("normalize", ["unit", "standard"])
@pytest.mark.parametrize("source", SPECS)
def test_shared_data_are_those_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int, source: str, normalize: str
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("set.npz", x=np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), np.uint8), y=np.arange(40) % 3)
    section = {"digits": Digits, "synthetic": Synthetic, "npz": Npz}[source]
    spec = section(source=source, normalize=normalize, **SPECS[source])
    expected = load(spec, CPU)
    for _ in ("read", "mapped"):
        found = load(spec, CPU, MEMORY_FORMATS["contiguous"], memory)
        assert (found.name, found.shape, found.classes) == (expected.name, expected.shape, expected.classes)
        for ours, theirs in ((found.train, expected.train), (found.held_out, expected.held_out)):
            assert torch.equal(ours.x, theirs.x)
            assert torch.equal(ours.y, theirs.y)
            index = [torch.arange(7)]
            batches = (next(split.batches(index, torch.Generator().manual_seed(0)))[0] for split in (ours, theirs))
            assert torch.equal(*batches)


def test_more_than_the_available_memory_is_refused_before_it_is_allocated() -> None:
    words = r"the examples take [\d,]+ MiB in memory, and [\d,]+ MiB are available; free memory, store fewer"
    with pytest.raises(DataError, match=words):
        load(Synthetic(source="synthetic", shape=(10**6,), examples=10**9), CPU)


LIMITED = """
import json, resource, torch
from bncli.engine.data import load
from bncli.recipe.sections import Synthetic
from bncli.errors import DataError
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28,) * 2)
try:
    load(Synthetic(source="synthetic", shape=(1000,), examples=100_000), torch.device("cpu"))
except DataError as error:
    print(json.dumps(str(error)))
"""


def test_what_a_limit_of_the_process_refuses_is_said() -> None:
    ended = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert json.loads(ended.stdout).startswith("data: the examples take 383 MiB in memory, and the system refuses them")
