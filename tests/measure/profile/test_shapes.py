"""Shape sets against their models' definitions, and what users write."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bncli.errors import UsageError
from bncli.measure.profile.shapes import SETS, Calls, chosen, parse, read_csv, shape_set


def calls_of(name: str, **options: int) -> dict[tuple[int, ...], dict[str, int]]:
    return {found.shape: dict(found.operations) for found in shape_set(name, **options)}  # type: ignore[arg-type]


def total(name: str) -> int:
    return sum(found.calls for found in shape_set(name))


def test_resnet_50_has_53_batch_norms_16_with_an_add_and_4_in_shortcuts() -> None:
    by_operation: dict[str, int] = {}
    for operations in calls_of("resnet50").values():
        for operation, count in operations.items():
            by_operation[operation] = by_operation.get(operation, 0) + count
    assert by_operation == {"bn+relu": 33, "bn+add+relu": 16, "bn": 4}
    assert total("resnet50") == 53


def test_resnet_50_has_the_shapes_of_table_1() -> None:
    found = calls_of("resnet50", batch=2)
    assert found[2, 64, 112, 112] == {"bn+relu": 1}
    assert found[2, 64, 56, 56] == {"bn+relu": 6}
    assert found[2, 256, 56, 56] == {"bn": 1, "bn+add+relu": 3}
    assert found[2, 128, 56, 56] == {"bn+relu": 1}  # the 1x1 before the strided 3x3
    assert found[2, 512, 7, 7] == {"bn+relu": 5}
    assert found[2, 2048, 7, 7] == {"bn": 1, "bn+add+relu": 3}
    assert len(found) == 12


def test_resnet_50s_batch_norms_are_those_of_its_modules() -> None:
    import torch

    from tests.resnet import ResNet

    met: list[tuple[int, ...]] = []
    with torch.device("meta"):
        model = ResNet()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.register_forward_hook(lambda _, given, __: met.append(tuple(given[0].shape)))
        model(torch.empty(16, 3, 224, 224))
    assert sorted(met) == sorted(shape for shape, calls, _ in shape_set("resnet50") for _ in range(calls))


def test_resnet_20_has_a_batch_norm_a_convolution_and_two_projections() -> None:
    found = calls_of("resnet20")
    assert found == {
        (128, 16, 32, 32): {"bn+relu": 4, "bn+add+relu": 3},
        (128, 32, 16, 16): {"bn+relu": 3, "bn": 1, "bn+add+relu": 3},
        (128, 64, 8, 8): {"bn+relu": 3, "bn": 1, "bn+add+relu": 3},
    }
    assert total("resnet20") == 19 + 2


# BN-Inception's blocks in figure 5 of arXiv 1502.03167: the filters of the 1x1, of the 3x3 and of the 1x1 before it, of
# the two 3x3 and of the 1x1 before them, and of the 1x1 after the pool; without that the block has stride 2.
BLOCKS = (
    (64, 64, 64, 64, 96, 32),
    (64, 64, 96, 64, 96, 64),
    (0, 128, 160, 64, 96, 0),
    (224, 64, 96, 96, 128, 128),
    (192, 96, 128, 96, 128, 128),
    (160, 128, 160, 128, 160, 128),
    (96, 128, 192, 160, 192, 128),
    (0, 128, 192, 192, 256, 0),
    (352, 192, 320, 160, 224, 128),
    (352, 192, 320, 192, 224, 128),
)


def convolutions() -> Iterator[tuple[int, int, int, int]]:
    """(inputs, outputs, kernel size, side of the output) of BN-Inception's convolutions at 224x224."""
    yield from ((3, 64, 7, 112), (64, 64, 1, 56), (64, 192, 3, 56))
    inputs, side = 192, 28
    for single, reduce, three, double_reduce, double, projection in BLOCKS:
        after = side if projection else side // 2
        if single:
            yield inputs, single, 1, side
        yield from ((inputs, reduce, 1, side), (reduce, three, 3, after), (inputs, double_reduce, 1, side))
        yield from ((double_reduce, double, 3, side), (double, double, 3, after))
        if projection:
            yield inputs, projection, 1, side
        inputs, side = single + three + double + (projection or inputs), after


def test_bn_inception_is_the_network_of_figure_5() -> None:
    found = list(convolutions())
    weights = sum(inputs * outputs * kernel**2 for inputs, outputs, kernel, _ in found)
    vectors = 3 * sum(outputs for _, outputs, _, _ in found)  # the convolution's bias, and batch norm's two
    assert weights + vectors + 1024 * 1000 + 1000 == 11_295_240  # as the published Caffe model of that network has
    assert len(found) == total("inception") == 3 + 8 * 7 + 2 * 5
    counts = Counter((32, outputs, side, side) for _, outputs, _, side in found)
    assert calls_of("inception") == {shape: {"bn+relu": calls} for shape, calls in counts.items()}
    assert [shape for shape, *_ in shape_set("inception")] == list(counts)


def test_the_mlp_is_the_papers_three_hidden_layers_of_100() -> None:
    assert shape_set("mlp") == (Calls((60, 100), 3, (("bn", 3),)),)


