"""The curves and pictures of runs, from the files in their folders alone (Figs. 3-6).

    python plot.py runs/001 [runs/002 ..]

curve.png          accuracy against MACs and parameters, of all runs. Those that differ in the seed alone
                   are one line: the mean, with the standard deviation as error bars. Filled marks: trained,
                   on the test images. Open: with the supernet's weights, on the validation images, the
                   sixth of the training images that these weights did not see
architectures.png  the networks A0..A4 of the first run, a box a block, as high as its output is wide (stem
                   and head are cut); blocks of one row of the paper's tables stand together
alphas.png         what the first run's supernets chose, and when. Above: probabilities of the operations at
                   the end of each stage. Below: mean entropy of each choice, over the uniform distribution's
"""
from machinery import files, flags, results

import contextlib
import io
import itertools
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from space import CANDIDATES, SPACES

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")      # Okabe and Ito's
MARKS = "osD^vPX"                                               # one more than colours: 42 different pairs
STARS = "*Xd<>8"                                                # of networks that were not searched
DRAWN = {"trained.json": ("trained, test images", {}),
         "summary.json": ("supernet's weights, validation images", {"mfc": "white", "ls": "--"})}
STEM, HEAD = (-1, 0), (99, 0)                                   # columns of architectures.png
# Warm is ReLU and cool is hswish, dark has squeeze-excite; in grey these are four steps.
FILLS = {"": ("#F0E442", "ReLU"), "_hs": ("#56B4E9", "hswish"), "_se": ("#D55E00", "SE, ReLU"),
         "_se_hs": ("#0072B2", "SE, hswish")}
HATCHES = {1: None, 3: None, 5: "////"}                         # by kernel
RING = {"marker": "o", "mfc": "none", "mec": "#D55E00", "ms": 5, "ls": "", "mew": 1.2}
# A decorator: matplotlib's own defaults and these, for print, hold whatever the user's matplotlibrc says.
styled = style.context({
    "font.size": 8, "axes.titlesize": 8, "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 5,
    "hatch.linewidth": 0.7, "patch.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "text.parse_math": False, "errorbar.capsize": 2, "xtick.minor.size": 3.5,
    "xtick.minor.pad": 3.5, "figure.dpi": 200, "figure.constrained_layout.use": True}, after_reset=True)


@styled
def curve(runs, path):
    """Draw curve.png of `runs`, folders, into `path`. Returns the figure."""
    lines = results.curves(runs)
    kinds = [kind for kind in DRAWN if any(file == kind for *_, file in lines)]
    if not kinds:
        raise results.Missing(f"{' '.join(map(str, runs))}: no accuracy in summary.json or trained.json")
    looks, handles = {}, []
    colours, marks, stars = map(itertools.cycle, (COLOURS, MARKS, STARS))
    for label, searched in dict.fromkeys(key[:2] for key in lines):
        looks[label, searched] = look = ({"color": next(colours), "marker": next(marks)} if searched else
                                         {"color": "black", "marker": next(stars), "ms": 7, "ls": ""})
        sizes = {len(seeds) for key in lines if key[:2] == (label, searched) for seeds in lines[key].values()}
        n = "..".join(map(str, sorted({min(sizes), max(sizes)})))
        handles.append(Line2D([], [], **look | DRAWN[kinds[0]][1] | {"ls": ""}, label=f"{label}, n = {n}"))
    if any(len(seeds) > 1 for points in lines.values() for seeds in points.values()):
        handles.append(Line2D([], [], color="0.3", marker="|", ms=8, label="standard deviation over n seeds"))
    figure = Figure((7.2, 2.7 * len(kinds) + 0.4 + 0.17 * math.ceil(len(handles) / 2)))
    panels, notes = figure.subplots(len(kinds), 2, sharex="col", sharey="row", squeeze=False), {}
    for (kind, row), column in itertools.product(zip(kinds, panels), (0, 1)):
        axis, texts = row[column], []
        for (label, searched, _), points in ((key, lines[key]) for key in lines if key[2] == kind):
            mean = np.array([np.mean(seeds, 0) for seeds in points.values()])                # (points, 3)
            std = np.array([np.std(seeds, 0, ddof=1) if len(seeds) > 1 else [np.nan] * 3
                            for seeds in points.values()])
            axis.errorbar(mean[:, column], mean[:, 2], std[:, 2], std[:, column], label=label,
                          elinewidth=0.8, **looks[label, searched] | DRAWN[kind][1])
            most = max(map(len, points.values()))
            words = [name.removeprefix(label).strip() + " (n = 1)" * (len(seeds) == 1 < most)
                     for name, seeds in points.items()]
            # Many labels would only be in the way: the points of the other lines are A0, A1, .. as well.
            if (label, searched) in list(looks)[2:] and list(points) == [f"A{n}" for n in range(len(points))]:
                words = [""] * len(points)
            texts += zip(mean[:, column], mean[:, 2], words, itertools.repeat(not searched))
        notes[axis] = texts
        axis.grid(alpha=0.3, lw=0.5)
        axis.margins(0.12)
        x = [x for x, *_ in texts]
        if max(x) > 5 * min(x):                             # else one network leaves most of it empty
            axis.set_xscale("log", subs=(2, 5))
            axis.xaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        axis.set(xlabel=("MACs of one image (millions)", "parameters (millions)")[column],
                 ylabel=f"top-1 accuracy (%)\n{DRAWN[kind][0]}")
        axis.label_outer()
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.draw_without_rendering()                         # now it is known where everything is
    figure.set_layout_engine("none")
    for axis, texts in notes.items():
        place(axis, texts)
    return save(figure, path)


