"""Images in memory: Fashion-MNIST as one tensor, its batches, and the 5/6-1/6 split (Experiments).

machinery/folder.py does the same for image files on a disk: its `Folder` has what `Images` has.
"""
import gzip
import hashlib
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100

FASHION = Path(__file__).parent / "datasets" / "FashionMNIST" / "raw"
FASHION_CLASSES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
                   "Ankle boot")                          # Table 2 of its paper
CACHE = Path("~/.cache/adasearch")                        # where torchvision keeps what it downloads
NAMES = ("fashion", "cifar10", "cifar100", "fake")
PAD = 2  # pixels that a random crop may move, as usual at 28-32 pixels


class Images(NamedTuple):
    """A set of labelled images in memory."""
    pixels: torch.Tensor                                  # (N, C, H, W) uint8
    labels: torch.Tensor                                  # (N,) long
    class_names: tuple
    crop = 1.0                                            # the share of an image's shorter side that is seen

    @property
    def classes(self):
        return len(self.class_names)

    @property
    def channels(self):
        return self.pixels.shape[1]

    @property
    def resolution(self):
        return self.pixels.shape[-1]

    def statistics(self, index):
        """(mean, standard deviation) of the pixels in [0, 1] of the images at `index`: (1, C, 1, 1) each."""
        pixels = self.pixels[index].double() / 255
        return (pixels.mean((0, 2, 3), keepdim=True).float(), pixels.std((0, 2, 3), keepdim=True).float())

    def loader(self, stats, batch_size, device="cpu"):
        """Their `Loader`, normalised by `stats`."""
        return Loader(self, stats, batch_size, device)


def generator(*position):
    """A `torch.Generator` that is a function of whole numbers, such as (seed, stage, step).

    Every draw of a run comes from one of these, so that a run can go on from any step without saved
    generator states.
    """
    seed = hashlib.blake2b(str(position).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed))


def read_idx(path, dimensions):
    """The array in a gzip file of idx format: two zero bytes, type 8 (uint8), dimensions, sizes, values.

    ValueError if it is not one, or broken.
    """
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: a broken gzip file ({error})") from None
    start = 4 + 4 * dimensions
    if len(raw) < start or raw[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path}: not an idx file of {dimensions} dimensions")
    shape = np.frombuffer(raw, ">u4", dimensions, 4)
    if len(raw) != start + math.prod(int(n) for n in shape):
        raise ValueError(f"{path}: {len(raw)} bytes are too few or too many for {'x'.join(map(str, shape))} "
                         "values")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def fashion(part, folder=FASHION):
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), 28x28, ten classes; part: train (60,000), t10k (10,000)."""
    pixels = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)[:, None]
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1).long()
    if len(labels) != len(pixels) or labels.max() > 9:
        raise ValueError(f"{folder}: {len(labels)} labels of {len(pixels)} images, from {labels.min()} to "
                         f"{labels.max()}, not 0 to 9, a label an image")
    return Images(pixels, labels, FASHION_CLASSES)


def cifar(name, part, folder=CACHE):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 50,000 and 10,000 images, 32x32 in colour; downloaded once.

    OSError if it is neither in `folder` nor can be downloaded, or is not whole.
    """
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    archive = Path(folder, kind.filename)
    try:
        archive = archive.expanduser()
        images = kind(archive.parent, train=part == "train", download=True)
    except (OSError, RuntimeError) as error:
        why = str(error).partition("\n")[0]
        if archive.exists():
            raise OSError(f"{archive} is not whole ({why}): delete it, or put the right one there") from None
        raise OSError(f"cannot be downloaded ({why}): put {kind.filename} into {archive.parent}") from None
    pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()                 # (N, 3, 32, 32)
    return Images(pixels, torch.tensor(images.targets), tuple(images.classes))


