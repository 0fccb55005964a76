"""Images in, batches out: Fashion-MNIST as one tensor, and the 5/6-1/6 split (Experiments).

Under torchrun every process takes its share of every batch; what they tell each other is at the end.
"""
import contextlib
import datetime
import gzip
import io
import math
import os
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torchvision.datasets import CIFAR10, CIFAR100

from space import write

FASHION = Path(__file__).parent / "datasets" / "FashionMNIST" / "raw"
CACHE = Path.home() / ".cache" / "adasearch"              # where torchvision keeps what it downloads
NAMES = ("fashion", "cifar10", "cifar100", "fake")
PAD = 2                                                   # pixels that a random crop may move, as usual at 28-32 pixels


class Images(NamedTuple):
    """A set of labelled images in memory."""
    pixels: torch.Tensor                                  # (N, C, H, W) uint8
    labels: torch.Tensor                                  # (N,) long
    classes: int


def generator(*position):
    """A `torch.Generator` that is a function of whole numbers, such as (seed, stage, step).

    Every draw of a run comes from one of these, so that a run can go on from any step without saved
    generator states.
    """
    seed = np.random.SeedSequence(position).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed >> np.uint64(1)))


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
        raise ValueError(f"{path}: {len(raw)} bytes are too few or too many for {'x'.join(map(str, shape))} values")
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(shape).copy())


