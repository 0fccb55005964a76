"""The flags of search.py, derive.py and train.py, their defaults, and what must stay when a run goes on."""
from machinery import files, flags, folder
from machinery.files import Refused
from machinery.flags import amount, number
from machinery.run import differences

import argparse
import contextlib
import itertools
import sys
from pathlib import Path

import data
from space import SPACES

METHODS = {"cst": "the curriculum", "direct": "each stage alone", "naive": "growth by random weights",
           "scaling": "A0's network made larger"}
# The paper's epochs and batch size; our small space takes a hundredth of A0's epochs, and a 150th of the
# others', which cost more and begin with what A0 has learnt. All else is ours.
DEFAULTS = {"paper": {"epochs": [100.0, *[60.0] * 4], "batch_size": 1024, "lr": 0.4},
            "small": {"epochs": [1.0, *[0.4] * 4], "batch_size": 32, "lr": 0.1}}
NOT_KEPT = ("out", "resume", "dry_run")         # flags that are no setting of a run
# Of a switch: its flag, and the value that the flag gives.
SWITCHES = {"grow": ("--no-grow", False), "distill": ("--no-distill", False),
            "skip_broken": ("--skip-broken", True)}
FREE = ("stages", "device", "checkpoint_every", "workers")      # settings that may change on the way


def search_parser(description):
    """The flags of search.py."""
    p = flags.Parser("search.py", description, "search.py [flags]")
    g = p.add_argument_group("the curriculum")
    g.add_argument("--stages", type=int, choices=range(1, 6), default=5,
                   help="how many of A0..A4 (5, Fig. 2)")
    g.add_argument("--space", choices=SPACES, default="small",
                   help="the paper's, Tables 1 and 5-8, or ours for small images (small)")
    g.add_argument("--method", choices=METHODS, default="cst", metavar="M",
                   help="; ".join(f"{name}: {words}" for name, words in METHODS.items()) + " (cst, Fig. 5)")
    g.add_argument("--no-grow", dest="grow", action="store_false",
                   help="every stage from scratch, without SuperNet2SuperNet (Fig. 6)")
    g.add_argument("--no-distill", dest="distill", action="store_false",
                   help="without the teacher of Eq. 4 (Fig. 6)")
    g.add_argument("--draw", choices=("uniform", "alpha"), default="uniform", metavar="HOW",
                   help="the operations of the paths on which w learns: uniformly, or by alpha (uniform)")
    g.add_argument("--teacher", choices=("supernet", "network"), default="supernet", metavar="WHO",
                   help="the previous supernet, or its derived network (supernet, Eq. 4)")
    g.add_argument("--widen", choices=("eq3", "split", "zero", "naive"), default="eq3", metavar="HOW",
                   help="new channels are consumed by Eq. 3, in random shares (split), not at first (zero), "
                   "or by random weights (naive) (eq3)")
    g.add_argument("--flops-target", nargs="+", type=amount, metavar="F",
                   help="MACs of each stage's network, as in 0.9M, or off (Table 3's; ours)")
    g = p.add_argument_group("data and training", flags.SOURCES)
    flags.data_flags(g)
    p.set_defaults(**flags.DATA)
    g.add_argument("--epochs", nargs="+", type=number(float, 1e-9, 1e6), metavar="E",
                   help="one, or one a stage (100 60 60 60 60, Experiments; 1 0.4 0.4 0.4 0.4)")
    g.add_argument("--batch-size", type=number(int, 1), metavar="B",
                   help="images a step (1024, Experiments; 32)")
    g.add_argument("--lr", type=number(float, 1e-9), help="peak learning rate of the weights' SGD (0.4; 0.1)")
    g.add_argument("--weight-decay", type=number(float, 0), default=1e-4, metavar="W",
                   help="of the weights (1e-4)")
    g.add_argument("--alpha-lr", type=number(float, 1e-9), default=0.01, metavar="LR",
                   help="learning rate of alpha's Adam (0.01)")
    g = p.add_argument_group("the run")
    g.add_argument("--out", type=Path, metavar="DIR", help="its folder (the next of runs/001, runs/002, ..)")
    g.add_argument("--resume", action="store_true",
                   help="go on with the run in --out, or begin it if there is none")
    g.add_argument("--dry-run", action="store_true",
                   help="measure a few steps, print what the run would cost, and stop")
    flags.run_flags(g)
    return p


