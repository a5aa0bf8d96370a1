"""The harness that reads kernels' machine code without a GPU, held to toy kernels whose machine code is known.

The toys are named, not imported: this process may have Triton's interpreter on for other tests, or may have to turn it
on before Triton is first imported.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

from tests.kernels.fused import ahead_of_time, machine_code
from tests.kernels.fused.ahead_of_time import Finding, Named, Specialisation, check, sample
from tests.kernels.fused.compiling import ROOT

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

TOYS = "tests.kernels.toy_kernels"


def scale(name: str, kind: str = "bf16", **changes: Any) -> Specialisation:
    signature = {"x": f"*{kind}", "y": f"*{kind}", "n": "i32", "BLOCK": "constexpr", "ACC": "constexpr"}
    constants = {"BLOCK": 1024, "ACC": Named("triton.language:float32")}
    whole = Specialisation(name, f"{TOYS}:scale", signature, constants, frozenset("xyn"), 4)
    return dataclasses.replace(whole, **{"vector_bits": {"x": 128, "y": 128}, **changes})


PLAIN = {"x": "*bf16", "y": "*bf16", "n": "i32", "BLOCK": "constexpr"}


def hold(name: str, tiles: int) -> Specialisation:
    signature = {"x": "*fp32", "y": "*fp32", "n": "i32", "TILES": "constexpr", "BLOCK": "constexpr"}
    wide = {"x": 128, "y": 128}
    held = {"TILES": tiles, "BLOCK": 2048}
    return Specialisation(name, f"{TOYS}:hold", signature, held, frozenset("xyn"), num_warps=16, vector_bits=wide)


def wait(name: str, cooperative: bool) -> Specialisation:
    signature = {"counter": "*i32", "x": "*fp32", "y": "*fp32", "n": "i32", "PROGRAMS": "constexpr"}
    return Specialisation(name, f"{TOYS}:wait", signature, {"PROGRAMS": 8}, frozenset("xy"), cooperative=cooperative)


GATHER = {"x": "*fp32", "index": "*i32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr"}
COUNT = {"x": "*fp32", "total": "*fp32", "last": "*fp32", "n": "i32", "BLOCK": "constexpr"}


def toys() -> list[Specialisation]:
    return [
        scale("scale"),
        scale("scale float32", "fp32"),
        scale("scale unfused", fp_fusion=False),
        scale("scale in float64", constants={"BLOCK": 1024, "ACC": Named("triton.language:float64")}),
        scale("scale any n", divisible_by_16=frozenset("xy")),
        scale("scale any x", divisible_by_16=frozenset("yn")),
        scale("scale, z expected", vector_bits={"z": 128}),
        scale("mistaken", function=f"{TOYS}:mistaken", signature=PLAIN, constants={"BLOCK": 1024}),
        scale("deadly", function=f"{TOYS}:deadly"),
        scale("after the deadly one", "fp16"),
        Specialisation("gather", f"{TOYS}:gather", GATHER, {"BLOCK": 1024}, frozenset(["x", "index", "y", "n"])),
        hold("hold 96 KiB", 12),
        dataclasses.replace(hold("hold 96 KiB in 32 registers", 12), maxnreg=32),
        hold("hold 320 KiB", 40),
        wait("wait, all resident", cooperative=True),
        wait("wait", cooperative=False),
        Specialisation("count", f"{TOYS}:count", COUNT, {"BLOCK": 1024}, frozenset(["x"])),
    ]


@pytest.fixture(scope="module")
def found() -> dict[str, Finding]:
    """Every toy on sm_90, compiled while this process says that it wants the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return {finding.name: finding for finding in check(toys(), [90])}


def code(finding: Finding) -> machine_code.MachineCode:
    assert finding.code is not None, finding.broken
    return finding.code


