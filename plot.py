"""The curves and pictures of runs, from the files in their folders alone (Figs. 3-6).

    python plot.py runs/001 [runs/002 ..]

curve.png          accuracy against MACs and parameters, of all runs. Those that differ in the seed alone
                   are one line: the mean, with the standard deviation as error bars
architectures.png  the networks A0..A4 of the first run, a box a block
alphas.png         what the first run's supernets chose, and when: probabilities and their entropy

Made for print: 8 points at a width of 7.2 inches (more for more than 18 blocks), colours that everybody can
tell apart, and beside each colour a mark, a hatch or a dash.
"""
from machinery import files, flags, results
from machinery.results import Missing

import io
import itertools
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from space import CANDIDATES, SPACES

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")      # Okabe and Ito's
MARKS = "osD^vPX"                                               # one more than colours: 42 different pairs
STARS = "*Xd<>8"                                                # of networks that were not searched
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 8, "xtick.labelsize": 8,
         "ytick.labelsize": 8, "axes.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 5,
         "hatch.linewidth": 0.7, "patch.linewidth": 0.7, "axes.spines.top": False,
         "axes.spines.right": False, "legend.frameon": False, "text.parse_math": False}
DRAWN = {"trained.json": ("trained, test images", {}),
         "summary.json": ("supernet's weights, validation images", {"mfc": "white", "ls": "--"})}
STEM, HEAD = (-1, 0), (99, 0)                                   # columns of architectures.png
# Warm is ReLU and cool is hswish, dark has squeeze-excite; in grey these are four steps. Hatched is 5x5.
FILLS = {"": ("#F0E442", "ReLU"), "_hs": ("#56B4E9", "hswish"), "_se": ("#D55E00", "SE, ReLU"),
         "_se_hs": ("#0072B2", "SE, hswish")}


def curve(runs, path):
    """Accuracy against MACs (Fig. 3) and parameters (Fig. 4) of the networks of `runs`, folders, into `path`.

    Open marks: with the supernet's weights, on the sixth of the training images that the weights did not see
    (summary.json). Filled: trained, on the test images (trained.json). Returns the figure.
    """
    lines, others = results.curves(runs)
    kinds = {line.file for line in lines} | ({"trained.json"} if others else set())
    kinds = [file for file in results.FILES if file in kinds]
    if not kinds:
        raise Missing(f"{' '.join(map(str, runs))}: no accuracy in summary.json or trained.json")
    handles, styles = [], {}
    for n, label in enumerate(dict.fromkeys(line.label for line in lines)):
        sizes = [len(points) for line in lines if line.label == label for points in line.points.values()]
        styles[label] = {"color": COLOURS[n % len(COLOURS)], "marker": MARKS[n % len(MARKS)]}
        handles.append(Line2D([], [], **styles[label], **DRAWN[kinds[0]][1] | {"ls": ""},
                              label=counted(label, sizes)))
    families = dict(zip(dict.fromkeys(name.partition(" x")[0] for name in others), itertools.cycle(STARS)))
    for family, mark in families.items():
        sizes = [len(points) for name, points in others.items() if name.partition(" x")[0] == family]
        handles.append(Line2D([], [], color="black", marker=mark, ms=7, ls="", label=counted(family, sizes)))
    if any(len(p) > 1 for group in (others, *(line.points for line in lines)) for p in group.values()):
        handles.append(Line2D([], [], color="0.3", marker="|", ms=8, lw=0.8,
                              label="standard deviation over n seeds"))
    with styled():
        figure = blank(7.2, 2.7 * len(kinds) + 0.4 + 0.17 * math.ceil(len(handles) / 2))
        panels, notes = figure.subplots(len(kinds), 2, sharex="col", sharey="row", squeeze=False), {}
        for (row, file), column in itertools.product(enumerate(kinds), (0, 1)):
            axis, bars = panels[row, column], {"elinewidth": 0.8, "capsize": 2}
            texts = notes[axis] = []
            for name, points in others.items() if file == "trained.json" else ():
                (mean, std), (family, _, width) = results.mean_std(points), name.partition(" x")
                axis.errorbar(mean[column], mean[2], std[2], std[column], label=name, color="black",
                              marker=families[family], ms=7, **bars)
                texts.append((*mean[[column, 2]], f"x{width}" if width else "", True))
            for n, line in enumerate(line for line in lines if line.file == file):
                mean, std = (np.array(values) for values in zip(*map(results.mean_std, line.points.values())))
                axis.errorbar(mean[:, column], mean[:, 2], std[:, 2], std[:, column], label=line.label,
                              **bars, **styles[line.label], **DRAWN[file][1])
                # Many labels would only be in the way: the points of the other lines are A0, A1, .. as well.
                shown = n < 2 or list(line.points) != [f"A{n}" for n in range(len(line.points))]
                most = max(map(len, line.points.values()))
                for at, (name, points) in zip(mean, line.points.items()):
                    text = name + " (n = 1)" * (len(points) == 1 < most) if shown else ""
                    texts.append((*at[[column, 2]], text, False))
            axis.grid(alpha=0.3, lw=0.5)
            axis.margins(0.12)
            x = np.concatenate([line.get_xdata() for line in axis.lines]).astype(float)
            if np.nanmax(x) > 5 * np.nanmin(x):
                axis.set_xscale("log")                        # else one network leaves most of it empty
                axis.xaxis.set_major_formatter("{x:g}")
                axis.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
                axis.tick_params("x", which="minor", pad=5)   # as low as the others
            axis.set(xlabel=("MACs of one image (millions)", "parameters (millions)")[column],
                     ylabel=f"top-1 accuracy (%)\n{DRAWN[file][0]}")
            axis.label_outer()
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        figure.draw_without_rendering()                       # now it is known where everything is
        figure.set_layout_engine("none")
        for axis, texts in notes.items():
            place(axis, texts)
    return save(figure, path)