def derive_parser(description):
    """The flags of derive.py."""
    p = flags.Parser("derive.py", description, "derive.py RUN [flags]")
    p.add_argument("run", type=Path, metavar="RUN", help="folder of a search")
    p.add_argument("--stage", type=int, choices=range(5),
                   help="one of A0..A4 (all that the run has; without a budget its last)")
    g = p.add_mutually_exclusive_group()
    g.add_argument("--flops", type=amount, metavar="F", help="a budget of MACs, as in 2M (k, M, G)")
    g.add_argument("--params", type=amount, metavar="P", help="a budget of parameters, as in 100k")
    g.add_argument("--latency", type=flags.duration, metavar="T",
                   help="a budget of time for one image on this machine's CPU, as in 2ms; suffixes us, ms, "
                   "s. What layers take is measured, and kept in the run's latency.json")
    g.add_argument("--points", type=number(int, 2, 1000), metavar="N",
                   help="the front: N networks from the cheapest to the dearest, each measured (2 to 1000)")
    p.add_argument("--refine", type=number(int, 1, 1000), default=1, metavar="N",
                   help="measure N likely networks near the budget and take the best (1: none)")
    p.add_argument("--data", type=flags.data_name, metavar="DIR",
                   help="of --points and --refine: where the run's images are now")
    p.add_argument("--out", type=Path, metavar="FILE", help="the JSON file (in the run's folder)")
    return p


