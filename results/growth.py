"""What growth does, seen from inside: random networks of a space, before it grows, just after, and trained.

    python results/growth.py runs/001        # measures the run of a search: rows of growth.jsonl
    python results/growth.py                 # growth.png, from the rows

50 networks are drawn uniformly from each of A0..A3, with operations and expansions for the blocks that the
next space adds. They get the weights of a supernet, measure their batch norm anew, and are evaluated on
`IMAGES` of the validation images: in the supernet before it grows; in the one grown from it, by each of
grow.py's ways; in one of random weights; in the one that the run trained, and in that with its new blocks
bypassed. What has a row is not measured again.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from machinery import flags, settings
from machinery.files import Refused
from machinery.pictures import COLOURS, save, styled

import copy

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import data
import search
from derive import arch_of, evaluate_derived, open_supernet
from grow import WIDENINGS, grow
from results.networks import add, draw, rows
from space import positions
from supernet import SuperNet

ROWS = Path(__file__).with_name("growth.jsonl")
NETWORKS, IMAGES = 50, 2000
WAYS = ("before", *WIDENINGS, "random", "trained", "bypassed")


def drawn(small, large, n):
    """Network number n, for both spaces: options of the small one's blocks, and of all the large one's.

    A new block is as wide as the block before it, lest it cut what passes.
    """
    g, options = data.generator(search.GROWTH, large.stage, n), {}
    old = dict(zip(positions(small), small.blocks))
    for (row, place), block in zip(positions(large), large.blocks):
        op, expansion, width = draw(old.get((row, place), block), g)
        if (row, place) not in old:
            width = options[row, place - 1][2]
        options[row, place] = op, expansion, width
    return [options[place] for place in positions(small)], [*options.values()]


@torch.no_grad()
def bypassed(supernet, small):
    """A copy whose blocks that the space `small` does not have only pass on their input."""
    supernet, old = copy.deepcopy(supernet), positions(small)
    for place, block in zip(positions(supernet.space), supernet.blocks):
        if place not in old:
            block.layers.norm3.weight.zero_()
            block.layers.norm3.bias.zero_()
    return supernet


@torch.no_grad()
def twins(supernet):
    """The share of hidden channels whose expand filter is nearly that of another (a cosine above .99)."""
    count = total = 0
    for block in supernet.blocks:
        if block.layers.expand is not None:
            filters = F.normalize(block.layers.expand.weight.flatten(1))
            alike = filters @ filters.T - torch.eye(len(filters))
            count, total = count + int((alike.amax(1) > 0.99).sum()), total + len(filters)
    return count / total


def made(way, small, trained, generator):
    """The supernet of one of `WAYS`, between the one before growth and the one that was trained after it."""
    if way in WIDENINGS:
        return grow(small, trained.space, generator, way)
    if way == "random":
        return SuperNet(trained.space, trained.stem.in_channels, trained.classifier.out_features, generator)
    if way == "bypassed":
        return bypassed(trained, small.space)
    return small if way == "before" else trained


def measure(run):
    """Add the rows of a run's stages A1, A2, .. that growth.jsonl lacks."""
    args = settings.read(run)
    images = flags.load_images(args, "train", run)
    parts = data.split(images.labels, args.seed)
    loader = data.Loader(images, images.statistics(parts[0]), args.batch_size)
    parts = parts[0], parts[1][:IMAGES]
    this = settings.same_run(args)
    known = {(row["stage"], row["way"]) for row in rows(ROWS) if row["run"] == this}
    for stage in range(1, args.stages):
        small, trained = open_supernet(run, stage - 1), open_supernet(run, stage)
        networks = [drawn(small.space, trained.space, n) for n in range(NETWORKS)]
        for way in (way for way in WAYS if (stage, way) not in known):
            supernet = made(way, small, trained, data.generator(args.seed, stage, search.GROWTH))
            archs = [arch_of(supernet, options[way != "before"]) for options in networks]
            accuracies = [evaluate_derived(arch, supernet, loader, parts, args.seed, stage,
                                           search.WEIGHTS)[1] for arch in archs]
            row = {"run": this, "stage": stage, "way": way, "accuracies": accuracies,
                   "twins": twins(supernet)}
            add(ROWS, row)
            print(f"A{stage} {way}: {100 * np.mean(accuracies):.1f} %, {100 * row['twins']:.0f} % twins",
                  flush=True)


@styled
def picture(path):
    """Draw growth.png, of the run that was measured last: a panel a stage, a dot a network, a line at their
    mean; shares of twins above.

    Returns the figure. Refused if no stage of it has all its rows.
    """
    every = rows(ROWS)
    found = {(row["stage"], row["way"]): row for row in every if row["run"] == every[-1]["run"]}
    stages = [stage for stage in range(1, 5) if all((stage, way) in found for way in WAYS)]
    if not stages:
        raise Refused(f"{ROWS} has not all rows of a stage: measure a run first")
    figure = Figure((7.2, 2.6))
    for axis, stage in zip(figure.subplots(1, len(stages), sharey=True, squeeze=False)[0], stages):
        for x, way in enumerate(WAYS):
            row = found[stage, way]
            y, colour = 100 * np.array(row["accuracies"]), COLOURS[way in WIDENINGS]
            spread = np.linspace(-0.3, 0.3, len(y))
            axis.plot(x + spread, y, ".", ms=2, color=colour, alpha=0.6)
            axis.hlines(y.mean(), x - 0.4, x + 0.4, "black", lw=1)
            axis.text(x, 99, f"{100 * row['twins']:.0f}", ha="center", va="top", fontsize=6)
        axis.set_xticks(range(len(WAYS)), WAYS, rotation=90)
        axis.set(title=f"A{stage - 1} grows to A{stage}", ylim=(0, 100))
    figure.axes[0].set_ylabel("accuracy (%) of 50 random networks,\nmean; above: % of twin channels")
    return save(figure, path)


@flags.command
def main(argv=None):
    p = flags.Parser("growth.py", __doc__)
    p.add_argument("run", nargs="?", type=Path, metavar="RUN", help="the folder of a search to measure")
    args = p.parse_args(argv)
    if args.run:
        measure(args.run)
    else:
        picture(ROWS.with_suffix(".png"))


if __name__ == "__main__":
    main()
