"""What a run has left in its folder, read back for tables and pictures: accuracies, networks, probabilities.

A broken file becomes a ValueError that names it; `Missing` is what a run never had. Needs neither torch nor
anything of the search.
"""
import contextlib
import itertools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

FILES = ("trained.json", "summary.json")                        # what accuracies stand in
NAMED, NO_SETTING = ("method", "space", "data"), ("seed", "device", "checkpoint_every", "workers")
OPS = ("ir_k3", "ir_k5", "ir_k3_hs", "ir_k5_hs", "ir_k3_se", "ir_k5_se", "ir_k3_se_hs", "ir_k5_se_hs")


class Missing(ValueError):
    """A run does not have what a picture shows, though nothing is wrong with it."""


@contextlib.contextmanager
def reading(file):
    """What goes wrong in here, with a file that a run left, becomes a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    except (ArithmeticError, LookupError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not what a run writes ({error!r})") from None


def table(summary):
    """The rows of a summary.json as text, a line a stage and one for the whole search."""
    lines = ["stage   MACs (M)  params (M)  accuracy (%)   seconds       kWh  CO2e (lb)"]
    for r in summary:
        right = "-" if r["accuracy"] is None else f"{100 * r['accuracy']:.1f}"
        lines.append(f"A{r['stage']:<6}{r['flops'] / 1e6:>9.2f} {r['params'] / 1e6:>11.3f} {right:>13} "
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
        rows = [row for row in json.loads(file.read_text()) if row["accuracy"] is not None]
        for row in rows:
            counts = row["flops"], row["params"]
            if not (all(0 < n < math.inf for n in counts) and 0 <= row["accuracy"] <= 1):
                raise ValueError(f"{row['flops']} MACs, {row['params']} parameters, accuracy "
                                 f"{row['accuracy']}")
        return [(str(row.get("name", f"A{row['stage']}")), str(row.get("init", "scratch")),
                 row["flops"] / 1e6, row["params"] / 1e6, 100 * row["accuracy"]) for row in rows]


def experiments(runs):
    """{label: folders}: runs whose args.json differ in the seed alone are one experiment.

    A label names method, space and data, and of those that share all three what else tells them apart.
    """
    groups = {}
    for run in map(Path, runs):
        args = {"method": run.resolve().name, "run": str(run)}
        if (run / "args.json").exists():
            with reading(run / "args.json"):
                args = dict(json.loads((run / "args.json").read_text()))
        key = json.dumps({k: v for k, v in args.items() if k not in NO_SETTING}, sort_keys=True)
        twin = groups.setdefault(key, {}).setdefault(str(args.get("seed")), run)
        if twin is not run:
            raise ValueError(f"{run} has the settings and the seed of {twin}: name one of them")
    settings, labels = [json.loads(key) for key in groups], []
    for mine in settings:
        alike = [other for other in settings if all(other.get(k) == mine.get(k) for k in NAMED)]
        words = [str(mine[k]) for k in NAMED if k in mine]
        for k, v in mine.items():
            if k not in (*NAMED, "run") and not isinstance(v, list) and any(o.get(k, v) != v for o in alike):
                words.append({True: k, False: f"no {k}"}[v] if isinstance(v, bool) else f"{k} {v}")
        labels.append(", ".join(words))
    members = [list(seeds.values()) for seeds in groups.values()]
    return {label if labels.count(label) == 1 else f"{label} ({folders[0]})": folders
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


def spread(points):
    """(mean, standard deviation) over the rows of (n, 3): that of a sample, with n - 1, so NaN of one row."""
    mean = points.mean(0)
    return mean, points.std(0, ddof=1) if len(points) > 1 else np.full_like(mean, np.nan)


def networks(run):
    """{"A0": blocks, ..} of A0.json .. in a run's folder, a dict a block, with more keys than in the file:

    column, (its row in the paper's tables, its place there); kind, the operation without its kernel; five,
    whether that is 5x5; expansion, hidden width over input width; pixels, a side of its output.
    """
    found = {}
    for file in sorted(Path(run).glob("A[0-4].json")):
        with reading(file):
            arch, row, place, blocks = json.loads(file.read_text()), -1, 0, []
            width, pixels = arch["stem"], (arch["resolution"] + 1) // 2
            for b in arch["blocks"]:
                row, place = (row, place + 1) if b["residual"] else (row + 1, 0)
                pixels = (pixels + 1) // 2 if b["stride"] == 2 else pixels
                blocks.append(b | {"column": (row, place), "kind": b["op"][5:], "pixels": pixels,
                                   "five": OPS.index(b["op"]) % 2 == 1, "expansion": b["hidden"] / width})
                width = b["out"]
            found[file.stem] = blocks
    if not any(found.values()):
        raise Missing(f"{run} has no networks A0.json, A1.json, ..")
    return found


def history(run):
    """{stage: [(step, blocks), ..]}: the probabilities in a run's log.jsonl; a dict a block, by choice."""
    file, found = Path(run) / "log.jsonl", {}
    with reading(file):
        for row in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
            for step, blocks in row.get("alphas", []):
                for p in (p for block in blocks for p in block.values()):
                    if min(p) < 0 or abs(sum(p) - 1) > 1e-3:
                        raise ValueError(f"{p} are not probabilities")
                if any(len(block["op"]) != len(OPS) for block in blocks):
                    raise ValueError(f"not {len(OPS)} operations")
                if not type(row["stage"]) is type(step) is int:
                    raise ValueError(f"stage {row['stage']}, step {step}")
                found.setdefault(row["stage"], {})[step] = blocks       # the last step may be there twice
    if not found:
        raise Missing(f'no "alphas" in {file}: the run is older than they are, or was not searched')
    return {stage: sorted(steps.items()) for stage, steps in sorted(found.items())}


def entropies(steps):
    """{choice: [..]}: at each (step, blocks) the mean `entropy` over the blocks that have this choice."""
    each = {name: [[entropy(b[name]) for b in blocks if len(b.get(name, ())) > 1] for _, blocks in steps]
            for name in ("op", "expansion", "width")}
    return {name: [float(np.mean(values)) for values in steps] for name, steps in each.items() if all(steps)}


def entropy(p):
    """Of the probabilities of n options, over log n: 1 if all are alike, 0 if one is certain."""
    p = np.asarray(p, float)
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum() / np.log(len(p)))