def place(axis, texts):
    """Annotate points (x, y, text, needed), the last first, where no line, error bar, frame or other text is
    and no other point is as near. A text without such a place is left out; a needed one may cross one line.
    """
    taken, unit = [], axis.figure.dpi / 72                  # a typographic point, in pixels
    points = axis.transData.transform([text[:2] for text in texts])
    paths = [line.get_path() for line in axis.lines if line.get_linestyle() != "None"]
    paths += [path for bars in axis.collections for path in bars.get_paths()]
    paths = [axis.transData.transform_path(path) for path in paths]
    sides = ((1, -1), (-1, 1), (1, 0), (0, -1), (0, 1), (-1, 0), (1, 1), (-1, -1))      # the best one first
    for (x, y, text, needed), point in reversed([*zip(texts, points)]):
        for most, far, (right, up) in itertools.product(range(1 + needed), (4, 7, 10), sides if text else ()):
            note = axis.annotate(text, (x, y), (far * right, far * up), textcoords="offset points",
                                 ha=("center", "left", "right")[right], va=("center", "bottom", "top")[up])
            box = note.get_window_extent().padded(1)
            own, *gaps = (math.dist(p, np.clip(p, box.min, box.max)) for p in (point, *points))
            if (all(axis.bbox.contains(*corner) for corner in box.corners())
                    and not any(map(box.overlaps, taken)) and sum(gap < own + unit for gap in gaps) == 1
                    and sum(path.intersects_bbox(box, filled=False) for path in paths) <= most):
                taken.append(box)
                break
            note.remove()


def positions(arch):
    """Where each block of an `Arch` or a `Space` stands: (its row in the tables, its place in that row)."""
    rows = list(itertools.accumulate(not block.residual for block in arch.blocks))
    return [(row - 1, rows[:n].count(row)) for n, row in enumerate(rows)]


@styled
def architectures(run, path):
    """Draw architectures.png of `run`, a folder, into `path`. Returns the figure."""
    archs = results.networks(run)
    macs = {name: f"{count:.{2 if count < 100 else 0}f} M MACs"
            for name, _, count, *_ in results.measured(Path(run) / "summary.json")}
    columns = sorted({STEM, HEAD}.union(*map(positions, archs.values())))
    rows, widest = sorted({row for row, _ in columns}), max(b.out for a in archs.values() for b in a.blocks)
    step = min(0.6, max(0.29, 5.3 / len(columns)))                                            # all in inches
    middle = {(row, place): 0.95 + (n + 0.5) * step + 0.12 * rows.index(row)
              for n, (row, place) in enumerate(columns)}
    width, height = max(7.2, middle[HEAD] + step / 2 + 0.05), 1.2 * len(archs) + 0.65
    figure = Figure((width, height), layout="none")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axis.set_axis_off()
    for n, (name, arch) in enumerate(archs.items()):
        base, side = height - 1.2 * n - 0.8, arch.resolution
        axis.plot([0.95, middle[HEAD] + step / 2], [base, base], color="0.6", lw=0.8, zorder=0)
        axis.text(0.1, base + 0.24, name, weight="bold", fontsize=10)
        axis.text(0.1, base + 0.05, macs.get(name, ""))
        axis.text(0.87, base - 0.05, "kernel\nwidth\nhidden", ha="right", va="top", color="0.35")
        boxes = [(column, CANDIDATES[b.op][0], b.out, b.hidden, b.stride, FILLS[b.op[5:]][0])
                 for column, b in zip(positions(arch), arch.blocks)]
        boxes = [(STEM, 3, arch.stem, "", 2, "0.85"), *boxes, (HEAD, 1, arch.head, "", 1, "0.85")]
        for column, kernel, out, hidden, stride, colour in boxes:
            x, high, side = middle[column], 0.6 * min(1, out / widest), (side + stride - 1) // stride
            axis.bar(x, high, 0.84 * step, base, color=colour, edgecolor="black", hatch=HATCHES[kernel])
            axis.text(x, base - 0.05, f"{kernel}×{kernel}\n{out}\n{hidden}", ha="center", va="top")
            axis.text(x, base + high + 0.04, f"▼{side}" if stride == 2 else "", ha="center")
    handles = [Patch(facecolor=colour, edgecolor="black", hatch=HATCHES[kernel],
                     label=f"{kernel}×{kernel}, {words}")
               for colour, words in FILLS.values() for kernel in (3, 5)]
    handles += [Line2D([], [], color="black", marker="v", ls="", label="stride 2, to n×n pixels"),
                Patch(facecolor="0.85", edgecolor="black", label="stem, head")]
    figure.legend(handles=handles, loc="lower center", ncols=5)
    return save(figure, path)


