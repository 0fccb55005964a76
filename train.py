"""Training a derived network, or all of a run, from scratch or from the supernet's weights (Experiments).

    python train.py runs/001            # A0.json, A1.json, .. of a run, then the curve
    python train.py runs/001/A3.json

The whole training set; SGD with Nesterov momentum, linear warm-up and a cosine to zero, label smoothing,
weight decay of weight matrices alone, dropout before the classifier. The network of the last epoch
counts: the test images choose nothing.
"""
import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import flops
import plot
from derive import Network, accuracy, inherit, open_supernet
from search import choose_device, learning_rate, load_data, number, one_line, packed
from space import Arch, write
from supernet import initialise

# The paper trains 180 epochs on ImageNet; what else it does not say, and all for the small space, is ours.
DEFAULTS = {"paper": {"epochs": 180, "batch_size": 1024, "lr": 0.4, "dropout": 0.2},
            "small": {"epochs": 3, "batch_size": 64, "lr": 0.2, "dropout": 0.0}}
BATCHES, INITIAL = range(10, 12)                          # what is drawn: with seed and stage it seeds a generator


def train(network, loader, index, tester, test_index, args, stage):
    """Train `network` on the images at `index`; after each epoch yields its row: epoch, loss, accuracy on
    the images of the `Loader` tester at `test_index`, seconds.
    """
    decayed, others = [], []
    for p in network.parameters():
        (decayed if p.dim() > 1 else others).append(p)
    sgd = torch.optim.SGD([{"params": decayed, "weight_decay": args.weight_decay}, {"params": others}],
                          args.lr, momentum=0.9, nesterov=True)
    epoch_length = len(index) // args.batch_size
    batches = loader.shuffled(index, args.seed, stage, BATCHES)
    for epoch in range(args.epochs):
        network.train()
        clock, total = time.perf_counter(), torch.zeros((), device=loader.device)
        with tqdm(range(epoch_length), desc=f"A{stage} epoch {epoch}", disable=None) as bar:
            for step in bar:
                for group in sgd.param_groups:
                    group["lr"] = learning_rate(args.lr, epoch * epoch_length + step, args.epochs * epoch_length)
                x, y = next(batches)
                loss = F.cross_entropy(network(x), y, label_smoothing=args.smoothing)
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                total += loss.detach()
                if step % 50 == 49:
                    bar.set_postfix_str(f"loss {float(total) / (step + 1):.3f}")
        yield {"stage": stage, "epoch": epoch, "loss": float(total) / epoch_length,
               "accuracy": accuracy(network, tester.ordered(test_index)), "seconds": time.perf_counter() - clock}


def initial(arch, args, folder):
    """A `Network` of `arch` with random weights, or with those of the supernet of its stage, in its folder."""
    network = Network(arch, args.dropout)
    initialise(network, data.generator(args.seed, arch.stage, INITIAL))
    if args.init == "inherit":
        inherit(network, open_supernet(folder, arch.stage))
    return network


def parser():
    p = one_line(argparse.ArgumentParser(prog="train.py", description=__doc__,
                                         formatter_class=argparse.RawDescriptionHelpFormatter))
    p.add_argument("what", type=Path, metavar="ARCH.json|RUN", help="a network, or the folder of a run with A0.json, ..")
    p.add_argument("--init", choices=("scratch", "inherit"), default="scratch", help="random weights, as in the paper, or "
                   "those of the supernet, from the .pt file beside the network (scratch)")
    p.add_argument("--data", choices=data.NAMES, default="fashion", help="as in search.py (fashion)")
    p.add_argument("--epochs", type=number(int, 1), help="(180 for the paper's space, as there; 3 for small)")
    p.add_argument("--batch-size", type=number(int, 1), metavar="B", help="(1024; 64)")
    p.add_argument("--lr", type=number(float, 1e-9), help="peak learning rate (0.4; 0.2)")
    p.add_argument("--weight-decay", type=number(float, 0), default=1e-4, help="of weight matrices, not of batch norm and biases (1e-4)")
    p.add_argument("--smoothing", type=number(float, 0), default=0.1, help="label smoothing (0.1)")
    p.add_argument("--dropout", type=number(float, 0), help="before the classifier (0.2; 0)")
    p.add_argument("--validate", action="store_true", help="to choose settings by: train on 5/6 of the training images, and "
                   "report accuracy on the other 1/6 instead of the test images")
    p.add_argument("--out", type=Path, metavar="DIR", help="folder of the results (the network's own)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="the same seed gives the same run (0)")
    p.add_argument("--device", default="auto", help="cpu, cuda, .. (auto: an accelerator if there is one)")
    return p


def networks(p, what):
    """The `Arch`s named on the command line, {file name without ending: Arch}, and the folder that they lie in."""
    if what.is_dir():
        files = sorted(what.glob("A[0-4].json"))
        if not files:
            p.error(f"{what} has no A0.json, A1.json, ..: it is not the folder of a run")
    else:
        files = [what]
    found = {}
    for file in files:
        try:
            found[file.stem] = Arch.from_json(file.read_text())
        except (OSError, ValueError) as error:
            p.error(f"{file}: {getattr(error, 'strerror', None) or error}")
    return found, files[0].parent


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    archs, folder = networks(p, args.what)
    out, device = args.out or folder, choose_device(p, args.device)
    out.mkdir(parents=True, exist_ok=True)
    images, test = load_data(p, args.data, "train"), load_data(p, args.data, "test")
    index = torch.arange(len(images.labels))
    if args.validate:
        index, held_out = data.split(images.labels, args.seed)
        test = data.Images(images.pixels[held_out], images.labels[held_out], images.classes)
    results = out / "trained.json"
    rows = json.loads(results.read_text()) if results.exists() else []
    for name, arch in archs.items():
        for key, value in DEFAULTS["paper" if arch.space == "paper" else "small"].items():
            setattr(args, key, value if getattr(args, key) is None else getattr(args, key))
        torch.manual_seed(args.seed)                          # dropout's draws
        network = initial(arch, args, folder).to(device)
        stats = data.statistics(images, index)
        loader = data.Loader(images, stats, args.batch_size, device)
        tester = data.Loader(test, stats, args.batch_size, device)
        clock = time.perf_counter()
        for row in train(network, loader, index, tester, torch.arange(len(test.labels)), args, arch.stage):
            print(f"{name} epoch {row['epoch']}  loss {row['loss']:.3f}  accuracy {100 * row['accuracy']:.2f} %  "
                  f"{row['seconds']:.0f} s", flush=True)
        if args.validate:
            continue
        result = {"name": name, "stage": arch.stage, "flops": flops.macs(arch), "params": flops.params(arch),
                  "accuracy": row["accuracy"], "seconds": time.perf_counter() - clock, "epochs": args.epochs,
                  "init": args.init, "seed": args.seed}
        rows = [r for r in rows if r["name"] != name] + [result]
        write(out / f"{name}.trained.pt", packed(network.state_dict()))
        write(results, json.dumps(sorted(rows, key=lambda r: r["name"]), indent=1) + "\n")
    if not args.validate and (out / "summary.json").exists():
        plot.curve([out], out / "curve.png")
        print(f"curve: {out / 'curve.png'}")


if __name__ == "__main__":
    sys.exit(main())
