"""Workers take many runs, one death costs one run, and none outlives the driver."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from bncli.errors import BncliError, Refused
from bncli.measure.compare.plan import Job
from bncli.measure.compare.processes import Processes, cores
from bncli.measure.compare.run import Ended, Started
from bncli.measure.compare.work import Work
from bncli.results.compare import RunProgressed
from tests.measure.compare.acts import FAKE, Act, jobs_of


def processes(folder: Path, device: str = "cpu", jobs: int | None = 2) -> Processes:
    return Processes(device, jobs, 1, folder, command=FAKE)


def carry_out(
    executor: Processes, acts: dict[str, str], stop: Callable[[], bool] = lambda: False
) -> tuple[list[Any], dict[str, Ended]]:
    with contextlib.closing(executor):
        events = list(executor.run(jobs_of(acts), stop))
    return events, {event.job.key: event for event in events if isinstance(event, Ended)}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_every_run_ends_and_a_worker_takes_many(tmp_path: Path) -> None:
    _, ended = carry_out(processes(tmp_path), {f"run{n}": "work" for n in range(9)})
    assert len(ended) == 9
    assert all(event.failure is None for event in ended.values())
    assert len({event.result["pid"] for event in ended.values() if event.result}) <= 2


def test_a_run_is_started_then_progresses_then_ends(tmp_path: Path) -> None:
    events, _ = carry_out(processes(tmp_path, jobs=1), {"run": "work"})
    assert [type(event) for event in events if event is not None] == [Started, RunProgressed, Ended]


def test_cores_are_those_that_the_process_may_use() -> None:
    process = psutil.Process()
    assert 1 <= cores() <= (psutil.cpu_count(logical=False) or psutil.cpu_count() or 1)
    if not hasattr(process, "cpu_affinity"):
        pytest.skip("there is no affinity here")
    before = process.cpu_affinity()
    try:
        process.cpu_affinity(before[:1])
        assert cores() == 1
    finally:
        process.cpu_affinity(before)


def test_workers_get_the_number_of_threads_in_their_environment(tmp_path: Path) -> None:
    made = Processes("cpu", 1, 3, tmp_path, command=FAKE)
    _, ended = carry_out(made, {"run": "work"})
    assert ended["run"].result is not None
    assert ended["run"].result["threads"] == "3"


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (
            "die",
            "its worker process was killed by SIGKILL, perhaps for lack of memory; its log ends: I die",
        ),
        ("exit", "its worker process exited with 7"),
        ("fail", "ValueError: no"),
    ],
)
def test_a_run_that_dies_is_reported_and_the_others_go_on(tmp_path: Path, act: str, reason: str) -> None:
    acts = {f"run{n}": "work" for n in range(6)} | {"bad": act}
    _, ended = carry_out(processes(tmp_path), dict(sorted(acts.items())))
    assert ended["bad"].failure == reason
    assert ended["bad"].result is None
    assert sum(event.failure is None for event in ended.values()) == 6


def test_the_log_of_an_earlier_run_is_not_blamed_for_a_death(tmp_path: Path) -> None:
    _, ended = carry_out(processes(tmp_path, jobs=1), {"earlier": "fail", "later": "exit"})
    assert ended["later"].failure == "its worker process exited with 7"


def test_every_run_dying_still_ends(tmp_path: Path) -> None:
    _, ended = carry_out(processes(tmp_path), {f"run{n}": "die" for n in range(4)})
    assert len(ended) == 4


def test_runs_that_are_named_later_are_done_too(tmp_path: Path) -> None:
    done: list[str] = []
    wanted = jobs_of({"first": "work"})
    with contextlib.closing(processes(tmp_path)) as executor:
        for event in executor.run(wanted, lambda: False):
            if isinstance(event, Ended):
                done.append(event.job.key)
                wanted.waiting.extend(jobs_of({"second": "work"}).waiting if event.job.key == "first" else [])
    assert done == ["first", "second"]


def test_workers_stay_for_the_next_runs_until_they_are_closed(tmp_path: Path) -> None:
    executor = processes(tmp_path, jobs=1)
    first, second = (
        next(
            event.result["pid"]
            for event in executor.run(jobs_of({key: "work"}), lambda: False)
            if isinstance(event, Ended)
        )
        for key in ("first", "second")
    )
    assert first == second
    assert alive(first)
    executor.close()
    assert not alive(first)


def test_what_a_worker_is_sent_is_made_once_a_run(tmp_path: Path) -> None:
    """Not for all that wait after every run, which took 0.29 s a run where 4,000 waited."""
    jobs = jobs_of({f"run{n}": "work" for n in range(12)})
    recipes: list[Any] = [job.recipe for job in jobs.waiting]
    with contextlib.closing(processes(tmp_path)) as executor:
        list(executor.run(jobs, lambda: False))
    assert [recipe.dumps for recipe in recipes] == [1] * 12


def test_logs_of_earlier_workers_and_of_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "worker-0.log").write_text("mine")
    (tmp_path / "worker-0-1.log").symlink_to(tmp_path / "nowhere")
    carry_out(processes(tmp_path, jobs=1), {"bad": "die", "good": "work"})
    assert (tmp_path / "worker-0.log").read_text() == "mine"
    assert (tmp_path / "worker-0-2.log").read_text() == "I die\n"
    assert sorted(log.name for log in tmp_path.iterdir()) == ["worker-0-1.log", "worker-0-2.log", "worker-0.log"]


def test_a_worker_that_refuses_every_run_ends_the_comparison(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="device absent: is not here") as error:
        carry_out(processes(tmp_path, "absent"), {"run": "work"})
    assert error.value.exit_code == 3
    with pytest.raises(Refused, match="there is no file") as error:
        carry_out(processes(tmp_path), {"run": "refuse"})
    assert error.value.exit_code == 2


def test_a_worker_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    with pytest.raises(
        BncliError, match=r"could not start \(exit 1\); its log, .*, ends:\nImportError: no such library"
    ):
        carry_out(processes(tmp_path, "broken"), {"run": "work"})


def test_one_worker_a_gpu_each_seeing_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = processes(tmp_path, "cuda", None)
    events, ended = carry_out(made, {f"run{n}": "work" for n in range(8)})
    visible = {event.result["visible"] for event in ended.values() if event.result}
    assert {event.worker for event in events if isinstance(event, Started)} <= {0, 1}
    assert visible <= {None, "1"}  # the first sees all and takes number 0, the second is given number 1
    assert {event.at_a_time for event in ended.values()} == {2}


def test_stop_ends_the_workers_at_once(tmp_path: Path) -> None:
    pids: list[int] = []
    made = processes(tmp_path)

    def stop() -> bool:
        pids.extend(worker.process.pid for worker in made._workers if worker.jobs)
        return len(set(pids)) == 2

    _, ended = carry_out(made, {"one": "sleep", "two": "sleep"}, stop)
    assert ended == {}
    assert not any(alive(pid) for pid in set(pids))


def test_runs_with_a_checkpoint_are_told_to_stop_and_what_ends_meanwhile_is_kept(tmp_path: Path) -> None:
    progressed: set[int] = set()
    made = Processes("cpu", 3, 1, tmp_path, checkpoints=tmp_path / "saved", command=FAKE)
    (tmp_path / "saved").mkdir()
    ended = {}
    with contextlib.closing(made):
        jobs = jobs_of({"saved": "save", "ended": "save slowly", "lost": "sleep"})
        for event in made.run(jobs, lambda: len(progressed) == 3):
            if isinstance(event, RunProgressed):
                progressed.add(event.worker)
            elif isinstance(event, Ended):
                ended[event.job.key] = event.failure
        assert ended == {"ended": None}
        pids = [worker.process.pid for worker in made._workers]
    assert [file.name for file in (tmp_path / "saved").iterdir()] == ["saved.pt"]
    assert len(pids) == 3
    assert not any(map(alive, pids))


def test_a_worker_that_does_not_stop_is_killed_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bncli.measure.compare.processes.GRACE_S", 0.2)
    made = Processes("cpu", 1, 1, tmp_path, checkpoints=tmp_path, command=FAKE)
    recipe = Act("sleep")
    recipe.train.checkpoint = {"every": 5}
    with contextlib.closing(made):
        started = [
            event
            for event in made.run(
                Work([Job("run", "plain", {}, 0, "tune", recipe)]),
                lambda: bool(made._workers[:1] and made._workers[0].jobs),
            )  # type: ignore[arg-type]
            if isinstance(event, Started | Ended)
        ]
        assert len(started) == 1
        (pid,) = (worker.process.pid for worker in made._workers)
    assert not alive(pid)


def test_the_time_between_two_calls_is_no_silence_of_a_worker(tmp_path: Path) -> None:
    made = Processes("cpu", 1, 1, tmp_path, longest_silence_s=0.9, command=FAKE)
    with contextlib.closing(made):
        for name in ("first", "second"):
            events = list(made.run(jobs_of({name: "work"}), lambda: False))
            assert [event.failure for event in events if isinstance(event, Ended)] == [None]
            time.sleep(1.0)  # as the caller's own work may take


def test_a_run_without_progress_for_too_long_is_ended_and_the_others_go_on(tmp_path: Path) -> None:
    acts = {"asleep": "sleep", "frozen": "freeze", "slow": "go on", "next": "work"}
    made = Processes("cpu", 2, 1, tmp_path, longest_silence_s=2.0, command=FAKE)
    _, ended = carry_out(made, acts)
    reason = "it made no progress for 2 s, the limit given, and was ended"
    assert {key: event.failure for key, event in ended.items()} == {
        "asleep": reason, "frozen": reason, "slow": None, "next": None,
    }  # fmt: skip
