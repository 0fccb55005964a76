"""The command line of search.py: its flags, their defaults, what is refused, and how a run ends."""
import argparse
import contextlib
import itertools
import json
import math
import sys
from pathlib import Path

import data
import flops
from grow import WIDENINGS
from machinery import files, folder, processes
from space import SPACES, total_stride

METHODS = {"cst": "curriculum supernet training, the paper's",
           "direct": "every stage from scratch, without a teacher",
           "naive": "grown with random new weights, without a teacher",
           "scaling": "A1.. are A0's network in larger widths and depths, not searched"}
# The paper's epochs and batch size; our small space takes a hundredth of A0's epochs, and a 150th of the
# others', which cost more and begin with what A0 has learnt. All else is ours.
DEFAULTS = {"paper": {"epochs": [100.0, *[60.0] * 4], "batch_size": 1024, "lr": 0.4, "alpha_lr": 0.01},
            "small": {"epochs": [1.0, *[0.4] * 4], "batch_size": 32, "lr": 0.1, "alpha_lr": 0.02}}
RESOLUTION = {"paper": 224, "small": 32}        # of the images of a folder
DATA = {"data": "fashion", "classes": None, "resolution": None, "workers": None, "skip_broken": False}

FREE = ("stages", "device", "checkpoint_every", "workers")     # what may change when a run is gone on with


def parser(description=__doc__):
    """The flags of search.py."""
    p = one_line(argparse.ArgumentParser(prog="search.py", description=description,
                                         formatter_class=argparse.RawDescriptionHelpFormatter))
    g = p.add_argument_group("the curriculum")
    g.add_argument("--stages", type=int, choices=range(1, 6), default=5, help="how many of A0..A4 (5)")
    g.add_argument("--space", choices=SPACES, default="small",
                   help="the paper's, or ours for small images (small)")
    g.add_argument("--method", choices=METHODS, default="cst",
                   help="; ".join(f"{name}: {words}" for name, words in METHODS.items()) + " (cst)")
    g.add_argument("--no-grow", dest="grow", action="store_false",
                   help="ablation (Fig. 6): every stage from scratch, without SuperNet2SuperNet")
    g.add_argument("--no-distill", dest="distill", action="store_false",
                   help="ablation (Fig. 6): without the teacher of Eq. 4")
    g.add_argument("--widen", choices=WIDENINGS[:2], default="eq3",
                   help="how new channels are consumed: by Eq. 3, or not at first, which preserves every "
                   "old sub-network (eq3)")
    g.add_argument("--flops-target", nargs="+", type=flops.amount, metavar="F",
                   help="MACs of each stage's network, as in 0.9M, or off (Table 3; for our space the like)")
    g.add_argument("--mu", type=number(float, 1e-9), default=1.0,
                   help="weight of |expected MACs / target - 1| in the architecture's loss (1)")
    g = p.add_argument_group("data and training", "(defaults in the paper's space; in ours)")
    data_flags(g)
    p.set_defaults(**DATA)
    g.add_argument("--epochs", nargs="+", type=number(float, 1e-9), metavar="E",
                   help="of each stage, or one number for all; fractions will do (100 60 60 60 60; 1 0.4 "
                   "0.4 0.4 0.4)")
    g.add_argument("--batch-size", type=number(int, 1), metavar="B", help="images a step (1024; 32)")
    g.add_argument("--lr", type=number(float, 1e-9), help="peak learning rate of the weights' SGD (0.4; 0.1)")
    g.add_argument("--weight-decay", type=number(float, 0), default=1e-4, help="of the weights (1e-4)")
    g.add_argument("--alpha-lr", type=number(float, 1e-9),
                   help="learning rate of the architecture's Adam (0.01; 0.02)")
    g = p.add_argument_group("the run")
    g.add_argument("--out", type=Path, metavar="DIR",
                   help="folder of the run (the next of runs/001, runs/002, ..)")
    g.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    g.add_argument("--dry-run", action="store_true",
                   help="measure a few steps, print what the run would cost, and stop")
    run_flags(g)
    return p


def run_flags(g):
    """Add the flags that search.py and train.py share beside those of the data to an argparse group."""
    g.add_argument("--accumulate", type=number(int, 1), default=1, metavar="N",
                   help="compute a batch in N pieces, for less memory: the same gradient, but for batch "
                   "norm, which sees a piece at a time (1)")
    g.add_argument("--checkpoint-every", type=number(int, 1), default=500, metavar="N",
                   help="steps between checkpoints within an epoch; a kill loses no more than these (500)")
    g.add_argument("--seed", type=number(int, 0), default=0, help="the same seed gives the same run (0)")
    g.add_argument("--device", default="auto", help="cpu, cuda, .. (auto: an accelerator if there is one)")


