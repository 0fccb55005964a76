"""search.py, train.py, derive.py, killed at any of their writes: the same command goes on to the same files.

The writes are found by Python's audit events, so that none can be forgotten. A kill comes before a file is
opened to be written, before its bytes are surely on the disk, before it is renamed or removed. The oracle is
an undisturbed run.
"""
from machinery import files, latency

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time

import photos
import pytest
import tiny
import torch

import derive
import plot
import search
import train

FEW = ["--epochs", "1", "--batch-size", "4", "--checkpoint-every", "2", "--device", "cpu", "--resume"]
COMMANDS = {"search": (search, ["--out", "RUN", "--data", "PHOTOS", "--classes", "2", "--resolution", "16",
                                "--stages", "2", "--workers", "0", *FEW]),
            "train": (train, ["RUN", "--ema", "0.9", "--workers", "0", *FEW]),
            "refine": (derive, ["RUN", "--flops", "30k", "--refine", "2"]),
            "latency": (derive, ["RUN", "--latency", "11us"])}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a folder of photographs."""
    at = tmp_path_factory.mktemp("world")
    photos.write(at / "photos", 16)
    return at


def arrange(patch):
    """The tiny world, in which nothing takes time, and layers take as long as is written here."""
    tiny.shrink(patch)
    patch.setattr(time, "perf_counter", lambda: 0.0)
    patch.setattr(latency, "measure", lambda builders: [10_000 + n for n in range(len(builders))])
    patch.setattr(plot, "curve", lambda runs, path: files.write(path, "curve"))


def watch(run, reached):
    """Call `reached` before all that changes something in the folder `run`, until this process ends."""
    fsync = os.fsync
    os.fsync = lambda file: (reached(), fsync(file))

    def note(event, given):
        writes = event == "open" and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        writes = writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
        if writes and str(given[0]).startswith(str(run)):
            reached()
    sys.addaudithook(note)


def dies(command, world, run, place, reached):
    """In a process of its own: the command, which kills itself with SIGKILL before its n-th write."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def count():
        reached.value += 1
        if reached.value == place:
            os.kill(os.getpid(), signal.SIGKILL)
    arrange(pytest.MonkeyPatch())
    watch(run, count)
    module, argv = COMMANDS[command]
    module.main([{"RUN": str(run), "PHOTOS": str(world / "photos")}.get(word, word) for word in argv])


def killed(command, world, run, place):
    """(whether that happened, the writes that there were). A fork could not compute beside an accelerator."""
    context = multiprocessing.get_context("spawn" if torch.accelerator.is_available() else "fork")
    reached = context.Value("i", lock=False)
    process = context.Process(target=dies, args=(command, world, run, place, reached))
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0, reached.value


def plain(x):
    """`x` with lists in place of tensors, for ==."""
    if isinstance(x, torch.Tensor):
        return x.tolist()
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    return [plain(value) for value in x] if isinstance(x, (list, tuple)) else x


def contents(run):
    """{name: what is in it}, of all files in a folder."""
    return {path.name: plain(files.load_checkpoint(path)) if path.suffix == ".pt" else path.read_bytes()
            for path in run.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(world):
    """{command: (the run's folder before it, the same after it, how many writes it takes)}."""
    found = {}
    for command in COMMANDS:
        before, after = world / "search", world / command
        if command != "search":
            shutil.copytree(before, after)
        _, writes = killed(command, world, after, 0)
        found[command] = before if command != "search" else None, after, writes
    return found


@pytest.mark.parametrize("command, every", [
    ("search", False), ("train", False), ("refine", True),
    *(pytest.param(command, True, marks=pytest.mark.slow) for command in ("search", "train", "latency"))])
def test_a_kill_at_any_write_changes_nothing(undisturbed, world, tmp_path, command, every):
    """every: a run for each write, killed there once. Else one run, killed time and again at writes drawn."""
    before, wanted, writes = undisturbed[command]
    assert writes > 2
    g = random.Random(0)
    for place in range(1, writes + 1) if every else [0]:
        run, kills = tmp_path / str(place), 0
        if before:
            shutil.copytree(before, run)
        while killed(command, world, run, place or g.randrange(1, 8 + writes // 3))[0]:
            kills, place = kills + 1, -every
        assert kills == 1 if every else kills > 2
        for left in run.glob("*.tmp"):
            left.unlink()
            assert COMMANDS[command][0] is derive           # the others lock the folder, and tidy it
        assert contents(run) == contents(wanted)
