"""The whole command line: every mistake leaves with its exit code, a message and no traceback."""

from __future__ import annotations

import pytest
import torch

from tests.cli.conftest import bncli
from tests.recipe.conftest import NORMS

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
