"""The house rules, read from the source: who may import whom, what never loads early, what the README names exists."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bncli"

STANDARD = sys.stdlib_module_names
RESULTS = {"errors", "names", "results"}
NOTEBOOKS = RESULTS | {"recipe"}

# Room -> (rooms it may import, outside packages it may import). A room is a module of the package or a folder in it.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "names": (set(), set()),
    "results": ({"results"}, set()),
    "recipe": ({"errors", "names", "recipe"}, {"pydantic", "yaml", "numpy"}),
    "kernels": ({"errors", "names", "kernels"}, {"torch", "triton"}),
    "engine": (
        NOTEBOOKS | {"kernels", "engine"},
        {"torch", "numpy", "sklearn", "datasets", "PIL", "huggingface_hub", "psutil"},
    ),
    "measure": (NOTEBOOKS | {"kernels", "engine", "measure"}, {"torch", "numpy", "scipy", "psutil"}),
    "report": (RESULTS | {"report"}, {"rich", "matplotlib"}),
    "cli": (NOTEBOOKS | {"cli", "measure", "report", "engine", "kernels"}, {"typer", "rich"}),
    "__main__": ({"cli"}, set()),
    "__init__": ({"recipe", "engine", "kernels"}, set()),  # the public Python API, loaded when first used
}


def room_of(file: Path) -> str:
    inside = file.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(file: Path) -> set[tuple[str, str]]:
    """(`in`, a room) or (`out`, a package) for every import in a file, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the import out in full"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "bncli" else [module]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "bncli":
                found.add(("in", rest.split(".")[0] or "__init__"))
            elif head not in STANDARD:
                found.add(("out", head))
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_what_the_house_allows_it(file: Path) -> None:
    room = room_of(file)
    rooms, packages = ALLOWED[room]
    rooms = rooms | {"__init__", "__version__"}
    for kind, name in imports(file):
        assert name in (rooms if kind == "in" else packages), f"{room} may not import {name}"


def test_every_room_is_in_the_table() -> None:
    assert {room_of(file) for file in FILES} <= set(ALLOWED)


def test_no_modules_import_each_other_in_a_circle() -> None:
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for name, file in modules.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                nested = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
                graph[name] |= nested or {node.module} & set(modules)
    graph["bncli"] = set()  # the public names, loaded when first used
    list(graphlib.TopologicalSorter(graph).static_order())


COMPARISON = sorted((PACKAGE / "measure" / "compare").rglob("*.py"))


@pytest.mark.parametrize("file", COMPARISON, ids=lambda file: file.stem)
def test_the_driver_of_a_comparison_never_needs_torch(file: Path) -> None:
    assert ("out", "torch") not in imports(file)


def test_the_driver_of_a_comparison_does_not_load_torch_through_what_it_imports_either() -> None:
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in COMPARISON]
    assert not modules_after(f"import {', '.join(modules)}") & {"torch", "sklearn"}


def test_only_the_door_and_the_window_print() -> None:
    for file in FILES:
        if room_of(file) in ("cli", "report") or file.name == "schema.py":  # which prints when it is run as a program
            continue
        calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        printing = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not printing, f"{file}: prints in lines {printing}"


def modules_after(code: str) -> set[str]:
    """Which modules Python has loaded after running some code."""
    script = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\nprint('\\n' + ' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    return {name.split(".")[0] for name in out.splitlines()[-1].split()}


HEAVY = {"torch", "pydantic", "sklearn", "scipy", "numpy", "matplotlib", "datasets", "yaml", "psutil"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["compare", "--help"],
        ["gradcheck", "--help"],
        ["gradcheck", "--quick", "--full"],
        ["gradcheck", "--kernel", "mine:norm"],  # without --allow-code
        ["profile", "--help"],
        ["profile", "--kernel", "mine:norm"],  # without --allow-code
        ["profile", "--json", "--csv"],
        ["profile", "--fail-above", "0.5"],
        ["profile", "resnet50"],
        ["profile", "--model", "mine:make"],  # without --input
        ["profile", "--plot", "x.pdf"],
        ["profile", "--baseline", "missing.json"],
        ["trian"],
    ],
)
def test_help_version_and_usage_errors_load_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_after(f"import sys; sys.argv = {['bncli', *arguments]!r}; import bncli.cli; bncli.cli.main()")
    assert "typer" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "recipes/digits.yaml", "--dry-run"],
        ["compare", "recipes/digits.yaml", "--dry-run"],
        ["train", "recipes/digits.yaml", "--set", "norm=no"],
        ["compare", "missing.yaml"],
    ],
)
def test_recipes_are_checked_and_planned_without_torch(arguments: list[str]) -> None:
    loaded = modules_after(f"import sys; sys.argv = {['bncli', *arguments]!r}; import bncli.cli; bncli.cli.main()")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "sklearn", "scipy"}


# --- the README ---------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else ""


def commands() -> dict[str, set[str]]:
    """Command -> its options, as the program itself lists them."""
    import typer.main

    from bncli.cli import app

    group = typer.main.get_command(app)
    found = {"": {"--help", "--version", "--install-completion", "--show-completion"}}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        found[name] = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
    return found


def test_every_command_and_option_that_the_readme_names_exists() -> None:
    known = commands()
    lines = re.findall(r"\bbncli (?!\w+ is\b)([a-z-]+)((?: [^`\n]*)?)", "\n".join(_code(README)))
    assert lines
    for command, rest in lines:
        if command.startswith("-"):
            continue
        assert command in known, f"the README names bncli {command}"
        for option in re.findall(r"(?<!\S)(--?[a-z][a-z-]*)", rest):
            assert option in known[command], f"the README names bncli {command} {option}"


def _code(text: str) -> list[str]:
    fenced = [code for language, code in re.findall(r"```(\w*)\n(.*?)```", text, re.S) if language in ("sh", "text")]
    return fenced + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))


def test_every_recipe_and_file_that_the_readme_names_exists_and_every_recipe_is_named() -> None:
    for name in re.findall(r"\b(?:recipes|tests|docs|\.github|\.ci)/[\w./-]+", README):
        path = ROOT / name.rstrip(".")
        assert path.exists() or path.with_suffix(".py").exists(), f"the README names {name}"
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"recipes/{recipe.name}" in README, f"the README does not list {recipe.name}"


def test_every_recipe_has_a_header_with_its_purpose_command_and_expected_outcome() -> None:
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        header = recipe.read_text().split("\n\n")[0]
        for word in ("$schema=recipe.schema.json", "Purpose:", "Command:", "Expect:", "Time:"):
            assert word in header, f"{recipe.name}: its header lacks {word}"


def test_a_recipes_header_and_the_readmes_table_give_the_same_time() -> None:
    table = dict(re.findall(r"^\| `recipes/([\w-]+\.yaml)` \|.*\| ([^|]+) \|$", README, re.M))
    headers = {
        recipe.name: re.search(r"^# Time: +(.+?)(?: on 2 CPU cores)?$", recipe.read_text(), re.M)
        for recipe in (ROOT / "recipes").glob("*.yaml")
    }
    assert table == {name: found and found[1] for name, found in headers.items()}