def data_flags(g):
    """Add the flags that say which images, without defaults, to an argparse group."""
    g.add_argument("--data", type=data_name, metavar="{" + ",".join(data.NAMES) + ",DIR}",
                   help="Fashion-MNIST, which is here; CIFAR, which is downloaded; patterns to try things "
                   "with; or a folder: train/ and val/ of class folders (ImageNet), or class folders alone, "
                   "of which a sixth is held out to test on (fashion)")
    g.add_argument("--classes", type=number(int, 2), metavar="N",
                   help="of a folder: N classes, drawn by the seed (all)")
    g.add_argument("--resolution", type=number(int, 8), metavar="R",
                   help="of a folder: pixels a side (224; 32)")
    g.add_argument("--workers", type=number(int, 0), metavar="N",
                   help="of a folder: processes that decode images, in a search for each of its two parts; "
                   "0 for none (as many as cores, up to 8)")
    g.add_argument("--skip-broken", action="store_true", default=None,
                   help="of a folder: leave out images that cannot be read. All are tried before the start, "
                   "once a run, and a broken one ends it without this flag")


def data_name(text):
    """An argparse type: the name of a data set, or the absolute path of a folder."""
    if text not in data.NAMES and not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is neither one of {', '.join(data.NAMES)} nor a folder")
    return text if text in data.NAMES else str(Path(text).resolve())


def images(p, args, part, run=None, checked=True):
    """The `data.Images` or `folder.Folder` that args.data and the like name; part: train or test.

    run, checked: as in `folder.load`. What is missing, broken or does not go together ends in p.error.
    """
    try:
        if args.data in data.NAMES:
            for key in ("classes", "resolution"):
                if getattr(args, key):
                    processes.on_rank0(p.error, f"--{key} is for a folder of images, and --data {args.data} is "
                                             "none")
            return processes.rank0_first(data.load, args.data, part)
        return folder.load(Path(args.data), part, args.seed, args.resolution or RESOLUTION[args.space],
                           args.classes, args.workers, args.skip_broken, run, checked)
    except (OSError, EOFError, ValueError) as error:
        return processes.on_rank0(p.error, f"--data {args.data}: {error}")


def aim(p, args, images):
    """MACs to aim at, a stage: args.flops_target, or `flops.targets`. What no network has ends in p.error."""
    shape = images.channels, images.resolution, images.classes
    found = args.flops_target or flops.targets(args.space, *shape)
    for space, target in zip(SPACES[args.space][:args.stages], found):
        space = space._replace(resolution=images.resolution)
        low, high = flops.bounds(flops.costs(space, images.channels, images.classes))
        if target and not low <= target <= high:
            p.error(f"--flops-target {target:,.0f} is out of reach: the networks of A{space.stage} have "
                    f"{low:,.0f} to {high:,.0f} MACs for these images")
    return found


def one_line(parser):
    """Let `parser` end a user's mistake in one line on stderr, with exit status 2, and without its usage."""
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    return parser


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of that kind (int, float) of at least `low` and at most `high`."""
    def read(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            most = "" if high == math.inf else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not a number of at least {low:g}{most}")
        return value
    read.__name__ = "number"                        # what argparse calls it where `kind` fails
    return read


def hold(p, out, stack):
    """Make the folder `out`, and let no other run write into it until `stack` ends. If one does: p.error."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(files.lock(out))
    except BlockingIOError:
        p.error(f"--out {out} is in use by another run: wait for its end, or choose another folder")
    except OSError as error:
        p.error(f"--out {out}: {error.strerror}")


@contextlib.contextmanager
def explained(p, out):
    """What a file does to a run in here ends in one line: broken, or not the run's, or a full disk."""
    try:
        yield
    except files.Refused as error:
        p.error(error)
    except OSError as error:
        where = error.filename or "its output"      # of a pipe that was closed
        raise SystemExit(f"{p.prog}: {where}: {error.strerror}; what was written before is whole, and "
                         f"--resume --out {out} goes on with it") from None


