"""Checkpoints: a run goes on from one bit for bit, and what is none of that run's is refused."""

from __future__ import annotations

import hashlib
import io
import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bncli.engine.train import train
from bncli.engine.train.checkpoint import FORMAT, START, packed, unpacked
from bncli.engine.train.weights import MODEL, evaluate_weights, tensors_of
from bncli.errors import FileError, UsageError
from bncli.recipe.load import with_values
from bncli.recipe.sections import Recipe
from bncli.results.train import Evaluated, Probed, RunFinished, RunStarted
from tests.conftest import TINY, tiny
from tests.engine.conftest import OwnRecipe
from tests.engine.train.test_state import NOISY, RUNS, STEPS, assert_same_bits, recipe_of


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, byte_images: str, own_recipe: OwnRecipe) -> Path:
    """The current folder, with images.npz and mine.py, which the recipes name."""
    own_recipe(NOISY)
    return tmp_path


class Run:
    """A run to its end or its stop: what it found, its result, and the contents of its files."""

    def __init__(self, recipe: Recipe, **arguments: Any) -> None:
        self.files: dict[str, list[bytes]] = {"checkpoint": [], "model": [], "best": []}
        save = {name: contents.append for name, contents in self.files.items()}
        self.events = list(train(recipe, "cpu", **{"save": save, "threads": 1, **arguments}))
        last = self.events[-1]
        assert isinstance(last, RunFinished)
        self.result = last.result

    def found(self, after: int = -1) -> list[Any]:
        """Evaluations with their learning rates, and the points of probes, of later steps than that one."""
        evaluated = [each for each in self.events if isinstance(each, Evaluated) and each.evaluation.step > after]
        probed = [each.points for each in self.events if isinstance(each, Probed) and each.points[0].step > after]
        return [*evaluated, *map(repr, probed)]  # repr for NaN

    @property
    def state(self) -> dict[str, Any]:
        return state_of(self.files["checkpoint"][-1])

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return tensors_of(self.files["model"][-1])


def state_of(content: bytes) -> dict[str, Any]:
    state: dict[str, Any] = unpacked(content)["state"]
    return state


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    return with_values(recipe, {f"train.{name}": value for name, value in fields.items()})


def assert_same_run(run: Run, whole: Run) -> None:
    """To the bit, but for times and memory: the last state, the weights, the result."""
    assert_same_bits(run.state, whole.state)
    assert_same_bits(run.weights, whole.weights)
    assert repr(run.result.evaluations) == repr(whole.result.evaluations)  # repr for NaN
    assert repr(run.result.probes) == repr(whole.result.probes)
    same = ("status", "reason", "steps_run", "steps_to_target", "first_hit", "running_statistics")
    assert [getattr(run.result, name) for name in same] == [getattr(whole.result, name) for name in same]


# --- bit for bit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*RUNS, pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    recipe = changed(recipe_of("momentum"), compile=True) if name == "compiled" else recipe_of(name)
    whole, saving = Run(recipe), Run(changed(recipe, checkpoint={"every": 1}))
    assert_same_run(saving, whole)
    (tmp_path / MODEL).write_bytes(whole.files["model"][0])
    last, evaluated = whole.result.evaluations[-1], evaluate_weights(tmp_path, "cpu", None, True)
    assert (evaluated.step, evaluated.accuracy, evaluated.loss) == (last.step, last.accuracy, last.loss)
    contents = saving.files["checkpoint"]
    steps = [state_of(content)["step"] for content in contents]
    assert steps == list(range(1, STEPS + 1))
    for place in range(STEPS) if name == "momentum" else (4, 12):  # at an evaluation, and within an epoch
        torch.manual_seed(place)  # what else the process does must not matter
        again = Run(recipe, checkpoint=contents[place])
        assert_same_run(again, whole)
        assert isinstance(again.events[0], RunStarted)
        assert again.found() == whole.found(steps[place])


@pytest.mark.parametrize("statistics", ["running", "precise"])
def test_a_run_can_be_stopped_within_each_of_its_evaluations(statistics: str) -> None:
    data = {**TINY["data"], "held_out": 2**15 + 100}  # three chunks
    recipe = changed(tiny(data=data), steps=15, population_statistics=statistics, stop_at_target=False)
    whole = Run(recipe)
    content, steps = None, []
    for most in itertools.count(1):  # times that a part of the run may ask, in evaluations and after steps
        asked = itertools.count(1)
        part = Run(recipe, stop=lambda asked=asked, most=most: next(asked) == most, checkpoint=content)
        if part.result.status != "interrupted":
            break
        assert part.files["model"] == []
        content = part.files["checkpoint"][-1]
        steps.append((part.result.steps_run, len(part.result.evaluations)))
    assert {(0, 0), (5, 1)} <= set(steps)  # within the first evaluation and the second
    assert_same_run(part, whole)


