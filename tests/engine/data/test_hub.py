"""Image sets from folders and Parquet, and images decoded on demand. Nothing asks the network."""

from __future__ import annotations

import shutil
import socket
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import islice
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from bncli.engine.data import load
from bncli.engine.data.hub import Streamed, image_splits, open_tables, reachable, to_pixels
from bncli.engine.data.splits import Dataset, evaluation_order, order
from bncli.errors import USAGE, DataError
from bncli.recipe.sections import Hub

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "eel")
SIZES = {"train": 12, "test": 6}


@pytest.fixture(scope="module", autouse=True)
def library_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def pixels() -> dict[str, np.ndarray]:
    """Split -> (N, 8, 8, 3) bytes; the label of image n is n % 3."""
    random = np.random.default_rng(0)
    return {split: random.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8) for split, size in SIZES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pixels) -> Path:
    root = tmp_path_factory.mktemp("folder")
    for split, images in pixels.items():
        for number, image in enumerate(images):
            place = root / split / CLASSES[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{number:02d}.png")
    return root


def table(images: np.ndarray, **columns: list) -> datasets.Dataset:
    """Columns `image` and `label`, and those given in their stead or beside them (None: left away)."""
    values = {"image": [Image.fromarray(image) for image in images], "label": [n % 3 for n in range(len(images))]}
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    made = datasets.Dataset.from_dict(values, features=datasets.Features(kinds))
    for name, column in columns.items():
        made = made.remove_columns([name]) if name in made.column_names else made
        made = made if column is None else made.add_column(name, column)
    return made


def parquet(path: Path, made: datasets.Dataset) -> str:
    made.to_parquet(str(path))
    return str(path)


def hub(name: str | Path, **fields) -> Dataset:
    return load(Hub(source="hub", **{"name": str(name), "shape": (3, 8, 8), "classes": 3, "workers": 0} | fields), CPU)


def refused(name: str | Path, **fields) -> str:
    with pytest.raises(DataError) as caught:
        hub(name, **fields)
    assert caught.value.exit_code == USAGE
    return str(caught.value)


def same(one, other) -> bool:
    return all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(one, other, strict=True))


# --- what is read -------------------------------------------------------------------------------------------------


def test_a_folder_of_class_folders_is_its_images_and_labels(folder, pixels):
    loaded = hub(folder)
    assert (loaded.name, loaded.shape, loaded.classes) == (str(folder), (3, 8, 8), 3)
    assert (len(loaded.train), len(loaded.held_out)) == (12, 6)
    x, y = next(loaded.held_out.chunks(10))
    by_class = sorted(range(6), key=lambda number: (number % 3, number))  # the library's order: folder after folder
    by_class = [by_class[place] for place in evaluation_order(6, 0)]
    assert y.tolist() == [number % 3 for number in by_class]
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), pixels["test"][by_class].astype(np.float32) / 255)


def test_a_folder_of_parquet_files_has_the_splits_of_their_names(tmp_path, pixels):
    for split, images in pixels.items():
        parquet(tmp_path / f"{split}-00000-of-00001.parquet", table(images))
    loaded = hub(tmp_path)
    x, y = next(loaded.held_out.chunks(10))
    evaluated = evaluation_order(6, 0)
    assert np.array_equal(x.permute(0, 2, 3, 1).numpy(), pixels["test"][evaluated].astype(np.float32) / 255)
    assert y.tolist() == (evaluated % 3).tolist()
    assert len(loaded.train) == 12


