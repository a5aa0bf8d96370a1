"""What would be run, and how large it is."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bncli.measure.compare.plan import planned_comparison, study
from bncli.measure.dry_run import PROCESS_MIB, data_mib, memory_needed, planned_training
from bncli.recipe.load import Loaded, load
from bncli.results.compare import MemoryNeeded
from bncli.results.train import most_steps_to_target
from tests.conftest import tiny
from tests.measure.compare.conftest import ARMS, BASE

RECIPES = Path(__file__).parents[2] / "recipes"


def loaded(folder: Path, text: str) -> Loaded:
    (folder / "small.yaml").write_text(text)
    return load(str(folder / "small.yaml"))


def test_a_comparison_counts_its_runs_and_what_each_arm_changes(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, BASE + ARMS)
    planned = planned_comparison(study([recipe]), recipe)
    assert (planned.runs, planned.steps_at_most) == (28, 28_000)
    plain, normed = planned.arms
    assert (plain.changes, plain.tuning_runs, plain.report_runs) == ((), 9, 5)
    assert normed.changes[0] == ("norm.kind", "batch")
    assert plain.parameters is not None
    assert normed.parameters == plain.parameters + 8  # for each unit a scale and a shift, and no bias
    assert planned.grid == {"optimizer.lr": (0.1, 1, 10)}


def test_one_training_run_is_one_run_of_the_arm_that_is_chosen(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, BASE + ARMS)
    planned = planned_training(recipe, recipe.arms[1])
    assert (planned.name, planned.runs, planned.steps_at_most) == ("normed", 1, 1000)
    assert len(planned.arms) == 1


def test_the_papers_arms_are_planned_without_their_data() -> None:
    """Ioffe & Szegedy 2015, section 4.2: the rates, and in the last three a fifth of L2 and a decay 6 times faster."""
    recipe = load(str(RECIPES / "imagenet-inception.yaml"))
    planned = planned_comparison(study([recipe]), recipe)
    assert [arm.name for arm in planned.arms] == ["baseline", "bn-baseline", "bn-x5", "bn-x30", "bn-x5-sigmoid"]
    assert [arm.recipe.optimizer.lr for arm in recipe.arms] == [0.0015, 0.0015, 0.0075, 0.045, 0.0075]
    assert [arm.recipe.model.model_dump()["dropout"] for arm in recipe.arms] == [0.4, 0.4, 0, 0, 0]
    first, *_, last = (arm.recipe for arm in recipe.arms)
    assert first.optimizer.weight_decay == pytest.approx(5 * last.optimizer.weight_decay)
    assert first.schedule.model_dump()["every"] == pytest.approx(6 * last.schedule.model_dump()["every"], rel=1e-4)
    assert most_steps_to_target(recipe.base.train.steps) == pytest.approx(31.0e6)
    assert all(arm.parameters is not None and arm.memory_mib is not None for arm in planned.arms)


# --- memory -------------------------------------------------------------------------------------------------------

IMAGES = {"source": "mnist", "images": True}
HUB = {"source": "hub", "name": "far/away", "shape": [3, 32, 32], "classes": 10}
LABEL = 8  # bytes


@pytest.mark.parametrize(
    ("section", "nbytes"),
    [
        ({"source": "synthetic", "shape": [50], "examples": 90, "held_out": 10}, 100 * (50 * 4 + LABEL)),
        ({"source": "digits"}, 1797 * (64 * 4 + LABEL)),
        ({"source": "mnist"}, 5000 * (784 * 4 + LABEL)),
        (IMAGES, 5000 * (784 + LABEL)),
        ({**IMAGES, "path": "idx"}, (7 + 3) * (784 + LABEL)),
        ({"source": "npz", "path": "images.npz"}, (6 + 4) * (12 + LABEL)),
        ({"source": "npz", "path": "vectors.npz", "held_out": 2}, 6 * (12 * 4 + LABEL)),
        ({**HUB, "examples": 1000}, 1000 * (3 * 32 * 32 + LABEL)),
        ({**HUB, "examples": 1000, "in_memory_gib": 0.001}, 0),  # decoded batch by batch
        (HUB, None),
    ],
)
def test_the_data_are_counted_as_they_will_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], nbytes: float | None
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez(
        "images.npz", x=np.zeros((6, 3, 2, 2), "u1"), y=[0, 1] * 3, x_test=np.zeros((4, 3, 2, 2), "u1"), y_test=[0] * 4
    )
    np.savez("vectors.npz", x=np.zeros((6, 12), "u1"), y=[0, 1] * 3)
    Path("idx").mkdir()
    for part, count in (("train", 7), ("t10k", 3)):
        numbers = b"".join(n.to_bytes(4, "big") for n in (0x0803, count, 28, 28))
        Path(f"idx/{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(numbers))
    model = {"kind": "mlp", "hidden": [4]} if section["source"] != "hub" else {"kind": "cnn", "channels": [4]}
    found = data_mib(tiny(data=section, model=model, train={"batch_size": 2, "target": None}))
    assert found == (None if nbytes is None else pytest.approx(nbytes / 2**20))


def test_data_count_once_where_they_are_shared_and_the_largest_training_in_every_process() -> None:
    one, other = tiny(), tiny(model={"kind": "mlp", "hidden": [1000]})
    shared, in_each = (memory_needed([one, other, one], 3, shared) for shared in (True, False))
    data = data_mib(one) or 0.0
    assert shared.data_mib == in_each.data_mib == data > 0
    assert shared.training_mib == memory_needed([other], 1, True).training_mib
    processes = 3 * (PROCESS_MIB + (shared.training_mib or 0.0))
    assert shared.total_mib == pytest.approx(processes + data)
    assert in_each.total_mib == pytest.approx(processes + 3 * data)
    own = {"kind": "module", "module": "mine:make"}
    assert memory_needed([tiny(model=own, norm={"kind": "none"})], 1, True).training_mib is None


@pytest.mark.parametrize(
    ("available", "shared", "fits"),
    [
        (10_000, True, 8),
        (1000, True, 3),
        (1000, False, 1),
        (900, False, 1),
        (4000, False, 6),
        (10, True, 1),
        (1090, True, 3),
        (1100, True, 4),
    ],
)
def test_as_many_processes_fit_as_the_available_memory_has_room_for(available: float, shared: bool, fits: int) -> None:
    needed = MemoryNeeded(500.0, shared, 100.0, 50.0, 8, available)
    assert needed.fitting == fits
    assert (needed.total_mib <= available) == (fits == 8)
