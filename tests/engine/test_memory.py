"""The memory that is available, and which errors mean that there was none."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bncli.engine.memory import SETTINGS, available_mib
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


FREE = """
import resource
from bncli.engine.memory import MAPPED_FROM_BYTES, freed_memory, keep_freed_memory, new_memory
def faults(before=lambda: None):
    counts = []
    for _ in range(2):
        before()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        b"x" * (MAPPED_FROM_BYTES + 1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - counts[1] > 1000
print(freed_memory(), faults())
keep_freed_memory()
print(freed_memory(), faults())
if freed_memory() == "kept":
    with new_memory() as give_back:
        print(faults(give_back))
    print(faults())
"""


def freed(**settings: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "GLIBC_TUNABLES")}
    done = subprocess.run([sys.executable, "-c", FREE], env=environment | settings, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode().splitlines()


@pytest.mark.skipif("glibc" not in str(platform.libc_ver()), reason="only glibc can be told to keep memory")
def test_freed_memory_is_kept_but_where_new_memory_is_measured_or_the_user_has_set_the_allocator() -> None:
    assert freed() == ["default True", "kept False", "True", "False"]
    for settings in ({"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}):
        assert freed(**settings)[1:] == ["set by the user True"]


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
