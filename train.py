"""Training a derived network, or all of a run, from scratch or from the supernet's weights (Experiments).

    python train.py runs/001                     # A0.json, A1.json, .. of a run, then the curve
    python train.py runs/001 --init inherit      # from the supernet's weights, and what that saves
    python train.py runs/001/A3.json --export net.pt2
    torchrun --nproc_per_node 8 train.py runs/001   # a process a GPU, each on its share of every batch

On the whole training set, as recipe.py says; results are of the test images.
"""
import argparse
import contextlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

# How long a thread spins before it sleeps, waiting for another. OpenMP's default makes a step 40 times
# slower beside one busy neighbour; sleeping at once makes it twice as slow on a quiet machine. Read as torch
# is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

import data
import flops
import machine
import plot
from derive import inherit, open_supernet
from machinery import files, flags, processes
from machinery.flags import number, one_line
from machinery.folder import record, unchanged
from machinery.results import curves
from network import Network
from recipe import INITIAL, train
from space import Arch
from supernet import initialise

# The paper says 180 epochs of ImageNet; the other values for it are common ones. Those for small images are
# ours, chosen on the architecture part (--validate); an average over three epochs would only lag behind.
DEFAULTS = {"paper": {"epochs": 180, "batch_size": 1024, "lr": 0.4, "dropout": 0.2, "ema": 0.9999},
            "small": {"epochs": 3, "batch_size": 64, "lr": 0.2, "dropout": 0.0, "ema": 0.0}}


def initial(arch, args, folder):
    """A `Network` of `arch` with random weights, or with those of its stage's supernet, in its folder.

    files.Refused if it is no part of that supernet.
    """
    network = Network(arch, args.dropout)
    initialise(network, data.generator(args.seed, arch.stage, INITIAL))
    if args.init == "inherit":
        supernet = open_supernet(folder, arch.stage)
        try:
            inherit(network, supernet)
        except (RuntimeError, ValueError):              # more channels than the supernet has, or more blocks
            raise files.Refused(f"the network is no part of the supernet in {folder / f'A{arch.stage}.pt'}, "
                                "so it has no weights to begin with") from None
    return network


def export(network, file):
    """Write `network` for use without this code: a torch.export program (.pt2), or ONNX (.onnx).

    A .pt2 is loaded again, and its logits compared: files.Refused if they differ. It is whole or absent.
    """
    arch, network = network.arch, network.cpu().eval()
    x = torch.randn(2, arch.in_channels, arch.resolution, arch.resolution)
    batch = {0: torch.export.Dim("batch")}
    temporary = file.with_name(f"part.{file.name}")
    try:
        if file.suffix == ".onnx":
            torch.onnx.export(network, (x,), temporary, dynamo=True, dynamic_shapes=(batch,), verbose=False)
        else:
            torch.export.save(torch.export.export(network, (x,), dynamic_shapes=(batch,)), temporary)
            with torch.no_grad():
                moved = float((torch.export.load(temporary).module()(x) - network(x)).abs().max())
            if moved > 1e-4:
                raise files.Refused(f"the logits of {file} differ by {moved:.1e} from the network's")
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"exported: {file}")


def saving(rows, name):
    """What the supernet's weights save network `name`, in words; None unless it is trained both ways.

    A cosine's last epochs are its best, so the lengths of both schedules are named.
    """
    both = {row["init"]: row["epochs"] for row in rows if row["name"] == name}
    if len(both) < 2:
        return None
    goal, n = both["scratch"][-1]["accuracy"], len(both["inherit"])
    enough = [e["epoch"] + 1 for e in both["inherit"] if e["accuracy"] >= goal]
    when = f"after {enough[0]} of {n}" if enough else f"not within {n}"
    return (f"{name} with the supernet's weights reaches {100 * goal:.2f} %, that of {len(both['scratch'])} "
            f"epochs from scratch, {when} epochs")


