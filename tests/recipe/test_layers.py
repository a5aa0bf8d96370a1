"""A model as plain data: its parameters against published and hand-made counts and against the modules that are built,
its activations against what autograd keeps, and the sections of a recipe that contradict each other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bncli.engine.models import build
from bncli.measure.dry_run import sizes
from bncli.recipe.layers import (
    Norm,
    Size,
    contradictions,
    estimated_memory_mib,
    input_of,
    layers,
    module_names,
    size,
    walk,
)
from bncli.recipe.sections import Recipe

NORMS = ["none", "batch", "layer", "group", "instance", "whiten", "iternorm", "noisy", "rms", "dyt"]
SHAPES = {"mlp": [64], "cnn": [3, 16, 16], "resnet": [3, 32, 32], "inception": [3, 32, 32]}


def recipe(model: dict[str, Any], norm: dict[str, Any] | str = "none", **sections: Any) -> Recipe:
    shape = sections.pop("shape", SHAPES.get(model["kind"]))
    data = {"source": "synthetic", "shape": shape, "classes": sections.pop("classes", 10)}
    return Recipe.model_validate(
        {
            "data": data,
            "model": model,
            "norm": {"kind": norm} if isinstance(norm, str) else norm,
            "optimizer": {"kind": "sgd", "lr": 0.1},
            "train": {"steps": 10, "batch_size": 8},
            **sections,
        }
    )


# --- parameters ---------------------------------------------------------------------------------------------------

TORCHVISION = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032}  # for 1,000 classes: He et al.'s with batch norm


@pytest.mark.parametrize("depth", TORCHVISION)
def test_the_imagenet_resnets_have_the_published_parameters(depth: int) -> None:
    net = recipe({"kind": "resnet", "depth": depth}, "batch", shape=[3, 224, 224], classes=1000)
    assert sizes(net)[0] == TORCHVISION[depth]


@pytest.mark.parametrize(("depth", "he_et_al"), [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6), (110, 1.7e6)])
def test_the_cifar_resnets_have_the_parameters_of_he_et_al_and_two_projections(depth: int, he_et_al: float) -> None:
    """arXiv 1512.03385, table 6; its nets pad the shortcuts with zeros (option A) where these project (option B)."""
    n = (depth - 2) // 6
    weights = 3 * 16 * 9 + 2 * n * 16 * 16 * 9 + 10 * 64 + 10
    for narrow, wide in ((16, 32), (32, 64)):
        weights += (narrow * wide + (2 * n - 1) * wide * wide) * 9
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert sizes(recipe({"kind": "resnet", "depth": depth}, "batch"))[0] == weights + norms + projections
    assert weights + norms == pytest.approx(he_et_al, rel=0.02)


# The printed sizes of Ioffe & Szegedy 2015's appendix: the outputs of the pooled stem and of the modules.
INCEPTION = [(64, 112), (64, 56), (192, 56), (192, 28), (256, 28), (320, 28), (576, 14)]
INCEPTION += [(576, 14)] * 4 + [(1024, 7)] * 3


def test_inception_has_the_shapes_of_the_papers_appendix() -> None:
    plan = layers(recipe({"kind": "inception"}, "batch", shape=[3, 224, 224], classes=1000), (3, 224, 224), 1000)
    assert plan is not None
    shape: tuple[int, ...] = (3, 224, 224)
    found = [shape := size(part, shape)[1] for _, part in plan.layers]
    assert found == [(channels, side, side) for channels, side in INCEPTION] + [(1024,), (1000,)]


def test_inception_has_the_parameters_of_its_main_tower() -> None:
    """11,194,984 with a dense 7x7 convolution as the first; the paper's is separable, with depth multiplier 8."""
    net = recipe({"kind": "inception"}, "batch", shape=[3, 224, 224], classes=1000)
    dense, separable = 3 * 64 * 7 * 7, 3 * 8 * 7 * 7 + 3 * 8 * 64
    assert sizes(net)[0] == 11_194_984 - dense + separable
    plan = layers(net, (3, 224, 224), 1000)
    assert plan is not None
    normalized = sum(layer.channels for layer, _, _ in walk(plan, (3, 224, 224)) if isinstance(layer, Norm))
    plain = recipe({"kind": "inception"}, "none", shape=[3, 224, 224], classes=1000)
    # A bias a channel in place of gamma and beta.
    assert sizes(plain)[0] == 11_194_984 - dense + separable - normalized