def train_parser(description):
    """The flags of train.py."""
    p = flags.Parser("train.py", description, "train.py ARCH.json|RUN [flags]")
    p.add_argument("what", type=Path, metavar="ARCH.json|RUN",
                   help="a network, or the folder of a run; A3.net.pt to --export")
    p.add_argument("--init", choices=("scratch", "inherit"), default="scratch",
                   help="random weights, or the supernet's (scratch, Experiments)")
    p.add_argument("--export", type=Path, metavar="FILE",
                   help="write the trained network as .pt2 (torch.export) or .onnx as well")
    g = p.add_argument_group("training", flags.SOURCES)
    g.add_argument("--epochs", type=number(int, 1, 1e6), metavar="E", help="how many (180, Experiments; 3)")
    g.add_argument("--batch-size", type=number(int, 1), metavar="B",
                   help="images a step (1024, Experiments; 64)")
    g.add_argument("--lr", type=number(float, 1e-9), help="peak learning rate (0.4; 0.2)")
    g.add_argument("--weight-decay", type=number(float, 0), default=1e-4, metavar="W",
                   help="of weight matrices (1e-4)")
    g.add_argument("--smoothing", type=number(float, 0, 0.999), default=0.1, metavar="S",
                   help="label smoothing (0.1)")
    g.add_argument("--dropout", type=number(float, 0, 0.999), metavar="P",
                   help="probability before the classifier (0.2; 0)")
    g.add_argument("--ema", type=number(float, 0, 1 - 1e-9),
                   help="decay of the weights' average, 0 for none (0.9999; 0)")
    g.add_argument("--autocast", action=argparse.BooleanOptionalAction, help="bfloat16 (on a GPU)")
    g.add_argument("--validate", action="store_true",
                   help="evaluate on the search's validation split, and write nothing")
    flags.data_flags(p.add_argument_group("data; without --data the run's own"))
    g = p.add_argument_group("the run")
    g.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (the network's)")
    g.add_argument("--resume", action="store_true",
                   help="go on where the last training ended; skip what is trained")
    g.add_argument("--jobs", type=number(int, 1, 64), default=1, metavar="N",
                   help="train N networks at a time, a thread each (1, with all threads)")
    flags.run_flags(g)
    return p


def kept(args):
    """The settings that make a run what it is, as args.json and checkpoints keep them."""
    return {key: value for key, value in vars(args).items() if key not in NOT_KEPT}


def same_run(args):
    """Of `kept`, what must be the same when a run is resumed. A folder of images may have moved: what is
    in it must be the same, which `folder.unchanged` looks at.
    """
    same = {key: value for key, value in kept(args).items() if key not in FREE}
    return same | {"data": args.data if args.data in data.NAMES else "a folder"}


def argv_of(settings):
    """The command line of the settings in an args.json. Refused if these are not a run's."""
    p, argv = search_parser(None), []
    if differing := set(settings) ^ set(kept(p.parse_args([]))):
        raise Refused(f"{', '.join(sorted(differing))}: missing or unknown")
    for key, value in settings.items():
        if key in SWITCHES:
            flag, given = SWITCHES[key]
            argv += [flag] * (value is given)
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            off = key == "flops_target" and 0 in values                 # written so; 0 is no number of MACs
            argv += [f"--{key.replace('_', '-')}", *("off" if off and v == 0 else str(v) for v in values)]
    return argv


def read(run, images=None):
    """The arguments of the search that left args.json in the folder `run`. Refused if they are not such.

    images: a value of --data. If it is a folder to which the run's images have moved, it takes the place of
    the one in args.json.
    """
    file = run / "args.json"
    settings = files.read_json(file)
    try:
        args = completed(search_parser(None).parse_args(argv_of(settings)))
        for key, found, value in differences(settings, kept(args)):
            raise Refused(f"{key} is {found!r}, not {value!r}")
    except Refused as error:
        raise Refused(f"{file} is not what a run writes ({error})") from None
    if images and not {images, args.data} & set(data.NAMES) and folder.is_same(
            Path(images), args.seed, args.classes, run):
        args.data = images
    return args


def completed(args):
    """`args` with the defaults of their space, and a number a stage. Refused if they do not go together."""
    for key, value in DEFAULTS[args.space].items():
        setattr(args, key, getattr(args, key) or value)
    for key in ("epochs", "flops_target"):
        values = getattr(args, key)
        if values and len(values) == 1:
            setattr(args, key, values * 5)
        elif values and not args.stages <= len(values) <= 5:
            raise Refused(f"--{key.replace('_', '-')}: {len(values)} values for {args.stages} stages; give "
                          "one for each, or one for all")
    if args.method == "scaling" and args.flops_target and not all(args.flops_target):
        raise Refused("--method scaling needs a --flops-target to scale to")
    if args.method == "naive":
        if not args.grow or args.widen not in ("eq3", "naive"):
            raise Refused("--method naive grows by random weights: not with --no-grow or --widen")
        args.widen = "naive"
    if args.method != "cst":
        args.grow, args.distill = args.method == "naive", False
    if args.widen != "eq3" and not args.grow:
        raise Refused(f"--widen {args.widen}: nothing grows by --method {args.method}, or with --no-grow")
    if args.teacher != "supernet" and not args.distill:
        raise Refused(f"--teacher {args.teacher}: nobody teaches by --method {args.method}, or with "
                      "--no-distill")
    return args


def search_arguments(argv, description):
    """The checked arguments of search.py. With --resume the run's own, which those given must equal."""
    p = search_parser(description)
    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    if args.resume and args.out is None:
        raise Refused("--resume needs --out with the folder of a run")
    if args.resume and (args.out / "args.json").exists():
        ran = read(args.out)
        args = completed(p.parse_args([*argv_of(kept(ran)), *argv]))
        for key, before, value in differences(same_run(ran), same_run(args)):
            flag, given = SWITCHES.get(key, (f"--{key.replace('_', '-')}", None))
            if key in SWITCHES:
                before, value = before is given, value is given
            raise Refused(f"{flag} is {value}, but the run in {args.out} has {before}")
    args = completed(args)
    flags.batch_pieces(args)
    if args.out and args.out.is_dir() and not args.dry_run:
        check_folder(args.out, args.resume)         # before images are read, which may take long
    return args


def check_folder(out, resume):
    """Refused if the folder `out` holds something else than the run that is to be resumed."""
    held = {path.name for path in out.iterdir() if path.suffix != ".tmp"}
    if resume and "last.pt" not in held and "A0.pt" in held:
        raise Refused(f"{out} has finished stages but no last.pt, so nothing says how to go on: choose "
                      "another folder")
    if resume and held and "args.json" not in held:
        raise Refused(f"--resume: {out} is not the folder of a run, it has no args.json")
    if not resume and held:
        raise Refused(f"--out {out} holds something already: choose another folder, or add --resume")


def run_folder(args, stack):
    """The folder of a search, made, locked until `stack` ends, and checked: args.out, or the next of
    runs/001, ..
    """
    out, numbers = args.out, itertools.count(1)
    while out is None:
        with contextlib.suppress(FileExistsError):
            free = Path("runs") / f"{next(numbers):03d}"
            free.mkdir(parents=True)
            out = free
    flags.lock(out, stack)
    check_folder(out, args.resume)
    return out


def own_images(args, archs):
    """The flags of the data: those of the run in args.run_folder where none are given, and the seed of its
    split, so that its test images stay those that it never saw. own: whether the images are the run's.
    """
    wanted, ran = flags.DATA | {"seed": args.seed}, {}
    if (args.run_folder / "args.json").exists():
        ran = vars(read(args.run_folder, args.data))
        if args.data in (None, ran["data"]):
            wanted |= {key: ran[key] for key in ("data", "classes", "skip_broken", "seed")}
    wanted |= {key: getattr(args, key) for key in flags.DATA if getattr(args, key) is not None}
    wanted["own"] = all(wanted[key] == ran.get(key) for key in ("data", "classes"))
    if wanted["data"] not in data.NAMES:
        wanted["resolution"] = wanted["resolution"] or next(iter(archs.values())).resolution
    return argparse.Namespace(**wanted)
