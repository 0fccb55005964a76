"""What a network and a search cost: MACs, parameters, hours, kWh and CO2e (Tables 3 and 4).

    python flops.py --space paper        # A0..A4: the cheapest, middle and dearest network, beside Table 3
    python flops.py runs/001/A3.json     # a network, layer by layer

The paper's "FLOPs" are multiply-accumulates (MACs) of one image, in convolutions and the classifier. Batch
norm, activations, pooling and biases are not counted.
"""
from machinery import flags

import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from space import CANDIDATES, SPACES

# Table 4's total: 456 GPU hours took 135.96 kWh. Its rows differ from this factor by up to 0.3 %.
KWH_PER_GPU_HOUR = 135.96 / 456
# Strubell, Ganesh and McCallum 2019, whom the paper follows: all rows of Table 4 but ProxylessNAS's have it.
CO2E_LB_PER_KWH = 0.954
# An estimate for a CPU: the thermal design power of an AMD EPYC 7763, 280 W for 64 cores.
KWH_PER_CORE_HOUR = 280 / 64 / 1000
# MACs of the derived networks A0..A4: Table 3's for the paper's space. For ours, those that lie between the
# cheapest and the dearest network of their space where Table 3's do, by `position`.
TARGETS = {"paper": (107e6, 251e6, 369e6, 435e6, 512e6),
           "small": (0.89e6, 1.65e6, 2.24e6, 3.72e6, 4.84e6)}
TABLE3_PARAMS = (2.3e6, 3.4e6, 5.8e6, 7.2e6, 8.4e6)
IMAGES = {"paper": (3, 1000), "small": (1, 10)}              # channels and classes of the tables


class Layer(NamedTuple):
    """One layer, by its shapes for one image: (inputs, pixels_in, pixels_in) -> (outputs, pixels, pixels).

    A convolution has its batch norm with it; squeeze, excite and the classifier have biases instead. Squeeze
    and the classifier take the mean over the pixels first, and excite puts out the image that it scales: all
    three compute at a single pixel. A residual, of kernel 0, only adds.
    """
    name: str
    inputs: int
    outputs: int
    pixels_in: int
    pixels: int
    kernel: int = 1
    act: str = ""

    def weights(self):
        return self.kernel ** 2 * self.outputs * (1 if self.name == "depthwise" else self.inputs)

    def macs(self):
        return self.weights() * min(self.pixels_in, self.pixels) ** 2

    def params(self):
        vectors = {"squeeze": 1, "excite": 1, "classifier": 1, "residual": 0}.get(self.name, 2)
        return self.weights() + vectors * self.outputs


