"""The curriculum A0..A4 (Figure 2): train a supernet, derive its network, grow it, let the old one teach the new one.

    python search.py --stages 5

`search` is Figure 2 as a loop, `train_stage` is one of its boxes, and `two_paths` is what both of its updates share.
"""
import argparse
import io
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
import distill
import flops
import plot
from derive import Network, accuracy, derive, expected_macs, inherit, recalibrate, space_costs
from grow import WIDENINGS, describe, grow, movement
from space import SPACES, Arch, write
from supernet import SuperNet, temperature

WEIGHTS_A_STEP = 5                        # the parts are 5/6 and 1/6: five weight steps, then one of the architecture
RECALIBRATION = 32                        # training batches that measure a derived network's batch-norm statistics
WEIGHTS, ALPHAS, PATHS, GROWTH = range(4)             # what is drawn: with seed, stage and step it seeds a generator
# The paper's epochs and batch size; our small space takes a hundredth of the epochs.
DEFAULTS = {"paper": {"epochs": (100, 60, 60, 60, 60), "batch_size": 1024, "lr": 0.4, "alpha_lr": 0.01},
            "small": {"epochs": (1, 0.6, 0.6, 0.6, 0.6), "batch_size": 32, "lr": 0.1, "alpha_lr": 0.02}}
METHODS = {"cst": "curriculum supernet training, the paper's",
           "direct": "every stage from scratch, without a teacher",
           "naive": "grown with random new weights, without a teacher"}


