"""Our batch norm module beside torch's, and the other norms by their definitions."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bncli
from bncli import kernels
from bncli.engine.convert import convert
from bncli.engine.models import build, factory
from bncli.engine.models.norms import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from bncli.errors import Unavailable
from bncli.kernels import fused, native
from bncli.kernels.fused import cpu
from bncli.measure.reference.candidate import candidate
from bncli.recipe.sections import BatchNorm as BatchNormSection
from bncli.recipe.sections import GroupNorm, InstanceNorm, LayerNorm, NoNorm
from tests.conftest import tiny

# Kernels other than native return statistics, by which the module moves the running ones.
BY_KERNEL = pytest.mark.parametrize("kernel", ["native", native.batch_norm], ids=["native", "returned statistics"])
EACH = pytest.mark.parametrize(
    ("ours", "theirs", "shape"),
    [
        (BatchNorm, nn.BatchNorm1d, (4, 3)),  # 4 values: a variance over m and one over m - 1 differ
        (BatchNorm1d, nn.BatchNorm1d, (6, 3)),
        (BatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
        (BatchNorm2d, nn.BatchNorm2d, (4, 3, 2, 5)),
        (BatchNorm3d, nn.BatchNorm3d, (2, 3, 2, 3, 2)),
    ],
)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 5


@BY_KERNEL
@EACH
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_each_class_trains_and_evaluates_as_torchs(
    kernel: Any, ours: Any, theirs: Any, shape: tuple[int, ...], momentum: float | None, affine: bool, track: bool
) -> None:
    mine, other = (make(3, 1e-3, momentum, affine, track) for make in (ours, theirs))
    mine.kernel = kernel
    for seed in range(3):
        x, z = (numbers(*shape, seed=seed).requires_grad_() for _ in range(2))
        y, expected = mine(x), other(z)
        torch.testing.assert_close(y, expected)
        y.backward(numbers(*shape, seed=seed + 9))
        expected.backward(numbers(*shape, seed=seed + 9))
        torch.testing.assert_close(x.grad, z.grad)
    mine.eval(), other.eval()
    torch.testing.assert_close(mine(numbers(*shape)), other(numbers(*shape)))
    torch.testing.assert_close(dict(mine.state_dict()), dict(other.state_dict()))


@BY_KERNEL
@EACH
def test_each_class_refuses_the_dimensions_that_torchs_refuses(
    kernel: Any, ours: Any, theirs: Any, shape: tuple[int, ...]
) -> None:
    for dimensions in range(1, 7):
        x = torch.ones([2, 3, 2, 2, 2, 2][:dimensions])
        try:
            theirs(3)(x)
        except ValueError as error:
            if ours is BatchNorm and dimensions > 1:
                continue  # it takes any number of positions
            words = r"takes \(N, C, \*S\)" if ours is BatchNorm else str(error).partition("(")[0]
            with pytest.raises(ValueError, match=words):
                ours(3, kernel=kernel)(x)
        else:
            ours(3, kernel=kernel)(x)


@EACH
def test_state_dicts_load_both_ways(ours: Any, theirs: Any, shape: tuple[int, ...]) -> None:
    theirs(3).load_state_dict(ours(3, kernel=native.batch_norm, activation="relu").state_dict(), strict=True)
    ours(3, kernel=native.batch_norm, activation="relu").load_state_dict(theirs(3).state_dict(), strict=True)
    assert isinstance(ours(3), theirs) == (ours is not BatchNorm)


@BY_KERNEL
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("training", [True, False])
def test_a_residual_and_an_activation_come_after_the_norm(kernel: Any, momentum: float | None, training: bool) -> None:
    mine = BatchNorm2d(3, momentum=momentum, activation="silu", kernel=kernel).train(training)
    other = nn.BatchNorm2d(3, momentum=momentum).train(training)
    for seed in range(2):
        x, residual = numbers(2, 3, 4, 4, seed=seed), numbers(2, 3, 4, 4, seed=seed + 9)
        torch.testing.assert_close(mine(x, residual), F.silu(other(x) + residual))
        torch.testing.assert_close(mine(x, residual, "relu"), F.relu(other(x) + residual))
        torch.testing.assert_close(mine(x), F.silu(other(x)))
    for name, value in other.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value, msg=name)


@BY_KERNEL
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_of_a_module_in_half_precision_are_torchs(kernel: Any, momentum: float | None) -> None:
    mine = BatchNorm1d(2, momentum=momentum, dtype=torch.bfloat16, kernel=kernel)
    other = nn.BatchNorm1d(2, momentum=momentum, dtype=torch.bfloat16)
    for seed in range(3):
        x = numbers(16, 2, seed=seed).bfloat16()
        mine(x), other(x)
    assert mine.running_var is not None
    assert mine.running_var.dtype == torch.bfloat16
    # Three moves, each rounded once by either of the two: half an eps of the value each time.
    torch.testing.assert_close(mine.state_dict(), other.state_dict(), rtol=3 * torch.finfo(torch.bfloat16).eps, atol=0)


@BY_KERNEL
def test_an_empty_batch_does_not_move_the_cumulative_average(kernel: Any) -> None:
    mine, other = BatchNorm1d(3, momentum=None, kernel=kernel), nn.BatchNorm1d(3, momentum=None)
    for batch in (numbers(4, 3), torch.zeros(0, 3)):
        mine(batch), other(batch)
    torch.testing.assert_close(mine.state_dict(), other.state_dict())


@BY_KERNEL
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_training_step_compiles_into_one_graph_and_reads_nothing_back(kernel: Any, momentum: float | None) -> None:
    mine, other = (BatchNorm1d(3, momentum=momentum, kernel=kernel) for _ in range(2))
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        torch.testing.assert_close(compiled(numbers(4, 3, seed=seed)), other(numbers(4, 3, seed=seed)))
    torch.testing.assert_close(mine.state_dict(), other.state_dict())


@BY_KERNEL
def test_copies_and_pickles_keep_the_kernel_and_the_activation(kernel: Any) -> None:
    mine = BatchNorm1d(3, activation="relu", kernel=kernel)
    mine(numbers(4, 3))
    file = io.BytesIO()
    torch.save(mine, file)
    file.seek(0)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), torch.load(file, weights_only=False)):
        assert other.kernel == kernel
        torch.testing.assert_close(other.eval()(numbers(4, 3)), copy.deepcopy(mine).eval()(numbers(4, 3)))


def test_repr_has_the_activation_and_the_kernel_where_not_the_default() -> None:
    assert repr(BatchNorm2d(3)) == repr(nn.BatchNorm2d(3))
    text = repr(BatchNorm2d(3, activation="relu", kernel=native.batch_norm))
    assert text.endswith("activation=relu, kernel=bncli.kernels.native:batch_norm)")


def test_it_becomes_a_sync_batch_norm_like_torchs() -> None:
    mine = BatchNorm2d(3)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(mine))[0]
    assert isinstance(synchronised, nn.SyncBatchNorm)
    assert synchronised.weight is mine.weight


def test_device_and_dtype_are_arguments_as_in_torch() -> None:
    mine = BatchNorm2d(3, 1e-5, 0.1, True, True, "meta", torch.float64)
    assert mine.weight.device.type == "meta"
    assert mine.weight.dtype == torch.float64


def test_an_unknown_activation_or_kernel_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="expected one of relu, leaky_relu, silu"):
        BatchNorm2d(3, activation="gelu")
    with pytest.raises(Unavailable, match="expected one of native"):
        BatchNorm2d(3, kernel="nativ")


def test_a_kernel_that_cannot_run_here_is_refused_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: "it is not built")
    with pytest.raises(Unavailable, match="the fused kernel cannot run"):
        BatchNorm2d(3, kernel="fused")


# --- kernels that cannot run, and the other norms ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "theirs", "shape"),
    [
        (LayerNorm(kind="layer"), nn.LayerNorm(12), (5, 12)),
        (InstanceNorm(kind="instance", affine=False), nn.InstanceNorm2d(4), (5, 4, 6, 6)),
    ],
)
def test_the_other_norms_are_torchs(norm: LayerNorm | InstanceNorm, theirs: nn.Module, shape: tuple[int, ...]) -> None:
    make = factory(norm)
    assert make is not None
    x = torch.randn(shape)
    torch.testing.assert_close(make(shape[1])(x), theirs(x))


@pytest.mark.parametrize("norm", [LayerNorm(kind="layer"), GroupNorm(kind="group", groups=2)])
def test_other_norms_do_not_depend_on_the_batch(norm: LayerNorm | GroupNorm) -> None:
    make = factory(norm)
    assert make is not None
    x = torch.randn(5, 4, 6, 6)
    torch.testing.assert_close(make(4)(x)[:1], make(4)(x[:1]))


def test_no_norm_makes_no_module() -> None:
    assert factory(NoNorm()) is None


def test_a_kernel_that_cannot_run_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "unavailable_reason", lambda device: "it is not built")
    with pytest.raises(Unavailable):
        factory(BatchNormSection(kind="batch", kernel="fused"))


def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were a GPU that the fused kernel cannot run on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))
def test_the_fused_kernel_runs_on_the_cpu_where_the_gpu_cannot_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    old_gpu(monkeypatch)
    assert BatchNorm2d(3, kernel="fused")(torch.randn(4, 3, 5, 5)).shape == (4, 3, 5, 5)
    convert(nn.Sequential(nn.BatchNorm2d(3)), "fused")
    recipe = tiny(norm={"kind": "batch", "kernel": "fused"})
    build(recipe, (8,), 3, device=torch.device("cpu"))
    with pytest.raises(Unavailable, match=r"Tesla T4 has 7\.5|Triton, which is not installed"):
        build(recipe, (8,), 3, device=torch.device("cuda"))


@pytest.mark.skipif(cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason()))
def test_whether_a_model_on_the_cpu_has_its_kernel_is_asked_of_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(device: object = None) -> None:
        raise AssertionError("the GPU was asked")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", asked)
    on_cpu = torch.device("cpu")
    kernels.get("fused", on_cpu)
    factory(BatchNormSection(kind="batch", kernel="fused"), on_cpu)
    assert candidate("fused", "batch", on_cpu, allow_code=False).ran.startswith("C, compiled")
    bncli.batch_norm(torch.randn(4, 3), None, None, training=True, kernel="fused")


def test_a_kernel_that_no_device_can_run_is_refused_with_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    old_gpu(monkeypatch)
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: "there is no C compiler")
    with pytest.raises(Unavailable, match=r"cannot run: it .*; on the CPU there is no C compiler\. No other kernel"):
        BatchNorm2d(3, kernel="fused")


def test_the_classes_are_public() -> None:
    assert (bncli.BatchNorm1d, bncli.BatchNorm2d, bncli.BatchNorm3d) == (BatchNorm1d, BatchNorm2d, BatchNorm3d)
