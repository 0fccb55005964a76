"""Image files in, batches out: decoded, cut and coloured by worker processes (Experiments).

How an image is augmented is a function of its place in the run, as everything else that is drawn: it does
not depend on the workers, on the processes, or on where a run was taken up again.
"""
from machinery import files
from machinery.workers import work

import errno
import math
import os
import stat
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import v2

import data

# Others are not tried, whatever a file says that it is: a PostScript file would be run, by Ghostscript.
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")
KNOWN = Image.registered_extensions()                     # {ending: format}, of this Pillow
FORMATS = sorted({KNOWN[ending] for ending in ENDINGS if ending in KNOWN})
CHUNK = 32                                                # images that a worker hands over at once
LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
BROKEN = (*files.BROKEN, SyntaxError, Image.DecompressionBombError)  # what Pillow's readers raise, among them


def decode(path, small=False):
    """The image in a file: PIL, RGB, upright. OSError, which names the file, if it is not whole; Refused if
    this machine lacks memory or file descriptors.

    Transparent is white. 16 bits become 8. small: a JPEG at an eighth of its size: faster, and as strict.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")               # of odd EXIF, large images: nothing to do about it
            if not stat.S_ISREG(os.stat(path).st_mode):   # a FIFO would be waited for
                raise ValueError("is no regular file")
            with Image.open(path, formats=FORMATS) as image:
                if small:
                    image.draft("RGB", (1, 1))
                image.load()
                return rgb(ImageOps.exif_transpose(image))
    except BROKEN as error:
        why = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in LACKING:
            raise files.Refused(f"{path}: {why}: take fewer --workers, or 0") from None
        why = "is no image" if isinstance(error, UnidentifiedImageError) else why
        raise OSError(f"{path}: {why}") from None


def rgb(image):
    """A PIL image of any mode as RGB. ValueError for numbers whose white is unknown."""
    if image.mode.startswith("I"):                        # 16 bits; Pillow's own conversion cuts at 255
        values = np.asarray(image).astype(np.int64)
        if not 0 <= values.min() <= values.max() < 2 ** 16:
            raise ValueError("more than 16 bits a pixel")
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))       # 65535 = 257 * 255
    if image.mode == "F":
        raise ValueError("its pixels are floats, of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Decoder:
    """What the workers do: numbers of images in, arrays out."""

    def __init__(self, images):
        self.root, self.names, self.labels = images.root, images.names, images.labels
        self.resolution, self.crop = images.resolution, images.crop
        self.augment = v2.Compose([v2.RandomResizedCrop(self.resolution), v2.RandomHorizontalFlip(),
                                   v2.ColorJitter(0.4, 0.4, 0.4), v2.PILToTensor()])

    def image(self, i, seed=None):
        """Image i as (3, R, R) uint8: augmented by draws of `seed`, or without one as it is evaluated.

        That is the middle 224/256 of its shorter side, as in Resize(256) and CenterCrop(224), but in one
        step: a picture of one pixel by a thousand would be resized to an enormous one.
        """
        image = decode(os.path.join(self.root, os.fsdecode(self.names[i])))
        if seed is None:
            side = min(image.size) * self.crop
            left, top = ((length - side) / 2 for length in image.size)
            size = (self.resolution, self.resolution)
            return v2.functional.pil_to_tensor(image.resize(size, Image.Resampling.BILINEAR,
                                                            (left, top, left + side, top + side)))
        with torch.random.fork_rng(devices=[]):           # transforms draw from the global generator
            torch.default_generator.manual_seed(seed)
            return self.augment(image)

    def __call__(self, chunk):
        """([number, ..], [seed, ..] or None) -> (x (B, 3, R, R) uint8, labels (B,)), or what is wrong."""
        index, seeds = chunk
        try:
            x = [self.image(i, seed) for i, seed in zip(index, seeds or [None] * len(index))]
        except OSError as error:
            return str(error)
        return torch.stack(x).numpy(), self.labels[index].numpy()


class Loader:
    """As `data.Loader`, of a `Folder`: batches as (x (B, 3, R, R) float, y (B,) long), on a `device`."""

    def __init__(self, images, stats, batch_size, device="cpu"):
        self.labels, self.decode, self.workers = images.labels, Decoder(images), images.workers
        self.batch_size, self.device = batch_size, torch.device(device)
        self.mean, self.std = (255 * s.to(device) for s in stats)

    def _batch(self, chunks):
        """Decoded chunks [(x uint8, y), ..] as a batch on the device. SystemExit if one could not be read."""
        if broken := [chunk for chunk in chunks if isinstance(chunk, str)]:
            raise SystemExit(f"{broken[0]}: this image was whole, or not checked, before")
        x, y = (torch.from_numpy(np.concatenate(parts)).to(self.device) for parts in zip(*chunks))
        return (x - self.mean) / self.std, y

    def batch(self, index, generator=None, shard=(0, 1)):
        """The images at `index`, decoded here and now; generator and shard: as in `data.Loader`."""
        return self._batch([self.decode(chunk) for chunk in chunks_of(index, generator, shard)])

    def ordered(self, index):
        """All images at `index`, once, in order, for evaluation."""
        chunks = chunks_of(index)
        for chunk in work(self.decode, chunks, min(self.workers, len(chunks))):
            yield self._batch([chunk])

    def shuffled(self, index, *position, start=0, shard=(0, 1)):
        """Endless training batches from number `start` on, as in `data.Loader`."""
        batches = data.batch_indices(index, self.batch_size, *position, start=start)
        chunks = (chunk for part, drawn in batches for chunk in chunks_of(part, drawn, shard))
        each = len(chunks_of(index[:self.batch_size], None, shard))         # chunks a batch
        ahead = max(2, math.ceil(2 * each / max(1, self.workers)))          # two batches are under way
        decoded = work(self.decode, chunks, self.workers, ahead)
        while True:
            yield self._batch([next(decoded) for _ in range(each)])


def chunks_of(index, generator=None, shard=(0, 1)):
    """This process's slice of a batch as chunks for a `Decoder`; with a generator each image has a seed.

    shard: (rank, world_size).
    """
    rank, world_size = shard
    mine = index.tensor_split(world_size)[rank].split(CHUNK)
    seeds = [None] * len(mine)
    if generator is not None:
        drawn = torch.randint(2 ** 62, index.shape, generator=generator)
        seeds = [part.tolist() for part in drawn.tensor_split(world_size)[rank].split(CHUNK)]
    return [(part.tolist(), some) for part, some in zip(mine, seeds) if len(part)]      # none of no images
