"""The plan of the code, read from its syntax: who may import whom, and what loads early."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "bncli"

STANDARD = sys.stdlib_module_names
SHELVES = {"errors", "names", "results", "storage"}  # plain data that every part may use
ASKED = SHELVES | {"recipe"}
REPORT = {
    f"report.{name}"
    for name in (
        "dry_run",
        "export",
        "figure",
        "files",
        "folder",
        "layers",
        "page",
        "progress",
        "run_figure",
        "table",
        "tensorboard",
        "text",
        "train",
    )
}

# Part -> (parts it may import, outside packages it may import). A module belongs to the longest name that its own
# begins with, and so does what it imports. A part may always import itself.
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "__init__": ({"recipe", "engine", "kernels"}, set()),  # the public Python API, loaded when first used
    "__main__": ({"cli"}, set()),
    "errors": (set(), set()),
    "names": ({"errors"}, set()),
    "storage": ({"errors"}, set()),
    "results": ({"errors", "names"}, set()),
    "recipe": ({"errors", "names", "storage"}, {"pydantic", "yaml", "numpy"}),
    "kernels": ({"errors", "names", "storage"}, {"torch"}),
    "kernels.definition": ({"names"}, {"torch"}),
    "kernels.fused.triton": ({"errors", "names", "kernels"}, {"torch", "triton"}),
    "kernels.fused.triton_launch": ({"errors", "names", "kernels"}, {"torch", "triton"}),
    "engine.device": ({"errors", "names", "results", "engine.memory", "__init__"}, {"torch", "psutil"}),
    "engine.distributed": ({"errors", "engine.device"}, {"torch", "psutil"}),
    "engine.load": (set(), {"psutil"}),
    "engine.memory": ({"results"}, {"psutil"}),
    "engine.target": (ASKED, set()),
    "engine.user_code": ({"errors", "storage"}, set()),
    "engine.data": (
        {"errors", "names", "recipe", "kernels", "engine.device", "engine.memory"},
        {"torch", "numpy", "sklearn", "datasets", "PIL", "huggingface_hub"},
    ),
    "engine.models": (
        {"errors", "names", "recipe", "kernels", "engine.device", "engine.user_code"},
        {"torch", "numpy"},
    ),
    "engine.convert": ({"errors", "names", "recipe", "kernels", "engine.device", "engine.models.norms"}, {"torch"}),
    "engine.train": (ASKED | {"engine", "kernels", "__init__"}, {"torch", "numpy", "pydantic", "safetensors"}),
    "measure.timing": ({"errors", "results", "engine.device", "engine.memory"}, {"torch", "numpy", "scipy", "psutil"}),
    "measure.reference": (
        ASKED | {"kernels", "engine.device", "engine.models", "engine.user_code"},
        {"torch"},
    ),
    "measure.dry_run": (ASKED | {"engine.memory"}, set()),
    "measure.compare": (
        ASKED | {"engine.memory", "engine.target", "engine.user_code", "measure.dry_run", "__init__"},
        {"numpy", "scipy", "psutil", "distributed"},  # the last for a Dask cluster alone
    ),
    "measure.profile": (
        ASKED | {"kernels", "engine", "measure.timing", "measure.reference"},
        {"torch", "numpy", "psutil"},
    ),
    "measure.gradcheck": (ASKED | {"kernels", "engine", "measure.timing", "measure.reference"}, {"torch", "numpy"}),
    "report": (SHELVES, {"rich"}),
    **{f"report.{name}": (SHELVES | {"report"}, {"matplotlib"}) for name in ("figure", "layers", "run_figure")},
    "report.page": (SHELVES | {"report"}, {"jinja2", "markupsafe"}),
    "report.tensorboard": (SHELVES | {"report"}, {"torch"}),  # whose writer of such files is imported when asked for
    **{
        f"report.{command}": (SHELVES | REPORT, {"rich", "matplotlib"})
        for command in ("compare", "profile", "gradcheck")
    },
    "cli": (ASKED | REPORT | {"measure.profile.shapes"}, {"typer", "rich"}),  # names of sets, for completion
    **{
        f"cli.{command}": (
            ASKED
            | REPORT
            | {"cli.console", "cli.options", "cli.output", f"report.{command}", f"measure.{command}"}
            | {
                "train": {"engine.train", "engine.distributed", "engine.memory", "measure.dry_run"},
                "compare": {"measure.dry_run"},
            }.get(command, set()),
            {"typer"},
        )
        for command in ("train", "compare", "profile", "gradcheck")
    },
    "cli.__init__": ({"errors", "cli", "__init__"}, {"typer"}),
    "engine": (set(), set()),
    "measure": (set(), set()),
}


def module_of(file: Path) -> str:
    """`measure.profile.kernels`; a package's `__init__.py` is the package, but for the outermost and the CLI's."""
    name = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    return name if name in ALLOWED else name.removesuffix(".__init__")


def is_in(module: str, part: str) -> bool:
    return f"{module}.".startswith(f"{part}.")


def part_of(module: str) -> str:
    """The part that a module belongs to: the longest name in the table that its own begins with."""
    found = [part for part in ALLOWED if is_in(module, part)]
    assert found, f"{module} is in no part of the table"
    return max(found, key=len)


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {module_of(file): file for file in FILES}


@functools.cache
def syntax(file: Path) -> tuple[ast.AST, ...]:
    """The module's syntax tree and every node below it."""
    return tuple(ast.walk(ast.parse(file.read_text())))


