"""A finding with its place in the table: what the diagnosis reads."""

from __future__ import annotations

from dataclasses import dataclass

from bncli.measure.reference.observe import Finding


@dataclass(frozen=True)
class Verdict:
    section: str
    row: str
    identifier: str
    finding: Finding

    @property
    def failed(self) -> bool:
        return self.finding.failed