def test_a_single_parquet_file_is_the_training_split_to_hold_out_from(tmp_path, pixels):
    path = parquet(tmp_path / "set.parquet", table(pixels["train"]))
    loaded = hub(path, held_out=4)
    (x, y), (held_out_x, held_out_y) = next(loaded.train.chunks(12)), next(loaded.held_out.chunks(12))
    assert (len(x), len(held_out_x)) == (8, 4)
    together = {tuple(image) for image in torch.cat([x, held_out_x]).mul(255).round().byte().flatten(1).tolist()}
    assert together == {tuple(image.transpose(2, 0, 1).ravel().tolist()) for image in pixels["train"]}
    assert sorted(torch.cat([y, held_out_y]).tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert same(hub(path, held_out=4).held_out.chunks(12), [(held_out_x, held_out_y)])
    assert not same(hub(path, held_out=4, split_seed=1).held_out.chunks(12), [(held_out_x, held_out_y)])


def test_images_are_made_grey_and_resized_as_the_shape_says(folder):
    x, _ = next(hub(folder, shape=(1, 4, 6)).held_out.chunks(10))
    assert x.shape == (6, 1, 4, 6)


def test_plain_bytes_and_whole_numbers_will_do_where_the_columns_are_named(tmp_path, folder, pixels):
    encoded = [(folder / "train" / CLASSES[n % 3] / f"{n:02d}.png").read_bytes() for n in range(12)]
    plain = datasets.Dataset.from_dict({"png": encoded, "kind": [n % 3 for n in range(12)]})
    path = parquet(tmp_path / "set.parquet", plain)
    named = hub(path, held_out=3, image_column="png", label_column="kind")
    typed = hub(parquet(tmp_path / "typed.parquet", table(pixels["train"])), held_out=3)
    assert same(named.held_out.chunks(3), typed.held_out.chunks(3))
    assert "has no columns of type Image; name one of its columns: png (binary), kind (int64)" in refused(
        path, held_out=3
    )


def test_standard_normalises_by_the_training_images(folder):
    loaded = hub(folder, normalize="standard")
    x, _ = next(loaded.train.chunks(12))
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)
    unit, _ = next(hub(folder).train.chunks(12))
    held_out, raw = next(loaded.held_out.chunks(6))[0], next(hub(folder).held_out.chunks(6))[0]
    shift, scale = unit.mean((0, 2, 3), keepdim=True), unit.std((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(held_out, (raw - shift) / scale, atol=1e-5, rtol=1e-5)


# --- in memory or decoded batch by batch --------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_larger_than_memory_gives_the_same_batches(folder, workers):
    fields = {"augment": "crop-flip", "normalize": "standard"}
    kept, streamed = hub(folder, **fields), hub(folder, in_memory_gib=0.0, workers=workers, **fields)
    assert isinstance(streamed.train, Streamed)
    assert (len(streamed.train), streamed.train.index_device) == (12, CPU)
    batches = []
    for split in (kept.train, streamed.train):
        indices = order(12, 5, torch.Generator().manual_seed(1))
        batches.append(list(islice(split.batches(indices, torch.Generator().manual_seed(2)), 5)))
    assert same(*batches)
    assert same(kept.held_out.chunks(4), streamed.held_out.chunks(4))
    assert same(kept.held_out.chunks(2, slice(1, None, 2)), streamed.held_out.chunks(2, slice(1, None, 2)))


@pytest.mark.parametrize("in_memory_gib", [0.0, 4.0])
def test_held_out_images_are_evaluated_in_an_order_of_the_split_seed(folder, in_memory_gib):
    one, again, other = (
        [y for _, y in hub(folder, in_memory_gib=in_memory_gib, split_seed=seed).held_out.chunks(5)]
        for seed in (0, 0, 2)
    )
    assert [len(y) for y in one] == [3, 3]
    assert all(map(torch.equal, one, again))
    assert not all(map(torch.equal, one, other))


def test_the_limit_counts_a_byte_for_each_value_of_all_images(folder):
    size_gib = 18 * 3 * 8 * 8 / 2**30
    assert not isinstance(hub(folder, in_memory_gib=size_gib).train, Streamed)
    assert isinstance(hub(folder, in_memory_gib=size_gib * 0.999).train, Streamed)


def test_decoding_batch_by_batch_leaves_the_global_generator_alone(folder):
    state = torch.get_rng_state()
    list(hub(folder, in_memory_gib=0.0).held_out.chunks(3))
    assert torch.equal(torch.get_rng_state(), state)


def read_through(name: str | Path, **fields) -> list:
    return list(hub(name, **fields).held_out.chunks(3))


@pytest.mark.parametrize("fields", [{}, {"in_memory_gib": 0.0}, {"in_memory_gib": 0.0, "workers": 1}])
def test_a_damaged_image_is_named_without_a_traceback(tmp_path, folder, fields):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "test" / "dog" / "04.png").write_bytes(b"not an image")  # the fourth of six
    with pytest.raises(DataError, match=r"split 'test': image 3 cannot be used: .*; repair or remove it") as caught:
        read_through(tmp_path / "copy", **fields)
    assert "Traceback" not in str(caught.value)


# --- what does not fit --------------------------------------------------------------------------------------------


def test_a_missing_library_comes_with_the_extra_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "run: pip install datasets pillow" in refused(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": (2, 8, 8)}, "data.shape: images have 1 (grey) or 3 (red, green, blue) channels, not 2"),
        ({"examples": 13}, " has 12 training examples, the recipe says 13"),
        ({"classes": 10}, "split 'train' has 3 classes (cat, dog, eel), the recipe says 10"),
        ({"train_split": "training"}, "has no split 'training'; it has train, test"),
        ({"held_out_split": "validation"}, "has no split 'validation'; it has train, test. Name one of these, or set"),
        ({"held_out_split": "train"}, "data.held_out_split: 'train' is the training split; name another"),
        ({"held_out": 3}, "has a split 'test' to hold out; remove held_out"),
        ({"held_out": 12, "held_out_split": "none"}, "data.held_out: 12 leaves nothing to train on"),
        ({"image_column": "img"}, "has no column 'img'; it has image (Image), label (ClassLabel)"),
        ({"label_column": "fine"}, "has no column 'fine'; it has image (Image), label (ClassLabel)"),
        ({"image_column": "label"}, "column 'label' holds no images"),
        ({"label_column": "image"}, "column 'image' does not hold a whole number for each image"),
    ],
)
def test_what_the_recipe_says_of_a_set_must_be_so(folder, fields, message):
    found = refused(folder, **fields)
    assert message in found
    assert found.startswith("data.")


