"""Images of your own, or ImageNet: what a folder of class folders holds, checked before a run (Experiments).

    DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg      # ImageNet's layout
    DIR/CLASS/*.jpg                                    # a sixth of every class is held out as the test images

Which classes and test images are drawn depends on the sorted names and on the seed alone. decode.py reads
the files.
"""
from machinery import files, processes
from machinery.decode import CHUNK, ENDINGS, Loader, decode
from machinery.workers import cores, work

import functools
import hashlib
import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

# ImageNet's, by which nearly all networks are trained
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Folder(NamedTuple):
    """A set of labelled image files; to its users as `data.Images`, but read as they are needed."""
    root: Path
    names: np.ndarray  # (N,) bytes, below root: workers share them, unlike strings
    labels: torch.Tensor                                  # (N,) long
    class_names: list
    held_out: list                                        # names of test images that lie in the same folders
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
    names, others, seen, todo = [], Counter(), set(above), [""]
    while todo:
        inner = todo.pop()
        status = os.stat(os.path.join(folder, inner))
        if (status.st_dev, status.st_ino) in seen:
            continue                                      # a link in a circle, or a second one to here
        seen.add((status.st_dev, status.st_ino))
        below = []
        with os.scandir(os.path.join(folder, inner)) as entries:
            for entry in entries:
                name = os.path.join(inner, entry.name)
                if entry.name.startswith("."):
                    continue
                if name.lower().endswith(ENDINGS):        # also a dead link: to be found broken
                    names.append(name)
                elif entry.is_dir():
                    below.append(name)
                else:
                    others[os.path.splitext(name)[1]] += 1
        todo += sorted(below, reverse=True)
    return sorted(names), others


def layout(root):
    """(names of the class folders, the folder of those to train on, of those to test on), the folders below
    `root`; the last is None where test images are to be held out. Refused if it is not laid out as above.
    """
    if not root.is_dir():
        raise files.Refused("is no folder")
    names = subfolders(root)
    if not {"train", "val"} <= set(names):
        if names and set(names) <= {"train", "val", "valid", "validation", "test"}:
            raise files.Refused(f"has {' and '.join(n + '/' for n in names)}, but it takes train/ and val/")
        return names, "", None
    names = subfolders(root / "train")
    for name in subfolders(root / "val"):
        if name not in set(names):
            raise files.Refused(f"val/{name} is no class of train/")
    return names, "train", "val"


