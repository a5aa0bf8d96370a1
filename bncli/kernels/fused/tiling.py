"""Tiling of the fused kernel on a GPU: a plan for each shape, by arithmetic on its sizes alone. No Triton.

A slice (one channel of a contiguous tensor, or some channels of one that is channels last) belongs to a team of
programs. The plan says how many they are, how much each keeps in registers, and what they wait at: nothing, a barrier
in memory, or the end of a launch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

Barrier = Literal["none", "grid", "launch"]

ACCESS_BYTES = 16  # of one thread, at its widest
THREADS_A_WARP = 32
REGISTERS = 65_536  # of a multiprocessor, from sm_80 to sm_100
MOST_LINES = 2**30  # of a slice; the device counts lines in 32 bits and doubles them once
MOST_VALUES = 2**31 - 2**26  # of a channel, whose last program may reach past its end by a few million

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
ROW_TILINGS = {  # of 64 bytes, and of 128
    "forward": ((*EIGHT_WARPS, (8, 22)), (*EIGHT_WARPS, (8, 22))),
    "backward": ((*EIGHT_WARPS, (8, 24)), (*EIGHT_WARPS, (8, 20))),
}
UNALIGNED_ROW_TILINGS = EIGHT_WARPS[:-1]  # whose channels are no multiple of 16 bytes: to 48 KiB
SPLIT_TILINGS = ((4, 2), (4, 4), (8, 4))  # of two launches, which hold nothing from one to the other
STREAMING = (4, 2)  # of given statistics

# Of an H200, where they decide; a plan needs only their order of magnitude.
BYTES_A_NS_A_PROCESSOR = 32.0  # 4.3 TB/s of copying over 132 processors
ALONE = 2.0  # what one processor can draw of that share when others are idle
BARRIER_NS = 1_200.0  # a grid barrier (te42kyfo/gpu-benches measured 1.04 to 1.31 us on an H200)
LAUNCH_NS = 5_000.0  # starting a second kernel from Python: 2.4 us of the stream's, the rest the interpreter's
CACHE_BYTES = 24 * 2**20  # of its cache that a second read can count on: 40 MB of 60, and writes pass through it too
CACHED = 0.4  # the time of a read from that cache, in reads from memory (9.5 against 3.9 TB/s, the same source)
NARROW_BYTES = 64  # of a row's piece; a wide one has twice that
NARROW = 1.07  # the price of a 64-byte piece of a row beside a 128-byte one (Dao-AILab/quack: 5 to 7 %)


def registers(warps: int) -> int:
    """The most that a thread can have. Without this limit the compiler spills, to let more programs be resident."""
    return min(255, REGISTERS // (warps * THREADS_A_WARP))


@dataclass(frozen=True)
class Processors:
    """A device's multiprocessors, and whether all programs of a grid can be made resident on them."""

    count: int
    cooperative: bool


@dataclass(frozen=True)
class Slicing:
    """One way to slice the channels of (N, C, S), before the slices are given to programs."""

    contiguous: bool  # (N, C, S) in memory; otherwise rows (N S, C), channels last
    lines: int  # of a slice
    unit: int  # elements of an aligned run
    columns: int  # channels of a slice: 1 of a contiguous tensor
    slices: int
    line_bytes: int  # of a slice's line
    price: float  # of a byte, 1 for wide accesses

    def tilings(self, streams: int) -> list[tuple[int, int]]:
        elements = self.unit if self.contiguous else self.columns
        unit_bytes = self.unit * self.line_bytes // elements
        return tilings(contiguous=self.contiguous, unit_bytes=unit_bytes, line_bytes=self.line_bytes, streams=streams)

    def most_programs(self, rows: int) -> int:
        """Of a team: a merge takes a tile's lines at once, and for rows, whose tiles are short, up to eight times."""
        return rows if self.contiguous else 8 * rows

    def plan(self, *programs: Any) -> Plan:
        """programs: the fields that Plan adds."""
        return Plan(*vars(self).values(), *programs)

    def tile_lines(self, warps: int) -> int:
        return warps * THREADS_A_WARP * ACCESS_BYTES // self.line_bytes


@dataclass(frozen=True)
class Plan(Slicing):
    """How programs work on the slices. `str` says it in words."""

    rows: int  # lines of a tile
    held: int  # tiles that a program keeps in registers
    warps: int
    team: int  # programs of a slice
    teams: int  # at work at the same time
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
        """How many a program has; the last one of a team may have fewer."""
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
        cut = "a channel" if self.contiguous else f"{self.columns} channels"
        who = {
            "none": f"{self.slices:,} programs, {cut} each",
            "grid": f"{self.teams} teams of {self.team} programs, {cut} a team, a barrier in memory",
            "launch": f"{self.slices * self.team:,} programs, {cut} to {self.team} of them, two launches",
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
    given: bool = False,
) -> Plan:
    """The cheapest plan for x (N, C, S) of `itemsize` bytes an element.

    contiguous: whether x is; it is channels last otherwise. backward: x and dy are held. given: the statistics are not
    the batch's, so nothing waits. Raises ValueError for a channel that is too long to count.
    """
    cuts = _cuts(shape, contiguous, itemsize)
    if given:
        return min((_streaming(cut, processors) for cut in cuts), key=lambda found: found.cost_ns)
    streams = 2 if backward else 1
    found = [
        candidate
        for cut in cuts
        for candidates in (_alone, _teams, _split)
        for candidate in candidates(cut, streams, processors)
    ]
    return min(found, key=lambda candidate: candidate.cost_ns)


