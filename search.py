"""The curriculum A0..A4 (Fig. 2): train a supernet, derive its network, grow the supernet, and teach it.

    python search.py --stages 5
    torchrun --nproc_per_node 8 search.py --stages 5      # a process a GPU, each on its shard of every batch

`search` is Figure 2, `train_stage` is one of its boxes, `backward` is Eq. 4 on two sampled paths.
"""
from machinery import files, flags, folder, processes, results, settings
from machinery.run import Run

import argparse
import contextlib
import functools
import json
import math
import shlex
import time

import torch

import data
import distill
import flops
import plot
from budget import scale
from derive import arch_before, derive, evaluate_derived, open_supernet
from grow import describe, grow
from network import Network
from space import SPACES
from supernet import SuperNet, require_grad, step_sampled, temperature
from train import learning_rate

WEIGHTS_A_STEP = 2              # steps of the weights, then one of the architecture (PAPER.md)
HISTORY = 25                    # steps between the architecture probabilities that the log keeps
# Lowest and highest accuracy (%) of A0..A4 over search seeds 0 to 7, with default settings and one thread, on
# the validation split with the supernet's weights (results/searches.jsonl)
USUAL = ((78.0, 80.5), (80.6, 83.3), (82.2, 84.4), (83.0, 84.2), (83.5, 85.4))
WEIGHTS, ALPHAS, PATHS, GROWTH = range(4)   # what is drawn: with seed, stage and step it seeds a generator


def search(args, images, out, run):
    """Figure 2: train a supernet, derive its network, grow the supernet; the old one teaches the new one.

    Leaves A0.json, A0.pt, .. and summary.json in the folder `out`; returns the summary's rows, one a stage.
    """
    parts = data.split(images.labels, args.seed)                         # 5/6 for w, 1/6 for alpha
    loader = data.Loader(images, images.statistics(parts[0]), args.batch_size, run.device)
    supernet, teacher = previous(args, out, loader, parts, run)          # None, unless the run goes on
    for stage in range(run.state["stage"], args.stages):
        space = SPACES[args.space][stage]._replace(resolution=images.resolution)
        generator = data.generator(args.seed, stage, GROWTH)
        if supernet is None or not args.grow:
            supernet = SuperNet(space, images.channels, images.classes, generator).to(run.device)
        else:
            small, supernet = supernet, grow(supernet, space, generator, args.widen)
            x, _ = next(loader.ordered(parts[1][:8]))
            print(f"A{stage}: {describe(small, supernet, x)}", flush=True)
        train_stage(supernet, teacher, loader, parts, args, run)
        arch = derive(supernet, args.flops_target[stage], arch_before(out, stage))
        network, accuracy = evaluate_derived(arch, supernet, loader, parts, args.seed, stage, WEIGHTS)
        finish_stage(run, out, arch, accuracy, supernet)
        teacher = teacher_of(supernet, network, args)                    # Eq. 4's, for the next stage
    return run.state["summary"]


def train_stage(supernet, teacher, loader, parts, args, run):
    """One box of Figure 2: w and alpha by turns, each on its own part of the images, to the stage's end."""
    stage, weights, alphas = supernet.space.stage, supernet.weights(), supernet.alphas()
    sgd, adam = optimizers(supernet, args)
    epoch_length, steps = schedule(args, stage, parts)
    print(f"A{stage}: {steps} steps, each on two of 10^{math.log10(flops.networks(supernet.space)):.0f} "
          "networks,", f"taught by A{stage - 1}" if teacher else "without a teacher", flush=True)
    start, shard = run.begin(stage, supernet=supernet, sgd=sgd, adam=adam), processes.shard()
    w_batches = loader.shuffled(parts[0], args.seed, stage, WEIGHTS, start=start, shard=shard)
    start //= WEIGHTS_A_STEP
    alpha_batches = loader.shuffled(parts[1], args.seed, stage, ALPHAS, start=start, shard=shard)
    for step in run.steps(steps, epoch_length, f"A{stage}", args.checkpoint_every):
        tau = temperature(step / steps)
        lam = distill.ratio(step / steps) if teacher else 0.0
        seed = args.seed, stage, PATHS, step
        sgd.param_groups[0]["lr"] = learning_rate(args.lr, step, steps)

        require_grad(weights, True)
        require_grad(alphas, False)
        sgd.zero_grad()                                # to None: SGD leaves alone what is not sampled
        draw = functools.partial(supernet.sample, tau, uniform=args.draw == "uniform")
        metrics = backward(supernet, teacher, next(w_batches), draw, (*seed, 0), lam, args.accumulate)
        if run.synchronise(weights, metrics):
            sgd.step()

        if step % WEIGHTS_A_STEP == WEIGHTS_A_STEP - 1:
            require_grad(weights, False)
            require_grad(alphas, True)
            adam.zero_grad()
            draw = functools.partial(supernet.sample, 0)        # alpha judges networks, no mixtures of two
            metrics = backward(supernet, teacher, next(alpha_batches), draw, (*seed, 1), lam, args.accumulate)
            if run.synchronise(alphas, metrics, "alpha_"):
                step_sampled(adam, alphas)

        if (step + 1) % HISTORY == 0:
            run.state["history"].append([step + 1, supernet.probabilities()])
        if run.ends_epoch(step):
            history = [*run.state["history"], [step + 1, supernet.probabilities()]]
            run.state["history"] = []
            run.log({"stage": stage, "epoch": step // epoch_length, "temperature": tau, "lambda": lam,
                     "alphas": history})


