"""Pictures of one run: its networks as boxes, what its supernets chose, and when.

`architectures`, `alphas` and `search` each draw one of the files that plot.py lists.
"""
from machinery import files, results

import io
import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.animation import PillowWriter
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from space import CANDIDATES, SPACES, positions

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")      # Okabe and Ito's
STEM, HEAD = (-1, 0), (99, 0)                                   # columns of architectures.png
# Warm is ReLU and cool is hswish, dark has squeeze-excite; in grey these are four steps.
FILLS = {"": ("#F0E442", "ReLU"), "_hs": ("#56B4E9", "hswish"), "_se": ("#D55E00", "SE, ReLU"),
         "_se_hs": ("#0072B2", "SE, hswish")}
HATCHES = {1: None, 3: None, 5: "////"}                         # by kernel
CHOICES = {"op": "operation", "expansion": "expansion", "width": "width"}
NEW = {"marker": 5, "color": "black", "ms": 4, "ls": "", "clip_on": False}     # a triangle that points right
RING = {"marker": "o", "mfc": "none", "mec": "#D55E00", "ms": 5, "ls": "", "mew": 1.2}
# A decorator: matplotlib's own defaults and these, for print, hold whatever the user's matplotlibrc says.
styled = style.context({
    "font.size": 8, "axes.titlesize": 8, "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 5,
    "hatch.linewidth": 0.7, "patch.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "text.parse_math": False, "errorbar.capsize": 2, "xtick.minor.size": 3.5,
    "xtick.minor.pad": 3.5, "figure.dpi": 200, "figure.constrained_layout.use": True}, after_reset=True)


def expansions(arch):
    """For each block the table's expansion that gives its hidden width, the least if several do, as text. If
    one block has none, all have "–": the network is not one of its space, but of compound scaling.
    """
    spaces = SPACES.get(arch.space, ())[arch.stage:arch.stage + 1]
    table, found = {(b.row, b.place): b for space in spaces for b in space.blocks}, []
    for stand, inputs, b in zip(positions(arch), arch.inputs(), arch.blocks):
        options = enumerate(table[stand].expansions if stand in table else ())
        found.append(next((f"{e:g}" for n, e in options if table[stand].hidden(inputs, n) == b.hidden), "–"))
    return ["–"] * len(found) if "–" in found else found


def columns(archs):
    """Where the boxes of networks, or of spaces, stand: ({(row, place): its middle}, the distance of two,
    the width of the picture), in inches. Blocks of one row of the tables stand together.
    """
    stands = sorted({STEM, HEAD}.union(*map(positions, archs)))
    rows, step = sorted({row for row, _ in stands}), min(0.6, max(0.29, 5.3 / len(stands)))
    middle = {(row, place): 0.95 + (n + 0.5) * step + 0.12 * rows.index(row)
              for n, (row, place) in enumerate(stands)}
    return middle, step, max(7.2, middle[HEAD] + step / 2 + 0.05)


def network(axis, base, arch, words, middle, step, widest):
    """Draw `arch` as boxes on a line at the height `base` of an axis in inches; middle, step: of `columns`.
    words: its name and its cost; widest: the output width of the highest box.
    """
    axis.plot([0.95, middle[HEAD] + step / 2], [base, base], color="0.6", lw=0.8, zorder=0)
    axis.text(0.1, base + 0.24, words[0], weight="bold", fontsize=10)
    axis.text(0.1, base + 0.05, words[1])
    axis.text(0.87, base - 0.05, "kernel\nwidth\nexpansion\nhidden", ha="right", va="top", color="0.35")
    boxes = [(column, CANDIDATES[b.op][0], b.out, expansion, b.hidden, b.stride, FILLS[b.op[5:]][0])
             for column, expansion, b in zip(positions(arch), expansions(arch), arch.blocks)]
    boxes = [(STEM, 3, arch.stem, "", "", 2, "0.85"), *boxes, (HEAD, 1, arch.head, "", "", 1, "0.85")]
    side = arch.resolution
    for column, kernel, out, expansion, hidden, stride, colour in boxes:
        x, high, side = middle[column], 0.6 * min(1, out / widest), (side + stride - 1) // stride
        axis.bar(x, high, 0.84 * step, base, color=colour, edgecolor="black", hatch=HATCHES[kernel])
        axis.text(x, base - 0.05, f"{kernel}×{kernel}\n{out}\n{expansion}\n{hidden}", ha="center", va="top")
        axis.text(x, base + high + 0.04, f"▼{side}" if stride == 2 else "", ha="center")


def inches(figure, *bounds):
    """A new axis of `figure` at (left, bottom, width, height), in inches."""
    return figure.add_axes(np.divide(bounds, np.tile(figure.get_size_inches(), 2)))


