"""The curriculum A0..A4 (Fig. 2): train a supernet, derive its network, grow it, let the old one teach.

    python search.py --stages 5
    torchrun --nproc_per_node 8 search.py --stages 5      # a process a GPU, each on its share of every batch

`search` is Figure 2 as a loop, `train_stage` is one of its boxes; step.py has one step of it.
"""
import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time

# How long a thread spins before it sleeps, waiting for another. OpenMP's default makes a step 40 times
# slower beside one busy neighbour; sleeping at once makes it twice as slow on a quiet machine. Read as torch
# is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from tqdm import tqdm

import data
import distill
import flops
import machine
import plot
from checkpoint import blank, keep, recall, restore
from derive import derive, expected_macs, measure, space_costs
from grow import describe, grow, movement
from machinery import decode, flags, folder, processes, results
from network import Network
from scaling import scale
from space import SPACES, Arch
from step import alpha_step, learning_rate, weight_step
from supernet import SuperNet, require_grad, temperature

WEIGHTS_A_STEP = 5              # the parts are 5/6 and 1/6: five weight steps, then one of the architecture
HISTORY = 200                   # steps between the architecture probabilities that the log keeps
WEIGHTS, ALPHAS, PATHS, GROWTH = range(4)   # what is drawn: with seed, stage and step it seeds a generator
MOST_SKIPPED = 5                # batches of a stage whose numbers may go bad before the run gives up


def search(args, images, parts, run, out, device, caught):
    """Fig. 2. Writes all that a run leaves into the folder `out`, and returns the summary, a row a stage.

    parts: of the images as indices, 5/6 for the weights and 1/6 for alpha, from `data.split`.
    run: how far it is, `blank` or from `recall`.
    caught: a list that signals join; when it is no longer empty, the step ends, is saved, and SystemExit
    raised.
    """
    loader = images.loader(images.statistics(parts[0]), args.batch_size, device)
    shape = {"in_channels": images.channels, "classes": images.classes}
    supernet = teacher = None
    last, resumed = out / "last.pt", "supernet" in run
    processes.append(out / "log.jsonl", run["logged"], "")  # of a run gone on with: no more than it had then
    for stage in range(run["stage"], args.stages):
        clock = time.perf_counter()
        alone = processes.share()[1] == 1                                        # a meter sees one device
        meter = machine.meter(device, run["kwh"]) if alone else None
        if args.method == "scaling" and stage:
            base = Arch.from_json(processes.on_rank0((out / "A0.json").read_text))
            arch = scale(base, stage, args.flops_target[stage])
            conclude(run, out, stage, arch, None, time.perf_counter() - clock, device, meter)
            continue
        space = SPACES[args.space][stage]._replace(resolution=images.resolution)
        generator = data.generator(args.seed, stage, GROWTH)
        if resumed or supernet is None or not args.grow:
            supernet = SuperNet(space, **shape, generator=generator).to(device)
        else:
            widen = "naive" if args.method == "naive" else args.widen
            old, supernet = supernet, grow(supernet, space, generator, widen)
            moved = movement(old, supernet, loader.batch(parts[1][:8])[0])
            print(f"A{stage}: {describe(old, supernet)}; "
                  f"the largest network's logits moved by {moved:.1e} of their size", flush=True)
            del old                                 # its weights, and their last gradients
        sgd, adam = optimisers(supernet, args)
        if resumed:
            if run["teacher"]:
                teacher = Network(Arch.from_json(run["teacher_arch"])).to(device).requires_grad_(False).eval()
                teacher.load_state_dict(run["teacher"])
            restore(run, supernet, sgd, adam)
            resumed = False
        else:
            keep(last, run, args, stage, supernet, sgd, adam, teacher)

        for row in train_surely(supernet, teacher, sgd, adam, loader, parts, args, run, caught, last):
            clock, run["seconds"] = time.perf_counter(), run["seconds"] + time.perf_counter() - clock
            if meter:
                run["kwh"] = meter()                # now and then, before its counter wraps around
            if row is not None:
                text = json.dumps(row | {"seconds": run["seconds"]}) + "\n"
                run["logged"] = processes.append(out / "log.jsonl", run["logged"], text)
            keep(last, run, args, stage, supernet, sgd, adam, teacher)
            if stopped := processes.pending_signal(caught):
                print(f"stopped in A{stage}, after step {run['step']}; go on with: "
                      f"python search.py --resume --out {out}", flush=True)
                raise SystemExit(128 + stopped)

        processes.broadcast(supernet)
        arch = derive(supernet, args.flops_target[stage])
        network, right = measure(arch, supernet, loader, parts, args.seed, stage, WEIGHTS)
        processes.write(out / f"A{stage}.pt", supernet.state_dict())
        conclude(run, out, stage, arch, right, time.perf_counter() - clock, device, meter)
        teacher = network if args.distill else None
    return run["summary"]