def list_images(root, part, seed, count=None):
    """(class names, names of files below root, their labels, names of those held out, other files by their
    ending) of the part train or test.

    count: classes to draw. Refused if there are too few classes or images.
    """
    classes, base, val = layout(root)
    if len(classes) < max(2, count or 0):
        raise files.Refused(f"{base and base + '/ '}has {len(classes)} folders of images, one a class, but "
                            f"{count or 2} are needed")
    if count:
        classes = [classes[i] for i in draw(len(classes), count, seed)]
    above = {(s.st_dev, s.st_ino) for s in map(os.stat, [root.resolve(), *root.resolve().parents])}
    names, labels, held_out, others, nested = [], [], [], Counter(), {}
    for label, name in enumerate(classes):
        inner = os.path.join(val if val and part == "test" else base, name)
        if not (root / inner).is_dir():
            continue                                      # a class that val/ does not test
        of_class, no_images = image_files(root / inner, above)
        others += no_images
        if all(os.sep in file for file in of_class):
            nested[inner] = {file.partition(os.sep)[0] for file in of_class}
        of_class = [os.path.join(inner, file) for file in of_class]
        if not val:
            drawn_by = f"{seed} {name}".encode(errors="surrogateescape")
            test = [of_class[i] for i in draw(len(of_class), max(1, len(of_class) // 6), drawn_by)]
            of_class = test if part == "test" else sorted(set(of_class) - set(test))
            held_out += test
        if part == "train" and len(of_class) < 2:
            raise files.Refused(f"{inner} has too few images ({len(of_class)} to train on; there must be "
                                "two)")
        names += of_class
        labels += [label] * len(of_class)
    for one, other in itertools.combinations(nested, 2):
        if len(nested[one] & nested[other]) > 1:
            raise files.Refused(f"{one}/ and {other}/ hold no image but folders of the same names: if they "
                                "are two parts, name them train/ and val/")
    if not names:
        raise files.Refused(f"{val}/ has no images to test on: they belong into {val}/CLASS/")
    if val and part == "train":
        list_images(root, "test", seed, count)            # what is wrong with it shows before the search
    return classes, names, labels, held_out, others


def refuse_inside(out, root):
    """Refused if the folder of a run, `out`, lies in the folder of its images, where it would be a class."""
    if root.resolve() in (out.resolve(), *out.resolve().parents):
        raise files.Refused(f"the folder of the run, {out}, lies in it: take another --out")


def size(path):
    """Of a file in bytes; -1 if it is a dead link."""
    return os.stat(path).st_size if os.path.exists(path) else -1


def broken_of(root, names):
    """[(name, what is wrong)] of those files that cannot be decoded."""
    broken = []
    for name in names:
        try:
            decode(os.path.join(root, name), small=True)
        except OSError as error:
            broken.append((name, str(error).partition(f"{name}: ")[2]))
    return broken


def check(root, names, count, skip_broken):
    """{name: what is wrong} of the files that cannot be decoded; of the first few, unless they are skipped.

    Every process checks its shard of the files, and all learn what each has found.
    """
    rank, world_size, broken = processes.rank(), processes.world_size(), []
    chunks = [names[k + rank * CHUNK:k + (rank + 1) * CHUNK]
              for k in range(0, len(names), world_size * CHUNK)]
    for found in tqdm(work(functools.partial(broken_of, root), chunks, min(count, len(chunks))),
                      "checking images", len(chunks), disable=rank > 0 or None, leave=False,
                      unit_scale=world_size * CHUNK, unit="image"):
        broken += processes.all_gather(found)
        if broken and not skip_broken:
            break
    return dict(broken)


def load(root, part, seed, resolution, classes=None, count=None, skip_broken=False, run=None, checked=True):
    """The `Folder` in `root`; part: train or test; classes: draw so many; count: workers.

    run: the folder of a run that may have checked the files before. checked: whether to check them at all.
    Refused, in one line, for what does not make a data set, or is broken.
    """
    count = cores() if count is None else count
    if run:
        refuse_inside(run, root)
    class_names, names, labels, held_out, others = list_images(root, part, seed, classes)
    if others:
        print(f"{root}: not taken for images: "
              + ", ".join(f"{n} {end or 'without ending'}" for end, n in others.items()))
    listed = "\0".join(f"{name}\0{size(root / name)}" for name in names)
    digest = hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()
    if len(set(processes.all_gather([digest]))) > 1:
        raise files.Refused("is not the same for all processes")
    broken = processes.on_rank0(notes, run / "checked.json").get(digest) if run else None
    if broken is None:
        broken = check(root, names, count, skip_broken) if checked else {}
    for name, what in broken.items():
        if not skip_broken:
            raise files.Refused(f"{name}: {what}; --skip-broken leaves out what is broken")
        print(f"left out: {root / name}: {what}".encode(errors="backslashreplace").decode())
    whole = [i for i, name in enumerate(names) if name not in broken]
    labels = torch.tensor(labels)[whole]
    few = (torch.bincount(labels, minlength=len(class_names)) < 2).nonzero()
    if part == "train" and few.numel():
        raise files.Refused(f"too few images of {class_names[few[0]]} are whole")
    print(f"{root}: {len(whole):,} images of {len(class_names)} classes to {part} on", flush=True)
    return Folder(root, np.array([os.fsencode(names[i]) for i in whole]), labels, class_names, held_out,
                  broken, digest, resolution, count)


def record(images, out, parts=None):
    """Note in a run's folder which files of a `Folder` were checked, so that it is not done again.

    parts: of the search, to be noted with the classes. Refused if the run began with others.
    """
    if not isinstance(images, Folder):
        return
    checked = processes.on_rank0(notes, out / "checked.json") | {images.digest: images.broken}
    if parts:
        unchanged(images, out)
        alphas = [os.fsdecode(name) for name in images.names[parts[1]]]
        split = {"files": images.digest, "test": images.held_out, "architecture": alphas}
        classes = "".join(name + "\n" for name in images.class_names)
        processes.write(out / "split.json", json.dumps(split, indent=1) + "\n")
        processes.write(out / "classes.txt", classes.encode(errors="surrogateescape"))
    processes.write(out / "checked.json", json.dumps(checked, indent=1) + "\n")


def unchanged(images, run):
    """Refused if a `Folder` has other files than when the search in the folder `run` began.

    Others would be held out then, so that images which the search has seen would be tested on.
    """
    if not isinstance(images, Folder):
        return
    file = run / "split.json"
    if processes.on_rank0(notes, file).get("files", images.digest) != images.digest:
        raise files.Refused(f"--data {images.root} is not what it was when the run began ({file})")


def notes(file):
    """The dict in a JSON file of a run; {} if the file is not there."""
    return files.read_json(file) if file.exists() else {}