def canvas(figure, width, height):
    """An axis for `network`, (0, 0, width, height) inches of `figure`, with the legend of its boxes."""
    axis = inches(figure, 0, 0, width, height)
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()
    handles = [Patch(facecolor=colour, edgecolor="black", hatch=HATCHES[kernel],
                     label=f"{kernel}×{kernel}, {words}")
               for colour, words in FILLS.values() for kernel in (3, 5)]
    handles += [Line2D([], [], color="black", marker="v", ls="", label="stride 2, to n×n pixels"),
                Patch(facecolor="0.85", edgecolor="black", label="stem, head")]
    axis.legend(handles=handles, loc="lower center", ncols=5)
    return axis


def costs(run):
    """{"A0": "0.88 M MACs", ..} of a run's networks."""
    file = Path(run) / "summary.json"
    with files.reading(file):
        return {f"A{row['stage']}": f"{row['flops'] / 1e6:.{2 if row['flops'] < 1e8 else 0}f} M MACs"
                for row in files.read_json(file, list)}


@styled
def architectures(run, path):
    """Draw architectures.png of `run`, a folder, into `path`. Returns the figure."""
    archs, macs = results.archs(run), costs(run)
    middle, step, width = columns(archs.values())
    widest, height = max(b.out for a in archs.values() for b in a.blocks), 1.34 * len(archs) + 0.6
    figure = Figure((width, height), layout="none")
    axis = canvas(figure, width, height)
    for n, (name, arch) in enumerate(archs.items()):
        network(axis, height - 1.34 * n - 0.8, arch, (name, macs.get(name, "")), middle, step, widest)
    return save(figure, path)


def decisions(run):
    """What the supernets of `run` chose, and when: (its networks, {stage: `results.history`'s steps}, {stage:
    where its blocks stand}). Refused if they do not go together.
    """
    stages, archs, stands = results.history(run), results.archs(run), {}
    for stage, steps in stages.items():
        with files.reading(Path(run) / "log.jsonl"):      # a stage that has not ended has no network
            arch = archs.get(f"A{stage}") or SPACES[next(iter(archs.values())).space][stage]
            stands[stage] = positions(arch)
            for _, blocks in steps:
                if len(blocks) != len(arch.blocks):
                    raise ValueError(f"{len(blocks)} blocks of A{stage}, which has {len(arch.blocks)}")
    return archs, stages, stands


def operations(axis, rows, stands, blocks, arch):
    """Draw the operations' probabilities in `blocks`, which stand at `stands`, a row a block of `rows`, and a
    ring at each operation of `arch`, if there is one. Returns the image.
    """
    at, values = [rows.index(stand) for stand in stands], np.full((len(rows), len(CANDIDATES)), np.nan)
    values[at] = [block["op"] for block in blocks]
    # Darkness grows with the root of the probability: 1/8, where all begin, would else be nearly white.
    image = axis.imshow(values, cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="auto")
    if arch:
        axis.plot([list(CANDIDATES).index(b.op) for b in arch.blocks], at, **RING)
    axis.set(facecolor="0.88", yticks=range(len(rows)),
             yticklabels=[f"{row + 2}.{place + 1}" for row, place in rows])
    words = [f"{kernel}×{kernel} {FILLS[op[5:]][1]}" for op, (kernel, *_) in CANDIDATES.items()]
    axis.set_xticks(range(len(CANDIDATES)), words, rotation=90)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image


