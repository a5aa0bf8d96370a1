"""Data of your own in the two forms that the recipes here read: arrays and a folder of images.

python data.py writes both beside this file: spirals.npz, and images/, which needs Pillow (pip install pillow).
"""

from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def write_arrays(random):
    """An archive of x (examples, features), of floats, and y (examples,), of whole numbers from 0."""
    y = np.repeat(np.arange(3), 200)
    radius = random.uniform(0.1, 1, len(y))
    angle = 4 * radius + y * 2 * np.pi / 3 + random.normal(0, 0.1, len(y))
    x = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    np.savez_compressed(HERE / "spirals.npz", x=x.astype(np.float16), y=y.astype(np.uint8))


def write_images(random):
    """A folder for each split, in it one for each class, and in that images of any name: images/train/ring/0.png."""
    from PIL import Image

    rows, columns = np.mgrid[:12, :12]
    for split, count in (("train", 12), ("test", 6)):
        for name in ("bar", "ring"):
            folder = HERE / "images" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                down, right = random.integers(4, 8, 2)
                drawn = abs(rows - down) < 2 if name == "bar" else abs(np.hypot(rows - down, columns - right) - 3) < 1
                pixels = 100 * drawn + random.integers(0, 150, (12, 12))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


if __name__ == "__main__":
    write_arrays(np.random.default_rng(0))
    write_images(np.random.default_rng(0))