def fake(n, position, classes=10, channels=1, size=28):
    """`n` images for smoke tests: a blurred random pattern a class, with noise on top; learnt in minutes."""
    patterns = torch.rand(classes, channels, 7, 7, generator=generator(2021))
    patterns = torch.nn.functional.interpolate(patterns, size, mode="bilinear")
    g = generator(*position)
    labels = torch.randint(classes, (n,), generator=g)
    noisy = 0.6 * patterns[labels] + 0.4 * torch.rand(n, channels, size, size, generator=g)
    return Images((255 * noisy).byte(), labels, tuple(f"pattern {n}" for n in range(classes)))


def load(name, part):
    """The `Images` of a data set; `part` is train or test. ValueError: an unknown name; OSError: no files."""
    if name == "fashion":
        return fashion({"train": "train", "test": "t10k"}[part])
    if name in ("cifar10", "cifar100"):
        return cifar(name, part)
    if name == "fake":
        return fake(*{"train": (1200, (0,)), "test": (400, (1,))}[part])
    raise ValueError(f"{name!r} is unknown, choose from {', '.join(NAMES)}")


def split(labels, seed):
    """The training images' (weights, architecture) parts as indices: 5/6 and 1/6 of every class, drawn."""
    g, parts = generator(seed), ([], [])
    for c in labels.unique():
        index = (labels == c).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=g)]
        cut = len(index) * 5 // 6
        parts[0].append(index[:cut])
        parts[1].append(index[cut:])
    return tuple(torch.cat(part).sort().values for part in parts)


def batch_indices(index, batch_size, *position, start=0):
    """Endless training batches from number `start` on, as (which of `index` (batch_size,), generator) pairs.

    Batch n and its generator are a function of `position` and n alone. Every epoch has another order; the
    images that do not fill a batch at its end are left out of it.
    """
    epoch_length = len(index) // batch_size
    for epoch in range(start // epoch_length, 10 ** 9):
        shuffled = index[torch.randperm(len(index), generator=generator(*position, 0, epoch))]
        for n in range(start % epoch_length, epoch_length):
            yield shuffled[n * batch_size:(n + 1) * batch_size], generator(*position, 1, epoch, n)
        start = 0


class Loader:
    """Batches of `images` on a `device`, normalised by `stats`, as (x (B, C, H, W) float, y (B,) long)."""

    def __init__(self, images, stats, batch_size, device="cpu"):
        self.pixels, self.labels = images.pixels.to(device), images.labels.to(device)
        self.mean, self.std = (255 * s.to(device) for s in stats)
        self.batch_size, self.device = batch_size, device

    def batch(self, index, generator=None, shard=(0, 1)):
        """The images at `index`; with a generator augmented: a random crop of the padded image and a flip.

        shard: (rank, world_size), for this process's slice of the batch, as it is in the whole batch.
        """
        rank, world_size = shard
        index = index.tensor_split(world_size)[rank].to(self.device)
        x = self.pixels[index]
        if generator is not None:
            x = augment(x, generator, shard)
        return (x - self.mean) / self.std, self.labels[index]

    def ordered(self, index):
        """All images at `index`, once, in order, for evaluation."""
        for part in index.split(self.batch_size * 4):
            yield self.batch(part)

    def shuffled(self, index, *position, start=0, shard=(0, 1)):
        """Endless training batches from number `start` on, as in `batch_indices`; shard: as in `batch`."""
        for part, drawn in batch_indices(index, self.batch_size, *position, start=start):
            yield self.batch(part, drawn, shard)


def augment(x, generator, shard=(0, 1)):
    """x (B, C, H, W) uint8 -> the same shape: moved by up to `PAD` pixels each way, flipped half of the time.

    shard: (rank, world_size) if x is a slice of a batch. The draws are the whole batch's.
    """
    b, _, h, w = x.shape
    rank, world_size = shard
    mine = slice(rank * b, (rank + 1) * b)
    dy, dx = torch.randint(2 * PAD + 1, (2, b * world_size), generator=generator)[:, mine].to(x.device)
    flip = (torch.rand(b * world_size, 1, 1, 1, generator=generator)[mine] < 0.5).to(x.device)
    crops = torch.nn.functional.pad(x, (PAD,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # (B, C, dy, dx, H, W)
    moved = crops[torch.arange(b, device=x.device), :, dy, dx]
    return torch.where(flip, moved.flip(3), moved)