def test_a_checkpoint_between_an_update_and_its_evaluation_says_so_by_its_evaluations() -> None:
    data = {**TINY["data"], "held_out": 2**15}  # two chunks, between which `stop` is called once
    recipe = changed(tiny(data=data), steps=10, target=None)
    first = Run(recipe, stop=lambda: True)
    assert (first.result.status, first.result.evaluations, first.result.final) == ("interrupted", (), None)
    assert state_of(first.files["checkpoint"][0])["step"] == 0
    assert_same_run(Run(recipe, checkpoint=first.files["checkpoint"][0]), Run(recipe))


def test_a_model_of_the_users_own_is_evaluated_to_the_end_before_it_stops() -> None:
    recipe = recipe_of("a model of the user's own")
    stopped = Run(recipe, stop=lambda: True)
    assert [each.step for each in stopped.result.evaluations] == [0]
    assert (stopped.result.status, stopped.result.steps_run) == ("interrupted", 1)


def test_a_run_that_diverged_ends_at_once_as_it_did() -> None:
    sgd = {"kind": "sgd", "lr": 1e30}
    recipe = tiny(optimizer=sgd, norm={"kind": "none"})
    whole = Run(recipe)
    assert whole.result.status == "diverged"
    assert_same_run(Run(recipe, checkpoint=whole.files["checkpoint"][-1]), whole)


# --- when it is saved ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "steps"),
    [(None, [20]), ({"every": 7}, [7, 14, 20]), ({"every": 10}, [10, 20]), ({"seconds": 1e-9}, list(range(1, 21))),
     ({"seconds": 1e9}, [20])],
)  # fmt: skip
def test_checkpoints_are_taken_every_so_many_steps_or_seconds_and_at_the_end(checkpoint: Any, steps: list[int]) -> None:
    run = Run(changed(recipe_of("momentum"), checkpoint=checkpoint))
    assert [state_of(content)["step"] for content in run.files["checkpoint"]] == steps
    assert run.result.checkpoint_s > 0
    assert len(run.files["model"]) == 1


def test_a_checkpoint_follows_all_that_was_found_at_its_step(folder: Path) -> None:
    recipe = changed(with_values(recipe_of("momentum"), {"probes": {"at": 5}}), checkpoint={"every": 5})
    order: list[Any] = []
    save: Any = {"checkpoint": lambda _: order.append("saved")}
    for event in train(recipe, "cpu", threads=1, save=save):
        order += [type(event).__name__] if isinstance(event, Evaluated | Probed) else []
    assert order == ["Evaluated", "Probed", *["Evaluated", "Probed", "saved"] * 4]


# --- which run it is of -------------------------------------------------------------------------------------------


def test_a_run_goes_on_beyond_its_first_end() -> None:
    recipe, longer = recipe_of("momentum"), changed(recipe_of("momentum"), steps=33)
    first, whole = Run(recipe), Run(changed(longer, evaluate_every=5))
    again = Run(longer, checkpoint=first.files["checkpoint"][-1])
    assert [each.step for each in again.result.evaluations] == [0, 5, 10, 15, 20, 25, 30, 33]
    assert_same_bits(again.weights, whole.weights)
    shorter = Run(
        changed(recipe, steps=24), checkpoint=Run(changed(longer, checkpoint={"every": 22})).files["checkpoint"][0]
    )
    assert [each.step for each in shorter.result.evaluations] == [0, 5, 10, 15, 20, 24]


def test_a_run_that_reached_its_target_goes_on_only_where_it_is_not_to_stop_there() -> None:
    recipe = changed(recipe_of("momentum"), target={"value": 0.01}, stop_at_target=True)
    first = Run(recipe)
    again = Run(changed(recipe, steps=40), checkpoint=first.files["checkpoint"][-1])
    assert first.result.status == again.result.status == "reached"
    assert again.result.steps_run == first.result.steps_run < STEPS
    further = changed(recipe, stop_at_target=False)
    assert_same_run(Run(further, checkpoint=first.files["checkpoint"][-1]), Run(further))


def refusal(recipe: Recipe, content: bytes, **arguments: Any) -> str:
    with pytest.raises(UsageError) as raised:
        Run(recipe, checkpoint=content, **arguments)
    assert raised.value.field == "resume"
    return str(raised.value)


