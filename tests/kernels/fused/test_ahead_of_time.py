"""What the fused kernel becomes on GPUs that are not here: a sample of its compilations, and how they are read.

All of them: python -m tests.kernels.fused.ahead_of_time --all --capability 80 90 100
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterable
from dataclasses import replace

import pytest

from tests.kernels.fused import ahead_of_time
from tests.kernels.fused.ahead_of_time import (
    Choice,
    Finding,
    MachineCode,
    by_argument,
    bytes_in_flight,
    check,
    choices,
    compiled,
    compiler,
    full_path,
    line,
    loop_instructions,
    read,
    rules_broken,
    sample,
)

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

ALONE = Choice("forward", "fp16", True, 8, 1, 8, 4, "alone", "relu", False)
SAMPLE = [
    ALONE,
    Choice("backward", "bf16", True, 8, 1, 4, 1, "team", "relu", True),
    Choice("backward", "bf16", False, 8, 32, 4, 1, "team", "silu", True),
]
# The largest of each kind: what spills first.
LARGEST = [
    Choice("forward", "bf16", True, 8, 1, 8, 8, "team", "relu", True),
    Choice("forward", "bf16", True, 4, 1, 8, 8, "team", "relu", False),
    Choice("forward", "bf16", False, 8, 64, 8, 8, "team", "relu", False),
    Choice("backward", "bf16", True, 8, 1, 8, 4, "team", "relu", True),
    Choice("backward", "bf16", True, 4, 1, 8, 4, "team", "relu", False),
    Choice("backward", "bf16", False, 8, 64, 8, 4, "team", "relu", False),
]


def verdict(findings: Iterable[Finding]) -> list[str]:
    return [line(each) for each in findings if each.broken]


@needs_triton
def test_a_sample_keeps_the_rules_and_what_breaks_them_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which is not for the process that compiles
    with compiler() as process:
        right = [process.submit(compiled, each, 90) for each in SAMPLE]
        starved = process.submit(compiled, ALONE, 90, maxnreg=24, aligned=False)
        mistaken = process.submit(compiled, replace(ALONE, columns=3), 90)
    assert verdict(each.result() for each in right) == []
    alone, team, _ = (each.result().code for each in right)
    assert alone is not None
    assert team is not None
    assert (alone.loads[128], alone.loads[16]) == (4, 1)  # the tiles, and the samples
    assert alone.stores_by_argument["y"] == {128: 4}
    assert (alone.waits, team.waits) == (False, True)
    code = starved.result().code
    assert code is not None
    assert code.registers <= 24 < alone.registers
    assert min(code.stack_bytes, code.spill_loads, code.spill_stores) > 0
    assert starved.result().broken == [
        f"{code.stack_bytes} bytes of stack",
        f"{code.spill_loads} spill loads, {code.spill_stores} spill stores",
        "x is loaded 16 bits at a time, not 128",
        "y is stored 16 bits at a time, not 128",
    ]
    assert mistaken.result().code is None
    assert mistaken.result().broken == ["does not compile: ValueError: arange's range must be a power of 2"]


def test_the_tried_ones_are_among_what_is_shipped_and_names_differ() -> None:
    shipped = set(choices())
    assert {*SAMPLE, *LARGEST} <= shipped
    assert len({str(each) for each in shipped}) == len(shipped)


# --- many compilations: `pytest -m slow` ------------------------------------------------------------------------------


@needs_triton
@pytest.mark.slow
def test_the_largest_of_each_kind_hold_their_tiles_in_registers_on_sm_90() -> None:
    assert verdict(check(LARGEST)) == []


@needs_triton
@pytest.mark.slow
def test_what_needs_no_cooperation_compiles_for_every_architecture() -> None:
    statistics = Choice("backward", "fp16", False, 8, 64, 8, 2, "statistics", "relu", False)
    assert verdict(check([ALONE, statistics], (80, 100))) == []


@needs_triton
@pytest.mark.slow
def test_tensors_of_more_than_2_to_the_31_elements_compile_too() -> None:
    """Rare enough that 64-bit addresses may spill there."""
    wide = [replace(each, wide=True, overflow=True) for each in (LARGEST[0], LARGEST[-1])]
    assert all(each.code is not None for each in check(wide))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_large_sample_compiles_and_nineteen_of_twenty_keep_the_rules(capability: int) -> None:
    """2026-11-23, sm_90: of 160 on Triton 3.7.1 two spill, by 25 and by 1, and of 100 on 3.6.0 one, by 4."""
    some = [each for each in choices() if capability >= 90 or each.stage != "team"][::67]
    found = list(check(some, (capability,)))
    assert all(each.code is not None for each in found)
    assert len(verdict(found)) <= len(found) / 20, verdict(found)


def dies_of_a_team(choice: Choice, capability: int) -> Finding:
    if choice.stage == "team":
        os._exit(7)
    return Finding(str(choice), capability, None, [])


@pytest.mark.slow
def test_a_compiler_that_crashes_ends_its_own_finding_alone() -> None:
    found = list(check([ALONE, *SAMPLE], jobs=1, compile=dies_of_a_team))
    died = ["does not compile: the compiler's process died"]
    assert [each.broken for each in found] == [[], [], died, died]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("LDG.E", 32),
        ("LDG.E.U8", 8),
        ("LDG.E.S16", 16),
        ("LDG.E.128.CONSTANT", 128),
        ("LDG.E.LTC128B.64", 64),
        ("LDG.E.LTC128B", 32),
        ("LDG.E.ENL2.256", 256),
    ],
)
def test_a_width_is_read_through_other_modifiers(name: str, bits: int) -> None:
    listing = f"REG:40 STACK:8 SHARED:0\n /*0250*/  @!UP3 {name} R4, desc[UR6][R2.64+0xc] ;\n STL.64 [R1], R2 ;"
    found = read(listing, "", {})
    assert (found.loads, found.stores) == ({bits: 1}, {})
    assert (found.registers, found.stack_bytes, found.spill_loads, found.spill_stores) == (40, 8, 0, 1)


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
    loads, stores = by_argument(PTX, {"x": "*bf16", "y": "*u8", "n": "i32", "stride": "i64"})
    assert loads == {"x": {64: 1, 128: 1}, "x/y": {16: 1}}
    assert stores == {"y": {8: 1}}  # not x, though the index was read from it


SASS = """
    /*0000*/                   MOV R1, c[0x0][0x28] ;          /* 0x00000a00ff017b82 */
    /*0010*/              @P0  EXIT ;
    /*0020*/              @P1  BRA 0x60 ;
    /*0030*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
    /*0040*/                   LDG.E.64 R8, desc[UR4][R2.64+0x10] ;
    /*0050*/                   BRA 0x80 ;
    /*0060*/              @P2  LDG.E.128 R4, desc[UR4][R2.64] ;
    /*0070*/              @P2  LDG.E.64 R8, desc[UR4][R2.64+0x10] ;
    /*0080*/                   LDGSTS.E.BYPASS.128 [R20], desc[UR4][R2.64], P3 ;
    /*0090*/                   LDGDEPBAR ;
    /*00a0*/              @P4  BRA 0x80 ;
    /*00b0*/                   FADD R10, R8, R9 ;
    /*00c0*/                   LDG.E R11, desc[UR4][R2.64] ;
    /*00d0*/              @P5  BRA 0xf0 ;
    /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
    /*00f0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
    /*0100*/              @P6  EXIT ;
    /*0110*/                   BRA 0x20 ;
    /*0120*/                   BRA 0x120;
