"""Trained weights as safetensors files, which hold no code: saved, loaded, evaluated, and started from."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bncli
from bncli.engine import data
from bncli.engine.device import cpu_threads, deterministic, resolve, tf32_allowed
from bncli.engine.models import blame_own_model, build
from bncli.engine.models.init import global_generators, restore_global_generators
from bncli.engine.train.evaluation import measured
from bncli.engine.train.state import TrainState, can_hold, copies
from bncli.errors import CODE_OF_YOURS, FileError, UsageError
from bncli.recipe.layers import Norm, contradictions, layers, shape_contradictions, size, walk
from bncli.recipe.load import plain
from bncli.recipe.sections import Init, OwnModel, Recipe
from bncli.recipe.yaml import dotted
from bncli.results.serialize import from_plain, to_plain
from bncli.results.train import Evaluation
from bncli.storage import read_plain

MODEL = "model.safetensors"
VERSION = 1


@dataclass(frozen=True)
class About:
    """What a file says about its weights: its metadata, each value in JSON."""

    recipe: dict[str, Any]
    metrics: Evaluation | None  # of these weights; None where the run ended between two evaluations
    shape: tuple[int, ...]  # of an example
    classes: int
    threads: int  # of the CPU
    bncli: str
    version: int


def packed_weights(state: TrainState, best: bool) -> bytes:
    """The state's weights, or those at its best evaluation, as a safetensors file with what belongs to them."""
    import safetensors.torch  # which most runs of a comparison can do without

    [run] = state.runs
    last, metrics = run.evaluations[-1], run.best_evaluation
    if best and state.best and metrics and state.best[0] == metrics.step:
        weights = state.best[1]
    else:
        if best and metrics and metrics.step != state.step:
            why = "train.keep was last then"
            text = f"the weights after step {metrics.step}, the best, were not kept, as {why}; step {state.step} is"
            warnings.warn(text, stacklevel=2)
        metrics = last if last.step == state.step else None
        weights = copies(state.model.state_dict()) | (state.population if metrics else {})
    if left_out := [name for name in state.model.state_dict() if name not in weights]:
        warnings.warn(f"a file of weights cannot hold {', '.join(left_out)}, which it leaves out", stacklevel=2)
    shape, classes, threads = state.dataset.shape, state.dataset.classes, torch.get_num_threads()
    about = to_plain(About(plain(state.recipe), metrics, shape, classes, threads, bncli.__version__, VERSION))
    return safetensors.torch.save(weights, {"format": "pt"} | {name: json.dumps(about[name]) for name in about})


def read(path: Path) -> tuple[bytes, str]:
    """The content of a file of weights, given itself or as its run's folder, and its path. Raises FileError."""
    file = path / MODEL if path.is_dir() else path
    if file is not path and not os.path.lexists(file):
        raise FileError(f"{path}: has no {MODEL}, which a run saves at its end; continue it, or name a file")
    try:
        return read_plain(file, follow=file is path), str(file)
    except (OSError, ValueError) as error:
        raise FileError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def tensors_of(content: bytes, file: str = "the file") -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FileError, which names the file, for another one."""
    import safetensors.torch

    try:
        return safetensors.torch.load(content)
    except Exception as error:  # of the format's own kind, or for a type that torch does not have
        why = " ".join(str(error).split())[:200]
        raise FileError(f"{file}: is damaged, or no safetensors file: {why}") from error


def unpacked_weights(
    content: bytes, allow_code: bool = False, file: str = "the file"
) -> tuple[dict[str, Tensor], Recipe, About]:
    """What a run saved. Raises FileError for another file, UsageError for a model of the user's unless `allow_code`."""
    tensors = tensors_of(content, file)
    said = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
    if json.dumps(VERSION) != said.pop("version", None):
        raise FileError(f"{file}: no run of this version of bncli saved it; it holds tensors alone")
    try:
        values = {name: json.loads(text) for name, text in said.items() if name != "format"}
        about = from_plain(About, values | {"version": VERSION})
        recipe = Recipe.model_validate(about.recipe)
        if not all(0 < number < 2**31 for number in (*about.shape, about.classes)) or not 0 < about.threads < 2**12:
            raise ValueError("a size is out of range")
        wrong = [*contradictions(recipe), *shape_contradictions(recipe, about.shape, about.classes)]
        if wrong:
            raise ValueError(f"{dotted(wrong[0][0])}: {wrong[0][1]}")
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise FileError(f"{file}: what it says about its weights is wrong: {why}") from error
    if isinstance(recipe.model, OwnModel) and not allow_code:
        raise UsageError(f"{file}: its model is {recipe.model.module}, {CODE_OF_YOURS}", permission="allow_code")
    if planned := layers(recipe, about.shape, about.classes):  # before anything of that size is made
        channels = sum(layer.channels for layer, _, _ in walk(planned, about.shape) if isinstance(layer, Norm))
        needs = size(planned, about.shape)[0].parameters + channels * getattr(recipe.norm, "group_size", 0)
        if needs > (has := sum(tensor.numel() for tensor in tensors.values())):
            raise FileError(f"{file}: holds {has:,} numbers, and the model of its recipe needs {needs:,}")
        # They are replaced, so they need neither data nor time.
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": Init()})})
    return tensors, recipe, about


