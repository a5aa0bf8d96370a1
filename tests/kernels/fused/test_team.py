"""Teams of programs that meet at a barrier in memory: a model of the barrier, and teams where there is a GPU.

Graphs and streams: tests/benchmarks/hazards.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bncli.kernels.fused.tiling import Plan, plan
from bncli.kernels.layout import is_channels_last, sizes

triton_launch = pytest.importorskip("bncli.kernels.fused.triton_launch")

EPS = 1e-5

# --- the barrier, in all interleavings of its atomic operations ---------------------------------------------------

BARRIER = inspect.getsource(triton_launch.triton._barrier.fn).split("\n", 1)[1]  # without its decorator
Outcome = int | None  # the next atomic operation's increment, None after the barrier


class Paused(Exception):
    """The barrier's next atomic operation adds args[0]."""


def barrier_of(source: str) -> Callable[[int, int, tuple[int, ...]], Outcome]:
    """What program p of P does next in the kernel's barrier, after atomic operations with those results."""

    class Language:
        """Triton's language for one program, in plain integers."""

        def __init__(self, results: tuple[int, ...]) -> None:
            self.results = list(results)

        def debug_barrier(self) -> None:
            """Threads of one program, of which the model has one."""

        def where(self, condition: bool, one: int, other: int) -> int:
            return one if condition else other

        def atomic_add(self, pointer: None, value: int, **_: str) -> int:
            if not self.results:
                raise Paused(value)
            return self.results.pop(0)

    @cache
    def outcome(p: int, P: int, results: tuple[int, ...]) -> Outcome:
        names: dict[str, Any] = {"tl": Language(results)}
        exec(source, names)
        try:
            names["_barrier"](None, p, P)
        except Paused as paused:
            return int(paused.args[0])
        return None

    return outcome


def faults(source: str, P: int, rounds: int, start: int) -> set[str]:
    """What goes wrong when P programs pass the barrier some times, in any order; counters are of 32 bits.

    A program's state is the number of rounds it has passed, and what its arrival returned.
    """
    outcome, found = barrier_of(source), set()
    first = (start, ((0, ()),) * P)
    seen, left = {first}, [first]
    while left:
        counter, programs = left.pop()
        moves = []
        for p, (passed, arrival) in enumerate(programs):
            if passed == rounds:
                continue
            total = counter + (outcome(p, P, arrival) or 0)
            after = (total + 2**31) % 2**32 - 2**31
            if outcome(p, P, (*arrival, counter)) is not None:
                if not arrival:
                    moves.append((after, (*programs[:p], (passed, (counter,)), *programs[p + 1 :])))
                elif after != counter:
                    found.add("a poll changes the counter")
                continue
            if any(others < passed or (others == passed and not there) for others, there in programs):
                found.add("a program left before all had arrived")
            moves.append((after, (*programs[:p], (passed + 1, ()), *programs[p + 1 :])))
        if not moves and any(passed < rounds for passed, _ in programs):
            found.add("programs wait forever")
        if not moves and counter & 0x7FFFFFFF:
            found.add("the counter needs a reset")
        left += set(moves) - seen
        seen |= set(moves)
    return found


@pytest.mark.parametrize("start", [0, -(2**31)])
@pytest.mark.parametrize(("P", "rounds"), [(2, 3), (3, 3), (4, 3), (5, 2)])
def test_no_program_passes_the_barrier_early_or_waits_forever(P: int, rounds: int, start: int) -> None:
    assert faults(BARRIER, P, rounds, start) == set()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("(P - 2)", "(P - 1)"),
        ("(P - 2)", "(P - 3)"),
        ("0x7FFFFFFF", "0x3FFFFFFF"),
        ("p == 0", "p < 2"),
        (">= 0", "< 0"),
        ("arrived, 0,", "arrived, 1,"),
    ],
)
def test_a_wrong_barrier_is_found(right: str, wrong: str) -> None:
    assert BARRIER.count(right) == 1
    assert faults(BARRIER.replace(right, wrong), 3, 2, 0)


# --- on a GPU -----------------------------------------------------------------------------------------------------


def planned(x: Tensor, team: int, *, backward: bool, held: int | None = None) -> Plan:
    """The best plan's tiles with a team of that size, and as many teams as are resident at once."""
    on = triton_launch.processors(x.device)
    cut = plan(
        sizes(x), contiguous=not is_channels_last(x), itemsize=x.element_size(), backward=backward, processors=on
    )
    held = held or max(1, min(4 // (1 + backward), -(-cut.tiles // team)))
    return replace(cut, team=team, teams=min(cut.slices, on.count // team), held=held, barrier="grid")


def both(x: Tensor, dy: Tensor, forward: Plan, backward: Plan) -> tuple[Tensor, ...]:
    y, mean, var, _ = triton_launch.forward(x, None, None, None, None, EPS, "relu", False, plan=forward)
    dx, dweight, dbias, _ = triton_launch.backward(
        dy, x, None, None, None, (mean, var), None, EPS, "relu", False, False, plan=backward
    )
    return y, mean, var, dx, dweight, dbias


def as_launches(cut: Plan) -> Plan:
    return replace(cut, teams=cut.slices, barrier="launch")


@pytest.mark.cuda
@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("held", [None, 1])
def test_teams_of_every_size_take_turns_on_the_same_counters(
    channels_last: bool, held: int | None, device: str
) -> None:
    """Held to the same plan in two launches; with one tile held the rest overflows. Slices outnumber teams."""
    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip("needs a second GPU, which is not the current device")
    generator = torch.Generator(device).manual_seed(0)
    x, dy = (torch.randn(32, 200, 48, 48, device=device, dtype=torch.bfloat16, generator=generator) for _ in range(2))
    if channels_last:
        x, dy = (each.contiguous(memory_format=torch.channels_last) for each in (x, dy))
    count = triton_launch.processors(x.device).count
    for team in (2, 3, 5, 8, 31, 64, count - 1, count, 2):
        forward, backward = (planned(x, team, backward=each, held=held) for each in (False, True))
        found = both(x, dy, forward, backward)
        expected = both(x, dy, as_launches(forward), as_launches(backward))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
