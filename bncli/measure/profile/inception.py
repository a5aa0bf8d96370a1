"""BN-Inception, the paper's own network (Ioffe & Szegedy 2015, arXiv 1502.03167, figure 5), as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Block(NamedTuple):
    """A row of figure 5 of arXiv 1502.03167: the filters of an Inception block; 0: it has no such branch."""

    single: int  # 1x1
    reduce: int  # 1x1 before the 3x3
    three: int
    double_reduce: int  # 1x1 before the two 3x3
    double: int
    projection: int  # 1x1 after the pool; 0: the pool passes its input through, and the block has stride 2

    def outputs(self, inputs: int) -> int:
        return self.single + self.three + self.double + (self.projection or inputs)


# The filters are figure 5's. Its column of output sizes gives 4c, 4d and 4e 576, 576 and 1024 channels, where its
# filters add up to 608, 608 and 1056.
BLOCKS = {
    "3a": Block(64, 64, 64, 64, 96, 32),
    "3b": Block(64, 64, 96, 64, 96, 64),
    "3c": Block(0, 128, 160, 64, 96, 0),
    "4a": Block(224, 64, 96, 96, 128, 128),
    "4b": Block(192, 96, 128, 96, 128, 128),
    "4c": Block(160, 128, 160, 128, 160, 128),
    "4d": Block(96, 128, 192, 160, 192, 128),
    "4e": Block(0, 128, 192, 192, 256, 0),
    "5a": Block(352, 192, 320, 160, 224, 128),
    "5b": Block(352, 192, 320, 192, 224, 128),
}


class Convolution(NamedTuple):
    """A convolution, always followed by batch norm and ReLU; `side` is that of its square output."""

    inputs: int
    outputs: int
    kernel: int
    side: int


def convolutions(pixels: int = 224) -> Iterator[Convolution]:
    """Those of BN-Inception, the network of Ioffe & Szegedy 2015 (figure 5), for square images."""
    side = pixels // 2
    yield Convolution(3, 64, 7, side)
    side //= 2  # a max pool
    yield Convolution(64, 64, 1, side)
    yield Convolution(64, 192, 3, side)
    side //= 2  # a max pool
    inputs = 192
    for block in BLOCKS.values():
        strided = block.projection == 0
        after = side // 2 if strided else side
        if block.single:
            yield Convolution(inputs, block.single, 1, side)
        yield Convolution(inputs, block.reduce, 1, side)
        yield Convolution(block.reduce, block.three, 3, after)
        yield Convolution(inputs, block.double_reduce, 1, side)
        yield Convolution(block.double_reduce, block.double, 3, side)
        yield Convolution(block.double, block.double, 3, after)
        if block.projection:
            yield Convolution(inputs, block.projection, 1, side)
        inputs, side = block.outputs(inputs), after
