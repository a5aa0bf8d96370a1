"""Checkpoints: the whole state of a run as bytes that hold no code, and whether one is of a given run."""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import bncli
from bncli.engine.data.splits import Dataset
from bncli.engine.train.state import TrainState
from bncli.engine.train.weights import packed_weights
from bncli.engine.user_code import LoadedFiles, digest_of
from bncli.errors import FileError, UsageError
from bncli.recipe.load import plain, what_is_trained
from bncli.recipe.overrides import leaves
from bncli.recipe.sections import Cosine, OwnModel, Recipe
from bncli.recipe.yaml import dotted
from bncli.results.train import Status

FIRST_LINE = "bncli checkpoint 1 sha256 {}\n"  # then what torch.save writes, whose SHA-256 it is
CONTENTS = {"state": dict, "recipe": dict, "bncli": str, "torch": str, "device": str, "threads": int, "code": dict}


def packed(contents: Mapping[str, Any]) -> bytes:
    """Tensors, numbers and text as the content of a checkpoint."""
    file = io.BytesIO()
    start = file.write(FIRST_LINE.format("0" * 64).encode())
    torch.save(dict(contents), file)
    digest = hashlib.sha256(file.getbuffer()[start:]).hexdigest()
    file.seek(0)
    file.write(FIRST_LINE.format(digest).encode())
    return file.getvalue()


def unpacked(content: bytes) -> dict[str, Any]:
    """The contents of a checkpoint. Raises FileError for any other content; nothing in it is run."""
    first, body = FIRST_LINE.format("0" * 64), memoryview(content)[len(FIRST_LINE) - 2 + 64 :]
    line = bytes(content[: len(first)])
    if not re.fullmatch(FIRST_LINE.format("[0-9a-f]{64}").encode(), line):
        raise FileError("is no checkpoint that this version of bncli can read", field="resume")
    if line != FIRST_LINE.format(hashlib.sha256(body).hexdigest()).encode():
        raise FileError("the checkpoint is damaged: its contents do not have its digest", field="resume")
    try:
        if any(entry.compress_type for entry in zipfile.ZipFile(io.BytesIO(body)).infolist()):
            raise ValueError("it is compressed, which no checkpoint is")
        saved: dict[str, Any] = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
        wrong = [name for name, kind in CONTENTS.items() if not isinstance(saved[name], kind)]
        if wrong or not 0 < saved["threads"] < 2**12:
            raise ValueError(f"{', '.join(wrong or ['threads'])} is of another kind")
    except Exception as error:  # what torch raises for contents that hold more than plain data is of many kinds
        why = " ".join(str(error).split())[:200]
        raise FileError(f"holds something else than a run's state: {why}", field="resume") from error
    return saved


def restore(state: TrainState, saved: Mapping[str, Any]) -> None:
    """Raises FileError where the saved state is not of the state's model, optimizer and so on."""
    try:
        state.load_state_dict(saved["state"])
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise FileError(
            f"does not hold the state of this run: {type(error).__name__}: {why}", field="resume"
        ) from error


# --- which run it is of ---------------------------------------------------------------------------------------------


def origin(recipe: Recipe, dataset: Dataset, device: torch.device) -> dict[str, Any]:
    """What a run depends on, as plain data. data: the digest of the examples' labels, in their order."""
    labels = [split.labels.cpu().numpy().tobytes() for split in (dataset.train, dataset.held_out)]
    return {
        "recipe": plain(recipe),
        "bncli": bncli.__version__,
        "torch": str(torch.__version__),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "data": hashlib.sha256(b"|".join(labels)).hexdigest(),
    }