@styled
def alphas(run, path):
    """Draw alphas.png of `run`, a folder, into `path`. Returns the figure."""
    archs, stages, stands = decisions(run)
    since = {stand: stage for stage in reversed(stages) for stand in stands[stage]}     # the stage it came in
    rows = sorted(since)
    figure = Figure((7.2, 3.7 + 0.15 * len(rows)))
    above, below = figure.subfigures(2, 1, height_ratios=(1.4 + 0.15 * len(rows), 2.3))
    axes = above.subplot_mosaic([list(stages)]) | below.subplot_mosaic([list(CHOICES)])
    ends = [0, *itertools.accumulate(steps[-1][0] for steps in stages.values())]
    for (stage, steps), done in zip(stages.items(), ends):
        image = operations(axes[stage], rows, stands[stage], steps[-1][1], archs.get(f"A{stage}"))
        axes[stage].set_title(f"A{stage}")
        axes[stage].tick_params(labelleft=stage == min(stages))
        for n, stand in enumerate(rows):
            if since[stand] == stage > min(stages):
                axes[stage].plot(-0.5, n, **NEW)
        for name, (came, colour) in itertools.product(CHOICES, zip(stages, COLOURS)):
            each = [[entropy(b[name]) for b, stand in zip(blocks, stands[stage])
                     if since[stand] == came and len(b.get(name, ())) > 1] for _, blocks in steps]
            if all(each):
                axes[name].plot([done + step for step, _ in steps], [np.mean(some) for some in each],
                                color=colour, label=f"A{came}", marker="o" if len(steps) == 1 else "")
    for name, words in CHOICES.items():
        axes[name].set(title=words, xlim=(0, ends[-1]), ylim=(0, 1.05), yticks=(0, 0.5, 1),
                       xlabel=f"{ends[-1]:,} weight steps")
        axes[name].set_xticks([(a + b) / 2 for a, b in itertools.pairwise(ends)], [f"A{s}" for s in stages])
        axes[name].tick_params("x", length=0)
        axes[name].vlines(ends[1:], 0, 1, color="0.6", lw=0.6)
    axes[min(stages)].set_ylabel("row of the table, block")
    axes["op"].set_ylabel("mean entropy / log n\n(1 undecided, 0 decided)")
    above.colorbar(image, ax=[axes[stage] for stage in stages], label="probability")
    handles = [Line2D([], [], label="operation of the derived network", **RING),
               Line2D([], [], label="a new block", **NEW), Patch(facecolor="0.88", label="a block to come")]
    handles += [Line2D([], [], color=colour, label=f"blocks new in A{stage}")
                for stage, colour in zip(stages, COLOURS)]
    below.legend(handles=handles, loc="outside lower center", ncols=4)
    return save(figure, path)


def moments(run, archs, stages, spaces):
    """The frames of search.gif: (stage, its blocks' probabilities, a network, words on it, the last network
    on the curve). A network of the likeliest options; for half a second at a stage's end, the derived one.
    """
    macs = costs(run)
    for stage, steps in stages.items():
        name, last = f"A{stage}", steps[-1][0]
        for step, blocks in [*steps[::math.ceil(len(steps) / 12)], steps[-1]]:
            options = [[np.argmax(block.get(choice, 1)) for choice in CHOICES] for block in blocks]
            with files.reading(Path(run) / "log.jsonl"):
                arch = spaces[stage].arch(options, 1, 10)
            yield stage, blocks, arch, (name, f"step {step}/{last}"), f"A{stage - 1}"
        if name in archs:
            yield from [(stage, blocks, archs[name], (name, macs.get(name, "")), name)] * 6


@styled
def search(run, path):
    """Draw search.gif of `run`, a folder, into `path`: how its supernets decide, stage by stage. Above: the
    operations' probabilities, and the networks found so far. Below: the network of the moment.
    """
    archs, stages, stands = decisions(run)
    points = {name: (macs, accuracy)
              for name, _, macs, _, accuracy in results.measured(Path(run) / "summary.json")}
    like, rows = next(iter(archs.values())), sorted(set().union(*stands.values()))
    with files.reading(Path(run) / "A0.json"):
        spaces = {stage: SPACES[like.space][stage]._replace(resolution=like.resolution) for stage in stages}
    middle, step, width = columns([*spaces.values(), *archs.values()])
    widest, high = max(b.widths[-1] for space in spaces.values() for b in space.blocks), 0.14 * len(rows)
    figure, writer = Figure((width, 3.7 + high), dpi=100), PillowWriter(fps=12)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "search.gif"
        with writer.saving(figure, file, figure.dpi):
            for stage, blocks, arch, words, last in moments(run, archs, stages, spaces):
                figure.clear()
                figure.set_layout_engine("none")
                network(canvas(figure, width, 2.05), 1.3, arch, words, middle, step, widest)
                left = inches(figure, 0.65, 2.5, 2.7, high)
                operations(left, rows, stands[stage], blocks, arch)
                left.set(ylabel="row, block", xlabel="darkness: the operation's probability; ○ the network's")
                right, found = inches(figure, 4.2, 2.5, width - 4.3, high + 1), {}
                for name in (name for name in points if name <= last):
                    found[name] = points[name]
                    right.annotate(name, points[name], (5, -5), textcoords="offset points", va="top")
                right.plot(*zip(*points.values()), alpha=0)                 # so that its limits stay
                right.plot(*zip(*found.values()), color=COLOURS[0], marker="o")
                right.margins(0.12)
                right.set(xlabel="MACs of one image (millions)",
                          ylabel="top-1 accuracy (%)\nsupernet's weights, validation images")
                writer.grab_frame()
        files.write(path, file.read_bytes())


def entropy(p):
    """The entropy of n probabilities, divided by log n: 1 if all are alike, 0 if one is certain."""
    return -sum(q * math.log(q, len(p)) for q in p if q)


def save(figure, path):
    """Write a figure as PNG, whole or not at all, and return it."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.write(path, content.getvalue())
    return figure