def conclude(run, out, stage, arch, right, seconds, device, meter):
    """Write a stage's network and its row of the summary, and make `run` ready for the next stage."""
    seconds += run["seconds"]
    hours, kwh, co2e = flops.energy(seconds, device, processes.share()[1], meter and meter())
    run["summary"].append({"stage": stage, "flops": flops.macs(arch), "params": flops.params(arch),
                           "accuracy": right, "seconds": seconds, "device_hours": hours, "kwh": kwh,
                           "co2e_lb": co2e})
    processes.write(out / f"A{stage}.json", arch.to_json())
    processes.write(out / "summary.json", json.dumps(run["summary"], indent=1) + "\n")
    says = "" if right is None else (f", and {100 * right:.1f} % of the architecture part right with the "
                                     "supernet's weights")
    print(f"A{stage}: a network of {flops.macs(arch) / 1e6:.2f} M MACs{says}", flush=True)
    run.update(step=0, seconds=0.0, kwh=0.0, skipped=[])


def train_surely(supernet, teacher, sgd, adam, loader, parts, args, run, caught, last):
    """`train_stage`, but a step whose numbers go bad is skipped, from the checkpoint `last` on.

    SystemExit after `MOST_SKIPPED` such steps in a stage.
    """
    while True:
        try:
            return (yield from train_stage(supernet, teacher, sgd, adam, loader, parts, args, run, caught))
        except FloatingPointError as error:
            stage, skipped = supernet.space.stage, [*run["skipped"], error.args[0]]
        if len(skipped) > MOST_SKIPPED:
            raise SystemExit(f"search.py: loss or gradients of A{stage} are not finite in {len(skipped)} "
                             f"steps ({', '.join(map(str, skipped))}), so the run gives up; try a lower --lr")
        run.clear()
        run.update(recall(last, args, loader.device), skipped=skipped)
        restore(run, supernet, sgd, adam)
        print(f"A{stage}: loss or gradients of step {skipped[-1]} are not finite; back to step "
              f"{run['step']}, that batch is skipped", flush=True)