@needs_triton
def test_a_clean_kernel_keeps_every_rule(found: dict[str, Finding]) -> None:
    for name in ("scale", "scale float32", "scale unfused", "hold 96 KiB", "wait, all resident", "count"):
        assert found[name].broken == ()
        assert code(found[name]).stack_bytes == code(found[name]).spill_loads == code(found[name]).spill_stores == 0


@needs_triton
def test_accesses_are_counted_by_width_and_by_argument(found: dict[str, Finding]) -> None:
    bf16, fp32, mixed = code(found["scale"]), code(found["scale float32"]), code(found["gather"])
    assert bf16.global_loads == bf16.global_stores == {128: 1}  # 1,024 values of 2 bytes over 128 threads
    assert fp32.global_loads == fp32.global_stores == {128: 2}
    assert fp32.loads_by_argument == {"x": {128: 2}}
    assert fp32.stores_by_argument == {"y": {128: 2}}
    assert mixed.loads_by_argument == {"index": {128: 2}, "x": {32: 8}}
    assert mixed.stores_by_argument == {"y": {128: 2}}
    assert mixed.global_loads == {32: 8, 128: 2}


@needs_triton
def test_what_the_compiler_asked_for_by_argument_is_what_the_machine_code_does(found: dict[str, Finding]) -> None:
    for name in ("scale", "scale float32", "scale any n", "scale any x", "gather", "hold 96 KiB", "hold 320 KiB"):
        one = code(found[name])
        for asked, done in ((one.loads_by_argument, one.global_loads), (one.stores_by_argument, one.global_stores)):
            total: Counter[int] = Counter()
            for widths in asked.values():
                total.update(widths)
            assert total == done, name


@needs_triton
@pytest.mark.parametrize(("name", "arguments"), [("scale any n", "xy"), ("scale any x", "x")])
def test_a_narrow_access_is_named_with_its_argument(found: dict[str, Finding], name: str, arguments: str) -> None:
    verbs = {"x": "loaded", "y": "stored"}
    assert found[name].broken == tuple(f"{one} is {verbs[one]} 16 bits at a time, not 128" for one in arguments)


@needs_triton
def test_an_argument_whose_width_is_expected_must_be_accessed(found: dict[str, Finding]) -> None:
    assert found["scale, z expected"].broken == ("z is never accessed",)


@needs_triton
def test_registers_that_overflow_are_found(found: dict[str, Finding]) -> None:
    too_much = found["hold 320 KiB"]  # 160 values a thread, in at most 128 registers
    assert code(too_much).registers <= 128
    assert code(too_much).stack_bytes >= 4 * (160 - 128)
    assert min(code(too_much).spill_loads, code(too_much).spill_stores) > 0
    assert any("stack" in rule for rule in too_much.broken)
    assert any("spill" in rule for rule in too_much.broken)


@needs_triton
def test_a_limit_on_registers_is_passed_on(found: dict[str, Finding]) -> None:
    assert code(found["hold 96 KiB"]).registers > 32 >= code(found["hold 96 KiB in 32 registers"]).registers


@needs_triton
def test_products_and_sums_fuse_only_where_it_is_allowed(found: dict[str, Finding]) -> None:
    fused, unfused = code(found["scale"]).opcodes, code(found["scale unfused"]).opcodes
    assert fused.get("FFMA", 0) >= 8
    assert unfused.get("FFMA", 0) == 0
    assert unfused.get("FADD", 0) >= 8


@needs_triton
def test_a_constant_that_is_only_named_is_the_one_compiled_for(found: dict[str, Finding]) -> None:
    assert code(found["scale in float64"]).opcodes.get("DFMA", 0) >= 8
    assert code(found["scale"]).opcodes.get("DFMA", 0) == 0


@needs_triton
def test_a_kernel_that_waits_for_others_needs_a_cooperative_launch(found: dict[str, Finding]) -> None:
    assert found["wait"].broken == ("waits for other programs without a cooperative launch",)
    waiting = code(found["wait, all resident"])
    assert (waiting.spins, waiting.atomics) == (1, 1)
    assert waiting.memory_fences >= 1
    assert waiting.barriers >= 2  # the value polled reaches every thread of the program


