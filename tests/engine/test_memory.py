"""The memory that is available, and which errors mean that there was none."""

from __future__ import annotations

from pathlib import Path

import pytest

from bncli.engine.memory import available_mib
from bncli.errors import is_out_of_memory

NOWHERE = Path("/nonexistent")
MIB = 2**20


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_without_groups_it_is_the_machines() -> None:
    assert available_mib(NOWHERE, NOWHERE) > 1


def test_a_limit_of_a_group_of_version_2_counts_less_what_it_uses_but_for_its_file_pages(tmp_path: Path) -> None:
    write(tmp_path, line="0::/outer/inner\n")
    stat = f"anon 5\nactive_file {3 * MIB}\ninactive_file {2 * MIB}\n"
    write(tmp_path / "groups/outer/inner", memory__max="max", memory__current=str(10 * MIB), memory__stat=stat)
    alone = available_mib(tmp_path / "line", tmp_path / "groups")
    assert alone > 5
    write(tmp_path / "groups/outer", memory__max=str(9 * MIB), memory__current=str(10 * MIB), memory__stat=stat)
    assert available_mib(tmp_path / "line", tmp_path / "groups") == 4
    write(tmp_path / "groups/outer", memory__max=str(MIB))
    assert available_mib(tmp_path / "line", tmp_path / "groups") == 0


def test_a_limit_of_version_1_counts_also_where_a_container_sees_its_group_as_the_root(tmp_path: Path) -> None:
    write(tmp_path, line="5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n")
    files = {"memory__limit_in_bytes": str(8 * MIB), "memory__usage_in_bytes": str(2 * MIB)}
    write(tmp_path / "groups/memory", **files, memory__stat="total_inactive_file 0\n")
    assert available_mib(tmp_path / "line", tmp_path / "groups") == 6


class OutOfMemoryError(RuntimeError):
    """As torch's of a GPU."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_errors_of_python_and_torch_are_told_from_others(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
