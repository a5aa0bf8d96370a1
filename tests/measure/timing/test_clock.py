"""The clock against a fake host and a fake device, whose times are known exactly."""

from __future__ import annotations

import random

import pytest
import torch

from bncli.measure.timing import clock
from bncli.measure.timing.clock import CpuClock, CudaClock, Deadline, LoopClock, Work, interleaved, rounds
from bncli.measure.timing.speedup import faster

CPU = torch.device("cpu")
CYCLES_PER_MS = 2_000_000


class Machine:
    """A host and a device with one queue; in ms. The device works through its queue while the host goes on."""

    def __init__(self) -> None:
        self.host_ms = self.device_free_ms = 0.0
        self.log: list[str] = []

    def now_ns(self) -> int:
        return round(self.host_ms * 1e6)

    def enqueue(self, name: str, host_ms: float, device_ms: float) -> None:
        self.host_ms += host_ms
        self.device_free_ms = max(self.device_free_ms, self.host_ms) + device_ms
        self.log.append(name)

    def spin(self, cycles: int) -> None:
        self.enqueue("spin", 0.0, cycles / CYCLES_PER_MS)

    def synchronize(self, device: torch.device) -> None:
        self.host_ms = max(self.host_ms, self.device_free_ms)
        self.log.append("wait")

    def event(self) -> Event:
        return Event(self)

    def clock(self) -> CudaClock:
        return CudaClock(CPU, 64, event=self.event, spin=self.spin, synchronize=self.synchronize, now_ns=self.now_ns)

    def work(self, name: str, host_ms: float, device_ms: float, calls: int = 1) -> Work:
        return Work(lambda _: self.enqueue(name, host_ms, device_ms), lambda: self.log.append("prepare"), calls)


class Event:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def record(self) -> None:
        self.at_ms = max(self.machine.host_ms, self.machine.device_free_ms)

    def query(self) -> bool:
        return self.at_ms <= self.machine.host_ms

    def elapsed_time(self, other: Event) -> float:
        assert max(self.at_ms, other.at_ms) <= self.machine.host_ms, "read before it was waited for"
        return other.at_ms - self.at_ms


def test_a_sample_holds_the_devices_time_and_none_of_the_hosts() -> None:
    machine = Machine()
    found = interleaved(machine.clock(), {"a": machine.work("a", host_ms=0.08, device_ms=0.005)}, 3)
    assert found["a"] == pytest.approx([0.005] * 3)


def test_a_slow_host_gets_more_lead_until_its_work_is_enqueued_in_time() -> None:
    machine = Machine()
    device = machine.clock()
    found = interleaved(device, {"a": machine.work("a", host_ms=1.0, device_ms=0.5)}, 4)["a"]
    assert found[0] == pytest.approx(0.9 + 0.5)  # the device had spun for 0.1 ms of the host's 1 ms
    assert found[1:] == pytest.approx([0.5] * 3)
    assert (device.host_bound, device.samples) == (1, 4)


def test_work_that_no_lead_can_cover_is_counted_as_bound_by_the_host() -> None:
    machine = Machine()
    device = machine.clock()
    interleaved(device, {"a": machine.work("a", host_ms=2 * clock.LONGEST_LEAD_MS, device_ms=0.5)}, 4)
    assert device.host_bound == 4


def test_a_sample_of_several_calls_gives_the_time_of_one() -> None:
    machine = Machine()
    assert interleaved(machine.clock(), {"a": machine.work("a", 0.01, 1.0, calls=20)}, 3)["a"] == pytest.approx(
        [1.0 / 20] * 3
    )


def test_a_warm_sample_follows_the_same_work_and_a_cold_one_a_flush() -> None:
    for cold, before in ((False, ["prepare", "a", "prepare", "spin", "a"]), (True, ["prepare", "spin", "a"])):
        machine = Machine()
        device = machine.clock()
        machine.log.clear()
        flushes = device._flush[0].item()
        device.sample(machine.work("a", 0.01, 1.0), cold)
        assert machine.log == before
        assert device._flush[0].item() == flushes + cold


def test_the_device_is_waited_for_once_a_round_not_once_a_sample() -> None:
    machine = Machine()
    device = machine.clock()
    machine.log.clear()
    interleaved(device, {name: machine.work(name, 0.01, 1.0) for name in "abc"}, 5)
    assert machine.log.count("wait") == 5


