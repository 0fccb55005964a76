"""Does the search find? Searched networks beside random ones of the same MACs, all trained alike.

    python results/compare.py find            # searched, random, largest and by-hand networks of A0..A4
    python results/compare.py rank            # does the supernet rank networks as training does?
    python results/compare.py table           # what the rows say: means, intervals, Kendall's tau

Every network is trained by train.py's recipe on 5/6 of the training images, and its accuracy is on the other
1/6, which no weight has learnt from; no test image is touched. As many networks train at once as there are
cores, on one thread each (--jobs), or several side by side on a GPU (--device cuda --side 10).
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from machinery import flags, processes

import argparse
import itertools

import numpy as np

import flops
from derive import evaluate_derived, log_probabilities, open_supernet
from results import networks
from space import CANDIDATES

RANKS = networks.HERE / "ranks.jsonl"
STATISTICS = 101                # what is drawn, beside networks.DRAWN: batches that measure batch norm
# Student's t at 97.5 % for 1, 2, .. degrees of freedom, from the usual tables
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
        2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
        2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


# ------------------------------------------------------------------ the questions

def find(args):
    """Search, then train networks of all kinds of each stage."""
    networks.search_all(range(args.searches), args.runs, args.flags, args.jobs)
    found = networks.derived(args.flags, args.searches, args.stages)
    wanted = [(" ".join(("searched", *args.flags)), seed, arch) for seed, arch in found]
    for stage in args.stages:
        wanted += [("largest", 0, networks.largest(stage)), ("by hand", 0, networks.by_hand(stage))]
        wanted += [("random", n, arch) for n, arch in enumerate(networks.random_networks(stage, args.draws))]
    networks.train_all([(*each, seed, args.epochs) for each in wanted for seed in range(args.seeds)], args)


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
    """Evaluate random networks of each stage with the supernets of several searches, and train them."""
    known = {(row["search"], row["stage"], row["number"]) for row in networks.rows(RANKS)
             if row["flags"] == args.flags}
    drawn = {stage: networks.random_networks(stage, args.draws) for stage in args.stages}
    for stage, which in itertools.product(args.stages, range(args.searches)):
        supernet = open_supernet(networks.folder_of(args.runs, args.flags, which), stage)
        for n, arch in enumerate(drawn[stage]):
            if (which, stage, n) not in known:
                position = 0, stage, STATISTICS
                _, accuracy = evaluate_derived(arch, supernet, *networks.loader_of(128), *position)
                networks.add(RANKS, {"search": which, "flags": args.flags, "stage": stage, "number": n,
                                     "accuracy": accuracy, "log_likelihood": log_likelihood(arch, supernet)})
    networks.train_all([("random", n, arch, seed, args.epochs) for stage in args.stages
                        for n, arch in enumerate(drawn[stage]) for seed in range(args.seeds)], args)


# ------------------------------------------------------------------ what the rows say

def student(degrees):
    """Student's t at 97.5 %; beyond the table its last, which is a little wide."""
    return T975[min(max(degrees, 1), len(T975)) - 1]


def interval(one, other):
    """Difference of two means, and half of its 95 % interval (Welch's)."""
    difference = np.mean(one) - np.mean(other)
    a, b = (np.var(x, ddof=1) / len(x) for x in (one, other))
    if a + b == 0:
        return difference, 0.0
    degrees = int((a + b) ** 2 / (a ** 2 / (len(one) - 1) + b ** 2 / (len(other) - 1)))
    return difference, student(degrees) * (a + b) ** 0.5


