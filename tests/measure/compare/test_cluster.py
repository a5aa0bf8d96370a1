"""A Dask cluster does the same runs as worker processes, and goes on when a Dask worker or the driver dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bncli.engine.train import train
from bncli.errors import Refused, Unavailable, UsageError
from bncli.measure.compare import cluster
from bncli.measure.compare.cluster import Cluster
from bncli.measure.compare.plan import Job
from bncli.measure.compare.processes import Processes
from bncli.measure.compare.run import Ended, Started
from bncli.measure.compare.work import Work
from bncli.results.compare import RunProgressed
from bncli.results.serialize import from_plain
from bncli.results.train import RunFinished, RunResult
from tests.cli.conftest import RECIPE
from tests.conftest import tiny
from tests.kill import difference, without_times
from tests.measure.compare.acts import FAKE, jobs_of
from tests.measure.compare.dask_cluster import two_workers
from tests.measure.compare.test_processes import alive

pytest.importorskip("distributed")


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    """The address of one with two workers; a task whose Dask worker died is begun once again."""
    with two_workers() as (address, _):
        yield address


NOWHERE = Path("no-such-folder")  # so that logs are where the Dask worker has its files


def of_two(address: str | None, **options: Any) -> Cluster:
    return Cluster("cpu", None, 1, scheduler=address, **{"folder": NOWHERE, "command": FAKE, **options})


def carry_out(
    work: Work, address: str | None, stop: Callable[[], bool] = lambda: False, **options: Any
) -> tuple[list[Any], dict[str, Ended]]:
    with contextlib.closing(of_two(address, **options)) as executor:
        events = list(executor.run(work, stop))
    return events, {event.job.key: event for event in events if isinstance(event, Ended)}


def test_every_run_is_started_and_ends_and_a_process_takes_many(scheduler: str) -> None:
    events, ended = carry_out(jobs_of({f"run{n}": "work" for n in range(9)}), scheduler)
    assert [event.job.key for event in events if isinstance(event, Started)] == [f"run{n}" for n in range(9)]
    assert len(ended) == 9
    assert len({event.result["pid"] for event in ended.values() if event.result}) <= 2
    assert {event.at_a_time for event in ended.values()} == {2}
    assert {event.worker for event in ended.values()} <= {0, 1}
    assert any(isinstance(event, RunProgressed) for event in events)


def test_a_run_that_kills_its_process_is_reported_with_the_cause_and_the_dask_worker_goes_on(
    scheduler: str, tmp_path: Path
) -> None:
    acts = {"dies": "die", "leaves": "exit", "fails": "fail", "works": "work"}
    _, ended = carry_out(jobs_of(acts), scheduler, folder=tmp_path)
    assert {key: event.failure for key, event in ended.items()} == {
        "dies": "its worker process was killed by SIGKILL, perhaps for lack of memory; its log ends: I die",
        "leaves": "its worker process exited with 7",
        "fails": "ValueError: no",
        "works": None,
    }
    assert any(log.read_text() for log in tmp_path.glob("dask-*/worker-*.log"))


def test_a_run_in_progress_is_given_up(scheduler: str) -> None:
    with contextlib.closing(of_two(scheduler)) as executor:
        ended = []
        for event in executor.run(jobs_of({"run": "wait"}), lambda: False):
            if isinstance(event, RunProgressed):
                executor.give_up({"run"})
            elif isinstance(event, Ended):
                ended.append((event.job.key, event.failure))
    assert ended == [("run", None)]


def test_a_run_whose_dask_worker_died_is_done_by_another(scheduler: str) -> None:
    killed: list[int] = []
    with contextlib.closing(of_two(scheduler)) as executor:
        ended = {}
        for event in executor.run(jobs_of({"run": "go on a while"}), lambda: False):
            if isinstance(event, RunProgressed) and not killed:
                killed += [pid for pid in executor._client.run(os.getpid).values() if psutil.Process(pid).children()]
                os.kill(killed[0], signal.SIGKILL)
            elif isinstance(event, Ended):
                ended[event.job.key] = event.failure
    assert len(killed) == 1
    assert ended == {"run": None}


@pytest.mark.slow
def test_a_run_whose_dask_workers_die_fails_alone_and_says_so(scheduler: str) -> None:
    acts = {"bad": "end Dask", "good": "work"}
    work = jobs_of(acts, company="alike")
    _, ended = carry_out(work, scheduler)
    failure = ended["bad"].failure
    assert failure is not None
    assert failure.startswith("its Dask worker died 2 times, the last of them tcp://127.0.0.1:")
    assert ended["good"].failure is None


def test_what_no_worker_can_do_is_refused_with_its_place(scheduler: str) -> None:
    with pytest.raises(Refused, match=r"there is no file \(on the Dask worker at tcp://127.0.0.1:\d+\)") as error:
        carry_out(jobs_of({"run": "refuse"}), scheduler)
    assert error.value.exit_code == 2


def test_a_worker_with_another_bncli_is_refused(scheduler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(*_: object) -> dict[str, str]:
        return {"bncli": "0 mine", "torch": "2", "device": "cpu", "data": ""}

    monkeypatch.setattr(cluster.reuse, "identity", identity)
    with pytest.raises(
        Refused, match=r"at tcp://.* has another bncli \(.*, not 0 mine\), torch \(.*, not 2\)"
    ) as error:
        carry_out(jobs_of({"run": "work"}), scheduler)
    assert error.value.exit_code == 3


def test_stop_ends_a_task_and_its_process(scheduler: str) -> None:
    seen: list[Any] = []

    def stop() -> bool:
        return any(isinstance(event, RunProgressed) for event in seen)

    with contextlib.closing(of_two(scheduler)) as executor:
        for event in executor.run(jobs_of({"one": "sleep"}), stop):
            seen.append(event)
        assert not any(isinstance(event, Ended) for event in seen)
        workers = [psutil.Process(pid) for pid in executor._client.run(os.getpid).values()]
        wait_until(lambda: not any(worker.children() for worker in workers))


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


DRIVER = """
from bncli.measure.compare.cluster import Cluster
from bncli.results.serialize import from_plain
from bncli.results.train import RunFinished, RunResult
from tests.cli.conftest import RECIPE
from tests.conftest import tiny
from tests.kill import difference, without_times
from tests.measure.compare.acts import FAKE, jobs_of
from tests.measure.compare.dask_cluster import two_workers
from tests.measure.compare.test_processes import alive
work, executor = jobs_of(dict(one="sleep")), of_two({address!r})
for event in executor.run(work, lambda: False):
    if event is not None:
        print(event, flush=True)
