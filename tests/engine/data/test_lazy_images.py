from __future__ import annotations

import numpy as np
import pytest
import torch

from bncli.engine.data.hub import to_pixels

Image = pytest.importorskip("PIL.Image")


def picture(mode: str, *shape: int):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)).convert(mode)


def test_a_picture_of_the_right_size_and_mode_keeps_its_bytes():
    grey, colour = picture("L", 5, 7), picture("RGB", 5, 7, 3)
    assert np.array_equal(to_pixels(grey, (1, 5, 7))[0].numpy(), np.asarray(grey))
    assert np.array_equal(to_pixels(colour, (3, 5, 7)).permute(1, 2, 0).numpy(), np.asarray(colour))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_8_bit_mode_becomes_grey_or_rgb(mode, channels):
    pixels = to_pixels(picture(mode, 4, 6, 3), (channels, 4, 6))
    assert (pixels.shape, pixels.dtype) == ((channels, 4, 6), torch.uint8)


def test_a_larger_picture_is_averaged_down():
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
def test_pictures_of_more_than_8_bits_are_refused_instead_of_clipped(mode):
    with pytest.raises(ValueError, match=rf"its pixels \(mode {mode}\) have more than 8 bits a channel"):
        to_pixels(Image.new(mode, (4, 4)), (1, 4, 4))
