"""What a search step costs, in ratios: a benchmark, not a test. Prints a table and writes JSON.

    python tests/bench.py [--quick] [--out bench.json]
    python tests/bench.py --full-size        # the paper's steps at 224 pixels, grown from A0 to A4

All variants of a row run in one process, in turns, and medians over the repeats are compared, so that a noisy
machine harms both sides alike. "All paths" is FBNetV2's way: all eight candidates of every block, at full
width, under soft masks of all widths and expansions.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from machinery import settings
from machinery.run import Run

import argparse
import contextlib
import functools
import json
import platform
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import data
import distill
import search
from derive import arch_of, derive, inherit
from grow import grow
from network import Network
from ops import ACTIVATIONS, conv
from space import CANDIDATES, SPACES, round8
from supernet import SuperNet, require_grad

IMAGENET_100 = 130_000              # about 1,300 images a class
V100 = 15.7e12                      # its FLOPs a second in float32, by NVIDIA's data sheet


def timed(variants, repeats, warm=2):
    """Median seconds of each function in the dict `variants`, called in turns; `warm` calls each to warm up.
    """
    times = {name: [] for name in variants}
    for n in range(repeats + warm):
        for name, call in variants.items():
            clock = time.perf_counter()
            call()
            if n >= warm:
                times[name].append(time.perf_counter() - clock)
    return {name: statistics.median(values) for name, values in times.items()}


def soft_mask(widths, alpha):
    """FBNetV2: the sum of all prefix masks, weighted by the softmax of alpha: (1, widest, 1, 1)."""
    masks = torch.arange(widths[-1]) < torch.tensor(widths)[:, None]
    return (F.softmax(alpha, 0) @ masks.float()).view(1, -1, 1, 1)


def all_paths(net, x):
    """The supernet's logits with every candidate computed, at full width, under soft masks."""
    x = F.hardswish(net.stem_norm(net.stem(x)))
    for mixed in net.blocks:
        block, alphas, y = mixed.block, mixed.alphas, 0
        hidden = [round8(e * x.shape[1]) for e in block.expansions]
        for gate, (kernel, se, activation) in zip(F.softmax(alphas["op"], 0), CANDIDATES.values()):
            c, act = mixed.layers, ACTIVATIONS[activation]
            h = x if c.expand is None else act(c.norm1(c.expand(x)))
            h = act(c.norm2(conv(h, c.depthwise, h.shape[1], kernel=kernel)))
            if len(hidden) > 1:
                h = h * soft_mask(hidden, alphas["expansion"])
            if se:
                h = h * F.hardsigmoid(c.excite(F.relu(c.squeeze(h.mean((2, 3), keepdim=True)))))
            y = y + gate * c.norm3(c.project(h))
        if block.residual:
            y = y + F.pad(x, (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
        x = y * soft_mask(block.widths, alphas["width"])
    x = F.hardswish(net.head_norm(net.head(x)))
    return net.classifier(x.mean((2, 3)))


@functools.cache
def supernet(space, channels, classes):
    """Large ones take seconds to draw: the rows of the table share them."""
    return SuperNet(space, channels, classes, torch.Generator().manual_seed(0))


class Steps:
    """A supernet of `space` with optimisers and one batch, and the steps that can be taken with it."""

    def __init__(self, space, batch, size, channels=3, classes=10, old=None):
        self.g, clock = torch.Generator().manual_seed(0), time.perf_counter()
        self.net = grow(old, space, self.g) if old else supernet(space, channels, classes)
        self.grown = time.perf_counter() - clock
        self.x = torch.randn(batch, channels, size, size, generator=self.g)
        self.y = torch.randint(classes, (batch,), generator=self.g)
        args = argparse.Namespace(lr=0.01, weight_decay=1e-4, alpha_lr=0.01)
        self.sgd, self.adam = search.optimizers(self.net, args)
        self.weights, self.alphas = self.net.weights(), self.net.alphas()

    def two_paths(self, teacher=None):
        """The loss of `search.backward`."""
        soft = None
        if teacher is not None:
            with torch.no_grad():
                soft = teacher(self.x)
        return distill.loss(self.net(self.x, self.net.sample(1.0, self.g)), soft, self.y, 0.5)

    def every_path(self):
        return F.cross_entropy(all_paths(self.net, self.x), self.y)

    def update_two(self):
        self.update(self.two_paths, alphas=False)

    def update(self, loss, alphas=True):
        """A step of the weights, then one of alpha, by the same loss function."""
        require_grad(self.alphas, False)
        self.sgd.zero_grad()
        loss().backward()
        self.sgd.step()
        if alphas:
            require_grad(self.weights, False)
            require_grad(self.alphas, True)
            loss().backward()
            self.adam.step()
            self.adam.zero_grad()
            require_grad(self.weights, True)


def memory(steps, loss):
    """Bytes that a step of the weights holds: what autograd keeps, each storage once, and gradients."""
    owned = {t.untyped_storage().data_ptr() for t in (*steps.net.parameters(), *steps.net.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    require_grad(steps.alphas, False)
    steps.sgd.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()
    value.backward()
    gradients = sum(p.grad.nbytes for p in steps.net.parameters() if p.grad is not None)
    steps.sgd.zero_grad()
    return sum(kept.values()) + gradients


def two_networks(steps):
    """(a drawn path, a function that trains its two networks, as plain modules, for a step): the limit."""
    nets = []
    with torch.no_grad():
        path = steps.net.sample(1.0, steps.g)
    for side in (0, -1):
        options = [(draws["op"].options[side], draws["expansion"].options[-1], draws["width"].options[-1])
                   for draws in path]
        net = inherit(Network(arch_of(steps.net, options)), steps.net).train()
        nets.append((net, torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=1e-4,
                                          fused=True)))

    def step():
        for net, sgd in nets:
            sgd.zero_grad()
            F.cross_entropy(net(steps.x), steps.y).backward()
            sgd.step()
    return path, step


def two_paths_against_all(stage, repeats, batch, size):
    steps = Steps(SPACES["paper"][stage], batch, size)
    times = timed({"two": lambda: steps.update(steps.two_paths),
                   "all": lambda: steps.update(steps.every_path)}, repeats, warm=1)
    drawn = statistics.median(memory(steps, steps.two_paths) for _ in range(repeats))
    return [(f"images/s, two paths over all, paper's A{stage}", times["all"] / times["two"], ">= 4", repeats),
            (f"memory, two paths over all, paper's A{stage}", drawn / memory(steps, steps.every_path),
             "<= 0.25", repeats)]


def overheads(name, space, paths, repeats, batch, size, channels):
    """Over several drawn `paths`, since their costs differ."""
    ratios, taught, steps = [], [], Steps(space, batch, size, channels)
    teacher = Network(arch_of(steps.net, [(0, 0, 0)] * len(space.blocks))).eval()
    for _ in range(paths):
        path, plain = two_networks(steps)
        draw = steps.net.sample
        steps.net.sample = lambda *given, path=path, draw=draw: (draw(*given), path)[1]  # drawn, then this
        times = timed({"two": lambda: steps.update_two(), "plain": plain,
                       "taught": lambda: steps.update(lambda: steps.two_paths(teacher), alphas=False)},
                      repeats)
        del steps.net.sample
        ratios.append(times["two"] / times["plain"])
        taught.append(times["taught"] / times["two"])
    n = paths * repeats
    return [(f"a step over its two networks alone, {name}", statistics.median(ratios), "<= 1.15", n),
            (f"a step with distillation over without, {name}", statistics.median(taught), "<= 1.25", n)]


def loading(repeats, epochs):
    """Batches/s of data.py over the steps/s of the fastest supernet; its share of time outside the real work.
    """
    images = data.load("fashion", "train")
    parts = data.split(images.labels, 0)
    loader = data.Loader(images, images.statistics(parts[0]), 32)
    steps, batches = Steps(SPACES["small"][0], 32, 28, 1), loader.shuffled(parts[0], 0)
    times = timed({"batch": lambda: next(batches), "step": lambda: steps.update_two()},
                  10 * repeats)
    few = max(1, repeats // 3)
    shares = [outside(loader, parts, epochs) for _ in range(few)]
    ratio = times["step"] / times["batch"]
    return [("batches/s of data.py over steps/s of A0", ratio, ">= 20", 10 * repeats),
            ("share outside forward, backward, optimiser, A0", statistics.median(shares), "<= 0.05", few)]


def outside(loader, parts, epochs):
    """The share of so many epochs that is neither forward (with the losses), backward nor optimiser."""
    seconds, within = [], []

    def watched(call, sign=1):
        """`call`, timed: with sign -1 it is taken off its caller's, else only the outermost counts."""
        def run(*args, **kwargs):
            clock = time.perf_counter()
            within.append(call)
            found = call(*args, **kwargs)
            within.pop()
            if sign < 0 or not within:
                seconds.append(sign * (time.perf_counter() - clock))
            return found
        return run
    args = settings.completed(settings.search_parser(None).parse_args(["--epochs", str(epochs)]))
    net = SuperNet(SPACES["small"][0]._replace(resolution=28), 1, 10)
    net.sample = watched(net.sample, -1)  # backward() draws the paths as well
    places = [(search, "backward"), (search, "step_sampled"), (torch.optim.SGD, "step"),
              (torch.optim.SGD, "zero_grad")]
    calls = [getattr(*place) for place in places]
    for place, call in zip(places, calls):
        setattr(*place, watched(call))
    clock = time.perf_counter()
    with contextlib.redirect_stdout(None):
        search.train_stage(net, None, loader, parts, args, Run(None, {}, torch.device("cpu")))
    whole = time.perf_counter() - clock
    for place, call in zip(places, calls):
        setattr(*place, call)
    return 1 - sum(seconds) / whole


def growth(repeats):
    old = SuperNet(SPACES["paper"][3], 3, 100)
    seconds = timed({"grow": lambda: grow(old, SPACES["paper"][4])}, repeats, warm=0)["grow"]
    return [("seconds to grow the paper's A3 into A4", seconds, "<= 5", repeats)]


def linearity(repeats, size):
    """Seconds a step against the number of blocks, and against the batch size."""
    spaces, sizes = SPACES["paper"], (16, 32, 64, 128, 256)
    by_stage = {s.stage: Steps(s, 4, size).update_two for s in spaces}
    by_batch = {batch: Steps(SPACES["small"][0], batch, 28, 1).update_two for batch in sizes}
    stages, batches = timed(by_stage, repeats, 1), timed(by_batch, 2 * repeats, 1)
    return [("R2 of seconds a step against blocks, paper's A0..A4",
             r2([len(s.blocks) for s in spaces], [stages[s.stage] for s in spaces]), ">= 0.98", repeats),
            ("R2 of seconds a step against batch size, small A0",
             r2(sizes, [batches[b] for b in sizes]), ">= 0.98", 2 * repeats)]


def full_size(batch, size=224):
    """Text: seconds, memory and FLOPs of the paper's steps at its own size, and of its whole search.

    FLOPs are counted forward, for one image: two paths, and the teacher. Backward takes twice as many for the
    weights, as many for alpha, which has a step for every two of theirs.
    """
    lines = [f"{batch} images of {size} pixels a step, 100 classes",
             "      blocks  grow s  weights s  alphas s  GB a step  GB weights  GFLOP forward  teacher"]
    net, teacher, total = None, None, 0.0
    for space, epochs in zip(SPACES["paper"], settings.DEFAULTS["paper"]["epochs"], strict=True):
        steps = Steps(space._replace(resolution=size), batch, size, 3, 100, net)
        text, flop = costs_of(steps, teacher, batch)
        lines.append(f"A{space.stage}{len(space.blocks):>10}{steps.grown:>8.1f}{text}")
        total += flop * IMAGENET_100 * 5 / 6 * epochs
        net = steps.net
        teacher = inherit(Network(derive(net)), net).eval()
    hours = total / V100 / 3600
    lines.append(f"The paper's search on ImageNet-100, {IMAGENET_100:,} images: {total:.2e} FLOP, "
                 f"{hours:.1f} hours of a V100 at its {V100 / 1e12} TFLOPS.")
    lines.append(f"The paper's 456 hours are {hours / 456:.1%} of that speed: small depthwise networks are "
                 "bound by memory, not by arithmetic.")
    return "\n".join(lines)


def costs_of(steps, teacher, batch):
    """(seconds, memory and FLOPs of these steps, as text; FLOPs an image of the weights' part)."""
    def two():
        return steps.two_paths(teacher)
    held = memory(steps, two)
    times = timed({alphas: lambda alphas=alphas: steps.update(two, alphas) for alphas in (False, True)},
                  3, warm=1)
    with torch.no_grad():
        taught = flops_of(lambda: teacher(steps.x), 1) / batch if teacher else 0.0
        student = flops_of(steps.two_paths, 8) / batch
    weights = 4 * sum(p.numel() for p in steps.weights)
    text = (f"{times[False]:>11.1f}{times[True] - times[False]:>10.1f}{held / 2 ** 30:>11.2f}"
            f"{weights / 2 ** 30:>12.2f}{student / 1e9:>15.2f}{taught / 1e9:>9.2f}")
    return text, 3 * student + taught + (2 * student + taught) / search.WEIGHTS_A_STEP


def flops_of(call, repeats):
    """FLOPs (two a multiply-accumulate) of a call, by PyTorch's counter: the mean, as paths differ."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(repeats):
            call()
    return counter.get_total_flops() / repeats


def r2(x, y):
    """The share of y's variance that a straight line in x explains."""
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="fewer repeats and smaller images: within a minute")
    p.add_argument("--full-size", action="store_true",
                   help="time, memory and FLOPs of the paper's steps at 224 pixels")
    p.add_argument("--out", type=Path, default=Path("bench.json"))
    args = p.parse_args(argv)
    if args.full_size:
        return print(full_size(8))
    repeats, few, many, size, paths, batch = (2, 1, 2, 48, 1, 4) if args.quick else (9, 9, 54, 96, 5, 16)
    torch.manual_seed(0)
    rows = [*two_paths_against_all(0, repeats, 4, size), *two_paths_against_all(4, few, 4, size),
            *overheads("small A4", SPACES["small"][4], paths, repeats, 32, 28, 1),
            *overheads("paper's A4", SPACES["paper"][4], paths, repeats, batch, size, 3),
            *loading(repeats, 0.04 if args.quick else 0.15), *growth(max(1, repeats // 3)),
            *linearity(many, size)]
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "quick": args.quick}
    print(f"{'measured':<58}{'found':>9}  must reach     n")
    for name, value, goal, n in rows:
        print(f"{name:<58}{value:>9.3f}  {goal:<10} {n:>5}")
    if args.quick:
        print("Few repeats on small images: the bounds are those of the full run.")
    keys = ("measured", "found", "must_reach", "n")
    found = {"machine": machine, "rows": [dict(zip(keys, row, strict=True)) for row in rows]}
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
