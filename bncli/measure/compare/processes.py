"""Worker processes of a comparison: each serves many runs, some together; after a crash the worker is restarted."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from bncli.errors import BncliError, Refused
from bncli.measure.compare.plan import Job
from bncli.measure.compare.run import Ended, Started
from bncli.measure.compare.work import Work
from bncli.recipe.load import plain
from bncli.results.compare import RunProgressed

POLL_S = 0.1
GRACE_S = 20.0  # to save the runs in progress, once they are told to stop
MOST_IDLE_DEATHS = 10  # of workers without a run, one after another, before it is given up
# Without the current folder on the path, which -m and -c put there: a torch.py in it must not be run.
WORKER = "import sys; sys.path.remove(''); from bncli.engine.train.worker import main; sys.exit(main(sys.argv[1:]))"


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[str]
    log: Path
    ready: bool = False
    jobs: dict[str, Job] = field(default_factory=dict)  # key -> run in progress
    logged: int = 0  # bytes of the log before those runs
    silent_s: float = 0.0  # since its last message
    hanging: str = ""  # why it was killed


@dataclass
class Processes:
    """Executor of up to `jobs` workers on one device; None: one per core, or one per GPU where the device is CUDA."""

    device: str
    jobs: int | None
    threads: int
    folder: Path = Path()  # for the workers' logs
    checkpoints: Path | None = None  # folder for the states of runs whose recipes have train.checkpoint
    longest_silence_s: float | None = None  # between two messages of a worker; then its run is ended
    command: Sequence[str] = (sys.executable, "-c", WORKER)
    _messages: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = field(default_factory=queue.Queue)
    _workers: list[_Worker] = field(default_factory=list)
    _gpus: int = 0
    limit: int = 1  # workers, until the first has said which device it found
    _greeted: bool = False
    _idle_deaths: int = 0
    _looked: float = 0.0  # when the workers' silence was last counted
    _memory: int | None = None  # descriptor of the file in memory that holds the workers' data once

    def run(self, work: Work, stop: Callable[[], bool]) -> Iterator[Started | RunProgressed | Ended | None]:
        """As `Executor.run`; the workers stay until `close`. Raises Refused when no worker can take any run."""
        if not self._greeted:
            self.limit = (self.jobs or cores()) if self.device == "cpu" else 1
        while not stop():
            if not work.more and not any(worker.jobs for worker in self._workers):
                return
            yield from self._hand_outs(work)
            idle = sum(not worker.jobs for worker in self._workers)
            for _ in range(min(self.limit - len(self._workers), len(work.waiting) - idle)):
                self._start()
            event = self._next_event(work)
            yield from self._hand_outs(work)  # so that a worker goes on while the caller saves what it did
            yield event
        saving = [worker for worker in self._workers if any(map(self._checkpoint, worker.jobs.values()))]
        for worker in saving:
            self._send(worker, {"stop": True})
        end = monotonic() + GRACE_S
        while any(worker.jobs for worker in saving) and monotonic() < end:
            yield self._next_event(work)

    def _start(self) -> None:
        number = next(n for n in range(len(self._workers) + 1) if n not in {w.number for w in self._workers})
        environment = dict(os.environ, OMP_NUM_THREADS=str(self.threads), MKL_NUM_THREADS=str(self.threads))
        if self._gpus > 1 and ":" not in self.device:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            gpu = number % self._gpus
            environment["CUDA_VISIBLE_DEVICES"] = visible[gpu] if len(visible) == self._gpus else str(gpu)
        # A name that no file has yet: logs of earlier workers are kept, and other calls may write here too.
        for count in itertools.count():
            log = self.folder / f"worker-{number}{f'-{count}' if count else ''}.log"
            with contextlib.suppress(FileExistsError):
                stderr = log.open("x")
                break
        if self._memory is None and hasattr(os, "memfd_create"):  # Linux; elsewhere each worker loads its own data
            self._memory = os.memfd_create("bncli-data")
        shared = () if self._memory is None else ("--memory", str(self._memory))
        with stderr:
            process = subprocess.Popen(
                [*self.command, "--device", self.device, "--threads", str(self.threads), *shared],
                pass_fds=() if self._memory is None else (self._memory,),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                bufsize=1,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the driver, which then ends its workers itself
            )
        worker = _Worker(number, process, log)
        self._workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()

    def _listen(self, worker: _Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            try:
                self._messages.put((worker, json.loads(line)))
            except json.JSONDecodeError:  # a line cut short by the worker's death; the end of the stream says so
                break
        self._messages.put((worker, None))

    def _hand_outs(self, work: Work) -> Iterator[Started]:
        for worker in [worker for worker in self._workers if worker.ready and not worker.jobs]:
            if jobs := work.take(self.limit):
                worker.logged, worker.silent_s = worker.log.stat().st_size, 0.0
                runs = [
                    {"key": job.key, "recipe": plain(job.recipe), "checkpoint": self._checkpoint(job)} for job in jobs
                ]
                if self._send(worker, {"runs": runs, "check": jobs[0].check, "together": bool(jobs[0].company)}):
                    worker.jobs = {job.key: job for job in jobs}
                    yield from (Started(worker.number, job) for job in jobs)
                else:
                    work.put_back(jobs)

    def give_up(self, keys: Collection[str]) -> None:
        """As `Executor.give_up`."""
        for worker in self._workers:
            if given_up := [key for key in worker.jobs if key in keys]:
                self._send(worker, {"give up": given_up})

    def _checkpoint(self, job: Job) -> str | None:
        """The file for a run's state, where it is to be saved."""
        if self.checkpoints is None or job.check or job.recipe.train.checkpoint is None:
            return None
        return str(self.checkpoints.absolute() / f"{job.key}.pt")

    def _send(self, worker: _Worker, order: dict[str, Any]) -> bool:
        assert worker.process.stdin is not None
        try:
            worker.process.stdin.write(json.dumps(order) + "\n")
            worker.process.stdin.flush()
        except OSError:
            return False  # it has just died; the end of its stream will be read next
        return True

    def _next_event(self, work: Work) -> RunProgressed | Ended | None:
        self._end_hanging()
        try:
            worker, message = self._messages.get(timeout=POLL_S)
        except queue.Empty:
            return None
        worker.silent_s = 0.0
        if worker not in self._workers:  # it was closed
            return None
        if message is None:
            return self._died(worker, work)
        if "refused" in message:
            raise Refused(*message.pop("refused"), **message)
        if "hello" in message:
            worker.ready = True
            if not self._greeted:  # a later worker sees its own GPU only
                self._greeted = True
                named = ":" in self.device or message["hello"] == "mps"
                self._gpus = 0 if named else message["gpus"]
                self.limit = self.jobs or self._gpus or (1 if named else cores())
            return None
        if "step" in message:
            return RunProgressed(worker.number, message["step"], message["value"], message.get("below", {}))
        job = worker.jobs.pop(message["key"])
        self._idle_deaths = 0
        if "stopped" in message:
            return None
        result, failure, code = message.get("result"), message.get("failure"), message.get("code", {})
        return Ended(worker.number, job, result, failure, code, self.limit)

    def _end_hanging(self) -> None:
        """Kill the workers that were silent for too long; time in which this process did not look does not count."""
        longest, before, self._looked = self.longest_silence_s or math.inf, self._looked, monotonic()
        for worker in [worker for worker in self._workers if worker.jobs and not worker.hanging]:
            worker.silent_s += min(self._looked - before, POLL_S)
            if worker.silent_s > longest:
                worker.ready = False  # gets no other run, should this one have ended just now
                worker.hanging = f"it made no progress for {longest:g} s, the limit given, and was ended"
                _kill(worker)

    def _died(self, worker: _Worker, work: Work) -> Ended | None:
        code = worker.process.wait()
        self._workers.remove(worker)
        self._idle_deaths += not worker.jobs
        if not self._greeted or self._idle_deaths > MOST_IDLE_DEATHS:
            raise BncliError(
                f"a worker process could not start (exit {code}); its log, {worker.log}, ends:\n{_tail(worker.log)}"
            )
        if len(worker.jobs) != 1:
            work.put_back(list(worker.jobs.values()), one_by_one=True)
            return None
        last = _tail(worker.log, 1, worker.logged)
        failure = (worker.hanging or _cause(code)) + (f"; its log ends: {last}" if last else "")
        (job,) = worker.jobs.values()
        return Ended(worker.number, job, None, failure, at_a_time=self.limit)

    def close(self) -> None:
        """End every worker now; a run in progress is lost."""
        for worker in self._workers:
            _kill(worker)
        for worker in self._workers:
            worker.process.wait()
            if not worker.log.stat().st_size:
                worker.log.unlink()
        self._workers.clear()
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None


def _kill(worker: _Worker) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(worker.process.pid, signal.SIGKILL)  # it leads its session: what it started goes with it


def cores() -> int:
    """Physical cores, or the logical ones that this process may use where those are fewer.

    Two runs on the hyperthreads of one core wait for each other's arithmetic.
    """
    import psutil  # not loaded where --help or a usage error is all that is asked for

    process = psutil.Process()
    # macOS has no affinity.
    allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()
    known = [count for count in (allowed, psutil.cpu_count(logical=False)) if count]
    return min(known, default=1)


def _cause(code: int) -> str:
    if code >= 0:
        return f"its worker process exited with {code}"
    name = signal.Signals(-code).name
    hint = ", perhaps for lack of memory" if name == "SIGKILL" else ""
    return f"its worker process was killed by {name}{hint}"


def _tail(log: Path, lines: int = 12, start: int = 0) -> str:
    return "\n".join(log.read_bytes()[start:].decode(errors="replace").strip().splitlines()[-lines:])
