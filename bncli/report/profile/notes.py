"""Sentences of a profile: notes on its figures, what the norm layers are, and remarks on them. No rich here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bncli.report.profile.text import NATIVE, size_words
from bncli.report.text import finding_text
from bncli.results.profile import (
    KernelCost,
    KernelProfile,
    NormLayers,
    NormRemark,
    Note,
    Profile,
    StepCost,
    StepDifference,
)

NAMED_CHANNELS = 4  # of a remark; the others are counted


def note_lines(profile: Profile) -> list[str]:
    """What a reader of the figures must know, a sentence each."""
    busy = busy_words(profile) if isinstance(profile, KernelProfile) else None
    return [*([] if busy is None else [busy]), *map(note_words, profile.notes)]


def busy_words(profile: KernelProfile) -> str | None:
    """That other programs seem to have used a CPU's cores, by a small copy; None where it says nothing of the kind."""
    if not profile.cores_shared:
        return None
    size, reached = profile.ceilings.copies[0]
    return (
        f"other programs seem to use these cores: a copy of {size_words(size)} reached {reached:.2g} GB/s, the largest "
        f"{profile.ceilings.copy_gb_per_s:.2g} GB/s; threads then wait for each other, and times mean little"
    )


def note_words(note: Note) -> str:
    more = f" and {len(note.cases) - 1} more" if len(note.cases) > 1 else ""
    return _note_words(note) + (f": {note.cases[0]}{more}" if note.cases else "")


def _note_words(note: Note) -> str:
    match note.kind:
        case "channels sampled":
            return "run whole, and judged on some of the channels, from the first to the last"
        case "peak needs compilation":
            return f"{note.kernel}: no peak of memory, which would take another compilation in a process of its own"
        case "peak unknown":
            return f"{note.kernel}: no peak of memory: {note.reason}"
        case "few rounds":
            return f"fewer rounds than the {note.count} of an interval"
        case "compilation":
            return f"{note.kernel}: {note.seconds:.1f} s of compilation, which are in no row"
        case "host bound":
            return f"in {note.count} of {note.of} samples the device waited for the host"
        case "same work":
            return f"{note.arm} stands for {', '.join(note.others)} as well: their steps take the same work"
        case "model compiled":
            return f"{note.arm} is compiled: what torch.compile fused counts as other, whatever it holds"
        case "random data":
            return f"{note.arm} is trained on random numbers: the loss is the mean of its output's squares"
        case "memory unknown":
            return f"{note.arm}, {note.kernel or 'no kernel'}: its memory is unknown: {note.reason}"
        case "norms not watched":
            return f"{note.arm}: its norms could not be watched: {note.reason}"
        case "norms watched":
            judged = f"; running statistics are judged after {note.of}" if (note.count or 0) < (note.of or 0) else ""
            return f"{note.arm}: its norms were watched for {note.count} training steps{judged}"


# --- errors of rows ---------------------------------------------------------------------------------------------------


def error_words(row: KernelCost | StepCost) -> str | None:
    """Why a row has no times, on one line; None where it has."""
    if isinstance(row, StepCost) and row.difference is not None:
        return difference_words(row.difference)
    if isinstance(row, KernelCost) and row.finding is not None:
        where = "" if row.wrong_case is None else f", in the case {row.wrong_case}"
        return finding_text(row.finding) + where
    return None if row.error is None else " ".join(row.error.split())


def difference_words(found: StepDifference) -> str:
    more = f" (and {found.more} more)" if found.more else ""
    what = f"the {found.kind}{f' of {found.tensor}' if found.tensor else ''}{more}"
    native = f"native's{', in float64' if found.in_float64 else ''}"
    return f"wrong: {what} is {found.error:.1e} of its size off {native}; {found.allowed:.1e} is allowed"


# --- norm layers ------------------------------------------------------------------------------------------------------


def norms_words(norms: Sequence[NormLayers]) -> str:
    """`2 batch norms (1 with relu, 1 alone), 3 LayerNorm`; empty without any."""
    batch = [layers for layers in norms if layers.kind == "batch norm"]
    words = [f"{layers.count} {layers.kind}" for layers in norms if layers.kind != "batch norm"]
    if not batch:
        return ", ".join(words)
    count = sum(layers.count for layers in batch)
    converted = ", ".join(f"{layers.count} {_calls_words(layers)}" for layers in batch if layers.converted)
    others = "".join(
        f", {layers.count} on the {layers.kernel} kernel"
        for layers in batch
        if not layers.converted and layers.kernel != NATIVE
    )
    return ", ".join([f"{count} batch norm{'s' * (count > 1)}{f' ({converted})' * bool(converted)}{others}", *words])


