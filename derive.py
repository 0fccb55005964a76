"""From a supernet to a network: its most likely one, or the most likely under any budget (Table 3).

    python derive.py runs/001                    # the last stage's most likely
    python derive.py runs/001 --flops 2M
    python derive.py runs/001 --latency 2ms      # measured here, for one image

A network is a chain of choices, and what a block costs depends on its own choices and the width before
it: so the most likely one under a budget is found exactly (budget.py).
"""
from machinery import files, flags, folder, latency, processes

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from budget import alternatives, choose, most_likely, viterbi
from flops import amount, bounds, costs, expected, macs, params
from network import Network
from scaling import scale  # noqa
from space import CANDIDATES, SPACES, Arch, ArchBlock
from supernet import CHOICES, SuperNet

RECALIBRATION = 32              # training batches that measure a derived network's batch-norm statistics


@torch.no_grad()
def inherit(network, supernet):  # task 5.2
    """Copy the supernet's weights into a derived `network`, which is returned.

    Every width is a prefix, so a tensor of the network is the leading corner of the supernet's. The supernet
    keeps no batch-norm statistics: `recalibrate` measures them.
    """
    pairs = [(network.get_submodule(name), supernet.get_submodule(name))
             for name in ("stem", "stem_norm", "head", "head_norm", "classifier")]
    for mine, chosen, mixed in zip(network.blocks, network.arch.blocks, supernet.blocks, strict=True):
        pairs.append((mine, mixed.candidates[list(CANDIDATES).index(chosen.op)]))
    for mine, theirs in pairs:
        source = theirs.state_dict()
        for name, tensor in mine.named_parameters():
            tensor.copy_(source[name][tuple(slice(n) for n in tensor.shape)])
    return network


def arch(supernet, options):
    """The `Arch` of one option a choice: for each block (operation, expansion, width) as indices."""
    space, blocks, width = supernet.space, [], supernet.space.stem
    for mixed, (op, expansion, chosen) in zip(supernet.blocks, options, strict=True):
        block = mixed.block
        blocks.append(ArchBlock(list(CANDIDATES)[op], block.hidden(width, expansion), block.widths[chosen],
                                block.stride, block.residual, block.expand))
        width = block.widths[chosen]
    return Arch(space.name, space.stage, space.resolution, supernet.stem.in_channels,
                supernet.classifier.out_features, space.stem, space.head, tuple(blocks))


def log_probabilities(supernet):
    """For each block the log-softmax of its three logits (operations,), (expansions,), (widths,), in float64.

    Differentiable in alpha. A choice with one option has log-probability 0.
    """
    alphas, single = supernet.alphas(), torch.zeros(1, dtype=torch.float64)
    every = torch.cat(alphas).cpu().double()                                 # the device is read once
    logits = iter(every.split([len(a) for a in alphas]))
    found = [{name: F.log_softmax(next(logits), 0) for name in block.alphas} for block in supernet.blocks]
    return [tuple(block.get(name, single) for name in CHOICES) for block in found]


def space_costs(supernet, cost="macs"):
    """The `flops.Costs` of the supernet's space, for its own images and classes."""
    return costs(supernet.space, supernet.stem.in_channels, supernet.classifier.out_features, cost)


def expected_macs(supernet, table):
    """The mean MACs of the networks that are sampled, differentiable in alpha; `table` from `space_costs`."""
    return expected(table, [tuple(p.exp() for p in block) for block in log_probabilities(supernet)])


def derive(supernet, flops=None):
    """The supernet's most likely network, as an `Arch`; with `flops`, the most likely of at most so many
    MACs (exactly).

    ValueError if even the cheapest network has more.
    """
    log_p, table = log_probabilities(supernet), space_costs(supernet)
    return arch(supernet, (most_likely(log_p, table, flops) if flops else viterbi(log_p, table, 0.0))[0])


