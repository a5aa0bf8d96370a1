"""What a compiled CUDA kernel does, read from its PTX, its SASS and its resource usage: text in, figures out.

Widths are bits per thread and access. SASS says what the machine runs; PTX says in addition which argument an address
comes from, because there each register still has its definition. (Names of SASS instructions: NVIDIA, CUDA Binary
Utilities, "Instruction Set Reference". ld and st: NVIDIA, PTX ISA, "Data Movement and Conversion Instructions".)
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

Widths = Mapping[int, int]  # bits per thread and access -> how many such instructions


@dataclass(frozen=True)
class MachineCode:
    """One kernel's cubin in figures. Counts are of instructions in the text, not of executions."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    spill_loads: int
    spill_stores: int
    global_loads: Widths
    global_stores: Widths
    loads_by_argument: Mapping[str, Widths]  # from PTX
    stores_by_argument: Mapping[str, Widths]  # from PTX
    barriers: int  # BAR, of one CTA
    cluster_barriers: int  # UCGABAR
    memory_fences: int  # MEMBAR
    atomics: int  # ATOM, ATOMG, RED on global memory
    shared_accesses: int  # LDS, STS, LDSM, STSM
    spins: int  # loops that poll memory which other CTAs write
    instructions: int
    opcodes: Mapping[str, int] = field(repr=False)
    seconds: float = 0.0  # to compile; about 0 when Triton's cache had it


# --- SASS -----------------------------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?(?P<guard>U?P\w+)\s+)?(?P<name>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_WIDTH = re.compile(r"\.(?:[US])?(8|16|64|128|256)(?=\.|$)")
_CONSTANT = {"", "PT", "UPT", "RZ", "URZ"}
_OPERAND = re.compile(r"\bU?[RP](?:\d+|Z|T)\b")
_NO_RESULT = {"BRA", "STG", "STS", "STL", "ST", "RED", "REDG", "BAR", "MEMBAR", "EXIT", "WARPSYNC", "BSSY", "BSYNC"}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str  # with its modifiers: LDG.E.EF.128
    operands: str
    guard: str = ""  # the predicate that it depends on

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode == "BRA" else None
        return int(found.group(1), 16) if found else None

    @property
    def _results(self) -> int:
        """How many operands are written: leading predicates, then one register, of which a comparison has none."""
        if self.opcode in _NO_RESULT:
            return 0
        predicates = sum(1 for _ in itertools.takewhile(lambda name: "P" in name, _OPERAND.findall(self.operands)))
        return predicates + ("SETP" not in self.opcode)

    @property
    def results(self) -> set[str]:
        """The registers written, as far as names tell."""
        return set(_OPERAND.findall(self.operands)[: self._results]) - _CONSTANT

    @property
    def sources(self) -> set[str]:
        """The registers read, as far as names tell."""
        return {*_OPERAND.findall(self.operands)[self._results :], self.guard} - _CONSTANT

    @property
    def opcode(self) -> str:
        return self.name.partition(".")[0]

    @property
    def bits(self) -> int:
        """The width of a load or a store; one without a width in its name is of 32 bits."""
        found = _WIDTH.search(self.name)
        return int(found.group(1)) if found else 32


def instructions(listing: str) -> list[Instruction]:
    """The instructions of `cuobjdump -sass`, in order; NOP left out."""
    found = (
        Instruction(int(m["address"], 16), m["name"], m["operands"], m["guard"] or "")
        for m in _INSTRUCTION.finditer(listing)
    )
    return [instruction for instruction in found if instruction.opcode != "NOP"]


def widths(code: list[Instruction], opcode: str) -> Widths:
    return dict(sorted(Counter(one.bits for one in code if one.opcode == opcode).items()))


def spins(code: list[Instruction]) -> int:
    """How many loops wait for other CTAs: their end depends on a value that they read as others write it.

    A loop is what a branch back spans. A queue of work that a `while` takes numbers from counts too.
    """
    count = 0
    for back in code:
        if back.target is not None and back.target < back.address:
            body = [one for one in code if back.target <= one.address <= back.address]
            leaving = [one for one in body if one.target is not None and not back.target < one.target <= back.address]
            needed = set().union(*(one.sources for one in leaving))
            count += _depends_on_polling(needed, body * 2)  # twice: a value may come from the turn before
    return count


def _depends_on_polling(needed: set[str], body: list[Instruction]) -> bool:
    """Whether a value needed at the end of straight code comes from a poll in it. Shared memory is one register."""
    for one in reversed(body):
        if one.opcode == "STS" and "shared" in needed:
            needed |= one.sources
        elif one.results & needed:
            if _polls(one):
                return True
            if not one.guard:
                needed -= one.results
            needed |= one.sources | ({"shared"} if one.opcode == "LDS" else set())
    return False


