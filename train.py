"""Training a derived network, or all of a run, from scratch or from the supernet's weights (Experiments).

    python train.py runs/001                        # A0.json, A1.json, .. of a run, then the curve
    python train.py runs/001 --init inherit         # from the supernet's weights
    python train.py runs/001/A3.net.pt --export A3.onnx
    torchrun --nproc_per_node 8 train.py runs/001   # a process a GPU, each on its shard of every batch

What is trained is one file, A3.net.pt: `python network.py A3.net.pt photo.jpg`. No model is selected on test
images: the network of the last epoch counts.
"""
from machinery import export, files, flags, folder, processes
from machinery.files import Refused
from machinery.results import curves, enter, is_trained
from machinery.run import Run
from machinery.settings import own_images, train_parser
from machinery.workers import cores

import argparse
import contextlib
import io
import itertools
import math
import os

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data
import flops
import plot
from derive import RECALIBRATION, evaluate, inherit, open_supernet, recalibrate
from network import Network, load, save
from ops import initialise

# The paper says 180 epochs of ImageNet; the other values for it are common ones. Those for small images are
# ours, chosen on the validation split (--validate); an average over three epochs would only lag behind.
DEFAULTS = {"paper": {"epochs": 180, "batch_size": 1024, "lr": 0.4, "dropout": 0.2, "ema": 0.9999},
            "small": {"epochs": 3, "batch_size": 64, "lr": 0.2, "dropout": 0.0, "ema": 0.0}}
SETTINGS = ("epochs", "batch_size", "accumulate", "lr", "weight_decay", "smoothing", "dropout", "ema",
            "autocast", "init", "seed", "data")         # what makes a training what it is
BATCHES, INITIAL, STATISTICS = range(10, 13)    # what is drawn: with seed and stage it seeds a generator


def learning_rate(peak, step, steps, warmup=0.05):
    """The lower of a linear warm-up, over 5 % of the steps, and a cosine to zero. The paper is silent."""
    progress = (step + 0.5) / steps
    return peak * min(progress / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))


def optimizer(network, args):
    """SGD with Nesterov momentum, and weight decay of weight matrices alone."""
    matrices, vectors = ([p for p in network.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    return torch.optim.SGD([{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors}],
                           args.lr, momentum=0.9, nesterov=True, fused=True)


def train(network, stage, loader, index, test, args, run):
    """Train `network` on the images at `index`, and return it, or its moving average.

    The recipe ("retraining") is SGD with Nesterov momentum, linear warm-up and a cosine to zero, label
    smoothing, weight decay of weight matrices alone, dropout before the classifier, an exponential moving
    average of the weights. Batch norm is measured anew after every epoch.

    test: a function of a network -> its accuracy, which is logged after every epoch. `run` has the rows.
    """
    sgd = optimizer(network, args)
    average = AveragedModel(network) if args.ema else None
    result = average.module if average else network
    epoch_length = len(index) // args.batch_size
    steps = args.epochs * epoch_length
    start, shard = run.begin(stage, network=network, sgd=sgd, average=average), processes.shard()
    batches = loader.shuffled(index, args.seed, stage, BATCHES, start=start, shard=shard)
    for step in run.steps(steps, epoch_length, args.name, args.checkpoint_every):
        epoch = step // epoch_length
        dropout_seed = data.generator(args.seed, processes.rank(), epoch, step % epoch_length).initial_seed()
        torch.manual_seed(dropout_seed)
        for group in sgd.param_groups:
            group["lr"] = learning_rate(args.lr, step, steps)
        x, y = next(batches)

        network.train()
        sgd.zero_grad()
        loss = torch.zeros((), device=loader.device)
        for part_x, part_y in zip(x.chunk(args.accumulate), y.chunk(args.accumulate)):
            with torch.autocast(loader.device.type, torch.bfloat16, enabled=args.autocast):
                part = F.cross_entropy(network(part_x), part_y, label_smoothing=args.smoothing)
            part = part * (len(part_y) / len(y))
            part.backward()
            loss += part.detach()
        if run.synchronise(list(network.parameters()), loss.view(1)):
            sgd.step()
            if average:                         # the decay rises to what was asked for
                average.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema, (1 + step) / (10 + step)))
                average.update_parameters(network)

        if run.ends_epoch(step):
            again = loader.shuffled(index, args.seed, stage, STATISTICS, epoch, shard=shard)
            recalibrate(result, itertools.islice(again, RECALIBRATION))     # statistics lag behind weights
            processes.average_buffers(result)
            row = run.log({"epoch": epoch, "accuracy": test(result)})
            print(f"{args.name} epoch {epoch}: loss {row['loss']:.3f}, "
                  f"accuracy {100 * row['accuracy']:.2f} %, {row['seconds']:.0f} s", flush=True)
    return result


