"""What a run and its trainings leave in a folder, read back. Broken files are refused by name."""
from machinery import files
from machinery.run import differences

import json
from pathlib import Path

from space import CANDIDATES, Arch

NAMED, NO_SETTING = ("method", "data", "space"), ("seed", "device", "checkpoint_every", "workers")
WORDS = {"cst": "curriculum search", "direct": "direct search", "naive": "naive growth",
         "scaling": "compound scaling", "fashion": "Fashion-MNIST", "cifar10": "CIFAR-10",
         "cifar100": "CIFAR-100", "fake": "patterns", "small": "small space", "paper": "paper's space"}


class Missing(files.Refused):
    """A run does not have what a picture shows, though nothing is wrong with it."""


def printable(text):
    """The text with escapes for bytes that are no UTF-8, which names of files may hold."""
    return str(text).encode(errors="backslashreplace").decode()


def table(summary):
    """The rows of a summary.json as text, a line a stage and one for the whole search."""
    lines = ["stage   MACs (M)  params (M)  accuracy (%)   seconds       kWh  CO2e (lb)"]
    for r in summary:
        accuracy = "-" if r["accuracy"] is None else f"{100 * r['accuracy']:.1f}"
        lines.append(f"A{r['stage']:<6}{r['flops'] / 1e6:>9.2f} {r['params'] / 1e6:>11.3f} {accuracy:>13} "
                     f"{r['seconds']:>9.1f} {r['kwh']:>9.5f} {r['co2e_lb']:>10.5f}")
    seconds, kwh, co2e = (sum(r[key] for r in summary) for key in ("seconds", "kwh", "co2e_lb"))
    return "\n".join([*lines, f"{'all':<42}{seconds:>10.1f} {kwh:>9.5f} {co2e:>10.5f}"])


def measured(file):
    """The rows of a summary.json or trained.json whose accuracy was measured, none if it is not there:
    [(name, init, MACs in M, parameters in M, accuracy in %), ..]; init is train.py's, or "scratch".
    """
    rows = files.read_json(file, list) if file.exists() else []
    with files.reading(file):
        found = [(printable(row.get("name", f"A{row['stage']}")), printable(row.get("init", "scratch")),
                  row["flops"] / 1e6, row["params"] / 1e6, 100 * row["accuracy"])
                 for row in rows if row["accuracy"] is not None]
        for name, _, *counts, accuracy in found:
            if not (all(0 < n < 1e9 for n in counts) and 0 <= accuracy <= 100):
                raise ValueError(f"{name}: {counts} M MACs and parameters, accuracy {accuracy} %")
    return found


def experiments(runs):
    """{label: folders}: runs whose args.json differ in the seed alone are one experiment. A label names
    method, data and space, and of those that share all three what else tells them apart.
    """
    groups, found = {}, {}
    for run in map(Path, runs):
        args = {"method": str(run.resolve())}
        if (run / "args.json").exists():
            args = files.read_json(run / "args.json")
        key = json.dumps({k: v for k, v in args.items() if k not in NO_SETTING}, sort_keys=True)
        twin = groups.setdefault(key, {}).setdefault(str(args.get("seed")), run)
        if twin is not run:
            raise files.Refused(f"{run} has the settings and the seed of {twin}: name one of them")
    for mine, folders in zip(map(json.loads, groups), groups.values()):
        alike = [its for its in map(json.loads, groups) if all(its.get(k) == mine.get(k) for k in NAMED)]
        words = [WORDS.get(str(mine[k]), Path(str(mine[k])).name) for k in NAMED if k in mine]
        words += [k if v is True else f"no {k}" if v is False else f"{k} {v}" for k, v in mine.items()
                  if type(v) is not list and any(its.get(k, v) != v for its in alike)]
        label, folders = printable(", ".join(words)), list(folders.values())
        found[label if label not in found else printable(f"{label} ({folders[0]})")] = folders
    return found