def train_stage(supernet, teacher, sgd, adam, loader, parts, args, run, caught):
    """Train w and alpha by turns, each on its part of the data, from step run["step"] to the stage's end.

    A generator. Wherever the run can be saved it yields: after an epoch its row for the log, else None.
    FloatingPointError, with the step, before what is not finite reaches a parameter. Of the steps in
    run["skipped"] the batches are left out.
    """
    stage, weights, alphas = supernet.space.stage, supernet.weights(), supernet.alphas()
    table, target = space_costs(supernet), args.flops_target[stage]
    epoch_length, steps = schedule(args, stage, parts)

    def pull():
        """The term that draws the mean MACs of the sampled networks to their target, or None."""
        return args.mu * (expected_macs(supernet, table) / target - 1).abs() if target else None
    start, share = run["step"], processes.share()  # of many processes each takes its share of every batch
    weight_batches = loader.shuffled(parts[0], args.seed, stage, WEIGHTS, start=start, share=share)
    start //= WEIGHTS_A_STEP
    alpha_batches = loader.shuffled(parts[1], args.seed, stage, ALPHAS, start=start, share=share)
    supernet.train()
    require_grad(weights, True)
    require_grad(alphas, False)
    while run["step"] < steps:
        begin, epoch = run["step"], run["step"] // epoch_length
        first, last = epoch * epoch_length, min((epoch + 1) * epoch_length, steps)
        with tqdm(total=last - first, initial=begin - first, desc=f"A{stage} epoch {epoch}",
                  disable=share[0] > 0 or None) as bar:
            for step in range(begin, last):
                tau, lam = temperature(step / steps), distill.ratio(step / steps) if teacher else 0.0
                sgd.param_groups[0]["lr"] = learning_rate(args.lr, step, steps)
                how = args.accumulate, tau, lam, (args.seed, stage, PATHS, step)

                batch = next(weight_batches)
                other = next(alpha_batches) if step % WEIGHTS_A_STEP == WEIGHTS_A_STEP - 1 else None
                if step not in run["skipped"]:
                    found = weight_step(supernet, teacher, sgd, weights, batch, *how)
                    add(run["means"], "", found)
                    if other:
                        found = alpha_step(supernet, teacher, adam, weights, alphas, pull, other, *how)
                        add(run["means"], "alpha_", found)

                run["step"] = step + 1
                bar.update()
                if (step + 1) % 50 == 0 or step + 1 == last:    # reading a number waits for the device
                    report(bar, f"A{stage} step", step + 1, steps, run["means"], tau, lam)
                if (step + 1) % HISTORY == 0:
                    run["alphas"].append([step + 1, supernet.probabilities()])
                if step + 1 < last and (processes.pending_signal(caught) or (step + 1) % args.checkpoint_every == 0):
                    yield None
        row = {"stage": stage, "epoch": epoch, "step": last, "steps": steps, **means(run["means"]),
               "temperature": tau, "lambda": lam, "expected_macs": float(expected_macs(supernet, table)),
               "alphas": [*run["alphas"], [last, supernet.probabilities()]]}
        run["means"].clear()
        run["alphas"].clear()
        yield row


def dry_run(args, images, parts, device):
    """What the run would cost, as text: what its spaces hold, then a line a stage, of five steps measured."""
    n = processes.share()[1]
    loader = images.loader(images.statistics(parts[0]), args.batch_size, device)
    shape = {"in_channels": images.channels, "classes": images.classes}
    shown = images.channels, images.resolution, images.classes
    lines = [flops.describe_space(args.space, shown, args.flops_target),
             "", "      steps  seconds a step     hours  peak GB       kWh  CO2e (lb)"]
    if isinstance(images, folder.Folder):                             # its files need workers: how many?
        loader = decode.Rehearsal(loader, parts[0], processes.share())
    teacher, total, fastest = None, [0.0, 0.0, 0.0], math.inf
    for stage in range(1 if args.method == "scaling" else args.stages):
        epoch_length, steps = schedule(args, stage, parts)
        space = SPACES[args.space][stage]._replace(resolution=images.resolution)
        supernet = SuperNet(space, **shape).to(device)
        still = {"lr": 0.0, "alpha_lr": 0.0, "mu": 1.0}  # only time is asked for: no number can go bad
        few = {**vars(args), **still, "epochs": [11 / epoch_length] * 5, "checkpoint_every": 5}
        few, run = argparse.Namespace(**few), blank()
        training = train_stage(supernet, teacher, *optimisers(supernet, few), loader, parts, few, run, [])
        while run["step"] < 5:                      # five steps to warm up, and five to measure
            next(training)
        clock = time.perf_counter()
        while run["step"] < 10:
            next(training)
        step = (time.perf_counter() - clock) / 5
        fastest = min(step, fastest)
        cost = flops.energy(step * steps, device, n)
        total = [a + b for a, b in zip(total, cost)]
        lines.append(f"A{stage} {steps:>8} {step:>15.3f} {cost[0]:>9.3f} {machine.peak_memory(device):>8.1f} "
                     f"{cost[1]:>9.4f} {cost[2]:>10.4f}")
        teacher = Network(derive(supernet)).to(device).eval() if args.distill else None
    lines.append(f"all{'':>25}{total[0]:>9.3f} {'':>8} {total[1]:>9.4f} {total[2]:>10.4f}")
    if args.space == "paper":
        lines.append("The paper: 456 hours of a V100, 135.96 kWh, 129.70 lb of CO2e (Table 4).")
    if isinstance(images, folder.Folder):
        lines.append(loader.advice(fastest, len(images.labels)))
    return "\n".join([*lines, "Hours of one device; energy is an estimate, see `energy` in flops.py."])


