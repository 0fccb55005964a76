"""Reference points for the curve: torchvision's small networks, trained as train.py trains ours.

    python tests/reference.py runs/001

MobileNetV3-small, MobileNetV2 and ShuffleNetV2, each at the width that comes nearest to the MACs of a target,
as rows of the run's trained.json, which plot.py draws in black: the same images, recipe, initialisation and
seed, and train.py's flags for them. With --validate they are evaluated on the search's validation split, and
nothing is written.

Adapted to 28 x 28 pixels as the small space is: stem of stride 2, two more strides (28, 14, 7, 4), 256
channels in the last 1x1 convolution, and depths as they were. MobileNets keep their first and third stride
after the stem; ShuffleNetV2 goes without its pooling and its last stride.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from machinery import files, flags, processes, settings
from machinery.results import enter
from machinery.run import Run

import contextlib
import functools

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import MobileNetV2, MobileNetV3, ShuffleNetV2
from torchvision.models.mobilenetv3 import _mobilenet_v3_conf

import data
import flops
import train
from derive import evaluate
from ops import initialise
from space import SPACES

HEAD = SPACES["small"][0].head


def strided(strides):
    """Of a network's strides after the stem, the first and the third stay."""
    twos = [n for n, s in enumerate(strides) if s == 2]
    return [2 if n in (twos[0], twos[2]) else 1 for n in range(len(strides))]


def mobilenet_v2(width, channels, classes, dropout):
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
            (6, 320, 1, 1)]
    rows = [(*row[:3], s) for row, s in zip(rows, strided([row[3] for row in rows]))]
    network = MobileNetV2(classes, width, rows, dropout=dropout)
    return refit(network, channels, classes)


def mobilenet_v3(width, channels, classes, dropout):
    rows, _ = _mobilenet_v3_conf("mobilenet_v3_small", width_mult=width)
    for row, s in zip(rows, strided([row.stride for row in rows])):
        row.stride = s
    return refit(MobileNetV3(rows, HEAD, classes, dropout=dropout), channels, classes)


def refit(network, channels, classes):
    """A MobileNet for images of so many channels, with `HEAD` channels behind its last 1x1 convolution."""
    stem, (last, bn, _) = network.features[0][0], network.features[-1]
    network.features[0][0] = nn.Conv2d(channels, stem.out_channels, 3, 2, 1, bias=False)
    network.features[-1][0] = nn.Conv2d(last.in_channels, HEAD, 1, bias=False)
    network.features[-1][1] = nn.BatchNorm2d(HEAD, bn.eps, bn.momentum)
    first = next(n for n, m in enumerate(network.classifier) if isinstance(m, nn.Linear))
    network.classifier[first] = nn.Linear(HEAD, network.classifier[first].out_features)
    return network


def shufflenet_v2(width, channels, classes, dropout):
    """It has no dropout. Its stages' channels are even numbers."""
    widths = [24, *(2 * round(c * width / 2) for c in (116, 232, 464)), HEAD]
    network = ShuffleNetV2([4, 8, 4], widths, classes)
    network.conv1[0] = nn.Conv2d(channels, 24, 3, 2, 1, bias=False)
    network.maxpool = nn.Identity()
    for layer in (network.stage4[0].branch1[0], network.stage4[0].branch2[3]):
        layer.stride = (1, 1)
    return network


BUILDERS = {"MobileNetV3-small": mobilenet_v3, "MobileNetV2": mobilenet_v2, "ShuffleNetV2": shufflenet_v2}


def macs(network, channels, pixels):
    """Multiply-accumulates of one image, by PyTorch's counter: not by flops.py."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, channels, pixels, pixels))
    return counter.get_total_flops() // 2


def nearest(build, target, channels, pixels, classes, dropout=0.0):
    """(width, network, MACs): the one whose MACs are nearest to `target`, of the widths 0.02, 0.04, .. 1.5.
    """
    @functools.cache
    def count(n):
        return macs(build(n / 50, channels, classes, dropout), channels, pixels)
    low, high = 1, 75
    while high - low > 1:                                # wider is dearer
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    n = min(low, high, key=lambda n: abs(count(n) - target))
    return n / 50, build(n / 50, channels, classes, dropout), count(n)


def parse(argv):
    """(this script's own arguments, train.py's)."""
    p = flags.Parser("reference.py", __doc__)
    p.epilog = "further flags: those of the training, train.py --help"
    p.add_argument("dir", type=Path, metavar="RUN", help="folder of a run")
    p.add_argument("--targets", type=flags.amount, nargs="+", metavar="F",
                   help="MACs (those of A0, A2 and A4)")
    own, rest = p.parse_known_args(argv)
    args = settings.train_parser(None).parse_args([str(own.dir), *rest])
    for flag in ("init", "export", "out", "jobs"):
        if getattr(args, flag) != settings.train_parser(None).get_default(flag):
            raise files.Refused(f"--{flag} is for train.py alone")
    return own, args


@flags.command
def main(argv=None):
    own, args = parse(argv)
    archs, folder = train.read_archs(own.dir)
    args.out = args.run_folder = folder
    wanted = settings.own_images(args, archs)
    args.data = wanted.data
    images = flags.load_images(wanted, "train", folder)
    test_images = images if args.validate else flags.load_images(wanted, "test", folder)
    train.check(args, archs, images)
    device, results = processes.choose_device(args.device), folder / "trained.json"
    parts = torch.arange(len(images.labels)), torch.arange(len(test_images.labels))
    if args.validate:
        parts = data.split(images.labels, wanted.seed)
    statistics = images.statistics(parts[0])
    trained = {row["name"] for row in files.read_json(results, list)} if results.exists() else ()
    targets = own.targets or [flops.macs(arch) for arch in list(archs.values())[::2]]
    with contextlib.ExitStack() as stack, processes.catch_signals() as signals:
        flags.lock(folder, stack)
        for n, target in enumerate(targets):
            for name, build in BUILDERS.items():
                given = train.completed(args, next(iter(archs.values())), name, device)
                width, network, count = nearest(build, target, images.channels, images.resolution,
                                                images.classes, given.dropout)
                given.name = name = f"{name} x{width:g}"
                if args.resume and name in trained:
                    continue
                initialise(network, data.generator(args.seed, n, train.INITIAL))
                params = sum(p.numel() for p in network.parameters())
                print(f"{name}: {count / 1e6:.3f} M MACs, {params / 1e6:.3f} M parameters", flush=True)
                loader, test_loader = (data.Loader(part, statistics, given.batch_size, device)
                                       for part in (images, test_images))
                asked = {key: getattr(given, key) for key in train.SETTINGS} | {"reference": name}
                checkpoint = None if args.validate else folder / f"{name}.last.pt"
                run = Run(checkpoint, asked, device, signals, most_skipped=0)
                if args.resume:
                    run.resume()

                def test(network, loader=test_loader):
                    return evaluate(network, loader, parts[1])
                network = network.to(device, memory_format=torch.channels_last)
                train.train(network, n, loader, parts[0], test, given, run)
                if args.validate:
                    continue
                epochs = run.state["rows"]
                row = {"name": name, "stage": n, "init": "scratch", "flops": count, "params": params,
                       "accuracy": epochs[-1]["accuracy"], "seconds": run.seconds(), "seed": args.seed,
                       "epochs": epochs}
                enter(results, row)
                run.checkpoint_path.unlink()


if __name__ == "__main__":
    main()
