"""The command lines: the flags of search.py, those that train.py shares, and how a mistake ends."""
from machinery import files, folder, processes
from machinery.files import Refused

import argparse
import contextlib
import functools
import io
import itertools
import math
import os
import sys
from pathlib import Path

import data
from space import SPACES, Arch, total_stride

METHODS = {"cst": "the curriculum", "direct": "each stage alone", "naive": "growth by random weights",
           "scaling": "A0's network made larger"}
# The paper's epochs and batch size; our small space takes a hundredth of A0's epochs, and a 150th of the
# others', which cost more and begin with what A0 has learnt. All else is ours.
DEFAULTS = {"paper": {"epochs": [100.0, *[60.0] * 4], "batch_size": 1024, "lr": 0.4, "alpha_lr": 0.01},
            "small": {"epochs": [1.0, *[0.4] * 4], "batch_size": 32, "lr": 0.1, "alpha_lr": 0.02}}
SOURCES = "In brackets: the default in the paper's space, with its source if it has one; that in ours."
RESOLUTION = {"paper": 224, "small": 32}        # of the images of a folder
DATA = {"data": "fashion", "classes": None, "resolution": None, "workers": None, "skip_broken": False}
NOT_KEPT = ("out", "resume", "dry_run")         # flags that are no setting of a run
FREE = ("stages", "device", "checkpoint_every", "workers")      # settings that may change on the way


class Parser(argparse.ArgumentParser):
    """Its errors are Refused, so that they end as every other mistake does."""

    def __init__(self, script, description, usage=None):
        super().__init__(script, usage, description, formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=30))

    def error(self, message):
        raise Refused(message)


def command(main):
    """A script's `main(argv=None)`, in one of the processes that torchrun started, or alone.

    This is where outside errors become one line on stderr: exit status 2 for what is Refused, 1 for what the
    file system answers.
    """
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv=None):
        sys.stderr = sys.stderr or io.StringIO()                # None if it was closed
        for stream in filter(None, (sys.stdout, sys.stderr)):   # names of folders need not be UTF-8
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")
        try:
            with processes.process_group():
                main(argv)
                print(end="", flush=True)
            return
        except Refused as error:
            status, message = 2, str(error)
        except BrokenPipeError:                     # of `| head`: nobody reads on, and nothing is lost
            status, message = 1, "its output was closed"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            where = error.filename or "its output"
            status, message = 1, f"{where}: {error.strerror or error}; what was written before is whole"
        print(f"{script}: {message}", file=sys.stderr)
        raise SystemExit(status)
    return run


def search_parser(description):
    """The flags of search.py."""
    p = Parser("search.py", description, "search.py [flags]")
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
    g.add_argument("--teacher", choices=("supernet", "network"), default="supernet", metavar="WHO",
                   help="the previous supernet, or its derived network (supernet, Eq. 4)")
    g.add_argument("--widen", choices=("eq3", "split", "zero", "naive"), default="eq3", metavar="HOW",
                   help="new channels are consumed by Eq. 3, in random shares (split), not at first (zero), "
                   "or by random weights (naive) (eq3)")
    g.add_argument("--flops-target", nargs="+", type=amount, metavar="F",
                   help="MACs of each stage's network, as in 0.9M, or off (Table 3's; the like)")
    g = p.add_argument_group("data and training", SOURCES)
    data_flags(g)
    p.set_defaults(**DATA)
    g.add_argument("--epochs", nargs="+", type=number(float, 1e-9, 1e6), metavar="E",
                   help="a stage, or for all (100 60 60 60 60, Experiments; 1 0.4 0.4 0.4 0.4)")
    g.add_argument("--batch-size", type=number(int, 1), metavar="B",
                   help="images a step (1024, Experiments; 32)")
    g.add_argument("--lr", type=number(float, 1e-9), help="peak learning rate of the weights' SGD (0.4; 0.1)")
    g.add_argument("--weight-decay", type=number(float, 0), default=1e-4, metavar="W",
                   help="of the weights (1e-4)")
    g.add_argument("--alpha-lr", type=number(float, 1e-9), metavar="LR",
                   help="learning rate of alpha's Adam (0.01; 0.02)")
    g = p.add_argument_group("the run")
    g.add_argument("--out", type=Path, metavar="DIR", help="its folder (the next of runs/001, runs/002, ..)")
    g.add_argument("--resume", action="store_true",
                   help="go on with the run in --out, or begin it if there is none")
    g.add_argument("--dry-run", action="store_true",
                   help="measure a few steps, print what the run would cost, and stop")
    run_flags(g)
    return p