@needs_triton
def test_atomics_in_a_loop_are_not_waiting(found: dict[str, Finding]) -> None:
    assert code(found["count"]).atomics == 1
    assert code(found["count"]).spins == 0


@needs_triton
def test_what_does_not_compile_is_a_finding_with_its_reason(found: dict[str, Finding]) -> None:
    assert found["mistaken"].code is None
    (reason,) = found["mistaken"].broken
    assert re.fullmatch(r"does not compile: \w+: .*incompatible.*1024.*2048.*", reason)
    assert "tl.store" not in reason  # the message, not the source before it


@needs_triton
def test_a_compiler_that_crashes_ends_its_own_finding_only(found: dict[str, Finding]) -> None:
    assert found["deadly"].broken == ("does not compile: the compiler's process ended with SIGKILL",)
    assert found["after the deadly one"].ok
    assert list(found) == [one.name for one in toys()]


@needs_triton
@pytest.mark.parametrize("capability", [80, 100])
def test_other_architectures_are_compiled_and_read(capability: int) -> None:
    clean, waits, spills = check([scale("scale"), wait("wait", cooperative=False), hold("hold", 40)], [capability])
    assert clean.ok
    assert code(clean).global_loads == code(clean).global_stores == {128: 1}
    assert (code(waits).spins, waits.ok) == (1, False)
    assert code(spills).spill_loads > 0


INTERPRETED = """
from triton import language as tl
from tests.kernels import toy_kernels as toys
from tests.kernels.fused.ahead_of_time import Specialisation, check, compile_for
signature = {"x": "*bf16", "y": "*bf16", "n": "i32", "BLOCK": "constexpr"}
signature["ACC"] = "constexpr"
constants = {"BLOCK": 1024, "ACC": tl.float32}
one = Specialisation("scale", toys.scale, signature, constants, frozenset("xyn"), vector_bits={"x": 128})
assert type(toys.scale).__name__ == "InterpretedFunction"
assert [finding.broken for finding in check([one])] == [()]
try:
    compile_for(one, 90)
except RuntimeError as error:
    print(error)
"""


@needs_triton
def test_functions_of_the_interpreter_are_compiled_in_workers_and_refused_here() -> None:
    script = [sys.executable, "-c", INTERPRETED]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "scale: not a compiled Triton function; TRITON_INTERPRET must be unset\n"