def optimisers(supernet, args):
    """SGD with momentum for the weights and Adam for the architecture, the paper's. The rest is ours."""
    sgd = torch.optim.SGD(supernet.weights(), args.lr, momentum=0.9, weight_decay=args.weight_decay,
                          fused=True)
    for p in supernet.weights():  # else the fused step fails where some were not sampled before
        sgd.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return sgd, torch.optim.Adam(supernet.alphas(), args.alpha_lr, betas=(0.5, 0.999))


def schedule(args, stage, parts):
    """(weight steps an epoch, weight steps of the stage)."""
    epoch_length = len(parts[0]) // args.batch_size
    return epoch_length, max(1, round(args.epochs[stage] * epoch_length))


def add(totals, kind, found):
    """Add `found`, (loss, share right), to running totals, {kind of step: (sum, count)}, on its device."""
    total, count = totals.get(kind, (0, 0))
    totals[kind] = total + found, count + 1


def means(totals):
    return {kind + name: value / count for kind, (total, count) in totals.items()
            for name, value in zip(("loss", "accuracy"), total.tolist())}


def report(bar, label, step, steps, totals, tau, lam):
    """Loss, accuracy, temperature, lambda: on the bar, or without a terminal as a plain line now and then."""
    found = means(totals)
    if not found:                                   # all of them were skipped
        return
    text = f"loss {found['loss']:.3f} acc {100 * found['accuracy']:.1f} % tau {tau:.2f} lambda {lam:.2f}"
    if not bar.disable:
        bar.set_postfix_str(text)
    elif step % 250 == 0 or step == steps:
        print(f"{label} {step}/{steps}  {text}", flush=True)


@processes.process_group()
def main(argv=None):
    p = flags.parser(__doc__)
    args = processes.on_rank0(flags.settings, p, argv)
    device = processes.choose_device(p, args.device)
    images = flags.images(p, args, "train", args.out, checked=not args.dry_run)
    if args.batch_size > len(images.labels) // 6:
        processes.on_rank0(p.error, f"--batch-size {args.batch_size} is more than the {len(images.labels) // 6} "
                                 "images of the architecture part")
    for space in SPACES[args.space][:args.stages]:
        processes.on_rank0(flags.fit, p, args, images.resolution, f"A{space.stage}", space.blocks)
    args.flops_target = processes.on_rank0(flags.aim, p, args, images)
    parts = data.split(images.labels, args.seed)
    if args.dry_run:
        return print(dry_run(args, images, parts, device))
    with contextlib.ExitStack() as stack, processes.catch_signals() as caught, flags.explained(p, args.out):
        processes.on_rank0(flags.hold, p, args.out, stack)
        last = args.out / "last.pt"
        run = recall(last, args, device) if args.resume and processes.on_rank0(last.exists) else blank()
        processes.write(args.out / "args.json", json.dumps(flags.kept(args), indent=1) + "\n")
        folder.record(p, images, args.out, parts)
        processes.note("out", str(args.out))
        print(f"{args.method} on {args.data}, seed {args.seed}, into {args.out}", flush=True)
        summary = search(args, images, parts, run, args.out, device, caught)
        print(results.table(summary))
        if processes.share()[0] == 0:
            plot.curve([args.out], args.out / "curve.png")
    print(f"curve: {args.out / 'curve.png'}; train the networks: python train.py {args.out}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, but for where a script listens, ends it at once
    sys.exit(main())