def _polls(one: Instruction) -> bool:
    """Whether it reads what other CTAs write, as they write it."""
    return one.opcode in ("ATOM", "ATOMG") or (one.opcode in ("LD", "LDG") and ".STRONG." in one.name)


# --- PTX ------------------------------------------------------------------------------------------------------------

_PTX_ACCESS = re.compile(r"\b(?P<kind>ld|st)\.(?:[\w:]+\.)*?global(?P<rest>(?:(?:\.|::)\w+)*)\s*(?P<operands>[^;]*);")
_PTX_LINE = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?P<name>[a-z][\w.:]*)\s+(?P<operands>%?[^;]*);", re.MULTILINE)
_PTX_TYPE = re.compile(r"\.[bufs](8|16|32|64|128)$")
_REGISTER = re.compile(r"%[a-z]+\d+")


def by_argument(ptx: str, arguments: Mapping[str, str]) -> tuple[Mapping[str, Widths], Mapping[str, Widths]]:
    """Global loads and stores per argument whose pointer their address is computed from.

    arguments: the kernel's runtime arguments in order with their Triton types, pointers with a star in front. An
    address that may come from two of them is under "x/y", from none under "?".
    """
    names = [name if kind.startswith("*") else "" for name, kind in arguments.items()]
    sources = _definitions(ptx)
    found: dict[str, dict[str, Counter[int]]] = {"ld": defaultdict(Counter), "st": defaultdict(Counter)}
    for access in _PTX_ACCESS.finditer(ptx):
        base = re.search(r"\[\s*(%[a-z]+\d+)", access["operands"])
        numbers = _parameters(base.group(1), sources) if base else set()
        name = "/".join(names[i] for i in sorted(numbers) if i < len(names) and names[i]) or "?"
        found[access["kind"]][name][_ptx_bits(access["rest"])] += 1
    loads, stores = ({name: dict(sorted(count.items())) for name, count in kind.items()} for kind in found.values())
    return loads, stores


def _ptx_bits(modifiers: str) -> int:
    scalar = _PTX_TYPE.search(modifiers)
    vector = re.search(r"\.v([248])\b", modifiers)
    assert scalar, f"ld or st without a type: {modifiers}"
    return int(scalar.group(1)) * (int(vector.group(1)) if vector else 1)


def _definitions(ptx: str) -> dict[str, set[str]]:
    """64-bit register -> what its value is computed from: registers, or `#i` for the kernel's pointer argument i.

    Loaded values end a trace: an index read from memory is not the address's argument.
    """
    sources: dict[str, set[str]] = defaultdict(set)
    for line in _PTX_LINE.finditer(ptx):
        target, _, rest = line["operands"].partition(",")
        if line["name"].startswith("ld.param") and (number := re.search(r"_param_(\d+)\]", rest)):
            sources[target.strip()].add(f"#{number.group(1)}")
        elif not line["name"].startswith(("ld.", "st.", "atom.")):
            sources[target.strip()].update(name for name in _REGISTER.findall(rest) if name.startswith("%rd"))
    return sources


def _parameters(register: str, sources: Mapping[str, set[str]]) -> set[int]:
    seen, waiting = set[str](), [register]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += sources.get(name, ())
    return {int(name[1:]) for name in seen if name.startswith("#")}


# --- the whole ------------------------------------------------------------------------------------------------------


def read(*, listing: str, ptx: str, arguments: Mapping[str, str], shared_bytes: int, seconds: float) -> MachineCode:
    """One kernel's figures. listing: `cuobjdump -sass --dump-resource-usage`; shared_bytes: what a launch asks for."""
    code = instructions(listing)
    opcodes = Counter(one.opcode for one in code)
    resources = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", listing))
    loads, stores = by_argument(ptx, arguments)

    def total(*names: str) -> int:
        return sum(opcodes[name] for name in names)

    return MachineCode(
        registers=int(resources["REG"]),
        stack_bytes=int(resources["STACK"]),
        shared_bytes=max(int(resources["SHARED"]), shared_bytes),
        spill_loads=total("LDL"),
        spill_stores=total("STL"),
        global_loads=widths(code, "LDG"),
        global_stores=widths(code, "STG"),
        loads_by_argument=loads,
        stores_by_argument=stores,
        barriers=total("BAR"),
        cluster_barriers=total("UCGABAR_ARV", "UCGABAR_WAIT"),
        memory_fences=total("MEMBAR"),
        atomics=total("ATOM", "ATOMG", "RED", "REDG"),
        shared_accesses=total("LDS", "STS", "LDSM", "STSM"),
        spins=spins(code),
        instructions=len(code),
        opcodes=dict(opcodes),
        seconds=seconds,
    )
