"""The fused kernel, in C, in Triton's interpreter and on a GPU, against torch's own in float64: every layout, dtype and
fusion, forward and all gradients.

Triton's interpreter rounds to bfloat16 by truncation, which the tolerance allows.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import bncli
from bncli import kernels
from bncli.errors import Unavailable
from bncli.kernels import fused, native
from bncli.kernels.fused import cpu
from bncli.kernels.layout import sign_bytes
from tests.kernels.fused.checks import EPS, FUSED, ROUNDOFF, SHAPES, UnderTest, assert_right, case, lay, outcome

pytestmark = pytest.mark.usefixtures("unwritten_is_nan")

# --- every shape, layout, dtype, mode and fusion ------------------------------------------------------------------

ALL = [
    (shape, channels_last, dtype, activation, residual, frozen)
    for shape, channels_last, dtype, (activation, residual), frozen in itertools.product(
        SHAPES, (False, True), ROUNDOFF, FUSED, (False, True)
    )
    if len(shape) > 2 or not channels_last
]
# Every 23rd by default: every shape, dtype, fusion and mode then meets some of the others.
CASES = [pytest.param(*each, marks=() if i % 23 == 0 else pytest.mark.slow) for i, each in enumerate(ALL)]


@pytest.mark.parametrize(("shape", "channels_last", "dtype", "activation", "residual", "frozen"), CASES)
def test_forward_and_all_gradients_are_natives_of_float64(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype, activation: str | None, residual: bool,
    frozen: bool, kernel: UnderTest,
) -> None:  # fmt: skip
    asked: dict[str, Any] = {"activation": activation, "residual": residual, "frozen": frozen}
    assert_right(kernel.run, case(shape, dtype, kernel.device, channels_last=channels_last, **asked))


# --- numerics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_nan_and_infinity_pass_as_in_torch_and_stay_in_their_channel(
    poison: float, activation: str | None, kernel: UnderTest
) -> None:
    x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(4)).to(kernel.device)
    x[2, 1, 3] = poison
    ours, theirs = (run(x, None, None, EPS, None, activation)[0] for run in (kernel.run, native.batch_norm))
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert ours[:, 1].isnan().all()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
@pytest.mark.parametrize(("poisoned", "added"), [("x", False), ("x", True), ("residual", True)])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_beside_a_nan_are_torchs(
    channels_last: bool, activation: str, poisoned: str, added: bool, frozen: bool, kernel: UnderTest
) -> None:
    """Its relu lets dy pass at a NaN, its leaky_relu scales it: computed again, kept as bits, differentiated twice."""
    asked: dict[str, Any] = {"activation": activation, "residual": added, "frozen": frozen}
    shape = (3, 9 if channels_last else 2, 2, 4)  # nine channels are two slices where they are last
    inputs = case(shape, torch.float32, kernel.device, channels_last=channels_last, **asked)
    getattr(inputs, poisoned)[1, 1, 0, 3] = float("nan")

    def gradients(run: Any) -> list[Tensor]:
        leaves = inputs.inputs()
        y = run(*leaves[:3], EPS, leaves[3], activation, inputs.statistics)[0]
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = torch.autograd.grad(y, wanted, inputs.dy, create_graph=True)
        again = torch.autograd.grad(found[0].square().sum(), wanted[:2]) if poisoned != "x" else ()
        return [*found, *again]

    ours, theirs = gradients(kernel.run), gradients(native.batch_norm)
    torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("compiled", [False, True])
def test_running_statistics_move_as_torchs_do(dtype: torch.dtype, compiled: bool, kernel: UnderTest) -> None:
    """In the kernel where plain autograd runs in float32, after it elsewhere. At a momentum of 1 no trace is left."""
    x = 1e-4 * case((5, 3, 4), dtype, kernel.device).x

    def step(name: str) -> list[Tensor]:
        moved = []
        for momentum in (0.3, 1.0):
            mean, var = (torch.full((3,), start, dtype=dtype, device=kernel.device) for start in (1e4, 2.0))
            bncli.batch_norm(x, mean, var, training=True, momentum=momentum, kernel=name)
            moved += [mean, var]
        return moved

    torch.use_deterministic_algorithms(False)
    ours = (torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step)(kernel.name)
    torch.testing.assert_close(ours, step("native"), rtol=1e-5, atol=0)


def test_two_runs_agree_bit_for_bit(kernel: UnderTest) -> None:
    given = case((5, 3, 2, 3), torch.float32, kernel.device, activation="silu", residual=True)
    one, other = outcome(kernel.run, given), outcome(kernel.run, given)
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- what it keeps, what it leaves alone --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "residual", "extra"),
    [("relu", False, "nothing"), ("relu", True, "signs"), ("silu", True, "residual"), (None, True, "nothing")],
)
def test_backward_needs_x_and_two_vectors_and_a_bit_an_element_at_most(
    activation: str | None, residual: bool, extra: str, kernel: UnderTest
) -> None:
    given = case((4, 3, 5, 5), torch.float32, kernel.device, activation=activation, residual=residual)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        x, weight, bias, added = given.inputs()
        kernel.run(x, weight, bias, EPS, added, activation)  # type: ignore[arg-type]
    kept = sum(each.numel() * each.element_size() for each in saved)
    vectors = 4 * 3 * 4  # mean, var, weight, bias
    tensor = given.x.numel() * 4
    extra_bytes = {"nothing": 0, "signs": sign_bytes(given.x), "residual": tensor}[extra]
    assert kept == tensor + vectors + extra_bytes
    assert sign_bytes(given.x) <= given.x.numel() / 8 + 3


def test_nothing_is_written_into_an_input(kernel: UnderTest) -> None:
    given = case((4, 3, 6), torch.float32, kernel.device, activation="relu", residual=True)
    before = [None if each is None else each.clone() for each in (given.x, given.weight, given.bias, given.residual)]
    outcome(kernel.run, given)
    for each, was in zip((given.x, given.weight, given.bias, given.residual), before, strict=True):
        assert each is None or torch.equal(each, was)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels_last", [False, True])
def test_results_have_the_layout_of_the_input(channels_last: bool, kernel: UnderTest) -> None:
    given = case((4, 3, 2, 5), torch.float32, kernel.device, channels_last=channels_last)
    x = given.x.requires_grad_()
    y = kernel.run(x, None, None, EPS)[0]
    y.backward(lay(given.dy, not channels_last))  # a gradient in the other layout is converted
    assert x.grad is not None
    assert y.stride() == x.stride() == x.grad.stride()
    alone = replace(given, x=x.detach(), weight=None, bias=None)
    torch.testing.assert_close(x.grad.double().cpu(), outcome(kernel.run, alone)["dx"])


@pytest.mark.parametrize("strides", ["transposed", "stepped", "expanded"])
def test_other_strides_give_the_same(strides: str, kernel: UnderTest) -> None:
    base = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(5)).to(kernel.device)
    x = {
        "transposed": base.transpose(0, 2),
        "stepped": base[:, :, ::2],
        "expanded": base[:, :, :1].expand(6, 4, 5),
    }[strides]
    y = kernel.run(x, None, None, EPS, activation="relu")[0]
    torch.testing.assert_close(y, native.batch_norm(x, None, None, EPS, activation="relu")[0], rtol=1e-5, atol=1e-5)


def test_vectors_with_gaps_are_read_where_their_values_are(kernel: UnderTest) -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(6)).to(kernel.device)
    vectors = torch.full((4, 6), float("nan"), device=kernel.device)
    vectors[:, ::2] = torch.tensor([[1.0, 2, 3], [4, 5, 6], [0, 1, -1], [1, 2, 4]], device=kernel.device)
    weight, bias, mean, var = vectors[:, ::2]
    for statistics in (None, (mean, var)):
        y, _, _ = kernel.run(x, weight, bias, EPS, statistics=statistics)
        expected, _, _ = native.batch_norm(x, weight, bias, EPS, statistics=statistics)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_an_empty_batch_gives_empty_results(kernel: UnderTest) -> None:
    x = torch.zeros(0, 3, 4, device=kernel.device, requires_grad=True)
    weight = torch.ones(3, device=kernel.device, requires_grad=True)
    y = kernel.run(x, weight, None, EPS)[0]
    y.sum().backward()
    assert y.shape == (0, 3, 4)
    assert weight.grad is not None
    assert not weight.grad.any()


# --- derivatives, compilers, contexts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "residual", "frozen"),
    [
        (None, False, False),
        ("silu", True, False),
        pytest.param("relu", True, False, marks=pytest.mark.slow),
        pytest.param("leaky_relu", False, True, marks=pytest.mark.slow),
    ],
)
def test_first_and_second_derivatives_are_those_of_finite_differences(
    activation: str | None, residual: bool, frozen: bool, kernel: UnderTest
) -> None:
    made = case((3, 2, 2), torch.float64, kernel.device, residual=residual, frozen=frozen, seed=1)
    inputs = [each for each in made.inputs() if each is not None]

    def run(x: Tensor, weight: Tensor, bias: Tensor, *added: Tensor) -> Tensor:
        return kernel.run(x, weight, bias, 1e-2, *added[:1] or (None,), activation, made.statistics)[0]

    torch.use_deterministic_algorithms(False)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    if activation is None or not kernel.interpreted:  # the second is composed of torch's operators for all of them
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_the_second_derivative_of_two_values_far_from_zero_is_accurate(kernel: UnderTest) -> None:
    """With the mean's rounding left in the centred x its error was 1e-5, and so is native's."""
    drawn = torch.randn(3, 2, 1000, generator=torch.Generator().manual_seed(0))
    drawn[0] = 10 + drawn[0] / 10
    found = []
    for run, dtype in ((kernel.run, torch.float32), (native.batch_norm, torch.float64)):
        x, dy, v = drawn.to(kernel.device, dtype)
        x.requires_grad_()
        (dx,) = torch.autograd.grad(run(x, None, None, EPS)[0], x, dy, create_graph=True)
        found.append(torch.autograd.grad(dx, x, v)[0].double())
    assert (found[0] - found[1]).norm() <= 1e-6 * found[1].norm()


def composed(x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, (0, 2), correction=0, keepdim=True)
    return torch.nn.functional.silu((x - mean) / torch.sqrt(var + 1e-2))


def test_third_derivatives_are_those_of_differentiable_operators(kernel: UnderTest) -> None:
    """Not native's: torch's second derivative takes the saved mean and deviation for constants."""
    found = []
    for run in (composed, lambda x: kernel.run(x, None, None, 1e-2, activation="silu")[0]):
        x = case((4, 2, 3), torch.float64, kernel.device).x.requires_grad_()
        value = run(x).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = gradient.pow(2).sum()
        found.append(gradient)
    torch.testing.assert_close(*found)


def test_a_forward_that_kept_no_signs_still_gives_the_gradient(kernel: UnderTest) -> None:
    given = case((4, 3, 5), torch.float64, kernel.device, activation="relu", residual=True)

    def operator(x: Tensor, weight: Any, bias: Any, eps: float, residual: Any, *_: Any) -> Any:
        return torch.ops.bncli.fused_batch_norm(
            x, weight, bias, residual, None, None, eps, "relu", False, kernel.interpreted
        )[:3]

    assert_right(operator, given)


def test_the_operators_keep_the_rules_of_custom_operators(kernel: UnderTest) -> None:
    given = case((3, 4, 2, 2), torch.float32, kernel.device, channels_last=True, residual=True)
    x, weight, bias, residual = given.inputs()
    found = torch.library.opcheck(
        fused.forward_operator, (x, weight, bias, residual, None, None, EPS, "relu", True, kernel.interpreted)
    )
    assert set(found.values()) == {"SUCCESS"}


def test_torch_compile_has_no_graph_break(kernel: UnderTest) -> None:
    given = case((4, 3, 5), torch.float32, kernel.device, residual=True)

    def step(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return bncli.batch_norm(
            2 * x, None, None, weight, bias, True, residual=residual, activation="relu", kernel=kernel.name
        ).square()

    torch.use_deterministic_algorithms(False)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = given.inputs()
        run(*inputs).sum().backward()  # type: ignore[arg-type]
        results.append([each.grad for each in inputs if each is not None])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_half_precision_activations_take_float32_weights(kernel: UnderTest) -> None:
    with torch.autocast(kernel.device.type, torch.bfloat16):
        x = torch.randn(8, 3, device=kernel.device, requires_grad=True)
        weight = torch.ones(3, device=kernel.device, requires_grad=True)
        y = bncli.batch_norm(x.bfloat16(), None, None, weight, training=True, kernel=kernel.name)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


# --- where it cannot run ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        ({"weight": torch.ones(2)}, RuntimeError, "weight has 2 values; the input has 3 channels"),
        ({"residual": torch.ones(4, 1)}, ValueError, r"a residual of shape \(4, 1\) for x of shape \(4, 3\)"),
        ({"running": (torch.ones(3), torch.ones(1), 0.1)}, RuntimeError, "running_var has 1 values; the input has 3"),
        (
            {"statistics": (torch.zeros(3), torch.ones(3, requires_grad=True))},
            RuntimeError,
            "not differentiable in var",
        ),
    ],
)
def test_wrong_sizes_are_refused_before_memory_is_read(
    wrong: dict[str, Any], error: type[Exception], words: str, kernel: UnderTest
) -> None:
    arguments: dict[str, Any] = {"weight": None, "bias": None, "eps": EPS}
    with pytest.raises(error, match=words):
        kernel.run(torch.ones(4, 3, device=kernel.device), **{**arguments, **wrong})


def test_the_operator_refuses_an_input_with_gaps(kernel: UnderTest) -> None:
    x = torch.ones(4, 3, 6, device=kernel.device)[:, :, ::2]
    with pytest.raises(ValueError, match="neither contiguous nor channels last"):
        torch.ops.bncli.fused_batch_norm(x, None, None, None, None, None, EPS, "none", False, kernel.interpreted)


def test_updates_of_running_statistics_increment_their_version(kernel: UnderTest) -> None:
    x, mean, var = case((6, 3), torch.float32, kernel.device).x.requires_grad_(), torch.zeros(3), torch.ones(3)
    mean, var = mean.to(kernel.device), var.to(kernel.device)
    y = bncli.batch_norm(x, mean, var, kernel=kernel.name)
    bncli.batch_norm(x, mean, var, training=True, kernel=kernel.name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_forward_mode_derivative_is_refused_and_not_zero(kernel: UnderTest) -> None:
    x = torch.randn(4, 3, device=kernel.device)
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: kernel.run(x, None, None, EPS)[0], (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode derivative"):
        kernel.run(torch.autograd.forward_ad.make_dual(x, x), None, None, EPS)


def test_a_dispatch_mode_sees_the_operator(kernel: UnderTest) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(function))
            return function(*arguments, **(kwargs or {}))

    with Names() as names:
        kernel.run(torch.randn(4, 3, device=kernel.device), None, None, EPS)
    assert "bncli.fused_batch_norm.default" in names.seen


def test_a_dtype_it_does_not_have_is_refused(kernel: UnderTest) -> None:
    with pytest.raises(TypeError, match="takes float32, float16, bfloat16, float64; x is int64"):
        kernel.run(torch.ones(4, 3, dtype=torch.int64, device=kernel.device), None, None, EPS)


@pytest.mark.parametrize(("name", "device"), [("fused", "cuda"), ("fused-interpreted", "cpu")])
def test_without_triton_it_is_refused_with_what_to_install(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Unavailable, match=r"it is written in Triton, which is not installed \(pip install triton\)"):
        kernels.get(name, torch.device(device))


def test_the_interpreted_kernel_is_for_the_cpu_alone() -> None:
    with pytest.raises(Unavailable, match="Triton's interpreter runs on the CPU, and it was asked to run on cuda"):
        kernels.get("fused-interpreted", torch.device("cuda"))


IN_ORDER = {  # what a process does, and why the last of it is refused
    "import triton; kernels.get('fused-interpreted', torch.device('cpu'))": "set TRITON_INTERPRET=1 before Python",
    "get = kernels.get('fused-interpreted'); import triton; get(torch.ones(3, 2), None, None, 1.0)": (
        "set TRITON_INTERPRET=1 before Python"
    ),
    "x = torch.ones(3, 2); kernels.get('fused-interpreted')(x, None, None, 1.0); "
    "kernels.get('fused', torch.device('cuda'))": "Triton's interpreter is on in this process",
}
EACH_IN_A_PROCESS = """
import os, sys, torch
torch.cuda.get_device_capability = lambda device: (9, 0)
torch.cuda.get_device_name = lambda device: "GPU"
from bncli import kernels
for script in sys.argv[1:]:
    if os.fork() == 0:
        try:
            exec(script)
        except Exception as error:
            print(str(error).splitlines()[-1], flush=True)
        os._exit(0)
    os.wait()
"""


def test_one_process_either_compiles_triton_or_interprets_it() -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", EACH_IN_A_PROCESS, *IN_ORDER]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.splitlines()
    assert len(found) == len(IN_ORDER)
    for line, (script, refused) in zip(found, IN_ORDER.items(), strict=True):
        assert refused in line, script


def test_the_environment_does_not_replace_the_c_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert fused.launcher(torch.device("cpu")) is cpu
