"""Does the search find? Searched networks beside random ones of the same MACs, all trained alike.

    python results/compare.py length          # how long a training tells networks apart, and not seeds
    python results/compare.py find            # searched, random, largest and by-hand networks of A0..A4
    python results/compare.py rank            # does the supernet rank networks as training does?
    python results/compare.py table           # what the rows say: means, intervals, Kendall's tau

Every network is trained by train.py's recipe on 5/6 of the training images, and its accuracy is on the other
1/6, which no weight has learnt from; no test image is touched. A finished network is a row of networks.jsonl,
a finished search a row a stage of searches.jsonl; what has a row is not done again, so that any call goes on
where the last one ended. As many networks train at once as there are cores, on one thread each (--jobs).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from machinery import flags, processes, settings
from machinery.run import Run

import argparse
import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import time

import numpy as np
import torch

import data
import flops
import search
import train
from budget import cheapest_ends
from derive import evaluate, evaluate_derived, log_probabilities, open_supernet, space_costs
from network import Network
from ops import initialise
from results.many import train_many
from space import CANDIDATES, SPACES, Arch
from supernet import SuperNet

HERE = Path(__file__).parent
NETWORKS, SEARCHES, RANKS = (HERE / f"{name}.jsonl" for name in ("networks", "searches", "ranks"))
EPOCHS = 10                     # of a network, by `length`
DRAWN, TRAINED = 100, 101       # what is drawn: with stage and number it seeds a generator
# Student's t at 97.5 % for 1, 2, .. degrees of freedom, from the usual tables
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
        2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def rows(file):
    """The rows of a .jsonl file, none if it is not there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(file, row):
    """Append a row to a .jsonl file, whole, also beside other processes."""
    with open(file, "a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write(json.dumps(row) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


# ------------------------------------------------------------------ networks that are compared

@functools.cache
def space_of(stage):
    """(a supernet of the small space for Fashion-MNIST, without memory; its costs in MACs, in parameters)."""
    with torch.device("meta"):
        supernet = SuperNet(SPACES["small"][stage], 1, 10)
    return supernet, space_costs(supernet, flops.Layer.macs), space_costs(supernet, flops.Layer.params)


def draw(block, generator):
    """One (operation, expansion, width) of a `space.Block`, as indices, uniformly."""
    sizes = len(CANDIDATES), len(block.expansions), len(block.widths)
    return tuple(int(torch.randint(size, (1,), generator=generator)) for size in sizes)


def random_networks(stage, count):
    """`count` networks drawn uniformly from the options of a stage's space, at most 3 % below its target."""
    supernet, target, found = space_of(stage)[0], flops.TARGETS["small"][stage], []
    for n in itertools.count():
        if len(found) == count:
            return found
        g = data.generator(DRAWN, stage, n)
        arch = supernet.space.arch([draw(block, g) for block in supernet.space.blocks], 1, 10)
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
    (supernet, macs, params), target = space_of(stage), flops.TARGETS["small"][stage]
    steps = [np.stack(pair) for pair in zip(macs.blocks, params.blocks)]            # (2, i, op, e, o) each
    fronts = [[np.array([[macs.fixed], [params.fixed]])]]
    for step, rest in zip(steps, cheapest_ends(macs)[1:]):
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
    return supernet.space.arch(options[::-1], 1, 10)


def by_hand(stage):
    """ir_k3_se_hs everywhere, expansions and widths at one height of their ranges, the highest that fits."""
    supernet, best = space_of(stage)[0], None
    for height in np.linspace(0, 1, 101):
        options = [(6, round(height * (len(b.expansions) - 1)), round(height * (len(b.widths) - 1)))
                   for b in supernet.space.blocks]
        arch = supernet.space.arch(options, 1, 10)
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


def train_network(arch, seed, epochs):
    """The accuracy of an `Arch` trained by train.py's own loop, with a seed and for so many epochs."""
    device = torch.device("cpu")
    args = training_arguments(arch, seed, epochs, device)
    loader, parts = loader_of(args.batch_size)
    network = Network(arch)
    initialise(network, data.generator(seed, arch.stage, train.INITIAL))
    run = Run(None, {}, device, most_skipped=0)
    with contextlib.redirect_stdout(None):              # it has a line when it has ended
        train.train(network, arch.stage, loader, parts[0], lambda network: math.nan, args, run)
    return evaluate(network, loader, parts[1])


def add_networks(given):
    """Train (parts of what `train_all` takes, on a device), and add a row a network.

    The networks of a part have stage, seed and number of epochs in common; a GPU trains them side by side.
    """
    parts, device = given
    for part in parts:
        kinds, numbers, archs, (seed, *_), (epochs, *_) = zip(*part)
        archs, clock = [*map(Arch.from_json, archs)], time.perf_counter()
        if device == "cpu":
            accuracies = [train_network(arch, seed, epochs) for arch in archs]
        else:
            args = training_arguments(archs[0], seed, epochs, torch.device(device))
            accuracies = train_many(archs, args, *loader_of(args.batch_size, device))
        seconds = (time.perf_counter() - clock) / len(archs)
        for kind, number, arch, accuracy in zip(kinds, numbers, archs, accuracies):
            add(NETWORKS, {"kind": kind, "number": number, "stage": arch.stage, "seed": seed,
                           "epochs": epochs, "accuracy": accuracy, "flops": flops.macs(arch),
                           "params": flops.params(arch), "arch": arch.to_json(), "seconds": seconds,
                           "device": device})
            print(f"A{arch.stage} {kind} {number}, seed {seed}, {epochs} epochs: {100 * accuracy:.2f} %, "
                  f"{seconds:.0f} s", flush=True)


def add_search(wanted):
    """Search with a seed into a folder, and add the rows of its stages."""
    folder, seed, flags_of_search = wanted
    out = Path(folder) / f"seed{seed}"
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


def search_all(seeds, folder, more, jobs):
    """Search with those seeds that have no rows in searches.jsonl with these flags yet."""
    known = {(row["seed"], *row["flags"]) for row in rows(SEARCHES)}
    side_by_side(add_search, [(folder, seed, more) for seed in seeds if (seed, *more) not in known], jobs)


# ------------------------------------------------------------------ the questions

def length(args):
    """For 6 random networks a stage and 3 seeds: the deviation between networks beside that between seeds."""
    train_all([("random", n, arch, seed, epochs) for epochs in (3, 6, 10, 20) for stage in args.stages
               for n, arch in enumerate(random_networks(stage, 6)) for seed in range(3)], args)


def find(args):
    """All kinds of networks of each stage, trained to the length that `length` chose."""
    search_all(range(args.searches), args.runs, args.flags, args.jobs)
    found = [row for row in rows(SEARCHES) if row["flags"] == args.flags and row["seed"] < args.searches]
    wanted = []
    for number in range(max(args.searches, args.draws)):                    # so that all kinds grow together
        for stage in args.stages:
            if number < args.draws:
                arch = random_networks(stage, number + 1)[number]
                wanted.append(("random", number, arch, 0, args.epochs))
            wanted += [("searched", number, Arch.from_json(row["arch"]), 0, args.epochs) for row in found
                       if (row["seed"], row["stage"]) == (number, stage)]
            if number == 0:
                wanted += [(kind, 0, make(stage), 0, args.epochs)
                           for kind, make in (("largest", largest), ("by hand", by_hand))]
    train_all(wanted, args)


def log_likelihood(arch, supernet):
    """An `Arch`'s log-likelihood under alpha; of expansions that round to its hidden width the likeliest."""
    total = 0.0
    for log_p, block, chosen, inputs in zip(log_probabilities(supernet), supernet.space.blocks, arch.blocks,
                                            arch.inputs(), strict=True):
        ops, expansions, widths = (p.tolist() for p in log_p)
        total += ops[list(CANDIDATES).index(chosen.op)] + widths[block.widths.index(chosen.out)]
        total += max(p for n, p in enumerate(expansions) if block.hidden(inputs, n) == chosen.hidden)
    return total


def rank(args):
    """24 random networks a stage: log-likelihood and accuracy by the supernet, and trained with two seeds."""
    known = {(row["stage"], row["arch"]) for row in rows(RANKS)}
    for stage in args.stages:
        supernet = open_supernet(Path(args.runs) / "seed0", stage)
        for n, arch in enumerate(random_networks(stage, 24)):
            if (stage, arch.to_json()) not in known:
                loader, parts = loader_of(128)
                accuracy = evaluate_derived(arch, supernet, loader, parts, 0, stage, TRAINED)[1]
                add(RANKS, {"stage": stage, "number": n, "accuracy": accuracy,
                            "log_likelihood": log_likelihood(arch, supernet), "arch": arch.to_json()})
    train_all([("random", n, arch, seed, args.epochs) for stage in args.stages
               for n, arch in enumerate(random_networks(stage, 24)) for seed in (0, 1)], args)


# ------------------------------------------------------------------ what the rows say

def interval(one, other):
    """Difference of two means, and half of its 95 % interval (Welch's)."""
    a, b = (np.var(x, ddof=1) / len(x) for x in (one, other))
    degrees = int((a + b) ** 2 / (a ** 2 / (len(one) - 1) + b ** 2 / (len(other) - 1)))
    return np.mean(one) - np.mean(other), T975[min(max(degrees, 1), len(T975)) - 1] * (a + b) ** 0.5


def kendall(one, other):
    """Kendall's tau-b of two lists of numbers."""
    one, other = (np.sign(np.subtract.outer(x, x))[np.triu_indices(len(x), 1)] for x in (one, other))
    return float((one * other).sum() / np.sqrt((one ** 2).sum() * (other ** 2).sum()))


def kendall_interval(one, other, resamples=2000):
    """(tau, low, high): with the 95 % interval by bootstrap over networks."""
    generator, one, other = np.random.default_rng(0), np.asarray(one), np.asarray(other)
    drawn = [generator.integers(len(one), size=len(one)) for _ in range(resamples)]
    return kendall(one, other), *np.nanpercentile([kendall(one[i], other[i]) for i in drawn], (2.5, 97.5))


def table(args):
    """What the rows say, as text."""
    trained = rows(NETWORKS)
    print("How long to train: deviation between networks' means, and between seeds of a network, in points")
    for stage, epochs in itertools.product(args.stages, (3, 6, 10, 20)):
        by = {}
        for row in trained:
            if (row["stage"], row["epochs"], row["kind"]) == (stage, epochs, "random") and row["number"] < 6:
                by.setdefault(row["number"], []).append(100 * row["accuracy"])
        full = [x for x in by.values() if len(x) >= 3]
        if len(full) > 1:
            seeds = np.mean([np.var(x, ddof=1) for x in full]) ** 0.5
            networks = np.std([np.mean(x) for x in full], ddof=1)
            print(f"A{stage} {epochs:>3} epochs: networks {networks:.2f}, seeds {seeds:.2f} "
                  f"(n = {len(full)})")
    print(f"\nAfter {args.epochs} epochs, training seed 0, accuracy on the validation split in %")
    for stage in args.stages:
        kinds = {}
        for row in trained:
            if (row["stage"], row["epochs"], row["seed"]) == (stage, args.epochs, 0):
                kinds.setdefault(row["kind"], []).append(100 * row["accuracy"])
        text = f"A{stage}"
        for kind, values in sorted(kinds.items()):
            deviation = f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            text += f"  {kind} {np.mean(values):.2f}{deviation} (n = {len(values)})"
        if min(len(kinds.get(kind, ())) for kind in ("searched", "random")) > 1:
            difference, half = interval(kinds["searched"], kinds["random"])
            text += (f"  searched - random {difference:+.2f} +- {half:.2f}, "
                     f"relative {100 * difference / np.mean(kinds['random']):+.2f} %")
        print(text)
    print("\nKendall's tau of random networks with their accuracy after training, and its 95 % interval")
    for stage in args.stages:
        means, other, params = ({row["arch"]: row[key] for row in trained
                                 if (row["stage"], row["epochs"], row["kind"], row["seed"])
                                 == (stage, args.epochs, "random", seed)}
                                for key, seed in (("accuracy", 0), ("accuracy", 1), ("params", 0)))
        ranked, likely = ({row["arch"]: row[key] for row in rows(RANKS) if row["stage"] == stage}
                          for key in ("accuracy", "log_likelihood"))
        for what, values in (("accuracy with the supernet's weights", ranked), ("log-likelihood", likely),
                             ("another seed", other), ("parameters", params)):
            both = sorted(set(means) & set(values))
            if len(both) > 4:
                tau, low, high = kendall_interval([means[a] for a in both], [values[a] for a in both])
                print(f"A{stage} {what}: {tau:+.2f} [{low:+.2f}, {high:+.2f}] (n = {len(both)})")


@flags.command
def main(argv=None):
    p = flags.Parser("compare.py", __doc__)
    p.add_argument("question", choices=("length", "find", "rank", "table"))
    p.add_argument("--stages", type=int, nargs="+", default=list(range(5)), metavar="K", help="(all)")
    p.add_argument("--searches", type=int, default=8, help="search seeds 0, 1, .. (8)")
    p.add_argument("--draws", type=int, default=8, help="random networks a stage (8)")
    p.add_argument("--epochs", type=int, default=EPOCHS, help=f"of a network ({EPOCHS})")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (as many as cores)")
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="that trains networks (cpu)")
    p.add_argument("--side", type=int, default=1, metavar="N",
                   help="networks that a process trains at a time, side by side on a GPU (1)")
    p.add_argument("--runs", default=str(HERE / "runs"), help="folder of the searches")
    p.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="all that follows goes to search.py")
    args = p.parse_args(argv)
    {"length": length, "find": find, "rank": rank, "table": table}[args.question](args)


if __name__ == "__main__":
    main()
