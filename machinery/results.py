"""What a run has left in its folder, read back for tables and pictures: accuracies, networks, probabilities.

A broken file is refused by its name; `Missing` is what a run never had.
"""
from machinery import files

import contextlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from space import CANDIDATES, Arch

FILES = ("trained.json", "summary.json")                        # what accuracies stand in
NAMED, NO_SETTING = ("method", "data", "space"), ("seed", "device", "checkpoint_every", "workers")


WORDS = {"cst": "curriculum search", "direct": "direct search", "naive": "naive growth",
         "scaling": "compound scaling", "fashion": "Fashion-MNIST", "cifar10": "CIFAR-10",
         "cifar100": "CIFAR-100", "fake": "patterns", "small": "small space", "paper": "paper's space"}


class Missing(files.Refused):
    """A run does not have what a picture shows, though nothing is wrong with it."""


@contextlib.contextmanager
def reading(file):
    """What goes wrong in here, with a file that a run left, is refused with the file's name."""
    try:
        yield
    except files.Refused:
        raise
    except OSError as error:
        raise files.Refused(f"{file}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise files.Refused(f"{file} is not JSON ({error})") from None
    except (ArithmeticError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise files.Refused(f"{file} is not what a run writes ({error!r})") from None


def printable(text):
    """A text that can be drawn: of names of files that are no UTF-8, and of what begins with an underscore,
    which matplotlib would leave out of a legend.
    """
    text = str(text).encode(errors="backslashreplace").decode()
    return f" {text}" if text.startswith("_") else text


def table(summary):
    """The rows of a summary.json as text, a line a stage and one for the whole search."""
    lines = ["stage   MACs (M)  params (M)  accuracy (%)   seconds       kWh  CO2e (lb)"]
    for r in summary:
        accuracy = "-" if r["accuracy"] is None else f"{100 * r['accuracy']:.1f}"
        lines.append(f"A{r['stage']:<6}{r['flops'] / 1e6:>9.2f} {r['params'] / 1e6:>11.3f} {accuracy:>13} "
                     f"{r['seconds']:>9.1f} {r['kwh']:>9.5f} {r['co2e_lb']:>10.5f}")
    seconds, kwh, co2e = (sum(r[key] for r in summary) for key in ("seconds", "kwh", "co2e_lb"))
    return "\n".join([*lines, f"all    {'':>9} {'':>11} {'':>13} {seconds:>9.1f} {kwh:>9.5f} {co2e:>10.5f}"])


def measured(file):
    """The rows of a summary.json or trained.json, none if it is not there, whose accuracy was measured:
    [(name, init, MACs in M, parameters in M, accuracy in %), ..]; init is train.py's, or "scratch".
    """
    if not file.exists():
        return []
    with reading(file):
        rows = [row for row in files.read_json(file, list) if row["accuracy"] is not None]
        for row in rows:
            counts = row["flops"], row["params"]
            if not (all(0 < n < math.inf for n in counts) and 0 <= row["accuracy"] <= 1):
                raise ValueError(f"{row['flops']} MACs, {row['params']} parameters, accuracy "
                                 f"{row['accuracy']}")
        return [(printable(row.get("name", f"A{row['stage']}")), printable(row.get("init", "scratch")),
                 row["flops"] / 1e6, row["params"] / 1e6, 100 * row["accuracy"]) for row in rows]


def experiments(runs):
    """{label: folders}: runs whose args.json differ in the seed alone are one experiment.

    A label names method, data and space, and of those that share all three what else tells them apart.
    """
    groups = {}
    for run in map(Path, runs):
        args = {"method": run.resolve().name, "run": str(run)}
        if (run / "args.json").exists():
            args = files.read_json(run / "args.json")
        key = json.dumps({k: v for k, v in args.items() if k not in NO_SETTING}, sort_keys=True)
        twin = groups.setdefault(key, {}).setdefault(str(args.get("seed")), run)
        if twin is not run:
            raise files.Refused(f"{run} has the settings and the seed of {twin}: name one of them")
    settings, labels = [json.loads(key) for key in groups], []
    for mine in settings:
        alike = [other for other in settings if all(other.get(k) == mine.get(k) for k in NAMED)]
        words = [WORDS.get(mine[k], Path(str(mine[k])).name) for k in NAMED if k in mine]
        for k, v in mine.items():
            if k not in (*NAMED, "run") and not isinstance(v, list) and any(o.get(k, v) != v for o in alike):
                words.append({True: k, False: f"no {k}"}[v] if isinstance(v, bool) else f"{k} {v}")
        labels.append(printable(", ".join(words)))
    members = [list(seeds.values()) for seeds in groups.values()]
    return {label if labels.count(label) == 1 else printable(f"{label} ({folders[0]})"): folders
            for label, folders in zip(labels, members)}


class Line(NamedTuple):
    """One line of the curve. points: {"A0": array (runs, 3)} of MACs (M), parameters (M), accuracy (%)."""
    label: str
    file: str
    points: dict


def curves(runs):
    """([`Line`, ..], {name: array (n, 3)}): the lines of `runs`, and other networks in their trained.json.

    Networks that were trained from the supernet's weights are a line of their own.
    """
    lines, others = [], {}
    for (label, folders), file in itertools.product(experiments(runs).items(), FILES):
        inits = {}
        for name, init, *point in (row for run in folders for row in measured(run / file)):
            if re.fullmatch("A[0-4]", name):
                inits.setdefault(init, {}).setdefault(name, []).append(point)
            elif point not in others.setdefault(name, []):          # several runs may hold the same network
                others[name].append(point)
        for init, points in sorted(inits.items(), reverse=True):
            lines.append(Line(label if init == "scratch" else f"{label}, {init}", file,
                              {name: np.array(points[name]) for name in sorted(points)}))
    return lines, {name: np.array(points) for name, points in others.items()}


def mean_std(points):
    """(mean, standard deviation) over the rows of (n, 3): that of a sample, with n - 1, so NaN of one row."""
    mean = points.mean(0)
    return mean, points.std(0, ddof=1) if len(points) > 1 else np.full_like(mean, np.nan)


def networks(run):
    """{"A0": its `Arch`, ..} of A0.json .. in a run's folder."""
    archs = {}
    for file in sorted(Path(run).glob("A[0-4].json")):
        with reading(file):
            archs[file.stem] = arch = Arch.from_json(file.read_text())
            if max(arch.resolution, arch.stem, arch.head, *(b.out for b in arch.blocks)) > 10 ** 6:
                raise ValueError("a width or a resolution beyond a million")
    if not archs:
        raise Missing(f"{run} has no networks A0.json, A1.json, ..")
    return archs


def history(run):
    """{stage: [(step, blocks), ..]}: the probabilities in a run's log.jsonl; a dict a block, by choice."""
    file, stages = Path(run) / "log.jsonl", {}
    with reading(file):
        for row in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
            for step, blocks in row.get("alphas", []):
                for p in (p for block in blocks for p in block.values()):
                    if not (min(p) >= 0 and abs(sum(p) - 1) <= 1e-3):        # NaN is neither
                        raise ValueError(f"{p} are not probabilities")
                if any(len(block["op"]) != len(CANDIDATES) for block in blocks):
                    raise ValueError(f"not {len(CANDIDATES)} operations")
                if not type(row["stage"]) is type(step) is int or row["stage"] not in range(5) or step < 0:
                    raise ValueError(f"stage {row['stage']}, step {step}")
                stages.setdefault(row["stage"], {})[step] = blocks      # the last step may be there twice
    if not stages:
        raise Missing(f'no "alphas" in {file}: the run is older than they are, or was not searched')
    return {stage: sorted(steps.items()) for stage, steps in sorted(stages.items())}


def entropies(steps, which):
    """{choice: [..]}: at each (step, blocks) the mean `entropy` over those of the blocks with the numbers
    `which` that have this choice.
    """
    each = {name: [[entropy(blocks[i][name]) for i in which if len(blocks[i].get(name, ())) > 1]
                   for _, blocks in steps]
            for name in ("op", "expansion", "width")}
    return {name: [float(np.mean(some)) for some in values] for name, values in each.items() if all(values)}


def entropy(p):
    """Of the probabilities of n options, over log n: 1 if all are alike, 0 if one is certain."""
    p = np.asarray(p, float)
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum() / np.log(len(p)))
