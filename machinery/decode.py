"""Image files in, batches out: decoded, cut and coloured by worker processes (Experiments).

How an image is augmented is a function of its place in the run, as everything else that is drawn: it does
not depend on the workers, on the processes, or on where a run was taken up again.
"""
from machinery import files
from machinery.workers import work

import errno
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import v2

from network import converted, cropped, open_image

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")
CHUNK = 32                                                # images that a worker hands over at once


class Folder(NamedTuple):
    """A set of labelled image files; to its users as `data.Images`, but read as they are needed."""
    root: Path
    names: np.ndarray  # (N,) bytes, below root: workers share them, unlike strings
    labels: torch.Tensor                                  # (N,) long
    class_names: list
    test: list                                            # names of the test images
    broken: dict                                          # {name: what is wrong} of what was left out
    digest: str                                           # stands for all names and sizes, wherever they lie
    resolution: int
    workers: int
    channels = 3
    crop = 224 / 256                                      # of the shorter side, as is usual for ImageNet

    @property
    def classes(self):
        return len(self.class_names)

    def statistics(self, index):
        """(mean, standard deviation) as `data.Images` has them: ImageNet's, whatever the images."""
        return torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1).unbind()

    def image(self, i, seed):
        """Image i as (3, R, R) uint8: augmented by draws of `seed`, or for one below 0 as it is evaluated.

        That is the middle 224/256 of its shorter side, as in Resize(256) and CenterCrop(224), but in one
        step: a picture of one pixel by a thousand would be resized to an enormous one.
        """
        path = os.path.join(self.root, os.fsdecode(self.names[i]))
        try:
            image = decode(path)
        except OSError as error:
            raise files.Refused(f"{path}: {error}: this image was whole, or not checked, before") from None
        if seed < 0:
            return cropped(image, self.resolution, self.crop)
        with torch.random.fork_rng(devices=[]):           # transforms draw from the global generator
            torch.default_generator.manual_seed(seed)
            return v2.Compose([v2.RandomResizedCrop(self.resolution), v2.RandomHorizontalFlip(),
                               v2.ColorJitter(0.4, 0.4, 0.4), v2.PILToTensor()])(image)

    def read_chunk(self, chunk):
        """What a worker does: one of `chunks` -> (x (B, 3, R, R) uint8, y (B,), whether it is a last one)."""
        pairs, last = chunk
        x = torch.stack([self.image(i, seed) for i, seed in pairs])
        return x.numpy(), self.labels[[i for i, _ in pairs]].numpy(), last

    def read(self, batches, shard, device):
        """Yield batches as `data.Images.read` does."""
        parts = []
        for x, y, last in work(self.read_chunk, chunks(batches, shard), self.workers):
            parts.append((x, y))
            if last:
                yield tuple(torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*parts))
                parts = []


def chunks(batches, shard):
    """Yield ([(which image, its seed or -1), ..], whether it is the last of its batch), for workers. Batches
    and shard: as in `data.Images.read`; where there is a generator, each image has a seed.
    """
    rank, world_size = shard
    for index, generator in batches:
        seeds = torch.full_like(index, -1)
        if generator is not None:
            seeds = torch.randint(2 ** 62, index.shape, generator=generator)
        parts = torch.stack([index, seeds], 1).tensor_split(world_size)[rank].split(CHUNK)
        for n, part in enumerate(parts, 1):
            yield part.tolist(), n == len(parts)


def decode(path, small=False):
    """The image in a file: PIL, RGB, upright. OSError, which says why, if it is not whole; Refused if this
    machine lacks memory or file descriptors.

    Transparent is white. 16 bits become 8. small: a JPEG at an eighth of its size: faster, and as strict.
    """
    try:
        # Warnings of odd EXIF and of large images: nothing is to be done about them
        with warnings.catch_warnings(action="ignore"), open_image(path) as image:
            if small:
                image.draft("RGB", (1, 1))
            image.load()
            return converted(image, "RGB")
    except UnidentifiedImageError:
        raise OSError("is no image") from None
    except (*files.BROKEN, SyntaxError, Image.DecompressionBombError) as error:     # what Pillow raises
        why = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        lacking = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
        if lacking or isinstance(error, MemoryError):
            raise files.Refused(f"{path}: {why}: take fewer --workers, or 0") from None
        raise OSError(why) from None
