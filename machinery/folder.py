"""Images of your own, or ImageNet: what a folder of class folders holds, checked before a run (Experiments).

    DIR/train/CLASS/*.jpg and DIR/val/CLASS/*.jpg      # ImageNet's layout
    DIR/CLASS/*.jpg                                    # a sixth of every class is held out as the test images

Which classes and test images are drawn depends on the sorted names and on the seed alone.
"""
from machinery import processes
from machinery.decode import CHUNK, ENDINGS, Folder, decode
from machinery.files import Refused, read_json
from machinery.workers import cores, work

import functools
import hashlib
import itertools
import json
import os
import random
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm


def draw(n, count, seed):
    """`count` of range(n), in order. Python promises that a seed gives the same random() for ever, and nobody
    promises it of a permutation.
    """
    generator = random.Random(seed)
    numbers = [generator.random() for _ in range(n)]
    return sorted(sorted(range(n), key=numbers.__getitem__)[:count])


def subfolders(folder):
    """The sorted names of the folders in a folder, without hidden ones."""
    return sorted(path.name for path in folder.glob("[!.]*/"))


def layout(root):
    """(class names, the folder of the training images, that of the test images or None), below `root`."""
    names = subfolders(root)
    if not {"train", "val"} <= set(names):
        if names and set(names) <= {"train", "val", "valid", "validation", "test"}:
            raise Refused(f"has {' and '.join(n + '/' for n in names)}, but it takes train/ and val/")
        return names, "", None
    names = subfolders(root / "train")
    if unknown := sorted(set(subfolders(root / "val")) - set(names)):
        raise Refused(f"val/{unknown[0]} is no class of train/")
    return names, "train", "val"


def image_files(root, folder, others):
    """The names, below `root`, of the images in and below its `folder`, sorted; not of hidden ones.

    others: a Counter of other files by their ending. A folder is entered once, and not if `root` lies in it:
    links may lead in circles.
    """
    def stop(error):
        if not isinstance(error, FileNotFoundError):      # val/ need not test every class
            raise error
    names, entered = [], {os.path.realpath(path) for path in (root, *root.resolve().parents)}
    for path, folders, inside in os.walk(root / folder, onerror=stop, followlinks=True):
        if os.path.realpath(path) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(path))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(path, root)
        for name in (name for name in inside if not name.startswith(".")):
            if name.lower().endswith(ENDINGS):
                names.append(os.path.join(below, name))
            else:
                others[os.path.splitext(name)[1] or "without ending"] += 1
    return sorted(names)


