"""The judge: kinds of wrong numbers, what is wrong with a call as a whole, and large cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli.engine.device import cpu_threads
from bncli.measure.reference import judge
from bncli.measure.reference.candidate import NATIVE, by_name, candidate
from bncli.measure.reference.case import Case, timed
from bncli.measure.reference.judge import (
    CheckContext,
    Evidence,
    Large,
    Outcome,
    compare,
    difference,
    large,
    number_kind,
    same_bits,
)
from bncli.results import profile
from bncli.results.finding import Finding

CPU = torch.device("cpu")
CASE = Case("train", "float32", "contiguous", (4, 3, 5))


def judged(kernel: str, case: Case = CASE) -> Outcome:
    own = candidate(f"tests.measure.reference.wrong_kernels:{kernel}", "batch", CPU, allow_code=True)
    context = CheckContext(own, CPU)
    return compare(context, *context.fresh(case))


@pytest.mark.parametrize(
    ("found", "expected", "kind"),
    [
        (1.0, 2.0, "off"),
        (1.0, math.inf, "off"),
        (1.0, math.nan, "nan_missing"),
        (math.nan, 2.0, "nan_unexpected"),
        (-math.inf, 2.0, "nan_unexpected"),
    ],
)
def test_a_wrong_number_has_a_kind(found: float, expected: float, kind: str) -> None:
    assert number_kind(found, expected) == kind


def test_the_largest_difference_ignores_places_where_both_are_nan() -> None:
    exact = torch.tensor([[0.0, math.nan], [3.0, 4.0]])
    found = torch.tensor([[0.5, math.nan], [3.0, 6.0]])
    assert difference("dx", found, exact, 7.0) == Finding(
        "off", "dx", 7.0, at=(1, 1), found=6.0, expected=4.0, relative=pytest.approx(math.hypot(0.5, 2) / 5)
    )
    assert difference("dx", torch.tensor([math.nan]), torch.ones(1), math.inf).relative is None
    assert difference("dx", found, exact, 7.0, floor=torch.tensor([[0.1, 0.1], [0.1, 1.0]])).at == (0, 0)


def test_a_right_kernel_is_right_in_every_quantity() -> None:
    outcome = judged("right")
    assert {finding.kind for finding in outcome.findings.values()} == {"right"}
    assert not any(finding.failed for finding in outcome.findings.values())


def test_a_wrong_gradient_is_off_at_a_place_and_the_output_is_right() -> None:
    findings = judged("statistics_constant").findings
    assert findings["forward"].kind == "right"
    wrong = findings["dx"]
    assert wrong.failed
    assert (wrong.kind, wrong.quantity) == ("off", "dx")
    assert wrong.at is not None
    assert len(wrong.at) == 3
    assert wrong.of_native is not None
    assert wrong.of_native > 100
    assert findings["double backward"].quantity.startswith("double backward in ")


def test_an_input_that_is_written_to_is_named() -> None:
    assert judged("writes_into_its_input").findings["forward"] == Finding("input_written", names=("x",))


def test_statistics_of_a_wrong_shape_are_reported_with_both_shapes() -> None:
    finding = judged("returns_y_alone").findings["dx"]
    assert (finding.kind, finding.given) == ("wrong_type", "Tensor")


def test_nan_is_equal_to_nan_and_nothing_to_nothing() -> None:
    nan = torch.tensor([1.0, math.nan])
    assert same_bits(nan, nan.clone())
    assert same_bits(None, None)
    assert not same_bits(nan, None)
    assert not same_bits(nan, torch.tensor([1.0, 2.0]))


# --- a large case -----------------------------------------------------------------------------------------------------


def test_native_is_right_however_many_threads_and_channels_it_adds_over() -> None:
    """In channels_last torch's sums over 25,088 values err twice as much on two threads as on one."""
    case = timed(profile.Case((32, 32, 28, 28), "bn", "fp32", "channels_last"))
    with cpu_threads(2):
        assert not large(case, CPU).judge(NATIVE, "native").wrong


def test_if_native_lacks_memory_it_runs_on_the_judged_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    case = timed(profile.Case((2, 5, 512, 128), "bn", "fp32"))

    def no_room(x: Tensor, *others: Any) -> Tensor:
        if x.shape == case.shape:
            raise torch.OutOfMemoryError
        return NATIVE(x, *others)

    with monkeypatch.context() as patched:
        patched.setattr(judge, "NATIVE", no_room)
        found = large(case, CPU)
    assert set(found.native) == {"forward", "running_mean", "running_var", "dx", "dweight", "dbias"}
    assert not found.judge(NATIVE, "own function").wrong


