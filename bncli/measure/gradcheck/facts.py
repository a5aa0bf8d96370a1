"""What fails and what is clean, where no known bug explains it: what the kernel's author starts from."""

from __future__ import annotations

from collections.abc import Callable

from bncli.measure.reference.judge import Verdict

FEW = 6  # names that are listed; more are counted
Part = Callable[[list[str]], str]


def _shape(parts: list[str]) -> str:
    return parts[3]


def _layout_and_shape(parts: list[str]) -> str:
    return "/".join(parts[2:4])


# A name, and which of them the cases looked at have to share with a failing one: few shapes are run in all dtypes.
FACETS: tuple[tuple[str, Part, Part], ...] = (
    ("shape", _shape, lambda parts: ""),
    ("layout", lambda parts: parts[2], _shape),
    ("mode", lambda parts: parts[0], _layout_and_shape),
    ("dtype", lambda parts: parts[1], _layout_and_shape),
    ("operation", lambda parts: parts[4].partition("~")[0], _layout_and_shape),
)


def facts(verdicts: list[Verdict]) -> str:
    """Which quantities, modes, dtypes, layouts, shapes and operations fail, and which of them are clean."""
    values = [verdict for verdict in verdicts if verdict.section == "values" and verdict.identifier.count("/") == 5]
    failing = [verdict for verdict in values if verdict.failed]
    told = []
    if failing:
        quantities = _names(failing, lambda parts: parts[5])
        clean = [name for name in _names(values, lambda parts: parts[5]) if name not in quantities]
        told.append(f"what fails: {_listed(quantities)}" + (f" (clean: {_listed(clean)})" if clean else ""))
        wrong = {verdict.identifier.rpartition("/")[0] for verdict in failing}
        told.append(f"{len(wrong)} of {len({v.identifier.rpartition('/')[0] for v in values})} plain cases")
        told += [words for facet in FACETS if (words := _facet(*facet, failing, values))]
    rows = dict.fromkeys(verdict.row for verdict in verdicts if verdict.failed and verdict.section != "values")
    if rows:
        told.append(f"{'besides' if failing else 'what fails, every plain case being right'}: {_listed(list(rows))}")
    return "; ".join(told)


def _names(verdicts: list[Verdict], of: Part) -> list[str]:
    return list(dict.fromkeys(of(verdict.identifier.split("/")) for verdict in verdicts))


def _facet(name: str, of: Part, shared: Part, failing: list[Verdict], values: list[Verdict]) -> str:
    """Empty where every one fails: then it makes no difference."""
    alike = set(_names(failing, shared))
    wrong = _names(failing, of)
    every = _names([verdict for verdict in values if shared(verdict.identifier.split("/")) in alike], of)
    clean = [one for one in every if one not in wrong]
    if not clean:
        return ""
    return f"{name} {_listed(wrong)} alone" if len(wrong) <= len(clean) else f"every {name} but {_listed(clean)}"


def _listed(names: list[str]) -> str:
    more = len(names) - FEW
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:FEW])} and {more} more"