def initial(arch, args):
    """A `Network` of `arch` with random weights, or with those of its stage's supernet, in args.run_folder.

    Refused if it is no part of that supernet.
    """
    network = Network(arch, args.dropout)
    initialise(network, data.generator(args.seed, arch.stage, INITIAL))
    if args.init == "inherit":
        supernet = open_supernet(args.run_folder, arch.stage)
        ends = supernet.stem.in_channels, supernet.classifier.out_features
        try:
            if (arch.in_channels, arch.classes) != ends:            # of which a part would be copied
                raise ValueError
            inherit(network, supernet)
        except (RuntimeError, ValueError):              # more channels than the supernet has, or more blocks
            raise Refused(f"the network is no part of the supernet in {args.run_folder}/A{arch.stage}.pt, so "
                          "it has no weights to begin with") from None
    return network


def read_archs(what):
    """The `Arch`s that the command line names, {file name without ending: Arch}, and their folder."""
    paths = sorted(what.glob("A[0-4].json")) if what.is_dir() else [what]
    if not paths:
        raise Refused(f"{what} has no A0.json, A1.json, ..: it is not the folder of a run")
    return {file.stem: flags.read_arch(file) for file in paths}, paths[0].parent


def read_trained(path):
    """The `network.TrainedNetwork` in a file. Refused if it holds none."""
    try:
        return load(path)
    except ValueError as error:
        raise Refused(error) from None


def check(args, archs, images):
    """Refused if what the flags name does not fit together."""
    for name, arch in archs.items():
        if arch.in_channels != images.channels or args.init == "inherit" and arch.classes != images.classes:
            raise Refused(f"{name} is for {arch.in_channels} channels and {arch.classes} classes, but --data "
                          f"{args.data} has {images.channels} and {images.classes}")
        weights = args.run_folder / f"A{arch.stage}.pt"
        if args.init == "inherit" and not weights.exists():
            raise Refused(f"--init inherit needs the supernet's weights, {weights}")
    if args.validate and (args.resume or args.export):
        raise Refused("--validate writes nothing, and goes on with nothing: not with --resume or --export")
    if args.jobs > 1 and (args.validate or processes.world_size() > 1):
        raise Refused("--jobs trains a run's networks side by side: not with --validate or torchrun")
    if args.export and len(archs) > 1:
        raise Refused("--export writes one network: name its ARCH.json")
    curves([args.out])            # refuses now what would break the curve at the end


def completed(args, arch, name, device):
    """A copy of `args` with what was not given: the defaults of the network's space, and of the device."""
    defaults = DEFAULTS["paper" if arch.space == "paper" else "small"] | {"autocast": device.type == "cuda"}
    given = {key: value for key, value in vars(args).items() if value is not None}
    return argparse.Namespace(**vars(args) | defaults | given | {"name": name})


def check_size(arch, args, images, device):
    """Refused if a batch does not fit images or processes, or an `Arch` the memory."""
    if args.batch_size > images:
        raise Refused(f"--batch-size {args.batch_size} is more than the {images} images")
    flags.check_pixels(args, arch.resolution, args.name, arch.blocks)
    need = flops.training_memory(arch, flags.batch_pieces(args)[0]) / 2 ** 30
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2 ** 30
    if device.type == "cuda":
        has = torch.cuda.mem_get_info(device)[1] / 2 ** 30
    if need > has:
        raise Refused(f"{args.name} needs {need:,.1f} GB to train with --batch-size {args.batch_size}, by an "
                      f"estimate that is rather low, but there are {has:,.1f}: take a larger --accumulate, "
                      "or a smaller network")


def train_one(arch, images, test_images, parts, args, run):
    """Train one network. Returns the bytes of its A3.net.pt, with its normalisation and what it is, and the
    rows of the log. parts: indices of the images to train on, and of the test images.
    """
    statistics = images.statistics(parts[0])
    loader = data.Loader(images, statistics, args.batch_size, run.device)
    test_loader = data.Loader(test_images, statistics, args.batch_size, run.device)

    def test(network):
        return evaluate(network, test_loader, parts[1])
    network = train(initial(arch, args).to(run.device), arch.stage, loader, parts[0], test, args, run)
    rows, content = run.state["rows"], io.BytesIO()
    save(content, network, statistics, images.class_names, rows[-1]["accuracy"], run.settings, images.crop)
    return content.getvalue(), rows