def search(args, out, device):
    """Figure 2. Everything that a run leaves is written into the folder `out`. Returns the summary, a row a stage."""
    images = data.load(args.data, "train")
    parts = data.split(images.labels, args.seed)                              # 5/6 for the weights, 1/6 for alpha
    loader = data.Loader(images, data.statistics(images, parts[0]), args.batch_size, device)
    shape = {"in_channels": images.pixels.shape[1], "classes": images.classes}
    supernet = teacher = None
    run = {"stage": 0, "step": 0, "seconds": 0.0, "means": {}, "log": [], "summary": []}
    resumed = args.resume and (out / "last.pt").exists()
    if resumed:
        run = torch.load(out / "last.pt", map_location=device, weights_only=True)
    for stage in range(run["stage"], args.stages):
        clock = time.perf_counter()
        space = SPACES[args.space][stage]._replace(resolution=images.pixels.shape[-1])
        generator = data.generator(args.seed, stage, GROWTH)
        if resumed or supernet is None or not args.grow:
            supernet = SuperNet(space, **shape, generator=generator).to(device)
        else:
            old, supernet = supernet, grow(supernet, space, generator, args.widen)
            moved = movement(old, supernet, loader.batch(parts[1][:8])[0])
            print(f"A{stage}: {describe(old, supernet)}; "
                  f"the largest network's logits moved by {moved:.1e} of their size", flush=True)
        sgd = torch.optim.SGD(supernet.weights(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
        adam = torch.optim.Adam(supernet.alphas(), args.alpha_lr, betas=(0.5, 0.999))
        if resumed:
            supernet.load_state_dict(run["supernet"])
            sgd.load_state_dict(run["sgd"])
            adam.load_state_dict(run["adam"])
            if run["teacher"]:
                teacher = Network(Arch.from_json(run["teacher_arch"])).to(device).requires_grad_(False).eval()
                teacher.load_state_dict(run["teacher"])
            resumed = False

        run["seconds"] += time.perf_counter() - clock
        for row in train_stage(supernet, teacher, sgd, adam, loader, parts, args, run):      # an epoch each
            run["log"].append(row)
            run["seconds"] += row["seconds"]
            write(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in run["log"]))
            write(out / "last.pt", packed(run | {
                "stage": stage, "supernet": supernet.state_dict(), "sgd": sgd.state_dict(), "adam": adam.state_dict(),
                "teacher": teacher and teacher.state_dict(), "teacher_arch": teacher and teacher.arch.to_json()}))

        clock = time.perf_counter()
        arch = derive(supernet, args.flops_target[stage])
        network = inherit(Network(arch).to(device), supernet).requires_grad_(False)
        batches = loader.shuffled(parts[0], args.seed, stage, WEIGHTS)
        recalibrate(network, (next(batches) for _ in range(RECALIBRATION)))
        right = accuracy(network, loader.ordered(parts[1]))
        write(out / f"A{stage}.json", arch.to_json())
        write(out / f"A{stage}.pt", packed(supernet.state_dict()))
        seconds = run["seconds"] + time.perf_counter() - clock
        hours, kwh, co2e = flops.energy(seconds, device)
        run["summary"].append({"stage": stage, "flops": flops.macs(arch), "params": flops.params(arch), "accuracy": right,
                               "seconds": seconds, "device_hours": hours, "kwh": kwh, "co2e_lb": co2e})
        write(out / "summary.json", json.dumps(run["summary"], indent=1) + "\n")
        print(f"A{stage}: derived a network of {flops.macs(arch) / 1e6:.2f} M MACs; with the supernet's weights it names "
              f"{100 * right:.1f} % of the architecture part right", flush=True)
        run.update(step=0, seconds=0.0)
        teacher = network if args.distill else None
    return run["summary"]


def train_stage(supernet, teacher, sgd, adam, loader, parts, args, run):
    """Train w and alpha by turns, each on its part of the data, from step run["step"] to the end of the stage.

    A generator: after each epoch it yields the epoch's row for the log.
    """
    stage, weights, alphas, table = supernet.space.stage, supernet.weights(), supernet.alphas(), space_costs(supernet)
    epoch_length, target = len(parts[0]) // args.batch_size, args.flops_target[stage]
    steps, start = max(1, round(args.epochs[stage] * epoch_length)), run["step"]
    weight_batches = loader.shuffled(parts[0], args.seed, stage, WEIGHTS, start=start)
    alpha_batches = loader.shuffled(parts[1], args.seed, stage, ALPHAS, start=start // WEIGHTS_A_STEP)
    supernet.train()
    require_grad(alphas, False)
    while run["step"] < steps:
        clock, epoch = time.perf_counter(), run["step"] // epoch_length
        first, last = epoch * epoch_length, min((epoch + 1) * epoch_length, steps)
        with tqdm(total=last - first, initial=run["step"] - first, desc=f"A{stage} epoch {epoch}", disable=None) as bar:
            for step in range(run["step"], last):
                tau = temperature(step / steps)
                lam = distill.ratio(step / steps) if teacher else 0.0
                sgd.param_groups[0]["lr"] = learning_rate(args.lr, step, steps)
                generator = data.generator(args.seed, stage, PATHS, step)

                loss, right = two_paths(supernet, teacher, *next(weight_batches), tau, lam, generator)
                sgd.zero_grad()                               # to None: SGD does not touch what was not sampled
                loss.backward()
                sgd.step()
                add(run["means"], loss=loss, accuracy=right)

                if step % WEIGHTS_A_STEP == WEIGHTS_A_STEP - 1:
                    require_grad(weights, False)              # no gradient of a frozen parameter is computed
                    require_grad(alphas, True)
                    loss, right = two_paths(supernet, teacher, *next(alpha_batches), tau, lam, generator)
                    price = args.mu * (expected_macs(supernet, table) / target - 1).abs() if target else 0
                    (loss + price).backward()
                    step_sampled(adam, alphas)
                    require_grad(alphas, False)
                    require_grad(weights, True)
                    add(run["means"], alpha_loss=loss, alpha_accuracy=right)

                run["step"] = step + 1
                bar.update()
                if (step + 1 - first) % 50 == 0:              # now and then: reading a number waits for the device
                    report(bar, f"A{stage} step {step + 1}/{steps}", run["means"], tau, lam)
        found = means(run["means"])
        run["means"].clear()
        yield {"stage": stage, "epoch": epoch, "step": last, "steps": steps, **found, "temperature": tau, "lambda": lam,
               "expected_macs": float(expected_macs(supernet, table)), "seconds": time.perf_counter() - clock}


def two_paths(supernet, teacher, x, y, tau, lam, generator):
    """Eq. 4 for two sampled paths, on x (B, C, H, W) and y (B,): (loss, share of x named right)."""
    soft = None
    if teacher is not None:
        with torch.no_grad():
            soft = teacher(x)                                                          # (B, classes)
    logits = supernet(x, supernet.sample(tau, generator))                              # (B, classes)
    return distill.loss(logits, soft, y, lam), (logits.detach().argmax(1) == y).float().mean()


def step_sampled(optimizer, alphas):
    """An optimiser step for the options that have a gradient: the momentum of the others does not move them."""
    before = [a.detach().clone() for a in alphas]
    optimizer.step()
    with torch.no_grad():
        for alpha, old in zip(alphas, before):
            alpha.copy_(torch.where(alpha.grad == 0, old, alpha))
    optimizer.zero_grad()


def learning_rate(peak, step, steps, warmup=0.05):
    """Linear warm-up over the first 5 % of a stage, then a cosine to zero. The paper is silent."""
    progress = (step + 1) / steps
    return peak * min(progress / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))


def require_grad(parameters, on):
    for p in parameters:
        p.requires_grad_(on)


def add(totals, **values):
    """Add values to running totals, {name: (sum, count)}, on their device."""
    for name, value in values.items():
        pair = torch.stack((value.detach(), torch.ones_like(value)))
        totals[name] = totals[name] + pair if name in totals else pair


def means(totals):
    return {name: float(total / count) for name, (total, count) in totals.items()}


def report(bar, label, totals, tau, lam):
    """Loss, accuracy, temperature and lambda: on the bar, or without a terminal as a plain line now and then."""
    found = means(totals)
    text = f"loss {found['loss']:.3f} acc {100 * found['accuracy']:.1f} % tau {tau:.2f} lambda {lam:.2f}"
    if not bar.disable:
        bar.set_postfix_str(text)
    elif totals["loss"][1] % 250 == 0:
        print(f"{label}  {text}", flush=True)


def packed(state):
    """A state dict as the bytes of a checkpoint; loads with weights_only=True."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def table(summary):
    """The summary as text, a row a stage and a row for the whole search."""
    lines = ["stage   MACs (M)  params (M)  accuracy (%)   seconds       kWh  CO2e (lb)"]
    rows = [(f"A{r['stage']}", f"{r['flops'] / 1e6:.2f}", f"{r['params'] / 1e6:.3f}", f"{100 * r['accuracy']:.1f}", r)
            for r in summary]
    total = {key: sum(r[key] for r in summary) for key in ("seconds", "kwh", "co2e_lb")}
    for name, macs, params, right, r in rows + [("all", "", "", "", total)]:
        lines.append(f"{name:<5} {macs:>10} {params:>11} {right:>13} {r['seconds']:>9.1f} {r['kwh']:>9.5f} {r['co2e_lb']:>10.5f}")
    return "\n".join(lines)


def parser():
    p = one_line(argparse.ArgumentParser(prog="search.py", description=__doc__,
                                         formatter_class=argparse.RawDescriptionHelpFormatter))
    g = p.add_argument_group("the curriculum")
    g.add_argument("--stages", type=int, choices=range(1, 6), default=5, help="how many of A0..A4 (5)")
    g.add_argument("--space", choices=SPACES, default="small", help="the paper's tables, or ours for small images (small)")
    g.add_argument("--method", choices=METHODS, default="cst", help="; ".join(f"{k}: {v}" for k, v in METHODS.items()) + " (cst)")
    g.add_argument("--no-grow", dest="grow", action="store_false", help="ablation (Fig. 6): without SuperNet2SuperNet")
    g.add_argument("--no-distill", dest="distill", action="store_false", help="ablation (Fig. 6): without the teacher of Eq. 4")
    g.add_argument("--widen", choices=WIDENINGS[:2], default="eq3", help="how new channels are consumed: Eq. 3, or not at "
                   "first, which preserves every old sub-network (eq3)")
    g.add_argument("--flops-target", nargs="+", type=flops.amount, metavar="F", help="MACs of each stage's network, as in 0.9M, "
                   "or off (Table 3 for the paper's space, and the like for ours)")
    g.add_argument("--mu", type=positive, default=1.0, help="weight of |expected MACs / target - 1| in alpha's loss (1)")
    g = p.add_argument_group("data and training", "defaults: the paper's for its space, a hundredth of its epochs for ours")
    g.add_argument("--data", choices=data.NAMES, default="fashion", help="fashion: Fashion-MNIST, 28x28; fake: patterns (fashion)")
    g.add_argument("--epochs", nargs="+", type=positive, metavar="E", help="a stage, or one for all; may be fractions "
                   "(100 60 60 60 60; 1 0.6 0.6 0.6 0.6)")
    g.add_argument("--batch-size", type=whole, metavar="B", help="images a step (1024; 32)")
    g.add_argument("--lr", type=positive, help="peak of the weights' SGD (0.4; 0.1)")
    g.add_argument("--weight-decay", type=float, default=1e-4, help="of the weights (1e-4)")
    g.add_argument("--alpha-lr", type=positive, help="of the architecture parameters' Adam (0.01; 0.02)")
    g = p.add_argument_group("the run")
    g.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (the next free of runs/001, runs/002, ..)")
    g.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    g.add_argument("--seed", type=int, default=0, help="the same seed gives the same run (0)")
    g.add_argument("--device", default="auto", help="cpu, cuda, .. (auto: an accelerator if there is one)")
    return p


def one_line(parser):
    """Let `parser` end a user's mistake in one line on stderr, with exit status 2, and without its usage."""
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    return parser


def positive(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def whole(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def settings(argv):
    """The checked arguments, with the run's folder and device. A mistake ends in one line and exit status 2."""
    p = parser()
    args = p.parse_args(argv)
    if args.resume:
        if args.out is None or not (args.out / "args.json").is_file():
            p.error("--resume needs --out with the folder of a run, one that has args.json")
        saved = json.loads((args.out / "args.json").read_text())
        p.set_defaults(**saved)
        args = p.parse_args(argv)
        for key, value in saved.items():
            if key != "stages" and getattr(args, key) != value:
                p.error(f"--{key.replace('_', '-')} is {getattr(args, key)}, but the run in {args.out} has {value}")
    elif args.out is None:
        args.out = next(out for out in (Path("runs") / f"{n:03d}" for n in range(1, 10 ** 9)) if not out.exists())
    elif args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        p.error(f"--out {args.out} holds something already: choose another folder, or --resume")
    for key, value in DEFAULTS[args.space].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    for key, missing in (("epochs", None), ("flops_target", flops.TARGETS[args.space])):
        values = getattr(args, key) or missing
        if len(values) == 1:
            values = values * 5
        if len(values) < args.stages:
            p.error(f"--{key.replace('_', '-')} has {len(values)} values: give one, or one for each of {args.stages} stages")
        setattr(args, key, list(values))
    if args.method != "cst":
        args.grow, args.distill = args.grow and args.method == "naive", False
        args.widen = "naive"
    return args, choose_device(p, args.device)


def choose_device(p, name):
    """The torch device of that name; `auto` is an accelerator if there is one. Ends in p.error if it cannot be used."""
    try:
        if name == "auto":
            return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        p.error(f"--device {name}: {str(error).splitlines()[0]}")


def main(argv=None):
    args, device = settings(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "args.json", json.dumps({k: v for k, v in vars(args).items() if k not in ("out", "resume")}, indent=1) + "\n")
    print(f"{args.method} on {args.data}, seed {args.seed}, into {args.out}", flush=True)
    summary = search(args, args.out, device)
    print(table(summary))
    plot.curve([args.out], args.out / "curve.png")
    print(f"curve: {args.out / 'curve.png'}; train the networks: python train.py {args.out}")


if __name__ == "__main__":
    sys.exit(main())