WIDTHS: dict[str, Any] = {"kind": "mlp", "hidden": [100, 50]}
STAGES: dict[str, Any] = {"kind": "cnn", "channels": [32, 64]}


@pytest.mark.parametrize(
    ("model", "norm", "expected"),
    [
        (WIDTHS, "none", (64 + 1) * 100 + (100 + 1) * 50 + (50 + 1) * 10),
        (WIDTHS, "batch", 64 * 100 + 2 * 100 + 100 * 50 + 2 * 50 + (50 + 1) * 10),
        (WIDTHS, "layer", (64 + 1) * 100 + 2 * 100 + (100 + 1) * 50 + 2 * 50 + (50 + 1) * 10),
        (WIDTHS, {"kind": "batch", "affine": False}, 64 * 100 + 100 * 50 + (50 + 1) * 10),
        (WIDTHS, "rms", (64 + 1) * 100 + 100 + (100 + 1) * 50 + 50 + (50 + 1) * 10),
        (WIDTHS, "dyt", (64 + 1) * 100 + 2 * 100 + 1 + (100 + 1) * 50 + 2 * 50 + 1 + (50 + 1) * 10),
        (WIDTHS, "ghost", 64 * 100 + 2 * 100 + 100 * 50 + 2 * 50 + (50 + 1) * 10),
        (WIDTHS, {"kind": "frozen", "after": 5}, (64 + 3) * 100 + (100 + 3) * 50 + (50 + 1) * 10),
        (WIDTHS, {"kind": "batch", "backward": "ignore_statistics"}, (64 + 3) * 100 + (100 + 3) * 50 + (50 + 1) * 10),
        ({**WIDTHS, "norm_position": "after"}, "batch", (64 + 3) * 100 + (100 + 3) * 50 + (50 + 1) * 10),
        (STAGES, "none", (3 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + (64 + 1) * 10),
        (STAGES, "batch", 3 * 9 * 32 + 2 * 32 + 32 * 9 * 64 + 2 * 64 + (64 + 1) * 10),
        (STAGES, "instance", 3 * 9 * 32 + 2 * 32 + 32 * 9 * 64 + 2 * 64 + (64 + 1) * 10),
        (STAGES, "group", (3 * 9 + 1) * 32 + 2 * 32 + (32 * 9 + 1) * 64 + 2 * 64 + (64 + 1) * 10),
    ],
)
def test_the_parameters_are_those_counted_by_hand(model: dict[str, Any], norm: Any, expected: int) -> None:
    """Without a bias right before a norm that subtracts the mean of each channel, if its gradient knows of that."""
    assert sizes(recipe(model, norm))[0] == expected


def test_an_mlp_takes_the_pixels_of_images_as_its_features() -> None:
    net = recipe({"kind": "mlp", "hidden": [5]}, shape=[3, 8, 8])
    assert sizes(net)[0] == (3 * 8 * 8 + 1) * 5 + (5 + 1) * 10


SMALL: list[dict[str, Any]] = [
    {"kind": "mlp"},
    {"kind": "mlp", "norm_position": "after", "dropout": 0.5},
    {"kind": "cnn"},
    {"kind": "resnet", "depth": 20},
    {"kind": "inception"},
]


@pytest.mark.parametrize("model", SMALL, ids=lambda model: " ".join(map(str, model.values())))
def test_the_layers_have_the_names_of_the_modules_that_are_built_from_them(model: dict[str, Any]) -> None:
    net = recipe(model, "batch", shape=SHAPES[model["kind"]])
    planned = layers(net, tuple(SHAPES[model["kind"]]), 10)
    assert planned is not None
    modules = build(net, tuple(SHAPES[model["kind"]]), 10).named_modules()
    assert sorted(module_names(planned)) == sorted(
        name for name, module in modules if not list(module.children()) and name and not name.endswith("shortcut")
    )


# A norm's parameters do not depend on the net around it, so the large nets are counted with a few.
COUNTED = [
    *itertools.product(SMALL[:3], NORMS, [True, False]),
    *itertools.product(SMALL[3:], ["none", "batch", "layer"], [True]),
    *(({"kind": "resnet", "depth": depth}, "batch", True) for depth in (18, 34, 50, 110)),
]


@pytest.mark.parametrize(("model", "norm", "affine"), COUNTED, ids=str)
def test_the_count_is_that_of_the_modules_and_the_output_has_a_logit_a_class(
    model: dict[str, Any], norm: str, affine: bool
) -> None:
    net = recipe(model, {"kind": norm} if norm == "none" else {"kind": norm, "affine": affine}, classes=7)
    shape, classes = input_of(net)
    with torch.device("meta"):
        modules = build(net, shape, classes)
    assert sizes(net)[0] == sum(parameter.numel() for parameter in modules.parameters())
    plan = layers(net, shape, classes)
    assert plan is not None
    assert size(plan, shape)[1] == (7,)


SIDES = [
    *itertools.product([{"kind": "cnn", "channels": [4, 6, 8]}, {"kind": "resnet", "depth": 18}], [1, 2, 3, 5, 8, 31]),
    *itertools.product([{"kind": "inception"}], [1, 5, 31]),
]


@pytest.mark.parametrize(("model", "side"), SIDES, ids=str)
def test_the_planned_shapes_are_those_of_the_modules_for_every_size_of_image(model: dict[str, Any], side: int) -> None:
    shape = (1, side, side + 2)
    net = recipe(model, "layer", shape=list(shape))
    plan = layers(net, shape, 10)
    assert plan is not None
    planned: list[tuple[int, ...]] = []
    for _, part in plan.layers:
        planned.append(size(part, planned[-1] if planned else shape)[1])
    with torch.device("meta"):
        x, made = torch.empty(2, *shape), []
        for module in build(net, shape, 10).children():
            x = module(x)
            made.append(tuple(x.shape[1:]))
    assert made == planned


# --- memory -------------------------------------------------------------------------------------------------------


def kept_by_autograd(net: Recipe, batch: int) -> int:
    """Bytes that the forward pass of a batch keeps for the backward pass, parameters left out."""
    shape, classes = input_of(net)
    model = build(net, shape, classes)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # one storage may be kept by several operators; holding it keeps its address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(torch.randn(batch, *shape)), torch.zeros(batch, dtype=torch.long))
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


KEEPING = [
    *itertools.product(SMALL[:4], ["none", "batch", "layer"], ["relu", "tanh", "gelu"]),
    *itertools.product(SMALL[4:], ["none", "batch"], ["relu", "gelu"]),
]


@pytest.mark.parametrize(("model", "norm", "activation"), KEEPING, ids=str)
def test_estimated_activations_are_0_8_to_2_5_times_what_autograd_keeps(
    model: dict[str, Any], norm: str, activation: str
) -> None:
    net, batch = recipe({**model, "activation": activation}, norm), 16
    plan = layers(net, *input_of(net))
    assert plan is not None
    estimated = size(plan, input_of(net)[0])[0].activations * batch * 4
    assert 0.8 <= estimated / kept_by_autograd(net, batch) <= 2.5


OPTIMIZERS: list[tuple[dict[str, Any], type[torch.optim.Optimizer], int]] = [
    ({"kind": "sgd"}, torch.optim.SGD, 0),
    ({"kind": "sgd", "momentum": 0.9}, torch.optim.SGD, 1),
    ({"kind": "adam"}, torch.optim.Adam, 2),
    ({"kind": "adamw"}, torch.optim.AdamW, 2),
]


@pytest.mark.parametrize(("optimizer", "kind", "copies"), OPTIMIZERS)
def test_memory_is_weights_gradients_optimizer_state_and_activations(
    optimizer: dict[str, Any], kind: Any, copies: int
) -> None:
    weight = torch.nn.Parameter(torch.zeros(50))
    weight.grad = torch.ones(50)
    one = kind([weight], lr=1.0, **{name: value for name, value in optimizer.items() if name != "kind"})
    one.step()
    kept = [value for state in one.state.values() for value in state.values() if torch.is_tensor(value)]
    assert sum(value.numel() for value in kept if value.numel() > 1) == copies * 50  # as torch has it

    weights, activations = (64 + 1) * 100 + (100 + 1) * 10, 100 + 100 + 10  # linear, relu, linear
    for precision, width in (("fp32", 4), ("bf16", 2)):
        train = {"steps": 10, "batch_size": 32, "precision": precision}
        net = recipe({"kind": "mlp", "hidden": [100]}, optimizer={"lr": 1.0, **optimizer}, train=train)
        mib = (weights * 4 * (2 + copies) + 32 * activations * width) / 2**20
        assert sizes(net) == (weights, mib)
        assert estimated_memory_mib(net, Size(weights, activations)) == mib


def test_a_model_of_the_users_own_has_no_known_size() -> None:
    net = recipe({"kind": "module", "module": "a:b"}, shape=[4])
    assert sizes(net) == (None, None)


# --- inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"source": "digits"}, ((64,), 10)),
        ({"source": "digits", "images": True}, ((1, 8, 8), 10)),
        ({"source": "synthetic", "shape": [3, 4, 5], "classes": 7}, ((3, 4, 5), 7)),
        ({"source": "hub", "name": "x", "shape": [3, 32, 32], "classes": 100}, ((3, 32, 32), 100)),
    ],
)
def test_the_input_is_that_of_the_data(data: dict[str, Any], expected: object) -> None:
    assert input_of(Recipe.model_validate({**recipe({"kind": "mlp"}).model_dump(), "data": data})) == expected


