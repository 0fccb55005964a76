"""How long a network takes for one image on this machine: a third cost, beside MACs and parameters.

A space has far too many blocks to measure each of them. But they are made of few different layers: each of
these is measured once, and a block takes as long as its layers together. derive.py says how far such sums lie
from the measured times of whole networks.

Times are whole nanoseconds: their sums are exact in any order, as those of MACs are, and so is budget.py.
"""
from machinery.files import write

import itertools
import json
import math
import platform
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

import data
from flops import Costs, half
from ops import ACTIVATIONS, add_residual, conv, norm
from space import CANDIDATES, round8

ROUNDS, CALLS = 11, 3            # rounds, and measured calls in each, behind one that is not
SUFFIXES = {"ns": 1, "us": 1e3, "ms": 1e6, "s": 1e9}


def duration(text):
    """Nanoseconds of a time: "2ms" -> 2e6; suffixes ns, us, ms, s. ValueError for anything else."""
    number = text.rstrip("".join(SUFFIXES))
    value = float(number) * SUFFIXES.get(text.removeprefix(number), 0)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def show(nanoseconds):
    return f"{nanoseconds / 1e6:.3f} ms"


# A layer as (function of images, their channels, their pixels a side): the lines of `ops.InvertedResidual`
# and of `derive.Network`, in eval mode. Weights are random, statistics as they begin: neither changes the
# time.

def stem(channels, outputs, pixels):
    layer, bn = nn.Conv2d(channels, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs).eval()
    return lambda x: F.hardswish(norm(last(conv(x, layer, outputs)), bn)), channels, pixels


def expand(inputs, hidden, act, pixels):
    layer, bn, act = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden).eval(), ACTIVATIONS[act]
    return lambda x: act(norm(conv(x, layer, hidden), bn)), inputs, pixels


def depthwise(hidden, kernel, stride, act, pixels):
    layer = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)
    bn, act = nn.BatchNorm2d(hidden).eval(), ACTIVATIONS[act]
    return lambda x: act(norm(conv(x, layer, hidden), bn)), hidden, pixels


def squeeze(hidden, pixels):
    squeezed = round8(hidden / 4)
    first, second = nn.Conv2d(hidden, squeezed, 1), nn.Conv2d(squeezed, hidden, 1)

    def excited(x):
        s = F.relu(conv(x.mean((2, 3), keepdim=True), first, squeezed))
        return x * F.hardsigmoid(conv(s, second, hidden))
    return excited, hidden, pixels


def project(hidden, outputs, pixels):
    layer, bn = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs).eval()
    return lambda x: norm(conv(x, layer, outputs), bn), hidden, pixels


def residual(inputs, outputs, pixels):
    y = last(torch.randn(1, outputs, pixels, pixels))
    return lambda x: add_residual(y, x), inputs, pixels


def head(inputs, outputs, classes, pixels):
    layer, bn = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs).eval()
    classifier = nn.Linear(outputs, classes)
    return lambda x: classifier(F.hardswish(norm(conv(x, layer, outputs), bn)).mean((2, 3))), inputs, pixels


LAYERS = {f.__name__: f for f in (stem, expand, depthwise, squeeze, project, residual, head)}


def last(x):
    """x with its channels last in memory, as all images are within a network."""
    return x.contiguous(memory_format=torch.channels_last)


def costs(space, in_channels, classes, cost):
    """The `flops.Costs` of a `Space`, where cost(kind, *sizes) is that of one of `LAYERS`."""
    fixed = cost("stem", in_channels, space.stem, space.resolution)
    blocks, pixels, inputs = [], half(space.resolution), (space.stem,)
    for block in space.blocks:
        table, after = [], half(pixels) if block.stride == 2 else pixels
        for i, option in itertools.product(inputs, range(len(block.expansions))):
            hidden = block.hidden(i, option)
            ops = [(cost("expand", i, hidden, act, pixels) if block.expand else 0)
                   + cost("depthwise", hidden, kernel, block.stride, act, pixels)
                   + (cost("squeeze", hidden, after) if se else 0) for kernel, se, act in CANDIDATES.values()]
            outputs = [cost("project", hidden, o, after)
                       + (cost("residual", i, o, after) if block.residual else 0) for o in block.widths]
            table.append(torch.tensor(ops).view(-1, 1) + torch.tensor(outputs))                # (op, o)
        table = torch.stack(table).unflatten(0, (len(inputs), -1))                             # (i, e, op, o)
        blocks.append(table.transpose(1, 2).double())                                          # (i, op, e, o)
        pixels, inputs = after, block.widths
    ends = [cost("head", i, space.head, classes, pixels) for i in inputs]
    return Costs(float(fixed), blocks, torch.tensor(ends).double())