def counted(label, sizes):
    """A label, and of how many seeds its points are the means."""
    return f"{label}, n = " + "..".join(map(str, sorted({min(sizes), max(sizes)})))


def place(axis, texts):
    """Annotate points (x, y, text, needed) where no line, mark, error bar, frame or other text is, and none
    of the other points is as near. A text without such a place goes to the best if needed, else is left out.
    A point may have no text.
    """
    unit, mark = axis.figure.dpi / 72, np.array(list(itertools.product((-3, 0, 3), repeat=2)))    # in points
    paths = [(line.get_xydata(), line.get_linestyle() != "None") for line in axis.lines]
    paths += [(np.reshape(bar, (-1, 2)), True) for bars in axis.collections for bar in bars.get_segments()]
    ink = [np.zeros((0, 2))]                                                            # pixels drawn on
    for path, joined in paths:
        path = axis.transData.transform(path[np.isfinite(path).all(1)])
        ink.append((path[:, None] + unit * mark).reshape(-1, 2))
        for a, b in itertools.pairwise(path) if joined else ():
            ink.append(a + (b - a) * np.linspace(0, 1, 2 + int(math.dist(a, b) / unit))[:, None])
    ink, taken, frame = np.concatenate(ink), [], axis.get_window_extent()
    sides = ((1, -1), (-1, 1), (1, 0), (0, -1), (0, 1), (-1, 0), (1, 1), (-1, -1))      # the best one first
    points = axis.transData.transform(np.reshape([text[:2] for text in texts], (-1, 2)))
    for n, (x, y, text, needed) in enumerate(texts):
        if not text:
            continue
        note, tried = axis.annotate(text, (x, y), (0, 0), textcoords="offset points"), {}
        for where in itertools.product((4, 7, 12) if needed else (4, 7), sides):
            box = move(note, *where)
            inside = (frame.min < box.min).all() and (box.max < frame.max).all()
            gaps = np.hypot(*np.maximum(np.maximum(box.min - points, points - box.max), 0).T)
            tried[where] = (((ink > box.min) & (ink < box.max)).all(1).sum()
                            + 20 * ((gaps < gaps[n] + unit).sum() - 1)
                            + 200 * sum(map(box.overlaps, taken)) + 900 * (not inside))
        best = min(tried, key=tried.get)
        if needed or not tried[best]:
            taken.append(move(note, *best))
        else:
            note.remove()


def move(note, far, side):
    """Put an annotation so many points to a side (right, up) of what it annotates. Its box in pixels."""
    right, up = side
    note.set(position=(far * right, far * up), ha=("center", "left", "right")[right],
             va=("center", "bottom", "top")[up])
    return note.get_window_extent(note.figure.canvas.get_renderer()).padded(1)


def positions(arch):
    """Where each block of an `Arch` or a `Space` stands: (its row in the tables, its place in that row)."""
    row, place, found = -1, 0, []
    for block in arch.blocks:
        row, place = (row, place + 1) if block.residual else (row + 1, 0)
        found.append((row, place))
    return found


def expansion(arch, column, inputs, hidden):
    """The expansion of a block as its table has it, if one there gives this hidden width; else the ratio."""
    space = SPACES[arch.space][arch.stage].blocks if arch.space in SPACES and arch.stage < 5 else ()
    for block in space:
        for n, option in enumerate(block.expansions):
            if (block.row, block.place) == column and block.hidden(inputs, n) == hidden:
                return f"{option:g}"
    return f"{hidden / inputs:.2g}"


