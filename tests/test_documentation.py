"""What README.md, CONTRIBUTING.md and docs/ say: commands run; links, files, options, recipes and folders exist."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import typer.main
from PIL import Image

from bncli.cli import app
from tests.cli.conftest import bncli, forget_modules

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
OWN_MODEL = (ROOT / "docs" / "own-model.md").read_text()
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SET_UP = 2  # the first commands of the README install bncli; .ci/run runs them


def fences(text: str, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    return [code for language, code in re.findall(r"```(\w*)\n(.*?)```", text, re.S) if language in languages]


def code(text: str) -> str:
    """The fenced commands and outputs of a page and its `inline code`, a line each."""
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    return "\n".join([*fences(text, "sh", "text"), *inline])


def options() -> dict[str, set[str]]:
    """Command -> its options, as the program itself lists them."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {
        name: {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
        for name, command in commands.items()
    }


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request: pytest.FixtureRequest) -> Path:
    """Each page in turn."""
    path: Path = request.param
    return path


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(README.splitlines()) <= 200


def test_every_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if not link.startswith(("http:", "https:")):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name} links to {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    for path in PAGES[1:]:
        assert f"({path.relative_to(ROOT).as_posix()})" in README


def test_every_command_and_option_exists(page: Path) -> None:
    known = options()
    for command, rest in re.findall(r"\bbncli (?!\w+ is\b)([a-z][a-z-]*)((?: [^`\n]*)?)", code(page.read_text())):
        assert command in known, f"{page.name} names bncli {command}"
        for option in re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", rest):
            assert option in known[command], f"{page.name} names bncli {command} {option}"


def test_every_file_and_module_exists(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"(?<![\w/])(?:recipes|tests|docs|\.github|\.ci)/[\w./-]*", text):
        assert (ROOT / name.rstrip(".")).exists(), f"{page.name} names {name}"
    for name in re.findall(r"(?<![\w/])(?:engine|kernels|measure|report|cli|recipe|results)/[\w/]+(?:\.\w+)?", text):
        assert (ROOT / "bncli" / name.rstrip("/")).exists(), f"{page.name} names {name}"
    for name in re.findall(r"python -m ([\w.]+)", text):
        if name.partition(".")[0] in ("bncli", "tests"):
            file = ROOT / name.replace(".", "/")
            assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), f"{page.name} names {name}"


def test_every_recipe_is_in_the_readme_or_its_page_with_the_time_of_its_header() -> None:
    tables = README + OWN_MODEL
    table = dict(re.findall(r"^\| `recipes/([\w/-]+\.yaml)` \|.*\| ([^|]+) \|$", tables, re.M))
    headers = {
        recipe.relative_to(ROOT / "recipes").as_posix(): re.search(
            r"^# Time: +(.+?)(?: on 2 CPU cores)?$", recipe.read_text(), re.M
        )
        for recipe in RECIPES
    }
    assert table == {name: found and found[1] for name, found in headers.items()}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_begins_with_its_purpose_command_and_outcome(recipe: Path) -> None:
    header = recipe.read_text().split("\n\n")[0]
    schema = re.search(r"^# yaml-language-server: \$schema=(\S+)", header)
    assert schema
    assert (recipe.parent / schema[1]).resolve() == ROOT / "recipes" / "recipe.schema.json"
    for word in ("Purpose:", "Command:", "Expect:", "Time:"):
        assert word in header, f"{recipe.name}: its header lacks {word}"


def test_the_tree_of_contributing_has_a_line_for_each_folder() -> None:
    (tree,) = [block for block in fences(PAGES[1].read_text(), "text") if block.startswith("bncli/\n")]
    named, path = set(), [""]
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        path[depth:] = [line.split()[0].rstrip("/")]
        named.add("/".join(path))
        assert depth == 0 or len(line.split()) > 1, f"{line.strip()} is not described"
    assert named == {file.parent.relative_to(ROOT).as_posix() for file in (ROOT / "bncli").rglob("*.py")}


# --- commands -------------------------------------------------------------------------------------------------------

