"""Leases of runs: one call has a run at a time, and one that has ended has none."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bncli.report.compare import leases
from bncli.report.compare.leases import LIMIT_S, Leases

KEY = "0123456789abcdef0123"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("runs", "calls"):
        (tmp_path / name).mkdir()
    return tmp_path / "runs", tmp_path / "calls"


def renewed(calls: Path, call: str, seconds_ago: float, change: float = 0.0) -> None:
    """Another call's file, renewed so many seconds before that of every other; `change`: of the server's clock."""
    with (calls / call).open("a"):
        pass
    now = time.time() + change
    os.utime(calls / call, (now - seconds_ago, now - seconds_ago))


def held_by(runs: Path, calls: Path, seconds_ago: float, call: str = "a" * 12) -> None:
    """A lease of a call on another machine."""
    (runs / f"{KEY}.0.lease").write_text(call)
    renewed(calls, call, seconds_ago)


def test_a_run_has_one_call_at_a_time(folders: tuple[Path, Path]) -> None:
    with Leases(*folders) as one, Leases(*folders) as other:
        assert one.take(KEY)
        assert one.take(KEY)
        assert not other.take(KEY)
        assert other.free([KEY], {KEY}) == set()
        one.release(KEY)
        assert other.free([KEY], set()) == {KEY}
        assert other.take(KEY)
        assert not one.take(KEY)


def test_a_lease_is_free_once_its_call_has_ended(folders: tuple[Path, Path]) -> None:
    with Leases(*folders) as other:
        with Leases(*folders) as one:
            assert one.take(KEY)
            assert not other.take(KEY)
        assert other.free([KEY], {KEY}) == {KEY}
        assert other.take(KEY)
        assert len(list(folders[0].iterdir())) == 2  # only a call that is alone deletes leases
    assert not list(folders[0].iterdir())
    assert not list(folders[1].iterdir())


@pytest.mark.parametrize(("seconds_ago", "free"), [(0.5 * LIMIT_S, False), (1.5 * LIMIT_S, True), (-1e6, True)])
def test_a_lease_is_free_once_its_call_was_silent_for_too_long(
    folders: tuple[Path, Path], seconds_ago: float, free: bool
) -> None:
    held_by(*folders, seconds_ago)
    with Leases(*folders) as mine:
        assert mine.alone() is free
        assert mine.take(KEY) is free


def test_only_the_servers_clock_counts(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is years before this machine's."""
    change = -1e8

    def touch_by_server(file: Path) -> None:
        renewed(file.parent, file.name, 0, change)

    monkeypatch.setattr(Path, "touch", touch_by_server)
    (folders[0] / f"{KEY}.0.lease").write_text("a" * 12)
    for seconds_ago in (0.5 * LIMIT_S, 1.5 * LIMIT_S):
        renewed(folders[1], "a" * 12, seconds_ago, change)
        with Leases(*folders) as mine:
            assert mine.take(KEY) is (seconds_ago > LIMIT_S)


@pytest.mark.parametrize(("age_s", "free"), [(0, False), (2 * LIMIT_S, True)])
def test_a_lease_that_names_no_call_is_free_after_the_limit(
    folders: tuple[Path, Path], age_s: float, free: bool
) -> None:
    """Its call was killed while it created it, or is just about to write its name."""
    renewed(folders[0], f"{KEY}.0.lease", age_s)
    with Leases(*folders) as mine:
        assert mine.take(KEY) is free


def test_a_call_that_is_silent_for_too_long_and_goes_on_disturbs_nobody(folders: tuple[Path, Path]) -> None:
    with Leases(*folders) as slow, Leases(*folders) as other, Leases(*folders) as third:
        assert slow.take(KEY)
        renewed(folders[1], slow._call.name, 2 * LIMIT_S)
        slow._call.write_text("")  # as on another machine
        renewed(folders[1], slow._call.name, 2 * LIMIT_S)
        assert other.take(KEY)
        slow._call.touch()
        assert not third.take(KEY)
        slow.release(KEY)  # it has ended the run all the same, so that whoever takes the lease finds it done
        assert third.take(KEY)


def test_a_call_renews_its_file_and_makes_it_again(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEW_S", 0.01)
    with Leases(*folders) as mine:
        mine._call.unlink()
        end = time.monotonic() + 60
        while not mine._call.exists():
            assert time.monotonic() < end
            time.sleep(0.01)


HOLD = f"""
import sys, time
from pathlib import Path
from bncli.report.compare.leases import Leases
with Leases(Path(sys.argv[1]), Path(sys.argv[2])) as mine:
    print(mine.take({KEY!r}), flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_call_that_was_killed_on_this_machine_is_seen_at_once(folders: tuple[Path, Path]) -> None:
    started = subprocess.Popen([sys.executable, "-c", HOLD, *map(str, folders)], stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "True\n"
    with Leases(*folders) as mine:
        assert not mine.take(KEY)
        started.kill()
        started.communicate()
        assert mine.take(KEY)
        assert mine.alone()
    assert not list(folders[1].iterdir())


def _take_all(runs: Path, calls: Path, keys: list[str], barrier: object) -> None:
    with Leases(runs, calls) as mine:
        barrier.wait()  # type: ignore[attr-defined]
        won = [key for key in keys if mine.take(key)]
        (runs.parent / f"won-{os.getpid()}").write_text(" ".join(won))
        barrier.wait()  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_of_calls_that_take_over_the_same_leases_at_the_same_time_one_gets_each(folders: tuple[Path, Path]) -> None:
    keys = [f"{number:020x}" for number in range(100)]
    for key in keys:
        (folders[0] / f"{key}.0.lease").write_text("a" * 12)  # of a call that has ended
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    started = [context.Process(target=_take_all, args=(*folders, keys, barrier)) for _ in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    won = [key for file in folders[0].parent.glob("won-*") for key in file.read_text().split()]
    assert sorted(won) == keys


@pytest.mark.parametrize("content", ["", "mine", "../runs", "x y 1 2 3", "\0"])
def test_files_that_others_put_there_are_not_followed(folders: tuple[Path, Path], content: str) -> None:
    runs, calls = folders
    (runs / f"{KEY}.0.lease").write_text(content)
    (calls / "b").write_text("mine")
    (calls / ("c" * 12)).symlink_to(runs)
    with Leases(*folders) as mine:
        assert mine.take(KEY) is False  # it may have been created just now
        assert (runs / f"{KEY}.0.lease").read_text() == content
        mine.alone()
    assert (calls / "b").read_text() == "mine"
