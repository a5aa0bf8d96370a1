"""The outcome of `bncli gradcheck` as JSON: its fields, and beside them what they say in words."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from bncli.report.gradcheck.text import evidence_text, failure_text, not_checked_text, tolerance_text
from bncli.results.environment import FORMAT_VERSION
from bncli.results.gradcheck import BiasStep, CheckGroup, Gradcheck
from bncli.results.serialize import to_plain


def to_json(result: Gradcheck, commands: Sequence[Sequence[str]]) -> str:
    """commands: for each failure, the words of the command that runs it again."""
    failures = [
        {**to_plain(failure), "message": failure_text(failure), "reproduce": shlex.join(command)}
        for failure, command in zip(result.failures, commands, strict=True)
    ]
    diagnoses = [{**to_plain(diagnosis), "evidence": evidence_text(diagnosis)} for diagnosis in result.diagnoses]
    lists = {"groups": [_group(group) for group in result.groups], "failures": failures, "diagnoses": diagnoses}
    return _to_text({"passed": result.passed, **to_plain(result), **lists})


def interrupted_to_json(groups: Sequence[CheckGroup]) -> str:
    """The groups that were finished before the check was interrupted."""
    return _to_text({"interrupted": True, "groups": [_group(group) for group in groups]})


def _group(group: CheckGroup) -> dict[str, Any]:
    return {**to_plain(group), "tolerance": tolerance_text(group.rule), "not_checked": not_checked_text(group.skipped)}


def demo_to_json(steps: Sequence[BiasStep]) -> str:
    return _to_text({"steps": [to_plain(step) for step in steps]})


def _to_text(plain: dict[str, Any]) -> str:
    return json.dumps({"format_version": FORMAT_VERSION, **plain}, allow_nan=False, indent=1) + "\n"