@functools.cache
def imports(file: Path) -> set[tuple[str, str]]:
    """(`in`, a module of the package) or (`out`, a package) for every import in a file, wherever it stands."""
    found = set()
    for node in syntax(file):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the import out in full"
            module = node.module or ""
            inside = [f"{module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("bncli.") in MODULES else module for name in inside]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "bncli":
                found.add(("in", rest or "__init__"))
            elif head not in STANDARD:
                found.add(("out", head))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_table_allows_its_part(module: str) -> None:
    part = part_of(module)
    allowed, packages = ALLOWED[part]
    allowed = allowed | {part}
    for kind, name in sorted(imports(MODULES[module])):
        if kind == "out":
            assert name in packages, f"{module} ({part}) may not import {name}"
        else:
            assert any(is_in(name, each) for each in allowed), f"{module} ({part}) may not import {name}"


def test_every_part_of_the_table_is_there() -> None:
    assert {part_of(module) for module in MODULES} == set(ALLOWED)


def test_no_module_has_the_name_of_one_of_pythons_own_but_the_command_profile() -> None:
    names = {part for module in MODULES for part in module.split(".")} - {"__init__", "__main__"}
    assert names & set(STANDARD) == {"profile"}


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {module: {name for kind, name in imports(file) if kind == "in"} for module, file in MODULES.items()}
    graph["__init__"] = set()  # the public names, loaded when first used
    list(graphlib.TopologicalSorter(graph).static_order())


def test_options_are_named_in_the_command_line_alone() -> None:
    """A Python caller's argument has no dashes; `cli` puts an option in its place."""
    below = {module: file for module, file in MODULES.items() if not part_of(module).startswith("cli")}
    named = set()
    for module in below.keys() - OPTIONS_OF_OTHER_PROGRAMS:
        for node in syntax(below[module]):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named |= {(module, node.lineno, option) for option in OPTION.findall(node.value)}
    assert not named


OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Modules that start another program, or are one, and its options; a web page's style has names with dashes too.
OPTIONS_OF_OTHER_PROGRAMS = {
    "kernels.fused.build",
    "engine.train.worker",
    "measure.compare.processes",
    "report.page",
}

# Modules without a test file of their own, and which file tests them, or why none has to.
TESTED_ELSEWHERE = {
    "__init__": "the public names, tests/engine and tests/kernels use them",
    "__main__": "python -m bncli, run by tests/cli",
    "cli.options": "declarations that every command of tests/cli uses",
    "kernels.fused.double_backward": "tests/kernels/fused/test_fused.py: second and third derivatives",
    "kernels.fused.interpreted": "tests/kernels/fused/test_fused.py, as one of the implementations",
    "kernels.fused.triton_launch": "tests/kernels/fused/test_triton.py",
    "report.compare.page": "tests/report/test_page.py, with the pages of the other commands",
    "report.gradcheck.page": "tests/report/test_page.py",
    "report.profile.page": "tests/report/test_page.py",
    "recipe.mnist": "tests/engine/data/test_mnist.py",
    "results.compare": "declarations",
    "results.environment": "declarations",
    "results.finding": "declarations",
    "results.gradcheck": "declarations",
    "results.profile": "declarations",
    "results.train": "declarations",
}


def path_of_test(file: Path) -> str:
    """The test file of a module; a package's own, in its folder, has the package's name."""
    path = file.relative_to(PACKAGE)
    return (path.parent / f"test_{path.parent.name if path.stem == '__init__' else path.stem}.py").as_posix()


def test_every_module_has_its_test_file_or_a_reason() -> None:
    """tests/ is the package's tree: `measure/profile/steps.py` is tested by `tests/measure/profile/test_steps.py`."""
    with_code = {module: file for module, file in MODULES.items() if len(syntax(file)[0].body) > 1}  # type: ignore[attr-defined]
    missing = {module for module, file in with_code.items() if not (ROOT / "tests" / path_of_test(file)).exists()}
    assert missing == set(TESTED_ELSEWHERE)


def test_every_test_file_has_its_module_or_a_reason() -> None:
    tests = {file.relative_to(ROOT / "tests").as_posix() for file in (ROOT / "tests").rglob("test_*.py")}
    assert tests - {path_of_test(file) for file in FILES} == set(TESTS_OF_SEVERAL)


# Test files of more than one module, or of a property of the whole.
TESTS_OF_SEVERAL = {
    "test_architecture.py": "the plan of the code",
    "cli/test_ranks.py": "train, its console and the ranks, as torchrun starts them",
    "test_faults.py": "every command under faults of files, streams and limits",
    "test_action.py": "the steps of the action in .github",
    "test_packaging.py": "the wheel, and what works where it alone is installed",
    "test_documentation.py": "README.md, CONTRIBUTING.md, docs/ and the recipes' headers",
    "benchmarks/test_benchmarks.py": "the benchmark commands",
    "benchmarks/test_first_gpu.py": "the first session on a GPU, whose parts need the interpreter and processes",
    "engine/train/test_fused_training.py": "training with the fused kernel, through all its modules",
    "engine/train/test_step.py": "the options of the optimizer step: accumulation, clipping, label smoothing",
    "fuzz/test_fuzz.py": "the fuzzing command, and a fixed number of its inputs",
    "test_kill.py": "the command that kills others, and some of its kills",
    "kernels/fused/test_ahead_of_time.py": "the compilation of every kernel without a GPU",
    "kernels/fused/test_models.py": "whole models with the fused kernel",
    "kernels/fused/test_node.py": "node.cpp, through the modules that build and call it",
    "kernels/fused/test_team.py": "programs that share a channel, on a GPU",
    "test_control_characters.py": "what no name, message or file brings to a terminal, in any form of any report",
    "measure/compare/test_shared_runs.py": "several calls on one folder: runs, leases and files together",
    "measure/reference/test_one_standard.py": "profile and gradcheck call the same kernels wrong",
}


@pytest.mark.parametrize("file", sorted((PACKAGE / "measure" / "compare").rglob("*.py")), ids=lambda file: file.stem)
def test_the_driver_of_a_comparison_never_needs_torch(file: Path) -> None:
    assert ("out", "torch") not in imports(file)


def test_the_driver_of_a_comparison_does_not_load_torch_through_what_it_imports_either() -> None:
    modules = [f"bncli.{module}" for module in MODULES if part_of(module) == "measure.compare"]
    assert not modules_after(f"import {', '.join(modules)}") & {"torch", "sklearn"}


RUN_AS_COMMANDS = ("recipe.schema", "kernels.fused.build")  # by python -m, and they print what they made


def test_only_the_command_line_and_the_report_print() -> None:
    for module, file in MODULES.items():
        if part_of(module).startswith(("cli", "report")) or module in RUN_AS_COMMANDS:
            continue
        calls = [node for node in syntax(file) if isinstance(node, ast.Call)]
        printing = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not printing, f"{file}: prints in lines {printing}"


def test_what_is_shown_leaves_where_control_characters_are_made_visible() -> None:
    """Names, messages and files can have some: `cli.console` shows results and messages, `report.progress` the rest."""
    ways = re.compile(
        r"print|(rich\.)?(console\.)?Console|(sys\.)?(__)?std(out|err)(__)?\.(buffer\.)?write|(typer\.)?s?echo"
    )
    found = set()
    for module, file in MODULES.items():
        if part_of(module).startswith(("cli", "report")):
            calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            found |= {(module, word) for word in map(ast.unparse, calls) if ways.fullmatch(word)}
    of_console = {("cli.console", way) for way in ("print", "sys.stdout.write", "Console")}
    assert found == of_console | {
        ("report.progress", "Console"),
        ("cli.__init__", "typer.echo"),
    }  # of the version alone


def modules_after(code: str) -> set[str]:
    """Which modules Python has loaded after running some code."""
    script = f"import sys\ntry:\n    exec({code!r})\nexcept SystemExit:\n    pass\nprint('\\n' + ' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    names = out.splitlines()[-1].split()
    return {name.split(".")[0] for name in names} | {name for name in names if name.startswith("bncli.")}


HEAVY = {"torch", "pydantic", "sklearn", "scipy", "numpy", "matplotlib", "datasets", "yaml", "psutil", "jinja2"}


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
        ["profile", "--plot", "x.eps"],
        ["profile", "--baseline", "missing.json"],
        ["trian"],
    ],
)
def test_help_version_and_usage_errors_load_nothing_heavy(arguments: list[str]) -> None:
    loaded = modules_after(f"import sys; sys.argv = {['bncli', *arguments]!r}; import bncli.cli; bncli.cli.main()")
    assert "typer" in loaded
    assert not loaded & HEAVY
    assert "bncli.report" not in loaded or "--help" not in arguments  # a third of the time that the help takes


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "recipes/digits.yaml", "--dry-run"],
        ["compare", "recipes/digits.yaml", "--dry-run", "-o", "runs/no-runs-yet"],  # runs that are kept take scipy
        ["train", "recipes/digits.yaml", "--set", "norm=no"],
        ["compare", "missing.yaml"],
    ],
)
def test_recipes_are_checked_and_planned_without_torch(arguments: list[str]) -> None:
    loaded = modules_after(f"import sys; sys.argv = {['bncli', *arguments]!r}; import bncli.cli; bncli.cli.main()")
    assert "pydantic" in loaded
    assert not loaded & {"torch", "sklearn", "scipy"}
