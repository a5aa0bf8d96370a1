"""A profile for programs and pages: JSON that gives the same profile back, CSV with all digits, Markdown, LaTeX."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from bncli.errors import FileError
from bncli.report import files
from bncli.report.export import csv_text, json_text, latex_text, markdown_section
from bncli.report.profile import text
from bncli.report.profile.baseline import gate_columns, gate_words
from bncli.report.profile.kernels import ceilings_words, kernel_columns, kernel_title, mean_columns, mean_groups
from bncli.report.profile.steps import memory_columns, share_columns, step_columns
from bncli.report.text import Column, environment_words
from bncli.results.environment import PROFILE_VERSION
from bncli.results.profile import (
    STEP_CLASSES,
    Ceilings,
    Gate,
    KernelCost,
    KernelProfile,
    Profile,
    Speedup,
    StepCost,
    StepMemory,
    StepProfile,
    Times,
)
from bncli.results.serialize import to_plain

QUARTILES = ("lower_quartile_ms", "median_ms", "upper_quartile_ms")  # in JSON beside samples_ms, for other readers
KINDS: dict[str, type[KernelProfile] | type[StepProfile]] = {"kernels": KernelProfile, "step": StepProfile}


# --- JSON ---------------------------------------------------------------------------------------------------------


def to_json(result: Profile, gate: Gate | None = None) -> str:
    """The whole profile with its kind, its raw samples and their quartiles, and a comparison with a baseline."""
    kind = next(name for name, each in KINDS.items() if isinstance(result, each))
    plain = {"format_version": PROFILE_VERSION, "kind": kind, **_with_quartiles(to_plain(result))}
    if gate is not None:
        plain["gate"] = {
            "regressed": gate.regressed,
            "failed": gate.failed,
            **to_plain(gate),
            "changes": [{"name": str(change.row), **to_plain(change)} for change in gate.changes],
            "only_now": [str(row) for row in gate.only_now],
            "only_baseline": [str(row) for row in gate.only_baseline],
        }
    return json_text(plain)


def load(path: Path) -> Profile:
    """The profile that `to_json` wrote to a file, in this version of bncli or an earlier one. Raises UsageError."""
    return files.load(path, _from_json, "baseline")


def _from_json(content: str) -> Profile:
    plain = files.json_object(content, "profile", (1, PROFILE_VERSION), list(KINDS))
    plain.pop("gate", None)
    plain["rows"] = _with_quartiles(plain.get("rows"), keep=False)
    kind = KINDS[plain.pop("kind")]
    if plain["format_version"] == 1:
        _drop_sentences(plain)
    found: Profile = files.rebuilt(kind, plain, "profile")
    if wrong := [row for row in found.rows if row.faster is not None and not _sound(row.faster)]:
        raise FileError(f"has a ratio that is no positive number (of kernel {wrong[0].kernel}); measure again")
    return found


def _with_quartiles(plain: Any, keep: bool = True) -> Any:
    """Plain data with the quartiles beside all samples that they hold, or without them."""
    if isinstance(plain, list):
        return [_with_quartiles(each, keep) for each in plain]
    if not isinstance(plain, dict):
        return plain
    found = text.quartiles(plain.get("samples_ms") or ()) if keep else None
    inside = {key: _with_quartiles(value, keep) for key, value in plain.items() if key not in QUARTILES}
    return inside | (dict(zip(QUARTILES, found, strict=True)) if found else {})


def _drop_sentences(plain: dict[str, Any]) -> None:
    """Version 1 had sentences where fields are now, none of which a comparison with a baseline reads."""
    plain |= {name: [] for name in ("notes", "remarks") if name in plain}
    for row in plain["rows"] if isinstance(plain.get("rows"), list) else ():
        if isinstance(row, dict) and "norms" in row:
            row["norms"] = []


def _sound(speedup: Speedup) -> bool:
    ends = [end for end in (speedup.interval.low, speedup.interval.high) if end is not None]
    return all(math.isfinite(value) and value > 0 for value in (speedup.value, *ends))


# --- CSV ----------------------------------------------------------------------------------------------------------


def to_csv(result: Profile) -> str:
    """A line a row, all digits; units and meanings in the header; an empty cell is an unknown one."""
    if isinstance(result, KernelProfile):
        rows = [_kernel_row(row, result.ceilings) for row in result.rows]
    else:
        rows = [_step_row(row) for row in result.rows]
    # A compiler's message has many lines.
    rows = [
        {name: " ".join(cell.split()) if isinstance(cell, str) else cell for name, cell in row.items()} for row in rows
    ]
    return csv_text(rows, "kernel")


def _kernel_row(row: KernelCost, ceilings: Ceilings) -> dict[str, Any]:
    case = row.case
    return {
        **{name: getattr(case, name) for name in ("operation", "dtype", "layout")},
        "mode": "training" if case.training else "evaluation",
        "affine": case.affine,
        "tracked": case.tracked,
        "shape": text.shape_words(case.shape),
        "calls": row.calls,
        "kernel": row.kernel,
        "ran": row.ran,
        **_times("forward", row.forward),
        **_times("backward", row.backward),
        **_times("both", row.both),
        **_quartiles("new_memory", row.new_memory.samples_ms if row.new_memory else ()),
        "floor_gb_per_s": text.gb_per_s(row.both),
        "share_of_copy": text.of_copy(row, ceilings),
        **_speedup(row.faster),
        "times_native_new_memory": row.faster_new_memory.value if row.faster_new_memory else None,
        "peak_memory_mib": row.peak_memory_mib,
        "saved_mib": row.saved_mib,
        "cores_lacked": row.cores_lacked,
        "error": text.error_words(row),
        "wrong": row.wrong,
    }


def _times(direction: str, times: Times | None) -> dict[str, Any]:
    return {
        **_quartiles(direction, times.samples_ms if times else ()),
        f"{direction}_floor_bytes": times.floor_bytes if times else None,
        f"{direction}_flops": times.flops if times else None,
    }


def _quartiles(name: str, samples_ms: Sequence[float]) -> dict[str, Any]:
    found = text.quartiles(samples_ms)
    return {
        f"{name}_ms": found.median if found else None,
        f"{name}_lower_quartile_ms": found.low if found else None,
        f"{name}_upper_quartile_ms": found.high if found else None,
        f"{name}_samples": len(samples_ms),
    }


def _speedup(speedup: Speedup | None) -> dict[str, Any]:
    return {
        "times_native": speedup.value if speedup else None,
        "times_native_low_95": speedup.interval.low if speedup else None,
        "times_native_high_95": speedup.interval.high if speedup else None,
        "times_native_of_medians": speedup.of_medians if speedup else None,
    }


def _step_row(row: StepCost) -> dict[str, Any]:
    return {
        "arm": row.arm,
        "mode": row.mode,
        "kernel": row.kernel,
        "batch_size": row.batch_size,
        **_quartiles("step", row.samples_ms),
        "samples_per_s": text.samples_per_s(row),
        **_speedup(row.faster),
        **{f"{name.replace(', ', '_')}_ms": row.shares_ms.get(name) for name in STEP_CLASSES},
        **{field.name: getattr(row.memory, field.name, None) for field in fields(StepMemory)},
        "norms": text.norms_words(row.norms) or None,
        "cores_lacked": row.cores_lacked,
        "error": text.error_words(row),
    }


# --- Markdown and LaTeX -------------------------------------------------------------------------------------------


def to_markdown(result: Profile, gate: Gate | None = None) -> str:
    """The same tables and cells for a GitHub page."""
    title, conditions, notes = _words(result)
    lines = markdown_section(title, [conditions], level=3)
    for heading, columns in _tables(result):
        lines += markdown_section(heading, (), columns)
    lines += markdown_section("", (), (), notes)
    if gate is not None:
        names = Column("row", [str(change.row) for change in gate.changes], words=True)
        columns = [names, *gate_columns(gate.changes)[1:]]
        lines += markdown_section("Comparison with the baseline", [gate_words(gate)], columns)
    return "\n".join(lines)


def to_latex(result: Profile) -> str:
    """The same tables for a paper."""
    title, conditions, notes = _words(result)
    return latex_text(_tables(result), [f"{title}. {conditions}.", *notes])


def _words(result: Profile) -> tuple[str, str, list[str]]:
    """The title, how it was measured, and the notes."""
    notes = [*text.note_lines(result), f"Made on {environment_words(result.environment)}."]
    if isinstance(result, KernelProfile):
        notes.insert(0, f"Measured ceilings: {ceilings_words(result.ceilings)}.")
        return kernel_title(result), f"{text.measured_words(result)}; {text.cache_words(result.cold)}", notes
    notes[:0] = text.remark_lines(result)
    return f"{result.name}: one step of the whole model", text.measured_words(result), notes


def _tables(result: Profile) -> Iterator[tuple[str, list[Column]]]:
    """Each table below its heading, with a column for errors where there are any."""
    if isinstance(result, KernelProfile):
        for heading, rows in text.case_groups(result.rows).items():
            yield heading, [*kernel_columns(rows, result.ceilings).values(), *_errors(rows)]
        for heading, means in mean_groups(result.means).items():
            yield f"{heading}: geometric mean over shapes", mean_columns(means)
        return
    shared = [row for row in result.rows if row.shares_ms]
    split = [row for row in result.rows if row.memory is not None]
    for heading, members, columns in (
        ("Time", result.rows, [*step_columns(result.rows), *_errors(result.rows)]),
        ("Share of a step", shared, share_columns(shared)),
        ("Memory of a training step", split, memory_columns(split)),
    ):
        if members:
            yield heading, [Column("arm", [row.arm for row in members], words=True), *columns]


def _errors(rows: Sequence[KernelCost] | Sequence[StepCost]) -> list[Column]:
    errors = [text.error_words(row) or "" for row in rows]
    return [Column("error", errors, words=True)] * any(errors)
