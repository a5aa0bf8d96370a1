"""Trained weights as safetensors files, which hold no code: saved, loaded, evaluated, and started from."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor, nn

import bncli
from bncli.engine import data
from bncli.engine.device import cpu_threads, deterministic, resolve, tf32_allowed
from bncli.engine.models import blame_own_model, build
from bncli.engine.models.init import global_generators, restore_global_generators
from bncli.engine.train.evaluation import measured
from bncli.engine.train.state import TrainState, check_fit, copies
from bncli.errors import CODE_OF_YOURS, FileError, UsageError
from bncli.recipe.layers import Norm, contradictions, layers, shape_contradictions, size, walk
from bncli.recipe.sections import Init, OwnModel, Recipe
from bncli.recipe.yaml import dotted
from bncli.results.serialize import from_plain, to_plain
from bncli.results.train import Evaluation
from bncli.storage import read_plain

VERSION = "1"
MODEL = "model.safetensors"
NOT_HELD = (torch.complex32, torch.complex128)  # by the format


class SavedModel(NamedTuple):
    """What a file of weights holds. left_out: of the state_dict; no tensors. evaluation: of these weights, if any."""

    tensors: dict[str, Tensor]
    recipe: Recipe
    evaluation: Evaluation | None
    shape: tuple[int, ...]  # of an example
    classes: int
    threads: int
    left_out: list[str]


def packed_weights(state: TrainState, best: bool) -> bytes:
    """The state's weights, or those at its best evaluation, with their recipe and evaluation, as a safetensors file."""
    last, evaluation = state.evaluations[-1], state.best_evaluation
    if best and evaluation and state.best and state.best[0] == evaluation.step:
        weights = state.best[1]
    else:
        if best and evaluation and evaluation.step != state.step:
            warnings.warn(
                f"the weights at the best evaluation, after step {evaluation.step}, were not kept, as train.keep was "
                f"last then; those after step {state.step} are saved",
                stacklevel=2,
            )
        evaluation = last if last.step == state.step else None
        weights = copies(state.model.state_dict()) | (state.population if evaluation else {})
    held = {
        name: each.contiguous()
        for name, each in weights.items()
        if each.layout is torch.strided and not each.is_quantized and each.dtype not in NOT_HELD
    }
    left_out = [name for name in state.model.state_dict() if name not in held]
    if left_out:
        warnings.warn(f"not in the file of the weights: {', '.join(left_out)}, which it cannot hold", stacklevel=2)
    metadata = {
        "format": "pt",  # by which other programs know whose tensors they are
        "bncli": bncli.__version__,
        "version": VERSION,
        "recipe": state.recipe.model_dump_json(),
        "metrics": json.dumps(evaluation and to_plain(evaluation)),
        "shape": json.dumps(state.dataset.shape),
        "classes": str(state.dataset.classes),
        "threads": str(torch.get_num_threads()),
        "left_out": json.dumps(left_out),
    }
    return safetensors.torch.save(held, metadata)


# --- read and checked -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: Path) -> Iterator[bytes]:
    """The content of a file of weights, given itself or as its run's folder. Errors about it name the file."""
    in_folder = path.is_dir()
    file = path / MODEL if in_folder else path
    try:
        content = read_plain(file, follow=not in_folder)
    except (OSError, ValueError) as error:
        raise FileError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    try:
        yield content
    except FileError as error:
        raise FileError(*(f"{file}: {mistake}" for mistake in error.mistakes)) from error


