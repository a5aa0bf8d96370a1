"""A model as plain data: its parameters against published and hand-made counts and against the modules that are built,
its activations against what autograd keeps, and the sections of a recipe that contradict each other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bncli.engine.models import build
from bncli.errors import DataError
from bncli.measure.dry_run import sizes
from bncli.recipe.layers import contradictions, estimated_memory_mib, input_of, layers, size
from bncli.recipe.sections import Recipe

NORMS = ["none", "batch", "layer", "group", "instance"]
SHAPES = {"mlp": [64], "cnn": [3, 16, 16], "resnet": [3, 32, 32]}


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


def parameters(recipe: Recipe) -> int:
    found, _ = sizes(recipe)
    assert found is not None
    return found


# --- parameters ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "published"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032)])
def test_the_imagenet_resnets_have_the_published_number_of_parameters(depth: int, published: int) -> None:
    """torchvision's figures for 1,000 classes, which are those of He et al.'s networks with batch norm."""
    net = recipe({"kind": "resnet", "depth": depth}, "batch", shape=[3, 224, 224], classes=1000)
    assert parameters(net) == published


@pytest.mark.parametrize(("depth", "he_et_al"), [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6), (110, 1.7e6)])
def test_the_cifar_resnets_have_the_parameters_of_he_et_al_and_two_projections(depth: int, he_et_al: float) -> None:
    """arXiv 1512.03385, table 6; its nets pad the shortcuts with zeros (option A) where these project (option B)."""
    n = (depth - 2) // 6
    weights = 3 * 16 * 9 + 2 * n * 16 * 16 * 9 + 10 * 64 + 10
    for narrow, wide in ((16, 32), (32, 64)):
        weights += (narrow * wide + (2 * n - 1) * wide * wide) * 9
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert parameters(recipe({"kind": "resnet", "depth": depth}, "batch")) == weights + norms + projections
    assert weights + norms == pytest.approx(he_et_al, rel=0.02)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("none", (64 + 1) * 100 + (100 + 1) * 50 + (50 + 1) * 10),
        ("batch", 64 * 100 + 2 * 100 + 100 * 50 + 2 * 50 + (50 + 1) * 10),
        ("layer", (64 + 1) * 100 + 2 * 100 + (100 + 1) * 50 + 2 * 50 + (50 + 1) * 10),
        ({"kind": "batch", "affine": False}, 64 * 100 + 100 * 50 + (50 + 1) * 10),
    ],
)
def test_the_parameters_of_an_mlp_are_those_counted_by_hand(norm: Any, expected: int) -> None:
    assert parameters(recipe({"kind": "mlp", "hidden": [100, 50]}, norm)) == expected


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("none", (3 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + (64 + 1) * 10),
        ("batch", 3 * 9 * 32 + 2 * 32 + 32 * 9 * 64 + 2 * 64 + (64 + 1) * 10),
        ("group", (3 * 9 + 1) * 32 + 2 * 32 + (32 * 9 + 1) * 64 + 2 * 64 + (64 + 1) * 10),
    ],
)
def test_the_parameters_of_a_cnn_are_those_counted_by_hand(norm: str, expected: int) -> None:
    assert parameters(recipe({"kind": "cnn", "channels": [32, 64]}, norm)) == expected


def test_an_mlp_takes_the_pixels_of_images_as_its_features() -> None:
    net = recipe({"kind": "mlp", "hidden": [5]}, shape=[3, 8, 8])
    assert parameters(net) == (3 * 8 * 8 + 1) * 5 + (5 + 1) * 10


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("model", [{"kind": "mlp"}, {"kind": "cnn"}, {"kind": "resnet", "depth": 20}], ids=str)
def test_the_count_is_that_of_the_modules_that_are_built(model: dict[str, Any], norm: str, affine: bool) -> None:
    net = recipe(model, {"kind": norm} if norm == "none" else {"kind": norm, "affine": affine})
    shape, classes = input_of(net)
    assert parameters(net) == sum(parameter.numel() for parameter in build(net, shape, classes).parameters())


@pytest.mark.parametrize("depth", [18, 34, 50, 110])
def test_the_count_of_a_deep_resnet_is_that_of_its_modules_and_its_output_has_a_logit_a_class(depth: int) -> None:
    net = recipe({"kind": "resnet", "depth": depth}, "batch", classes=7)
    plan = layers(net, (3, 32, 32), 7)
    assert plan is not None
    with torch.device("meta"):
        modules = build(net, (3, 32, 32), 7)
    assert parameters(net) == sum(parameter.numel() for parameter in modules.parameters())
    assert size(plan, (3, 32, 32))[1] == (7,)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 31])
@pytest.mark.parametrize("model", [{"kind": "cnn", "channels": [4, 6, 8]}, {"kind": "resnet", "depth": 18}], ids=str)
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


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("model", [{"kind": "mlp"}, {"kind": "cnn"}, {"kind": "resnet", "depth": 20}], ids=str)
def test_the_estimate_of_activations_is_between_0_8_and_2_5_times_what_autograd_keeps(
    model: dict[str, Any], norm: str, activation: str
) -> None:
    net, batch = recipe({**model, "activation": activation}, norm), 16
    plan = layers(net, *input_of(net))
    assert plan is not None
    estimated = size(plan, input_of(net)[0])[0].activations * batch * 4
    assert 0.8 <= estimated / kept_by_autograd(net, batch) <= 2.5


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [
        ({"kind": "sgd", "lr": 1.0}, 2),
        ({"kind": "sgd", "lr": 1.0, "momentum": 0.9}, 3),
        ({"kind": "adam", "lr": 1.0}, 4),
        ({"kind": "adamw", "lr": 1.0}, 4),
    ],
)
@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_memory_is_weights_gradients_optimizer_state_and_activations(
    optimizer: dict[str, Any], copies: int, precision: str, width: int
) -> None:
    net = recipe(
        {"kind": "mlp", "hidden": [100]},
        optimizer=optimizer,
        train={"steps": 10, "batch_size": 32, "precision": precision},
    )
    weights = (64 + 1) * 100 + (100 + 1) * 10
    activations = 100 + 100 + 10  # linear, relu, linear
    assert sizes(net) == (weights, (weights * 4 * copies + 32 * activations * width) / 2**20)
    plan = layers(net, (64,), 10)
    assert plan is not None
    assert estimated_memory_mib(net, size(plan, (64,))[0]) == sizes(net)[1]


def test_the_optimizer_state_is_the_one_that_torch_keeps() -> None:
    weight = torch.nn.Parameter(torch.zeros(50))
    weight.grad = torch.ones(50)
    for optimizer, copies in (
        (torch.optim.SGD([weight], lr=1), 0),
        (torch.optim.SGD([weight], lr=1, momentum=0.9), 1),
        (torch.optim.AdamW([weight], lr=1), 2),
    ):
        optimizer.step()
        kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        assert sum(value.numel() for value in kept if value.numel() > 1) == copies * 50


def test_an_own_model_has_no_known_size() -> None:
    net = recipe({"kind": "module", "module": "a:b"}, shape=[4])
    assert sizes(net) == (None, None)


# --- inputs -------------------------------------------------------------------------------------------------------


def test_the_input_is_that_of_the_data() -> None:
    net = recipe({"kind": "mlp"})
    for data, expected in (
        ({"source": "digits"}, ((64,), 10)),
        ({"source": "digits", "images": True}, ((1, 8, 8), 10)),
        ({"source": "synthetic", "shape": [3, 4, 5], "classes": 7}, ((3, 4, 5), 7)),
        ({"source": "hub", "name": "x", "shape": [3, 32, 32], "classes": 100}, ((3, 32, 32), 100)),
    ):
        assert input_of(Recipe.model_validate({**net.model_dump(), "data": data})) == expected


def npz(path: Path) -> Recipe:
    net = recipe({"kind": "mlp", "hidden": [5]})
    return Recipe.model_validate({**net.model_dump(), "data": {"source": "npz", "path": str(path)}})


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_input_of_arrays_is_read_from_their_file(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "x.npz", x=np.zeros((6, 3, 4, 4), np.uint8), y=np.array([0, 3, 1, 0, 2, 3]))
    assert input_of(npz(tmp_path / "x.npz")) == ((3, 4, 4), 4)
    assert parameters(npz(tmp_path / "x.npz")) == (48 + 1) * 5 + (5 + 1) * 4


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": np.zeros((2, 3))}, "y is not a file in the archive"),
        ({"y": np.zeros(2)}, "There is no item named 'x.npy' in the archive"),
        ({"x": np.zeros((2, 3)), "y": np.array(["a", "b"])}, ""),
        ({"x": np.zeros((2, 3)), "y": np.array([])}, ""),
        ({"x": np.zeros((2, 3)), "y": np.array([None, 1], dtype=object)}, "Object arrays cannot be loaded"),
    ],
)
def test_a_file_without_the_arrays_that_are_needed_is_refused(
    tmp_path: Path, arrays: dict[str, Any], reason: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError) as refused:
        input_of(npz(tmp_path / "x.npz"))
    start = f"data.path: {tmp_path / 'x.npz'} cannot be read as a .npz file with x and y: "
    assert str(refused.value).startswith(start)
    assert reason in str(refused.value)


def test_a_file_that_is_missing_or_not_an_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path: there is no file .*x\.npz; it should hold the arrays x and y"):
        input_of(npz(tmp_path / "x.npz"))
    (tmp_path / "x.npz").write_bytes(b"not a zip file")
    with pytest.raises(DataError, match=r"cannot be read as a \.npz file with x and y: File is not a zip file"):
        input_of(npz(tmp_path / "x.npz"))


# --- contradictions -----------------------------------------------------------------------------------------------

GROUPS_4 = {"kind": "group", "groups": 4}


@pytest.mark.parametrize(
    ("net", "field"),
    [
        (recipe({"kind": "mlp", "hidden": [8, 6]}, GROUPS_4), "norm.groups"),
        (recipe({"kind": "cnn", "channels": [6]}, GROUPS_4), "norm.groups"),
        (recipe({"kind": "resnet", "depth": 20}, {"kind": "group", "groups": 3}), "norm.groups"),
        (recipe({"kind": "mlp", "hidden": [8, 4]}, GROUPS_4), "norm.kind"),  # a group of one channel, one value
        (recipe({"kind": "mlp", "hidden": [8, 1]}, "layer"), "norm.kind"),
        (recipe({"kind": "mlp"}, "instance"), "norm.kind"),
        (recipe({"kind": "resnet", "depth": 18}, "instance", shape=[3, 8, 8]), "norm.kind"),  # the last maps are 1x1
        (recipe({"kind": "mlp"}, "batch", train={"steps": 10, "batch_size": 1}), "train.batch_size"),
        (
            recipe({"kind": "resnet", "depth": 18}, "batch", shape=[3, 8, 8], train={"steps": 10, "batch_size": 1}),
            "train.batch_size",
        ),
        (recipe({"kind": "cnn"}, shape=[64]), "model.kind"),
        (recipe({"kind": "mlp"}, shape=[8, 8]), "data.shape"),
        (recipe({"kind": "module", "module": "a:b"}, shape=[8, 8]), "data.shape"),
        (recipe({"kind": "mlp"}, train={"steps": 9, "evaluate_every": 10}), "train.evaluate_every"),
        (recipe({"kind": "mlp"}, train={"steps": 10, "batch_size": 2001}), "train.batch_size"),
        (recipe({"kind": "mlp"}, train={"steps": 10, "memory_format": "channels_last"}), "train.memory_format"),
        (recipe({"kind": "mlp"}, schedule={"kind": "step", "milestones": [5, 5]}), "schedule.milestones"),
    ],
)
def test_sections_that_contradict_each_other_are_named_by_the_field_to_change(net: Recipe, field: str) -> None:
    assert [".".join(keys) for keys, _ in contradictions(net)] == [field]


@pytest.mark.parametrize(
    "net",
    [
        recipe({"kind": "mlp", "hidden": [8, 12]}, GROUPS_4),
        recipe({"kind": "cnn"}, "instance"),
        recipe({"kind": "mlp", "hidden": [2]}, "layer"),
        recipe({"kind": "mlp"}, "batch", train={"steps": 10, "batch_size": 2}),
        recipe({"kind": "cnn"}, "batch", train={"steps": 10, "batch_size": 1}),
        recipe({"kind": "resnet", "depth": 18}, "instance", shape=[3, 33, 33]),  # the last maps are 2x2
        recipe({"kind": "mlp"}, train={"steps": 10, "evaluate_every": 10, "batch_size": 2000}),
        recipe({"kind": "module", "module": "a:b"}, GROUPS_4, shape=[7]),
    ],
)
def test_sections_that_just_fit_are_not_refused(net: Recipe) -> None:
    assert list(contradictions(net)) == []


@pytest.mark.parametrize(
    ("model", "norm", "shape"),
    [
        ({"kind": "mlp", "hidden": [4]}, GROUPS_4, [9]),
        ({"kind": "mlp", "hidden": [4]}, "instance", [9]),
        ({"kind": "mlp", "hidden": [1]}, "layer", [9]),
        ({"kind": "resnet", "depth": 18}, "instance", [3, 8, 8]),
    ],
)
def test_a_norm_over_single_values_is_refused_because_its_output_does_not_depend_on_its_input(
    model: dict[str, Any], norm: Any, shape: list[int]
) -> None:
    net = recipe(model, norm, shape=shape)
    assert list(contradictions(net))
    y = build(net, tuple(shape), 10).double()(torch.randn(5, *shape, dtype=torch.float64))
    assert torch.allclose(y, y[:1], rtol=0, atol=1e-12)  # float64's rounding of x - mean, times 1 / sqrt(eps)


def test_the_bias_before_a_norm_that_subtracts_the_mean_of_each_channel_is_left_out() -> None:
    net = {norm: recipe({"kind": "mlp", "hidden": [100]}, norm) for norm in NORMS}
    biases = {norm: parameters(net[norm]) - 64 * 100 - 100 * 10 - 10 - 200 * (norm != "none") for norm in NORMS}
    assert biases == {"none": 100, "batch": 0, "layer": 100, "group": 100, "instance": 0}
    assert math.prod(input_of(net["none"])[0]) == 64