def run_flags(g):
    """Add the flags that search.py and train.py share beside those of the data to an argparse group."""
    g.add_argument("--accumulate", type=number(int, 1), default=1, metavar="N",
                   help="compute a batch in N pieces, for less memory (1)")
    g.add_argument("--checkpoint-every", type=number(int, 1), default=500, metavar="N",
                   help="steps between checkpoints: what a kill may lose (500)")
    g.add_argument("--seed", type=number(int, 0), default=0, help="the same seed gives the same run (0)")
    g.add_argument("--device", default="auto", help="cpu, cuda, .. (auto: an accelerator if there is one)")


def data_flags(g):
    """Add the flags that say which images, without defaults, to an argparse group."""
    g.add_argument("--data", type=data_name, metavar="NAME|DIR",
                   help="fashion, cifar10, cifar100, fake; or a folder: train/ and val/ of class folders, or "
                   "class folders alone, a sixth of which is held out to test on (fashion)")
    g.add_argument("--classes", type=number(int, 2), metavar="N",
                   help="of a folder: so many, drawn by the seed (all; in the paper 100)")
    g.add_argument("--resolution", type=number(int, 8, 4096), metavar="R",
                   help="of a folder: pixels a side (224, Table 1; 32)")
    g.add_argument("--workers", type=number(int, 0), metavar="N",
                   help="of a folder: processes that decode images (as many as cores, up to 8)")
    g.add_argument("--skip-broken", action="store_true", default=None,
                   help="of a folder: leave out images that cannot be read")


def data_name(text):
    """An argparse type: the name of a data set, or the absolute path of a folder, which may have moved."""
    return text if text in data.NAMES else str(Path(text).resolve())


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


def amount(text):
    """An argparse type: a number of MACs, parameters, ..: "20M" -> 2e7; suffixes k, M, G. "off" is 0."""
    if text == "off":
        return 0.0
    scale = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:])
    value = float(text[:-1]) * scale if scale else float(text)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def load_images(args, part, run=None, checked=True):
    """The `data.Images` or `folder.Folder` that args.data and the like name; part: train or test.

    run, checked: as in `folder.load`. Refused if they are missing, broken or do not go together.
    """
    for key in ("classes", "resolution"):
        if getattr(args, key) and args.data in data.NAMES:
            raise Refused(f"--{key} is for a folder of images, and --data {args.data} is none")
    if args.data not in data.NAMES and not Path(args.data).is_dir():
        raise Refused(f"--data: {args.data} is neither one of {', '.join(data.NAMES)} nor a folder")
    try:
        if args.data in data.NAMES:
            with files.lock(data.__file__, wait=True):                   # only one downloads
                return data.load(args.data, part)
        return folder.load(Path(args.data), part, args.seed, args.resolution or RESOLUTION[args.space],
                           args.classes, args.workers, args.skip_broken, run, checked)
    except (OSError, EOFError, ValueError) as error:
        raise Refused(f"--data {args.data}: {error}") from None


def read_arch(file):
    """The `Arch` in a JSON file. Refused, with the file and what is wrong in it, if it holds none."""
    try:
        return Arch.from_json(file.read_text())
    except UnicodeDecodeError as error:
        raise Refused(f"{file} is not text ({error.reason})") from None
    except ValueError as error:
        raise Refused(f"{file}: {error}") from None


def kept(args):
    """The settings that make a run what it is, as args.json and checkpoints keep them."""
    return {key: value for key, value in vars(args).items() if key not in NOT_KEPT}


def same_run(args):
    """Of `kept`, what must be the same when a run is gone on with. A folder of images may have moved: what is
    in it must be the same, which `folder.unchanged` looks at.
    """
    same = {key: value for key, value in kept(args).items() if key not in FREE}
    return same | {"data": args.data if args.data in data.NAMES else "a folder"}


def argv_of(settings):
    """The command line of the settings in an args.json. Refused if these are not a run's."""
    p, argv = search_parser(None), []
    switches = {"grow": "--no-grow", "distill": "--no-distill", "skip_broken": "--skip-broken"}
    if differing := set(settings) ^ set(kept(p.parse_args([]))):
        raise Refused(f"{', '.join(sorted(differing))}: missing or unknown")
    for key, value in settings.items():
        if key in switches:
            argv += [switches[key]] * (value is (key == "skip_broken"))
        elif value is not None:
            values = value if isinstance(value, list) else [value]
            off = key == "flops_target" and 0 in values                 # written so; 0 is no number of MACs
            argv += [f"--{key.replace('_', '-')}", *("off" if off and v == 0 else str(v) for v in values)]
    return argv


