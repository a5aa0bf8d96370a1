"""Tiling of the fused kernel on a GPU: a plan for each shape, computed from its sizes alone. No Triton.

A slice (one channel of a contiguous tensor, or some channels of one that is channels last) belongs to a team of
programs. The plan gives their number, how much each keeps in registers, and how they synchronize: not at all, at a
barrier in memory, or at the end of a launch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

Barrier = Literal["none", "grid", "launch"]

ACCESS_BYTES = 16  # the widest access of one thread
THREADS_PER_WARP = 32
REGISTERS = 128  # of a thread at most, so that 16 warps are resident on a multiprocessor, from sm_80 to sm_100
RESIDENT_WARPS = 16
MOST_LINES = 2**30  # per slice; the device counts lines in 32 bits and doubles them once
MOST_VALUES = 2**31 - 2**26  # per channel; the last program may reach past the end by a few million

# (warps, tiles held), from small to large: 4, 16 and 32 KiB a program, as far as compiles without spills. A tile is 16
# bytes a thread. Forward holds x, backward x and dy by halves.
TILINGS = ((4, 2), (8, 4), (8, 8))
ROW_BYTES = {64: 1.07, 128: 1.0}  # of a slice's piece of a row: the cost of a byte (Dao-AILab/quack: 5 to 7 %)

# Measured on an H200. A plan needs only their order of magnitude.
BYTES_PER_NS_PER_PROCESSOR = 32.0  # 4.3 TB/s of copying over 132 processors
SINGLE_PROCESSOR_SHARE = 2.0  # how many such shares one processor can use when others are idle
INSTRUCTIONS = (10.0, 18.0)  # an element of x, forward and backward, as compiled (tests.kernels.fused.ahead_of_time)
FIXED_INSTRUCTIONS = 400.0  # of each thread beside those
INSTRUCTIONS_PER_NS = 190.0  # of threads, a multiprocessor: 4 warps a cycle, 1.83 GHz, 0.8 of them issued
BARRIER_NS = 1_200.0  # a grid barrier (te42kyfo/gpu-benches measured 1.04 to 1.31 us on an H200)
LAUNCH_NS = 5_000.0  # a second launch from Python: 2.4 us on the stream, the rest in the interpreter
CACHE_BYTES = 24 * 2**20  # cache available to a second read: 40 MB of 60, which writes share
CACHED = 0.4  # time of a read from that cache relative to one from memory (9.5 and 3.9 TB/s, same source)


@dataclass(frozen=True)
class Processors:
    """A device's multiprocessors, and whether all programs of a grid can be made resident on them."""

    count: int
    cooperative: bool


@dataclass(frozen=True)
class Slicing:
    """One way to slice the channels of (N, C, S), before the slices are assigned to programs."""

    contiguous: bool  # (N, C, S) in memory; otherwise rows (N S, C), channels last
    lines: int  # per slice
    unit: int  # elements of an aligned run
    columns: int  # channels per slice: 1 for a contiguous tensor
    slices: int
    line_bytes: int
    itemsize: int
    price: float  # cost of a byte, 1 for wide accesses

    @property
    def tilings(self) -> tuple[tuple[int, int], ...]:
        return tilings(self.contiguous, self.unit * self.itemsize)

    def most_programs(self, rows: int) -> int:
        """The largest team: a merge reads the lines of one tile, or up to eight times that for rows."""
        return rows if self.contiguous else 8 * rows

    def plan(self, *programs: Any) -> Plan:
        """programs: the fields that Plan adds."""
        return Plan(*vars(self).values(), *programs)

    def tile_lines(self, warps: int) -> int:
        return warps * THREADS_PER_WARP * ACCESS_BYTES // self.line_bytes


def tilings(contiguous: bool, unit_bytes: int) -> tuple[tuple[int, int], ...]:
    """Those of TILINGS that fit: with an address for each two bytes the largest would spill."""
    return TILINGS[: 2 if contiguous and unit_bytes < 4 else 3]