def fashion(part, folder=FASHION):
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017): `part` is train (60,000) or t10k (10,000), 28x28, ten classes."""
    pixels = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)[:, None]
    labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 1).long()
    return Images(pixels, labels, 10)


def cifar(name, part, folder=CACHE):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009): 50,000 and 10,000 images, 32x32 in colour; downloaded once.

    OSError if it is neither in `folder` nor can be downloaded.
    """
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        found = kind(folder, train=part == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot be downloaded ({error}): put {kind.filename} into {folder}") from None
    return Images(torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(found.targets),
                  len(found.classes))


def fake(n, position, classes=10, channels=1, size=28):
    """`n` images for smoke tests: a blurred random pattern a class, with noise on top. Learnt within minutes."""
    patterns = torch.rand(classes, channels, 7, 7, generator=generator(2021))
    patterns = torch.nn.functional.interpolate(patterns, size, mode="bilinear")
    g = generator(*position)
    labels = torch.randint(classes, (n,), generator=g)
    noisy = 0.6 * patterns[labels] + 0.4 * torch.rand(n, channels, size, size, generator=g)
    return Images((255 * noisy).byte(), labels, classes)


def load(name, part):
    """The `Images` of data set `name`; `part` is train or test. ValueError for an unknown name, OSError for no files."""
    if name == "fashion":
        return fashion({"train": "train", "test": "t10k"}[part])
    if name in ("cifar10", "cifar100"):
        return cifar(name, part)
    if name == "fake":
        return fake(*{"train": (1200, (0,)), "test": (400, (1,))}[part])
    raise ValueError(f"{name!r} is unknown, choose from {', '.join(NAMES)}")


def split(labels, seed):
    """The training images' (weights, architecture) parts as indices: of every class 5/6 and 1/6, drawn by `seed`."""
    g, parts = generator(seed), ([], [])
    for c in labels.unique():
        index = (labels == c).nonzero().flatten()
        index = index[torch.randperm(len(index), generator=g)]
        cut = len(index) * 5 // 6
        parts[0].append(index[:cut])
        parts[1].append(index[cut:])
    return tuple(torch.cat(part).sort().values for part in parts)


def statistics(images, index):
    """(mean, standard deviation) of the pixels in [0, 1] of the images at `index`, a channel: (1, C, 1, 1) each."""
    pixels = images.pixels[index].double() / 255
    return (pixels.mean((0, 2, 3), keepdim=True).float(), pixels.std((0, 2, 3), keepdim=True).float())


def load_data(p, name, part):
    """`load`; what is missing or broken ends in p.error."""
    try:
        return load(name, part)
    except (OSError, EOFError, ValueError) as error:
        p.error(f"--data {name}: {error}")


class Loader:
    """Batches of `images` on a `device`, normalised by `stats`, as (x (B, C, H, W) float, y (B,) long)."""

    def __init__(self, images, stats, batch_size, device="cpu"):
        self.pixels, self.labels = images.pixels.to(device), images.labels.to(device)
        self.mean, self.std = (255 * s.to(device) for s in stats)
        self.batch_size, self.device = batch_size, device

    def batch(self, index, generator=None, share=(0, 1)):
        """The images at `index`; with a generator augmented: a random crop of the padded image and a flip.

        share: (r, of n), for the r-th of n equal slices of this batch, as it is in the whole.
        """
        index = index.tensor_split(share[1])[share[0]].to(self.device)
        x = self.pixels[index]
        if generator is not None:
            x = augment(x, generator, share)
        return (x - self.mean) / self.std, self.labels[index]

    def ordered(self, index):
        """All images at `index`, once, in order, for evaluation."""
        for part in index.split(self.batch_size * 4):
            yield self.batch(part)

    def shuffled(self, index, *position, start=0, share=(0, 1)):
        """Endless training batches from number `start` on. Batch n is a function of `position` and n alone.
        share: as in `batch`.

        Every epoch has another order; the images that do not fill a batch at its end are left out of it.
        """
        epoch_length = len(index) // self.batch_size
        for epoch in range(start // epoch_length, 10 ** 9):
            order = index[torch.randperm(len(index), generator=generator(*position, 0, epoch))]
            for n in range(start % epoch_length, epoch_length):
                part = order[n * self.batch_size:(n + 1) * self.batch_size]
                yield self.batch(part, generator(*position, 1, epoch, n), share)
            start = 0


def augment(x, generator, share=(0, 1)):
    """x (B, C, H, W) uint8 -> the same shape: moved by up to `PAD` pixels each way, flipped half of the time.

    share: (r, of n) if x is the r-th of n equal slices of a batch. The draws are the whole batch's.
    """
    b, _, h, w = x.shape
    padded = torch.nn.functional.pad(x, (PAD,) * 4)
    mine = slice(share[0] * b, (share[0] + 1) * b)
    dy, dx = torch.randint(2 * PAD + 1, (2, b * share[1], 1), generator=generator)[:, mine]
    flip = torch.rand(b * share[1], 1, generator=generator)[mine] < 0.5
    rows = dy + torch.arange(h)
    columns = dx + torch.where(flip, torch.arange(w - 1, -1, -1), torch.arange(w))
    at = torch.arange(b).view(-1, 1, 1).to(x.device), rows[:, :, None].to(x.device), columns[:, None, :].to(x.device)
    return padded.permute(0, 2, 3, 1)[at].permute(0, 3, 1, 2)             # (B, H, W, C) in memory: channels last


@contextlib.contextmanager
def processes(seconds=30):
    """Join the processes that torchrun started, if it did. All compute; the first alone speaks and writes.

    seconds: how long one waits for another before it gives up. A death is mostly noticed at once.
    """
    if dist.is_torchelastic_launched():
        # torchrun keeps its store when it starts its processes anew, and with it the addresses of dead ones.
        limit = datetime.timedelta(seconds=seconds)
        store, r, n = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"launch {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                store=store, rank=r, world_size=n, timeout=limit)
    try:
        with contextlib.redirect_stdout(None if share()[0] else sys.stdout):
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def share():
    """(r, n): this is the r-th of n processes, from 0 on."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def together():
    """Around what all processes do at once: where another has died, this one ends as well, in one line."""
    try:
        yield
    except RuntimeError as error:
        (r, n), why = share(), str(error).partition(". ")[0]
        raise SystemExit(f"process {r} of {n}: another one has died or does not answer, so this one ends "
                         f"too; --resume goes on from a checkpoint ({why})") from None


def choose_device(p, name):
    """The torch device of that name; `auto` is an accelerator if there is one. A wrong name ends in p.error.

    Of many processes each takes the accelerator of its number on its machine, unless the name has a number.
    """
    try:
        if name == "auto":
            name = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
        if dist.is_initialized() and name != "cpu" and ":" not in name:
            name = f"{name}:{os.environ['LOCAL_RANK']}"
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        p.error(f"--device {name}: {str(error).splitlines()[0]}")


def save(path, content):
    """Write a text, or a dict as a checkpoint that loads with weights_only=True. The first process does."""
    if share()[0]:
        return
    if isinstance(content, dict):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    write(path, content)


def average(parameters, *values):
    """Replace each gradient by its mean over all processes, and return the means of `values`, tensors.

    They travel in one flat bucket. What was not sampled has no gradient, and does not travel.
    """
    n = share()[1]
    if n == 1:
        return values
    sampled = [p for p in parameters if p.grad is not None]
    tensors = [p.grad for p in sampled] + [v.detach() for v in values]
    bucket = torch.cat([t.flatten() for t in tensors])
    with together():
        dist.all_reduce(bucket)
    parts = (bucket / n).split([t.numel() for t in tensors])
    for p, part in zip(sampled, parts):
        p.grad = part.view_as(p)
    return [part.view_as(v) for part, v in zip(parts[len(sampled):], values)]


def spread(module):
    """Give all processes the first one's batch-norm statistics, each has its share's, and (equal) weights."""
    if share()[1] > 1:
        with together():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


def heard(caught):
    """The number of a signal that any process has in its list `caught`, for all at once; 0 if none has."""
    number = caught[0] if caught else 0
    if share()[1] > 1:
        flag = torch.tensor(number)                       # on the CPU, so that no device is waited for
        with together():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        number = int(flag)
    return number


def first(make, *given):
    """For all processes what `make(*given)` returns in the first, or the SystemExit that it ends in there."""
    r, n = share()
    if n == 1:
        return make(*given)
    found = [None]
    if r == 0:
        try:
            found = [make(*given)]
        except SystemExit as stop:
            found = [stop]
    with together():
        dist.broadcast_object_list(found)
    if isinstance(found[0], SystemExit):
        raise found[0]
    return found[0]


def note(key, text):
    """Let torchrun remember `text`, to `recall` after it has started its processes anew (--max-restarts)."""
    if dist.is_torchelastic_launched() and share()[0] == 0:
        _store().set(f"adasearch/{key}", text)


def recall(key):
    """What this torchrun was told to remember, or None."""
    if dist.is_torchelastic_launched() and _store().check([f"adasearch/{key}"]):
        return _store().get(f"adasearch/{key}").decode()
    return None


def _store():
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