def tensors_of(content: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises FileError for any other content."""
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # of the format's own kind, or for a type that torch does not have
        raise FileError(f"is damaged or no safetensors file: {' '.join(str(error).split())[:200]}") from error


def unpacked_weights(content: bytes, allow_code: bool = False) -> SavedModel:
    """The content of a file of weights that bncli saved.

    Raises FileError for any other content, and UsageError for one whose model is the user's own code, which is run only
    if `allow_code`.
    """
    tensors = tensors_of(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    about: dict[str, str] = header.get("__metadata__") or {}
    if about.get("version") != VERSION or "recipe" not in about:
        raise FileError("was not saved by this version of bncli, or names no recipe: its tensors are all that it holds")
    try:
        recipe = Recipe.model_validate_json(about["recipe"])
        metrics = json.loads(about["metrics"])
        evaluation = None if metrics is None else from_plain(Evaluation, metrics)
        shape, classes, threads = (json.loads(about[name]) for name in ("shape", "classes", "threads"))
        left_out = [str(name) for name in json.loads(about["left_out"])]
        numbers = [*shape, classes, threads]
        if not all(type(each) is int and 0 < each < 2**31 for each in numbers) or threads >= 2**12:
            raise ValueError("a size that is no positive number")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = "its recipe" if isinstance(error, ValidationError) else str(error)[:200]
        raise FileError(f"what it says about its weights cannot be read: {what}") from error
    if isinstance(recipe.model, OwnModel) and not allow_code:
        raise UsageError(f"its model is {recipe.model.module}, {CODE_OF_YOURS}", permission="allow_code")
    saved = SavedModel(tensors, recipe, evaluation, tuple(shape), classes, threads, left_out)
    _check_size(saved)
    return saved


def _check_size(saved: SavedModel) -> None:
    """Raises FileError for a recipe that contradicts itself, or whose model has more weights than the file."""
    recipe = saved.recipe
    found = [*contradictions(recipe), *shape_contradictions(recipe, saved.shape, saved.classes)]
    if found:
        keys, why = found[0]
        raise FileError(f"its recipe is wrong: {dotted(keys)}: {why}")
    if planned := layers(recipe, saved.shape, saved.classes):
        norms = [layer.channels for layer, _, _ in walk(planned, saved.shape) if isinstance(layer, Norm)]
        needed = size(planned, saved.shape)[0].parameters + sum(norms) * getattr(recipe.norm, "group_size", 0)
        if needed > (has := sum(each.numel() for each in saved.tensors.values())):
            raise FileError(f"has {has:,} numbers, and its recipe's model needs {needed:,}")


def misfits(weights: Mapping[str, Any], model: nn.Module) -> list[str]:
    """In what a state_dict is not of that model, in sentences; what is no tensor in the model's may be missing."""
    held = {name: each for name, each in model.state_dict().items() if isinstance(each, Tensor)}
    shapes = [f"{name} {tuple(weights[name].shape)} in place of {tuple(each.shape)}" for name, each in held.items()
              if name in weights and weights[name].shape != each.shape]  # fmt: skip
    found = {
        "is missing": [name for name in held if name not in weights],
        "does not belong to this model": [name for name in weights if name not in model.state_dict()],
        "has another shape": shapes,
    }
    return [
        f"{len(names)} of {len(held)} tensors: {', '.join(names[:3])}{', ...' * (len(names) > 3)} {what}"
        for what, names in found.items()
        if names
    ]


def put(weights: Mapping[str, Any], model: nn.Module) -> None:
    """Load a state_dict, all of it. Raises UsageError, field from_weights, for one of another model."""
    if mistakes := misfits(weights, model):
        raise UsageError(*mistakes, field="from_weights")
    model.load_state_dict(weights, strict=False)


def _cheaply_initialized(recipe: Recipe) -> Recipe:
    """The recipe with initial weights that need neither data nor time, as they will be replaced."""
    if isinstance(recipe.model, OwnModel):
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": Init()}), "probes": None})


# --- used -----------------------------------------------------------------------------------------------------------


def load_model(path: str | Path, allow_code: bool = False, device: str = "cpu") -> nn.Module:
    """The trained model of a run, in evaluation mode.

    It takes (N, *shape) float32 that are normalized as data.normalize says in the run's recipe: with `unit` pixels are
    divided by 255 (those of the digits by 16) and other numbers are as they are; with `standard`, each channel of
    images or feature of vectors has the mean of the training examples subtracted and is divided by their deviation.

    Args:
        path: the folder of a run of `bncli train`, or a file of its weights (.safetensors).
        allow_code: run the code of a model of the user's own, which the file's recipe names.
        device: auto, cpu, cuda, cuda:N or mps.

    Returns:
        A module from (N, *shape) to (N, classes) logits.

    Raises:
        FileError: for a file that is missing, damaged, or not of a run.
        UsageError: for a model of the user's own without `allow_code`, or whose code does not fit the file.
        Unavailable: for a device or a kernel that cannot run here.
    """
    on = resolve(device)
    with opened(Path(path)) as content:
        saved = unpacked_weights(content, allow_code)
    cpu = torch.device("cpu")
    before = global_generators(cpu)
    try:
        model = build(_cheaply_initialized(saved.recipe), saved.shape, saved.classes, device=on)
    finally:
        restore_global_generators(before, cpu)
    if mistakes := misfits(saved.tensors, model):
        raise FileError(*(f"{path}: {mistake}" for mistake in mistakes))
    model.load_state_dict(saved.tensors, strict=False)
    return model.to(on).eval()


def evaluate_weights(
    content: bytes, device: str = "auto", threads: int | None = None, allow_code: bool = False
) -> tuple[Recipe, Evaluation]:
    """Evaluate saved weights on the held-out data of their recipe, in chunks and precision as the run did.

    Args:
        content: of a file of weights.
        device: auto, cpu, cuda, cuda:N or mps.
        threads: CPU threads; None for the run's. On the same machine with the same number, all digits are the run's.
        allow_code: run the code of a model of the user's own, which the file's recipe names.

    Returns:
        The recipe, and the evaluation at the step of these weights.

    Raises:
        As `load_model` and `train`.
    """
    saved, on = unpacked_weights(content, allow_code), resolve(device)
    recipe = _cheaply_initialized(saved.recipe)
    options = recipe.train
    with (
        deterministic(options.deterministic and on.type == "cuda"),
        blame_own_model(recipe),
        tf32_allowed(options.tf32),
        cpu_threads(threads or saved.threads),
    ):
        dataset = data.load(recipe.data, on, data.MEMORY_FORMATS[options.memory_format])
        check_fit(recipe, dataset)
        state = TrainState(recipe, dataset, on)
        if mistakes := misfits(saved.tensors, state.model):
            raise FileError(*mistakes)
        state.model.load_state_dict(saved.tensors, strict=False)
        state.step = saved.evaluation.step if saved.evaluation else 0
        return saved.recipe, measured(state)