def parser():
    p = one_line(argparse.ArgumentParser(prog="train.py", description=__doc__,
                                         formatter_class=argparse.RawDescriptionHelpFormatter))
    p.add_argument("what", type=Path, metavar="ARCH.json|RUN", help="a network, or the folder of a run")
    p.add_argument("--init", choices=("scratch", "inherit"), default="scratch",
                   help="random weights as in the paper, or the supernet's, from the .pt file beside "
                   "(scratch)")
    p.add_argument("--export", type=Path, metavar="FILE",
                   help="write the trained network as .pt2 (torch.export) or .onnx as well")
    g = p.add_argument_group("training", "(defaults for the paper's space; for small images)")
    g.add_argument("--epochs", type=number(int, 1), help="(180, the paper's; 3)")
    g.add_argument("--batch-size", type=number(int, 1), metavar="B", help="(1024; 64)")
    g.add_argument("--lr", type=number(float, 1e-9), help="peak learning rate (0.4; 0.2)")
    g.add_argument("--weight-decay", type=number(float, 0), default=1e-4, help="of weight matrices (1e-4)")
    g.add_argument("--smoothing", type=number(float, 0), default=0.1, help="label smoothing (0.1)")
    g.add_argument("--dropout", type=number(float, 0), help="probability before the classifier (0.2; 0)")
    g.add_argument("--ema", type=number(float, 0),
                   help="decay of the weights' average, 0 for none (0.9999; 0)")
    g.add_argument("--autocast", action=argparse.BooleanOptionalAction, help="bfloat16 (on a GPU)")
    g.add_argument("--validate", action="store_true", help="to choose settings: train on 5/6 of the training "
                   "images, report accuracy on the other 1/6 instead of the test images, and write nothing")
    flags.data_flags(p.add_argument_group("data", "as in search.py; without --data, the run's own"))
    g = p.add_argument_group("the run")
    g.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (the network's)")
    g.add_argument("--resume", action="store_true",
                   help="go on where the last training ended; skip what is trained")
    flags.run_flags(g)
    return p


def networks(p, what):
    """The `Arch`s that the command line names, {file name without ending: Arch}, and their folder."""
    paths = sorted(what.glob("A[0-4].json")) if what.is_dir() else [what]
    if not paths:
        p.error(f"{what} has no A0.json, A1.json, ..: it is not the folder of a run")
    found = {}
    for file in paths:
        try:
            found[file.stem] = Arch.from_json(file.read_text())
        except (OSError, ValueError) as error:
            p.error(f"{file}: {getattr(error, 'strerror', None) or error}")
    return found, paths[0].parent


def source(p, args, archs, folder):
    """Which images, as `flags.images` takes it: those of the run in `folder`, unless the flags say otherwise.

    The run's images are drawn by the run's own seed, so that its test images stay those that it never saw.
    `own` is true of them.
    """
    found, ran = flags.DATA | {"seed": args.seed}, {}
    if (folder / "args.json").exists():
        try:
            ran = json.loads((folder / "args.json").read_text())
            if args.data in (None, ran["data"]):                # else the run's folder of images may be gone
                ran = vars(flags.begun(ran)[1])
                found |= {key: ran[key] for key in ("data", "classes", "skip_broken", "seed")}
        except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
            p.error(f"{folder / 'args.json'} is not what a run writes ({error})")
    found |= {key: getattr(args, key) for key in flags.DATA if getattr(args, key) is not None}
    found["own"] = all(found[key] == ran.get(key) for key in ("data", "classes"))
    if found["data"] not in data.NAMES:
        found["resolution"] = found["resolution"] or next(iter(archs.values())).resolution
    return argparse.Namespace(**found)


def check(p, args, archs, folder, images):
    """End in p.error for what does not fit together, before any work."""
    for name, arch in archs.items():
        if arch.in_channels != images.channels or args.init == "inherit" and arch.classes != images.classes:
            p.error(f"{name} is for {arch.in_channels} channels and {arch.classes} classes, but --data "
                    f"{args.data} has {images.channels} and {images.classes}")
        if args.init == "inherit" and not (folder / f"A{arch.stage}.pt").exists():
            p.error(f"--init inherit needs the supernet's weights, {folder / f'A{arch.stage}.pt'}")
    if args.validate and (args.resume or args.export):
        p.error("--validate writes nothing, and goes on with nothing: not with --resume or --export")
    for key in ("smoothing", "dropout", "ema"):
        if (getattr(args, key) or 0) >= 1:
            p.error(f"--{key} is {getattr(args, key)}, not below 1")
    try:
        curves([args.out or folder])                # which the curve at the end will be drawn of
    except ValueError as error:
        p.error(error)
    if args.export and len(archs) > 1:
        p.error("--export writes one network: name its ARCH.json")
    if args.export and args.export.suffix not in (".pt2", ".onnx"):
        p.error(f"--export {args.export} ends neither in .pt2 nor in .onnx")
    if args.export and not args.export.parent.is_dir():
        p.error(f"--export {args.export}: there is no folder {args.export.parent}")
    if args.export and args.export.suffix == ".onnx" and not importlib.util.find_spec("onnxscript"):
        p.error("--export to .onnx needs onnx: pip install onnx onnxscript, or export to .pt2")


def completed(args, space, device):
    """A copy of `args` with the defaults of a space, and of a device, for what was not given."""
    defaults = DEFAULTS["paper" if space == "paper" else "small"] | {"autocast": device.type == "cuda"}
    given = {key: value if getattr(args, key) is None else getattr(args, key)
             for key, value in defaults.items()}
    return argparse.Namespace(**vars(args) | given)


def check_size(p, name, arch, args, images, device):
    """End in p.error for a batch that does not fit images or processes, or an `Arch` beyond the memory."""
    if args.batch_size > images:
        p.error(f"--batch-size {args.batch_size} is more than the {images} images")
    flags.fit(p, args, arch.resolution, name, arch.blocks)
    need, has = flops.training_memory(arch, flags.pieces(p, args)[0]), machine.memory(device)
    if need > has:
        p.error(f"{name} needs {need / 2 ** 30:,.1f} GB to train with --batch-size {args.batch_size}, by an "
                f"estimate that is rather low, but there are {has / 2 ** 30:,.1f}: take a larger "
                "--accumulate, or a smaller network")


def read_rows(file):
    """The rows of a trained.json, none if it is not there. files.Refused if `enter` would not write such."""
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text())
        kinds = {(type(row["name"]), type(row["init"]), type(row["epochs"][-1]["accuracy"])) for row in rows}
    except (ValueError, RecursionError) as error:
        raise files.Refused(f"{file} is not JSON ({error})") from None
    except (TypeError, LookupError) as error:
        raise files.Refused(f"{file} is not what train.py writes ({error!r})") from None
    if kinds - {(str, str, float)}:
        raise files.Refused(f"{file} is not what train.py writes: name, init or accuracy are of other types")
    return rows