"""


def test_instructions_are_counted_on_the_path_of_a_program_that_has_all_its_tiles() -> None:
    path = full_path(SASS)
    masked, skipped, after = {0x60, 0x70}, {0xE0}, {0x120}
    assert {each.address for each in path} == {*range(0, 0x130, 0x10)} - masked - skipped - after
    assert loop_instructions(path) == 3
    assert bytes_in_flight(path) == 16 + 8  # the addition names what the second load brings


CLEAN = MachineCode(
    40, 0, 0, 0, {128: 4}, {128: 4}, {"x": {128: 4}}, {"y": {128: 4}},
    waits=False, seconds=1.0, instructions=500, bytes_in_flight=64,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"loads_by_argument": {"mean": {128: 4}}}, ["x is never accessed"]),
        ({"loads_by_argument": {"x/y": {128: 3, 32: 1}}}, ["x is loaded 32 bits at a time, not 128"]),
        ({"stores": {64: 8}}, ["y is stored less than 128 bits at a time in the machine code"]),
        ({"registers": 136}, ["136 registers, 1 programs resident"]),
        ({"waits": True}, ["waits without a cooperative launch"]),
    ],
)
def test_a_broken_rule_is_said(change: dict[str, object], broken: list[str]) -> None:
    found = rules_broken(ALONE, replace(CLEAN, **change))  # type: ignore[arg-type]
    assert [each for each in found if not each.startswith("y is loaded")] == broken


def test_a_team_has_to_wait() -> None:
    team = replace(ALONE, stage="team")
    assert rules_broken(team, CLEAN) == ["is a team whose programs do not wait"]
    assert rules_broken(team, replace(CLEAN, waits=True)) == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_prints_each_and_fails_where_a_rule_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made_up(every: Iterable[Choice], capabilities: Iterable[int], jobs: int) -> Iterable[Finding]:
        for each in every:
            yield Finding(str(each), 90, CLEAN, ["8 bytes of stack"] * (each.stage == "team"), "3.7.1")

    monkeypatch.setattr(ahead_of_time, "check", made_up)
    assert ahead_of_time.main(["--all", "--match", str(ALONE)]) == 0
    row, total = capsys.readouterr().out.splitlines()
    assert row.startswith(str(ALONE))
    assert row.endswith("sm_90   40 registers, 0 stack, spills 0/0, loads 4x128, stores 4x128, 1.0 s  ok")
    assert total.startswith("1 checked, 0 break a rule (0 do not compile, 0 use the stack); Triton 3.7.1; ")
    assert ahead_of_time.main(["--sample", "10", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found) == 10
    assert {each["broken"] != [] for each in found if "/team" in each["name"]} == {True}
    assert ahead_of_time.main(["--report", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2 * 2 * 2 * 12  # batches, layouts, directions, pairs of a shape and what is fused
    assert all(each["resident"] == 6 and 0 < each["predicted_share"] < 1 for each in rows if " 8 warps" in each["plan"])
    assert ahead_of_time.main(["--report"]) == 1
    assert "256x64x112x112  contiguous    forward  bn+relu " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        ahead_of_time.main(["--match", "no such*"])
    assert stopped.value.code == 2
    assert "has a name like no such*" in capsys.readouterr().err


def test_a_sample_has_every_kind_and_is_the_same_each_time() -> None:
    every = list(choices())
    for n in (1, 6, 20):
        chosen = sample(every, n)
        assert len(chosen) == max(n, 6)
        assert {(each.direction, each.dtype) for each in chosen} == {(each.direction, each.dtype) for each in every}
        assert chosen == sample(every, n)
        assert [every.index(each) for each in chosen] == sorted(every.index(each) for each in chosen)
    assert sample(every[:10], 1000) == every[:10]