def npz(path: Path) -> Recipe:
    net = recipe({"kind": "mlp", "hidden": [5]})
    return Recipe.model_validate({**net.model_dump(), "data": {"source": "npz", "path": str(path)}})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_input_of_arrays_is_read_from_their_file(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "x.npz", x=np.zeros((6, 3, 4, 4), np.uint8), y=np.array([0, 3, 1, 0, 2, 3]))
    assert input_of(npz(tmp_path / "x.npz")) == ((3, 4, 4), 4)
    assert sizes(npz(tmp_path / "x.npz"))[0] == (48 + 1) * 5 + (5 + 1) * 4


# --- contradictions -----------------------------------------------------------------------------------------------

GROUPS_4 = {"kind": "group", "groups": 4}
WHITEN_8 = {"kind": "whiten", "group_size": 8}
ONE = {"steps": 10, "batch_size": 1}

# Further ones are in test_check.py, with their sentences.
FROZEN, RENORM = {"kind": "frozen", "after": 10}, {"kind": "renorm", "warmup": 10, "r_steps": 20, "d_steps": 20}
IGNORING = {"kind": "batch", "backward": "ignore_statistics"}
ZERO: dict[str, Any] = {"kind": "resnet", "depth": 20, "zero_gamma": True}
CONTRADICTIONS = [
    (recipe({"kind": "mlp"}, {"kind": "ghost", "size": 3}), "norm.size"),  # of a batch of 8
    (recipe({"kind": "mlp"}, {"kind": "ghost", "size": 1}), "norm.size"),
    (recipe({"kind": "mlp"}, FROZEN), "norm.after"),
    (recipe({"kind": "mlp"}, RENORM), "norm.warmup"),
    (recipe({"kind": "mlp"}, {**IGNORING, "kernel": "fused"}), "norm.backward"),
    (recipe({"kind": "mlp"}, {**IGNORING, "sync": True}), "norm.sync"),
    (recipe({"kind": "mlp"}, {"kind": "dyt", "affine": False, "init_weight": 2.0}), "norm.init_weight"),
    (recipe(ZERO), "model.zero_gamma"),
    (recipe(ZERO, {"kind": "batch", "affine": False}), "model.zero_gamma"),
    (recipe({"kind": "cnn", "channels": [6]}, GROUPS_4), "norm.groups"),
    (recipe({"kind": "resnet", "depth": 20}, {"kind": "group", "groups": 3}), "norm.groups"),
    (recipe({"kind": "mlp", "hidden": [8, 4]}, GROUPS_4), "norm.kind"),  # a group of one channel, one value
    (recipe({"kind": "mlp", "hidden": [8, 1]}, "layer"), "norm.kind"),
    (recipe({"kind": "resnet", "depth": 18}, "instance", shape=[3, 8, 8]), "norm.kind"),  # the last maps are 1x1
    (recipe({"kind": "resnet", "depth": 18}, "batch", shape=[3, 8, 8], train=ONE), "train.batch_size"),
    (recipe({"kind": "cnn", "channels": [6]}, "iternorm"), "norm.group_size"),
    (recipe({"kind": "mlp", "hidden": [16]}, WHITEN_8), "norm.group_size"),  # 8 values a channel
    (recipe({"kind": "mlp", "hidden": [16]}, WHITEN_8, train=ONE), "train.batch_size"),
    (recipe({"kind": "module", "module": "a:b"}, shape=[8, 8]), "data.shape"),
    (recipe({"kind": "mlp"}, schedule={"kind": "step", "milestones": [5, 5]}), "schedule.milestones"),
]
FITTING = [
    recipe({"kind": "mlp"}, {"kind": "ghost", "size": 2}),
    recipe({"kind": "cnn"}, {"kind": "ghost", "size": 1}),
    recipe({"kind": "mlp"}, {**FROZEN, "after": 9}),
    recipe({"kind": "mlp"}, {**FROZEN, "after": 19}, train={"steps": 10, "batch_size": 8, "accumulate": 2}),
    recipe({"kind": "mlp"}, {**RENORM, "warmup": 9}),
    recipe({"kind": "mlp"}, IGNORING),
    recipe({"kind": "mlp", "hidden": [1]}, "dyt", train=ONE),  # it takes no mean
    recipe(ZERO, "rms"),
    recipe({"kind": "mlp", "hidden": [8, 12]}, GROUPS_4),
    recipe({"kind": "cnn"}, "instance"),
    recipe({"kind": "mlp", "hidden": [16]}, WHITEN_8, train={"steps": 10, "batch_size": 9}),
    recipe({"kind": "cnn"}, WHITEN_8, train=ONE),
    recipe({"kind": "mlp", "hidden": [7]}, {"kind": "whiten", "group_size": 1}),
    recipe({"kind": "mlp", "hidden": [2]}, "layer"),
    recipe({"kind": "mlp"}, "batch", train={"steps": 10, "batch_size": 2}),
    recipe({"kind": "cnn"}, "batch", train=ONE),
    recipe({"kind": "resnet", "depth": 18}, "instance", shape=[3, 33, 33]),  # the last maps are 2x2
    recipe({"kind": "mlp"}, train={"steps": 10, "evaluate_every": 10, "batch_size": 2000}),
    recipe({"kind": "module", "module": "a:b"}, GROUPS_4, shape=[7]),
]