def test_every_round_runs_every_work_once_in_a_new_order() -> None:
    machine = Machine()
    works = {name: machine.work(name, 0.01, device_ms) for name, device_ms in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    device = machine.clock()
    machine.log.clear()
    found = interleaved(device, works, 8, order=random.Random(1))
    ran = [name for name in machine.log if name in works]
    rounds = [tuple(ran[k : k + 3]) for k in range(0, len(ran), 3)]
    assert all(set(one) == set(works) for one in rounds)
    assert len(set(rounds)) > 1
    assert {name: round(samples[5], 6) for name, samples in found.items()} == {"a": 1.0, "b": 2.0, "c": 3.0}


def test_rounds_end_at_the_deadline_but_not_before_the_fewest() -> None:
    machine = Machine()
    work = {"a": machine.work("a", 0.0, 100.0)}
    seconds = lambda: machine.host_ms / 1e3  # noqa: E731
    late = interleaved(machine.clock(), work, 50, deadline=Deadline(0.0, seconds))["a"]
    assert len(late) == clock.FEWEST_ROUNDS
    some = interleaved(machine.clock(), work, 50, deadline=Deadline(1.0, seconds))["a"]
    assert clock.FEWEST_ROUNDS < len(some) < 50


def test_a_deadline_counts_down_and_passes() -> None:
    now = [10.0]
    deadline = Deadline(5.0, lambda: now[0])
    now[0] = 13.0
    assert (deadline.left_s, deadline.passed) == (2.0, False)
    now[0] = 16.0
    assert (deadline.left_s, deadline.passed) == (0.0, True)


def test_the_cpus_clock_times_the_run_and_not_its_preparation() -> None:
    machine = Machine()
    work = Work(lambda _: machine.enqueue("a", 3.0, 0.0), lambda: machine.enqueue("prepare", 7.0, 0.0), calls=2)
    host = CpuClock(flush_bytes=64, now_ns=machine.now_ns)
    assert interleaved(host, {"a": work}, 3, cold=True)["a"] == pytest.approx([1.5] * 3)
    assert interleaved(host, {"a": work}, 3, cold=False)["a"] == pytest.approx([1.5] * 3)
    assert host.host_bound == 0


def test_a_loop_is_timed_until_all_is_done_less_what_prepares_it() -> None:
    machine = Machine()
    works = {
        "host": Work(lambda _: machine.enqueue("a", 3.0, 0.0), lambda: machine.enqueue("prepare", 7.0, 0.0), calls=2),
        "device": Work(lambda _: machine.enqueue("b", 1.0, 8.0), lambda: machine.enqueue("prepare", 0.0, 50.0)),
    }
    loop = LoopClock(CPU, machine.now_ns, machine.synchronize)
    assert interleaved(loop, works, 3) == {"host": (1.5,) * 3, "device": pytest.approx([9.0] * 3)}


def test_calls_in_a_row_are_one_sample_after_an_untimed_call() -> None:
    for calls, made in ((1, 1), (4, 5)):
        machine = Machine()
        work = clock.in_a_row(lambda machine=machine: machine.enqueue("a", 3.0, 0.0), calls)  # type: ignore[misc]
        assert interleaved(LoopClock(CPU, machine.now_ns, machine.synchronize), {"a": work}, 1) == {"a": (3.0,)}
        assert machine.log.count("a") == made


def test_rounds_come_one_by_one() -> None:
    machine = Machine()
    found = rounds(machine.clock(), {"a": machine.work("a", 0.01, 1.0)}, 5)
    assert [next(found)["a"], next(found)["a"]] == pytest.approx([1.0, 1.0])
    assert machine.log.count("a") == 2


def test_a_copy_moves_every_byte_twice() -> None:
    work, moved_bytes = clock.copy_work(4096, CPU)
    assert moved_bytes == 2 * 4096
    target = work.run(None)
    assert isinstance(target, torch.Tensor)
    assert target.eq(1).all()


def test_a_cpu_gets_the_hosts_clock() -> None:
    assert isinstance(clock.of(CPU), CpuClock)


@pytest.mark.cuda
def test_on_a_gpu_a_larger_copy_takes_longer_and_the_host_is_not_in_it() -> None:
    device = torch.device("cuda")
    timer = clock.of(device)
    works = {str(mib): clock.copy_work(mib * 2**20, device)[0] for mib in (64, 512)}
    interleaved(timer, works, 5)  # the device's clock frequency rises
    found = interleaved(timer, works, 9)
    assert 4 < faster(found["512"], found["64"]).value < 16
    assert timer.host_bound < timer.samples / 2