def architectures(run, path):
    """The networks A0..A4 of `run`, a folder, into `path`: a row a network, a box a block, as high as its
    output is wide. Blocks of one row of the paper's tables stand together; stem and head are grey, and cut
    where they are wider than every block. Returns the figure.
    """
    archs, rows = results.networks(run), results.measured(Path(run) / "summary.json")
    macs = {name: flops for name, _, flops, *_ in rows}
    pixels = {}                                             # a side of the output, a column of boxes
    for arch in archs.values():
        side = pixels[STEM] = (arch.resolution + 1) // 2
        for column, block in zip(positions(arch), arch.blocks):
            pixels[column] = pixels[HEAD] = side = (side + 1) // 2 if block.stride == 2 else side
    columns, widest = sorted(pixels), max(b.out for arch in archs.values() for b in arch.blocks)
    rows = sorted({row for row, _ in columns})
    step, tall = min(0.6, max(0.29, 5.3 / len(columns))), 0.6                                 # all in inches
    left = {column: 0.95 + n * step + 0.12 * rows.index(column[0]) for n, column in enumerate(columns)}
    right, height = left[columns[-1]] + step, 1.2 * len(archs) + 0.85
    with styled():
        figure = blank(max(7.2, right + 0.05), height, None)
        axis = figure.add_axes((0, 0, 1, 1), xlim=(0, max(7.2, right + 0.05)), ylim=(0, height))
        axis.set_axis_off()
        axis.text(0.87, height - 0.2, "pixels", ha="right", color="0.35")
        for size, same in itertools.groupby(columns, pixels.get):
            start, *_, end = [left[column] for column in same] * 2
            axis.plot([start + 0.08 * step, end + 0.92 * step], [height - 0.26] * 2, color="0.6", lw=0.8)
            axis.text((start + end + step) / 2, height - 0.2, f"{size}×{size}" if end > start else size,
                      ha="center")
        for n, (name, arch) in enumerate(archs.items()):
            base = height - 1.2 * n - 0.4 - tall
            axis.plot([0.95, right], [base, base], color="0.6", lw=0.8, zorder=0)
            axis.text(0.1, base + 0.24, name, weight="bold", fontsize=10)
            if name in macs:
                axis.text(0.1, base + 0.05, f"{macs[name]:.{2 if macs[name] < 100 else 0}f} M MACs")
            for down, word in ((0.15, "kernel"), (0.28, "width"), (0.41, "expansion")):
                axis.text(0.87, base - down, word, ha="right", color="0.35")
            boxes = [(STEM, arch.stem, "3×3", "", 2, {"facecolor": "0.85"}),
                     (HEAD, arch.head, "1×1", "", 1, {"facecolor": "0.85"})]
            for column, inputs, b in zip(positions(arch), arch.inputs(), arch.blocks):
                kernel = CANDIDATES[b.op][0]
                fill = {"facecolor": FILLS[b.op[5:]][0], "hatch": "////" if kernel == 5 else None}
                factor = expansion(arch, column, inputs, b.hidden)
                boxes.append((column, b.out, f"{kernel}×{kernel}", factor, b.stride, fill))
            for column, out, kernel, factor, stride, fill in boxes:
                start, high = left[column] + 0.08 * step, tall * min(1, out / widest)
                axis.add_patch(Rectangle((start, base), 0.84 * step, high, edgecolor="black", **fill))
                for down, word in zip((0.15, 0.28, 0.41), (kernel, out, factor)):
                    axis.text(start + 0.42 * step, base - down, word, ha="center")
                if stride == 2:
                    axis.plot(start + 0.42 * step, base + high + 0.07, "v", color="black")
        handles = [Patch(facecolor=colour, edgecolor="black", hatch=hatch, label=f"{kernel}, {words}")
                   for colour, words in FILLS.values()
                   for kernel, hatch in (("3×3", None), ("5×5", "////"))]
        handles += [Line2D([], [], color="black", marker="v", ls="", label="stride 2"),
                    Patch(facecolor="0.85", edgecolor="black", label="stem, head")]
        figure.legend(handles=handles, loc="lower center", ncols=5)
    return save(figure, path)


