"""Labelled images, their batches, and the 5/6-1/6 split (Experiments).

`Images` lie in memory, as Fashion-MNIST does. machinery/decode.py has the like for image files on a disk.
"""
import gzip
import hashlib
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST

FASHION = Path(__file__).parent / "datasets" / "FashionMNIST" / "raw"
CACHE = Path("~/.cache/adasearch")                        # where torchvision keeps what it downloads
NAMES = ("fashion", "cifar10", "cifar100", "fake")
PAD = 2                                                   # pixels a crop may move, as usual at 28-32 pixels
EVALUATED = 128                                           # images at once in evaluation


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

    def read(self, batches, shard, device):
        """Yield (x (B, C, H, W) uint8, y (B,)) of each (index, generator or None) of `batches`.

        A generator augments. shard: (rank, world_size) selects a slice, augmented as in the whole batch.
        """
        rank, world_size = shard
        pixels, labels = self.pixels.to(device), self.labels.to(device)
        for index, generator in batches:
            index = index.tensor_split(world_size)[rank].to(device)
            x = pixels[index]
            yield x if generator is None else augment(x, generator, shard), labels[index]


def generator(*position):
    """A `torch.Generator` that is a function of whole numbers, such as (seed, stage, step).

    Every draw of a run comes from such ones, so that it can go on from any step without their states.
    """
    seed = hashlib.blake2b(str(position).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(seed))


def read_idx(path, dimensions):
    """The uint8 array in a gzip file of idx format: 0 0 8 dimensions, sizes, values. ValueError if broken."""
    try:
        raw = gzip.decompress(path.read_bytes())
        kind, *shape = np.frombuffer(raw, ">u4", 1 + dimensions).tolist()
        values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
        if kind != 0x800 + dimensions:
            raise ValueError(f"it begins with {kind:#010x}")
    except (EOFError, gzip.BadGzipFile, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: a broken gzip file, or not an idx file of {dimensions} dimensions "
                         f"({error})") from None
    return torch.from_numpy(values.copy())


def fashion(part, folder=FASHION):
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017), 28x28, ten classes; part: train (60,000), t10k (10,000)."""
    pixels = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)[:, None]
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1).long()
    if len(labels) != len(pixels) or labels.max() > 9:
        raise ValueError(f"{folder}: {len(labels)} labels from {labels.min()} to {labels.max()} for "
                         f"{len(pixels)} images: there must be one each, from 0 to 9")
    return Images(pixels, labels, tuple(FashionMNIST.classes))


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
    """The `Images` of a data set in `NAMES`; part: train or test. OSError or ValueError if files are missing
    or broken.
    """
    if name == "fashion":
        return fashion("train" if part == "train" else "t10k")
    if name == "fake":
        return fake(1200, (0,)) if part == "train" else fake(400, (1,))
    return cifar(name, part)


def split(labels, seed):
    """The training images' (weights, architecture) parts as indices: 5/6 and 1/6 of every class, drawn."""
    g, drawn = generator(seed), []
    for c in labels.unique():
        index = (labels == c).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=g)]
        drawn.append(index.tensor_split([len(index) * 5 // 6]))
    return tuple(torch.cat(part).sort().values for part in zip(*drawn))


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
        self.images, self.batch_size, self.device = images, batch_size, torch.device(device)
        self.mean, self.std = (255 * s.to(device) for s in stats)

    def read(self, batches, shard=(0, 1)):
        """Yield each (index, generator or None) of `batches` as a batch; shard: as in `Images.read`."""
        for x, y in self.images.read(batches, shard, self.device):
            yield (x - self.mean) / self.std, y

    def ordered(self, index):
        """All images at `index`, once, in order, for evaluation."""
        return self.read([(part, None) for part in index.split(EVALUATED) if len(part)])

    def shuffled(self, index, *position, start=0, shard=(0, 1)):
        """Endless training batches from number `start` on, as in `batch_indices`."""
        return self.read(batch_indices(index, self.batch_size, *position, start=start), shard)


def draw_moves(generator, count):
    """How `move` augments `count` images: rows and columns to move by (count,) each, and whether to flip."""
    dy, dx = torch.randint(2 * PAD + 1, (2, count), generator=generator)
    return dy, dx, torch.rand(count, 1, 1, 1, generator=generator) < 0.5


def move(x, dy, dx, flip):
    """x (B, C, H, W) uint8, moved by up to `PAD` pixels, half of them flipped."""
    dy, dx, flip = (part.to(x.device) for part in (dy, dx, flip))
    h, w = x.shape[2:]
    crops = torch.nn.functional.pad(x, (PAD,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # (B, C, dy, dx, H, W)
    moved = crops[torch.arange(len(x), device=x.device), :, dy, dx]
    return torch.where(flip, moved.flip(3), moved)


def augment(x, generator, shard=(0, 1)):
    """x (B, C, H, W) uint8, a shard of a batch, moved and flipped as it is in the whole one."""
    (rank, world_size), b = shard, len(x)
    return move(x, *(part[rank * b:(rank + 1) * b] for part in draw_moves(generator, b * world_size)))
