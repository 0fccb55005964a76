"""Images of your own, or ImageNet: what a folder of class folders holds, checked first (Experiments).

    DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg      # ImageNet's layout
    DIR/CLASS/*.jpg                                    # a sixth of every class is held out as the test images

Which classes and test images are drawn depends on the sorted names and on the seed alone. decode.py reads
the files.
"""
from machinery import files, processes
from machinery.decode import CHUNK, Loader, decode, workers

import hashlib
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

# ImageNet's, by which nearly all networks are trained
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")


class Folder(NamedTuple):
    """A set of labelled image files; to its users as `data.Images`, but read as they are needed."""
    root: Path
    names: np.ndarray  # (N,) bytes, below root: workers share them, unlike strings
    labels: torch.Tensor                                  # (N,) long
    class_names: list
    held_out: list                                        # names of test images that lie in the same folders
    broken: dict                                          # {name: what is wrong} of what was left out
    digest: str                                           # stands for the root and all names, broken ones too
    resolution: int
    workers: int
    channels = 3

    @property
    def classes(self):
        return len(self.class_names)

    def statistics(self, index):
        """(mean, standard deviation) as `data.Images` has them: ImageNet's, whatever the images."""
        return tuple(torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))

    def loader(self, stats, batch_size, device="cpu"):
        """Their `Loader`, normalised by `stats`."""
        return Loader(self, stats, batch_size, device)


def draw(n, count, seed):
    """`count` of range(n), in order: where the least of n numbers from `random.Random(seed)` stand.

    Python promises the same random() for a seed everywhere and for ever, and nobody does so of a permutation.
    """
    generator = random.Random(seed)
    numbers = [generator.random() for _ in range(n)]
    return sorted(sorted(range(n), key=numbers.__getitem__)[:count])