def put(weights: Mapping[str, Tensor], model: nn.Module, file: str | None = None) -> None:
    """Load a state_dict whole. For one of another model it raises FileError, about that file, or UsageError."""
    held = model.state_dict()
    wanted = {name: tuple(each.shape) for name, each in held.items() if can_hold(each)}
    shapes = {name: tuple(each.shape) for name, each in weights.items()}
    found = {
        "not there": [name for name in wanted if name not in shapes],
        "not of this model": sorted(name for name in shapes if name not in held),
        "of another shape": [
            f"{k} {shapes[k]} for {wanted[k]}" for k in wanted if shapes.get(k, wanted[k]) != wanted[k]
        ],
    }
    mistakes = []
    for what, names in ((what, names) for what, names in found.items() if names):
        count = f"{len(names)} of its tensors {'is' if len(names) == 1 else 'are'}"
        mistakes.append(f"{count} {what}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}")
    if mistakes and file:
        raise FileError(*(f"{file}: {mistake}" for mistake in mistakes))
    if mistakes:
        raise UsageError(*mistakes, field="from_weights")
    model.load_state_dict(weights, strict=False)


def load_model(path: str | Path, allow_code: bool = False, device: str = "cpu") -> nn.Module:
    """The trained model of a run, in evaluation mode.

    Its inputs must be normalized as the recipe's data.normalize says. unit: pixels as bytes divided by 255 (digits: by
    16), other numbers as they are. standard: less the mean and divided by the deviation of the training examples, of
    each channel for images, of each feature for vectors.

    Args:
        path: the folder of a run of `bncli train`, or one of its .safetensors files.
        allow_code: run a model of the user's own, which the file names.
        device: auto, cpu, cuda, cuda:N or mps.

    Returns:
        A module from (N, *shape), float32, to (N, classes) logits.

    Raises:
        FileError: for a file that is missing, damaged, not of a run, or does not fit its model.
        UsageError: for a model of the user's own, without `allow_code` or if it cannot be built.
        Unavailable: for a device or a kernel that cannot run here.
    """
    on, (content, file) = resolve(device), read(Path(path))
    tensors, recipe, about = unpacked_weights(content, allow_code, file)
    before = global_generators(torch.device("cpu"))
    try:
        model = build(recipe, about.shape, about.classes, device=on)
    finally:
        restore_global_generators(before, torch.device("cpu"))
    put(tensors, model, file)
    return model.to(on).eval()


def evaluate_weights(path: Path, device: str, threads: int | None = None, allow_code: bool = False) -> Evaluation:
    """Evaluate a file of weights on the held-out data of its recipe: all digits are the run's, on the same machine.

    Arguments and errors are those of `load_model` and `train`; threads: None for the run's.
    """
    on, (content, file) = resolve(device), read(path)
    tensors, recipe, about = unpacked_weights(content, allow_code, file)
    options = recipe.train
    with (
        deterministic(options.deterministic and on.type == "cuda"),
        blame_own_model(recipe),
        tf32_allowed(options.tf32),
        cpu_threads(threads or about.threads),
    ):
        dataset = data.load(recipe.data, on, data.MEMORY_FORMATS[options.memory_format])
        state = TrainState(recipe, dataset, on)
        put(tensors, state.model, file)
        state.step = about.metrics.step if about.metrics else 0
        [found], before = measured(state), about.metrics
    if before and not abs(found.accuracy - before.accuracy) < 0.01:  # more than rounding on another machine
        text = f"{file}: the accuracy was {before.accuracy:.4f} in training; the weights or the data have changed since"
        warnings.warn(text, stacklevel=2)
    return found