def test_the_batch_is_the_papers_or_the_users() -> None:
    assert {found.shape[0] for found in shape_set("resnet50")} == {16}
    assert {found.shape[0] for found in shape_set("resnet50", cuda=True)} == {256}
    assert {found.shape[0] for name in SETS for found in shape_set(name, cuda=True, batch=3)} == {3}
    with pytest.raises(UsageError, match=r"^batch 0: expected a whole number above 0"):
        shape_set("mlp", batch=0)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("resnet51", (), None), "shapes resnet51: expected one of resnet20, resnet50, inception, mlp, or a CSV file"),
        ((None, ("8x4",), 3), "batch: a shape holds its own batch, its first number"),
        (("mine.csv", (), 3), "batch: mine.csv holds its own"),
        ((None, ("8",), None), "shape 8: expected the batch, the channels"),
    ],
)
def test_a_choice_that_cannot_be_obeyed_names_the_argument(arguments: tuple[Any, ...], error: str) -> None:
    with pytest.raises(UsageError) as refused:
        chosen(*arguments, cuda=False)
    assert str(refused.value).startswith(error)


def test_typed_shapes_come_before_a_set_and_the_default_is_a_resnet() -> None:
    assert chosen("mlp", ("8x4",), 3, cuda=False) == (Calls((8, 4), 1), *shape_set("mlp", batch=3))
    assert chosen(None, (), None, cuda=True) == shape_set("resnet50", cuda=True)
    assert chosen(None, (), 5, cuda=False) == shape_set("resnet20", batch=5)
    assert chosen(None, ("8x4",), None, cuda=False) == (Calls((8, 4), 1),)


def test_a_shape_is_read_as_it_is_written() -> None:
    assert parse("256x64x56x56") == (256, 64, 56, 56)
    assert parse("60X100") == (60, 100)
    assert parse("2x3x4x5x6") == (2, 3, 4, 5, 6)


@pytest.mark.parametrize("text", ["", "64", "2x0", "2x-3", "2x3x", "a", "1x2x3x4x5x6", "2 x 3", "2x3.5", "2x\u0663"])
def test_what_is_no_shape_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="as in 256x64x56x56 or 60x100") as refused:
        parse(text)
    assert str(refused.value).startswith(f"shape {text}: ")


def test_a_file_of_shapes_comes_with_the_most_called_first(tmp_path: Path) -> None:
    file = tmp_path / "shapes.csv"
    file.write_text("n,c,spatial,calls\n32,64,7x7,3\n8,100,,9\n2,4,5,1\n32,64,7x7,4\n")
    assert read_csv(file) == (Calls((8, 100), 9), Calls((32, 64, 7, 7), 7), Calls((2, 4, 5), 1))


def test_a_file_may_have_whole_shapes_other_columns_and_no_calls(tmp_path: Path) -> None:
    file = tmp_path / "shapes.csv"
    file.write_text("\ufeffmodel, Shape\nx,32x64x7x7\ny,8x100\n", encoding="utf-8")
    assert read_csv(file) == (Calls((32, 64, 7, 7), 1), Calls((8, 100), 1))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n,c,spatial,calls\n32,64,7x7,3\n8,0,,9\n", "line 3: 8, 0, , 9; expected: n, c and calls are whole numbers"),
        ("n,c,spatial,calls\n8,3,7y7,9\n", "line 2: 8, 3, 7y7, 9; expected"),
        ("n,c,spatial,calls\n8,3,7x7\n", "line 2: 8, 3, 7x7, ; expected"),
        ("n,c,spatial\n,3,7x7\n", "line 2: , 3, 7x7; expected"),
        ("shape,calls\n8x3,0\n", "line 2: 8x3, 0; expected: shape is sizes like 32x64x56x56, and calls a whole number"),
        ("n,c\n1,2\n", "line 1: it lacks the columns spatial; expected n, c, spatial and calls, or shape and calls"),
        ("", "line 1: it lacks the columns n, c, spatial"),
        ("shape\n", "it has no line of a shape under its first line"),
    ],
)
def test_a_mistake_in_a_file_names_file_line_and_what_was_expected(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "shapes.csv"
    file.write_text(text)
    with pytest.raises(UsageError) as refused:
        read_csv(file)
    assert str(file) in str(refused.value)
    assert expected in str(refused.value)


def test_many_mistakes_are_cut_short_and_unreadable_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "shapes.csv"
    file.write_text("shape\n" + "x\n" * 20)
    with pytest.raises(UsageError) as refused:
        read_csv(file)
    assert len(refused.value.mistakes) == 6
    assert refused.value.mistakes[-1] == "and 15 more"
    with pytest.raises(UsageError, match="there is no such file"):
        read_csv(tmp_path / "none.csv")
    file.write_bytes(b"\xff\xfe\x00n,c")
    with pytest.raises(UsageError, match=r"shapes\.csv: "):
        read_csv(file)


def test_shapes_need_no_torch() -> None:
    script = (
        "import sys; from bncli.measure.profile import shapes; "
        "shapes.shape_set('resnet50'); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False"]