def backward(supernet, teacher, batch, draw, seed, lam, pieces):
    """Eq. 4 on two sampled paths, and its gradients, which are added to the parameters' .grad.

    batch: x (B, C, H, W) and y (B,), computed in so many pieces. draw: a function of a generator that samples
    the two paths; seed: numbers that seed it, the same for all pieces; lam: Eq. 4's lambda. Returns loss
    and accuracy: (2,).
    """
    metrics = 0
    for x, y in zip(*(part.chunk(pieces) for part in batch)):
        soft = None
        if teacher is not None:
            with torch.no_grad():
                soft = teacher(x)                                                       # (B, classes)
        logits = supernet(x, draw(data.generator(*seed)))                               # (B, classes)
        loss, share = distill.loss(logits, soft, y, lam), len(y) / len(batch[1])
        (share * loss).backward()
        accuracy = (logits.detach().argmax(1) == y).float().mean()
        metrics = metrics + share * torch.stack((loss.detach(), accuracy))
    return metrics


def optimizers(supernet, args):
    """SGD with momentum for the weights and Adam for the architecture, the paper's. The rest is ours."""
    sgd = torch.optim.SGD(supernet.weights(), args.lr, momentum=0.9, weight_decay=args.weight_decay,
                          fused=True)
    for p in supernet.weights():  # the fused step needs every momentum, also where nothing was sampled yet
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd, torch.optim.Adam(supernet.alphas(), args.alpha_lr, betas=(0.5, 0.999))


def schedule(args, stage, parts):
    """(weight steps an epoch, weight steps of the stage)."""
    epoch_length = len(parts[0]) // args.batch_size
    return epoch_length, max(1, round(args.epochs[stage] * epoch_length))


def previous(args, out, loader, parts, run):
    """(supernet, teacher) of the stage before the one in which `run` goes on; (None, None) before A0.

    Every process reads them from the folder `out`, so on many machines it must be one that all see.
    """
    stage = run.state["stage"] - 1
    if stage < 0:
        return None, None
    supernet, network = open_supernet(out, stage).to(run.device), None
    if args.distill and args.teacher == "network":
        arch = flags.read_arch(out / f"A{stage}.json")
        network, _ = evaluate_derived(arch, supernet, loader, parts, args.seed, stage, WEIGHTS)
    return supernet, teacher_of(supernet, network, args)


def teacher_of(supernet, network, args):
    """The next stage's teacher (Eq. 4), a function of images (B, C, H, W) -> logits (B, classes), or None.
    It learns no more. network: who teaches with --teacher network.

    "Previous teacher SuperNet predictions": those of its most likely path, for which no budget is needed. Or
    those of the network that was derived from it, with batch-norm statistics of its own.
    """
    if not args.distill:
        return None
    if args.teacher == "network":
        return network
    require_grad(supernet.parameters(), False)
    path = supernet.path(supernet.likeliest())
    return lambda x: supernet(x, path)


def finish_stage(run, out, arch, accuracy, supernet=None):
    """Write a stage's network, its supernet if it has one, and its row of the summary."""
    stage, seconds = arch.stage, run.seconds()
    hours, kwh, co2e = flops.energy(seconds, run.device, processes.world_size())
    row = {"stage": stage, "flops": flops.macs(arch), "params": flops.params(arch), "accuracy": accuracy,
           "seconds": seconds, "device_hours": hours, "kwh": kwh, "co2e_lb": co2e}
    run.state["summary"] = [*run.state["summary"][:stage], row]
    if supernet is not None:
        processes.write(out / f"A{stage}.pt", supernet.state_dict())
    processes.write(out / f"A{stage}.json", arch.to_json())
    processes.write(out / "summary.json", json.dumps(run.state["summary"], indent=1) + "\n")
    right = "" if accuracy is None else f", {100 * accuracy:.1f} % right on the validation split"
    print(f"A{stage}: derived a network of {flops.macs(arch) / 1e6:.2f} M MACs{right}", flush=True)


def scale_up(args, out, run):
    """Fig. 5's compound scaling: the networks of the later stages are A0's in larger widths and depths."""
    base = processes.on_rank0(flags.read_arch, out / "A0.json")      # written by rank 0 a moment ago
    for stage in range(max(1, run.state["stage"]), args.stages):
        run.begin(stage)
        finish_stage(run, out, scale(base, stage, args.flops_target[stage]), None)