def test_several_label_columns_are_listed(tmp_path, pixels):
    made = table(pixels["train"], coarse=[n % 2 for n in range(12)])
    path = parquet(tmp_path / "set.parquet", made.cast_column("coarse", datasets.ClassLabel(names=["a", "b"])))
    message = refused(path, held_out=2)
    assert (
        "has 2 columns of type ClassLabel; name one of its columns: image (Image), label (ClassLabel), coarse"
        in message
    )
    assert hub(path, held_out=2, label_column="coarse", classes=2).classes == 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1] * 12, "has labels from -1 to -1, the recipe's go from 0 to 2. If all labels of a test split are -1"),
        ([n % 4 for n in range(12)], "has labels from 0 to 3, the recipe's go from 0 to 2"),
        ([None, *range(11)], "does not hold a whole number for each image"),
        (["cat"] * 12, "does not hold a whole number for each image"),
    ],
)
def test_labels_must_be_numbers_of_the_recipes_classes(tmp_path, pixels, labels, message):
    path = parquet(tmp_path / "set.parquet", table(pixels["train"], label=labels))
    assert message in refused(path, held_out=2, label_column="label")


def test_an_empty_split_is_refused(pixels):
    tables = {"train": table(pixels["train"]), "test": table(pixels["test"][:0])}
    with pytest.raises(DataError, match=r"data\.name: birds, split 'test' is empty"):
        image_splits(tables, Hub(source="hub", name="birds", shape=(3, 8, 8), classes=3))


