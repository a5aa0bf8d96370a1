"""Dask cluster: a task trains the runs of one worker, and is begun again on another Dask worker if its own dies.

A task hands its runs to a worker process as of `Processes`, which stays beside the Dask worker for its next task. So
runs are trained, fail, are saved and are told to end as without Dask, and one that kills its process leaves the Dask
worker alive to say why. Each thread of a Dask worker does one task at a time, and loads the data once for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import pickle
import queue
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any
from uuid import uuid4

from bncli.engine.user_code import digest_of
from bncli.errors import UNAVAILABLE, BncliError, Refused, Unavailable, UsageError
from bncli.measure.compare import reuse
from bncli.measure.compare.plan import Job
from bncli.measure.compare.processes import POLL_S, Processes, cores
from bncli.measure.compare.run import Ended, Started
from bncli.measure.compare.work import Work
from bncli.results.compare import RunProgressed

CONNECT_S = 10.0
JOIN_S = 60.0  # without a worker that can take a run, before it is given up
LOOK_S = 2.0  # between two looks at which workers there are
GATHER_S = 5.0  # for a result, before other messages are read
TELL_S = 1.0  # between two messages about the progress of a task
# For the workers of a local cluster. Ctrl-C is for the driver, which then ends its tasks itself.
PRELOAD = """import logging, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
for handler in logging.getLogger("distributed").handlers: handler.setLevel(logging.CRITICAL)"""
LOCAL: dict[str, Any] = {"threads_per_worker": 1, "memory_limit": None, "dashboard_address": "127.0.0.1:0"}


@dataclass
class _Task:
    number: int
    future: Any
    jobs: dict[str, Job]  # key -> run that has not ended


@dataclass
class Cluster:
    """Executor of tasks on the Dask cluster of a scheduler, given by its address; None: on a local one of its own.

    jobs: tasks at a time. None: as many as all workers have threads; a local cluster has as many as the machine cores.
    The rest is as of Processes; folder, checkpoints: where a worker finds them, else an interrupted run begins again.
    """

    device: str
    jobs: int | None
    threads: int
    scheduler: str | None = None
    longest_silence_s: float | None = None
    folder: Path = Path()
    checkpoints: Path | None = None
    command: Sequence[str] = Processes.command
    _said: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)  # by Dask workers and futures
    _tasks: dict[str, _Task] = field(default_factory=dict)  # Dask's key -> task in progress
    _client: Any = None
    _local: Any = None
    _telling: threading.Thread | None = None
    _asked: tuple[Any, ...] = ()  # of every task, besides its runs
    _resources: dict[str, float] = field(default_factory=dict)  # that a task takes of its Dask worker's
    _places: dict[str, int] = field(default_factory=dict)  # host -> tasks at a time
    _looked: float = -math.inf
    _seen: float = 0.0  # when there was a place last

    def run(self, work: Work, stop: Callable[[], bool]) -> Iterator[Started | RunProgressed | Ended | None]:
        """As `Executor.run`. Raises Unavailable without a cluster or workers, Refused when one can take no run."""
        self._connect()
        while not stop():
            if not work.more and not self._tasks:
                return
            self._look()
            yield from self._hand_outs(work)
            events = list(self._next_event(work))
            yield from self._hand_outs(work)  # so that a worker goes on while the caller saves what it did
            yield from events
        for task in self._tasks.values():
            task.future.cancel()
        self._tasks.clear()

    def _connect(self) -> None:
        if self._client is not None:
            return
        try:
            from distributed import Client, LocalCluster
            from distributed.comm.addressing import get_address_host_port
        except ImportError as error:
            needed = f"needs the package distributed ({error}); run: pip install 'bncli[dask]'"
            raise UsageError(needed, field="executor", value="dask") from None
        for handler in logging.getLogger("distributed").handlers:
            handler.setLevel(logging.CRITICAL)  # what ends the work is raised
        try:
            if self.scheduler is None:
                count = self.jobs or (cores() if self.device == "cpu" else 1)
                self._local = LocalCluster(n_workers=count, preload=[PRELOAD], **LOCAL)
            else:
                get_address_host_port(self.scheduler)  # a Client would be left half made by what is no address
            self._client = Client(self._local or self.scheduler, timeout=CONNECT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            reason = f"no Dask scheduler answers ({' '.join(str(error).split())})"
            raise Unavailable(reason, field="scheduler", value=self.scheduler) from None
        self._client.subscribe_topic(self._client.id, lambda event: self._said.put(event[1]))
        self._seen = monotonic()

    def _look(self) -> None:
        """Take in which workers there are now. Raises Unavailable."""
        if self._client.status not in ("running", "connecting"):
            raise Unavailable("the Dask scheduler is gone; the same command continues from the runs that ended")
        if monotonic() - self._looked < LOOK_S:
            return
        self._looked, workers = monotonic(), self._client.scheduler_info(n_workers=-1).get("workers")
        if workers is None:  # it tries to connect again
            return
        needed = {"CPU": self.threads, **({"GPU": 1} if self.device.startswith("cuda") else {})}
        declared = {name for worker in workers.values() for name in worker["resources"]}
        self._resources, self._places = {name: needed[name] for name in needed if name in declared}, {}
        for address, worker in workers.items():
            shares = (worker["resources"].get(name, 0) // amount for name, amount in self._resources.items())
            places = int(min(worker["nthreads"], *shares, math.inf))
            if places > 1 and "GPU" in needed:
                advice = "start one of one thread for each GPU, as dask cuda worker does, or with a resource GPU=1"
                raise Unavailable(f"{address}: {places} runs at a time of this Dask worker would share a GPU; {advice}")
            self._places[worker["host"]] = self._places.get(worker["host"], 0) + places
        if any(self._places.values()):
            self._seen = monotonic()
        elif self.jobs is None and monotonic() - self._seen > JOIN_S:
            words = f"had no worker for {JOIN_S:g} s; start some, or give jobs, the tasks to submit, to wait for them"
            raise Unavailable(words, field="scheduler", value=self.scheduler)

    def _hand_outs(self, work: Work) -> Iterator[Started]:
        places = sum(self._places.values())
        limit = self.jobs or max(1, places + places // 8)  # with many, some wait there while results come here
        while len(self._tasks) < limit and (jobs := work.take(limit)):
            if not self._asked:
                saved = self.checkpoints and str(self.checkpoints.absolute())
                folders = (str(self.folder.absolute()), saved)
                identity = reuse.identity(self.device, jobs[0].recipe)
                settings = (self.device, self.threads, self.longest_silence_s, tuple(self.command))
                self._asked = (self._client.id, identity, *settings, *folders)
            key = f"bncli-{uuid4().hex}"
            future = self._client.submit(train_runs, jobs, *self._asked, key=key, resources=self._resources)
            number = min(set(range(len(self._tasks) + 1)) - {task.number for task in self._tasks.values()})
            self._tasks[key] = _Task(number, future, {job.key: job for job in jobs})
            future.add_done_callback(lambda future: self._said.put({"task": future.key}))
            yield from (Started(number, job) for job in jobs)

    def _next_event(self, work: Work) -> Iterator[RunProgressed | Ended | None]:
        try:
            message = self._said.get(timeout=POLL_S)
        except queue.Empty:
            message = {}
        if (task := self._tasks.get(message.get("task", ""))) is None:  # or Dask's own message
            yield None
        elif "step" in message:
            yield RunProgressed(task.number, message["step"], message["value"], message["below"])
        elif "ended" in message:
            yield from self._ends(task, pickle.loads(message["ended"]))
        elif (ended := self._outcome(task)) is None:
            self._said.put(message)
        else:
            del self._tasks[task.future.key]
            yield from self._ends(task, ended)
            work.put_back(list(task.jobs.values()), one_by_one=True)

    def _ends(self, task: _Task, ended: list[Ended]) -> Iterator[Ended]:
        for event in ended:
            if task.jobs.pop(event.job.key, None):  # else it was said before
                for file, digest in event.code.items():
                    if digest_of(file) not in (digest, None):
                        raise Refused(f"{file}: a Dask worker has another version of this file", exit_code=UNAVAILABLE)
                yield replace(event, worker=task.number, at_a_time=max(self._places.values(), default=1))

    def _outcome(self, task: _Task) -> list[Ended] | None:
        """How the runs of a task ended; None while its result is made anew, as it died with its Dask worker."""
        from distributed import CancelledError
        from distributed.scheduler import KilledWorker

        try:
            return list(task.future.result(timeout=GATHER_S))
        except asyncio.TimeoutError:
            return None
        except CancelledError:  # by the scheduler, which was restarted
            return []
        except KilledWorker as error:
            last = f"the last of them {error.last_worker.address}; the log of its nanny there says of what"
            failure = f"its Dask worker died {error.allowed_failures + 1} times, {last}"
            return [Ended(task.number, job, None, failure) for job in task.jobs.values() if len(task.jobs) == 1]
        except BncliError:
            raise
        except Exception as error:  # a run that raises one does so in another process, and is a result
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise Unavailable(f"a Dask worker could not begin ({words}); each needs this same bncli") from error

    def give_up(self, keys: Collection[str]) -> None:
        """As `Executor.give_up`; does not wait until the workers know, and says nothing more until then."""
        if self._telling is None or not self._telling.is_alive():
            arguments, options = (give_up, self._client.id, list(keys)), {"on_error": "ignore"}
            self._telling = threading.Thread(target=self._client.run, args=arguments, kwargs=options, daemon=True)
            self._telling.start()

    def close(self) -> None:
        """End the processes that did these runs, and a local cluster; a run in progress is lost."""
        if self._client is not None and self._client.status == "running":
            self._client.run(end_processes, self._client.id, on_error="ignore")
            self._client.unsubscribe_topic(self._client.id)
        for opened in filter(None, (self._client, self._local)):  # its tasks end with the client
            opened.close()
        self._client, self._local, self._asked, self._looked = None, None, (), -math.inf
        self._tasks.clear()


# --- on a Dask worker -------------------------------------------------------------------------------------------------

# In the process of a Dask worker: thread -> what was asked of its last task, or of this one, and what does it.
_idle: dict[int, tuple[tuple[Any, ...], Processes]] = {}
_busy: dict[int, tuple[tuple[Any, ...], Processes]] = {}


def train_runs(jobs: list[Job], *asked: Any) -> list[Ended]:
    """Train runs; returns how each that was not stopped has ended. Raises Refused where none can be trained here."""
    from distributed import get_worker

    worker, thread = get_worker(), threading.get_ident()
    task, (driver, identity, device, threads, silence, command, folder, saved) = worker.get_current_task(), asked
    before, pool = _idle.pop(thread, (None, None))
    if before != asked or pool is None:
        if pool is not None:
            _end(pool)
        found = reuse.identity(device, jobs[0].recipe)
        unlike = [part for part in reuse.IDENTITY if found[part] != identity[part]]
        if words := ", ".join(f"{part} ({found[part]}, not {identity[part]})" for part in unlike):
            needed = "it needs the same bncli, torch and device, and data files of the same path, size and time"
            raise Refused(f"the Dask worker at {worker.address} has another {words}; {needed}", exit_code=UNAVAILABLE)
        logs = tempfile.mkdtemp(prefix="dask-", dir=folder if os.path.isdir(folder) else worker.local_directory)
        states = Path(saved) if saved and os.path.isdir(saved) else None
        # Dask has set it for its own process; training that allocates much would take a fifth longer.
        os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)
        pool = Processes(device, 1, threads, Path(logs), states, silence, command)
    _busy[thread] = asked, pool

    def cancelled() -> bool:  # also once the scheduler finds that the driver is gone
        return bool(worker.state.tasks[task].state == "cancelled")

    ended, said, done = list[Ended](), -math.inf, False
    try:
        for event in pool.run(Work(jobs), cancelled):
            if isinstance(event, Ended):
                ended.append(event)
                if len(jobs) > 1:  # pickled here, as Dask would make tuples of lists
                    worker.log_event(driver, {"task": task, "ended": pickle.dumps([event])})
            elif isinstance(event, RunProgressed) and monotonic() - said > TELL_S:
                said, progress = monotonic(), {"step": event.step, "value": event.value, "below": event.below}
                worker.log_event(driver, {"task": task, **progress})
        done = not cancelled()
    except BncliError as error:
        value = None if error.value is None else str(error.value)
        mistakes = [f"{each} (on the Dask worker at {worker.address})" for each in error.mistakes]
        raise Refused(*mistakes, exit_code=error.exit_code, field=error.field, value=value) from None
    finally:
        if done:
            _idle[thread] = _busy.pop(thread)
        else:
            _end(_busy.pop(thread)[1])
    return ended


def give_up(driver: str, keys: list[str]) -> None:
    """Give up those of a driver's runs that are in progress on this Dask worker."""
    for asked, pool in [*_busy.values()]:
        if asked[0] == driver:
            pool.give_up(keys)


def end_processes(driver: str) -> None:
    """End the processes that wait for a driver's next task on this Dask worker."""
    for thread in [thread for thread, (asked, _) in [*_idle.items()] if asked[0] == driver]:
        _end(_idle.pop(thread)[1])


def _end(pool: Processes) -> None:
    pool.close()
    with contextlib.suppress(OSError):  # its logs are kept
        pool.folder.rmdir()
