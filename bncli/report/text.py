"""Numbers, intervals, units, table cells and findings as text, shared by all reports. Does not use rich."""

from __future__ import annotations

import codecs
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from bncli.errors import printable
from bncli.results.compare import Claim
from bncli.results.environment import Environment, Interval, disturbed
from bncli.results.finding import Finding, FindingKind
from bncli.results.train import Target

UNKNOWN = "–"
IN_ASCII = {"–": "-", "─": "-", "━": "=", "±": "+-"}


# --- figures ------------------------------------------------------------------------------------------------------


def figure(value: float | None, digits: int = 3) -> str:
    """A number to `digits` significant digits, never fewer than its whole part has; an en dash for None."""
    if value is None:
        return UNKNOWN
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])
    if exponent < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"


def count(number: int, word: str) -> str:
    """`1 case`, `1,754 cases`."""
    return f"{number:,} {word}{'s' * (number != 1)}"


def metric_figure(value: float | None, metric: str) -> str:
    """An accuracy as a share of 1 to four decimals; a loss to four significant digits."""
    if value is None or metric != "accuracy" or not math.isfinite(value):
        return figure(value, 4)
    return f"{value:.4f}"


def interval_figure(interval: Interval) -> str:
    """`9.81–14.9`, `-0.35..-0.27`; with one open side `> 9.81` or `< 14.9`; empty when nothing bounds it."""
    if interval.low is not None and interval.high is not None:
        return f"{figure(interval.low)}{'..' if interval.low < 0 else '–'}{figure(interval.high)}"
    if interval.low is not None:
        return f"> {figure(interval.low)}"
    return f"< {figure(interval.high)}" if interval.high is not None else ""


def times(value: float, less: str = "fewer", unit: str = "x") -> str:
    """`6.49x fewer`; `13.3x more` for a ratio below 1."""
    return f"{figure(1 / value)}{unit} more" if 0 < value < 1 else f"{figure(value)}{unit} {less}".rstrip()


def setting(value: Any) -> str:
    """A recipe's value as its file would spell it."""
    return f"{value:.12g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def encodable(text: str, encoding: str) -> str:
    """The text in printable characters of the encoding: - for a dash, +- for ±, ? for any other that it lacks."""
    try:
        return printable(text).encode(encoding, "in ASCII").decode(encoding)
    except LookupError:
        return encodable(text, "ascii")


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(IN_ASCII.get(character, "?") for character in error.object[error.start : error.end]), error.end


codecs.register_error("in ASCII", _in_ascii)


def short_names(fields: Mapping[str, Any] | tuple[str, ...]) -> dict[str, str]:
    """Each dotted field's last part, or all of it where two fields end alike."""
    last = [field.rsplit(".", 1)[-1] for field in fields]
    return {field: name if last.count(name) == 1 else field for field, name in zip(fields, last, strict=True)}


def bound_words(claim: Claim) -> str:
    """`at least 3`; `above 1` for a claim that expects more."""
    words = claim.side if claim.bounded else "above" if claim.side == "at least" else "below"
    return f"{words} {setting(claim.bound)}"


def measure_words(claim: Claim) -> str:
    """`shift.distance, layer hidden1, equal loss`; the mean over the run and over layers goes without saying."""
    layer = [f"layer {claim.layer}"] * (claim.layer is not None)
    return ", ".join([claim.measure, *layer, *[claim.when] * (claim.when != "mean")])


def target_words(target: Target) -> str:
    return f"held-out {target.metric} {setting(target.value)}"


FREED_MEMORY_WORDS: dict[str | None, str] = {
    "kept": "freed memory kept for later tensors",
    "set by the user": "freed memory as the user's allocator settings say",
    "not glibc": "freed memory as the allocator decides (it is not glibc's)",
}


def environment_words(made: Environment) -> str:
    threads = f"{count(made.threads, 'thread')} per run"
    driver = [f"driver {made.driver}"] * bool(made.driver) + ["TF32"] * bool(made.tf32)
    versions = [f"torch {made.torch}", f"Python {made.python}", f"bncli {made.bncli}"]
    memory = FREED_MEMORY_WORDS.get(made.freed_memory, "") if made.device == "cpu" else ""
    words = [f"{made.device} ({made.processor}, {made.platform})", threads, memory, *driver, *versions]
    return ", ".join(filter(None, words))


def busy_mark(cores_lacked: float | None) -> str:
    """Beside a time: a mark where other programs disturbed it."""
    return "!" * disturbed(cores_lacked)


