"""Kernels of other packages, faked as modules with their signatures, and the names of what runs."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bncli.errors import Unavailable
from bncli.kernels.fused.tiling import Processors, plan
from bncli.measure.profile import sources
from bncli.measure.profile.timed_kernels import wrong_on_cases
from bncli.measure.reference.case import Case, timed
from bncli.measure.reference.judge import large
from bncli.results import profile

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = timed(profile.Case((4, 6, 5, 7), "bn", "fp32"))


def wrong(call: Any, case: Case = CASE, **options: bool) -> bool:
    """What the profile's judge has to say of a kernel on that case."""
    return large(case, CPU, **options).judge(call, "own function").wrong is not None


def installed(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("name", sources.PEERS)
def test_a_package_that_is_not_installed_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> Any:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module.split(".")[0])

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(Unavailable, match=r"^not installed \((pip install|build) .+\)$"):
        sources.PEERS[name](CASE, CPU)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise OSError('undefined symbol: _ZN3c10\\nin detail')", "OSError: undefined symbol: _ZN3c10"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_a_package_that_breaks_on_import_says_how(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inplace_abn.py").write_text(code)
    monkeypatch.delitem(sys.modules, "inplace_abn", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable) as refused:
        sources.inplace_abn(CASE, CPU)
    assert str(refused.value) == f"inplace_abn cannot be imported: {said}"


def abn(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, training: bool,
    momentum: float, eps: float, activation: str, activation_param: float,
) -> Tensor:  # fmt: skip
    """inplace_abn's meaning: it scales by |weight| + eps, and writes over x."""
    assert not x.is_leaf
    y = F.batch_norm(x.clone(), running_mean, running_var, weight.abs() + eps, bias, training, momentum, eps)
    y = F.leaky_relu(y, activation_param) if activation == "leaky_relu" else y
    x.data.copy_(y.data)
    return y


@pytest.mark.parametrize("operation", ["bn", "bn+leaky_relu"])
def test_inplace_abn_is_right_for_weights_above_0(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "inplace_abn", inplace_abn=abn)
    case = timed(profile.Case(CASE.shape, operation, "fp32"))
    source = sources.sources(["inplace_abn"], CPU, False)["inplace_abn"]
    kernel = source(case)
    assert kernel.overwrites
    assert kernel.positive_weight
    assert not wrong(kernel.on_a_copy, case, positive_weight=True)
    assert wrong(kernel.on_a_copy, case)
    assert wrong(kernel.call, case, positive_weight=True)  # which writes into x
    assert wrong_on_cases("inplace_abn", source, CPU) is None


