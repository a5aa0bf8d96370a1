"""Devices by name, peaks of memory, the environment of a result, TF32, and deterministic algorithms."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from bncli.engine.device import (
    PeakMemory,
    cpu_threads,
    deterministic,
    environment,
    in_tf32,
    peak_memory_mib,
    reset_peak_memory,
    resolve,
    tf32_allowed,
)
from bncli.engine.memory import give_back_freed_memory
from bncli.errors import Unavailable, UsageError

CPU = torch.device("cpu")
LARGE = 256 * 2**20 // 4  # float32: more than the 64 MiB that malloc may keep for later, which count as in use


@pytest.mark.parametrize(
    ("name", "here", "reason"),
    [
        ("cuda", torch.cuda.is_available(), r"device cuda: this torch .* cannot use CUDA: .*The CPU can be used"),
        ("cuda:99", False, "cannot use CUDA|devices here, counted from 0"),
        ("mps", torch.backends.mps.is_available(), "has no Metal device here"),
    ],
)
def test_a_device_that_is_not_here_is_refused_with_the_reason(name: str, here: bool, reason: str) -> None:
    if here:
        assert resolve(name).type == name
        return
    with pytest.raises(Unavailable, match=reason) as error:
        resolve(name)
    assert error.value.exit_code == 3


@pytest.mark.parametrize("name", ["gpu", "cpux", "tpu", "cuda:x", ""])
def test_a_name_that_is_no_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"device {name}: expected one of auto, cpu, cuda, cuda:N, mps"):
        resolve(name)


def test_auto_takes_what_is_here() -> None:
    assert resolve("auto").type in ("cpu", "cuda", "mps")


def test_peak_memory_counts_from_its_last_reset() -> None:
    large = torch.ones(LARGE)
    with_large = peak_memory_mib(CPU)
    del large
    give_back_freed_memory()  # which a command that ran in this process may have left to be kept
    reset_peak_memory(CPU)
    after = peak_memory_mib(CPU)
    assert with_large is not None
    assert after is not None
    assert with_large - after > 32


def test_phases_that_take_turns_have_peaks_of_their_own() -> None:
    memory = PeakMemory(CPU)
    memory.end("before")
    for _ in range(2):
        memory.end("small")
        large = torch.ones(LARGE)
        del large
        memory.end("large")
    small, large_mib = memory.mib["small"], memory.mib["large"]
    assert small is not None
    assert large_mib is not None
    assert large_mib - small > 32


def test_the_environment_names_versions_and_threads() -> None:
    found = environment(CPU)
    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert found.device == "cpu"
    assert found.driver is None


def test_tf32_is_reported_for_a_gpu_where_it_is_allowed_and_never_for_a_cpu() -> None:
    for allowed in (True, False):
        with tf32_allowed(allowed):
            assert in_tf32(torch.device("cuda")) == allowed
            assert not in_tf32(CPU)
    assert environment(CPU, True).tf32
    assert environment(CPU).tf32 is None


def test_the_number_of_threads_is_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), cpu_threads(before + 1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def settings() -> tuple[Any, ...]:
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return *algorithms, torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG")


def test_deterministic_algorithms_are_asked_for_and_the_settings_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    with deterministic(False):
        assert settings() == before
    with deterministic(True):
        assert settings() == (True, False, False, ":4096:8")
    assert settings() == before
    with pytest.raises(KeyError), deterministic(True):
        raise KeyError
    assert settings() == before
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert settings()[-1] == ":16:8"
    assert settings()[-1] == ":16:8"


def test_an_operator_without_a_deterministic_algorithm_is_named() -> None:
    said = "x_backward_cuda does not have a deterministic implementation, but you set ... You can turn it off"
    with pytest.raises(Unavailable, match=r"train\.deterministic: x_backward_cuda does not have"), deterministic(True):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="something else"), deterministic(True):
        raise RuntimeError("something else")
