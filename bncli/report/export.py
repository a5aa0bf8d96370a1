"""Writers of CSV, Markdown, LaTeX and JSON, shared by the commands."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from bncli.errors import printable
from bncli.report.text import Column

NOT_IN_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # colours of a compiler's message


def json_text(plain: Any) -> str:
    """Plain data, as `results.serialize.to_plain` makes it, as JSON."""
    return json.dumps(plain, allow_nan=False, indent=1) + "\n"


def csv_text(rows: Sequence[dict[str, Any]], first: str) -> str:
    """One line per row below a header with the rows' keys; without rows the header is `first`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [first], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


Outcome = Literal["passed", "failure", "error", "skipped"]


class JunitCase(NamedTuple):
    """A test of a JUnit report. text: why it did not pass, or what is said of one that did."""

    group: str
    name: str
    seconds: float = 0.0
    outcome: Outcome = "passed"
    text: str = ""


def junit_text(name: str, cases: Sequence[JunitCase], date: str) -> str:
    """A JUnit report of one suite. date: ISO 8601."""
    from xml.etree import ElementTree

    outcomes = [case.outcome for case in cases]
    totals = {"name": name, "tests": f"{len(cases)}", "time": f"{sum(case.seconds for case in cases):.3f}"}
    totals |= {"failures": f"{outcomes.count('failure')}", "errors": f"{outcomes.count('error')}"}
    totals |= {"skipped": f"{outcomes.count('skipped')}", "timestamp": date}
    root = ElementTree.Element("testsuites", totals)
    suite = ElementTree.SubElement(root, "testsuite", totals)
    for case in cases:
        fields = {"classname": f"{name}.{case.group}", "name": case.name, "time": f"{case.seconds:.3f}"}
        test = ElementTree.SubElement(suite, "testcase", fields)
        if case.outcome != "passed":
            ElementTree.SubElement(test, case.outcome, message=case.text.partition("\n")[0]).text = case.text
        elif case.text:
            ElementTree.SubElement(test, "system-out").text = case.text
    ElementTree.indent(root)
    return NOT_IN_XML.sub("", printable(ElementTree.tostring(root, "unicode", xml_declaration=True))) + "\n"


def markdown_table(columns: Sequence[Column]) -> list[str]:
    """The lines of a GitHub table: words flush left, figures flush right."""
    header = [column.name for column in columns]
    rule = [":--" if column.words else "--:" for column in columns]
    rows = [[cell.line for cell in row] for row in zip(*(column.cells for column in columns), strict=True)]
    lines = [map(markdown, header), rule, *(map(markdown, row) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def markdown_section(
    heading: str, sentences: Iterable[str], columns: Sequence[Column] = (), notes: Iterable[str] = (), level: int = 4
) -> list[str]:
    """The lines of a part of a GitHub page: sentences, a table and a list, as far as there are any; else no line."""
    table = markdown_table(columns) if columns else []
    blocks = [*map(markdown, sentences)], table, [f"- {markdown(note)}" for note in notes]
    body = [line for block in blocks if block for line in (*block, "")]
    return [*[f"{'#' * level} {markdown(heading)}", ""] * bool(heading), *body] if body else []


IN_LATEX = str.maketrans(
    {character: f"\\{character}" for character in "{}&%$#_"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", '"': "''"}
    | {"<": "$<$", ">": "$>$", "|": "$|$", "±": r"$\pm$", "×": r"$\times$", "′": "$'$", "²": "$^2$"}
)


def latex_text(tables: Iterable[tuple[str, Sequence[Column]]], notes: Iterable[str]) -> str:
    """Tables for a paper, each below its heading; optional columns are left out. Headings and notes are comments."""
    lines = [r"% Needs \usepackage{booktabs}; the notes at the end are for the caption."]
    for heading, columns in tables:
        omitted = [column.name for column in columns if column.optional]
        lines += ["", f"% {heading}", *[f"% Left out; the CSV has them: {', '.join(omitted)}."] * bool(omitted)]
        lines += latex_table([column for column in columns if not column.optional])
    return "\n".join([*lines, "", *(f"% {' '.join(note.split())}" for note in notes)]) + "\n"


def latex_table(columns: Sequence[Column]) -> list[str]:
    """The lines of a tabular with rules of booktabs: words flush left, figures with their intervals flush right."""
    sides = ["l" if column.words else "r" for column in columns]
    heads = []
    for side, column in zip(sides, columns, strict=True):
        *above, last = map(latex, column.header.split("\n"))
        heads.append(rf"\shortstack[{side}]{{" + r"\\".join([*above, last]) + "}" if above else last)
    rows = [[latex(cell.line) for cell in row] for row in zip(*(column.cells for column in columns), strict=True)]
    top, *body = [" & ".join(row) + r" \\" for row in (heads, *rows)]
    begin = rf"\begin{{tabular}}{{{''.join(sides)}}}"
    return [begin, r"\toprule", top, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]


def latex(text: str) -> str:
    """Text escaped so that LaTeX sets it as it is, on one line; 12.1x and 8x32 get multiplication signs."""
    return re.sub(r"(?<=\d)x(?![a-z])", "×", " ".join(text.split())).translate(IN_LATEX)


def markdown(text: str) -> str:
    """Text escaped so that Markdown shows it as it is, on one line."""
    return re.sub(r"([\\`*_<|\[\]#~$&]|^>)", r"\\\1", " ".join(text.split()))