def kept(args):
    """The settings that make a run what it is, as args.json and checkpoints keep them."""
    return {key: value for key, value in vars(args).items() if key not in ("out", "resume", "dry_run")}


def begun(saved):
    """The settings of a run, as its args.json has them: as a command line, and parsed. ValueError if refused.
    """
    def refuse(message):
        raise ValueError(message)
    p, argv = parser(), []
    p.error = refuse
    switches = {"grow": "--no-grow", "distill": "--no-distill", "skip_broken": "--skip-broken"}
    names = set(kept(p.parse_args([])))
    if differing := names ^ set(saved if isinstance(saved, dict) else ()):
        raise ValueError(f"{', '.join(sorted(differing))}: missing or unknown")
    for key, value in saved.items():
        if key in switches:
            if not isinstance(value, bool):
                raise ValueError(f"{key} is {value!r}, not true or false")
            argv += [switches[key]] * (value is (key == "skip_broken"))
        elif value is not None or key not in ("classes", "resolution", "workers"):
            values = value if isinstance(value, list) else [value]
            off = key == "flops_target" and 0 in values                 # written so; 0 is no number of MACs
            argv += [f"--{key.replace('_', '-')}", *("off" if off and v == 0 else str(v) for v in values)]
    args = p.parse_args(argv)
    for key, value in saved.items():
        if getattr(args, key) != value:
            raise ValueError(f"{key} is {value!r}, not {getattr(args, key)!r}")
    return argv, args


def pieces(p, args):
    """(most, fewest) images of a batch that a process computes at once. A batch that does not split: p.error.
    """
    n = processes.share()[1]
    if args.batch_size % n:
        p.error(f"--batch-size {args.batch_size} does not divide by the {n} processes")
    mine = args.batch_size // n
    if args.accumulate > mine:
        p.error(f"--accumulate {args.accumulate} is more than the {mine} images that a process has of a "
                "batch")
    most = math.ceil(mine / args.accumulate)
    return most, mine % most or most                # the last piece has what is left


def fit(p, args, size, name, blocks):
    """End in p.error where `size` pixels a side are too few for the strides of network `name`, or a piece of
    a batch has too few for batch norm.
    """
    strides = total_stride(blocks)
    if 2 * size <= strides:
        p.error(f"{size} pixels a side are too few for {name}, whose strides make one of {strides}: take a "
                "larger --resolution")
    if size <= strides and pieces(p, args)[1] == 1:
        p.error(f"a piece of one image, of which {name} leaves one pixel, is too little for batch norm: take "
                "a larger --batch-size, a smaller --accumulate, or a larger --resolution")


def settings(p, argv):
    """The checked arguments. A mistake ends in one line and exit status 2."""
    argv = sys.argv[1:] if argv is None else argv
    if out := processes.recall("out"):              # before torchrun started its processes anew
        argv = ["--resume", "--out", out]
    args = p.parse_args(argv)
    if args.resume:
        if args.out is None or not (args.out / "args.json").is_file():
            p.error("--resume needs --out with the folder of a run, one that has args.json")
        file = args.out / "args.json"
        try:
            given, before = begun(json.loads(file.read_text()))
        except (OSError, ValueError, RecursionError) as error:
            p.error(f"--resume: {file} is not what a run writes ({error})")
        args = p.parse_args([*given, *argv])
        for key, value in kept(before).items():
            if key not in FREE and getattr(args, key) != value:
                p.error(f"--{key.replace('_', '-')} is {getattr(args, key)}, but the run in {args.out} has "
                        f"{value}")
    elif args.out is None:
        numbered = (Path("runs") / f"{n:03d}" for n in itertools.count(1))
        args.out = next(out for out in numbered if not out.exists())
    elif args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        p.error(f"--out {args.out} holds something already: choose another folder, or add --resume")
    for key, value in DEFAULTS[args.space].items():
        setattr(args, key, getattr(args, key) or value)
    for key in ("epochs", "flops_target"):
        values = getattr(args, key)
        if values and len(values) == 1:
            setattr(args, key, values * 5)
        elif values and len(values) < args.stages:
            p.error(f"--{key.replace('_', '-')}: {len(values)} values for {args.stages} stages; give one for "
                    "each, or one for all")
    pieces(p, args)
    if args.method == "scaling" and args.flops_target and not all(args.flops_target):
        p.error("--method scaling needs a --flops-target to scale to")
    if args.method != "cst":
        args.grow, args.distill = args.method == "naive", False
    return args
