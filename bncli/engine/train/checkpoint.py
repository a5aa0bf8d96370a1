"""Checkpoints: the whole state of a run as bytes that hold no code, and whether one is of a given run."""

from __future__ import annotations

import hashlib
import io
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import bncli
from bncli.engine.data.splits import Dataset, InMemory
from bncli.engine.train.optim import optimizer
from bncli.engine.train.state import TrainState
from bncli.engine.train.weights import packed_weights
from bncli.engine.user_code import LoadedFiles, digest_of
from bncli.errors import FileError, UsageError
from bncli.recipe.load import what_is_trained
from bncli.recipe.overrides import leaves
from bncli.recipe.sections import OwnModel, Recipe
from bncli.recipe.yaml import dotted

FORMAT = b"bncli checkpoint 1 sha256 "  # the first line; then what torch.save writes, whose SHA-256 it names
START = len(FORMAT) + 65


def packed(contents: dict[str, Any]) -> bytes:
    """Tensors, numbers and text as the content of a checkpoint."""
    file = io.BytesIO()
    file.write(bytes(START))
    torch.save(contents, file)
    line = _first_line(file.getbuffer()[START:])
    file.seek(0)
    file.write(line)
    return file.getvalue()


def _first_line(body: memoryview) -> bytes:
    return FORMAT + hashlib.sha256(body).hexdigest().encode() + b"\n"


def unpacked(content: bytes) -> dict[str, Any]:
    """The contents of a checkpoint. Raises FileError for anything else; nothing in it is run."""
    body = memoryview(content)[START:]
    if not content.startswith(FORMAT):
        raise FileError("is no checkpoint that this version of bncli can read", field="resume")
    if content[:START] != _first_line(body):
        raise FileError("the checkpoint is damaged: its contents do not have the digest that it names", field="resume")
    try:
        if any(entry.compress_type for entry in zipfile.ZipFile(io.BytesIO(body)).infolist()):
            raise ValueError("it is compressed, and could be of any size")
        saved: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        if [type(saved[part]) for part in ("state", "origin", "code")] != [dict] * 3:
            raise ValueError("parts are missing")
        if not 0 < saved["origin"]["threads"] < 2**12 or saved["state"]["step"] < 0:
            raise ValueError("a number is out of range")
    except Exception as error:  # torch raises many kinds
        raise FileError(f"holds something else than a run's state: {_brief(error)}", field="resume") from error
    return saved


def restore(state: TrainState, saved: dict[str, Any]) -> None:
    """Raises FileError for a saved state that the run's model, optimizer and so on cannot take."""
    try:
        if wrong := next(_other_kinds(saved["state"], state.state_dict(), "state"), None):
            raise TypeError(f"{wrong} is of another kind")
        example = torch.nn.Linear(1, 1)  # shows what an update by this optimizer leaves of a weight
        example.weight.grad, updater = torch.zeros(1, 1), optimizer(state.recipe, example)
        updater.step()
        state.load_state_dict(saved["state"])
        best = state.best[1] if state.best else {}
        held, mine = {**state.model.state_dict(), **state.population, **best}, state.model.state_dict()
        shapes = [{name: getattr(each, "shape", None) for name, each in one.items()} for one in (held, mine)]
        if shapes[0] != shapes[1]:
            raise ValueError("the weights at the best evaluation, or the statistics, are of another model")
        for weight, kept in state.optimizer.state.items():
            left = updater.state[example.weight].items()
            right = {name: each is not None and (weight.shape if each.dim() else each.shape) for name, each in left}
            counts = [each for each in kept.values() if each is not None and not each.dim() and weight.dim()]
            found = {name: each is not None and each.shape for name, each in kept.items()}
            if (kept and found != right) or not all(0 <= each <= state.step for each in counts):
                raise ValueError("the optimizer's state is not of its weights")
    except Exception as error:
        raise FileError(f"does not hold a state of this run: {_brief(error)}", field="resume") from error