@needs_triton
def test_an_older_ptx_can_be_asked_for() -> None:
    script = """
from tests.kernels.fused.test_ahead_of_time import scale
from tests.kernels.fused.ahead_of_time import compile_for
assert compile_for(scale("scale"), 90, ptx_version=80).global_loads == {128: 1}
try:
    compile_for(scale("scale"), 90, ptx_version=60)  # older than the architecture
except Exception as error:
    print(type(error).__name__)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "PTXASError" in run.stdout, run.stderr


# --- the command ----------------------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = ahead_of_time.main(["--source", "tests.kernels.fused.test_ahead_of_time:toys", *arguments])
    return status, "".join(capsys.readouterr())


@needs_triton
def test_the_command_prints_a_row_for_each_and_ends_well_when_every_rule_is_kept(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, text = command(capsys, "--match", "hold 96 KiB", "--capability", "80", "90")
    lines = text.splitlines()
    assert status == 0
    assert [line.split("  ")[0] for line in lines[:3]] == ["specialisation", "hold 96 KiB", "hold 96 KiB"]
    assert "12x128" in lines[1]
    assert lines[1].endswith("ok")
    assert lines[-1].startswith("2 checked, 0 break a rule (0 do not compile, 0 use the stack); Triton ")


@needs_triton
def test_the_command_fails_when_a_rule_is_broken_and_says_which_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = command(capsys, "--match", "wait*", "--all", "--json")
    assert status == 1
    rules = {one["name"]: one["broken"] for one in json.loads(text)}
    assert rules == {
        "wait, all resident": [],
        "wait": ["waits for other programs without a cooperative launch"],
    }


def test_the_command_says_when_no_name_matches(capsys: pytest.CaptureFixture[str]) -> None:
    status, text = command(capsys, "--match", "no such*")
    assert status == 2
    assert "none has a name like no such*" in text


@pytest.mark.parametrize("source", ["tests.kernels.no_such:toys", "tests.kernels.toy_kernels_missing", "json:no_such"])
def test_the_command_says_when_there_is_no_such_source(capsys: pytest.CaptureFixture[str], source: str) -> None:
    assert ahead_of_time.main(["--source", source]) == 2
    assert f"--source {source}: " in capsys.readouterr().err


# --- the sample -----------------------------------------------------------------------------------------------------


def many() -> list[Specialisation]:
    return [
        scale(f"{kind} {block}", kind, constants={"BLOCK": block}) for kind in ("bf16", "fp32") for block in range(50)
    ]


def test_a_sample_has_every_kernel_and_data_type_and_is_the_same_for_the_same_seed() -> None:
    for n in (1, 2, 10):
        chosen = sample(many(), n, seed=3)
        assert len(chosen) == max(n, 2)
        assert {one.signature["x"] for one in chosen} == {"*bf16", "*fp32"}
        assert chosen == sample(many(), n, seed=3)
        names = [one.name for one in many()]
        assert [one.name for one in chosen] == sorted((one.name for one in chosen), key=names.index)
    assert sample(many(), 10, seed=3) != sample(many(), 10, seed=4)
    assert sample(many(), 1000) == many()


def test_two_specialisations_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two specialisations are called twice"):
        check([scale("twice"), scale("once"), scale("twice")])


def test_any_object_with_the_attributes_is_a_specialisation() -> None:
    given = dataclasses.make_dataclass("Own", ["name", "function", "signature", "constants", "cooperative", "more"])
    own = Specialisation.of(given("a", "module:name", {"x": "*fp32"}, {}, True, "else"))
    assert own == Specialisation("a", "module:name", {"x": "*fp32"}, {}, cooperative=True)


# --- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("LDG.E", 32),
        ("LDG.E.U8", 8),
        ("LDG.E.S16", 16),
        ("LDG.E.U16.CONSTANT", 16),
        ("LDG.E.64", 64),
        ("LDG.E.EF.128", 128),
        ("LDG.E.128.CONSTANT", 128),
        ("LDG.E.LTC128B.128", 128),
        ("LDG.E.LTC128B", 32),
        ("LDG.E.STRONG.GPU", 32),
        ("LDG.E.ENL2.256", 256),
        ("STG.E.EL.64", 64),
        ("LDL.LU.64", 64),
    ],
)
def test_a_width_is_read_through_other_modifiers(name: str, bits: int) -> None:
    (one,) = machine_code.instructions(
        f"        /*0250*/              @!UP3 {name} R4, desc[UR6][R2.64+0xc] ;   /* 0x0 */"
    )
    assert (one.address, one.opcode, one.bits) == (0x250, name[:3], bits)


def program(*lines: str) -> list[machine_code.Instruction]:
    """Instructions at 0x10, 0x20, ..."""
    return machine_code.instructions("\n".join(f"/*{16 * (at + 1):04x}*/  {line} ;" for at, line in enumerate(lines)))


ACQUIRE = "LDG.E.STRONG.GPU R2, desc[UR6][R4.64]"
AGAIN = ("ISETP.NE.AND P4, PT, R2, R9, PT", "@P4 BRA 0x10", "EXIT", "BRA 0x1000")


@pytest.mark.parametrize(
    "lines",
    [
        (ACQUIRE, *AGAIN),
        ("ATOMG.E.ADD.STRONG.GPU PT, R2, desc[UR6][R4.64], RZ", *AGAIN),
        ("ATOMG.E.CAS.STRONG.GPU PT, R2, [R4], R5, R6", *AGAIN),
        ("@!P0 LD.E.STRONG.SYS R2, [R4.64]", *AGAIN),
        ("BRA 0x30", ACQUIRE, AGAIN[0], "@P4 BRA 0x20", "EXIT"),
        ("ISETP.NE.AND P4, PT, R2, R9, PT", "@!P4 BRA 0x50", ACQUIRE, "BRA 0x10", "EXIT"),  # leaves in the middle
        (ACQUIRE, "@!P0 STS [UR4], R2", "BAR.SYNC.DEFER_BLOCKING 0x0", "LDS R2, [UR4]", *AGAIN),  # to the other threads
        (ACQUIRE, "LOP3.LUT R3, R2, R7, RZ, 0x3c, !PT", "MOV R2, R3", *AGAIN),
    ],
)
def test_a_loop_waits_if_its_end_depends_on_what_others_write(lines: tuple[str, ...]) -> None:
    assert machine_code.spins(program(*lines)) == 1


@pytest.mark.parametrize(
    "lines",
    [
        ("LDG.E R2, desc[UR6][R4.64]", *AGAIN),
        (
            "LDG.E.STRONG.GPU R3, desc[UR6][R4.64]",
            "IADD3 R2, R2, 0x1, RZ",
            *AGAIN,
        ),  # cached in L2, and used for its value
        ("ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR6][R4.64], R5", "IADD3 R2, R2, 0x1, RZ", *AGAIN),
        ("RED.E.ADD.STRONG.GPU desc[UR6][R4.64], R2", "IADD3 R2, R2, 0x1, RZ", *AGAIN),
        (ACQUIRE, "MOV R2, R7", *AGAIN),
        (ACQUIRE, AGAIN[0], "@P4 BRA 0x50", "EXIT", "EXIT"),
    ],
)
def test_a_loop_that_does_not_is_at_work(lines: tuple[str, ...]) -> None:
    assert machine_code.spins(program(*lines)) == 0


def test_a_loop_around_one_that_waits_is_not_counted_again() -> None:
    outer = ("IADD3 R8, R8, 0x1, RZ", "ISETP.NE.AND P5, PT, R8, R9, PT", "@P5 BRA 0x10", "EXIT")
    assert machine_code.spins(program("MOV R7, R8", ACQUIRE, AGAIN[0], "@P4 BRA 0x20", *outer)) == 1


PTX = """
    ld.param.b64 	%rd1, [kernel_param_0];
    ld.param.b64 	%rd2, [kernel_param_1];
    ld.param.b32 	%r1, [kernel_param_2];
    ld.param.b64 	%rd3, [kernel_param_3];
    mul.wide.s32 	%rd4, %r1, 2;
    add.s64 	%rd5, %rd1, %rd4;
    @%p1 ld.global.L1::evict_last.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd5 + 0 ];
    ld.global.nc.b64 	%rd8, [%rd1+32];
    selp.b64 	%rd6, %rd1, %rd2, %p2;
    ld.acquire.gpu.global.b16 	%rs1, [%rd6];
    shl.b64 	%rd10, %rd8, 2;
    mad.lo.s64 	%rd11, %rd3, %rd10, %rd2;
    @!%p3 st.global.b8 [ %rd11 + 0 ], { %rs1 };
    st.shared.v4.b32 [%r9], {%r2, %r3, %r4, %r5};
"""


def test_an_access_belongs_to_the_argument_that_its_address_starts_from() -> None:
    loads, stores = machine_code.by_argument(PTX, {"x": "*bf16", "y": "*u8", "n": "i32", "stride": "i64"})
    assert loads == {"x": {64: 1, 128: 1}, "x/y": {16: 1}}
    assert stores == {"y": {8: 1}}  # not x, though the index was read from it
