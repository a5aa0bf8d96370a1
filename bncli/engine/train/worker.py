"""Worker process that serves many training runs: `python -m bncli.engine.train.worker --device cpu --threads 1`.

One JSON object per line. In: {"runs": [{"key", "recipe", "checkpoint"}], "check", "together"}: one run, or several that
train together; a check is of the first step alone, and a checkpoint is the file to go on from and to save in; {"give
up": keys}: end those of the runs in progress; {"stop"}: save the run in progress and end it. Out: {"hello"} once, then
{"key", "step", "value", "below"} while runs make steps, with the steps that each was below its target, and {"key",
"result", "code"}, {"key", "failure"} or {"key", "stopped"} for each run, with the files of the user that the process
loaded; {"refused": mistakes, "field", "value", "exit_code"} when no run can succeed (data or a device that are absent).
The process exits when standard input ends, so that it does not outlive its parent.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

from bncli.engine.memory import keep_freed_memory
from bncli.errors import BncliError, DataError, Unavailable
from bncli.results.train import Event
from bncli.storage import read_plain, replace

REPORT_EVERY_S = 0.25


def main(arguments: list[str]) -> int:
    """Serve runs until standard input ends."""
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    keep_freed_memory()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # so that output of a user's model does not enter the protocol
    orders = Orders()
    # sys.stdin is not used: a forked data loader would wait forever for the lock that its reader holds.
    source = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=orders.listen, args=(source,), daemon=True).start()
    try:
        memory = int(options["--memory"]) if "--memory" in options else None
        serve(orders, out, options["--device"], int(options["--threads"]), memory)
    except BncliError as error:
        value = None if error.value is None else str(error.value)
        _say(out, refused=error.mistakes, exit_code=error.exit_code, field=error.field, value=value)
    return 0


@dataclass
class Orders:
    """What the parent has asked for: runs, the end of those in progress, and keys of runs to be given up."""

    runs: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)
    stopping: threading.Event = field(default_factory=threading.Event)
    given_up: set[str] = field(default_factory=set)

    def listen(self, source: int) -> None:
        """Read orders until there are no more, then end the process."""
        rest = b""
        while read := os.read(source, 65536):
            *lines, rest = (rest + read).split(b"\n")
            for line in lines:
                order = json.loads(line)
                if "stop" in order:
                    self.stopping.set()
                elif "give up" in order:
                    self.given_up.update(order["give up"])
                else:
                    self.runs.put(order)
        os._exit(0)


def serve(orders: Orders, out: TextIO, device_name: str, threads: int, memory: int | None = None) -> None:
    """Serve runs forever. Raises BncliError for errors that would make every run fail.

    memory: the descriptor of the file in memory through which workers on a CPU share their data.
    """
    gc.disable()  # imports create no garbage, and collection takes an eighth of the import of torch
    import torch

    from bncli.engine import data
    from bncli.engine.data.splits import Dataset
    from bncli.engine.device import resolve
    from bncli.engine.target import StepsToTarget
    from bncli.engine.train import train, train_together, trial
    from bncli.engine.user_code import LoadedFiles
    from bncli.recipe.sections import OwnModel, Recipe
    from bncli.results.serialize import to_plain
    from bncli.results.train import Evaluated, RunFinished, RunStarted, StepDone, Target

    gc.freeze()
    gc.enable()
    torch.set_num_threads(threads)
    device = resolve(device_name)
    _say(out, hello=device.type, gpus=torch.cuda.device_count() if device.type == "cuda" else 0)
    loaded: dict[str, Dataset] = {}
    user_files = LoadedFiles()

    def dataset(recipe: Recipe) -> Dataset:
        source = recipe.data.model_dump_json() + recipe.train.memory_format
        if source not in loaded:
            loaded.clear()  # before the next is read
            loaded[source] = data.load(recipe.data, device, data.MEMORY_FORMATS[recipe.train.memory_format], memory)
        return loaded[source]

    def do(runs: list[dict[str, Any]], check: bool, together: bool) -> None:
        """Train some runs, and say how each of them ended; those of a batch that raises are tried one by one."""
        keys, recipes = [run["key"] for run in runs], [Recipe.model_validate(run["recipe"]) for run in runs]
        gc.collect()  # the last run's model may be in a reference cycle
        first = recipes[0]
        asked = first.train.target
        target = Target(asked.metric, asked.value) if asked else Target("accuracy", 1.0)
        counts = {key: StepsToTarget(target) for key in keys}  # of runs that have not ended
        progress = _Progress(out, keys[0], orders.stopping)
        given_up = lambda: [index for index, key in enumerate(keys) if key in orders.given_up]  # noqa: E731
        settings: dict[str, Any] = {"dataset": dataset(first), "threads": threads}
        try:
            if together:
                events = train_together(recipes, device_name, **settings, stop=progress, leave=given_up)
            else:
                file, stop = runs[0]["checkpoint"], lambda: progress() or bool(given_up())
                begin = partial(trial if check else partial(train, stop=stop), first, device_name, **settings)
                events = ((0, event) for event in (_continued(begin, Path(file)) if file else begin()))
            for index, event in events:
                key = keys[index]
                if isinstance(event, RunStarted | RunFinished):  # a forward pass may import as well
                    user_files.note()
                if isinstance(event, StepDone):
                    progress(step=event.step)
                elif isinstance(event, Evaluated):
                    counts[key].add(event.evaluation)
                    below = {each: count.below for each, count in counts.items()}
                    progress(step=event.evaluation.step, value=event.evaluation.value(target.metric), below=below)
                elif isinstance(event, RunFinished):
                    del counts[key]
                    result = event.result
                    if result.status == "interrupted" and key in orders.given_up:
                        result = dataclasses.replace(result, status="given up")
                    if result.status == "interrupted" and not check:
                        _say(out, key=key, stopped=result.steps_run)
                    else:
                        code = user_files.files if isinstance(recipes[index].model, OwnModel) else {}
                        _say(out, key=key, result=to_plain(result), code=code)
            return
        except (DataError, Unavailable):
            raise
        except (Exception, SystemExit) as error:
            traceback.print_exc()  # into the worker's log; only the reason goes into the report
            name = "" if isinstance(error, BncliError) else f"{type(error).__name__}: "
            failure = name + " ".join((str(error) or "no message").split())
        if len(runs) == 1:
            _say(out, key=keys[0], failure=failure)
            return
        for run in runs:  # not in the handler, whose error holds the memory of the batch
            if run["key"] in counts:
                do([run], check, together)

    while True:
        order = orders.runs.get()
        orders.given_up.difference_update(run["key"] for run in order["runs"])
        do(order["runs"], order["check"], order["together"])


def _continued(begin: Callable[..., Iterator[Event]], file: Path) -> Iterator[Event]:
    """The events of a run from its checkpoint on; from its beginning where there is none, or none that fits."""
    begin = partial(begin, save={"checkpoint": partial(replace, file, read_back=True)})
    try:
        events = begin(checkpoint=read_plain(file))
        return itertools.chain([next(events)], events)  # before its first event, another run's is refused
    except FileNotFoundError:
        pass
    except (BncliError, OSError) as error:
        sys.stderr.write(f"{file}: {error}; the run begins again\n")
    return begin()


class _Progress:
    """Says how far a run is, at most every REPORT_EVERY_S. Called after every step; returns whether to stop."""

    def __init__(self, out: TextIO, key: str, stopping: threading.Event) -> None:
        self.out, self.stopping, self._said = out, stopping, 0.0
        self.message: dict[str, Any] = {"key": key, "step": 0, "value": None, "below": {}}

    def __call__(self, **seen: Any) -> bool:
        self.message |= seen
        if monotonic() - self._said > REPORT_EVERY_S:
            self._said = monotonic()
            _say(self.out, **self.message)
        return self.stopping.is_set()


def _say(out: TextIO, **message: Any) -> None:
    out.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