def _other_kinds(saved: Any, own: Any, place: str) -> Iterator[str]:
    """Where a saved state holds other types than the state of a run that begins, whose None may become anything."""
    if own is not None and type(saved) is not type(own) and not {type(saved), type(own)} <= {int, float}:
        yield place
    elif isinstance(own, dict):
        for name, mine in own.items():  # of which none may be missing
            yield from _other_kinds(saved.get(name, ...), mine, f"{place}.{name}")
    elif isinstance(own, list | tuple):
        for index, (each, mine) in enumerate(zip(saved, own, strict=False)):
            yield from _other_kinds(each, mine, f"{place}.{index}")


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def origin(recipe: Recipe, dataset: Dataset, device: torch.device, threads: int, ranks: int = 1) -> dict[str, Any]:
    """All that decides a run, as name and plain value: the recipe's fields, the data, the versions, the machine."""
    known = hashlib.sha256()  # all labels, and about a hundred examples of each split that is in memory
    for split in (dataset.train, dataset.held_out):
        some = split.x[:: len(split) // 100 + 1] if isinstance(split, InMemory) else split.labels
        for tensor in (split.labels, some):
            known.update(tensor.cpu().numpy().tobytes())
    return {dotted(keys): value for keys, value in leaves(what_is_trained(recipe))} | {
        "the digest of the data": known.hexdigest()[:20],
        "bncli": bncli.__version__,
        "torch": str(torch.__version__),
        "device": device.type,
        "threads": threads,
        "ranks": ranks,
    }


def check_belongs(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UsageError, which names all that differs, for a checkpoint of a run of another `origin`.

    What decides only how long it trains may differ, but for the steps over which a cosine schedule is spread, and the
    number of ranks, of which it warns.
    """
    then, step, steps = saved["origin"], saved["state"]["step"], "train.steps"
    may_differ = ["train.stop_at_target", "ranks", *[steps] * (now["schedule.kind"] != "cosine")]
    mistakes = [
        f"{name} was {then.get(name, 'absent')} when the run began, and is {now.get(name, 'absent')} now"
        + ", over which a cosine schedule is spread" * (name == steps)
        for name in then | now
        if repr(then.get(name)) != repr(now.get(name)) and name not in may_differ
    ]
    if now[steps] < step:
        mistakes.append(f"{steps} is {now[steps]}, and the run is at step {step}")
    changed = [file for file, digest in saved["code"].items() if digest_of(str(file)) != digest]
    mistakes += [f"{file}, which the run has loaded, has changed or is not there" for file in changed]
    if mistakes:
        raise UsageError(*mistakes, field="resume")
    if (before := then.get("ranks", 1)) != now["ranks"]:
        parts = "" if now.get("norm.sync", True) else ", and statistics are of other parts of a batch"
        text = f"the run began with {before} ranks and goes on with {now['ranks']}: its results differ a little{parts}"
        warnings.warn(text, stacklevel=2)


class Saving:
    """Saving of a run; `save` is as in `train`."""

    def __init__(self, state: TrainState, save: Mapping[str, Callable[[bytes], None]], code: LoadedFiles) -> None:
        recipe, self.state, self.save, self.code = state.recipe, state, dict(save), code
        if isinstance(recipe.model, OwnModel):
            code.note(recipe.model.module)
        self.origin = origin(recipe, state.dataset, state.device, torch.get_num_threads(), state.ranks.count)
        state.keeps_best = recipe.train.keep != "last" and not save.keys().isdisjoint(("model", "best"))
        held = dict(state.model.named_buffers()) | state.model.state_dict()
        extras = {name: each for name, each in held.items() if type(each) is not Tensor}
        try:
            if extras and "checkpoint" in save:
                unpacked(packed({"state": extras | {"step": 0}, "origin": self.origin, "code": {}}))
        except Exception:
            del self.save["checkpoint"]
            warnings.warn(f"no checkpoint is saved: the model's {', '.join(extras)} is not plain data", stacklevel=2)
        asked = recipe.train.checkpoint if "checkpoint" in self.save else None
        self.every, self.seconds = asked and asked.every, (asked and asked.seconds) or math.inf
        self.last_step, self.last_time = state.step, perf_counter()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after that step."""
        if step == self.last_step:  # again, as the fp16 scaler skipped the update
            return False
        return not step % self.every if self.every else perf_counter() - self.last_time >= self.seconds

    def checkpoint(self) -> None:
        """Save the state. Neither the time nor the memory is that of training."""
        state = self.state
        state.clock.pause(state.step)
        state.memory.end(state.phase)
        began = perf_counter()
        if isinstance(state.recipe.model, OwnModel):
            self.code.note()  # a forward pass may import as well
        self.save["checkpoint"](packed({"state": state.state_dict(), "origin": self.origin, "code": self.code.files}))
        self.last_step, self.last_time = state.step, perf_counter()
        state.checkpoint_s += self.last_time - began
        state.memory.end("saving")

    def end(self) -> None:
        """Save what is saved at the end of a run; its weights, unless it is to go on."""
        if "checkpoint" in self.save:
            self.checkpoint()
        state, keep = self.state, self.state.recipe.train.keep
        state.memory.end(state.phase)
        began = perf_counter()
        best_of = {"model": keep == "best"} | ({"best": True} if keep == "both" else {})
        for name, best in best_of.items():
            if name in self.save and state.runs[0].status != "interrupted":
                self.save[name](packed_weights(state, best))
        state.checkpoint_s += perf_counter() - began
        state.memory.end("saving")
