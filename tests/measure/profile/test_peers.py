"""Peers that are not installed say so; those that are, as modules with their signatures, are called as they expect."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bncli.errors import Unavailable
from bncli.measure.profile import candidates, kernels, peers
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


@pytest.mark.parametrize(
    ("name", "module"), [("apex", "apex"), ("inplace_abn", "inplace_abn"), ("flag_gems", "flag_gems")]
)
def test_a_peer_that_is_not_installed_says_how_to_install_it(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # which makes its import fail
    monkeypatch.setattr(peers.importlib, "import_module", missing)
    with pytest.raises(Unavailable, match=r"^not installed \((pip install|build) .+\)$"):
        peers.PEERS[name](CASE, CPU)


def missing(name: str) -> Any:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])


def test_a_peer_that_breaks_on_import_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(name: str) -> Any:
        raise OSError("undefined symbol: _ZN3c10\nin detail")

    monkeypatch.setattr(peers.importlib, "import_module", breaks)
    with pytest.raises(Unavailable, match=r"^inplace_abn cannot be imported: OSError: undefined symbol: _ZN3c10$"):
        peers.inplace_abn(CASE, CPU)


def abn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    activation: str,
    activation_param: float,
) -> Tensor:
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
    source = candidates.sources(["inplace_abn"], CPU, False)["inplace_abn"]
    candidate = source(case)
    assert candidate.overwrites
    assert candidate.positive_weight
    assert not wrong(candidate.on_a_copy, case, positive_weight=True)
    assert wrong(candidate.on_a_copy, case)
    assert wrong(candidate.call, case, positive_weight=True)  # which writes into x
    assert kernels.wrong_on_cases("inplace_abn", source, CPU) is None


def test_flag_gems_gets_its_arguments_in_order_and_its_gradients_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        training: bool,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, ...]:
        return torch.native_batch_norm(input, weight, bias, mean, var, training, momentum, eps)

    def run_backward(
        grad_out: Tensor,
        input: Tensor,
        weight: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        save_mean: Tensor,
        save_invstd: Tensor,
        train: bool,
        eps: float,
        output_mask: list[bool],
    ) -> tuple[Tensor, ...]:
        return torch.ops.aten.native_batch_norm_backward(
            grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps, output_mask
        )

    operator = peers._differentiable(run, run_backward)

    def call(x: Tensor, *others: Any) -> Tensor:
        running_mean, running_var, weight, bias, training, momentum, eps, *_ = others
        y: Tensor = operator.apply(x, weight, bias, running_mean, running_var, training, momentum, eps)
        return y

    assert not wrong(call)
    ops = types.SimpleNamespace(batch_norm=run, batch_norm_backward=run_backward)
    installed(monkeypatch, "flag_gems", ops=ops)
    with pytest.raises(Unavailable, match=r"^flag_gems takes CUDA only$"):
        peers.flag_gems(CASE, CPU)
    with pytest.raises(Unavailable, match="flag_gems takes running statistics only"):
        peers.flag_gems(timed(profile.Case(CASE.shape, tracked=False)), CUDA)
    installed(monkeypatch, "flag_gems", ops=types.SimpleNamespace())
    with pytest.raises(Unavailable, match=r"has no ops\.batch_norm"):
        peers.flag_gems(CASE, CUDA)


def test_apex_is_for_half_precision_channels_last_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apex", "apex.contrib"):
        installed(monkeypatch, name)
    installed(monkeypatch, "apex.contrib.groupbn", BatchNorm2d_NHWC=object)
    with pytest.raises(Unavailable, match="apex takes CUDA, fp16, channels last 2d, a multiple of 4 channels only"):
        peers.apex(CASE, CPU)
    installed(monkeypatch, "apex.contrib.groupbn")
    with pytest.raises(Unavailable, match=r"built without contrib\.groupbn"):
        peers.apex(CASE, CUDA)


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
def test_apexs_module_gets_rows_and_our_parameters(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apex", "apex.contrib"):
        installed(monkeypatch, name)
    installed(monkeypatch, "apex.contrib.groupbn", BatchNorm2d_NHWC=FakeNHWC)
    monkeypatch.setattr(peers, "_only", lambda name, **claims: None)
    case = timed(profile.Case((4, 8, 5, 7), operation, "fp16", "channels_last"))
    assert not wrong(peers.apex(case, CPU).call, case)