def alphas(run, path):
    """What the supernets of `run`, a folder, chose, and when; drawn into `path`. Returns the figure.

    Above: the probabilities of the operations at the end of each stage, blocks in rows as in the tables.
    Below: the mean entropy of each choice, over that of the uniform distribution; of the blocks that A0 has,
    and of those that came later, dotted. Refused if the log has no probabilities.
    """
    stages, archs = results.history(run), results.networks(run)
    stands = {}
    for stage, steps in stages.items():
        with results.reading(run):                          # a stage that has not ended has no network
            arch = archs.get(f"A{stage}") or SPACES[next(iter(archs.values())).space][stage]
            stands[stage] = positions(arch)
        if len(arch.blocks) != len(steps[-1][1]):
            raise files.Refused(f"{run}: log.jsonl has {len(steps[-1][1])} blocks of A{stage}, but the "
                                f"network {len(arch.blocks)}")
    rows, oldest, before, done = sorted(set().union(*stands.values())), stands[min(stands)], [], 0
    ring = {"marker": "o", "mfc": "none", "mec": "#D55E00", "ms": 5, "ls": "", "mew": 1.2}
    with styled():
        figure = blank(max(4.5, 0.8 + 1.28 * len(stages)), 2.8 + 0.15 * len(rows))
        grid = figure.add_gridspec(2, len(stages), height_ratios=(0.6 + 0.15 * len(rows), 1.6))
        below = figure.add_subplot(grid[1, :])
        for n, (stage, steps) in enumerate(stages.items()):
            at, axis = [rows.index(stand) for stand in stands[stage]], figure.add_subplot(grid[0, n])
            values = np.full((len(rows), len(CANDIDATES)), np.nan)
            values[at] = [b["op"] for b in steps[-1][1]]
            image = axis.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for row, block in zip(at, archs[f"A{stage}"].blocks if f"A{stage}" in archs else ()):
                axis.plot(list(CANDIDATES).index(block.op), row, **ring)
            names = [f"{row + 2}.{place + 1}" for row, place in rows]
            if n:
                names = ["+" if stand in stands[stage] and stand not in before else "" for stand in rows]
            before = stands[stage]
            axis.set(title=f"A{stage}", facecolor="0.88")
            axis.set_yticks(range(len(rows)), names)
            axis.set_ylabel("" if n else "row of the table, block", loc="top")
            words = [op[3:].replace("_", " ") for op in CANDIDATES]
            axis.set_xticks(range(len(CANDIDATES)), words, rotation=90)
            axis.xaxis.tick_top()
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            begin, done = done, done + steps[-1][0]
            old = [i for i, stand in enumerate(stands[stage]) if stand in oldest]
            for which, dash in ((old, "-"), (sorted(set(range(len(at))) - set(old)), ":")):
                for i, (name, mean) in enumerate(results.entropies(steps, which).items()):
                    below.plot([begin + step for step, _ in steps], mean, dash, color=COLOURS[i],
                               marker=MARKS[i], ms=3, clip_on=False, label="_" * (n or dash == ":") + name)
            below.axvline(done, color="0.6", lw=0.6)
            below.text((begin + done) / 2, 1.07, f"A{stage}", ha="center")
        figure.colorbar(image, ax=figure.axes[1:], label="probability")
        below.set(xlim=(0, done), ylim=(0, 1.05), xlabel="weight steps",
                  ylabel="mean entropy / log n\n(1 undecided, 0 decided)")
        handles = [*below.get_legend_handles_labels()[0],
                   Line2D([], [], color="0.3", ls=":", label="of blocks that A0 does not have"),
                   Line2D([], [], label="of the derived network", **ring),
                   Line2D([], [], color="black", marker="+", ls="", label="a new block")]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return save(figure, path)


def styled():
    """A context of matplotlib's own defaults and our `STYLE`, whatever the user's matplotlibrc says."""
    return style.context(STYLE, after_reset=True)


def blank(width, height, layout="constrained"):
    """An empty figure of so many inches that needs no screen."""
    figure = Figure((width, height), dpi=200, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def save(figure, path):
    """Write a figure as PNG, whole or not at all, and return it."""
    content = io.BytesIO()
    with styled():
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
        if not run.is_dir():
            p.error(f"{run} is not a folder")
        if not (run / "summary.json").is_file():
            p.error(f"{run} has no summary.json: it is not the folder of a finished run")
    out, run = args.out or args.runs[0], args.runs[0]
    for read, what in ((results.curves, args.runs), (results.networks, run), (results.history, run)):
        try:
            read(what)  # a broken file ends it before a picture is drawn
        except Missing:
            continue
    for draw, what in ((curve, args.runs), (architectures, run), (alphas, run)):
        path = out / f"{draw.__name__}.png"
        try:
            out.mkdir(parents=True, exist_ok=True)
            draw(what, path)
            print(f"{draw.__name__}: {path}")
        except Missing as error:
            print(f"plot.py: no {path.name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
