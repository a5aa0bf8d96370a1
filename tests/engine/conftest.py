"""Recipes of models of the user's own, images in a file, and the steps to target of a whole run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bncli.engine.target import StepsToTarget
from bncli.recipe.sections import Recipe
from bncli.results.train import Evaluation, Target
from tests.conftest import tiny

OwnRecipe = Callable[..., Recipe]


def steps_to_target(evaluations: Sequence[Evaluation], target: Target) -> tuple[float | None, int | None]:
    """Steps to target and first hit of a run's evaluations, in order of steps; each None where the run missed it."""
    count = StepsToTarget(target)
    for evaluation in evaluations:
        count.add(evaluation)
    return count.steps, count.first_hit


@pytest.fixture
def own_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OwnRecipe]:
    """Makes a recipe whose model is the `make` of some code, which becomes the module `mine` of the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(code: str, norm: str = "none", arguments: dict[str, Any] | None = None, **sections: Any) -> Recipe:
        Path("mine.py").write_text("import random, numpy, torch\nfrom torch import nn\n" + code)
        sys.modules.pop("mine", None)
        model = {"kind": "module", "module": "mine:make", "arguments": arguments or {}}
        return tiny(model=model, norm={"kind": norm}, **sections)

    yield write
    sys.modules.pop("mine", None)  # other tests have a module of that name too


@pytest.fixture
def byte_images(tmp_path: Path) -> str:
    """A file of 160 images of 3x16x16 bytes in 4 classes."""
    pixels = np.random.default_rng(0).integers(0, 256, (160, 3, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=pixels, y=np.arange(160) % 4)
    return str(tmp_path / "images.npz")