"""


@pytest.mark.slow
def test_a_killed_drivers_runs_are_ended(scheduler: str) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER.format(address=scheduler)], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    assert driver.stdout.readline().startswith("Started")
    with contextlib.closing(of_two(scheduler)) as executor:
        executor._connect()
        workers = [psutil.Process(pid) for pid in executor._client.run(os.getpid).values()]
        wait_until(lambda: any(worker.children() for worker in workers))
        driver.kill()
        driver.communicate()
        wait_until(lambda: not any(worker.children() for worker in workers))


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["driver", "driver and Dask workers"])
def test_the_same_command_goes_on_after_a_kill_to_the_same_report(scheduler: str, tmp_path: Path, killed: str) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)

    def start(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "bncli", "compare", "small.yaml", "--full-grid", "--json", *options]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    dask = ("--executor", "dask", "--scheduler", scheduler, "--out", "dask")
    driver, local = start(*dask), start("--out", "local", "--jobs", "1")
    wait_until(lambda: len([*(tmp_path / "dask" / "runs").glob("*.json")]) >= 2)
    with contextlib.closing(of_two(scheduler)) as cluster:
        cluster._connect()
        driver.kill()
        for pid in cluster._client.run(os.getpid).values() if "Dask" in killed else ():
            os.kill(pid, signal.SIGKILL)
    driver.communicate()
    done = {file.name: file.read_bytes() for file in (tmp_path / "dask" / "runs").glob("*.json")}
    found, expected = (json.loads(process.communicate()[0]) for process in (start(*dask), local))
    assert difference(without_times(found), without_times(expected)) is None
    assert 2 <= len(done) < len(expected["runs"])
    assert all((tmp_path / "dask" / "runs" / name).read_bytes() == content for name, content in done.items())


def test_without_a_scheduler_there_is_a_local_cluster_that_ends_with_the_call() -> None:
    with contextlib.closing(Cluster("cpu", 1, 1, folder=NOWHERE, command=FAKE)) as executor:
        ended = [event for event in executor.run(jobs_of({"run": "work"}), lambda: False) if isinstance(event, Ended)]
        (worker,) = executor._client.run(os.getpid).values()
    assert [event.failure for event in ended] == [None]
    assert ended[0].result is not None
    wait_until(lambda: not alive(worker) and not alive(ended[0].result["pid"]))


def test_real_runs_end_as_in_this_process(scheduler: str) -> None:
    recipes = {str(seed): tiny(train={"seed": seed}) for seed in range(3)}
    work = Work(Job(key, "plain", {}, int(key), "tune", recipe) for key, recipe in recipes.items())
    _, ended = carry_out(work, scheduler, command=Processes.command)
    for key, recipe in recipes.items():
        *_, last = train(recipe, "cpu", threads=1)
        assert isinstance(last, RunFinished)
        found = ended[key].result
        assert found is not None, ended[key].failure
        result = from_plain(RunResult, found)
        for name in ("status", "steps_run", "steps_to_target", "first_hit", "best", "evaluations"):
            assert getattr(result, name) == getattr(last.result, name), name


@pytest.mark.parametrize(
    ("device", "threads", "resources", "taken", "places"),
    [
        ("cpu", 2, {}, {}, 4),
        ("cpu", 2, {"CPU": 5, "GPU": 1}, {"CPU": 2}, 2),
        ("cuda", 1, {"GPU": 1}, {"GPU": 1}, 1),
        ("cuda", 1, {}, {}, None),
        ("cpu", 6, {"CPU": 5}, {"CPU": 6}, 0),
    ],
)
def test_a_dask_worker_does_a_run_per_thread_or_as_its_resources_allow(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    threads: int,
    resources: dict[str, float],
    taken: dict[str, float],
    places: int | None,
) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(cluster, "JOIN_S", -1.0)
    here: dict[str, Any] = {"processes": False, "protocol": "tcp", "dashboard_address": "127.0.0.1:0"}
    with LocalCluster(n_workers=1, threads_per_worker=4, resources=resources, **here) as started:
        executor = Cluster(device, None, threads, started.scheduler_address)
        with contextlib.closing(executor):
            executor._connect()
            if places is None:
                with pytest.raises(Unavailable, match="4 runs at a time of this Dask worker would share a GPU"):
                    executor._look()
            elif not places:
                with pytest.raises(Unavailable, match="had no worker for -1 s; start some"):
                    executor._look()
            else:
                executor._look()
                assert (executor._resources, [*executor._places.values()]) == (taken, [places])


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nowhere://x", "tcp://no.such.host.invalid:8786"])
def test_a_scheduler_that_does_not_answer_is_one_sentence(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_S", 0.2)
    with pytest.raises(Unavailable, match=f"^scheduler {address}: no Dask scheduler answers") as error:
        carry_out(jobs_of({"run": "work"}), address)
    assert error.value.exit_code == 3
    assert "\n" not in str(error.value)


def test_the_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UsageError, match=r"pip install 'bncli\[dask\]'"):
        carry_out(jobs_of({"run": "work"}), None)