def _cuts(shape: tuple[int, int, int], contiguous: bool, itemsize: int) -> list[Slicing]:
    examples, channels, positions = shape
    widest = ACCESS_BYTES // itemsize
    if contiguous:
        unit = math.gcd(positions, widest)
        cuts = [Slicing(True, examples * positions // unit, unit, 1, channels, unit * itemsize, 1.0)]
    else:
        unit = math.gcd(channels, widest)
        enough = max(8, 1 << (channels - 1).bit_length())
        widths = {min(enough, max(8, line_bytes // itemsize)) for line_bytes in (NARROW_BYTES, 2 * NARROW_BYTES)}
        cuts = [
            Slicing(
                False, examples * positions, unit, columns, -(-channels // columns), columns * itemsize,
                NARROW if columns * itemsize <= NARROW_BYTES else 1.0,
            )
            for columns in sorted(widths)
        ]  # fmt: skip
    if cuts[0].lines > MOST_LINES or examples * positions > MOST_VALUES:
        raise ValueError(
            f"the fused kernel takes up to {MOST_VALUES:,} values a channel, in up to 2**30 aligned runs; "
            f"x {shape} has {examples * positions:,} in {cuts[0].lines:,}"
        )
    return cuts


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


def _alone(cut: Slicing, streams: int, processors: Processors) -> Iterator[Plan]:
    """A program a slice, with the smallest tiling that holds it."""
    for warps, held in cut.tilings(streams):
        rows = cut.tile_lines(warps)
        if rows * held >= cut.lines:
            resident = processors.count * max(1, 16 // warps)
            waves = -(-cut.slices // resident)
            cost = waves * _transfer_ns(cut, streams, 1, min(cut.slices, resident), processors)
            yield cut.plan(rows, held, warps, 1, cut.slices, "none", cost)
            return


def _teams(cut: Slicing, streams: int, processors: Processors) -> Iterator[Plan]:
    """Teams of every size that the device can keep resident, one program a multiprocessor."""
    if not processors.cooperative:
        return
    sizes = cut.tilings(streams)
    for team in range(2, processors.count + 1):
        for warps, held in sizes:
            rows = cut.tile_lines(warps)
            tiles = -(-cut.lines // rows)
            largest = (warps, held) == sizes[-1] and team == processors.count
            if team > min(tiles, cut.most_programs(rows)) or not (held * team >= tiles or largest):
                continue
            teams = min(cut.slices, processors.count // team)
            reread = 1 - min(1.0, held * team / tiles)
            rounds = -(-cut.slices // teams)
            once = _transfer_ns(cut, streams, team, teams * team, processors)
            cost = rounds * (once * (1 + reread * streams / (streams + 1)) + BARRIER_NS)
            yield cut.plan(rows, held, warps, team, teams, "grid", cost)
            break


def _split(cut: Slicing, streams: int, processors: Processors) -> Iterator[Plan]:
    """Two launches, of enough programs to fill the device, and no more of a slice than a merge takes in a few steps."""
    for warps, held in SPLIT_TILINGS:
        rows, each = cut.tile_lines(warps), held // streams
        tiles = -(-cut.lines // rows)
        team = -(-tiles // each)
        if team <= cut.most_programs(rows):
            break
    team = min(team, cut.most_programs(rows))
    total = cut.lines * cut.line_bytes * cut.slices
    from_memory = max(0.0, 1 - CACHE_BYTES / (total * streams))
    moved = total * cut.price * (streams + 1 + streams * (CACHED + (1 - CACHED) * from_memory))
    cost = moved / (BYTES_A_NS_A_PROCESSOR * processors.count) + LAUNCH_NS
    yield cut.plan(rows, each, warps, team, cut.slices, "launch", cost)


def _streaming(cut: Slicing, processors: Processors) -> Plan:
    warps, held = STREAMING
    rows = cut.tile_lines(warps)
    tiles = -(-cut.lines // rows)
    team = -(-tiles // held)
    cost = _transfer_ns(cut, 1, team, cut.slices * team, processors)
    return cut.plan(rows, held, warps, team, cut.slices, "none", cost)


def _transfer_ns(cut: Slicing, streams: int, team: int, at_work: int, processors: Processors) -> float:
    """For a program's share of a slice, in and out, while `at_work` programs draw on the memory."""
    moved = (streams + 1) * cut.lines * cut.line_bytes / team * cut.price
    return moved / (BYTES_A_NS_A_PROCESSOR * min(ALONE, processors.count / at_work))