@torch.no_grad()
def measure(makers):
    """Nanoseconds a call, as whole numbers, of each (function, channels, pixels) that the `makers` return.

    Round by round, so that what else the machine does falls on all alike; it only ever adds to a time, hence
    the lower quartile. Each is made anew in each round, as all of them together would not fit into memory.
    """
    times = [[] for _ in makers]
    for _ in range(ROUNDS):
        for make, found in zip(makers, times):
            f, channels, pixels = make()
            x = last(torch.randn(1, channels, pixels, pixels))
            f(x)
            for _ in range(CALLS):
                start = time.perf_counter_ns()
                f(x)
                found.append(time.perf_counter_ns() - start)
    return [round(statistics.quantiles(found, n=4)[0]) for found in times]


def tables(spaces, in_channels, classes, network, file):
    """The `Costs` of each space in nanoseconds, from layers measured here, which are kept in `file`.

    One by one layers find their weights and code in the caches, so that networks take longer than their
    layers together, by nearly the same factor: that of some 20 random ones goes into the costs. network: as
    in `sample`. What another machine, another version of torch or another number of threads has left in
    `file`, and what is no such file, is measured anew.
    """
    here = {"machine": platform.node(), "processor": platform.machine(), "device": "cpu",
            "threads": torch.get_num_threads(), "torch": torch.__version__}
    try:
        saved = json.loads(file.read_text())
        known, factor = saved.pop("nanoseconds"), saved.pop("factor")
        sound = all(isinstance(n, (int, float)) and 0 < n < math.inf for n in (factor, *known.values()))
        known = known if sound and saved == here else {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        known = {}
    needed = {}

    def need(*key):
        needed[" ".join(map(str, key))] = key
        return 0

    def read(factor):
        def took(*key):
            return round(factor * known[" ".join(map(str, key))])
        return [costs(space, in_channels, classes, took) for space in spaces]
    for space in spaces:
        costs(space, in_channels, classes, need)
    missing = [name for name in needed if name not in known]
    if missing:
        clock = time.perf_counter()
        makers = [lambda key=needed[name]: LAYERS[key[0]](*key[1:]) for name in missing]
        known |= zip(missing, measure(makers))
        factor = statistics.median(whole / parts for parts, whole in zip(*sample(read(1), network, 0)))
        write(file, json.dumps(here | {"factor": factor, "nanoseconds": known}, indent=1) + "\n")
        print(f"measured {len(missing)} layers in {time.perf_counter() - clock:.0f} s; networks take "
              f"{factor:.2f} times as long as their layers one by one: {file}", flush=True)
    return read(factor)


def sample(tables, network, seed):
    """(sums, measured) of some 20 random networks, as many of each space: nanoseconds by `tables`, and as a
    whole.

    network(which, options) -> the `derive.Network` of these options in the space of tables[which].
    """
    sums, networks = [], []
    for n, (which, table) in itertools.product(range(math.ceil(20 / len(tables))), enumerate(tables)):
        options, total = draw(table, data.generator(seed, n, which))
        sums.append(total)
        networks.append(network(which, options))
    return sums, measure_networks(networks)


def draw(table, generator):
    """A random network of the space that the costs `table` are of, all options alike: its options, as
    `budget.viterbi` gives them, and its cost.
    """
    options, total, before = [], table.fixed, 0
    for block in table.blocks:
        options.append(tuple(int(torch.randint(n, (1,), generator=generator)) for n in block.shape[1:]))
        total += float(block[before, *options[-1]])
        before = options[-1][2]
    return options, total + float(table.head[before])


def measure_networks(networks):
    """Nanoseconds that each `derive.Network` takes for one image."""
    return measure([lambda n=n: (n.eval(), n.arch.in_channels, n.arch.resolution) for n in networks])


def error(sums, measured):
    """The median and the largest |sum / measured - 1|, and the correlation of the two."""
    off = [abs(a / b - 1) for a, b in zip(sums, measured, strict=True)]
    return statistics.median(off), max(off), statistics.correlation(sums, measured)