@styled
def alphas(run, path):
    """Draw alphas.png of `run`, a folder, into `path`. Returns the figure."""
    stages, archs, stands = results.history(run), results.networks(run), {}
    for stage, steps in stages.items():
        with results.reading(Path(run) / "log.jsonl"):      # a stage that has not ended has no network
            arch = archs.get(f"A{stage}") or SPACES[next(iter(archs.values())).space][stage]
            stands[stage] = positions(arch)
            for _, blocks in steps:
                if len(blocks) != len(arch.blocks):
                    raise ValueError(f"{len(blocks)} blocks of A{stage}, which has {len(arch.blocks)}")
    rows, oldest, done = sorted(set().union(*stands.values())), stands[min(stands)], 0
    figure = Figure((max(4.5, 0.8 + 1.28 * len(stages)), 2.8 + 0.15 * len(rows)))
    axes = figure.subplot_mosaic([list(stages), ["below"] * len(stages)],
                                 height_ratios=(0.6 + 0.15 * len(rows), 1.6))
    below = axes.pop("below")
    choices = list(zip(("op", "expansion", "width"), COLOURS, MARKS))
    for stage, steps in stages.items():
        axis, at = axes[stage], [rows.index(stand) for stand in stands[stage]]
        values = np.full((len(rows), len(CANDIDATES)), np.nan)
        values[at] = [block["op"] for block in steps[-1][1]]
        image = axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        if f"A{stage}" in archs:
            axis.plot([list(CANDIDATES).index(b.op) for b in archs[f"A{stage}"].blocks], at, **RING)
        axis.set(title=f"A{stage}", facecolor="0.88", yticks=[])
        axis.set_xticks(range(len(CANDIDATES)), [op[3:].replace("_", " ") for op in CANDIDATES], rotation=90)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        dashes = ["-" if stand in oldest else ":" for stand in stands[stage]]
        for (name, colour, mark), dash in itertools.product(choices, "-:"):
            each = [[entropy(b[name]) for b, its in zip(blocks, dashes)
                     if its == dash and len(b.get(name, ())) > 1] for _, blocks in steps]
            if all(each):
                below.plot([done + step for step, _ in steps], [np.mean(some) for some in each], dash,
                           color=colour, marker=mark, ms=3, clip_on=False, label=name)
        below.text(done + steps[-1][0] / 2, 1.07, f"A{stage}", ha="center")
        done += steps[-1][0]
        below.axvline(done, color="0.6", lw=0.6)
    axes[min(axes)].set(ylabel="row of the table, block", yticks=range(len(rows)),
                        yticklabels=[f"{row + 2}.{place + 1}" for row, place in rows])
    figure.colorbar(image, ax=list(axes.values()), label="probability")
    below.set(xlim=(0, done), ylim=(0, 1.05), xlabel="weight steps",
              ylabel="mean entropy / log n\n(1 undecided, 0 decided)")
    handles = [Line2D([], [], color=colour, marker=mark, ms=3, label=name) for name, colour, mark in choices]
    handles += [Line2D([], [], color="0.3", ls=":", label="of blocks that A0 does not have"),
                Line2D([], [], label="of the derived network", **RING),
                Patch(facecolor="0.88", label="a block to come")]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return save(figure, path)


def entropy(p):
    """Of the probabilities of n options, over log n: 1 if all are alike, 0 if one is certain."""
    return -sum(q * math.log(q, len(p)) for q in p if q)


def save(figure, path):
    """Write a figure as PNG, whole or not at all, and return it."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    files.write(path, content.getvalue())
    return figure


@flags.command
def main(argv=None):
    p = flags.Parser("plot.py", __doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the pictures (the first run's)")
    args = p.parse_args(argv)
    for run in args.runs:
        if not (run / "summary.json").is_file():
            what = "has no summary.json: it is not the folder of a finished run"
            raise files.Refused(f"{run} {what if run.is_dir() else 'is not a folder'}")
    out, run = args.out or args.runs[0], args.runs[0]
    for read, what in ((results.curves, args.runs), (results.networks, run), (results.history, run)):
        with contextlib.suppress(results.Missing):
            read(what)                                      # a broken file ends it before a picture is drawn
    for draw, what in ((curve, args.runs), (architectures, run), (alphas, run)):
        path = out / f"{draw.__name__}.png"
        try:
            out.mkdir(parents=True, exist_ok=True)
            draw(what, path)
            print(f"{draw.__name__}: {path}")
        except results.Missing as error:
            print(f"plot.py: no {path.name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
