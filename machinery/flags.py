"""The command lines: what their flags have in common, and how a mistake ends."""
from machinery import files, folder, processes
from machinery.files import Refused

import argparse
import contextlib
import functools
import io
import math
import os
import sys
from pathlib import Path

import data
from space import Arch, total_stride

SOURCES = "In brackets: the default in the paper's space, with its source if it has one; that in ours."
RESOLUTION = {"paper": 224, "small": 32}        # of the images of a folder
DATA = {"data": "fashion", "classes": None, "resolution": None, "workers": None, "skip_broken": False}


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
                   help="of a folder: use N, drawn by the seed (all; in the paper 100)")
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


def with_suffix(text, suffixes):
    """A number times what its suffix stands for; above 0 and finite, or ValueError."""
    digits = text.rstrip("".join(suffixes))
    value = float(digits) * suffixes.get(text.removeprefix(digits), 0)
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value


def amount(text):
    """An argparse type: a number of MACs, parameters, ..: "20M" -> 2e7; suffixes k, M, G. "off" is 0."""
    return 0.0 if text == "off" else with_suffix(text, {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9})


def duration(text):
    """An argparse type: nanoseconds of a time: "2ms" -> 2e6; suffixes ns, us, ms, s."""
    return with_suffix(text, {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9})


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
        return Arch.from_json(file.read_bytes())
    except OSError as error:
        raise Refused(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise Refused(f"{file}: {error}") from None


def lock(out, stack):
    """Make the folder `out` and lock it until `stack` ends. Refused if another run holds it. Temporary files
    that a kill has left there are removed.
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