def list_images(root, seed, count=None):
    """(class names, {"train": {name below root: label}, "test": ..}, a count of other files by their ending).

    count: classes to draw. Refused if `root` has another layout, too few classes, or too few images.
    """
    classes, base, val = layout(root)
    if len(classes) < max(2, count or 0):
        raise Refused(f"{base and base + '/ '}has {len(classes)} folders of images, one a class, but "
                      f"{count or 2} are needed")
    if count:
        classes = [classes[i] for i in draw(len(classes), count, seed)]
    parts, others, inner = {"train": {}, "test": {}}, Counter(), {}
    for label, name in enumerate(classes):
        train = image_files(root, os.path.join(base, name), others)
        below = [file.split(os.sep)[len(base.split()) + 1:] for file in train]
        if all(len(names) > 1 for names in below):
            inner[name] = {names[0] for names in below}
        if val:
            test = image_files(root, os.path.join(val, name), others)
        else:
            drawn_by = f"{seed} {name}".encode(errors="surrogateescape")
            test = [train[i] for i in draw(len(train), max(1, len(train) // 6), drawn_by)]
            train = sorted(set(train) - set(test))
        if len(train) < 2:
            raise Refused(f"{os.path.join(base, name)} has too few images ({len(train)} to train on; there "
                          "must be two)")
        parts["train"] |= dict.fromkeys(train, label)
        parts["test"] |= dict.fromkeys(test, label)
    for one, other in itertools.combinations(inner, 2):
        if len(inner[one] & inner[other]) > 1:
            raise Refused(f"{one}/ and {other}/ hold no image but folders of the same names: if they are two "
                          "parts, name them train/ and val/")
    if not parts["test"]:
        raise Refused(f"{val}/ has no images to test on: they belong into {val}/CLASS/")
    return classes, parts, others


def identity(root, names):
    """A digest of the names and sizes of files, wherever they lie. A dead link has size -1."""
    paths = (os.path.join(root, name) for name in names)
    sizes = (os.path.getsize(path) if os.path.exists(path) else -1 for path in paths)
    text = "\0".join(f"{name}\0{size}" for name, size in zip(names, sizes))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def broken_of(root, names):
    """[(name, what is wrong), ..] of those files that cannot be decoded."""
    broken = []
    for name in names:
        try:
            decode(os.path.join(root, name), small=True)
        except OSError as error:
            broken.append((name, str(error)))
    return broken


def check(root, names, workers, skip_broken):
    """{name: what is wrong} of the files that cannot be decoded; of the first few, unless they are skipped.

    Every process checks its shard of the files, and all learn what each has found.
    """
    (rank, world_size), broken = processes.shard(), {}
    starts = range(rank * CHUNK, rank * CHUNK + len(names), world_size * CHUNK)     # as many in every process
    chunks = [names[start:start + CHUNK] for start in starts]
    for found in tqdm(work(functools.partial(broken_of, root), chunks, workers), "checking images",
                      len(chunks), disable=rank > 0 or None, leave=False, unit_scale=world_size * CHUNK,
                      unit="image"):
        broken |= processes.all_gather(found)
        if broken and not skip_broken:
            break
    return broken


def load(root, part, seed, resolution, classes=None, workers=None, skip_broken=False, run=None, checked=True):
    """The `Folder` in `root`; part: train or test; classes: draw so many.

    run: the folder of a run that may have checked the files before. checked: whether to check them at all.
    Refused, in one line, for what does not make a data set, or is broken.
    """
    if run and root.resolve() in (run.resolve(), *run.resolve().parents):
        raise Refused(f"the folder of the run, {run}, lies in it: take another --out")
    workers = cores() if workers is None else workers
    class_names, parts, others = list_images(root, seed, classes)
    digest = identity(root, parts[part])
    if len(set(processes.all_gather([digest]))) > 1:
        raise Refused("is not the same for all processes")
    if others and part == "train":
        print(f"{root}: not taken for images: {', '.join(f'{n} {end}' for end, n in others.items())}")
    broken = processes.on_rank0(notes, run / "checked.json").get(digest) if run else None
    if broken is None:
        broken = check(root, list(parts[part]), workers, skip_broken) if checked else {}
    for name, what in broken.items():
        if not skip_broken:
            raise Refused(f"{name}: {what}; --skip-broken leaves out what is broken")
        print(f"left out: {root / name}: {what}".encode(errors="backslashreplace").decode())
    names = [name for name in parts[part] if name not in broken]
    labels = torch.tensor([parts[part][name] for name in names], dtype=torch.long)
    few = labels.bincount(minlength=len(class_names)) < 2
    if part == "train" and few.any():
        raise Refused(f"too few images of {class_names[few.int().argmax()]} are whole")
    print(f"{root}: {len(names):,} images of {len(class_names)} classes to {part} on", flush=True)
    return Folder(root, np.array([os.fsencode(name) for name in names]), labels, class_names,
                  list(parts["test"]), broken, digest, resolution, workers)


def record(images, out, parts=None):
    """Note in a run's folder which files of a `Folder` were checked, so that it is not done again.

    parts: of the search, to be noted with the classes.
    """
    if not isinstance(images, Folder):
        return
    checked = processes.on_rank0(notes, out / "checked.json") | {images.digest: images.broken}
    processes.write(out / "checked.json", json.dumps(checked, indent=1) + "\n")
    if parts:
        alphas = [os.fsdecode(name) for name in images.names[parts[1]]]
        split = {"files": images.digest, "test": images.test, "architecture": alphas}
        processes.write(out / "split.json", json.dumps(split, indent=1) + "\n")
        classes = "".join(name + "\n" for name in images.class_names)
        processes.write(out / "classes.txt", classes.encode(errors="surrogateescape"))


def unchanged(images, run):
    """Refused if a `Folder` has other files than when the search in the folder `run` began.

    Others would be held out then, so that images which the search has seen would be tested on.
    """
    split = processes.on_rank0(notes, run / "split.json")
    if isinstance(images, Folder) and split.get("files", images.digest) != images.digest:
        raise Refused(f"--data {images.root} is not what it was when the run began ({run / 'split.json'})")


def is_same(root, seed, classes, run):
    """Whether `root` has the images that the search in the folder `run` began with, wherever they lay."""
    try:
        _, parts, _ = list_images(root, seed, classes)
    except (Refused, OSError):
        return False
    return notes(run / "split.json").get("files") == identity(root, parts["train"])


def notes(file):
    """The dict in a JSON file of a run; {} if the file is not there."""
    return read_json(file) if file.exists() else {}
