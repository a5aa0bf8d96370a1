"""The wheel: the recipes and their schema are in it, and it works where it alone is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bncli

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves folders in its source."""
    source = tmp_path_factory.mktemp("source")
    for name in ("bncli", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "wheels", "-q"]
    subprocess.run(build, cwd=source, check=True)
    (found,) = (source / "wheels").glob("*.whl")
    return found


def tree(folder: str, *patterns: str) -> set[str]:
    """The files of a folder of the repository that fit one of the patterns."""
    files = (file for pattern in patterns for file in (ROOT / folder).rglob(pattern))
    return {file.relative_to(ROOT).as_posix() for file in files}


def test_the_wheel_has_every_recipe_the_schema_and_every_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= {f"bncli/{name}" for name in tree("recipes", "*.yaml", "*.json", "*.py")}
    assert names >= tree("bncli", "*.py", "*.cpp", "py.typed")
    assert {name.partition("/")[0] for name in names} == {"bncli", f"bncli-{bncli.__version__}.dist-info"}


def test_a_recipe_of_the_installed_wheel_is_printed_with_its_schema_and_trains(wheel: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q", "--target", "installed"]
    subprocess.run([*install, str(wheel)], cwd=tmp_path, check=True)

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "bncli", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    printed = run("train", "--example", "smoke")
    assert f"$schema={(tmp_path / 'installed/bncli/recipes/recipe.schema.json').as_uri()}\n" in printed
    (tmp_path / "recipe.yaml").write_text(printed)
    assert "steps to target" in run("train", "recipe.yaml", "--set", "train.steps=40", "--quiet").lower()


def test_the_version_that_is_cited_is_the_packages() -> None:
    cited = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert cited == [bncli.__version__]