def paired(values):
    """The mean of some differences, and half of its 95 % interval (Student's)."""
    return np.mean(values), student(len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5


def kendall(one, other):
    """Kendall's tau-b of two lists of numbers."""
    one, other = (np.sign(np.subtract.outer(x, x))[np.triu_indices(len(x), 1)] for x in (one, other))
    return float((one * other).sum() / np.sqrt((one ** 2).sum() * (other ** 2).sum()))


def highest_fifth(ranking, truth):
    """The mean truth of the fifth that is ranked highest, less the mean of all."""
    return truth[np.argsort(-ranking)[:max(1, len(truth) // 5)]].mean() - truth.mean()


def precision_at_5(ranking, truth):
    """The share of the five that are ranked highest which are among the five best in truth."""
    return len({*np.argsort(-ranking)[:5]} & {*np.argsort(-truth)[:5]}) / 5


def with_interval(statistic, rankings, truth, resamples=2000):
    """(mean of statistic(ranking, truth), low, high): 95 % by bootstrap over the n networks of truth (n,)."""
    generator, n = np.random.default_rng(0), len(truth)

    def mean(which):
        return np.mean([statistic(ranking[..., which], truth[which]) for ranking in rankings])
    resampled = [mean(generator.integers(n, size=n)) for _ in range(resamples)]
    return mean(np.arange(n)), *np.nanpercentile(resampled, (2.5, 97.5))


def lengths(stage, trained):
    """Print how long to train: by how much networks deviate, and training seeds of one network.

    Means over seeds deviate by what seeds add, too, which is taken off. Such networks are trained by `rank
    --searches 0 --draws 6 --seeds 3 --epochs 10`.
    """
    for epochs in (3, 6, 10, 20):
        by = {}
        for row in trained:
            if (row["stage"], row["epochs"], row["kind"]) == (stage, epochs, "random"):
                by.setdefault(row["number"], {})[row["seed"]] = 100 * row["accuracy"]
        full = [[*seeds.values()] for seeds in by.values() if len(seeds) > 1]
        if len(full) > 1:
            seeds = np.mean([np.var(x, ddof=1) for x in full])
            added = np.mean([np.var(x, ddof=1) / len(x) for x in full])
            between = max(0.0, np.var([np.mean(x) for x in full], ddof=1) - added)
            print(f"A{stage}, {epochs} epochs: networks deviate by {between ** 0.5:.2f} points, seeds of one "
                  f"by {seeds ** 0.5:.2f} (n = {len(full)}, {sum(map(len, full)) / len(full):.0f} seeds)")


def kinds(stage, found):
    """Print the accuracy of each kind of network, and by how much it is above that of random ones."""
    by = {kind: [accuracy for _, accuracy in numbers.values()] for kind, numbers in found.items()}
    for kind, values in sorted(by.items()):
        deviation = f" +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        text = f"A{stage} {kind} {np.mean(values):.2f}{deviation} (n = {len(values)})"
        if kind != "random" and min(len(values), len(by["random"])) > 2:
            difference, half = interval(values, by["random"])
            text += (f", above random {difference:+.2f} +- {half:.2f}, "
                     f"relative {100 * difference / np.mean(by['random']):+.2f} %")
        print(text)


def rankings(stage, drawn):
    """Print what the order of random networks by supernets, and by size, has to do with that by training.

    drawn: {number: (MACs in M, accuracy in %)}. Supernets of other flags are compared with the default's.
    """
    found = {}                                  # {(what, *flags): {search seed: {number: what it is}}}
    for row in networks.rows(RANKS):
        for what in ("accuracy", "log_likelihood") if row["stage"] == stage else ():
            seeds = found.setdefault((what, *row["flags"]), {})
            seeds.setdefault(row["search"], {})[row["number"]] = row[what]
    both = sorted(set(drawn).intersection(*(one for seeds in found.values() for one in seeds.values())))
    if not found or len(both) < 5:
        return
    truth, archs = np.array([drawn[n][1] for n in both]), networks.random_networks(stage, 1 + max(both))
    values = {name: np.array([[one[n] for n in both] for _, one in sorted(seeds.items())])
              for name, seeds in sorted(found.items())}
    values["parameters",] = np.array([[flops.params(archs[n]) for n in both]])
    for name, mine in values.items():
        tau, low, high = with_interval(kendall, mine, truth)
        more, least, most = with_interval(highest_fifth, mine, truth)
        precision = np.mean([precision_at_5(one, truth) for one in mine])
        print(f"A{stage} {' '.join(name)}: tau {tau:+.2f} [{low:+.2f}, {high:+.2f}], its highest fifth is "
              f"{more:+.2f} [{least:+.2f}, {most:+.2f}] points above all, the first has "
              f"{truth[mine.argmax(1)].mean():.2f} %, precision at 5 is {precision:.2f} (by chance "
              f"{5 / len(both):.2f}; n = {len(both)}, {len(mine)} rankings)")
        if name[1:] and len(values.get(name[:1], ())) == len(mine):
            pairs = np.stack([mine, values[name[:1]]], 1)
            tau, low, high = with_interval(lambda pair, y: kendall(pair[0], y) - kendall(pair[1], y), pairs,
                                           truth)
            print(f"A{stage} {' '.join(name)}: tau is {tau:+.2f} [{low:+.2f}, {high:+.2f}] above the "
                  "default's")


def over_stages(found):
    """Print the accuracy of searches in the mean of some stages, and by how much it is above the default's,
    seed by seed. found: for each stage what `networks.trained` returns.
    """
    means = {}
    for kind in (kind for kind in found[0] if kind.startswith("searched")):
        seeds = set.intersection(*(set(of_stage.get(kind, ())) for of_stage in found))
        means[kind] = {seed: np.mean([of_stage[kind][seed][1] for of_stage in found]) for seed in seeds}
    default = means.get("searched", {})
    for kind, mine in means.items():
        both = mine.keys() & default.keys()
        if kind != "searched" and len(both) > 1:
            difference, half = paired([mine[seed] - default[seed] for seed in both])
            print(f"{kind}: {np.mean([*mine.values()]):.2f} % in the mean of these stages (n = {len(mine)}), "
                  f"{difference:+.2f} +- {half:.2f} above the default (n = {len(both)})")


def minutes():
    """Print how long searches with each flags took, in the mean over their seeds, on one thread each."""
    seconds = {}                                # {command: {search seed: [seconds of each stage]}}
    for row in networks.rows(networks.SEARCHES):
        by_seed = seconds.setdefault(" ".join(("search.py", *row["flags"])), {})
        by_seed.setdefault(row["seed"], []).append(row["seconds"])
    for command, by_seed in seconds.items():
        mean = np.mean([sum(stages) for stages in by_seed.values()])
        print(f"{command}: {mean / 60:.1f} minutes (n = {len(by_seed)})")


def table(args):
    """Print what the rows say: accuracy on the validation split in %."""
    every = networks.rows(networks.NETWORKS)
    found = {stage: networks.trained(stage, args.epochs) for stage in args.stages}
    for stage, of_stage in found.items():
        lengths(stage, every)
        if "random" in of_stage:
            kinds(stage, of_stage)
            rankings(stage, of_stage["random"])
    over_stages([*found.values()])
    minutes()


@flags.command
def main(argv=None):
    p = networks.parser("compare.py", __doc__, searches=8)
    p.add_argument("question", choices=("find", "rank", "table"))
    p.add_argument("--draws", type=flags.number(int, 0), default=8, help="random networks a stage (8)")
    p.add_argument("--seeds", type=flags.number(int, 1), default=1, help="of training, 0, 1, .. (1)")
    p.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                   help="of the searches: all that follows goes to search.py")
    args = p.parse_args(argv)
    processes.choose_device(args.device)                        # refused here, and not after the searches
    {"find": find, "rank": rank, "table": table}[args.question](args)


if __name__ == "__main__":
    main()
