"""Does the curriculum pay? Figures 5 and 6 of the paper with seeds: what each way of searching finds.

    python results/methods.py run        # searches, then trains: rows of searches.jsonl and networks.jsonl
    python results/methods.py            # figure5.png and figure6.png, and what they show as text

Every way searches with the same seeds, on the same images, for the same targets. A0 is the same for nearly
all of them: there nothing grows, and nobody teaches. Networks are trained as compare.py trains them.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from machinery import flags, processes
from machinery.pictures import COLOURS, save, styled

import numpy as np
from matplotlib.figure import Figure

import flops
from budget import scale
from results import networks
from results.compare import interval, paired

ALPHA = ["--draw", "alpha"]                     # the default was this when the ways were searched
CURRICULUM = " ".join(("searched", *ALPHA))     # as compare.py names it
# search.py's flags of each way. The paper gives each stage of a direct search as many epochs as A0; all
# others have the same epochs.
SEARCHED = {CURRICULUM: ALPHA,
            "searched": [],
            "direct": ["--method", "direct", "--epochs", "1", *ALPHA],
            "naive": ["--method", "naive", *ALPHA],
            "no distillation": ["--no-distill", *ALPHA],
            "no growth": ["--no-grow", *ALPHA],
            "neither": ["--no-grow", "--no-distill", *ALPHA],
            "network teaches": ["--teacher", "network", *ALPHA],
            "zero": ["--widen", "zero", *ALPHA],
            "split": ["--widen", "split", *ALPHA]}
OWN_A0 = {CURRICULUM, "searched"}               # of all others A0 is that of the curriculum
SCALED = {"scaling": ALPHA, "scaling searched": []}             # flags of the searches whose A0 is scaled up
CURRICULUM_OF = {"scaling searched": "searched"}                # of all others it is `CURRICULUM`
WORDS = {CURRICULUM: "AdaSearch (CST)", "direct": "direct search", "naive": "naive progressive search",
         "scaling": "compound scaling-up", "random": "random networks", "neither": "baseline",
         "no distillation": "SuperNet2SuperNet alone", "no growth": "distillation alone"}
FIGURES = {"figure5": (CURRICULUM, "direct", "naive", "scaling", "random"),
           "figure6": (CURRICULUM, "no distillation", "no growth", "neither")}


def found(args):
    """[(kind, search seed, Arch), ..]: what the searches have derived for the stages, and A0's scaled up;
    and as many random networks of A0's space scaled up.
    """
    grown, archs = [stage for stage in args.stages if stage], []
    for kind, given in SEARCHED.items():
        stages = args.stages if kind in OWN_A0 else grown
        archs += [(kind, seed, arch) for seed, arch in networks.derived(given, args.searches, stages)]
    bases = [(kind, seed, base) for kind, given in SCALED.items()
             for seed, base in networks.derived(given, args.searches, [0])]
    drawn = networks.random_networks(0, args.searches)
    bases += [("random scaled", n, base) for n, base in enumerate(drawn)]
    return archs + [(kind, n, scale(base, stage, flops.TARGETS["small"][stage]))
                    for kind, n, base in bases for stage in grown]


def run(args):
    """Search by each way, and train what it derives."""
    for given in SEARCHED.values():
        networks.search_all(range(args.searches), args.runs, given, args.jobs)
    networks.train_all([(kind, seed, arch, 0, args.epochs) for kind, seed, arch in found(args)], args)


def trained(args):
    """{(kind, stage): {number: (MACs in M, accuracy in %)}}; but for `OWN_A0` A0 is its curriculum's."""
    table = {(kind, stage): numbers for stage in range(5)
             for kind, numbers in networks.trained(stage, args.epochs).items()}
    for kind in {kind for kind, _ in table} & {*SEARCHED, *SCALED} - OWN_A0:
        first = table.get((CURRICULUM_OF.get(kind, CURRICULUM), 0), {})
        table[kind, 0] = {n: point for n, point in first.items() if n < args.searches}
    return table


