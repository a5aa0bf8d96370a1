"""Teams of programs that meet at a barrier in memory, which only a GPU can run.

Graphs and streams: tests/benchmarks/hazards.py.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bncli.kernels.fused.tiling import Plan, plan
from bncli.kernels.layout import is_channels_last, sizes

triton_launch = pytest.importorskip("bncli.kernels.fused.triton_launch")

pytestmark = pytest.mark.cuda

EPS = 1e-5


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


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("held", [None, 1])
def test_teams_of_every_size_take_turns_on_the_same_counters(channels_last: bool, held: int | None) -> None:
    """Held to the same plan in two launches; with one tile held the rest overflows. Slices outnumber teams."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, dy = (torch.randn(32, 200, 48, 48, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(2))
    if channels_last:
        x, dy = (each.contiguous(memory_format=torch.channels_last) for each in (x, dy))
    count = triton_launch.processors(x.device).count
    for team in (2, 3, 5, 8, 31, 64, count - 1, count, 2):
        forward, backward = (planned(x, team, backward=each, held=held) for each in (False, True))
        found = both(x, dy, forward, backward)
        expected = both(x, dy, as_launches(forward), as_launches(backward))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
