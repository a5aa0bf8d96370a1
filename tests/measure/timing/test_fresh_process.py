"""Calls in fresh processes: what they return, how they fail, and that no process stays behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from bncli.errors import Unavailable
from bncli.measure.timing.fresh_process import CallFailed, FreshProcesses

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")

GENEROUS_S = 60.0
prepared: list[int] = []


def prepare() -> None:
    prepared.append(os.getpid())


def add(one: int, other: int) -> int:
    print("no answer")
    return one + other


def pids() -> tuple[int, list[int]]:
    return os.getpid(), prepared


def modules() -> list[str]:
    return sorted(sys.modules)


def kill_itself() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def give_up() -> None:
    os._exit(3)


def leave_without_an_answer() -> None:
    os._exit(0)


def hang() -> None:
    time.sleep(600)


def raise_it() -> None:
    raise Unavailable("not today")


def return_what_cannot_be_sent() -> threading.Lock:
    return threading.Lock()  # type: ignore[return-value]


def answer_and_leave_a_thread() -> int:
    threading.Thread(target=hang).start()
    return 7


@pytest.fixture(scope="module")
def processes() -> Iterator[FreshProcesses]:
    with contextlib.closing(FreshProcesses(prepare)) as found:
        yield found


def test_a_call_returns_what_the_function_returns_whatever_it_prints(processes: FreshProcesses) -> None:
    assert processes.call(add, 2, 3, limit_s=GENEROUS_S) == 5


def test_each_call_has_its_process_forked_from_the_prepared_one(processes: FreshProcesses) -> None:
    (one, before), (other, after) = (processes.call(pids, limit_s=GENEROUS_S) for _ in range(2))
    assert one != other
    assert before == after == [server_of(processes)]


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (kill_itself, "its process ended with SIGSEGV"),
        (give_up, "its process ended with exit code 3"),
        (leave_without_an_answer, "its process ended with exit code 0"),
        (hang, "it took longer than 0.5 s"),
        (raise_it, "Unavailable: not today"),
        (return_what_cannot_be_sent, "its process ended with exit code 1"),
    ],
)
def test_a_call_that_fails_says_why_and_the_next_one_succeeds(
    processes: FreshProcesses, function: Callable[[], None], says: str
) -> None:
    with pytest.raises(CallFailed) as failed:
        processes.call(function, limit_s=0.5 if function is hang else GENEROUS_S)
    assert str(failed.value) == says
    assert processes.call(add, 1, 1, limit_s=GENEROUS_S) == 2
    assert processes_of(server_of(processes)) == [server_of(processes)]


def test_an_answer_does_not_wait_for_threads_that_go_on(processes: FreshProcesses) -> None:
    assert processes.call(answer_and_leave_a_thread, limit_s=GENEROUS_S) == 7
    assert processes.call(add, 1, 1, limit_s=GENEROUS_S) == 2


def test_a_module_in_the_current_folder_is_not_loaded_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("multiprocessing", "pickle", "torch", "bncli"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(5)")
    monkeypatch.chdir(tmp_path)
    with contextlib.closing(FreshProcesses(prepare)) as processes:
        assert "multiprocessing.connection" in processes.call(modules, limit_s=GENEROUS_S)


def server_of(processes: FreshProcesses) -> int:
    """The server's process, which leads the process group of its children; it is the one that has prepared."""
    (server,) = processes.call(pids, limit_s=GENEROUS_S)[1]
    return server


def processes_of(group: int) -> list[int]:
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def becomes_true(condition: Callable[[], bool]) -> bool:
    end_s = time.monotonic() + GENEROUS_S
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.02)
    return condition()


def test_no_process_is_left_and_a_killed_server_is_not_started_again() -> None:
    with contextlib.closing(FreshProcesses(prepare)) as processes:
        group = server_of(processes)
        assert processes_of(group) == [group]
        os.kill(group, signal.SIGKILL)
        reasons = set()
        for _ in range(3):
            with pytest.raises(CallFailed, match="the process that measures memory ended") as failed:
                processes.call(add, 2, 3, limit_s=GENEROUS_S)
            reasons.add(str(failed.value))
    assert len(reasons) == 1  # or a profile would have a note for each
    assert becomes_true(lambda: not processes_of(group))


def test_a_child_that_hangs_ends_with_the_server() -> None:
    processes = FreshProcesses(prepare)
    group = server_of(processes)
    failed: list[BaseException] = []

    def call() -> None:
        try:
            processes.call(hang, limit_s=600.0)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    assert becomes_true(lambda: len(processes_of(group)) == 2)
    processes.close()
    thread.join(GENEROUS_S)
    assert becomes_true(lambda: not processes_of(group))
    assert failed


def test_the_server_ends_when_its_program_is_killed() -> None:
    ours, theirs = multiprocessing.Pipe(duplex=False)
    program = multiprocessing.get_context("spawn").Process(target=start_and_wait, args=(theirs,))
    program.start()
    assert ours.poll(GENEROUS_S)
    group = ours.recv()
    assert processes_of(group) == [group]
    program.kill()
    program.join()
    assert becomes_true(lambda: not processes_of(group))


def start_and_wait(connection: Connection) -> None:
    connection.send(server_of(FreshProcesses(prepare)))
    time.sleep(600)


@pytest.mark.parametrize("failing", [{"command": "raise SystemExit(3)"}, {"prepare": raise_it}])
def test_a_server_that_cannot_start_is_a_failed_call(failing: dict[str, Any]) -> None:
    with (
        contextlib.closing(FreshProcesses(**{"prepare": prepare, **failing})) as processes,
        pytest.raises(CallFailed, match="the process that measures memory ended"),
    ):
        processes.call(add, 2, 3, limit_s=GENEROUS_S)