def check_belongs(
    saved: Mapping[str, Any], recipe: Recipe, dataset: Dataset, device: torch.device, threads: int | None
) -> None:
    """Raises UsageError, which names all that differs, for a checkpoint of another run."""
    now = origin(recipe, dataset, device) | {"threads": threads or saved["threads"]}
    mistakes = list(_other_fields(saved, recipe))
    for name in ("bncli", "torch", "device", "threads"):
        if saved[name] != now[name]:
            mistakes.append(f"{name} was {saved[name]} when the run began, and is {now[name]} now")
    if saved.get("data") != now["data"]:
        mistakes.append("the data are others: their examples' labels have changed")
    for file, digest in saved["code"].items():
        if digest_of(file) != digest:
            mistakes.append(f"{file}, which the run has loaded, has changed or is not there")
    if mistakes:
        raise UsageError(*mistakes, field="resume")


def _other_fields(saved: Mapping[str, Any], recipe: Recipe) -> Iterator[str]:
    """The fields of the recipe that are not those of the run. train.steps may differ: nothing before depends on it."""
    began = Recipe.model_validate(saved["recipe"])
    old, new = (dict(leaves(what_is_trained(each))) for each in (began, recipe))
    steps = ("train", "steps")
    for keys in [*old, *(keys for keys in new if keys not in old)]:
        if old.get(keys) != new.get(keys) and (keys != steps or isinstance(recipe.schedule, Cosine)):
            why = ", over which the learning rate of a cosine schedule is spread" if keys == steps else ""
            then, now = (tree.get(keys, "not there") for tree in (old, new))
            yield f"{dotted(keys)} was {then} when the run began, and is {now} now{why}"
    if recipe.train.steps < saved["state"]["step"]:
        yield f"train.steps is {recipe.train.steps}, and {saved['state']['step']} steps are done"


# --- saving ---------------------------------------------------------------------------------------------------------


class Saving:
    """What is saved of a run, by whom (see `train`); its time is not the training's."""

    def __init__(self, state: TrainState, save: Mapping[str, Callable[[bytes], None]], code: LoadedFiles) -> None:
        recipe, self.state, self.save, self.code = state.recipe, state, dict(save), code
        if isinstance(recipe.model, OwnModel):
            code.note(recipe.model.module)
        self.keep = recipe.train.keep
        state.keeps_best = self.keep != "last" and not save.keys().isdisjoint(("model", "best"))
        self.origin = origin(recipe, state.dataset, state.device)
        extras = {name: each for name, each in state.model.state_dict().items() if not isinstance(each, Tensor)}
        try:
            if extras and "checkpoint" in save:
                unpacked(packed({"state": extras, **self.origin, "code": {}}))
        except Exception:
            del self.save["checkpoint"]
            warnings.warn(f"no checkpoint is saved: of the model, {', '.join(extras)} is no plain data", stacklevel=2)
        asked = recipe.train.checkpoint if "checkpoint" in self.save else None
        self.every, self.seconds = (asked and asked.every), ((asked and asked.seconds) or math.inf)
        self.last_step, self.last_time = state.step, perf_counter()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after that step."""
        if step == self.last_step:  # again, after a step that the fp16 scaler skipped
            return False
        return not step % self.every if self.every else perf_counter() - self.last_time >= self.seconds

    def checkpoint(self) -> None:
        state = self.state
        state.clock.pause(state.step)
        state.memory.end(state.phase)
        began = perf_counter()
        if isinstance(state.recipe.model, OwnModel):
            self.code.note()  # a forward pass may import as well
        contents = {"state": state.state_dict(), **self.origin, "code": dict(self.code.files)}
        self.save["checkpoint"](packed(contents))
        self.last_step, self.last_time = state.step, perf_counter()
        state.checkpoint_s += self.last_time - began
        state.memory.end("saving")

    def end(self, status: Status) -> None:
        """Save what is saved at the end of a run."""
        if "checkpoint" in self.save:
            self.checkpoint()
        began = perf_counter()
        if status != "interrupted":
            if "model" in self.save:
                self.save["model"](packed_weights(self.state, best=self.keep == "best"))
            if "best" in self.save and self.keep == "both":
                self.save["best"](packed_weights(self.state, best=True))
        self.state.checkpoint_s += perf_counter() - began
