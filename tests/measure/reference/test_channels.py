"""Large cases: the kernel runs on all channels, and some of them are judged."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli.measure.reference import channels
from bncli.measure.reference.candidate import by_name
from bncli.measure.reference.case import Case as ReferenceCase
from bncli.measure.reference.case import timed
from bncli.measure.reference.channels import large
from bncli.measure.reference.judge import Evidence, judged
from bncli.measure.timing import clock
from bncli.results.profile import Case

CPU = torch.device("cpu")
NATIVE = by_name("native")


def test_native_is_right_however_many_threads_and_channels_it_adds_over() -> None:
    """In channels_last torch's sums over 25,088 values err twice as much on two threads as on one."""
    case = timed(Case((32, 32, 28, 28), "bn", "fp32", "channels_last"))
    with clock.threads(2):
        assert not large(case, CPU).judge(NATIVE, "native").wrong


def test_where_native_finds_no_room_for_all_channels_others_are_judged_by_some(monkeypatch: pytest.MonkeyPatch) -> None:
    case = timed(Case((2, 5, 512, 128), "bn", "fp32"))

    def no_room(x: Tensor, *others: Any) -> Tensor:
        if x.shape == case.shape:
            raise torch.OutOfMemoryError
        return NATIVE(x, *others)

    with monkeypatch.context() as patched:
        patched.setattr(channels, "native_in_the_same_dtype", lambda: no_room)
        found = large(case, CPU)
    assert set(found.native) == {"forward", "running_mean", "running_var", "dx", "dweight", "dbias"}
    assert not found.judge(NATIVE, "own function").wrong


# --- what is seen of channels that are not judged ---------------------------------------------------------------------

CASE = ReferenceCase("train", "float32", "channels_last", (4, 9, 16, 16))
MOST = 3 * CASE.m  # three channels of the nine are judged: 0, 4 and 8
JUDGED, UNJUDGED = 4, 6


@pytest.fixture(scope="module")
def held() -> channels.Large:
    return large(CASE, CPU, most_elements=MOST)


def after(change: Callable[[tuple[Any, ...], Tensor], Tensor]) -> Callable[..., Tensor]:
    """Native's kernel, and then a change of what it was given or of what it gave."""
    return lambda *given: change(given, NATIVE(*given))


def spoilt(channel: int, value: float) -> Callable[..., Tensor]:
    """The last example's last position of that channel is another number."""

    def change(given: tuple[Any, ...], y: Tensor) -> Tensor:
        wrong = torch.zeros_like(y)
        wrong[-1, channel, -1, -1] = value
        return y + wrong

    return after(change)


def test_the_first_the_last_and_the_channels_between_are_judged(held: channels.Large) -> None:
    assert held.channels.tolist() == [0, JUDGED, 8]
    assert held.part.x.shape == (4, 3, 16, 16)
    assert torch.equal(held.part.x, held.given.x[:, [0, JUDGED, 8]].double())
    assert large(CASE, CPU, most_elements=9 * CASE.m).channels.tolist() == list(range(9))
    assert len(large(CASE, CPU, most_elements=1).channels) == channels.FEWEST_CHANNELS


@pytest.mark.parametrize("poison", [True, False])
def test_a_right_kernel_is_right(held: channels.Large, poison: bool) -> None:
    assert held.judge(NATIVE, "native", poison=poison).wrong is None
    assert held.judge(by_name("fused"), "kernel", poison=poison).wrong is None


@pytest.mark.parametrize("channel", [0, JUDGED, 8])
def test_one_wrong_number_in_the_last_position_of_a_judged_channel_is_seen(held: channels.Large, channel: int) -> None:
    wrong = held.judge(spoilt(channel, 0.01), "own function").wrong
    assert wrong is not None
    assert (wrong.kind, wrong.quantity) == ("off", "forward")
    assert wrong.at == (3, held.channels.tolist().index(channel), 15, 15)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_is_seen_in_a_channel_that_is_not_judged(held: channels.Large, value: float) -> None:
    wrong = held.judge(spoilt(UNJUDGED, value), "own function").wrong
    assert wrong is not None
    assert (wrong.kind, wrong.quantity) == ("nan_unexpected", "forward")
    assert held.judge(spoilt(UNJUDGED, 0.01), "own function").wrong is None  # a wrong number there is not


@pytest.mark.parametrize(("argument", "name"), [(0, "x"), (3, "weight"), (4, "bias"), (8, "residual")])
def test_an_input_that_changes_in_a_channel_that_is_not_judged_is_named(argument: int, name: str) -> None:
    def change(given: tuple[Any, ...], y: Tensor) -> Tensor:
        tensor = given[argument].data
        tensor.select(max(tensor.dim() - 3, 0), UNJUDGED).view(-1)[-1].neg_()
        return y

    held = large(ReferenceCase("train", "float32", "contiguous", (1, 9, 4, 4), "residual"), CPU, most_elements=48)
    assert UNJUDGED not in held.channels.tolist()
    wrong = held.judge(after(change), "own function").wrong
    assert wrong is not None
    assert (wrong.kind, wrong.names) == ("input_written", (name,))


def test_what_a_kernel_leaves_unwritten_is_seen() -> None:
    def change(given: tuple[Any, ...], y: Tensor) -> Tensor:
        kept = torch.ones_like(y, dtype=torch.bool)
        kept[:, UNJUDGED] = False
        return torch.where(kept, y, torch.empty_like(y).detach())

    held = large(CASE, CPU, most_elements=MOST)
    wrong = held.judge(after(change), "own function").wrong
    assert wrong is not None
    assert wrong.kind == "nan_unexpected"


def test_the_weights_are_positive_where_that_is_asked_for() -> None:
    plain, positive = (large(CASE, CPU, positive_weight=value, most_elements=MOST).given for value in (False, True))
    assert plain.weight is not None
    assert positive.weight is not None
    assert bool((plain.weight < 0).any())
    assert torch.equal(positive.weight, plain.weight.abs())
    other = large(CASE, CPU, seed=1, most_elements=MOST).given
    assert not torch.equal(other.x, plain.x)


def test_a_kernel_is_given_the_upstream_gradient_that_its_judged_channels_are_held_to() -> None:
    """Zero at the activation's kink."""
    held = large(ReferenceCase("train", "bfloat16", "contiguous", (4, 9, 16, 16), "relu"), CPU, most_elements=MOST)
    assert torch.equal(held.given.g[:, held.channels].double(), held.part.g)
    assert bool((held.part.g == 0).any())


def test_half_precision_is_held_to_twice_natives_own_error() -> None:
    held = large(timed(Case((8, 4, 28, 28), "bn+add+relu", "bf16")), CPU)
    expected = held.expected
    for name in ("forward", "dx"):
        for times, right in ((1.9, True), (2.1, False)):
            truth = expected.truth
            found = truth | {name: truth[name] + times * (held.native[name] - truth[name])}
            evidence = Evidence(expected.case, held.part, found, truth, expected.floors("kernel"))
            assert (judged(evidence, {}, held.native).wrong is None) is right