def enter(file, row):
    """Write `row` into a trained.json, in place of the one of its name and init; returns all rows."""
    rows = [r for r in read_rows(file) if (r["name"], r["init"]) != (row["name"], row["init"])] + [row]
    rows.sort(key=lambda r: (r["name"], r["init"]))
    processes.write(file, json.dumps(rows, indent=1) + "\n")
    return rows


def progress(label, checkpoint, trained, resume):
    """How far a network is that is to be gone on with: "saved" in an epoch, or "trained"; else None."""
    if not resume:
        return processes.recall(label)  # torchrun may have started its processes anew
    return "saved" if checkpoint.exists() else "trained" if trained else None


def train_all(p, args, archs, folder, out, device, images, test, caught):
    """Train each of `archs` that is not trained yet, and write it and the results into the folder `out`."""
    if args.own:
        unchanged(p, images, folder)
    if not args.validate:
        record(p, images, out)
        record(p, test, out)
    index = torch.arange(len(images.labels))
    test_index = torch.arange(len(test.labels))
    if args.validate:
        index, test_index = data.split(images.labels, args.split_seed)
    stats = images.statistics(index)
    results = out / "trained.json"
    rows = processes.on_rank0(read_rows, results)
    for name, searched in archs.items():
        arch = searched._replace(classes=images.classes, resolution=images.resolution)  # as the images are
        given = completed(args, arch.space, device)
        given.data = f"{len(index):,} images of {getattr(images, 'digest', args.data)}"
        processes.on_rank0(check_size, p, name, arch, given, len(index), device)
        label = name if args.init == "scratch" else f"{name}.{args.init}"     # what its files are called
        checkpoint, mine = out / f"{label}.last.pt", {"name": name, "init": args.init}
        trained = next((row for row in rows if mine.items() <= row.items()), None)
        before = processes.on_rank0(progress, label, checkpoint, trained, args.resume)
        if before == "trained":
            print(f"{label} is trained: {100 * trained['epochs'][-1]['accuracy']:.2f} % after epoch "
                  f"{len(trained['epochs']) - 1}", flush=True)
            if args.export and processes.share()[0] == 0:
                network = Network(arch)
                network.load_state_dict(files.load(out / f"{label}.trained.pt"))
                export(network, args.export)
            continue
        given.resume = before == "saved"
        loader, tester = (part.loader(stats, given.batch_size, device) for part in (images, test))
        network = initial(arch, given, folder).to(device)
        network, epochs = train(network, loader, index, tester, test_index, given, label, arch.stage,
                                checkpoint, caught)
        if args.validate or processes.share()[0]:
            continue                                        # of many processes the first writes
        row = mine | {"stage": arch.stage, "flops": flops.macs(arch), "params": flops.params(arch),
               "accuracy": epochs[-1]["accuracy"], "seconds": sum(e["seconds"] for e in epochs),
               "seed": args.seed, "epochs": epochs}
        processes.write(out / f"{label}.trained.pt", network.state_dict())
        if arch != searched:
            processes.write(out / f"{label}.trained.json", arch.to_json())
        rows = enter(results, row)
        checkpoint.unlink()
        processes.note(label, "trained")
        if says := saving(rows, name):
            print(says, flush=True)
        if args.export:
            export(network, args.export)
    if processes.share()[0] == 0 and not args.validate and (out / "summary.json").exists():
        plot.curve([out], out / "curve.png")
        print(f"curve: {out / 'curve.png'}")


@processes.process_group()
def main(argv=None):
    p = parser()
    args = processes.on_rank0(p.parse_args, argv)
    archs, folder = processes.on_rank0(networks, p, args.what)
    out, device = args.out or folder, processes.choose_device(p, args.device)
    wanted = processes.on_rank0(source, p, args, archs, folder)
    known = out if (out / "checked.json").exists() else folder
    images = flags.images(p, wanted, "train", known)
    test = images if args.validate else flags.images(p, wanted, "test", known)
    args.data, args.split_seed, args.own = wanted.data, wanted.seed, wanted.own  # the parts of the search
    processes.on_rank0(check, p, args, archs, folder, images)
    with contextlib.ExitStack() as stack, processes.catch_signals() as caught, flags.explained(p, out):
        processes.on_rank0(flags.hold, p, out, stack)
        train_all(p, args, archs, folder, out, device, images, test, caught)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, but for where a script listens, ends it at once
    sys.exit(main())