def plan(args, archs, images, count, device):
    """Yield (name, `Arch`, its arguments, its settings, whether it is trained already) of each of `archs`, to
    be trained on `count` images. Refused if it cannot be trained, or written.
    """
    for name, searched in archs.items():
        arch = searched._replace(classes=images.classes, resolution=images.resolution)  # as the images are
        file_name = name if args.init == "scratch" else f"{name}.{args.init}"
        given = completed(args, arch, file_name, device)
        given.data = f"{count:,} images of {getattr(images, 'digest', args.data)}"
        processes.on_rank0(check_size, arch, given, count, device)
        settings = {key: getattr(given, key) for key in SETTINGS} | {"network": arch.to_json()}
        trained = not args.validate and processes.on_rank0(is_trained, given, settings, read_trained)
        yield name, arch, given, settings, trained


def train_all(args, archs, images, test_images, device, signals, write=True):
    """Train each of `archs` that is not trained yet, and write it and the results into args.out.

    write: False leaves each in its last checkpoint, from which another call goes on, and writes it. Returns
    the last one's file.
    """
    parts = torch.arange(len(images.labels)), torch.arange(len(test_images.labels))
    if args.validate:
        parts = data.split(images.labels, args.split_seed)
    for name, arch, given, settings, trained in plan(args, archs, images, len(parts[0]), device):
        path, checkpoint = args.out / f"{given.name}.net.pt", args.out / f"{given.name}.last.pt"
        if trained:
            if write:
                print(f"{given.name} is trained: {path}", flush=True)
            continue
        run = Run(None if args.validate else checkpoint, settings, device, signals, most_skipped=0)
        if args.resume:
            run.resume()
        content, epochs = train_one(arch, images, test_images, parts, given, run)
        if args.validate or processes.rank() or not write:
            continue                                        # of many processes rank 0 writes
        files.write(path, content)
        enter(args.out / "trained.json", {
            "name": name, "init": args.init, "stage": arch.stage, "flops": flops.macs(arch),
            "params": flops.params(arch), "accuracy": epochs[-1]["accuracy"], "seconds": run.seconds(),
            "seed": args.seed, "epochs": epochs})
        checkpoint.unlink()
        print(f"{given.name} is trained: {path}", flush=True)
    if write and processes.rank() == 0 and not args.validate and (args.out / "summary.json").exists():
        plot.curve([args.out], args.out / "curve.png")
        print(f"curve: {args.out / 'curve.png'}")
    return path


def export_trained(args):
    """Export the network in args.what, a file. Refused with flags that would change it."""
    p = train_parser(None)
    others = [f"--{key.replace('_', '-')}" for key, value in vars(args).items()
              if key not in ("what", "export", "device") and value != p.get_default(key)]
    if others:
        raise Refused(f"{', '.join(others)}: {args.what} is trained already, and is exported as it is")
    if not args.export:
        raise Refused(f"{args.what} is trained already: --export FILE writes it as .pt2 or .onnx")
    export.export(read_trained(args.what), args.export)


@flags.command
def job(given):
    """What a process of --jobs does: it trains one network to its last checkpoint."""
    args, wanted, archs = given
    with contextlib.redirect_stdout(None):
        images, test_images = (flags.load_images(wanted, part, args.out) for part in ("train", "test"))
    with processes.catch_signals() as signals:
        device = processes.choose_device(args.device)
        train_all(args, archs, images, test_images, device, signals, write=False)


@flags.command
def main(argv=None):
    args = processes.on_rank0(train_parser(__doc__).parse_args, argv)
    if args.export:
        processes.on_rank0(export.check, args.export)
    if args.what.name.endswith(".net.pt"):
        return processes.on_rank0(export_trained, args)
    archs, args.run_folder = processes.on_rank0(read_archs, args.what)
    args.out, device = args.out or args.run_folder, processes.choose_device(args.device)
    wanted = processes.on_rank0(own_images, args, archs)
    checked = args.out if (args.out / "checked.json").exists() else args.run_folder
    images = flags.load_images(wanted, "train", checked)
    test_images = images if args.validate else flags.load_images(wanted, "test", checked)
    args.data, args.split_seed = wanted.data, wanted.seed                   # the parts of the search
    processes.on_rank0(check, args, archs, images)
    with contextlib.ExitStack() as stack, processes.catch_signals() as signals:
        processes.on_rank0(flags.lock, args.out, stack)
        if wanted.own:
            folder.unchanged(images, args.run_folder)
        if not args.validate:
            folder.record(images, args.out)
            folder.record(test_images, args.out)
        if args.jobs > 1:
            if wanted.workers is None:
                wanted.workers = cores() // min(args.jobs, len(archs))
            each = [(args, wanted, {name: archs[name]})
                    for name, *_, trained in plan(args, archs, images, len(images.labels), device)
                    if not trained]
            processes.side_by_side(job, each, args.jobs, signals)
            args.resume = True                  # from the checkpoints that they have left
        path = train_all(args, archs, images, test_images, device, signals)
    if args.export:
        processes.on_rank0(lambda: export.export(read_trained(path), args.export))  # which rank 0 has written


if __name__ == "__main__":
    main()
