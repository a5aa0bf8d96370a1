"""Ranks of one run: the same weights, figures and decisions as one process that has the whole batch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from bncli.engine.distributed import ALONE, LostRank, Ranks, joined
from bncli.engine.train import train
from bncli.errors import RecipeError, RunFailed
from bncli.recipe.sections import Recipe
from bncli.results.train import Event, RunFinished
from tests.conftest import tiny
from tests.ranks import Group, group, started


@pytest.fixture(scope="module")
def two() -> Iterator[Group]:
    with group(2) as made:
        yield made


@pytest.fixture(scope="module")
def three() -> Iterator[Group]:
    with group(3) as made:
        yield made


class Double(nn.Module):
    """A net in float64, on any input."""

    def __init__(self, shape: tuple[int, ...], classes: int, norm: Any, extra: str = "") -> None:
        super().__init__()
        norms = [norm(8) if norm else nn.Identity() for _ in range(2)]
        parts = [
            nn.Linear(shape[0], 8),
            norms[0],
            nn.ReLU(),
            nn.Linear(8, 8),
            norms[1],
            nn.Tanh(),
            nn.Linear(8, classes),
        ]
        self.net = nn.Sequential(*parts).double()
        self.extra = extra
        if extra == "unused":
            self.spare = nn.Linear(3, 3)
        if extra == "thaws":
            self.net[0].weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.extra == "thaws" and self.training:
            self.net[0].weight.requires_grad_()
        y: Tensor = self.net(x.double())
        return y


def double(norm: Any = "none", extra: str = "", **train_fields: Any) -> Recipe:
    own = {"kind": "module", "module": f"{__name__}:Double", "arguments": {"extra": extra}}
    fields = {"steps": 12, "batch_size": 21, "evaluate_every": 4, "target": None} | train_fields
    section = {"kind": norm} if isinstance(norm, str) else norm
    return tiny(model=own, norm=section, optimizer={"kind": "sgd", "lr": 0.1, "momentum": 0.9}, train=fields)


Found = tuple[list[Event], dict[str, bytes]]


def trained(recipe: Recipe, in_ranks: bool = True, stops: tuple[int, int] = (0, 0), **options: Any) -> Found:
    """The events of a run and what it saves. stops: on which rank, and after which step, it is to stop."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu")) if in_ranks else ALONE
    saved: dict[str, bytes] = {}
    save = {name: partial(saved.__setitem__, name) for name in ("checkpoint", "model")}
    calls = list[int]()

    def stop() -> bool:
        calls.append(0)
        return stops == (ranks.rank, len(calls))

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        events = list(
            train(recipe, "cpu", stop=stop, save={} if ranks.rank else save, ranks=ranks, threads=1, **options)
        )
    return events, saved | {"warned": "; ".join(str(each.message) for each in warned).encode()}


def figures(found: Found) -> list[tuple[float, ...]]:
    """Step, accuracy, loss and training loss of each evaluation."""
    last = found[0][-1]
    assert isinstance(last, RunFinished)
    return [(each.step, each.accuracy, each.loss, each.train_loss or 0.0) for each in last.result.evaluations]


def weights(found: Found) -> dict[str, Tensor]:
    import safetensors.torch

    return safetensors.torch.load(found[1]["model"])


SYNCHRONIZED = {
    "no norm": double(),
    "native": double({"kind": "batch", "sync": True}),
    "fused": double({"kind": "batch", "sync": True, "kernel": "fused"}),
    "whiten": double({"kind": "whiten", "sync": True}),
    "iternorm": double({"kind": "iternorm", "sync": True}),
    "micro-batches": double({"kind": "batch", "sync": True}, accumulate=3, clip_gradients=0.5, label_smoothing=0.1),
    "unused weights": double({"kind": "batch", "sync": True}, "unused"),
}


@pytest.mark.parametrize(
    ("size", "kind"), [*(("two", kind) for kind in SYNCHRONIZED), ("three", "native"), ("three", "micro-batches")]
)
def test_ranks_train_what_one_process_trains(request: pytest.FixtureRequest, size: str, kind: str) -> None:
    recipe = SYNCHRONIZED[kind]
    alone, together = trained(recipe, in_ranks=False), request.getfixturevalue(size)(trained, recipe)
    assert [figures(each) for each in together] == [figures(together[0])] * len(together)
    for expected, found in zip(figures(alone), figures(together[0]), strict=True):
        assert found[:2] == expected[:2]
        assert found[2:] == pytest.approx(expected[2:], rel=1e-6)  # of float32 logits, in evaluation
    for name, expected in weights(alone).items():
        torch.testing.assert_close(weights(together[0])[name], expected, rtol=1e-12, atol=1e-12)
    result = together[0][0][-1].result
    assert (result.ranks, result.synchronized) == (len(together), None if kind == "no norm" else True)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["native", "fused"])
def test_a_compiled_model_trains_alike(two: Group, kernel: str) -> None:
    fields = {"steps": 12, "batch_size": 21, "target": None}
    recipe = tiny(norm={"kind": "batch", "sync": True, "kernel": kernel}, train=fields | {"compile": True})
    alone, together = trained(tiny(norm={"kind": "batch"}, train=fields), in_ranks=False), two(trained, recipe)[0]
    for name, expected in weights(alone).items():
        torch.testing.assert_close(weights(together)[name], expected, rtol=1e-4, atol=1e-5)