# --- what is seen of channels that are not judged ---------------------------------------------------------------------

NINE = Case("train", "float32", "channels_last", (4, 9, 16, 16))
MOST = 3 * NINE.m  # three channels of the nine are judged: 0, 4 and 8
JUDGED, UNJUDGED = 4, 6


@pytest.fixture(scope="module")
def held() -> Large:
    return large(NINE, CPU, most_elements=MOST)


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


def test_the_first_the_last_and_the_channels_between_are_judged(held: Large) -> None:
    assert held.channels.tolist() == [0, JUDGED, 8]
    assert held.part.x.shape == (4, 3, 16, 16)
    assert torch.equal(held.part.x, held.given.x[:, [0, JUDGED, 8]].double())
    assert large(NINE, CPU, most_elements=9 * NINE.m).channels.tolist() == list(range(9))
    assert len(large(NINE, CPU, most_elements=1).channels) == judge.FEWEST_CHANNELS


@pytest.mark.parametrize("poison", [True, False])
def test_a_right_kernel_is_right(held: Large, poison: bool) -> None:
    assert held.judge(NATIVE, "native", poison=poison).wrong is None
    assert held.judge(by_name("fused"), "kernel", poison=poison).wrong is None


@pytest.mark.parametrize("channel", [0, JUDGED, 8])
def test_one_wrong_number_in_the_last_position_of_a_judged_channel_is_seen(held: Large, channel: int) -> None:
    wrong = held.judge(spoilt(channel, 0.01), "own function").wrong
    assert wrong is not None
    assert (wrong.kind, wrong.quantity) == ("off", "forward")
    assert wrong.at == (3, held.channels.tolist().index(channel), 15, 15)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_is_found_in_a_channel_that_is_not_judged(held: Large, value: float) -> None:
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

    held = large(Case("train", "float32", "contiguous", (1, 9, 4, 4), "residual"), CPU, most_elements=48)
    assert UNJUDGED not in held.channels.tolist()
    wrong = held.judge(after(change), "own function").wrong
    assert wrong is not None
    assert (wrong.kind, wrong.names) == ("input_written", (name,))


def test_what_a_kernel_leaves_unwritten_is_seen() -> None:
    def change(given: tuple[Any, ...], y: Tensor) -> Tensor:
        kept = torch.ones_like(y, dtype=torch.bool)
        kept[:, UNJUDGED] = False
        return torch.where(kept, y, torch.empty_like(y).detach())

    held = large(NINE, CPU, most_elements=MOST)
    wrong = held.judge(after(change), "own function").wrong
    assert wrong is not None
    assert wrong.kind == "nan_unexpected"


def test_the_weights_are_positive_where_that_is_asked_for() -> None:
    plain, positive = (large(NINE, CPU, positive_weight=value, most_elements=MOST).given for value in (False, True))
    assert plain.weight is not None
    assert positive.weight is not None
    assert bool((plain.weight < 0).any())
    assert torch.equal(positive.weight, plain.weight.abs())
    other = large(NINE, CPU, seed=1, most_elements=MOST).given
    assert not torch.equal(other.x, plain.x)


def test_the_kernel_gets_the_upstream_gradient_of_the_judged_channels() -> None:
    """Zero at the activation's kink."""
    held = large(Case("train", "bfloat16", "contiguous", (4, 9, 16, 16), "relu"), CPU, most_elements=MOST)
    assert torch.equal(held.given.g[:, held.channels].double(), held.part.g)
    assert bool((held.part.g == 0).any())


def test_half_precision_allows_twice_the_native_error() -> None:
    held = large(timed(profile.Case((8, 4, 28, 28), "bn+add+relu", "bf16")), CPU)
    expected = held.expected
    for name in ("forward", "dx"):
        for times, right in ((1.9, True), (2.1, False)):
            truth = expected.truth
            found = truth | {name: truth[name] + times * (held.native[name] - truth[name])}
            evidence = Evidence(expected.case, held.part, found, truth, expected.floors("kernel"))
            assert (judge.judged(evidence, {}, held.native).wrong is None) is right