ALL = [*((net, [field]) for net, field in CONTRADICTIONS), *((net, []) for net in FITTING)]


@pytest.mark.parametrize(("net", "fields"), ALL, ids=range(len(ALL)))
def test_contradicting_sections_are_named_by_the_field_to_change(net: Recipe, fields: list[str]) -> None:
    assert [".".join(keys) for keys, _ in contradictions(net)] == fields


@pytest.mark.parametrize(
    ("model", "norm", "shape"),
    [
        ({"kind": "mlp", "hidden": [4]}, GROUPS_4, [9]),
        ({"kind": "mlp", "hidden": [4]}, "instance", [9]),
        ({"kind": "mlp", "hidden": [1]}, "layer", [9]),
        ({"kind": "resnet", "depth": 18}, "instance", [3, 8, 8]),
    ],
)
def test_a_norm_over_single_values_has_an_output_without_its_input(
    model: dict[str, Any], norm: Any, shape: list[int]
) -> None:
    net = recipe(model, norm, shape=shape)
    assert list(contradictions(net))
    y = build(net, tuple(shape), 10).double()(torch.randn(5, *shape, dtype=torch.float64))
    assert torch.allclose(y, y[:1], rtol=0, atol=1e-12)  # float64's rounding of x - mean, times 1 / sqrt(eps)