DRAWS = {"kind": "mlp", "hidden": [16], "activation": "relu", "dropout": 0.3}
EACH_BY_ITSELF = tiny(model=DRAWS, optimizer={"kind": "adam", "lr": 0.01}, train={"batch_size": 15, "target": None})


def test_an_interrupted_run_goes_on_bit_for_bit_with_as_many_ranks(two: Group) -> None:
    whole = two(trained, EACH_BY_ITSELF)[0]
    stopped = two(trained, EACH_BY_ITSELF, True, (1, 23))
    assert [each[0][-1].result.status for each in stopped] == ["interrupted"] * 2
    assert [each[0][-1].result.steps_run for each in stopped] == [23, 23]
    resumed = two(Resumed(stopped[0][1]["checkpoint"]), EACH_BY_ITSELF)[0]
    assert figures(resumed) == figures(whole)
    for name, expected in weights(whole).items():
        assert torch.equal(weights(resumed)[name], expected)
    assert resumed[1]["warned"] == b""
    assert whole[0][-1].result.synchronized is False


def test_another_number_of_ranks_goes_on_with_a_warning(two: Group, three: Group) -> None:
    stopped = two(trained, EACH_BY_ITSELF, True, (0, 23))[0]
    resumed = three(Resumed(stopped[1]["checkpoint"]), EACH_BY_ITSELF)
    assert [each[0][-1].result.steps_run for each in resumed] == [60] * 3
    said = resumed[0][1]["warned"].decode()
    assert "began with 2 ranks and goes on with 3" in said
    assert "statistics are of other parts of a batch" in said


class Resumed:
    """`trained` from a checkpoint."""

    def __init__(self, checkpoint: bytes) -> None:
        self.checkpoint = checkpoint

    def __call__(self, recipe: Recipe) -> Found:
        return trained(recipe, checkpoint=self.checkpoint)


def refused(recipe: Recipe) -> str:
    with pytest.raises((RecipeError, RunFailed)) as error:
        trained(recipe)
    return str(error.value)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (tiny(train={"batch_size": 2}), "train.batch_size: has no example for each of 3 ranks"),
        (tiny(train={"batch_size": 4}), "one value to average over"),
        (tiny(norm={"kind": "ghost", "size": 10}), "slices of 10 examples do not divide the batch of 6"),
        (double({"kind": "batch", "sync": True}, "thaws"), "the ranks have different weights"),
    ],
)
def test_what_ranks_cannot_train_is_refused_on_all_of_them(three: Group, recipe: Recipe, reason: str) -> None:
    for said in three(refused, recipe):
        assert reason in said


def test_precise_statistics_and_probes_are_those_of_one_process(two: Group) -> None:
    fields = {"population_statistics": "precise", "population_batches": 3, "target": None, "steps": 10}
    recipe = tiny(norm={"kind": "batch", "sync": True}, train=fields, probes={"measure": "all", "at": 10})
    alone, together = trained(recipe, in_ranks=False), two(trained, recipe)[0]
    for expected, found in zip(figures(alone), figures(together), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    for expected, found in zip(alone[0][-1].result.probes, together[0][-1].result.probes, strict=True):
        assert (found.measure, found.layer, found.step) == (expected.measure, expected.layer, expected.step)
        assert found.values == pytest.approx(expected.values, rel=1e-2, abs=1e-4)


def test_other_errors_than_a_lost_connection_pass() -> None:
    with pytest.raises(LostRank, match="another rank has ended"), ALONE.connected():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="of the user's model"), ALONE.connected():
        raise RuntimeError("of the user's model")


def ended(pipe: Connection, act: str) -> None:
    """Join, do something, and send how it ended."""
    try:
        with joined("cpu", timeout_s=1) as ranks:
            if act == "raise alike":
                raise RunFailed("the same words")
            if act == "hang" and ranks.rank:
                time.sleep(60)
            with ranks.connected():
                ranks.any(lambda: False)
    except BaseException as error:
        pipe.send(f"{type(error).__name__} {error}")
    time.sleep(30)  # rank 0 has the store; under torchrun the launcher has it, and outlives the ranks


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("raise alike", ["RunFailed the same words", "SystemExit 1"]),
        ("hang", ["LostRank another rank has ended, or did not answer"]),
    ],
)
def test_the_end_of_ranks_is_said_once_and_in_time(act: str, words: list[str]) -> None:
    pipes, processes = started(ended, 2, act)
    for pipe, expected in zip(pipes, words, strict=False):
        assert pipe.poll(30)
        assert pipe.recv().startswith(expected)
    for process in processes:
        process.kill()


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_share_a_batch_without_overlap(count: int) -> None:
    batch = torch.arange(21)
    parts = [Ranks(rank, count).part(batch, 3) for rank in range(count)]
    assert torch.cat(parts).sort().values.equal(batch)
    for part in parts:  # a slice of each micro-batch, in its order
        assert [len(each) for each in part.chunk(3)] == [len(part) // 3] * 3
        assert part.div(7, rounding_mode="floor").equal(torch.arange(3).repeat_interleave(len(part) // 3))