def dry_run(args, images, device):
    """Print what the run would cost: what its spaces hold, then a line a stage, of ten steps measured."""
    say = functools.partial(print, flush=True)          # at once: the steps of a stage may take minutes
    parts = data.split(images.labels, args.seed)
    loader = data.Loader(images, images.statistics(parts[0]), args.batch_size, device)
    say(flops.describe_space(args.space, (images.channels, images.resolution, images.classes),
                             args.flops_target))
    say("\n      steps  seconds a step     hours       kWh  CO2e (lb)")
    teacher, total = None, [0.0, 0.0, 0.0]
    for stage in range(1 if args.method == "scaling" else args.stages):
        epoch_length, steps = schedule(args, stage, parts)
        space = SPACES[args.space][stage]._replace(resolution=images.resolution)
        supernet = SuperNet(space, images.channels, images.classes).to(device)
        few = argparse.Namespace(**{**vars(args), "epochs": [10 / epoch_length] * 5})
        for _ in range(2):                          # to warm up, and to measure
            clock, run = time.perf_counter(), Run(None, {}, device, most_skipped=math.inf)
            with contextlib.redirect_stdout(None):
                train_stage(supernet, teacher, loader, parts, few, run)
            seconds = (time.perf_counter() - clock) / 10
        cost = flops.energy(seconds * steps, device, processes.world_size())
        total = [a + b for a, b in zip(total, cost)]
        say(f"A{stage} {steps:>8} {seconds:>15.3f} {cost[0]:>9.3f} {cost[1]:>9.4f} {cost[2]:>10.4f}")
        teacher = teacher_of(supernet, Network(derive(supernet)).to(device).eval(), args)
    say(f"all{'':>25}{total[0]:>9.3f} {total[1]:>9.4f} {total[2]:>10.4f}")
    if args.space == "paper":
        say("The paper: 456 hours of a V100, 135.96 kWh, 129.70 lb of CO2e (Table 4).")
    say("Hours of one device; energy is an estimate, see `energy` in flops.py.")


def check(args, images):
    """Fill in args.flops_target. Refused if images, batch and target do not go together."""
    if args.batch_size > len(images.labels) // 6:
        raise files.Refused(f"--batch-size {args.batch_size} is more than the {len(images.labels) // 6} "
                            "images of the validation split (the sixth from which alpha learns)")
    shape = images.channels, images.resolution, images.classes
    args.flops_target = args.flops_target or flops.targets(args.space, *shape)
    if args.method == "scaling" and min(args.flops_target[:args.stages]) < args.flops_target[0]:
        raise files.Refused("--method scaling makes A0's network larger: no --flops-target may be below A0's")
    for space, target in zip(SPACES[args.space][:args.stages], args.flops_target):
        flags.check_pixels(args, images.resolution, f"A{space.stage}", space.blocks)
        space = space._replace(resolution=images.resolution)
        low, high = flops.bounds(flops.costs(space, images.channels, images.classes))
        if target and not low <= target <= high:
            raise files.Refused(f"--flops-target {target:,.0f} is out of reach: the networks of "
                                f"A{space.stage} have {low:,.0f} to {high:,.0f} MACs for these images")
    return args


def usual(args):
    """What a search by default settings usually ends at, as text; by other settings: nothing."""
    default = settings.completed(settings.search_parser(None).parse_args(["--seed", str(args.seed)]))
    default.flops_target = [*flops.TARGETS["small"]]
    if settings.same_run(args) != settings.same_run(default):
        return ""
    ends = ", ".join(f"A{stage} {low} to {high} %" for stage, (low, high) in enumerate(USUAL[:args.stages]))
    return f"; seeds 0 to 7, on one thread, ended at {ends}"


@flags.command
def main(argv=None):
    args = processes.on_rank0(settings.search_arguments, argv, __doc__)
    device = processes.choose_device(args.device)
    images = flags.load_images(args, "train", args.out, checked=not args.dry_run)
    args = processes.on_rank0(check, args, images)
    if args.dry_run:
        return dry_run(args, images, device)
    with contextlib.ExitStack() as stack, processes.catch_signals() as signals:
        out = processes.on_rank0(settings.run_folder, args, stack)
        run = Run(out / "last.pt", settings.same_run(args), device, signals, out / "log.jsonl")
        if args.resume:
            run.resume()
        folder.unchanged(images, out)
        processes.write(out / "args.json", json.dumps(settings.kept(args), indent=1) + "\n")
        folder.record(images, out, data.split(images.labels, args.seed))
        print(f"{args.method} on {args.data}, seed {args.seed}, into {out}{usual(args)}", flush=True)
        if args.method == "scaling":
            if run.state["stage"] == 0:
                search(argparse.Namespace(**{**vars(args), "stages": 1}), images, out, run)
            scale_up(args, out, run)
        else:
            search(args, images, out, run)
        print(results.table(run.state["summary"]))
        if processes.rank() == 0:
            plot.curve([out], out / "curve.png")
    searched = [row["flops"] for row in run.state["summary"] if row["accuracy"] is not None]
    budget, folder_name = searched[len(searched) // 2], shlex.quote(str(out))
    print(f"curve: {out / 'curve.png'}; next, train the networks, and derive one for a budget:\n"
          f"    python train.py {folder_name}\n"
          f"    python derive.py {folder_name} --flops {budget}")


if __name__ == "__main__":
    main()