def test_flag_gems_gets_arguments_in_order_and_gradients_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(
        input: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, training: bool, momentum: float,
        eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return torch.native_batch_norm(input, weight, bias, mean, var, training, momentum, eps)

    def run_backward(
        grad_out: Tensor, input: Tensor, weight: Tensor, running_mean: Tensor, running_var: Tensor, save_mean: Tensor,
        save_invstd: Tensor, train: bool, eps: float, output_mask: list[bool],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return torch.ops.aten.native_batch_norm_backward(
            grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps, output_mask
        )

    operator = sources.differentiable(run, run_backward)

    def call(x: Tensor, *others: Any) -> Tensor:
        running_mean, running_var, weight, bias, training, momentum, eps, *_ = others
        y: Tensor = operator.apply(x, weight, bias, running_mean, running_var, training, momentum, eps)
        return y

    assert not wrong(call)
    ops = types.SimpleNamespace(batch_norm=run, batch_norm_backward=run_backward)
    installed(monkeypatch, "flag_gems", ops=ops)
    with pytest.raises(Unavailable, match=r"^flag_gems takes CUDA only$"):
        sources.flag_gems(CASE, CPU)
    with pytest.raises(Unavailable, match="flag_gems takes running statistics only"):
        sources.flag_gems(timed(profile.Case(CASE.shape, tracked=False)), CUDA)
    installed(monkeypatch, "flag_gems", ops=types.SimpleNamespace())
    with pytest.raises(Unavailable, match=r"has no ops\.batch_norm"):
        sources.flag_gems(CASE, CUDA)


def test_apex_is_for_half_precision_channels_last_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apex", "apex.contrib"):
        installed(monkeypatch, name)
    installed(monkeypatch, "apex.contrib.groupbn", BatchNorm2d_NHWC=object)
    with pytest.raises(Unavailable, match="apex takes CUDA, fp16, channels last 2d, a multiple of 4 channels only"):
        sources.apex(CASE, CPU)
    installed(monkeypatch, "apex.contrib.groupbn")
    with pytest.raises(Unavailable, match=r"built without contrib\.groupbn"):
        sources.apex(CASE, CUDA)


class FakeNHWC(torch.nn.BatchNorm2d):
    """apex's module: tensors that are NHWC in their sizes."""

    def __init__(self, num_features: int, fuse_relu: bool = False) -> None:
        super().__init__(num_features)
        self.fuse_relu = fuse_relu

    def forward(self, input: Tensor, z: Tensor | None = None) -> Tensor:
        assert input.is_contiguous()
        y = super().forward(input.permute(0, 3, 1, 2))
        y = y if z is None else y + z.permute(0, 3, 1, 2)
        return (y.relu() if self.fuse_relu else y).permute(0, 2, 3, 1)


@pytest.mark.parametrize("operation", ["bn", "bn+relu", "bn+add+relu"])
def test_apexs_module_gets_nhwc_tensors_and_our_parameters(operation: str) -> None:
    case = timed(profile.Case((4, 8, 5, 7), operation, "fp16", "channels_last"))
    assert not wrong(sources.nhwc(FakeNHWC, case, CPU).call, case)


# --- the implementation that runs behind a kernel's name --------------------------------------------------------------


def path(shape: tuple[int, int, int], backward: bool = False, cooperative: bool = True, **options: bool) -> str:
    on = Processors(132, cooperative=cooperative)  # an H200
    found = plan(shape, contiguous=True, itemsize=2, backward=backward, processors=on, **options)
    return sources.execution_path(found, *options.values())


def test_the_execution_path_of_a_plan() -> None:
    assert path((32, 512, 49)) == "on-chip"
    assert path((256, 64, 3136)).startswith("cooperative (")
    assert path((32, 512, 49), frozen=True) == "streaming"
    assert path((256, 64, 3136), cooperative=False) == "two launches"
    assert "% on-chip" in path((256, 64, 112 * 112), backward=True)  # a team that holds a part


def test_a_refused_cooperative_launch_is_told_once_it_has_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_launch = pytest.importorskip("bncli.kernels.fused.triton_launch")
    refused: set[int] = set()
    monkeypatch.setattr(triton_launch, "has_refused", lambda device: bool(refused))
    monkeypatch.setattr(triton_launch, "processors", lambda device: Processors(132, cooperative=not refused))
    monkeypatch.setattr(sources.kernels, "get", lambda name, device: None)
    timed_kernel = sources._source("fused", CUDA, False)(timed(profile.Case((256, 64, 56, 56), "bn", "fp16")))
    assert str(timed_kernel.ran).startswith("cooperative (")
    refused.add(0)
    assert timed_kernel.ran == "two launches (a cooperative launch was refused)"


@pytest.mark.parametrize("affine", ["wide", "same"])
def test_torch_is_asked_which_of_its_batch_norms_runs(affine: str) -> None:
    case = timed(profile.Case((4, 8, 6, 6), "bn", "fp32", affine=affine))
    assert sources.native_backend(case, CPU) == "Native"
    assert sources.ran(case, "native", CPU) == "ATen"


def test_an_unknown_implementation_is_none() -> None:
    assert sources.native_backend(timed(profile.Case((4, 8, 6, 6), affine="none")), CPU) == "unknown"
    assert sources.ran(CASE, "mine:norm", CPU) is None


@pytest.mark.cuda
def test_on_a_gpu_native_and_fused_say_what_ran() -> None:
    case = timed(profile.Case((32, 64, 56, 56), "bn", "fp16", "channels_last"))
    assert sources.ran(case, "native", CUDA) in ("cuDNN", "ATen")
    assert sources.ran(case, "fused", CUDA)