COMMANDS = [line for block in fences(README, "sh")[SET_UP:] for line in block.splitlines() if line.startswith("bncli")]
# `compare --from` reads what the command before it wrote, so the two are run together.
SESSIONS = re.findall(r"^bncli .*(?:\nbncli .*--from .*)?$", "\n".join(COMMANDS), re.M)
# What shortens a command that trains or measures; the scheduled checks run the same commands word for word.
SHORT = {
    "train": ["--set", "train.steps=50"],
    "compare": ["-j", "1", *shlex.split("--set 'grid={optimizer.lr: [3]}' --set seeds.report=3 --set train.steps=40")],
    "profile": ["--time", "1", "--min-rounds", "1"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which has the recipes; what is imported from it is forgotten."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    forget_modules(tmp_path)


def test_the_sessions_are_all_commands_of_the_readme() -> None:
    assert len(COMMANDS) >= 4
    assert "\n".join(SESSIONS) == "\n".join(COMMANDS)


@pytest.mark.parametrize("session", SESSIONS)
@pytest.mark.usefixtures("folder")
def test_a_command_of_the_readme_runs(session: str) -> None:
    for line in session.splitlines():
        _, command, *arguments = shlex.split(line, comments=True)
        ran = bncli(command, *arguments, *([] if "--from" in arguments else SHORT.get(command, [])))
        assert ran.code == 0, ran.err
        assert ran.out


@pytest.mark.slow
@pytest.mark.parametrize("session", SESSIONS)
@pytest.mark.usefixtures("folder")
def test_a_command_of_the_readme_runs_word_for_word(session: str) -> None:
    for line in session.splitlines():
        words = shlex.split(line, comments=True)
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout


# --- the user's own model -------------------------------------------------------------------------------------------

OWN_RECIPE = """
data: {source: npz, path: mine.npz, held_out: 20}
model: {kind: module, module: mine:make}
optimizer: {kind: sgd, lr: 0.1}
train: {steps: 30, batch_size: 20, evaluate_every: 10}
"""


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_model_of_the_readme_trains_as_it_stands(norm: str, folder: Path) -> None:
    (section,) = re.findall(r"^## Your own model and data\n(.*?)^## ", README, re.M | re.S)
    (code,) = fences(section, "python")
    assert len(code.splitlines()) <= 10
    (folder / "mine.py").write_text(code)
    (folder / "r.yaml").write_text(OWN_RECIPE)
    random = np.random.default_rng(0)
    np.savez(folder / "mine.npz", x=random.normal(size=(100, 1, 4, 4)), y=np.arange(100) % 3)
    ran = bncli("train", "r.yaml", "--allow-code", "--set", f"norm={norm}", "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["steps_run"] == 30
    assert found["parameters"] == (16 * 64 + 64) + (64 * 3 + 3) + (2 * 64 if norm == "batch" else 0)


def test_recipes_that_are_printed_run_in_another_folder(tmp_path: Path) -> None:
    """The commands of docs/own-model.md for an installation without a clone, the last one shortened."""
    (session,) = [block for block in fences(OWN_MODEL, "sh") if "--example own/npz" in block]
    assert session.rstrip().endswith("bncli compare npz.yaml --allow-code")
    python = shlex.quote(sys.executable)
    script = f'set -e; bncli() {{ {python} -m bncli "$@"; }}; python() {{ {python} "$@"; }}\n{session.rstrip()} '
    done = subprocess.run(
        ["bash", "-c", script + shlex.join(SHORT["compare"])], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "batch norm" in done.stdout
    shipped = ROOT / "recipes" / "own"
    with np.load(tmp_path / "spirals.npz") as written, np.load(shipped / "spirals.npz") as expected:
        assert all((written[name] == expected[name]).all() for name in ("x", "y"))
    images = sorted(file.relative_to(shipped) for file in shipped.rglob("*.png"))
    assert sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.png")) == images
    for image in images:
        assert Image.open(tmp_path / image).tobytes() == Image.open(shipped / image).tobytes()
