"""Machine code of the fused kernel, compiled for GPUs that are not here: no spills, and accesses as wide as planned.

    python -m tests.kernels.fused.ahead_of_time [--capability 80 90 100] [--sample N | --all] [--match GLOB] [--json]
    python -m tests.kernels.fused.ahead_of_time --report [--json]

Triton compiles without a driver, and its wheel has the disassembler. Each compiler is a process of its own: Triton
compiles nothing where its interpreter is on, as in the tests, and a compiler that crashes ends one result alone.

The report has a line for each batch norm of ResNet-50: its plan, its machine code for sm_90, and a predicted speed.

Exit status: 0 every rule is kept, 1 a rule is broken, 2 a usage error.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, NamedTuple

from bncli.kernels.fused.tiling import (
    ACCESS_BYTES,
    BARRIER_NS,
    BYTES_PER_NS_PER_PROCESSOR,
    CACHE_BYTES,
    CACHED,
    INSTRUCTIONS_PER_NS,
    LAUNCH_NS,
    REGISTERS,
    ROW_BYTES,
    SINGLE_PROCESSOR_SHARE,
    THREADS_PER_WARP,
    TILINGS,
    Plan,
    Processors,
    plan,
    tilings,
)
from bncli.measure.profile.shapes import shape_set

CAPABILITIES = (90,)  # sm_90: H100, H200
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
# (activation, residual): what is fused; the residual itself is read back only for silu.
FUSED = (("none", False), ("relu", False), ("silu", False), ("none", True), ("relu", True), ("silu", True))
# The kernel's arguments in order, with their types; x stands for x's own.
ARGUMENTS = {
    "forward": {
        "x": "*x", "residual": "*x", "weight": "*fp32", "bias": "*fp32", "y": "*x", "mean": "*fp32", "var": "*fp32",
        "signs": "*u8", "running_mean": "*fp32", "running_var": "*fp32", "partial": "*fp32", "arrived": "*i32",
        "momentum": "fp32", "unbiased": "fp32",
    },
    "backward": {
        "dy": "*x", "x": "*x", "residual": "*x", "weight": "*fp32", "bias": "*fp32", "mean": "*fp32", "var": "*fp32",
        "signs": "*u8", "dx": "*x", "dr": "*x", "dweight": "*fp32", "dbias": "*fp32", "partial": "*fp32",
        "arrived": "*i32",
    },
}  # fmt: skip
INTEGERS = {"channels": "i32", "units": "i32", "magic": "i64"} | dict.fromkeys(
    ("shift", "opaque_zero", "L", "H", "P", "teams", "slices"), "i32"
)
WIDE_ACCESS = {"forward": ("x", "y"), "backward": ("x", "dy", "dx")}

# --- what is compiled -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What distinguishes one compilation of the kernel from another."""

    direction: str
    dtype: str
    contiguous: bool
    unit: int
    columns: int
    warps: int
    held: int
    stage: str
    activation: str
    residual: bool
    overflow: bool = False
    wide: bool = False  # of more than 2**31 elements: 64-bit addresses

    def __str__(self) -> str:
        layout = f"planes{self.unit}" if self.contiguous else f"rows{self.columns}by{self.unit}"
        stage = self.stage + ("+overflow" if self.overflow else "") + ("+wide" if self.wide else "")
        fused = self.activation + ("+residual" if self.residual else "")
        return f"{self.direction}/{self.dtype}/{layout}/{stage}/{fused}/{self.warps}x{self.held}"

    @property
    def arguments(self) -> dict[str, str]:
        """Name -> type of the arguments that are no constants, in order."""
        types = {name: kind.replace("*x", f"*{self.dtype}") for name, kind in ARGUMENTS[self.direction].items()}
        return types | INTEGERS

    @property
    def constants(self) -> dict[str, object]:
        forward = self.direction == "forward"
        line_bytes = (self.unit if self.contiguous else self.columns) * SIZES[self.dtype]
        found: dict[str, object] = {
            "FORM": {
                "R": self.threads * ACCESS_BYTES // line_bytes, "B": self.columns, "K": self.held,
                "UNIT": self.unit, "PLANES": self.contiguous, "WIDE": self.wide, "OVERFLOW": self.overflow,
            },
            "EPS": 1e-5, "STAGE": self.stage, "ACTIVATION": self.activation,
            "RESIDUAL": self.residual and (forward or self.activation == "silu"), "WEIGHT": True, "BIAS": True,
            "SIGNS": self.residual and self.activation == "relu",
        }  # fmt: skip
        if forward:
            return found | {"TRACK": self.stage in ("alone", "team", "normalize")}
        return found | {"RESIDUAL_GRADIENT": self.residual and self.activation != "none"}

    @property
    def threads(self) -> int:
        return self.warps * THREADS_PER_WARP

    @property
    def sample_bits(self) -> int:
        """The width at which 32 samples of each channel are read beside the tiles of x, in one instruction; or 0."""
        if self.direction == "backward" or self.stage == "frozen":
            return 0
        each = 1 if self.contiguous else max(1, 32 * self.columns // self.threads)
        return min(each, self.unit) * SIZES[self.dtype] * 8

    @property
    def least_bits(self) -> dict[str, int]:
        """Argument -> the least width of an access through it."""
        wide = [
            name for name in WIDE_ACCESS[self.direction] if self.stage != "statistics" or name in ("x", "dy")
        ]  # fmt: skip
        return dict.fromkeys(wide, self.unit * SIZES[self.dtype] * 8)


def choices() -> Iterator[Choice]:
    """Every compilation that a plan can ask for, in the types and layouts that networks train in.

    Left out as less of the same: no weight, no bias, leaky_relu for relu. Left out because it may spill: float64, which
    is for checks, and more than 2**31 elements.
    """
    for direction, (dtype, size), (activation, residual) in itertools.product(ARGUMENTS, SIZES.items(), FUSED):
        streams = 2 if direction == "backward" else 1
        units = [unit for unit in (8, 4, 2, 1) if unit * size <= ACCESS_BYTES]
        rows = [(unit, line // size) for unit in units for line in ROW_BYTES]
        for contiguous, unit, columns in [*((True, unit, 1) for unit in units), *((False, *each) for each in rows)]:
            kind = (direction, dtype, contiguous, unit, columns)
            sizes = [(warps, held // streams) for warps, held in tilings(contiguous, unit * size)]
            for (warps, held), stage in itertools.product(sizes, ("alone", "team")):
                yield Choice(*kind, warps, held, stage, activation, residual)
            yield Choice(*kind, *sizes[-1], "team", activation, residual, overflow=True)
            for stage, overflow in itertools.product(("statistics", "normalize"), (False, True)):
                yield Choice(*kind, *sizes[1], stage, activation, residual, overflow)
            yield Choice(*kind, *TILINGS[0], "frozen", activation, residual)


def sample(every: Sequence[Choice], n: int) -> list[Choice]:
    """About n of them, in their order: one of each direction and data type, the rest drawn from a fixed seed."""
    shuffled = random.Random(0).sample(every, len(every))
    kinds = {(each.direction, each.dtype): each for each in reversed(shuffled)}
    chosen = {*[*dict.fromkeys([*kinds.values(), *shuffled])][: max(n, len(kinds))]}
    return [each for each in every if each in chosen]


# --- what it becomes --------------------------------------------------------------------------------------------------

Widths = Mapping[int, int]  # bits of an access by one thread -> how many such instructions


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel in figures. Counts are of instructions in the text, not of executions."""

    registers: int
    stack_bytes: int
    spill_loads: int
    spill_stores: int
    loads: Widths  # from global memory, by the machine code
    stores: Widths
    loads_by_argument: Mapping[str, Widths]  # by PTX, which still tells where an address comes from
    stores_by_argument: Mapping[str, Widths]
    waits: bool  # for other programs: the kernel's only atomics are those of its barrier
    seconds: float
    shared_bytes: int = 0  # of a program
    instructions: int = 0  # of a thread on `full_path`
    loop_instructions: int = 0  # of those, in the loops over tiles that do not stay in registers
    bytes_in_flight: int = 0  # of a thread

    def resident(self, threads: int) -> int:
        """Programs of so many threads that a multiprocessor of sm_90 holds (CUDA C Programming Guide, table 27)."""
        registers = -(-self.registers // 8) * 8 * threads
        return min(65536 // registers, 2048 // threads, 32, 233472 // max(1, self.shared_bytes))


def read(
    listing: str, ptx: str, arguments: Mapping[str, str], seconds: float = 0.0, dynamic_shared_bytes: int = 0
) -> MachineCode:
    """listing: of `cuobjdump -sass --dump-resource-usage` (NVIDIA, CUDA Binary Utilities, for the names in it)."""
    widths: dict[str, Counter[int]] = defaultdict(Counter)
    for opcode, modifiers in re.findall(r"\b(LDG|STG|LDL|STL)((?:\.\w+)*)", listing):
        bits = re.search(r"\.[US]?(8|16|64|128|256)(?=\.|$)", modifiers)
        widths[opcode][int(bits[1]) if bits else 32] += 1
    resources = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", listing))
    loads, stores = by_argument(ptx, arguments)
    path = full_path(listing)
    return MachineCode(
        registers=int(resources["REG"]),
        stack_bytes=int(resources["STACK"]),
        spill_loads=widths["LDL"].total(),
        spill_stores=widths["STL"].total(),
        loads=widths["LDG"],
        stores=widths["STG"],
        loads_by_argument=loads,
        stores_by_argument=stores,
        waits="atom." in ptx,
        seconds=seconds,
        shared_bytes=int(resources["SHARED"]) + dynamic_shared_bytes,
        instructions=len(path),
        loop_instructions=loop_instructions(path),
        bytes_in_flight=bytes_in_flight(path),
    )


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate without which it does nothing, or ""
    opcode: str
    operands: str

    @property
    def is_access(self) -> bool:
        return self.opcode.split(".")[0] in ("LDG", "STG", "LDGSTS")

    @property
    def target(self) -> int:
        """Of a branch; -1 for anything else."""
        return int(self.operands.split("0x")[-1], 16) if self.opcode.split(".")[0] == "BRA" else -1


_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;")


def full_path(listing: str) -> list[Instruction]:
    """What a program executes that has all its tiles, up to an exit or the branch back to its next slice.

    Of the paths that never branch backwards, so that each loop's body counts once: the one with the most accesses to
    global memory; of several, with the fewest of them under a predicate (a branch without masks); then the shortest.
    """
    text = [Instruction(int(address, 16), *rest) for address, *rest in _INSTRUCTION.findall(listing)]
    index = {each.address: i for i, each in enumerate(text)}
    end = len(text)
    best = [(0, 0, 0, end)] * (end + 1)  # accesses, those without a predicate, minus the instructions; what follows
    for i, each in reversed([*enumerate(text)]):
        leaves = each.opcode == "EXIT" or each.target >= 0
        following = [i + 1] if not leaves or each.guard or "," in each.operands else []
        if each.target > each.address:
            following.append(index[each.target])
        accesses, free, minus, after = max([(*best[j][:3], j) for j in following], default=best[end])
        best[i] = (accesses + each.is_access, free + (each.is_access and not each.guard), minus - 1, after)
    path, i = [], 0
    while i < end:
        path.append(text[i])
        i = best[i][3]
    return path


def loop_instructions(path: Sequence[Instruction]) -> int:
    """Those in the innermost loops that copy from global to shared memory: the pipelined loops over tiles."""
    found, start = 0, 0
    for i, each in enumerate(path):
        if 0 <= each.target <= each.address:
            body = [other for other in path[start : i + 1] if other.address >= each.target]
            found += len(body) * any(other.opcode.startswith("LDGSTS") for other in body)
            start = i + 1
    return found


def bytes_in_flight(path: Iterable[Instruction]) -> int:
    """The most bytes that a thread has asked for and no instruction has named yet."""
    pending: dict[int, int] = {}  # register -> address of the load
    most = 0
    for each in path:
        named = [int(register) for register in re.findall(r"\bR(\d+)", each.operands)]
        arrived = {pending[register] for register in named if register in pending}
        pending = {register: load for register, load in pending.items() if load not in arrived}
        if each.opcode.startswith("LDG.") and "STRONG" not in each.opcode:
            bits = re.search(r"\.(64|128|256)(?=\.|$)", each.opcode)
            pending |= dict.fromkeys(range(named[0], named[0] + int(bits[1] if bits else 32) // 32), each.address)
        most = max(most, 4 * len(pending))
    return most


_ACCESS = re.compile(r"\b(ld|st)\.(?:[\w:]+\.)*?global((?:(?:\.|::)\w+)*)\s*([^;]*);")
_LINE = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)\s+(%?[^;]*);", re.MULTILINE)


def by_argument(ptx: str, arguments: Mapping[str, str]) -> tuple[dict[str, Widths], dict[str, Widths]]:
    """Global loads and stores by the argument that their address is computed from; "x/y" where it may be one of two.

    arguments: name -> Triton type, pointers with a star in front. (NVIDIA, PTX ISA, "ld" and "st".)
    """
    names = [name if kind.startswith("*") else "" for name, kind in arguments.items()]
    sources = _sources(ptx)
    found: dict[str, dict[str, Counter[int]]] = {"ld": defaultdict(Counter), "st": defaultdict(Counter)}
    for verb, modifiers, operands in _ACCESS.findall(ptx):
        base = re.search(r"\[\s*(%[a-z]+\d+)", operands)
        numbers = _pointers(base[1], sources) if base else set()
        name = "/".join(names[number] for number in sorted(numbers) if names[number]) or "?"
        scalar, vector = re.search(r"\.[bufs](\d+)$", modifiers), re.search(r"\.v([248])\b", modifiers)
        assert scalar, f"an access without a type: {modifiers}"
        found[verb][name][int(scalar[1]) * (int(vector[1]) if vector else 1)] += 1
    return dict(found["ld"]), dict(found["st"])


def _sources(ptx: str) -> dict[str, set[str]]:
    """64-bit register -> what its value is computed from: registers, or `#i` for the kernel's argument i.

    Loaded values end a trace: an index read from memory is not the address's argument.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    for name, operands in _LINE.findall(ptx):
        target, _, rest = operands.partition(",")
        if name.startswith("ld.param") and (number := re.search(r"_param_(\d+)\]", rest)):
            sources[target.strip()].add(f"#{number[1]}")
        elif not name.startswith(("ld.", "st.", "atom.")):
            sources[target.strip()].update(re.findall(r"%rd\d+", rest))
    return sources


def _pointers(register: str, sources: Mapping[str, set[str]]) -> set[int]:
    seen, waiting = set[str](), [register]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += sources.get(name, ())
    return {int(name[1:]) for name in seen if name.startswith("#")}


# --- the rules --------------------------------------------------------------------------------------------------------


def rules_broken(choice: Choice, code: MachineCode) -> list[str]:
    """Registers that overflow, or leave no room for a second program; narrow accesses; waiting that may never end."""
    broken = [f"{code.stack_bytes} bytes of stack"] * bool(code.stack_bytes)
    if code.spill_loads or code.spill_stores:
        broken.append(f"{code.spill_loads} spill loads, {code.spill_stores} spill stores")
    if code.registers > REGISTERS or code.resident(choice.threads) < 2:
        broken.append(f"{code.registers} registers, {code.resident(choice.threads)} programs resident")
    for name, least in choice.least_bits.items():
        loads, stores = _through(name, code.loads_by_argument), _through(name, code.stores_by_argument)
        if choice.sample_bits and code.loads.get(choice.sample_bits) == 1:
            loads -= {choice.sample_bits}  # the samples around whose mean the statistics are summed
        broken += [f"{name} is never accessed"] * (not loads and not stores)
        for verb, asked, done in (("loaded", loads, code.loads), ("stored", stores, code.stores)):
            if asked and min(asked) < least:
                broken.append(f"{name} is {verb} {min(asked)} bits at a time, not {least}")
            elif asked and max([0, *done]) < least:  # the assembler split what the compiler asked for
                broken.append(f"{name} is {verb} less than {least} bits at a time in the machine code")
    if code.waits != (choice.stage == "team"):
        broken.append("waits without a cooperative launch" if code.waits else "is a team whose programs do not wait")
    return broken


def _through(argument: str, accesses: Mapping[str, Widths]) -> set[int]:
    """The widths of the accesses whose address may come from that argument."""
    return {bits for name, widths in accesses.items() if argument in name.split("/") for bits in widths}


@dataclass(frozen=True)
class Finding:
    """What one choice became on one architecture. Where it does not compile, code is None and broken says why."""

    name: str
    capability: int  # 90 for sm_90
    code: MachineCode | None
    broken: list[str]
    triton: str = ""  # its version; unknown where the compiler crashed


def compiled(choice: Choice, capability: int, maxnreg: int | None = None, aligned: bool = True) -> Finding:
    """Compile for sm_<capability> in this process, which must not have Triton's interpreter on, and apply the rules.

    maxnreg: registers of a thread, by default those of the plan. aligned: pointers are to multiples of 16 bytes.
    """
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bncli.kernels.fused import triton as device_kernels

    constants: dict[str, Any] = {**choice.constants}
    constants["FORM"] = device_kernels.Form(**constants["FORM"], ACC=tl.float32)
    signature = choice.arguments | dict.fromkeys(constants, "constexpr")
    names = list(signature)
    alignment = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in choice.arguments.items()
        if aligned and kind.startswith("*")
    }
    options = {
        "num_warps": choice.warps, "maxnreg": maxnreg or REGISTERS, "enable_fp_fusion": True,
        "launch_cooperative_grid": choice.stage == "team",
    }  # fmt: skip
    began = time.perf_counter()
    try:
        kernel = triton.compile(
            ASTSource(
                getattr(device_kernels, choice.direction),
                signature,
                {(names.index(name),): value for name, value in constants.items()},
                alignment,
            ),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        seconds = time.perf_counter() - began
        listing, shared = _disassembled(kernel.asm["cubin"]), kernel.metadata.shared
        code = read(listing, kernel.asm["ptx"], choice.arguments, seconds, shared)
    except Exception as error:
        broken = [f"does not compile: {_reason(error)}"]
        return Finding(str(choice), capability, None, broken, triton.__version__)
    return Finding(str(choice), capability, code, rules_broken(choice, code), triton.__version__)


def _reason(error: BaseException) -> str:
    """In one line. Triton quotes the source up to a caret first, and says last what is wrong in it."""
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).rpartition("^")[2].split()
    return f"{type(error).__name__}: {' '.join(message)}"


def _disassembled(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# --- many of them -----------------------------------------------------------------------------------------------------


def check(
    every: Iterable[Choice],
    capabilities: Sequence[int] = CAPABILITIES,
    jobs: int = 2,
    compile: Callable[[Choice, int], Finding] = compiled,
) -> Iterator[Finding]:
    """A finding for each choice and architecture, in order, from `jobs` processes that compile."""
    local = threading.local()

    def one(pair: tuple[Choice, int]) -> Finding:
        if not hasattr(local, "process"):
            local.process = compiler()
        try:
            return local.process.submit(compile, *pair).result()
        except BrokenProcessPool:
            del local.process
            return Finding(str(pair[0]), pair[1], None, ["does not compile: the compiler's process died"])

    with ThreadPoolExecutor(jobs) as threads:
        yield from threads.map(one, itertools.product(every, capabilities))


def compiler() -> ProcessPoolExecutor:
    """One process, in which Triton compiles and does not interpret."""
    return ProcessPoolExecutor(1, get_context("spawn"), _compile_not_interpret)


def _compile_not_interpret() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def line(finding: Finding) -> str:
    verdict, code = "; ".join(finding.broken) or "ok", finding.code
    name = f"{finding.name:62} sm_{finding.capability:<4}"
    if code is None:
        return name + verdict
    loads, stores = (" ".join(f"{n}x{bits}" for bits, n in sorted(each.items())) for each in (code.loads, code.stores))
    return (
        f"{name}{code.registers:3} registers, {code.stack_bytes} stack, spills {code.spill_loads}/{code.spill_stores}, "
        f"loads {loads}, stores {stores}, {code.seconds:.1f} s  {verdict}"
    )


# --- the report -------------------------------------------------------------------------------------------------------

H200 = Processors(132, cooperative=True)
LATENCY_NS = 700.0  # of a load from memory under load; assumed
OPERATIONS = {"bn+relu": False, "bn+add+relu": True}  # name -> whether there is a residual


HEADER = """instructions an element, registers, stack/spills, programs and KiB in flight on a multiprocessor,
PREDICTED share of the copy bandwidth of an H200, plan"""


def report(jobs: int) -> tuple[list[dict[str, Any]], list[Finding]]:
    """A row for each batch norm of ResNet-50 with relu, in bf16, at batches of 256 and 32; what its kernels became."""
    cases = []
    for batch, contiguous, direction in itertools.product((256, 32), (True, False), ARGUMENTS):
        for (n, channels, *sides), _, operations in shape_set("resnet50", batch=batch):
            shape, backward = (n, channels, math.prod(sides)), direction == "backward"
            found = plan(shape, contiguous=contiguous, itemsize=2, backward=backward, processors=H200)
            for name, _ in operations:
                if name in OPERATIONS:
                    layer = f"{n}x{channels}x{'x'.join(map(str, sides))}"
                    cases.append((layer, name, found, planned(found, direction, OPERATIONS[name])))
    every = list(dict.fromkeys(choice for *_, kernels in cases for choice in kernels))
    findings = dict(zip(every, check(every, CAPABILITIES, jobs), strict=True))
    rows = []
    for layer, name, found, kernels in cases:
        codes = {choice: code for choice in kernels if (code := findings[choice].code)}
        if len(codes) == len(kernels):
            layout, direction = "contiguous" if found.contiguous else "channels last", kernels[0].direction
            about = {"layer": layer, "layout": layout, "direction": direction, "operation": name, "plan": str(found)}
            rows.append({**about, "kernels": [*map(str, kernels)], **figures(found, codes)})
    return rows, [*findings.values()]


def figures(found: Plan, codes: Mapping[Choice, MachineCode]) -> dict[str, float]:
    """By compilation, but for the share; of two launches, the instructions of both and the worse of the rest."""
    resident = min(code.resident(choice.threads) for choice, code in codes.items())
    elements = found.tiles_each * ACCESS_BYTES / found.itemsize  # of x, for a thread
    return {
        "instructions_per_element": sum(executed(found, code) for code in codes.values()) / elements,
        "registers": max(code.registers for code in codes.values()),
        "stack_bytes": max(code.stack_bytes for code in codes.values()),
        "spills": max(code.spill_loads + code.spill_stores for code in codes.values()),
        "resident": resident,
        "kib_in_flight": resident * min(in_flight(choice, code) for choice, code in codes.items()) / 1024,
        "predicted_share": predicted_share(found, codes),
    }


def row(figures: Mapping[str, Any]) -> str:
    return (
        "{layer:16}{layout:14}{direction:9}{operation:12}{instructions_per_element:5.1f} {registers:3} "
        "{stack_bytes}/{spills} {resident:2} {kib_in_flight:4.0f} {predicted_share:4.0%}  {plan}"
    ).format_map(figures)


def planned(found: Plan, direction: str, residual: bool) -> list[Choice]:
    """The compilations that a plan needs in bf16 with relu."""
    stages = {"none": ["alone"], "grid": ["team"], "launch": ["statistics", "normalize"]}[found.barrier]
    sizes = (found.contiguous, found.unit, found.columns, found.warps, found.held)
    return [Choice(direction, "bf16", *sizes, stage, "relu", residual, found.overflow) for stage in stages]


def executed(found: Plan, code: MachineCode) -> int:
    """Instructions of a thread of a program that has all its tiles."""
    return code.instructions + max(0, found.tiles_each - found.held - 1) * code.loop_instructions


def in_flight(choice: Choice, code: MachineCode) -> int:
    """Of a program: no more than its tiles have, since the other loads are of vectors that its threads share."""
    tiles = choice.held * (2 if choice.direction == "backward" else 1)
    return choice.threads * min(code.bytes_in_flight, ACCESS_BYTES * tiles)


def predicted_share(found: Plan, codes: Mapping[Choice, MachineCode]) -> float:
    """The time in which a copy moves each tensor once, over that of the plan by a model of an H200: a prediction.

    A program moves its part of each tensor at its share of the copy bandwidth, 4.2 TB/s on 132 multiprocessors, and no
    faster than its bytes in flight arrive every 700 ns. A multiprocessor issues 0.8 of 4 warps' instructions a cycle at
    1.83 GHz, as compiled. A program moves and computes in turn: the shorter of the two and a barrier are hidden but for
    1 / (programs resident). Programs work in rounds of as many as are resident. A second read takes 0.4 of the time
    where the cache still has the values, and a second launch 5 us (the constants of bncli/kernels/fused/tiling.py).
    """
    tensor, programs, total, least = found.slices * found.lines * found.line_bytes, found.slices * found.team, 0.0, 0.0
    for choice, code in codes.items():
        streams = 2 if choice.direction == "backward" else 1
        signs = choice.residual / (8 * found.itemsize)  # relative to a tensor
        least = streams + 1 + choice.residual + signs
        reread = 1 - (1 - CACHED) * min(1.0, CACHE_BYTES / (streams * tensor))
        moved = {
            "statistics": streams + signs * (streams - 1),
            "normalize": least - streams * (1 - reread),
        }.get(choice.stage, least + streams * (1 - found.resident_share))
        at_work = min(found.teams * found.team, H200.count * code.resident(choice.threads))
        share, beside = min(SINGLE_PROCESSOR_SHARE, H200.count / at_work), max(1.0, at_work / H200.count)
        rate = min(BYTES_PER_NS_PER_PROCESSOR * share, in_flight(choice, code) / LATENCY_NS)
        transfer = moved * tensor * found.price / programs / rate
        computation = executed(found, code) * choice.threads * beside / INSTRUCTIONS_PER_NS
        partly = min(transfer, computation) + BARRIER_NS * (choice.stage == "team")
        total += -(-programs // at_work) * (max(transfer, computation) + partly / beside)
    return least * tensor / (BYTES_PER_NS_PER_PROCESSOR * H200.count) / (total + LAUNCH_NS * (len(codes) - 1))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tests.kernels.fused.ahead_of_time", description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", default=list(CAPABILITIES), help="80 90 100; default 90")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sample", type=int, default=24, help="about so many, each kind once (%(default)s)")
    which.add_argument("--all", action="store_true", help="all of them")
    which.add_argument("--report", action="store_true", help="those of ResNet-50 on sm_90, layer by layer")
    parser.add_argument("--match", default="*", metavar="GLOB", help="only those of such a name")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of lines")
    options = parser.parse_args(arguments)
    if options.report:
        rows, found = report(options.jobs)
        if options.json:
            print(json.dumps(rows, indent=1))
        else:
            total = f"{len(rows)} rows, {len(found)} kernels; Triton {found[0].triton}"
            print(HEADER, *map(row, rows), *[line(each) for each in found if each.broken], total, sep="\n")
        return int(any(each.broken for each in found))
    chosen = [each for each in choices() if fnmatch.fnmatchcase(str(each), options.match)]
    if not chosen:
        parser.error(f"--match: none of {len([*choices()])} has a name like {options.match}")
    chosen = chosen if options.all else sample(chosen, options.sample)
    began, found = time.perf_counter(), []
    for finding in check(chosen, options.capability, options.jobs):
        found.append(finding)
        if not options.json:
            print(line(finding), flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=1))
    else:
        broken, failed = sum(bool(each.broken) for each in found), sum(each.code is None for each in found)
        spilled = sum(each.code is not None and each.code.stack_bytes > 0 for each in found)
        versions = ", ".join(sorted({each.triton for each in found} - {""}))
        print(
            f"{len(found)} checked, {broken} break a rule ({failed} do not compile, {spilled} use the stack); "
            f"Triton {versions}; {time.perf_counter() - began:.0f} s"
        )
    return int(any(each.broken for each in found))


if __name__ == "__main__":
    sys.exit(main())