def busy_words(cores_lacked: Iterable[float | None]) -> str:
    """What the mark means, of several measurements; empty where none has it."""
    most = max(lacked or 0.0 for lacked in (None, *cores_lacked))
    return busy_mark(most) and (
        f"!: measured while other programs used the cores: up to {figure(most, 2)} threads at a time waited for one, "
        "so these times are too long; measure again on idle cores"
    )


# --- cells and columns of a table ---------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A figure or words, and beside or below them an interval, a spread or a remark."""

    main: str
    aside: str = ""
    style: str = ""

    @property
    def aside_in_line(self) -> str:
        """The aside as it is written beside the figure: `(9.81–14.9)`, `±2%`."""
        return f"({self.aside})" if self.aside and not self.aside.startswith("±") else self.aside

    @property
    def line(self) -> str:
        """The figure with its aside."""
        return f"{self.main} {self.aside_in_line}".strip()


@dataclass(frozen=True)
class Column:
    header: str  # one line or more
    values: Sequence[str | Cell]  # one for each row
    words: bool = False  # flush left, and may wrap
    optional: bool = False  # may be hidden where there is no room; a line below the table then names it
    once: bool = False  # a value that is repeated below the same heading is shown once
    style: str = ""
    short: str = ""  # header for narrow terminals

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(Cell(value) if isinstance(value, str) else value for value in self.values)

    @property
    def name(self) -> str:
        """Its header on one line: `steps to target`, `samples/s`."""
        return self.header.replace("\n/", "/").replace("\n", " ")


# --- findings -----------------------------------------------------------------------------------------------------

# Kind of finding -> its sentence; wrong numbers have `_wrong_number`.
FINDINGS: dict[FindingKind, str] = {
    "right": "",
    "not_zero": "{quantity} is not 0",
    "wrong_type": "{raised}returned a {given}; expected {wanted}",
    "wrong_shape": "y has shape {given}; expected the input's, {wanted}",
    "wrong_dtype": "y has dtype {given}; expected the input's, {wanted}",
    "wrong_device": "y has device {given}; expected the input's, {wanted}",
    "not_computed": "{quantity} was not computed",
    "no_gradient": "{quantity} is missing when x does not require a gradient",
    "no_second_derivative": "{raised}the gradients were returned without a graph: no second derivative",
    "not_derivative": "{quantity} differs from central differences of the loss by {relative:.2g} (relative)",
    "wrong_exception": "{raised}{text}; expected a ValueError",
    "accepted": "accepted an input {given}, whose variance is 0 over one value; expected a ValueError",
    "input_written": "{names} changed during the call",
    "running_moved": "{names} changed during the call in evaluation mode",
    "running_moved_by_nothing": "{names} changed on an empty batch",
    "not_deterministic": "{names} differ between two runs on the same inputs",
    "raised": "{raised}{text}",
    "no_memory": "{raised}{text}",
    "leaf_written": "{raised}{text}",
    "saved_written": "{raised}{text}",
    "no_graph": "{raised}{text}",
}
# The sentence where the kernel raised an exception; the shapes are then those of the statistics, not of y.
RAISED: dict[FindingKind, str] = {
    "wrong_shape": "{raised}returned mean and var of shapes {given}; expected {wanted}",
    "not_derivative": "{exception}: {text}",
}


def finding_text(finding: Finding) -> str:
    """What is wrong with a kernel's result, in words; empty where it is right."""
    if finding.kind in ("off", "nan_missing", "nan_unexpected"):
        return _wrong_number(finding)
    words = {**FINDINGS, **(RAISED if finding.exception else {})}[finding.kind]
    raised = f"raised {finding.exception}: " if finding.exception else ""
    return words.format(**{**vars(finding), "raised": raised, "names": ", ".join(finding.names)})


def _wrong_number(finding: Finding) -> str:
    if finding.found is None:  # the tensor was too large to search for the place
        return f"{finding.quantity} is not finite everywhere"
    if finding.at is None:
        within = f" within {finding.allowed:.2g}" if finding.allowed is not None else ""
        return f"{finding.quantity} is {finding.found:.6g}; expected {finding.expected:.6g}{within}"
    relative = f"; relative error {finding.relative:.2g}" if finding.relative is not None else ""
    place = ", ".join(map(str, finding.at))
    return f"{finding.quantity}[{place}] is {finding.found:.7g}; expected {finding.expected:.7g}{relative}"