@dataclass(frozen=True)
class Plan(Slicing):
    """How programs work on the slices. `str` describes it in words."""

    rows: int  # lines per tile
    held: int  # tiles that a program keeps in registers
    warps: int
    team: int  # programs per slice
    teams: int  # that work at the same time
    barrier: Barrier
    cost_ns: float

    @property
    def registers(self) -> int:
        """The maximum per thread."""
        return REGISTERS

    @property
    def resident(self) -> int:
        """Programs that a multiprocessor holds at a time."""
        return RESIDENT_WARPS // self.warps

    @property
    def tiles(self) -> int:
        return -(-self.lines // self.rows)

    @property
    def tiles_each(self) -> int:
        """Tiles per program; the last program of a team may have fewer."""
        return -(-self.tiles // self.team)

    @property
    def overflow(self) -> bool:
        return self.held * self.team < self.tiles

    @property
    def single_read(self) -> bool:
        """Whether each input tensor is read once."""
        return self.barrier != "launch" and not self.overflow

    @property
    def resident_share(self) -> float:
        """The share of the tensor that is read once."""
        return 0.0 if self.barrier == "launch" else min(1.0, self.held * self.team / self.tiles)

    def __str__(self) -> str:
        share = "a channel" if self.contiguous else f"{self.columns} channels"
        who = {
            "none": f"{self.slices:,} programs, {share} each",
            "grid": f"{self.teams} teams of {self.team} programs, {share} a team, a barrier in memory",
            "launch": f"{self.slices * self.team:,} programs, {share} to {self.team} of them, two launches",
        }[self.barrier]
        read = "read once" if self.single_read else "read twice"
        if self.barrier == "grid" and self.overflow:
            read = f"{self.resident_share:.0%} read once"
        return f"{who}, {read}; {self.warps} warps, {self.held} tiles in registers"


@lru_cache(maxsize=4096)
def plan(
    shape: tuple[int, int, int],
    *,
    contiguous: bool,
    itemsize: int,
    backward: bool,
    processors: Processors,
    frozen: bool = False,
) -> Plan:
    """The cheapest plan for x (N, C, S) of `itemsize` bytes an element.

    contiguous: whether x is; it is channels last otherwise. backward: x and dy are held. frozen: the statistics are
    constants, so no program waits. Raises ValueError for a channel with too many values.
    """
    widths = (ACCESS_BYTES,) if contiguous else tuple(ROW_BYTES)
    slicings = [_slicing(shape, contiguous, itemsize, width) for width in widths]
    if frozen:
        return min((_streaming(slicing, processors) for slicing in slicings), key=lambda found: found.cost_ns)
    streams = 2 if backward else 1
    ways = itertools.product((_one_program_each, _teams, _split), slicings)
    found = itertools.chain.from_iterable(way(slicing, streams, processors) for way, slicing in ways)
    return min(found, key=lambda candidate: candidate.cost_ns)


def _slicing(shape: tuple[int, int, int], contiguous: bool, itemsize: int, line_bytes: int) -> Slicing:
    """line_bytes: the most of a row's piece."""
    examples, channels, positions = shape
    unit = math.gcd(positions if contiguous else channels, ACCESS_BYTES // itemsize)
    enough = max(8, 1 << (channels - 1).bit_length())
    columns = 1 if contiguous else min(enough, max(8, line_bytes // itemsize))
    width = (unit if contiguous else columns) * itemsize
    lines = examples * positions // (unit if contiguous else 1)
    if lines > MOST_LINES or examples * positions > MOST_VALUES:
        raise ValueError(
            f"the fused kernel takes up to {MOST_VALUES:,} values per channel, in up to 2**30 aligned runs; "
            f"x {shape} has {examples * positions:,} in {lines:,}"
        )
    price = 1.0 if contiguous or width > 64 else ROW_BYTES[64]
    return Slicing(contiguous, lines, unit, columns, -(-channels // columns), width, itemsize, price)


def _one_program_each(slicing: Slicing, streams: int, processors: Processors) -> Iterator[Plan]:
    """One program per slice, with the smallest tiling that holds it."""
    for warps, held in slicing.tilings:
        rows, each = slicing.tile_lines(warps), held // streams
        if rows * each >= slicing.lines:
            at_work = min(slicing.slices, processors.count * (RESIDENT_WARPS // warps))
            cost = -(-slicing.slices // at_work) * _time_ns(slicing, streams, warps, 1, at_work, processors)
            yield slicing.plan(rows, each, warps, 1, slicing.slices, "none", cost)
            return


def _teams(slicing: Slicing, streams: int, processors: Processors) -> Iterator[Plan]:
    """Teams of every size that the device can keep resident. The largest leaves what it does not hold to a loop."""
    if not processors.cooperative:
        return
    for warps, held in slicing.tilings:
        rows, each = slicing.tile_lines(warps), held // streams
        tiles, resident = -(-slicing.lines // rows), processors.count * (RESIDENT_WARPS // warps)
        most = min(tiles, resident, slicing.most_programs(rows))
        least = most if (warps, held) == slicing.tilings[-1] else resident + 1
        for team in range(max(2, min(-(-tiles // each), least)), most + 1):
            teams = min(slicing.slices, resident // team)
            reread = 1 - min(1.0, each * team / tiles)
            once = _time_ns(slicing, streams, warps, team, teams * team, processors)
            once = once * (1 + reread * streams / (streams + 1)) + BARRIER_NS * warps / RESIDENT_WARPS
            cost = -(-slicing.slices // teams) * once
            yield slicing.plan(rows, each, warps, team, teams, "grid", cost)


def _split(slicing: Slicing, streams: int, processors: Processors) -> Iterator[Plan]:
    """Two launches with enough programs to fill the device, and no more per slice than a merge reads in a few steps."""
    warps, held = TILINGS[1]
    rows, each = slicing.tile_lines(warps), held // streams
    team = min(-(-slicing.lines // (rows * each)), slicing.most_programs(rows))
    total = slicing.lines * slicing.line_bytes * slicing.slices
    from_memory = max(0.0, 1 - CACHE_BYTES / (total * streams))
    moved = total * slicing.price * (streams + 1 + streams * (CACHED + (1 - CACHED) * from_memory))
    instructions = _instructions(slicing, streams, warps, team) * team * slicing.slices
    transfer = moved / (BYTES_PER_NS_PER_PROCESSOR * processors.count)
    computation = instructions / (INSTRUCTIONS_PER_NS * processors.count)
    cost = _overlapped_ns(transfer, computation, warps) + LAUNCH_NS
    yield slicing.plan(rows, each, warps, team, slicing.slices, "launch", cost)


def _streaming(slicing: Slicing, processors: Processors) -> Plan:
    warps, held = TILINGS[0]
    rows = slicing.tile_lines(warps)
    team = -(-slicing.lines // (rows * held))
    cost = _time_ns(slicing, 1, warps, team, slicing.slices * team, processors)
    return slicing.plan(rows, held, warps, team, slicing.slices, "none", cost)


def _time_ns(slicing: Slicing, streams: int, warps: int, team: int, at_work: int, processors: Processors) -> float:
    """Time of a program's part of a slice while `at_work` programs share the device."""
    part = slicing.lines * slicing.line_bytes / team
    share = processors.count / at_work
    transfer = (streams + 1) * part * slicing.price / (BYTES_PER_NS_PER_PROCESSOR * min(SINGLE_PROCESSOR_SHARE, share))
    computation = _instructions(slicing, streams, warps, team) / (INSTRUCTIONS_PER_NS * min(1.0, share))
    return _overlapped_ns(transfer, computation, warps)


def _instructions(slicing: Slicing, streams: int, warps: int, team: int) -> float:
    """Of all threads of one of a team's programs."""
    elements = slicing.lines * slicing.line_bytes / slicing.itemsize / team
    return elements * INSTRUCTIONS[streams - 1] + FIXED_INSTRUCTIONS * warps * THREADS_PER_WARP


def _overlapped_ns(transfer: float, computation: float, warps: int) -> float:
    """A program reads, computes and writes in turn, so it is only other resident programs that overlap the two."""
    return max(transfer, computation) + min(transfer, computation) * warps / RESIDENT_WARPS
