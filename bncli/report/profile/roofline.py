"""A profile as a picture: kernels under the roofs that the machine reached, or a step's time by class of work."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bncli.errors import FileError
from bncli.report.figure import COLOURS, MISSING, STYLE, check_path
from bncli.report.files import write_atomically
from bncli.report.profile.cost_bars import draw_facets, facets, facets_height
from bncli.report.profile.roofs import roofline
from bncli.report.profile.step_bars import step_bars, step_height
from bncli.report.profile.text import cache_words, gb_per_s
from bncli.results.environment import Environment
from bncli.results.profile import KernelProfile, StepProfile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, BESIDE = 13.0, 6.8  # inches; bars higher than that stand below the roofline, not beside it
ROOF_HEIGHT = 4.8
KEY = "Dot: a shape; larger mark: geometric mean; line on a bar: quartiles; a column's own intensity stands below it"


def draw(profile: KernelProfile | StepProfile, path: Path) -> None:
    """Write the picture to `path`, an .svg or a .png. Raises FileError for another suffix or without matplotlib."""
    check_path(path)
    write_atomically(path, render(profile, path.suffix.lower().lstrip(".")))


def render(profile: KernelProfile | StepProfile, kind: str) -> bytes:
    """The picture as the bytes of a "svg" or "png" file, the same for the same profile. Raises FileError."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FileError(MISSING) from error
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        picture = Figure(layout="constrained")
        if isinstance(profile, KernelProfile):
            _draw_kernels(picture, profile)
        else:
            _draw_steps(picture, profile)
        file = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
        picture.savefig(file, format=kind, dpi=130, metadata=metadata)
    return file.getvalue()


def _draw_steps(picture: Figure, profile: StepProfile) -> None:
    picture.set_size_inches(11, step_height(profile))
    _title(picture, f"{profile.name}: where the time of a step goes", profile.environment, "")
    step_bars(picture.subplots(), profile)


def _draw_kernels(picture: Figure, profile: KernelProfile) -> None:
    timed = [row for row in profile.rows if gb_per_s(row.both)]
    kernels = {kernel: index for index, kernel in enumerate(dict.fromkeys(row.kernel for row in profile.rows))}
    groups = facets(timed)
    across = 1 if sum(group.bars for group in groups) <= 30 and len(groups) <= 4 else min(3, len(groups))
    height = facets_height(groups, across)
    below = height > BESIDE or across > 1
    picture.set_size_inches(WIDTH, 0.9 + (ROOF_HEIGHT + height if below else max(ROOF_HEIGHT, height)))
    dtypes = ", ".join(dict.fromkeys(row.case.dtype for row in profile.rows))
    _title(
        picture,
        "Batch norm under the roofs of its machine",
        profile.environment,
        f"{dtypes}; {cache_words(profile.cold)}" if dtypes else cache_words(profile.cold),
        KEY,
    )
    parts: Any = (
        picture.subfigures(2, 1, height_ratios=(ROOF_HEIGHT, height))
        if below
        else picture.subfigures(1, 2, width_ratios=(1.0, 1.15))
    )
    roofline(parts[0].subplots(), timed, profile.ceilings, kernels)
    stretch = 1.0 if below else max(1.0, ROOF_HEIGHT / max(height, 1.0))
    draw_facets(parts[1], groups, across, profile.ceilings, kernels, stretch)
    _legend(picture, {row.kernel: kernels[row.kernel] for row in timed})


def _title(picture: Figure, title: str, made: Environment, more: str, key: str = "") -> None:
    words: dict[str, Any] = {"ha": "left", "x": 0.008, "parse_math": False}
    picture.suptitle(title, fontsize=12, fontweight="bold", **words)
    threads = f"{made.threads} thread{'s' * (made.threads != 1)}"
    parts = [f"{made.device} ({made.processor}), {threads}", more, f"torch {made.torch}", made.date[:10]]
    lines = [*textwrap.wrap("; ".join(filter(None, parts)), 170), key]
    picture.supxlabel("\n".join(filter(None, lines)), fontsize=8, **words)


def _legend(picture: Figure, kernels: dict[str, int]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS[index % len(COLOURS)], label=kernel) for kernel, index in kernels.items()]
    if handles:
        style: dict[str, Any] = {"ncols": len(handles), "frameon": False, "handlelength": 1.0, "columnspacing": 1.4}
        picture.legend(handles=handles, loc="outside upper right", **style)