def test_files_and_folders_without_images_are_refused(tmp_path):
    assert "doesn't contain any data files. Name a Parquet file, or a folder of the form" in refused(tmp_path)
    (tmp_path / "set.parquet").write_bytes(b"something else")
    (tmp_path / "set.tar").write_bytes(b"something else")
    assert "could not be loaded: " in refused(tmp_path / "set.parquet")
    assert "is neither a folder nor a Parquet file. Name a Parquet file, or" in refused(tmp_path / "set.tar")


@pytest.mark.parametrize("name", ["./photos", "~/photos-that-are-not-there", "a/b/c", "missing.parquet", "/none"])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(name):
    assert f"data.name: {name} does not exist. Name a Parquet file, or a folder" in refused(name)


def test_the_name_of_a_file_format_does_not_read_the_working_directory():
    assert "data.name: imagefolder is a file format, not a data set" in refused("imagefolder")


def test_without_internet_a_name_on_the_hub_is_refused_with_what_would_do():
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with pytest.raises(
        DataError, match=r"data\.name: nobody/nothing could not be loaded: .* cannot be reached; use local"
    ):
        open_tables("nobody/nothing", None, "train", is_reachable=lambda endpoint: False)
    assert before == constants.HF_HUB_OFFLINE


def test_a_name_that_the_hub_does_not_know_is_refused_with_the_librarys_words(monkeypatch):
    def load_dataset(*arguments, **options):
        raise FileNotFoundError("Looked around.\nDataset 'nobody/nothing' doesn't exist on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"loaded: Dataset 'nobody/nothing' doesn't exist on the Hub\. Without"):
        open_tables("nobody/nothing", None, "train", is_reachable=lambda endpoint: True)


class Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(503)

    def log_message(self, *arguments) -> None:
        pass


def test_any_answer_means_reachable_and_a_closed_port_does_not(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.handle_request).start()
        assert reachable(f"http://127.0.0.1:{server.server_port}", timeout_s=60)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refuses
        assert not reachable(f"http://127.0.0.1:{unused.getsockname()[1]}")


def test_nothing_is_printed(folder, capfd):
    hub(folder, held_out_split="test", image_column="image", shape=(3, 6, 6))
    assert capfd.readouterr() == ("", "")


# --- pixels -------------------------------------------------------------------------------------------------------


def image_of(mode: str, *shape: int):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def test_an_image_of_the_right_size_and_mode_keeps_its_bytes():
    grey, colour = image_of("L", 5, 7), image_of("RGB", 5, 7, 3)
    assert np.array_equal(to_pixels(grey, (1, 5, 7))[0].numpy(), np.asarray(grey))
    assert np.array_equal(to_pixels(colour, (3, 5, 7)).permute(1, 2, 0).numpy(), np.asarray(colour))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_8_bit_mode_becomes_grey_or_rgb(mode, channels):
    pixels = to_pixels(image_of(mode, 4, 6, 3), (channels, 4, 6))
    assert (pixels.shape, pixels.dtype) == ((channels, 4, 6), torch.uint8)


def test_a_larger_image_is_averaged_down():
    checks = Image.fromarray((255 * (np.indices((64, 64)).sum(0) % 2)).astype(np.uint8))
    pixels = to_pixels(checks, (1, 8, 8)).float()
    # without averaging each pixel would be a check's own 0 or 255
    assert ((pixels - 127.5).abs() < 3).all()


def test_height_and_width_are_not_mixed_up():
    left = Image.fromarray(np.repeat([[0, 0, 255, 255]], 2, axis=0).astype(np.uint8))
    pixels = to_pixels(left, (1, 6, 4))[0]
    assert pixels.shape == (6, 4)
    assert pixels.tolist() == [[0, 0, 255, 255]] * 6


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused_instead_of_clipped(mode):
    with pytest.raises(ValueError, match=rf"its pixels \(mode {mode}\) have more than 8 bits per channel"):
        to_pixels(Image.new(mode, (4, 4)), (1, 4, 4))
