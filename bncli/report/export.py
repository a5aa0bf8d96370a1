"""Writers of CSV, Markdown and JSON, shared by the commands."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from bncli.report.text import Column


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


def markdown_table(columns: Sequence[Column]) -> list[str]:
    """The lines of a GitHub table: words flush left, figures flush right."""
    header = [column.name for column in columns]
    rule = [":--" if column.words else "--:" for column in columns]
    rows = [[cell.line for cell in row] for row in zip(*(column.cells for column in columns), strict=True)]
    lines = [map(markdown, header), rule, *(map(markdown, row) for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def markdown(text: str) -> str:
    """Text escaped so that Markdown shows it as it is, on one line."""
    return re.sub(r"([\\`*_<|\[\]#~$&]|^>)", r"\\\1", " ".join(text.split()))
