"""Networks that are compared: drawn, searched and by rule, trained alike, a row each.

A finished network is a row of networks.jsonl, a finished search a row a stage of searches.jsonl; what has a
row is not done again, so that any call goes on where the last one ended.
"""
from machinery import flags, processes, settings
from machinery.files import reading

import fcntl
import functools
import itertools
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

import data
import flops
import search
import train
from results.many import train_many
from space import CANDIDATES, SPACES, Arch

HERE = Path(__file__).parent
NETWORKS, SEARCHES = HERE / "networks.jsonl", HERE / "searches.jsonl"
DRAWN = 100                     # what is drawn: with stage and number it seeds a generator
EPOCHS = 3                      # of a network: train.py's default


def parser(name, description, searches):
    """The flags that compare.py and methods.py have in common; searches: how many by default."""
    p = flags.Parser(name, description)
    p.add_argument("--stages", type=int, nargs="+", choices=range(5), default=list(range(5)), metavar="K",
                   help="stages (all)")
    p.add_argument("--searches", type=flags.number(int, 0), default=searches,
                   help=f"search seeds 0, 1, .. ({searches})")
    p.add_argument("--epochs", type=flags.number(int, 1), default=EPOCHS, help=f"of a training ({EPOCHS})")
    p.add_argument("--jobs", type=flags.number(int, 1), default=os.cpu_count(),
                   help="processes (as many as cores)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="device that trains (cpu)")
    p.add_argument("--side", type=flags.number(int, 1), default=1, metavar="N",
                   help="networks that a process trains at a time, side by side on a GPU (1)")
    p.add_argument("--runs", default=str(HERE / "runs"), help="folder of the searches")
    return p


def rows(file):
    """The rows of a .jsonl file, none if it is not there. Refused if they are none."""
    with reading(file):
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(file, row):
    """Append a row to a .jsonl file, whole, also beside other processes."""
    with open(file, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write(json.dumps(row) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def derived(flags_of_search, searches, stages):
    """[(search seed, Arch), ..]: what the first searches with these flags derived for the stages."""
    return [(row["seed"], Arch.from_json(row["arch"])) for row in rows(SEARCHES)
            if row["flags"] == flags_of_search and row["seed"] < searches and row["stage"] in stages]


def trained(stage, epochs):
    """{kind: {number: (MACs in M, accuracy in %)}} of a stage's networks trained for so many epochs: the mean
    of the rows of each, which are several for several training seeds or machines.
    """
    found = {}
    for row in rows(NETWORKS):
        if (row["stage"], row["epochs"]) == (stage, epochs):
            points = found.setdefault(row["kind"], {}).setdefault(row["number"], [])
            points.append((row["flops"] / 1e6, 100 * row["accuracy"]))
    return {kind: {n: tuple(np.mean(points, 0)) for n, points in numbers.items()}
            for kind, numbers in found.items()}


# ------------------------------------------------------------------ networks that are compared

@functools.cache
def space_of(stage):
    """(a stage's small space, its costs for Fashion-MNIST in MACs, in parameters)."""
    space = SPACES["small"][stage]
    return space, flops.costs(space, 1, 10), flops.costs(space, 1, 10, flops.Layer.params)


def draw(block, generator):
    """One (operation, expansion, width) of a `space.Block`, as indices, uniformly."""
    sizes = len(CANDIDATES), len(block.expansions), len(block.widths)
    return tuple(int(torch.randint(size, (1,), generator=generator)) for size in sizes)


def random_networks(stage, count):
    """`count` networks drawn uniformly from the options of a stage's space, at most 3 % below its target."""
    space, target, found = space_of(stage)[0], flops.TARGETS["small"][stage], []
    for n in itertools.count():
        if len(found) == count:
            return found
        g = data.generator(DRAWN, stage, n)
        arch = space.arch([draw(block, g) for block in space.blocks], 1, 10)
        if 0.97 * target <= flops.macs(arch) <= target:
            found.append(arch)


def undominated(pairs):
    """Of (MACs, parameters) pairs (2, n) those that no other beats in both: (2, k)."""
    pairs = pairs[:, np.lexsort((-pairs[1], pairs[0]))]
    most = np.maximum.accumulate(pairs[1])
    return pairs[:, np.append(True, pairs[1, 1:] > most[:-1])] if pairs.size else pairs


def largest(stage):
    """The network with the most parameters within the target's MACs, exactly: block by block, for each width
    that comes out, the beginnings of networks that are undominated; then back, from the best end.
    """
    (space, macs, params), target = space_of(stage), flops.TARGETS["small"][stage]
    steps = [np.stack(pair) for pair in zip(macs.blocks, params.blocks)]            # (2, i, op, e, o) each
    fronts = [[np.array([[macs.fixed], [params.fixed]])]]
    for step, rest in zip(steps, flops.best_ends(macs.blocks, macs.head, torch.amin)[1:]):
        fronts.append([])
        for o, left in enumerate((target - rest).tolist()):
            ways = [before[:, :, None] + undominated(step[:, i, ..., o].reshape(2, -1))[:, None]
                    for i, before in enumerate(fronts[-2])]
            ways = np.concatenate([way.reshape(2, -1) for way in ways], 1)
            fronts[-1].append(undominated(ways[:, ways[0] <= left]))
    ends = [(front[1, -1] + float(params.head[o]), o) for o, front in enumerate(fronts[-1]) if front.size]
    width, options = max(ends)[1], []
    pair = fronts[-1][width][:, -1]
    for step, front in zip(reversed(steps), reversed(fronts[:-1])):
        i, op, e = next(at for at in np.ndindex(step.shape[1:4])
                        if (front[at[0]] == (pair - step[(slice(None), *at, width)])[:, None]).all(0).any())
        options.append((op, e, width))
        pair, width = pair - step[:, i, op, e, width], i
    return space.arch(options[::-1], 1, 10)


def by_hand(stage):
    """ir_k3_se_hs everywhere, expansions and widths at one height of their ranges, the highest that fits."""
    space, best = space_of(stage)[0], None
    for height in np.linspace(0, 1, 101):
        options = [(6, round(height * (len(b.expansions) - 1)), round(height * (len(b.widths) - 1)))
                   for b in space.blocks]
        arch = space.arch(options, 1, 10)
        best = arch if flops.macs(arch) <= flops.TARGETS["small"][stage] else best
    return best


# ------------------------------------------------------------------ what takes time

@functools.cache
def loader_of(batch_size, device="cpu"):
    """(loader of Fashion-MNIST's training images, its 5/6 and 1/6 by split 0)."""
    images = data.load("fashion", "train")
    parts = data.split(images.labels, 0)
    return data.Loader(images, images.statistics(parts[0]), batch_size, device), parts


def training_arguments(arch, seed, epochs, device):
    """What train.py would train a network with, in float32."""
    argv = ["-", "--epochs", str(epochs), "--seed", str(seed), "--no-autocast"]
    return train.completed(settings.train_parser(None).parse_args(argv), arch, f"A{arch.stage}", device)


def add_networks(given):
    """Train (parts of what `train_all` takes, on a device), and add a row a network.

    The networks of a part have stage, seed and number of epochs in common; a GPU trains them side by side.
    """
    parts, device = given
    for part in parts:
        kinds, numbers, archs, (seed, *_), (epochs, *_) = zip(*part)
        archs, clock = [*map(Arch.from_json, archs)], time.perf_counter()
        args = training_arguments(archs[0], seed, epochs, torch.device(device))
        loader, split = loader_of(args.batch_size, device)
        accuracies = train_many(archs, args, loader, split)
        seconds = (time.perf_counter() - clock) / len(archs)
        for kind, number, arch, accuracy in zip(kinds, numbers, archs, accuracies):
            add(NETWORKS, {"kind": kind, "number": number, "stage": arch.stage, "seed": seed,
                           "epochs": epochs, "accuracy": accuracy, "flops": flops.macs(arch),
                           "params": flops.params(arch), "arch": arch.to_json(), "seconds": seconds,
                           "device": device})
            print(f"A{arch.stage} {kind} {number}, seed {seed}, {epochs} epochs: {100 * accuracy:.2f} %, "
                  f"{seconds:.0f} s", flush=True)


def folder_of(runs, flags_of_search, seed):
    """The folder of a search below `runs`; searches with the same flags of search.py lie side by side."""
    return Path(runs, "-".join(word.lstrip("-") for word in flags_of_search), f"seed{seed}")


def add_search(wanted):
    """Search with a seed below the folder `runs`, and add the rows of its stages."""
    runs, seed, flags_of_search = wanted
    out = folder_of(runs, flags_of_search, seed)
    search.main(["--seed", str(seed), "--out", str(out), "--resume", *flags_of_search])
    for row in json.loads((out / "summary.json").read_text()):
        arch = (out / f"A{row['stage']}.json").read_text()
        add(SEARCHES, row | {"seed": seed, "flags": flags_of_search, "arch": arch})


def side_by_side(function, wanted, jobs):
    """Call function(x) of each x of `wanted`, `jobs` at a time, on one thread each."""
    with processes.catch_signals() as signals:
        processes.side_by_side(function, wanted, jobs, signals)


def train_all(wanted, args):
    """Train all of `wanted`, (kind, number, Arch, seed, epochs), that have no row in networks.jsonl yet."""
    known = {(row["kind"], row["number"], row["arch"], row["seed"], row["epochs"]) for row in rows(NETWORKS)}
    groups = {}
    for kind, number, arch, *rest in wanted:
        each = kind, number, arch.to_json(), *rest
        if each not in known:
            groups.setdefault((arch.stage, *rest), []).append(each)
    parts = [(n, group[n:n + args.side]) for group in groups.values()
             for n in range(0, len(group), args.side)]
    parts = [part for _, part in sorted(parts, key=lambda part: part[0])]           # all groups grow together
    shares = [(parts[n::args.jobs], args.device) for n in range(min(args.jobs, len(parts)))]
    side_by_side(add_networks, shares, args.jobs)


def search_all(seeds, runs, more, jobs):
    """Search with those seeds that have no rows in searches.jsonl with these flags yet."""
    known = {(row["seed"], *row["flags"]) for row in rows(SEARCHES)}
    side_by_side(add_search, [(runs, seed, more) for seed in seeds if (seed, *more) not in known], jobs)
