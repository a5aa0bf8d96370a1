"""Good files of every kind, which are accepted as they are, and are mutated. They are the same on every machine."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bncli.measure.compare.plan import Study, named_runs, study
from bncli.measure.compare.summary import summarise
from bncli.recipe.load import load
from bncli.report import files
from bncli.report.compare.folder import ComparisonFolder
from bncli.report.profile import export
from bncli.results.compare import BegunComparison, Comparison, RunRecord
from tests.measure.compare.conftest import ARMS, BASE, UNTUNED, carried_out
from tests.report import made_up_costs

IDENTITY = {"bncli": "0", "torch": "2", "device": "cpu", "data": "none"}
FEW = BASE + UNTUNED.replace("report: 5", "report: 2")  # few runs, since each input means reading all
CLAIMS = """
claims:
  - {say: fewer steps, measure: steps_to_target, arm: normed, over: plain, expect: less}
  - {say: ends better, measure: final, arm: normed, over: plain, at_least: 0.01}
  - {say: larger rates, measure: largest_learning_rate, arm: normed, over: plain, at_least: 2}
largest_learning_rate: {steps: 1000, accuracy: 0.8}
"""
DATA = "synthetic, shape: [8], classes: 3, examples: 200, held_out: 50"
RECIPES = (
    BASE,
    BASE + UNTUNED,
    BASE + ARMS,
    """\
data: {source: digits, images: true, split_seed: 3}
model: {kind: cnn, channels: [8, 8], activation: relu}
norm: {kind: ghost, size: 16}
optimizer: {kind: adamw, lr: 1e-2, weight_decay: 0.1}
schedule: {kind: step, milestones: [{epochs: 1}, {epochs: 2}], gamma: 0.5, warmup: 5}
train:
  steps: {epochs: 3}
  batch_size: 50
  evaluate_every: {epochs: 0.5}
  label_smoothing: 0.1
  target: {metric: loss, value: 0.3, also: [0.5]}
  checkpoint: {every: 20}
probes: {measure: [saturation, shift], at: 10}
""",
    """\
# npz
data: {source: npz, path: good.npz, held_out: 4}
model: &small {kind: mlp, hidden: [4, 4]}
optimizer: {kind: sgd, lr: 0.1, momentum: 0.9}
train: {steps: 20, batch_size: 4, target: {value: 0.9}}
arms:
  "a b": {}
  narrow: {model: {kind: mlp, hidden: [2]}, optimizer.lr: 0.3}
  renorm: {norm: {kind: renorm, r_max: 3, d_max: 5}, model: *small}
reference: narrow
grid: {optimizer.lr: {from: 0.1, to: 1, points_per_doubling: 1}}
seeds: {tune: 3, report: 4}
claims:
  - {say: fewer steps, measure: steps_to_target, arm: renorm, over: narrow, expect: less}
  - {measure: largest_learning_rate, arm: renorm, over: narrow, at_least: 2}
