"""Page of a profile, of either view, with the verdicts on a baseline: see report.page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bncli.report.page import Page, Section, figure_section, render, table_section
from bncli.report.profile import baseline, figure, kernels, steps, text
from bncli.results.profile import Gate, KernelProfile, Profile, StepProfile


def to_html(profile: Profile, gate: Gate | None, command: str, recipe: str) -> str:
    """A self-contained page; with a figure where matplotlib is installed."""
    page = _kernel_page(profile) if isinstance(profile, KernelProfile) else _step_page(profile)
    heading = "Where the time of a step goes" if isinstance(profile, StepProfile) else "Speed and the machine's limits"
    drawn = figure_section(heading, figure.draw, profile)
    wrong = [f"{row.kernel} is wrong: {text.error_words(row)}" for row in profile.rows if row.wrong][:1]
    headline, sections, failed = [*wrong, *page.headline], [drawn, *page.sections], bool(wrong)
    if gate is not None:
        only = [f"Not in the baseline: {row}" for row in gate.only_now]
        only += [f"In the baseline, but without a speedup now: {row}" for row in gate.only_baseline]
        sections.insert(0, replace(table_section(baseline.gate_table(gate)), notes=only))
        headline, failed = [baseline.closing(gate), *headline], failed or gate.failed
    verdict = "bad" if failed else "good" if gate else ""
    marks = text.mark_lines(profile)
    page = replace(page, headline=headline[:5], sections=sections, warnings=marks, verdict=verdict)
    return render(page, command, recipe)


def _kernel_page(profile: KernelProfile) -> Page:
    rows, *means = map(table_section, kernels.kernel_tables(profile))
    notes = [
        f"Measured ceilings: {kernels.ceilings_words(profile.ceilings)}.",
        *kernels.without_empty_cases(profile.rows)[1],
        *map(text.note_words, profile.notes),
        *kernels.legend(profile),
    ]
    last = [replace(rows, heading="Every shape", words=""), Section("Notes", notes=notes)]
    subtitle = f"{rows.words}; {text.cache_words(profile.cold)}"
    return Page(rows.heading, subtitle, list(_speeds(profile)), [*means, *last], [profile.environment])


def _speeds(profile: KernelProfile) -> Iterator[str]:
    """A sentence for each kernel beside native."""
    for kernel in dict.fromkeys(mean.kernel for mean in profile.means):
        means = sorted((mean for mean in profile.means if mean.kernel == kernel), key=lambda mean: mean.faster.value)
        ends = [*dict.fromkeys(text.of_native(mean.faster, mean.cores_lacked) for mean in (means[0], means[-1]))]
        cases = f"{means[0].operation}, {means[0].dtype}, {means[0].layout}"
        cases = cases if len(means) == 1 else f"{len(means)} kinds of operation, dtype and layout"
        speeds = "between " * (len(ends) > 1) + " and ".join(ends)
        yield f"{kernel} is {speeds}, geometric mean over shapes, for {cases}."


def _step_page(profile: StepProfile) -> Page:
    time, *others = map(table_section, steps.step_tables(profile))
    notes = [*steps.norm_lines(profile.rows), *map(text.note_words, profile.notes), *steps.legend(profile.rows)]
    last = [Section("Norm layers: what to change", notes=text.remark_lines(profile)), Section("Notes", notes=notes)]
    sections = [replace(time, heading="Time", words=""), *others, *last]
    return Page(time.heading, time.words, list(_times(profile)), sections, [profile.environment])


def _times(profile: StepProfile) -> Iterator[str]:
    """A sentence for each training step that is compared with native, or for every one where none is."""
    timed = [row for row in profile.rows if row.mode == "training" and row.samples_ms]
    for row in [row for row in timed if row.faster] or timed:
        time = text.samples_cell(row.samples_ms, row.cores_lacked).main
        kernel = f" with {row.kernel}" * bool(row.kernel)
        speed = f", {text.of_native(row.faster, row.cores_lacked)}" if row.faster else ""
        yield f"{row.arm}: a training step takes {time} ms{kernel}{speed}."
