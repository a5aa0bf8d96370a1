"""The whole command line: every mistake leaves with its exit code, a message and no traceback."""

from __future__ import annotations

import re

import pytest
import torch

import bncli as package
from tests.cli.conftest import bncli
from tests.recipe.conftest import NORMS
from tests.test_documentation import README, options

OWN_MODEL = "model={kind: module, module: mine:make}"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "smal.yaml"], 2, "bncli: smal.yaml: there is no such file; did you mean small.yaml?"),
        (["train", "small.yaml", "--set", "norm=no"], 2,
         f'--set norm=no: norm.kind: expected {NORMS}, found "no"; did you mean none or noisy?'),
        (["train", "small.yaml", "--set", "optimizer.lt=1"], 2, "optimizer.lt: unknown key; did you mean lr?"),
        (["train", "small.yaml", "--device", "gpu"], 2, "--device gpu: expected one of auto, cpu, cuda, cuda:N, mps"),
        (["train", "small.yaml", "--set", "data={source: npz, path: a.npz, held_out: 3}"], 2, "a.npz"),
        (["train", "small.yaml", "--set", OWN_MODEL], 2,
         "bncli: --set " + OWN_MODEL + ": model.module: mine:make is your own code, which would be executed; "
         "allow it with --allow-code"),
        (["train", "small.yaml", "--set", "arms.own.model={kind: module, module: mine:make}"], 2,
         "arms.own.model.module: mine:make is your own code, which would be executed; allow it with --allow-code"),
        (["compare", "--treads", "3"], 2, "bncli: no such option: --treads; did you mean --threads?\n"),
        (["compare", "--nothing"], 2, "bncli: no such option: --nothing; see bncli compare --help\n"),
        (["compar"], 2, "bncli: no such command 'compar'; did you mean 'compare'?\n"),
        (["train"], 2, "bncli: RECIPE is missing; see bncli train --help\n"),
        (["train", "small.yaml", "more.yaml"], 2, "bncli: got unexpected extra argument(s) (more.yaml); see "),
        (["compare", "small.yaml", "-j", "0"], 2, "bncli: --jobs: 0 is not in the range x>=1; see bncli "),
        (["gradcheck", "--kernel"], 2, "bncli: option '--kernel' requires an argument; see its --help\n"),
        (["compare"], 2, "bncli: give a recipe, as in: bncli compare recipes/digits.yaml"),
        (["compare", "small.yaml", "--json", "--csv"], 2, "--json, --csv, --markdown and --latex: choose one"),
        (["compare", "small.yaml", "--plot", "curve.eps"], 2, "curve.eps: a plot's file name must end in .svg, "),
        (["compare", "small.yaml", "--device", "cuda:9"], 3, "--device cuda:9"),
        (["compare", "small.yaml", "--set", "train.target=null"], 2, "train.target is missing"),
        (["compare", "--from", "nothing.json"], 2, "--from nothing.json: cannot be read"),
        (["compare", "--from", "small.yaml"], 2, "--from small.yaml: "),
    ],
)  # fmt: skip
def test_mistakes_leave_with_their_code_a_message_and_no_traceback(
    arguments: list[str], code: int, message: str
) -> None:
    if "cuda" in str(arguments) and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = bncli(*arguments)
    assert (ran.code, ran.out) == (code, "")
    assert message in ran.err
    assert code != 2 or ran.err.count("\n") == 1


def test_without_a_command_the_help_is_shown() -> None:
    ran = bncli()
    assert ran.code == 2
    assert "Usage: bncli [OPTIONS] COMMAND [ARGS]..." in ran.err
    assert "bncli: " not in ran.err


def test_the_help_lists_the_commands_in_the_order_of_the_readme() -> None:
    listed = re.findall(r"^  (\w+) {2,}\S", bncli("--help").out.partition("Commands:")[2], re.M)
    assert listed == re.findall(r"^\| `bncli (\w+)", README, re.M) == ["train", "compare", "profile", "gradcheck"]


def test_the_help_of_a_command_has_an_example_and_its_options_under_headings() -> None:
    for command, headings in {
        "train": ["Recipe", "Machine", "Output", "Exit code", "Options"],
        "compare": ["Recipe", "Machine", "Output", "Exit code", "Options"],
        "profile": ["Both views", "Kernel view", "Time", "Output", "Baseline", "Options"],
        "gradcheck": ["Options", "Machine", "Output"],
    }.items():
        page = bncli(command, "--help").out
        assert f"  Example: bncli {command} " in page
        assert set(headings) <= set(re.findall(r"^(\w[\w ]*):$", page, re.M))
        long = {option for option in options()[command] if option.startswith("--")}
        assert set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", page, re.M)) == long


def test_the_version_has_a_short_option() -> None:
    assert bncli("-V").out == bncli("--version").out == f"bncli {package.__version__}\n"


def test_the_public_names_are_listed() -> None:
    assert dir(package) == sorted(package.__all__)