largest_learning_rate: {steps: 10, accuracy: 0.8}
""",
    BASE.replace("mlp, hidden: [8]", "module, module: os:mkdir, arguments: {path: the-canary}"),
    BASE.replace(
        DATA,
        "hub, name: cifar10, shape: [3, 8, 8], classes: 10",
    ),
    BASE.replace(DATA, "mnist"),
)
TRAINED = """\
data: {source: synthetic, shape: [8], classes: 3, examples: 20, held_out: 5}
model: {kind: mlp, hidden: [4]}
norm: batch
optimizer: {kind: adamw, lr: 0.1}
schedule: {kind: step, milestones: [3], warmup: 2}
train: {steps: 6, batch_size: 5, evaluate_every: 2, target: {value: 0.9}, stop_at_target: false}
"""
SETS = (
    "optimizer.lr=0.3", "train.steps=10\nnorm=batch", "norm={kind: group, groups: 4}", "grid.optimizer.lr=[0.1, 1]",
    "arms={a: {}, b: {norm: layer}}", "arms.plain.optimizer.lr=2", "model.hidden=[16, 16]", "schedule.kind=cosine",
    "train.target.value=0.8\nseeds.report=4", "seeds={tune: 4, report: 3}", "train.checkpoint.every=5", "probes=all",
    "data.noise=.5", "optimizer={kind: adam, lr: 1e-3}", "train.steps={epochs: 3}", "model.init=xavier",
    "claims=[{say: faster, measure: steps_to_target, arm: normed, over: plain, expect: less}]",
)  # fmt: skip
SHAPES = (
    "256x64x56x56", "60x100", "1x1", "32x64x7", "2x3x4x5x6", "128X16X32X32",
)  # fmt: skip
CSVS = (
    "n,c,spatial,calls\n32,64,56x56,3\n32,64,28x28,1\n32,100,,2\n",
    "shape,calls\n32x64x14x14,3\n60x100,1\n",
    "name;n\nn,c,spatial\n1,2,3\n",
    '\ufeffN , C,"spatial",note\n8,16,7x7,"a, b"\n8,16,"7x7",\n',
)


def asked(folder: Path, text: str = FEW) -> Study:
    """The study of the small recipe, which is written into the folder."""
    (folder / "asked.yaml").write_text(text)
    return study([load(str(folder / "asked.yaml"))], IDENTITY)


def comparison(of: Study) -> Comparison:
    """Its runs, all done, with an outcome that depends on the run's place alone."""
    records = carried_out(of, lambda job: 90 + 7 * job.seed + 200 * (job.arm == "plain"))
    records = [replace(each, identity=IDENTITY, recipe_key=_recipe_key(of, each.key)) for each in records]
    records = [_short(of, each) for each in records]
    return summarise(of.plan, records, named_runs(of, {each.key: each for each in records}).planned, 1)


def _short(of: Study, record: RunRecord) -> RunRecord:
    """With the budget of its phase, as far as it goes, and one in 20 of its evaluations."""
    assert record.result is not None
    budget, evaluations = of.plan.budget_of(record.phase), record.result.evaluations[::20]
    assert budget is not None
    evaluations = tuple(each for each in evaluations if each.step <= budget)
    steps = min(budget, record.result.steps_run)
    return replace(record, result=replace(record.result, budget=budget, steps_run=steps, evaluations=evaluations))


def _recipe_key(of: Study, key: str) -> str:
    return next(job.recipe_key for job in of._jobs.values() if job.key == key)


def begun(of: Study) -> BegunComparison:
    return BegunComparison(of.plan, IDENTITY, 1, ("asked.yaml",))


def write_comparison(folder: Path, of: Study) -> None:
    """A whole comparison's folder: its plan, its runs and its answer."""
    found = comparison(of)
    with ComparisonFolder(folder) as made:
        made.begin(begun(of))
        for record in found.runs:
            made.save(record)
        made.finish(found)


def baselines() -> list[bytes]:
    kernels = (made_up_costs.one_case(), made_up_costs.kernel_profile(), made_up_costs.with_errors())
    return [export.to_json(each).encode() for each in (*kernels, made_up_costs.step_profile())]


def saved_comparisons(folder: Path) -> list[bytes]:
    return [files.to_json(comparison(asked(folder, text))).encode() for text in (FEW, BASE + ARMS, FEW + CLAIMS)]


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def npzs() -> list[bytes]:
    x, y = np.arange(48, dtype=np.float32).reshape(12, 4) / 48, np.arange(12) % 3
    images = np.arange(12 * 2 * 3 * 3, dtype=np.uint8).reshape(12, 2, 3, 3)
    compressed = io.BytesIO()
    np.savez_compressed(compressed, x=images, y=y.astype(np.uint8))
    return [npz(x=x, y=y), npz(x=images, y=y, x_test=images[:5], y_test=y[:5]), compressed.getvalue()]


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archived(parts: Sequence[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in parts:
            archive.writestr(name, content)
    return file.getvalue()


def trees(texts: Sequence[bytes]) -> list[object]:
    return [json.loads(text) for text in texts]


def unsigned(text: bytes) -> bytes:
    """A file in the format that had no digest, so that a change of it is read."""
    tree = json.loads(text)
    if tree.pop("sha256", None):
        tree["format_version"] = 2
    return json.dumps(tree).encode()
