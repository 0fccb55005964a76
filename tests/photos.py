"""A folder of "photographs" to try --data DIR with, made of Fashion-MNIST: python tests/photos.py DIR [EACH]

Ten class folders of EACH (120) files in many sizes, tinted, on a ground with a gradient; mostly JPEG in
colour, some grey, some CMYK, some on their side with an EXIF note, some PNG with transparent ground or a
palette.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import fashion

CLASSES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle boot")


def photograph(pixels, rng):
    """(PIL image, how to save it, file ending) of a 28x28 uint8 picture, by the draws of a numpy Generator.
    """
    size = tuple(int(n) for n in rng.integers(48, 160, 2))
    mask = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    ramp = np.linspace(rng.uniform(0.2, 1, 3), rng.uniform(0.2, 1, 3), size[1])[:, None]          # (H, 1, 3)
    shade = rng.uniform(100, 200) * ramp + rng.normal(0, 8, (size[1], size[0], 3))
    ground = Image.fromarray(shade.clip(0, 255).astype(np.uint8))
    tint = Image.new("RGB", size, tuple(int(n) for n in rng.integers(0, 256, 3)))
    picture = Image.composite(tint, ground, mask)
    kind = rng.integers(20)
    if kind == 0:
        return picture.convert("L"), {}, "jpg"
    if kind == 1:
        return picture.convert("CMYK"), {}, "jpg"
    if kind == 2:                                         # on its side, and a note that says so
        exif = Image.Exif()
        exif[0x0112] = 8                                  # orientation: to be turned left to be upright
        return picture.transpose(Image.Transpose.ROTATE_270), {"exif": exif}, "JPEG"
    if kind == 3:
        tint.putalpha(mask)
        return tint, {}, "png"
    if kind == 4:
        return picture.convert("P", palette=Image.Palette.ADAPTIVE), {}, "png"
    return picture, {"quality": int(rng.integers(40, 95))}, "jpg"


def write(root, each, part="train", seed=0):
    """Write `each` images of every class into folders in `root`; the same seed gives the same ones."""
    images, rng = fashion(part), np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in (images.labels == label).nonzero().flatten()[:each].tolist():
            picture, options, ending = photograph(images.pixels[i, 0].numpy(), rng)
            picture.save(root / name / f"{i:05d}.{ending}", **options)


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 120)