def strided(pixels, stride):
    """Pixels a side behind a convolution that is padded by half its kernel: at stride 2, 28 -> 14, 7 -> 4."""
    return -(-pixels // stride)


def stem(in_channels, outputs, resolution):
    """The `Layer` of the 3x3 convolution of stride 2."""
    return Layer("stem", in_channels, outputs, resolution, strided(resolution, 2), 3, "hswish")


def candidate(op, inputs, hidden, outputs, expand, stride, pixels):  # task 5.1
    """The list of `Layer`s of one candidate of Table 2, into which `pixels` a side come.

    They are expand, if `expand` is true, depthwise, squeeze and excite, if the candidate has them, and
    project, which has no activation. The squeezed width is a quarter of the hidden one, rounded as by
    `round8`. The widths may be tensors that broadcast.
    """
    (kernel, se, act), after = CANDIDATES[op], strided(pixels, stride)
    layers = [Layer("expand", inputs, hidden, pixels, pixels, 1, act)] if expand else []
    layers.append(Layer("depthwise", hidden, hidden, pixels, after, kernel, act))
    if se:
        squeezed = (hidden + 16) // 32 * 8                       # round8(hidden / 4), but for the least, 8
        squeezed = squeezed + (8 - squeezed) * (squeezed < 8)
        layers.append(Layer("squeeze", hidden, squeezed, after, 1))
        layers.append(Layer("excite", squeezed, hidden, 1, after))
    return [*layers, Layer("project", hidden, outputs, after, after)]


def head(inputs, outputs, classes, pixels):
    """The `Layer`s of the 1x1 convolution and of the classifier."""
    return [Layer("head", inputs, outputs, pixels, pixels, 1, "hswish"),
            Layer("classifier", outputs, classes, pixels, 1)]


def layers(arch):
    """Every `Layer` of an `Arch`, in order, by a name such as "3 ir_k5_se squeeze" in block 3."""
    found = {"stem": stem(arch.in_channels, arch.stem, arch.resolution)}
    pixels = found["stem"].pixels
    for n, (inputs, b) in enumerate(zip(arch.inputs(), arch.blocks)):
        block = candidate(b.op, inputs, b.hidden, b.out, b.expand, b.stride, pixels)
        found |= {f"{n} {b.op} {layer.name}": layer for layer in block}
        pixels = block[-1].pixels
    return found | {layer.name: layer for layer in head(b.out, arch.head, arch.classes, pixels)}


def macs(arch):
    """Multiply-accumulates of one image (the paper's "FLOPs", Table 3)."""
    return sum(map(Layer.macs, layers(arch).values()))


def params(arch):
    """Trainable parameters (Table 3)."""
    return sum(map(Layer.params, layers(arch).values()))


class Costs(NamedTuple):
    """What everything in a space costs: `fixed`, a table a block, the head's over the last block's widths."""
    fixed: float
    blocks: list              # tensors (input widths, operations, expansions, output widths)
    head: torch.Tensor        # (output widths,)


def costs(space, in_channels, classes, cost=Layer.macs):
    """The `Costs` of a `Space`; `cost` is a function of a `Layer`: `Layer.macs`, `Layer.params`, `each(..)`.

    What a block costs depends only on its own choices and the width before it: tables hold the whole space.
    """
    first = stem(in_channels, space.stem, space.resolution)
    tables, pixels, inputs = [], first.pixels, torch.tensor([space.stem])
    for block in space.blocks:
        i, outputs = inputs.view(-1, 1, 1), torch.tensor(block.widths)
        hidden = torch.tensor([[[block.hidden(width, e)] for e in range(len(block.expansions))]
                               for width in inputs.tolist()])                        # (i, e, 1)
        ops = [sum(map(cost, candidate(op, i, hidden, outputs, block.expand, block.stride, pixels)[:-1]))
               for op in CANDIDATES]                                                 # each (i, e, 1)
        after = strided(pixels, block.stride)
        ends = [Layer("project", hidden, outputs, after, after),
                *[Layer("residual", i, outputs, after, after, kernel=0)] * block.residual]
        table = torch.stack(ops, 1) + sum(map(cost, ends)).unsqueeze(1)              # (i, op, e, o)
        tables.append(table.double())
        pixels, inputs = after, outputs
    last = sum(map(cost, head(inputs, space.head, classes, pixels)))
    return Costs(float(cost(first)), tables, last.double())


def each(cost):
    """From a cost of a `Layer` with numbers for widths, the one for `costs`, where these are tensors."""
    def every(layer):
        widths = (torch.as_tensor(layer.inputs) << 32) + layer.outputs
        pairs, index = widths.unique(return_inverse=True)
        pairs = [divmod(pair, 1 << 32) for pair in pairs.tolist()]
        return torch.tensor([cost(Layer(layer.name, *pair, *layer[3:])) for pair in pairs])[index]
    return every


def best_ends(blocks, head, best):
    """For each block, by the width that comes in, the least (`best` is torch.amin) or the most (torch.amax)
    that it and all that follows it sum to; the head's last. Exact, by dynamic programming over the widths.
    """
    ends = [head]
    for table in reversed(blocks):
        ends.append(best(table + ends[-1], (1, 2, 3)))
    return ends[::-1]


def bounds(costs):
    """What the cheapest network of a space costs, and the dearest."""
    return tuple(costs.fixed + float(best_ends(costs.blocks, costs.head, best)[0])
                 for best in (torch.amin, torch.amax))


def energy(seconds, device, processes=1):
    """(device hours, kWh, lb of CO2e) of `seconds` on `processes` devices (Table 4).

    Energy is an estimate: the paper's of a GPU, or a stated wattage of each core of a CPU that torch uses.
    """
    hours, cores = seconds / 3600 * processes, min(torch.get_num_threads(), os.cpu_count())
    cpu = torch.device(device).type == "cpu"
    kwh = hours * KWH_PER_CORE_HOUR * cores if cpu else hours * KWH_PER_GPU_HOUR
    return hours, kwh, kwh * CO2E_LB_PER_KWH


def training_memory(arch, batch_size):
    """Bytes that training an `Arch` takes at least: a weight, its gradient, momentum and average a parameter,
    and twice the outputs of all layers. Backward needs 2.1 times these with ReLU and 2.5 times with hswish.
    """
    outputs = sum(layer.outputs * layer.pixels ** 2 for layer in layers(arch).values())
    return 4 * (4 * params(arch) + 2 * batch_size * outputs)


def position(value, low, high):
    """Where `value` lies between `low` (0) and `high` (1) on a logarithmic scale."""
    return math.log(value / low) / math.log(high / low)


def networks(space):
    """How many choices a `Space` holds: operations x expansions x widths, multiplied over its blocks."""
    return math.prod(len(CANDIDATES) * len(block.expansions) * len(block.widths) for block in space.blocks)


def middle_arch(space, in_channels, classes):
    """The `Arch` of every range's middle option (the upper of two), with ir_k3_se_hs everywhere."""
    op = list(CANDIDATES).index("ir_k3_se_hs")
    options = [(op, len(b.expansions) // 2, len(b.widths) // 2) for b in space.blocks]
    return space.arch(options, in_channels, classes)


def targets(name, channels, pixels, classes):
    """The MACs that each stage of a search aims at, for images of so many channels, pixels a side, classes.

    At the pixels that the tables are made for these are `TARGETS`. Else they have the same `position` between
    the cheapest and the dearest network.
    """
    if pixels == SPACES[name][0].resolution:
        return list(TARGETS[name])
    found = []
    for space, target in zip(SPACES[name], TARGETS[name], strict=True):
        at = position(target, *bounds(costs(space, *IMAGES[name])))
        low, high = bounds(costs(space._replace(resolution=pixels), channels, classes))
        found.append(low * (high / low) ** at)
    return found


def describe_space(name, images=None, aims=None):
    """The text of `--space`: a row for each of A0..A4.

    images: (channels, pixels a side, classes); without them the ones that the tables are made for.
    aims: MACs that a search aims at, a stage, 0 for none; without them `TARGETS`.
    """
    channels, pixels, classes = images or (IMAGES[name][0], SPACES[name][0].resolution, IMAGES[name][1])
    table3 = name == "paper" and not aims
    known = "Table 3" if table3 else "target"
    aims = (*(aims or TARGETS[name]), 0, 0, 0, 0)[:5]
    text = f"""The {name} space, {channels} x {pixels} x {pixels} pixels, {classes} classes; numbers in M
least, most  over all networks, exact, for MACs and for parameters apart
middle       the middle expansion and width of every range (the upper of two), and ir_k3_se_hs everywhere
at           where {known} lies between least (0%) and most (100%), on a logarithmic scale

                      MACs                                 parameters
   blocks networks""" + f"{'least':>8}{'middle':>8}{'most':>8}{known:>9}{'at':>5}" * 2
    for space, aim, size in zip(SPACES[name], aims, TABLE3_PARAMS if table3 else [0] * 5, strict=True):
        space = space._replace(resolution=pixels)
        text += f"\nA{space.stage}{len(space.blocks):>7}{f'10^{math.log10(networks(space)):.1f}':>9}"
        for cost, count, value in ((Layer.macs, macs, aim), (Layer.params, params, size)):
            low, high = bounds(costs(space, channels, classes, cost))
            for n in (low, count(middle_arch(space, channels, classes)), high):
                text += f"{n / 1e6:>8.4g}"
            text += f"{value / 1e6:>9.4g}{position(value, low, high):>5.0%}" if value else f"{'-':>9}{'-':>5}"
    return text


def describe(arch):
    """The text of a network, layer by layer: output shape, MACs, parameters, activation memory."""
    rows = [(name, f"{x.outputs} x {x.pixels} x {x.pixels}", x.macs(), x.params(),
             4 * x.outputs * x.pixels ** 2) for name, x in layers(arch).items()]
    rows.append(("all", "", *(sum(row[i] for row in rows) for i in (2, 3, 4))))
    images = f"{arch.in_channels} x {arch.resolution} x {arch.resolution} pixels, {arch.classes} classes"
    text = f"""A{arch.stage} of the {arch.space} space, {images}; bytes: of one image's outputs, in float32
{'layer':<26}{'output':>16}{'MACs':>15}{'parameters':>12}{'bytes':>12}"""
    return text + "".join(f"\n{a:<26}{b:>16}{c:>15,}{d:>12,}{e:>12,}" for a, b, c, d, e in rows)


@flags.command
def main(argv=None):
    p = flags.Parser("flops.py", __doc__)
    p.add_argument("arch", nargs="?", type=Path, metavar="ARCH.json", help="a network, as a search leaves it")
    p.add_argument("--space", choices=SPACES, help="A0..A4 of the paper's tables, or of ours")
    args = p.parse_args(argv)
    if (args.arch is None) == (args.space is None):
        p.error("give either a network, ARCH.json, or a space, --space paper")
    print(describe_space(args.space) if args.space else describe(flags.read_arch(args.arch)))


if __name__ == "__main__":
    main()
