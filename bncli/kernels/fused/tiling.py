"""Tiling of the fused kernel on a GPU: a plan for each shape, computed from its sizes alone. No Triton.

A slice (one channel of a contiguous tensor, or some channels of one that is channels last) belongs to a team of
programs. The plan gives their number, how much each keeps in registers, and how they synchronize: not at all, at a
barrier in memory, or at the end of a launch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

Barrier = Literal["none", "grid", "launch"]

ACCESS_BYTES = 16  # the widest access of one thread
THREADS_PER_WARP = 32
REGISTERS = 65_536  # per multiprocessor, from sm_80 to sm_100
MOST_LINES = 2**30  # per slice; the device counts lines in 32 bits and doubles them once
MOST_VALUES = 2**31 - 2**26  # per channel; the last program may reach past the end by a few million

# (warps, tiles held), from small to large: 4 to 96 KiB of registers a program, as far as compiles without spills, but
# for a few of the largest (python -m tests.kernels.fused.ahead_of_time --all). A tile is 16 bytes a thread. Planes by
# the bytes of their aligned runs, because the shorter those are the more registers go into addresses; forward holds x,
# backward x and dy by halves. Rows have vectors of eight channels beside their tiles, and take half the warps for
# them.
SMALL = ((4, 2), (4, 4))
TILINGS = (*SMALL, (16, 2), (16, 4), (16, 6), (16, 8), (16, 12))
PLANE_TILINGS = {
    "forward": {16: TILINGS, 8: TILINGS, 4: TILINGS[:-1], 2: TILINGS[:-2]},
    "backward": {16: TILINGS, 8: TILINGS[:-1], 4: TILINGS[:-1], 2: (*SMALL, (8, 4), (8, 8), (8, 12))},
}
EIGHT_WARPS = (*SMALL, (8, 4), (8, 8), (8, 12), (8, 16))
ROW_TILINGS = {  # for lines of 64 bytes and of 128
    "forward": ((*EIGHT_WARPS, (8, 22)), (*EIGHT_WARPS, (8, 22))),
    "backward": ((*EIGHT_WARPS, (8, 24)), (*EIGHT_WARPS, (8, 20))),
}
UNALIGNED_ROW_TILINGS = EIGHT_WARPS[:-1]  # for channels that are no multiple of 16 bytes: up to 48 KiB
SPLIT_TILINGS = ((4, 2), (4, 4), (8, 4))  # for two launches, which keep no registers in between
STREAMING = (4, 2)  # for frozen statistics

# Measured on an H200. A plan needs only their order of magnitude.
BYTES_PER_NS_PER_PROCESSOR = 32.0  # 4.3 TB/s of copying over 132 processors
SINGLE_PROCESSOR_SHARE = 2.0  # how many such shares one processor can use when others are idle
BARRIER_NS = 1_200.0  # a grid barrier (te42kyfo/gpu-benches measured 1.04 to 1.31 us on an H200)
LAUNCH_NS = 5_000.0  # a second launch from Python: 2.4 us on the stream, the rest in the interpreter
CACHE_BYTES = 24 * 2**20  # cache available to a second read: 40 MB of 60, which writes share
CACHED = 0.4  # time of a read from that cache relative to one from memory (9.5 and 3.9 TB/s, same source)
NARROW_BYTES = 64  # a narrow piece of a row; a wide one has twice that
NARROW = 1.07  # cost of a byte in 64-byte pieces relative to 128-byte pieces (Dao-AILab/quack: 5 to 7 %)


def registers(warps: int) -> int:
    """The maximum per thread. Without this limit the compiler spills, to make more programs resident."""
    return min(255, REGISTERS // (warps * THREADS_PER_WARP))


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
    price: float  # cost of a byte, 1 for wide accesses

    def tilings(self, streams: int) -> list[tuple[int, int]]:
        elements = self.unit if self.contiguous else self.columns
        unit_bytes = self.unit * self.line_bytes // elements
        return tilings(contiguous=self.contiguous, unit_bytes=unit_bytes, line_bytes=self.line_bytes, streams=streams)

    def most_programs(self, rows: int) -> int:
        """The largest team: a merge reads the lines of one tile, or up to eight times that for rows."""
        return rows if self.contiguous else 8 * rows

    def plan(self, *programs: Any) -> Plan:
        """programs: the fields that Plan adds."""
        return Plan(*vars(self).values(), *programs)

    def tile_lines(self, warps: int) -> int:
        return warps * THREADS_PER_WARP * ACCESS_BYTES // self.line_bytes


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
        return registers(self.warps)

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
    slicings = _slicings(shape, contiguous, itemsize)
    if frozen:
        return min((_streaming(slicing, processors) for slicing in slicings), key=lambda found: found.cost_ns)
    streams = 2 if backward else 1
    found = [
        candidate
        for slicing in slicings
        for candidates in (_one_program_each, _teams, _split)
        for candidate in candidates(slicing, streams, processors)
    ]
    return min(found, key=lambda candidate: candidate.cost_ns)


def _slicings(shape: tuple[int, int, int], contiguous: bool, itemsize: int) -> list[Slicing]:
    examples, channels, positions = shape
    widest = ACCESS_BYTES // itemsize
    if contiguous:
        unit = math.gcd(positions, widest)
        slicings = [Slicing(True, examples * positions // unit, unit, 1, channels, unit * itemsize, 1.0)]
    else:
        unit = math.gcd(channels, widest)
        enough = max(8, 1 << (channels - 1).bit_length())
        widths = {min(enough, max(8, line_bytes // itemsize)) for line_bytes in (NARROW_BYTES, 2 * NARROW_BYTES)}
        slicings = [
            Slicing(
                False, examples * positions, unit, columns, -(-channels // columns), columns * itemsize,
                NARROW if columns * itemsize <= NARROW_BYTES else 1.0,
            )
            for columns in sorted(widths)
        ]  # fmt: skip
    if slicings[0].lines > MOST_LINES or examples * positions > MOST_VALUES:
        raise ValueError(
            f"the fused kernel takes up to {MOST_VALUES:,} values per channel, in up to 2**30 aligned runs; "
            f"x {shape} has {examples * positions:,} in {slicings[0].lines:,}"
        )
    return slicings


def tilings(*, contiguous: bool, unit_bytes: int, line_bytes: int, streams: int) -> list[tuple[int, int]]:
    """(warps, tiles held of each stream), from small to large.

    unit_bytes: of an aligned run, which in a plane is a line. streams: 1 for forward, which holds x, 2 for backward,
    which holds x and dy.
    """
    direction = "forward" if streams == 1 else "backward"
    if contiguous:
        found = PLANE_TILINGS[direction][unit_bytes]
    elif unit_bytes < ACCESS_BYTES:
        found = UNALIGNED_ROW_TILINGS
    else:
        found = ROW_TILINGS[direction][line_bytes > NARROW_BYTES]
    return [(warps, held // streams) for warps, held in found]


def _one_program_each(slicing: Slicing, streams: int, processors: Processors) -> Iterator[Plan]:
    """One program per slice, with the smallest tiling that holds it."""
    for warps, held in slicing.tilings(streams):
        rows = slicing.tile_lines(warps)
        if rows * held >= slicing.lines:
            resident = processors.count * max(1, 16 // warps)
            waves = -(-slicing.slices // resident)
            cost = waves * _transfer_ns(slicing, streams, 1, min(slicing.slices, resident), processors)
            yield slicing.plan(rows, held, warps, 1, slicing.slices, "none", cost)
            return


def _teams(slicing: Slicing, streams: int, processors: Processors) -> Iterator[Plan]:
    """Teams of every size that the device can keep resident, with one program per multiprocessor."""
    if not processors.cooperative:
        return
    sizes = slicing.tilings(streams)
    for team in range(2, processors.count + 1):
        for warps, held in sizes:
            rows = slicing.tile_lines(warps)
            tiles = -(-slicing.lines // rows)
            largest = (warps, held) == sizes[-1] and team == processors.count
            if team > min(tiles, slicing.most_programs(rows)) or not (held * team >= tiles or largest):
                continue
            teams = min(slicing.slices, processors.count // team)
            reread = 1 - min(1.0, held * team / tiles)
            rounds = -(-slicing.slices // teams)
            once = _transfer_ns(slicing, streams, team, teams * team, processors)
            cost = rounds * (once * (1 + reread * streams / (streams + 1)) + BARRIER_NS)
            yield slicing.plan(rows, held, warps, team, teams, "grid", cost)
            break


def _split(slicing: Slicing, streams: int, processors: Processors) -> Iterator[Plan]:
    """Two launches with enough programs to fill the device, and no more per slice than a merge reads in a few steps."""
    for warps, held in SPLIT_TILINGS:
        rows, each = slicing.tile_lines(warps), held // streams
        tiles = -(-slicing.lines // rows)
        team = -(-tiles // each)
        if team <= slicing.most_programs(rows):
            break
    team = min(team, slicing.most_programs(rows))
    total = slicing.lines * slicing.line_bytes * slicing.slices
    from_memory = max(0.0, 1 - CACHE_BYTES / (total * streams))
    moved = total * slicing.price * (streams + 1 + streams * (CACHED + (1 - CACHED) * from_memory))
    cost = moved / (BYTES_PER_NS_PER_PROCESSOR * processors.count) + LAUNCH_NS
    yield slicing.plan(rows, each, warps, team, slicing.slices, "launch", cost)


def _streaming(slicing: Slicing, processors: Processors) -> Plan:
    warps, held = STREAMING
    rows = slicing.tile_lines(warps)
    tiles = -(-slicing.lines // rows)
    team = -(-tiles // held)
    cost = _transfer_ns(slicing, 1, team, slicing.slices * team, processors)
    return slicing.plan(rows, held, warps, team, slicing.slices, "none", cost)


def _transfer_ns(slicing: Slicing, streams: int, team: int, at_work: int, processors: Processors) -> float:
    """Time to read and write a program's part of a slice while `at_work` programs share the memory bandwidth."""
    moved = (streams + 1) * slicing.lines * slicing.line_bytes / team * slicing.price
    return moved / (BYTES_PER_NS_PER_PROCESSOR * min(SINGLE_PROCESSOR_SHARE, processors.count / at_work))
