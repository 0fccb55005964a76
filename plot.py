"""The curves and pictures of runs, from the files in their folders alone (Figs. 3-6).

    python plot.py runs/001 [runs/002 ..]

curve.png          accuracy against MACs and parameters, of all runs. Those that differ in the seed alone
                   are one line: the mean, with the standard deviation as error bars. Filled marks: trained,
                   on the test images. Open: with the supernet's weights, on the validation images, the
                   sixth of the training images that these weights did not see
architectures.png  the networks A0..A4 of the first run, a box a block, as high as its output is wide (stem
                   and head are cut); blocks of one row of the paper's tables stand together
alphas.png         what the first run's supernets chose, and when. Above: probabilities of the operations at
                   the end of each stage. Below: mean entropy of each choice, over the uniform distribution's,
                   a line for the blocks that came in the same stage; it breaks where the supernet grew
search.gif         (--animate) the first run's search as a film of a few seconds
"""
from machinery import files, flags, pictures, results
from machinery.pictures import COLOURS, save, styled

import contextlib
import itertools
import math
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

MARKS = "osD^vPX"                                               # one more than colours: 42 different pairs
STARS = "*Xd<>8"                                                # of networks that were not searched
DRAWN = {"trained.json": ("trained, test images", {}),
         "summary.json": ("supernet's weights, validation images", {"mfc": "white", "ls": "--"})}


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
        n = "..".join(map(str, sorted({min(sizes), max(sizes)}))) + " seed" + "s" * (max(sizes) > 1)
        handles.append(Line2D([], [], **look | DRAWN[kinds[0]][1] | {"ls": ""}, label=f"{label}, {n}"))
    if any(len(seeds) > 1 for points in lines.values() for seeds in points.values()):
        handles.append(Line2D([], [], color="0.3", marker="|", ms=8, label="standard deviation over seeds"))
    columns = 2 if max(len(handle.get_label()) for handle in handles) < 50 else 1        # of the legend
    figure = Figure((7.2, 2.7 * len(kinds) + 0.4 + 0.17 * math.ceil(len(handles) / columns)))
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
            # Many labels would only be in the way: the points of the other lines are A0, A1, .. as well.
            alike = (label, searched) in [*looks][2:] and [*points] == [f"A{n}" for n in range(len(points))]
            for (name, seeds), (*at, y) in zip(points.items(), mean):
                alone = len(seeds) == 1 < most
                words = name.removeprefix(label).strip() + " (1 seed)" * alone if alone or not alike else ""
                texts.append((at[column], y, words, alone or not searched, looks[label, searched]["color"]))
        notes[axis] = texts
        axis.grid(which="both", alpha=0.3, lw=0.5)
        axis.margins(0.12)
        x, scale = [x for x, *_ in texts], ""
        if max(x) > 5 * min(x):                             # else one network leaves most of it empty
            scale = ", log scale"
            axis.set_xscale("log", subs=(2, 5))
            axis.xaxis.set(major_formatter="{x:g}", minor_formatter="{x:g}")
        axis.set(xlabel=("MACs of one image (millions{})", "parameters (millions{})")[column].format(scale),
                 ylabel=f"top-1 accuracy (%)\n{DRAWN[kind][0]}")
        axis.label_outer()
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    figure.draw_without_rendering()                         # now it is known where everything is
    figure.set_layout_engine("none")
    for axis, texts in notes.items():
        place(axis, texts)
    return save(figure, path)


def place(axis, texts):
    """Annotate points (x, y, text, needed, colour), the last first, where no line, error bar, frame or other
    text is and no other point is as near. A text without such a place is left out; a needed one may cross one
    line.
    """
    taken, unit = [], axis.figure.dpi / 72                  # a typographic point, in pixels
    points = axis.transData.transform([text[:2] for text in texts])
    paths = [line.get_path() for line in axis.lines if line.get_linestyle() != "None"]
    paths += [path for bars in axis.collections for path in bars.get_paths()]
    paths = [axis.transData.transform_path(path) for path in paths]
    sides = ((1, -1), (-1, 1), (1, 0), (0, -1), (0, 1), (-1, 0), (1, 1), (-1, -1))      # the best one first
    for (x, y, text, needed, colour), point in reversed([*zip(texts, points)]):
        for most, far, (right, up) in itertools.product(range(1 + needed), (4, 7, 10), sides if text else ()):
            note = axis.annotate(text, (x, y), (far * right, far * up), color=colour,
                                 textcoords="offset points", ha=("center", "left", "right")[right],
                                 va=("center", "bottom", "top")[up])
            box = note.get_window_extent().padded(1)
            own, *gaps = (math.dist(p, np.clip(p, box.min, box.max)) for p in (point, *points))
            if (all(axis.bbox.contains(*corner) for corner in box.corners())
                    and not any(map(box.overlaps, taken)) and sum(gap < own + unit for gap in gaps) == 1
                    and sum(path.intersects_bbox(box, filled=False) for path in paths) <= most):
                taken.append(box)
                break
            note.remove()


@flags.command
def main(argv=None):
    p = flags.Parser("plot.py", __doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    p.add_argument("--animate", action="store_true", help="draw search.gif as well")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the pictures (the first run's)")
    args = p.parse_args(argv)
    for run in args.runs:
        if not (run / "summary.json").is_file():
            what = "has no summary.json: it is not the folder of a finished run"
            raise files.Refused(f"{run} {what if run.is_dir() else 'is not a folder'}")
    out, run = args.out or args.runs[0], args.runs[0]
    for read, what in ((results.curves, args.runs), (results.archs, run), (results.history, run)):
        with contextlib.suppress(results.Missing):
            read(what)                                      # a broken file ends it before a picture is drawn
    drawn = [("curve.png", curve, args.runs), ("architectures.png", pictures.architectures, run),
             ("alphas.png", pictures.alphas, run), ("search.gif", pictures.search, run)]
    for name, draw, what in drawn[:3 + args.animate]:
        try:
            out.mkdir(parents=True, exist_ok=True)
            draw(what, out / name)
            print(f"{name.partition('.')[0]}: {out / name}")
        except results.Missing as error:
            print(f"plot.py: no {name}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