def _calls_words(layers: NormLayers) -> str:
    """What a converted norm is one call with."""
    calls = [f"with {' + '.join(operations)}" if operations else "alone" for operations in layers.calls]
    return ", ".join(calls) or "left as it was"


@dataclass(frozen=True)
class RemarkWords:
    layer: str
    finding: str
    advice: str


def remark_words(remark: NormRemark) -> RemarkWords:
    """Where something is wrong with norm layers, what it is, and what to do about it."""
    more = f" and {remark.more_layers} more" if remark.more_layers else ""
    return RemarkWords((remark.layer or "(the model)") + more, *_finding_and_advice(remark))


def _finding_and_advice(remark: NormRemark) -> tuple[str, str]:
    figures = remark.figures
    match remark.kind:
        case "one value":
            return (
                "one value a channel: a batch of 1, and no positions",
                "nothing is left of the input, and torch raises in training: use batches of 2 or more, or a norm that "
                "averages over channels",
            )
        case "constant channels":
            count, names = _channels_words(remark)
            factor = 1 / math.sqrt(figures["eps"])
            return (
                f"{count} are constant in a batch: {names}",
                f"their output is the norm's bias, and gradients pass times 1/sqrt(eps) = {factor:,.0f}: leave these "
                "inputs away, or look for a dead activation in front",
            )
        case "large mean":
            count, names = _channels_words(remark)
            return (
                f"a mean of {figures['deviations']:,.0f} deviations in {count}: {names}",
                f"beyond {figures['limit']:,.0f} in {remark.dtype} digits of the variance are lost: take the mean off "
                "earlier, in the data or in the layer before",
            )
        case "cumulative average":
            return (
                "momentum None: the running statistics are the cumulative average of all steps",
                "the first batches count as much as the last: give a momentum, or reset the statistics before "
                "evaluation and run some batches",
            )
        case "short half-life":
            momentum = figures["momentum"]
            meant = f"{1 - momentum:.3g}" if momentum < 1 else "0.1"
            return (
                f"momentum {momentum:g}: the running average's half-life is {figures['half_life_steps']:.2g} steps",
                "evaluation uses hardly more than the last batch; momentum is the weight of the new batch, and "
                f"{meant} may be what was meant",
            )
        case "long half-life":
            budget = f", and training has {figures['budget_steps']:,.0f}" if "budget_steps" in figures else ""
            half_life = f"half-life is {figures['half_life_steps']:,.0f} steps{budget}"
            return (
                f"momentum {figures['momentum']:g}: the running average's {half_life}",
                f"at the end {figures.get('kept', 1.0):.0%} of it is still its initial 0 and 1: raise the momentum, or "
                "re-estimate it over some batches before evaluation",
            )
        case "running mean off":
            count, names = _channels_words(remark)
            return (
                f"after {figures['steps']:,.0f} steps the running mean is {figures['deviations']:.2g} deviations off "
                f"the batches' in {count}: {names}",
                "evaluation sees other inputs than training: raise the momentum or lower the learning rate, or "
                "re-estimate the statistics over some batches before evaluation",
            )
        case "bias without effect":
            return (
                f"the bias of {remark.source} right in front is subtracted again "
                f"({figures['parameters']:.0f} dead parameters)",
                f"give {remark.source} bias=False: the norm's own bias does its work",
            )
        case "last batch of one":
            raises = (
                "torch raises there in training" if figures["raises"] else "its statistics are those of one example"
            )
            return (
                f"an epoch's last batch would have 1 example: {raises}",
                "bncli leaves that batch out; in a DataLoader set drop_last=True, or take another batch size",
            )


def _channels_words(remark: NormRemark) -> tuple[str, str]:
    """`5 of 16 channels` and `0, 3, 4, 9, ... (1 more)`."""
    left = len(remark.channels) - NAMED_CHANNELS
    names = [*map(str, remark.channels[:NAMED_CHANNELS]), *[f"... ({left} more)"] * (left > 0)]
    return f"{len(remark.channels)} of {remark.figures['of_channels']:.0f} channels", ", ".join(names)
