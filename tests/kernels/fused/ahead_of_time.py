"""Hold the machine code of Triton kernels to rules, for GPUs that are not here.

    python -m tests.kernels.fused.ahead_of_time [--capability 80 90 100] [--sample N | --all] [--match GLOB] [--json]

Exit status: 0 every rule is kept, 1 a rule is broken, 2 a usage error.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import itertools
import json
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.kernels.fused.compiling import Named, Specialisation, Worker, compile_for, resolve
from tests.kernels.fused.machine_code import MachineCode, Widths

__all__ = [
    "CAPABILITIES",
    "Finding",
    "MachineCode",
    "Named",
    "Specialisation",
    "check",
    "compile_for",
    "main",
    "sample",
]

SOURCE = "tests.kernels.fused.specialisations:specialisations"
CAPABILITIES = (90,)  # sm_90: H100, H200


@dataclass(frozen=True)
class Finding:
    """What one specialisation became on one architecture. Where it does not compile, code is None, broken says why."""

    name: str
    capability: int  # 90 for sm_90
    code: MachineCode | None
    broken: tuple[str, ...]  # the rules it breaks, in words
    triton: str  # its version, empty where the compiler crashed

    @property
    def ok(self) -> bool:
        return not self.broken


# --- the rules ------------------------------------------------------------------------------------------------------


def rules_broken(specialisation: Specialisation, code: MachineCode) -> tuple[str, ...]:
    """The rules broken: registers overflow to memory, an access is too narrow, it waits for what may never start."""
    broken = []
    if code.stack_bytes:
        broken.append(f"{code.stack_bytes} bytes of stack")
    if code.spill_loads or code.spill_stores:
        broken.append(f"{code.spill_loads} spill loads, {code.spill_stores} spill stores")
    for argument, least in specialisation.vector_bits.items():
        broken += _too_narrow(argument, least, code)
    if specialisation.cooperative and not code.spins:
        broken.append("is launched cooperatively and waits for nobody")
    if code.spins and not specialisation.cooperative:
        broken.append("waits for other programs without a cooperative launch")
    return tuple(broken)


def _too_narrow(argument: str, least: int, code: MachineCode) -> Iterator[str]:
    loads, stores = _through(argument, code.loads_by_argument), _through(argument, code.stores_by_argument)
    if not loads and not stores:
        yield f"{argument} is never accessed"
    for verb, accesses, machine in (("loaded", loads, code.global_loads), ("stored", stores, code.global_stores)):
        if accesses and min(accesses) < least:
            yield f"{argument} is {verb} {min(accesses)} bits at a time, not {least}"
        elif accesses and max([0, *machine]) < least:  # the assembler split what the compiler asked for
            yield f"{argument} is {verb} less than {least} bits at a time in the machine code"


def _through(argument: str, accesses: Mapping[str, Widths]) -> Widths:
    """The accesses whose address may come from that argument: bits -> how many."""
    chosen = [widths for name, widths in accesses.items() if argument in name.split("/")]
    return {bits: sum(widths.get(bits, 0) for widths in chosen) for bits in sorted(set().union(*chosen))}


# --- many of them ---------------------------------------------------------------------------------------------------


def sample(specialisations: Iterable[Any], n: int, seed: int = 0) -> list[Specialisation]:
    """About n of them, in their order: one of each kernel and data types, the rest at random; `seed` decides all."""
    everything = [Specialisation.of(one) for one in specialisations]
    shuffled = everything.copy()
    random.Random(seed).shuffle(shuffled)
    first = {one.stratum: one for one in reversed(shuffled)}
    chosen = {one.name for one in first.values()}
    rest = [one.name for one in shuffled if one.name not in chosen]
    chosen.update(rest[: max(0, n - len(chosen))])
    return [one for one in everything if one.name in chosen]


def check(
    specialisations: Iterable[Any],
    capabilities: Sequence[int] = CAPABILITIES,
    jobs: int = 2,
    progress: Callable[[int], None] | None = None,
) -> list[Finding]:
    """Compile each for each architecture, `jobs` at a time, and hold it to the rules. In the order given.

    progress is told how many are done. Raises ValueError where two specialisations have one name.
    """
    found: dict[int, Finding] = {}
    for position, finding in _findings(specialisations, capabilities, jobs):
        found[position] = finding
        if progress is not None:
            progress(len(found))
    return [found[position] for position in sorted(found)]


def _findings(specialisations: Iterable[Any], capabilities: Sequence[int], jobs: int) -> Iterator[tuple[int, Finding]]:
    """(position, finding) as they come in."""
    every = [Specialisation.of(one) for one in specialisations]
    names = [one.name for one in every]
    if len(set(names)) < len(names):
        raise ValueError(f"two specialisations are called {next(name for name in names if names.count(name) > 1)}")
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    pairs = list(enumerate(itertools.product(every, capabilities)))
    for pair in pairs:
        waiting.put(pair)
    for _ in range(min(max(jobs, 1), len(pairs))):
        threading.Thread(target=_drain, args=(waiting, done), daemon=True).start()
    for _ in pairs:
        result = done.get()
        if isinstance(result, BaseException):
            raise result
        yield result


def _drain(waiting: queue.SimpleQueue[Any], done: queue.SimpleQueue[Any]) -> None:
    worker = Worker()
    try:
        while True:
            position, (specialisation, capability) = waiting.get_nowait()
            done.put((position, _finding(specialisation, capability, worker)))
    except queue.Empty:
        worker.stop()
    except BaseException as error:
        done.put(error)


def _finding(specialisation: Specialisation, capability: int, worker: Worker) -> Finding:
    compiled = worker.compile(specialisation, capability)
    broken = (
        rules_broken(specialisation, compiled.code) if compiled.code else (f"does not compile: {compiled.failure}",)
    )
    return Finding(specialisation.name, capability, compiled.code, broken, compiled.triton)


# --- the command ----------------------------------------------------------------------------------------------------

HEADINGS = ("specialisation", "sm", "regs", "stack", "spills", "loads", "stores", "bar", "spins", "s", "verdict")


def row(finding: Finding) -> tuple[str, ...]:
    code, verdict = finding.code, "; ".join(finding.broken) or "ok"
    if code is None:
        return (finding.name, str(finding.capability), *"-" * (len(HEADINGS) - 3), verdict)
    return (
        finding.name,
        str(finding.capability),
        str(code.registers),
        str(code.stack_bytes),
        f"{code.spill_loads}/{code.spill_stores}",
        _widths(code.global_loads),
        _widths(code.global_stores),
        str(code.barriers),
        str(code.spins),
        f"{code.seconds:.1f}",
        verdict,
    )


def _widths(widths: Widths) -> str:
    """Widest first: 12x128 1x32 is twelve accesses of 128 bits and one of 32."""
    return " ".join(f"{count}x{bits}" for bits, count in sorted(widths.items(), reverse=True)) or "-"


def table(found: Sequence[Finding]) -> str:
    rows = [HEADINGS, *map(row, found)]
    wide = [max(len(cells[column]) for cells in rows) for column in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(cells, wide, strict=True)).rstrip() for cells in rows
    )


def summary(found: Sequence[Finding], seconds: float) -> str:
    """One line: how many, how many break a rule, with which Triton, in what time."""
    bad, versions = sum(not one.ok for one in found), sorted({one.triton for one in found} - {""})
    spilled = sum(one.code is not None and bool(one.code.stack_bytes) for one in found)
    failed = sum(one.code is None for one in found)
    return (
        f"{len(found)} checked, {bad} break a rule ({failed} do not compile, {spilled} use the stack); "
        f"Triton {', '.join(versions)}; {seconds:.0f} s"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m tests.kernels.fused.ahead_of_time", description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=SOURCE, help="module:function that lists the specialisations (%(default)s)")
    parser.add_argument("--capability", type=int, nargs="+", default=list(CAPABILITIES), help="80 90 100; default 90")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--sample", type=int, default=24, help="about so many, each kernel and data type once (%(default)s)"
    )
    which.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--match", default="*", metavar="GLOB", help="only those of such a name")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON instead of a table")
    return parser


def _count(done: int) -> None:
    print(f"\r{done} compiled", end="\r", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        every = [Specialisation.of(one) for one in resolve(options.source)()]
    except (ImportError, AttributeError) as error:
        print(f"--source {options.source}: {error}; expected module:function", file=sys.stderr)
        return 2
    chosen = [one for one in every if fnmatch.fnmatchcase(one.name, options.match)]
    if not chosen:
        print(
            f"{options.source}: of {len(every)} specialisations none has a name like {options.match}", file=sys.stderr
        )
        return 2
    chosen = chosen if options.all else sample(chosen, options.sample, options.seed)
    start = time.perf_counter()
    found = check(chosen, options.capability, options.jobs, _count if sys.stderr.isatty() else None)
    if options.json:
        print(json.dumps([dataclasses.asdict(one) for one in found], indent=1))
    else:
        print(table(found))
        print(summary(found, time.perf_counter() - start))
    return 0 if all(one.ok for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