def curves(runs):
    """{(label, searched, file): {name: [[MACs in M, parameters in M, accuracy in %] of each run]}}: lines.

    Networks trained from the supernet's weights have their own line. Those that were not searched come last,
    a line a family ("MobileNetV2" of "MobileNetV2 x0.5").
    """
    lines = {}
    for label, folders in experiments(runs).items():
        for file in ("trained.json", "summary.json"):
            rows = [row for run in folders for row in measured(run / file)]
            for name, init, *point in sorted(rows, key=lambda row: (row[1] != "scratch", row[0])):
                searched = name in ("A0", "A1", "A2", "A3", "A4")
                family = f"{label}, {init}".removesuffix(", scratch") if searched else name.partition(" x")[0]
                points = lines.setdefault((family, searched, file), {}).setdefault(name, [])
                if searched or point not in points:             # several runs may hold the same network
                    points.append(point)
    return dict(sorted(lines.items(), key=lambda line: not line[0][1]))


def archs(run):
    """{"A0": its `Arch`, ..} of A0.json .. in a run's folder."""
    found = {}
    for file in sorted(Path(run).glob("A[0-4].json")):
        with files.reading(file):
            found[file.stem] = arch = Arch.from_json(file.read_text())
            if max(arch.resolution, arch.stem, arch.head, *(b.out for b in arch.blocks)) > 10 ** 6:
                raise ValueError("a width or a resolution beyond a million")
    if not found:
        raise Missing(f"{run} has no networks A0.json, A1.json, ..")
    return found


def history(run):
    """{stage: [(step, blocks), ..]}: the probabilities in a run's log.jsonl; a dict a block, by choice."""
    file, stages = Path(run) / "log.jsonl", {stage: {} for stage in range(5)}
    with files.reading(file):
        for row in map(json.loads, file.read_text().splitlines() if file.exists() else ()):
            for step, blocks in row.get("alphas", []):
                for p in (p for block in blocks for p in block.values()):
                    if not (min(p) >= 0 and abs(sum(p) - 1) <= 1e-4 * len(p)):  # four digits; NaN is neither
                        raise ValueError(f"{p} are not probabilities")
                if not 0 <= step < 1e9 or any(len(block["op"]) != len(CANDIDATES) for block in blocks):
                    raise ValueError(f"step {step}: not a step, or not {len(CANDIDATES)} operations")
                stages[row["stage"]][step] = blocks                     # the last step may be there twice
    if not any(stages.values()):
        raise Missing(f'no "alphas" in {file}: the run is older than they are, or was not searched')
    return {stage: sorted(steps.items()) for stage, steps in stages.items() if steps}


def is_trained(args, settings, read):
    """Whether args.out has the network that is asked for, trained with these settings. read: a function of
    its file -> the `network.TrainedNetwork`.

    Refused if there is one of other settings, or if --resume is missing where something would be overwritten.
    """
    path, checkpoint = args.out / f"{args.name}.net.pt", args.out / f"{args.name}.last.pt"
    for file in (path, checkpoint):
        if file.exists() and not args.resume:
            raise files.Refused(f"{file} is there already: --resume goes on, or skips what is trained; "
                                "another --out trains anew")
    if not path.exists() or checkpoint.exists():    # with both, its row in trained.json may be missing
        return False
    facts = read(path).facts
    with files.reading(path):
        found = [*differences(facts["trained_on"] | {"network": facts["arch"]}, settings)]
    for key, before, value in found:
        raise files.Refused(f"{path} was trained with {key} {before}, not {value}: choose another --out")
    return True


def enter(file, row):
    """Write `row` into a trained.json, in place of the one of its name and init."""
    rows = files.read_json(file, list) if file.exists() else []
    by_key = {(each["name"], each["init"]): each for each in [*rows, row]}
    files.write(file, json.dumps([each for _, each in sorted(by_key.items())], indent=1) + "\n")
