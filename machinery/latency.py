"""How long a network takes for one image on this machine: a third cost, beside MACs and parameters.

A space has far too many networks to measure each of them. But they are made of few different layers
(`flops.Layer`): each of these is measured once, and a network takes as long as its layers together.
"""
from machinery.files import Refused, read_json, write

import functools
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
from network import ACTIVATIONS, conv

ROUNDS, CALLS = 11, 3            # rounds, and measured calls in each, behind one that is not
SAMPLE = 20                      # random networks, at least, that layers are compared with


def show(nanoseconds):
    return f"{nanoseconds / 1e6:.3f} ms"


def random_image(channels, pixels):
    """(1, channels, pixels, pixels), channels last in memory, as the images within a network."""
    return torch.randn(1, channels, pixels, pixels).contiguous(memory_format=torch.channels_last)


def build(layer):
    """What `network.Network` computes in a `flops.Layer`, as a function of an image, in eval mode."""
    inputs, outputs = layer.inputs, layer.outputs
    if layer.name == "residual":
        y, wider = random_image(outputs, layer.pixels), outputs - inputs
        if wider > 0:
            return lambda x: y + F.pad(x, (0, 0, 0, 0, 0, wider))
        return lambda x: y + (x[:, :outputs] if wider else x)
    if layer.name == "squeeze":
        module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(inputs, outputs, 1), nn.ReLU())
    elif layer.name == "excite":
        module = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.Hardsigmoid())
    elif layer.name == "classifier":
        module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, outputs))
    else:
        stride, groups = 1 + (layer.pixels < layer.pixels_in), outputs if layer.name == "depthwise" else 1
        module = conv(inputs, outputs, layer.kernel, stride, groups=groups,
                      activation_layer=ACTIVATIONS.get(layer.act))
    module = module.eval().to(memory_format=torch.channels_last)
    if layer.name == "excite":
        scaled = random_image(outputs, layer.pixels)
        return lambda x: module(x) * scaled
    return module


@torch.no_grad()
def measure(builders):
    """Whole nanoseconds that a call of build() takes, for each (build, channels, pixels) of its image.

    Rounds are measured one after the other, so that what else the machine does falls on all alike. It only
    ever adds to a time, hence the lower quartile. Each function is built anew in each round, since all of
    them together would not fit into memory.
    """
    times = [[] for _ in builders]
    for _ in range(ROUNDS):
        for (build_one, channels, pixels), mine in zip(builders, times):
            f, x = build_one(), random_image(channels, pixels)
            f(x)
            for _ in range(CALLS):
                start = time.perf_counter_ns()
                f(x)
                mine.append(time.perf_counter_ns() - start)
    return [round(statistics.quantiles(mine, n=4)[0]) for mine in times]


def measure_networks(networks):
    """Nanoseconds that each `Network` takes for one image."""
    return measure([(network.eval, network.arch.in_channels, network.arch.resolution)
                    for network in networks])


def tables(walk, network, file):
    """The list of `flops.Costs`, one a space, that walk(cost) returns where cost(layer) is a measured time.

    Layer by layer, weights and code are found in the caches, so that networks take longer than their layers
    together, by nearly the same factor: that of `sample` goes into the costs. `file` keeps what was measured.
    What another machine, another version of torch or another number of threads has left there, and what is
    no such file, is measured anew.

    network(which, options) returns the `Network` of these options in the space of number `which`.
    """
    here = {"machine": platform.node(), "processor": platform.machine(), "device": "cpu",
            "threads": torch.get_num_threads(), "torch": torch.__version__}
    try:
        saved = read_json(file)
        known, factor = saved.pop("nanoseconds"), saved.pop("factor")
        sound = all(type(n) in (int, float) and 0 < n < math.inf for n in (factor, *known.values()))
        known = known if sound and saved == here else {}
    except (Refused, LookupError, AttributeError):
        known = {}
    layers = {}

    def note(layer):
        layers[" ".join(map(str, layer)).strip()] = layer
        return 0
    walk(note)                                      # costs nothing, and lists the layers

    def read(factor):
        times = {layer: round(factor * known[name]) for name, layer in layers.items()}
        return walk(times.__getitem__)
    if missing := [name for name in layers if name not in known]:
        clock = time.perf_counter()
        builders = [(functools.partial(build, layer), layer.inputs, layer.pixels_in)
                    for layer in map(layers.get, missing)]
        known |= zip(missing, measure(builders))
        factor = statistics.median(whole / parts for parts, whole in zip(*sample(read(1), network)))
        write(file, json.dumps(here | {"factor": factor, "nanoseconds": known}, indent=1) + "\n")
        print(f"measured {len(missing)} layers in {time.perf_counter() - clock:.0f} s; networks take "
              f"{factor:.2f} times as long as their layers one by one: {file}", flush=True)
    return read(factor)


def sample(tables, network):
    """(sums, wholes) of random networks, as many of each space: nanoseconds by `tables`, and as a whole."""
    sums, networks = [], []
    for n, (which, table) in itertools.product(range(math.ceil(SAMPLE / len(tables))), enumerate(tables)):
        options, total = draw(table, data.generator(0, n, which))
        sums.append(total)
        networks.append(network(which, options))
    return sums, measure_networks(networks)


def draw(table, generator):
    """A random network, all options alike, of the space that `table` is of: its options and its cost."""
    options, total, before = [], table.fixed, 0
    for block in table.blocks:
        options.append(tuple(int(torch.randint(n, (1,), generator=generator)) for n in block.shape[1:]))
        total += float(block[before, *options[-1]])
        before = options[-1][2]
    return options, total + float(table.head[before])