def subfolders(folder):
    """The names of the folders in a folder, sorted; not of hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def image_files(folder, above=()):
    """(names of the image files in and below `folder`, sorted; a count of other files by their ending).

    above: (device, inode) of folders that a link must not lead back to. A folder is entered once.
    """
    found, others, seen, todo = [], Counter(), set(above), [""]
    while todo:
        inner = todo.pop()
        status = os.stat(os.path.join(folder, inner))
        if (status.st_dev, status.st_ino) in seen:
            continue                                      # a link in a circle, or a second one to here
        seen.add((status.st_dev, status.st_ino))
        below = []
        with os.scandir(os.path.join(folder, inner)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = os.path.join(inner, entry.name)
                if name.lower().endswith(ENDINGS):        # also a dead link: to be found broken
                    found.append(name)
                elif entry.is_dir():
                    below.append(name)
                else:
                    others[os.path.splitext(name)[1]] += 1
        todo += sorted(below, reverse=True)
    return sorted(found), others


def find(root, part, seed, count=None):
    """(class names, names of files below root, their labels, names of those held out), of the part train or
    test.

    count: classes to draw. ValueError for a folder that is not laid out as above.
    """
    if not root.is_dir():
        raise ValueError("is no folder")
    names, base, val = subfolders(root), "", None
    if {"train", "val"} <= set(names):
        names, base, val = subfolders(root / "train"), "train", "val"
    elif names and set(names) <= {"train", "val", "valid", "validation", "test"}:
        raise ValueError(f"has {' and '.join(n + '/' for n in names)}, but it takes train/ and val/")
    if len(names) < 2 or len(names) < (count or 0):
        raise ValueError(f"{base and base + '/'} has {len(names)} folders of images, one a class, "
                         f"but {count or 2} are needed".strip())
    for name in subfolders(root / val) if val else ():
        if name not in set(names):
            raise ValueError(f"{val}/{name} is no class of train/")
    if count:
        names = [names[i] for i in draw(len(names), count, seed)]
    above = {(s.st_dev, s.st_ino) for s in map(os.stat, [root.resolve(), *root.resolve().parents])}
    found, labels, held_out, others = [], [], [], Counter()
    for label, name in enumerate(names):
        inner = os.path.join(val if val and part == "test" else base, name)
        if not (root / inner).is_dir():
            continue                                      # a class that val/ does not test
        inside, more = image_files(root / inner, above)
        inside = [os.path.join(inner, file) for file in inside]
        others += more
        if not val:
            drawn_by = f"{seed} {name}".encode(errors="surrogateescape")
            test = set(draw(len(inside), max(1, len(inside) // 6), drawn_by))
            held = [file for i, file in enumerate(inside) if i in test]
            inside = held if part == "test" else [file for i, file in enumerate(inside) if i not in test]
            held_out += held
        if part == "train" and len(inside) < 2:
            raise ValueError(f"{inner} has too few images ({len(inside)} to train on; there must be two)")
        found += inside
        labels += [label] * len(inside)
    if not found:
        raise ValueError("has no images to test on")
    if others:
        print(f"{root}: not taken for images: "
              + ", ".join(f"{n} {end or 'without ending'}" for end, n in others.items()))
    return names, found, labels, held_out


class Checker(Dataset):
    """Names of files in, [(name, what is wrong)] out."""

    def __init__(self, root, names):
        self.root, self.names = root, names

    def __getitem__(self, chunk):
        found = []
        for name in self.names[chunk]:
            try:
                decode(os.path.join(self.root, name), small=True)
            except OSError as error:
                found.append((name, str(error)))
        return found


def check(root, names, count, skip_broken):
    """{name: what is wrong} of those files that cannot be decoded; ValueError for the first, unless to be
    skipped.

    Every process checks its share; all know what each has found.
    """
    (r, n), broken = processes.shard(), []
    chunks = [slice(k + r * CHUNK, k + (r + 1) * CHUNK) for k in range(0, len(names), n * CHUNK)]
    for found in tqdm(workers(Checker(root, names), chunks, min(count, len(chunks))), "checking images",
                      disable=r > 0 or None, unit_scale=n * CHUNK, unit="image", leave=False):
        broken += processes.all_gather(found)
        if broken and not skip_broken:
            raise ValueError(f"{broken[0][1]}; --skip-broken leaves out what is broken")
    return dict(broken)


def cores():
    """Cores for the workers of this process: up to 8 of its share of the machine's."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, here // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def load(root, part, seed, resolution, classes=None, count=None, skip_broken=False, run=None, checked=True):
    """The `Folder` in `root`; part: train or test; classes: draw so many; count: workers.

    run: the folder of a run that may have checked the files before. checked: whether to check them at all.
    ValueError, in one line, for what does not make a data set, or is broken.
    """
    count = cores() if count is None else count
    class_names, names, labels, held_out = find(root, part, seed, classes)
    listed = "\0".join([str(root.resolve()), *names]).encode(errors="surrogateescape")
    digest = hashlib.sha256(listed).hexdigest()
    if len(set(processes.all_gather([digest]))) > 1:
        raise ValueError("is not the same for all processes")
    known = processes.on_rank0(read, run / "checked.json") if run else {}
    broken = known.get(digest)
    if broken is None:
        broken = check(root, names, count, skip_broken) if checked else {}
    elif broken and not skip_broken:
        raise ValueError(f"{next(iter(broken.values()))}; --skip-broken leaves out what is broken")
    for what in broken.values():
        print(f"left out: {what}".encode(errors="backslashreplace").decode())
    kept = [i for i, name in enumerate(names) if name not in broken]
    labels = torch.tensor(labels)[kept]
    few = (torch.bincount(labels, minlength=len(class_names)) < 2).nonzero()
    if part == "train" and few.numel():
        raise ValueError(f"too few images of {class_names[few[0]]} are whole")
    print(f"{root}: {len(kept):,} images of {len(class_names)} classes to {part} on", flush=True)
    whole = np.array([os.fsencode(names[i]) for i in kept])
    return Folder(root, whole, labels, class_names, held_out, broken, digest,
                  resolution, count)


def record(images, out, parts=None):
    """Note in a run's folder which files were checked, so that it is not done again. Does nothing but for a
    `Folder`.

    parts: of the search, to be noted with the classes. If others stand there, ends in p.error.
    """
    if not isinstance(images, Folder):
        return
    notes = {"checked.json": {**processes.on_rank0(read, out / "checked.json"), images.digest: images.broken}}
    if parts:
        alphas = [os.fsdecode(name) for name in images.names[parts[1]]]
        notes["split.json"] = {"files": images.digest, "test": images.held_out, "architecture": alphas}
        if processes.on_rank0(read, out / "split.json") not in ({}, notes["split.json"]):
            changed(images, out)
        classes = "".join(name + "\n" for name in images.class_names)
        processes.write(out / "classes.txt", classes.encode(errors="surrogateescape"))
    for name, content in notes.items():
        processes.write(out / name, json.dumps(content, indent=1) + "\n")


def check_unchanged(images, run):
    """End in p.error if a `Folder` has other files than when the search in the folder `run` began: others are
    held out then, so that images which it has seen would be tested on.
    """
    if isinstance(images, Folder):
        noted = processes.on_rank0(read, run / "split.json")
        if noted.get("files", images.digest) != images.digest:
            changed(images, run)


def changed(images, run):
    raise files.Refused(f"--data {images.root} is not what it was when the run began ({run / 'split.json'})")


def read(file):
    """The dict in a JSON file; {} where there is none. files.Refused if it holds no such."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise files.Refused(f"{file} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise files.Refused(f"{file} is not what a run writes: {type(found).__name__}, not an object")
    return found