def settings_of(run, images=None):
    """The arguments of the search that left args.json in the folder `run`. Refused if they are not such.

    images: a value of --data. If it is a folder to which the run's images have moved, it takes the place of
    the one in args.json.
    """
    file = run / "args.json"
    settings = files.read_json(file)
    try:
        args = completed(search_parser(None).parse_args(argv_of(settings)))
        for key, value in settings.items():
            if getattr(args, key) != value:
                raise Refused(f"{key} is {value!r}, not {getattr(args, key)!r}")
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
        elif values and len(values) < args.stages:
            raise Refused(f"--{key.replace('_', '-')}: {len(values)} values for {args.stages} stages; give "
                          "one for each, or one for all")
    if args.method == "scaling" and args.flops_target and not all(args.flops_target):
        raise Refused("--method scaling needs a --flops-target to scale to")
    if args.method == "naive":
        args.widen = "naive"
    if args.method != "cst":
        args.grow, args.distill = args.method == "naive", False
    return args


def search_arguments(argv, description):
    """The checked arguments of search.py. With --resume the run's own, which those given must equal."""
    p = search_parser(description)
    argv = sys.argv[1:] if argv is None else argv
    args = p.parse_args(argv)
    if args.resume and args.out is None:
        raise Refused("--resume needs --out with the folder of a run")
    if args.resume and (args.out / "args.json").exists():
        ran = settings_of(args.out)
        args = completed(p.parse_args([*argv_of(kept(ran)), *argv]))
        asked = same_run(args)
        for key, value in same_run(ran).items():
            if asked[key] != value:
                raise Refused(f"--{key.replace('_', '-')} is {asked[key]}, but the run in {args.out} has "
                              f"{value}")
    args = completed(args)
    batch_pieces(args)
    if args.out and args.out.is_dir() and not args.dry_run:
        check_folder(args.out, args.resume)         # before images are read, which may take long
    return args


def check_folder(out, resume):
    """Refused if the folder `out` holds something else than the run that is to be gone on with."""
    held = {path.name for path in out.iterdir() if path.suffix != ".tmp"}
    if resume and "last.pt" not in held and "A0.pt" in held:
        raise Refused(f"{out} has finished stages but no last.pt, so nothing says how to go on: choose "
                      "another folder")
    if resume and held and "args.json" not in held:
        raise Refused(f"--resume: {out} is not the folder of a run, it has no args.json")
    if not resume and held:
        raise Refused(f"--out {out} holds something already: choose another folder, or add --resume")


def run_folder(args, stack):
    """The folder of a search, made and locked until `stack` ends: args.out, or the next of runs/001, ..

    Refused, under the lock, if it holds something else than the run that is to be gone on with.
    """
    if args.out is None:
        for n in itertools.count(1):
            out = Path("runs") / f"{n:03d}"
            with contextlib.suppress(FileExistsError):
                out.mkdir(parents=True)
                break
    else:
        out = args.out
    lock(out, stack)
    check_folder(out, args.resume)
    return out


def lock(out, stack):
    """Make the folder `out` and lock it until `stack` ends. Refused if another run has. What a kill left
    there of unfinished files is removed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(files.lock(out))
        for path in out.glob("*.tmp"):
            path.unlink()
    except BlockingIOError:
        raise Refused(f"--out {out} is in use by another run: wait for its end, or choose another "
                      "folder") from None
    except OSError as error:
        raise Refused(f"--out {out}: {error.strerror}") from None


def batch_pieces(args):
    """(most, fewest) images of a batch that a process computes at once. Refused if a batch does not split."""
    n = processes.world_size()
    if args.batch_size % n:
        raise Refused(f"--batch-size {args.batch_size} does not divide by the {n} processes")
    mine = args.batch_size // n
    if args.accumulate > mine:
        raise Refused(f"--accumulate {args.accumulate} is more than the {mine} images that a process has of "
                      "a batch")
    most = math.ceil(mine / args.accumulate)
    return most, mine % most or most                # the last piece has what is left


def check_pixels(args, size, name, blocks):
    """Refused where `size` pixels a side are too few for the strides of network `name`, or a piece of a batch
    has too few for batch norm.
    """
    strides = total_stride(blocks)
    if 2 * size <= strides:
        raise Refused(f"{size} pixels a side are too few for {name}, whose strides make one of {strides}: "
                      "take a larger --resolution")
    if size <= strides and batch_pieces(args)[1] == 1:
        raise Refused(f"a piece of one image, of which {name} leaves one pixel, is too little for batch "
                      "norm: take a larger --batch-size, a smaller --accumulate, or a larger --resolution")