def text(args):
    """Print a line a way and stage: its accuracy, and by how much the curriculum's is above it. Ways that
    search are compared seed by seed, and over all grown stages by the means of their seeds.
    """
    table = trained(args)
    print("mean accuracy +- deviation (n), and the curriculum's less it +- half of the 95 % interval")
    for kind in [*SEARCHED, *SCALED, "random scaled", "random"]:
        differences = []                                        # a dict of search seeds a stage
        for stage in args.stages:
            points = table.get((kind, stage), {})
            ours = table.get((CURRICULUM_OF.get(kind, CURRICULUM), stage), {})
            if len(points) < 2 or len(ours) < 2:
                continue
            accuracies = [accuracy for _, accuracy in points.values()]
            line = f"A{stage} {kind:21} {np.mean(accuracies):.2f} +- {np.std(accuracies, ddof=1):.2f}"
            if kind.startswith("random"):
                difference, half = interval([accuracy for _, accuracy in ours.values()], accuracies)
                line += f" ({len(points)})  {difference:+.2f} +- {half:.2f}"
            elif kind != CURRICULUM and (stage or kind in OWN_A0):
                difference = {n: ours[n][1] - points[n][1] for n in points.keys() & ours.keys()}
                line += f" ({len(points)})"
                if len(difference) > 1:
                    line += "  {:+.2f} +- {:.2f}".format(*paired([*difference.values()]))
                if stage:
                    differences.append(difference)
            print(line)
        if differences:
            seeds = set.intersection(*map(set, differences))
            means = [np.mean([each[n] for each in differences]) for n in seeds]
            if len(means) > 1:
                print("all of them, {:21} {:+.2f} +- {:.2f} ({})".format(kind, *paired(means), len(means)))


@styled
def picture(kinds, args, path):
    """Draw accuracy against MACs, a line a way at the means of its stages. One deviation is shaded for the
    first way, and a bar for the others, which stand side by side.
    """
    table, figure = trained(args), Figure((4.6, 3.2))
    axis = figure.subplots()
    for which, (colour, kind) in enumerate(zip(COLOURS, kinds)):
        stages = [stage for stage in range(5) if len(table.get((kind, stage), ())) > 1]
        if not stages:
            continue                                        # nothing is trained yet
        points = [np.array([*table[kind, stage].values()]) for stage in stages]
        x, y = (np.array([part[:, column].mean() for part in points]) for column in (0, 1))
        spread = np.array([part[:, 1].std(ddof=1) for part in points])
        counts = sorted({len(part) for part in points})
        n = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        label = f"{WORDS[kind]} (n = {n})"
        if which == 0:
            axis.plot(x, y, "o-", color=colour, label=label)
            axis.fill_between(x, y - spread, y + spread, color=colour, alpha=0.15, lw=0)
            for stage, place in zip(stages, x):
                axis.annotate(f"A{stage}", (place, 1), xycoords=("data", "axes fraction"), ha="center")
        else:
            axis.plot(x, y, ".--", color=colour, label=label)
            axis.errorbar(x + 0.025 * which, y, spread, color=colour, ls="", elinewidth=0.8)
    axis.set(xlabel="MACs (M)", ylabel="accuracy (%), mean and one deviation")
    axis.legend(loc="lower right")
    return save(figure, path)


@flags.command
def main(argv=None):
    p = networks.parser("methods.py", __doc__, searches=5)
    p.add_argument("what", nargs="?", choices=("run", "draw"), default="draw", help="(draw)")
    args = p.parse_args(argv)
    processes.choose_device(args.device)                        # refused here, and not after the searches
    if args.what == "run":
        return run(args)
    text(args)
    for name, kinds in FIGURES.items():
        picture(kinds, args, networks.HERE / f"{name}.png")


if __name__ == "__main__":
    main()
