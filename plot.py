"""The curves and pictures, from a run's files alone (Figs. 3-6).

    python plot.py runs/001 [runs/002 ..]
"""
import argparse
import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")      # Okabe and Ito: told apart by all
MARKS = "osD^vP"


def table(summary):
    """The rows of a summary.json as text, a line a stage and one for the whole search."""
    lines = ["stage   MACs (M)  params (M)  accuracy (%)   seconds       kWh  CO2e (lb)"]
    for r in summary:
        right = "-" if r["accuracy"] is None else f"{100 * r['accuracy']:.1f}"
        lines.append(f"A{r['stage']:<6}{r['flops'] / 1e6:>9.2f} {r['params'] / 1e6:>11.3f} {right:>13} "
                     f"{r['seconds']:>9.1f} {r['kwh']:>9.5f} {r['co2e_lb']:>10.5f}")
    seconds, kwh, co2e = (sum(r[key] for r in summary) for key in ("seconds", "kwh", "co2e_lb"))
    return "\n".join([*lines, f"all    {'':>9} {'':>11} {'':>13} {seconds:>9.1f} {kwh:>9.5f} {co2e:>10.5f}"])


def curve(runs, path):
    """Accuracy against MACs (Fig. 3) and parameters (Fig. 4) of the networks of `runs`, folders; drawn
    into `path`.

    Open marks: with the supernet's weights, on the architecture split (summary.json). Filled: trained, on
    the test images (trained.json, which train.py leaves).
    """
    figure = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for n, run in enumerate(runs):
        style = {"color": COLOURS[n % len(COLOURS)], "marker": MARKS[n % len(MARKS)]}
        for file, words, more in (("summary.json", "supernet's weights, architecture split", {"mfc": "white", "ls": "--"}),
                                  ("trained.json", "trained, test images", {})):
            if not (Path(run) / file).exists():
                continue
            rows = [row for row in json.loads((Path(run) / file).read_text()) if row["accuracy"] is not None]
            rows.sort(key=lambda row: row["flops"])
            label = words if len(runs) == 1 else f"{Path(run).name}: {words}"
            for axis, key in zip(axes, ("flops", "params")):
                axis.plot([row[key] / 1e6 for row in rows], [100 * row["accuracy"] for row in rows], label=label, **style, **more)
                for row in rows:
                    axis.annotate(f"A{row['stage']}", (row[key] / 1e6, 100 * row["accuracy"]), (4, -11),
                                  textcoords="offset points", fontsize=8)
    axes[0].set(xlabel="MACs of one image (millions)", ylabel="top-1 accuracy (%)", title="accuracy against FLOPs (as Fig. 3)")
    axes[1].set(xlabel="parameters (millions)", title="accuracy against size (as Fig. 4)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    FigureCanvasAgg(figure).print_png(path)               # straight into a file: no screen is needed


def main(argv=None):
    p = argparse.ArgumentParser(prog="plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"plot.py: {message}\n")
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    p.add_argument("--out", type=Path, metavar="FILE", help="the picture (curve.png in the first run's folder)")
    args = p.parse_args(argv)
    for run in args.runs:
        if not (run / "summary.json").is_file():
            p.error(f"{run} has no summary.json: it is not the folder of a finished run")
    path = args.out or args.runs[0] / "curve.png"
    curve(args.runs, path)
    print(f"curve: {path}")


if __name__ == "__main__":
    sys.exit(main())