def test_a_checkpoint_of_another_run_is_refused_with_all_that_differs() -> None:
    recipe = recipe_of("momentum")
    content = Run(recipe).files["checkpoint"][0]
    other = with_values(recipe, {"optimizer.lr": 0.2, "train.seed": 7, "train.keep": "both"})
    assert refusal(other, content, threads=3).splitlines() == [
        "resume: optimizer.lr was 0.1 when the run began, and is 0.2 now",
        "resume: train.seed was 0 when the run began, and is 7 now",
        "resume: threads was 1 when the run began, and is 3 now",
    ]
    assert "train.steps is 12, and the run is at step 20" in refusal(changed(recipe, steps=12), content)
    cosine = recipe_of("schedule")
    assert "train.steps was 20 when the run began, and is 40 now, over which a cosine schedule is spread" in refusal(
        changed(cosine, steps=40), Run(cosine).files["checkpoint"][0]
    )


@pytest.mark.parametrize("name", ["bncli", "torch", "device", "the digest of the data"])
def test_a_checkpoint_of_other_versions_devices_or_data_is_refused(name: str) -> None:
    recipe = recipe_of("momentum")
    contents = unpacked(Run(recipe).files["checkpoint"][0])
    now, contents["origin"][name] = contents["origin"][name], "other"
    assert f"{name} was other when the run began, and is {now} now" in refusal(recipe, packed(contents))


def test_a_model_whose_code_has_changed_does_not_go_on(folder: Path) -> None:
    recipe = recipe_of("a model of the user's own")
    content = Run(recipe).files["checkpoint"][0]
    (folder / "mine.py").write_text((folder / "mine.py").read_text() + "# changed\n")
    assert "mine.py, which the run has loaded, has changed or is not there" in refusal(recipe, content)


def test_the_number_of_threads_is_that_of_the_checkpoint() -> None:
    recipe = changed(recipe_of("momentum"), steps=3, evaluate_every=3)
    first = Run(changed(recipe, checkpoint={"every": 1}), threads=2)
    again = Run(recipe, checkpoint=first.files["checkpoint"][0], threads=None)
    assert again.result.environment.threads == 2
    assert_same_run(again, first)


# --- what is no checkpoint ----------------------------------------------------------------------------------------


class Opened:
    """What a pickle of it would call."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return open, ("opened", "w")


def test_nothing_but_a_whole_checkpoint_is_taken_and_no_code_of_it_is_run(folder: Path) -> None:
    recipe = recipe_of("momentum")
    good = Run(recipe).files["checkpoint"][0]
    contents = unpacked(good)
    compressed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(good[START:])) as old,
        zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in range(0, len(good), 997)]
    bad = [
        b"", b"\n", b"x" * 1000, good[:50], good[:START], good[:-1], good + b"x", good[START:], *flipped,
        first_line(compressed.getvalue()) + compressed.getvalue(), first_line(b"text") + b"text",
        packed(contents | {"state": Opened()}), packed(contents | {"code": {"mine.py": Opened()}}),
        packed({"state": {}}), packed(contents | {"state": {}}), packed(contents | {"state": 3}),
        packed(contents | {"origin": contents["origin"] | {"threads": -1}}),
        packed(contents | {"state": contents["state"] | {"optimizer": {}}}),
        packed(contents | {"state": contents["state"] | {"model": {}}}),
    ]  # fmt: skip
    for content in bad:
        with pytest.raises(FileError):
            Run(recipe, checkpoint=content)
    assert not (folder / "opened").exists()


def first_line(body: bytes) -> bytes:
    return FORMAT + hashlib.sha256(body).hexdigest().encode() + b"\n"


def test_a_model_with_a_state_that_is_no_plain_data_trains_without_checkpoints(own_recipe: OwnRecipe) -> None:
    extra = """
class Odd(nn.Linear):
    def get_extra_state(self): return {value}
    def set_extra_state(self, state): pass
def make(shape, classes, norm): return Odd(shape[0], classes)
"""
    plain, odd = (extra.format(value=value) for value in ("{'passes': 3}", "lambda: 3"))
    of_a_class = """
class Mine(torch.Tensor): pass
def make(shape, classes, norm):
    model = nn.Linear(shape[0], classes)
    model.register_buffer("mine", torch.ones(2).as_subclass(Mine), persistent=False)
    return model
"""
    train_fields = {"steps": 5, "target": None}
    with pytest.warns(UserWarning, match="a file of weights cannot hold _extra_state, which it leaves out"):
        kept = Run(own_recipe(plain, train=train_fields)).files["checkpoint"]
    with pytest.warns(UserWarning, match="leaves out"):
        again = Run(own_recipe(plain, train={**train_fields, "steps": 8}), checkpoint=kept[0])
    assert again.result.steps_run == 8
    for code, name in ((odd, "_extra_state"), (of_a_class, "mine")):
        with pytest.warns(UserWarning, match=f"no checkpoint is saved: the model's {name} is not plain data"):
            run = Run(own_recipe(code, train=train_fields))
        assert run.files["checkpoint"] == []
        assert run.result.status == "budget"
        assert set(run.weights) == {"weight", "bias"}
