"""The recipe by which a network is trained (Experiments: "retraining").

SGD with Nesterov momentum, linear warm-up and a cosine to zero, label smoothing, weight decay of weight
matrices alone, dropout before the classifier, an exponential moving average of the weights. The network of
the last epoch counts: the images that it is measured on choose nothing.
"""
import math
import time

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data
from derive import accuracy
from machinery import files, processes
from step import learning_rate

BATCHES, INITIAL = range(10, 12)                # what is drawn: with seed and stage it seeds a generator
SETTINGS = ("epochs", "batch_size", "accumulate", "lr", "weight_decay", "smoothing", "dropout", "ema",
            "autocast", "init", "seed", "data")         # what a training that is gone on with began with


def train(network, loader, index, tester, test_index, args, name, stage, checkpoint, caught=()):
    """Train `network` on the images at `index`, and return it, or its moving average, with a row an epoch:
    epoch, loss, accuracy on the images of the `Loader` tester at `test_index`, seconds.

    checkpoint: a file that it is saved in now and then; with args.resume, training goes on from it.
    caught: as in `search`; the step ends, is saved, and SystemExit raised. Also if the loss is not finite.
    files.Refused if the file is not a checkpoint of this training.
    """
    decayed, others = [], []
    for p in network.parameters():
        (decayed if p.dim() > 1 else others).append(p)
    sgd = torch.optim.SGD([{"params": decayed, "weight_decay": args.weight_decay}, {"params": others}],
                          args.lr, momentum=0.9, nesterov=True, fused=True)
    average = AveragedModel(network, use_buffers=True) if args.ema else None
    rows, begin, total, seconds = [], 0, torch.zeros((), device=loader.device), 0.0
    epoch_length = len(index) // args.batch_size
    settings = {key: getattr(args, key) for key in SETTINGS}
    settings["network"] = str(getattr(network, "arch", name))
    if args.resume and processes.on_rank0(checkpoint.exists):
        try:
            saved = files.unpack(processes.on_rank0(checkpoint.read_bytes), checkpoint)
            for key, value in settings.items():
                if saved["settings"][key] != value:
                    raise ValueError(f"its {key} is {saved['settings'][key]}, not {value}")
            network.load_state_dict(saved["network"])
            if average:
                average.load_state_dict(saved["average"])
            sgd.load_state_dict(saved["sgd"])
            rows, begin, seconds = (saved[key] for key in ("rows", "step", "seconds"))
            total = saved["total"].to(loader.device)
        except (ValueError, LookupError, RuntimeError, TypeError) as error:
            why = str(error).splitlines()[0]
            raise files.Refused(f"{checkpoint} is not one of this training ({why}); delete it, and {name} is "
                             "trained anew") from None
    rank, n = processes.share()                          # of n processes each takes its share of every batch
    start = len(rows) * epoch_length + begin
    batches = loader.shuffled(index, args.seed, stage, BATCHES, start=start, share=(rank, n))
    result = average.module if average else network

    def keep():
        """Write the checkpoint, unless the loss has gone bad."""
        if not math.isfinite(total + sum(row["loss"] for row in rows)):
            raise SystemExit(f"train.py: the loss of {name} is not finite in epoch {epoch}; try a lower --lr")
        if not args.validate:
            processes.write(checkpoint, {
                "settings": settings, "network": network.state_dict(), "sgd": sgd.state_dict(),
                "average": average and average.state_dict(), "rows": rows, "step": begin, "total": total,
                "seconds": seconds})
            processes.note(name, "saved")

    for epoch in range(len(rows), args.epochs):
        network.train()
        clock = time.perf_counter()
        with tqdm(total=epoch_length, initial=begin, desc=f"{name} epoch {epoch}",
                  disable=rank > 0 or None) as bar:
            for step in range(begin, epoch_length):
                seed = data.generator(args.seed, rank, epoch, step).initial_seed()
                torch.manual_seed(seed)                                     # dropout's draws
                rate = learning_rate(args.lr, epoch * epoch_length + step, args.epochs * epoch_length)
                for group in sgd.param_groups:
                    group["lr"] = rate
                x, y = next(batches)
                sgd.zero_grad()
                loss = torch.zeros_like(total)
                for part_x, part_y in zip(x.chunk(args.accumulate), y.chunk(args.accumulate)):
                    with torch.autocast(loader.device.type, torch.bfloat16, enabled=args.autocast):
                        part = F.cross_entropy(network(part_x), part_y, label_smoothing=args.smoothing)
                    part = part * (len(part_y) / len(y))
                    part.backward()
                    loss += part.detach()
                loss, = processes.all_reduce_mean(network.parameters(), loss)  # and gradients, over all processes
                sgd.step()
                if args.ema:                        # slower from step to step, until it is what was asked for
                    done = epoch * epoch_length + step
                    average.multi_avg_fn = get_ema_multi_avg_fn(min(args.ema, (1 + done) / (10 + done)))
                    average.update_parameters(network)
                total += loss
                bar.update()
                if step % 50 == 49:
                    bar.set_postfix_str(f"loss {float(total) / (step + 1):.3f}")
                stopped = processes.pending_signal(caught)
                if step + 1 < epoch_length and (stopped or (step + 1) % args.checkpoint_every == 0):
                    begin, now = step + 1, time.perf_counter()
                    seconds, clock = seconds + now - clock, now
                    keep()
                    if stopped:
                        on = ("nothing is kept of a --validate" if args.validate else
                              "the same command with --resume goes on")
                        print(f"stopped in epoch {epoch} of {name}, after step {begin}; {on}", flush=True)
                        raise SystemExit(128 + stopped)
        processes.broadcast(network)
        if average:
            processes.broadcast(average)
        right = accuracy(result, tester, test_index)
        rows.append({"epoch": epoch, "loss": float(total) / epoch_length, "accuracy": right,
                     "seconds": seconds + time.perf_counter() - clock})
        print(f"{name} epoch {epoch}  loss {rows[-1]['loss']:.3f}  accuracy {100 * right:.2f} %  "
              f"{rows[-1]['seconds']:.0f} s", flush=True)
        begin, total, seconds = 0, torch.zeros_like(total), 0.0
        keep()
    return result, rows