@torch.no_grad()
def recalibrate(network, batches):  # task 5.3
    """Measure the batch-norm statistics of `network` anew, as the mean over `batches` of (images, labels).

    Returns it, in eval mode.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [m.momentum for m in norms]
    network.train()
    for n, (x, _) in enumerate(batches):
        for m in norms:
            m.momentum = 1 / (n + 1)                          # the n-th batch joins a running mean
        network(x)
    for m, momentum in zip(norms, usual):
        m.momentum = momentum
    return network.eval()


@torch.no_grad()
def evaluate(network, loader, index):
    """The share of the images at `index` that `network` names right, in eval mode: in [0, 1].

    Of many processes each looks at its share of them.
    """
    network.eval()
    rank, n = processes.shard()
    right = torch.zeros(1, device=loader.device)
    for x, y in loader.ordered(index[rank::n]):
        right += (network(x).argmax(1) == y).sum()
    return float(processes.all_reduce_sum(right)) / len(index)


def evaluate_derived(arch, supernet, loader, parts, *position):
    """(network, accuracy): `arch` with the supernet's weights, its batch norm recalibrated on the first
    of the two `parts` of the training data, and its accuracy on the second. `position` seeds the order of
    the batches.
    """
    network = inherit(Network(arch).to(loader.device), supernet).requires_grad_(False)
    recalibrate(network, itertools.islice(loader.shuffled(parts[0], *position), RECALIBRATION))
    return network, evaluate(network, loader, parts[1])


def open_supernet(run, stage):
    """The supernet of a run's stage, on the CPU, from A<stage>.json and A<stage>.pt in the run's folder.

    files.Refused if these are not what a search writes.
    """
    network, weights = run / f"A{stage}.json", run / f"A{stage}.pt"
    try:
        found = Arch.from_json(network.read_text())
    except ValueError as error:
        raise files.Refused(f"{network}: {error}") from None
    if found.space not in SPACES or found.stage != stage:
        raise files.Refused(f"{network}: no network of A{stage} of {' or '.join(SPACES)}")
    space = SPACES[found.space][stage]._replace(resolution=found.resolution)
    with torch.device("meta"):                      # takes no memory for what the file does not hold
        supernet = SuperNet(space, found.in_channels, found.classes)
    try:
        supernet.load_state_dict(files.load_checkpoint(weights), assign=True)
    except RuntimeError as error:
        why = " ".join(str(error).split()[:12])
        raise files.Refused(f"{weights} is not the supernet of {network.name} ({why} ..)") from None
    return supernet


def parser():
    p = flags.Parser("derive.py", __doc__)
    p.add_argument("run", type=Path, metavar="RUN", help="folder of a search")
    p.add_argument("--stage", type=int, choices=range(5),
                   help="one of A0..A4 (all that the run has; without a budget its last)")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--flops", type=amount, metavar="F", help="a budget of MACs, as in 2M; suffixes k, M, G")
    g.add_argument("--params", type=amount, metavar="P", help="a budget of parameters, as in 100k")
    g.add_argument("--latency", type=latency.duration, metavar="T",
                   help="a budget of time for one image on this machine's CPU, as in 2ms; suffixes us, ms, "
                   "s. What layers take is measured, and kept in the run's latency.json")
    g.add_argument("--points", type=flags.number(int, 2, 1000), metavar="N",
                   help="the front: N networks from the cheapest to the dearest, each measured (2 to 1000)")
    p.add_argument("--refine", type=flags.number(int, 1, 1000), default=1, metavar="N",
                   help="measure N likely networks near the budget and take the best (1: none)")
    p.add_argument("--out", type=Path, metavar="FILE", help="the JSON file (in the run's folder)")
    return p


@flags.command
def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if args.points and args.refine > 1:
        p.error("--refine is for one budget, not for --points")
    if 0 in (args.flops, args.params):
        p.error("a budget must be above 0")
    try:
        files.read_json(args.run / "args.json")
        stages = [k for k in range(5) if (args.run / f"A{k}.pt").exists() and args.stage in (None, k)]
        supernets = [open_supernet(args.run, k) for k in stages]
    except (OSError, ValueError, RecursionError) as error:
        p.error(f"{args.run} is not the folder of a run ({error})")
    if not supernets:
        p.error(f"{args.run} has no A{'0' if args.stage is None else args.stage}.pt: no such stage was "
                "finished")
    right = measurer(args.run) if args.points or args.refine > 1 else None
    if args.points:
        name, content = "points", json.dumps(front(supernets, args.points, right), indent=1) + "\n"
    else:
        name, found = likely(p, args, supernets, right)
        content = found.to_json()
    path = args.out or args.run / f"{name}.json"
    try:
        files.write(path, content)
    except OSError as error:
        p.error(f"{path}: {error.strerror}")
    print(f"written: {path}")


def measurer(run):
    """A function of a supernet of the run and one of its networks, (options, ..), that says its accuracy on
    the architecture part of the run's images.
    """
    ran = flags.settings_of(run)
    images = flags.load_images(ran, "train", run)
    folder.unchanged(images, run)
    parts = data.split(images.labels, ran.seed)
    loader = images.loader(images.statistics(parts[0]), ran.batch_size)
    return lambda supernet, found: evaluate_derived(
        arch(supernet, found[0]), supernet, loader, parts, ran.seed)[1]


def front(supernets, points, right):
    """Rows of `points` networks from the cheapest to the dearest, evenly on a logarithmic scale of MACs, each
    measured by `right`.
    """
    spaces = [(log_probabilities(supernet), space_costs(supernet)) for supernet in supernets]
    ends, rows = [end for _, table in spaces for end in bounds(table)], []
    for budget in np.geomspace(min(ends), max(ends), points):
        _, which, found = choose(spaces, min(max(budget, min(ends)), max(ends)), str, near=True)
        rows.append(told(supernets[which], found, right(supernets[which], found)))
    return rows


def likely(p, args, supernets, right):
    """(name of its file, network): the most likely within the budget that `args` names, or without one the
    last supernet's; of args.refine likely ones the best by `right`. A budget out of reach ends in p.error.
    """
    budget = args.flops or args.params or args.latency
    try:
        if args.latency:
            show, name = latency.show, f"latency-{budget / 1e6:g}ms"
            tables = measured_costs(supernets, args.run / "latency.json")
        elif budget:
            name, cost = ("flops", "macs") if args.flops else ("params", "params")
            show, name = f"{{:,.0f}} {cost}".format, f"{name}-{budget:.0f}"
            tables = [space_costs(supernet, cost) for supernet in supernets]
        else:                                       # the dearest network keeps what all keep: no budget
            supernets, show, name = supernets[-1:], str, f"A{supernets[-1].space.stage}-likely"
            tables = [space_costs(supernets[0])]
        within = budget or bounds(tables[0])[1]
        spaces = list(zip(map(log_probabilities, supernets), tables))
        lost, which, found = choose(spaces, within, show)
    except (OSError, ValueError) as error:
        p.error(str(error))
    supernet = supernets[which]
    if args.refine > 1:
        likeliest, ranked = found, []
        for candidate in alternatives(*spaces[which], within, args.refine):
            ranked.append((right(supernet, candidate), candidate))
            told(supernet, candidate, ranked[-1][0])
        found = max(ranked, key=lambda pair: pair[0])[1]
        lost += likeliest[1] - found[1]
        print("best:")
    told(supernet, found)
    if args.latency:
        whole, = latency.measure_networks([Network(arch(supernet, found[0]))])
        print(f"{show(found[2])} by its layers, {show(whole)} measured as a whole")
    if budget:
        print(f"{100 * (1 - found[2] / budget):.2f} % under the budget; it costs {lost:.2f} nats of "
              "likelihood")
    return name, arch(supernet, found[0])


def measured_costs(supernets, file):
    """The `flops.Costs` of each supernet's space in nanoseconds, by `latency.tables`, kept in `file`.

    Prints how well they tell the times of random networks.
    """
    def network(which, options):
        return Network(arch(supernets[which], options))
    tables = latency.tables([s.space for s in supernets], supernets[0].stem.in_channels,
                            supernets[0].classifier.out_features, network, file)
    sums, whole = latency.sample(tables, network, 1)
    median, largest, correlation = latency.error(sums, whole)
    print(f"{len(sums)} random networks: times by their layers are off by {median:.1%} (median), "
          f"{largest:.1%} at most; correlation with the measured ones {correlation:.3f}", flush=True)
    return tables


def told(supernet, found, right=None):
    """Print a network, (options, log-likelihood, cost), as a line; returns its row for a JSON file."""
    network = arch(supernet, found[0])
    row = {"stage": network.stage, "flops": macs(network), "params": params(network),
           "log_likelihood": found[1], "accuracy": right, "arch": json.loads(network.to_json())}
    measured = "" if right is None else f"  {100 * right:5.1f} % of the architecture part"
    print(f"A{row['stage']}  {row['flops'] / 1e6:8.3f} M MACs  {row['params'] / 1e6:7.3f} M parameters  "
          f"log-likelihood {found[1]:8.2f}{measured}", flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
