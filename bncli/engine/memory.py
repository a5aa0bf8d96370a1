"""Memory of the machine that is available. No torch."""

from __future__ import annotations

import contextlib
from pathlib import Path


def available_mib(line: Path = Path("/proc/self/cgroup"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Memory that this process can take without swapping: the machine's, or less under a control group's limit.

    A line of the first file is `0::/path` (version 2) or `4:memory:/path` (version 1). The groups around it count too;
    a container may see its own as the root of `groups`.
    """
    import psutil  # here, since it takes 10 ms that most commands can save

    left = [float(psutil.virtual_memory().available)]
    with contextlib.suppress(OSError):  # not Linux
        for number, controllers, path in (each.split(":", 2) for each in line.read_text().splitlines()):
            root = groups if number == "0" else groups / "memory"
            if number == "0" or "memory" in controllers.split(","):
                around = [each for each in (root / path.strip("/")).parents if each.is_relative_to(root)]
                left += [_left_in(group, number == "0") for group in (root / path.strip("/"), *around)]
    return max(0.0, min(left)) / 2**20


def _left_in(group: Path, version_2: bool) -> float:
    """Bytes that a group's limit leaves; the pages of files that it holds are given back when memory is short."""
    limit, used, prefix = ("max", "current", "") if version_2 else ("limit_in_bytes", "usage_in_bytes", "total_")
    try:
        bounds = [float((group / f"memory.{name}").read_text().replace("max", "inf")) for name in (limit, used)]
        stat = dict(each.split() for each in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group here, or the root, which has no limit
        return float("inf")
    return bounds[0] - bounds[1] + sum(float(stat.get(f"{prefix}{kind}active_file", 0)) for kind in ("", "in"))
