"""What a network and a search cost: MACs, parameters, hours, kWh and CO2e (Tables 3 and 4).

The paper's "FLOPs" are multiply-accumulates (MACs) of one image, in convolutions and the classifier. Batch norm,
activations, pooling and biases are not counted.
"""
import os
from typing import NamedTuple

import torch

from space import CANDIDATES

# Table 4: 456 GPU hours took 135.96 kWh; every row has this factor.
KWH_PER_GPU_HOUR = 135.96 / 456
# Strubell, Ganesh and McCallum 2019, whom the paper follows; every row of Table 4 but ProxylessNAS's has this factor.
CO2E_LB_PER_KWH = 0.954
# An estimate for a CPU: the thermal design power of an AMD EPYC 7763, 280 W for 64 cores.
KWH_PER_CORE_HOUR = 280 / 64 / 1000
# MACs of the derived networks A0..A4: Table 3's for the paper's space. For ours, the MACs that lie where Table 3's lie
# between the cheapest and the dearest network of their spaces (`targets` in tests/test_flops.py).
TARGETS = {"paper": (107e6, 251e6, 369e6, 435e6, 512e6), "small": (0.89e6, 1.65e6, 2.24e6, 3.72e6, 4.84e6)}


class Layer(NamedTuple):
    """What one layer costs for one image, and the shape that it puts out: (channels, pixels, pixels)."""
    name: str
    macs: int
    params: int
    channels: int
    pixels: int


def half(pixels):
    """Pixels a side behind a stride of 2: with k // 2 of padding, 28 -> 14 and 7 -> 4."""
    return (pixels + 1) // 2


def candidate(op, inputs, hidden, outputs, expand, stride, pixels):
    """The `Layer`s of one candidate of Table 2; `pixels` a side come in.

    The widths may be tensors that broadcast: the costs are then tensors of all their combinations.
    """
    kernel, se, _ = CANDIDATES[op]
    after = half(pixels) if stride == 2 else pixels
    layers = []
    if expand:
        layers.append(Layer("expand", inputs * hidden * pixels ** 2, (inputs + 2) * hidden, hidden, pixels))
    layers.append(Layer("depthwise", hidden * kernel ** 2 * after ** 2, hidden * (kernel ** 2 + 2), hidden, after))
    if se:                                       # round8(hidden / 4), in whole numbers so that tensors go as well
        squeezed = (hidden + 16) // 32 * 8
        squeezed = squeezed + (8 - squeezed) * (squeezed < 8)
        layers.append(Layer("squeeze", hidden * squeezed, (hidden + 1) * squeezed, squeezed, 1))
        layers.append(Layer("excite", squeezed * hidden, (squeezed + 1) * hidden, hidden, after))
    layers.append(Layer("project", hidden * outputs * after ** 2, (hidden + 2) * outputs, outputs, after))
    return layers


def stem(in_channels, outputs, resolution):
    """The `Layer` of the 3x3 convolution of stride 2 with its batch norm."""
    pixels = half(resolution)
    return Layer("stem", 9 * in_channels * outputs * pixels ** 2, (9 * in_channels + 2) * outputs, outputs, pixels)


def head(inputs, outputs, classes, pixels):
    """The `Layer`s of the 1x1 convolution with its batch norm, and of the classifier behind the average over pixels."""
    return [Layer("head", inputs * outputs * pixels ** 2, (inputs + 2) * outputs, outputs, pixels),
            Layer("classifier", outputs * classes, (outputs + 1) * classes, classes, 1)]


def layers(arch):
    """Every `Layer` of an `Arch`, in order."""
    found = [stem(arch.in_channels, arch.stem, arch.resolution)]
    for n, (inputs, b) in enumerate(zip(arch.inputs(), arch.blocks)):
        block = candidate(b.op, inputs, b.hidden, b.out, b.expand, b.stride, found[-1].pixels)
        found += [layer._replace(name=f"{n} {b.op} {layer.name}") for layer in block]
    return found + head(arch.blocks[-1].out, arch.head, arch.classes, found[-1].pixels)


def macs(arch):
    """Multiply-accumulates of one image (the paper's "FLOPs", Table 3)."""
    return sum(layer.macs for layer in layers(arch))


def params(arch):
    """Trainable parameters (Table 3)."""
    return sum(layer.params for layer in layers(arch))


class Costs(NamedTuple):
    """What everything in a space costs: `fixed`, a table a block, and the head's over the last block's widths."""
    fixed: float
    blocks: list              # tensors (input widths, operations, expansions, output widths)
    head: torch.Tensor        # (output widths,)


def costs(space, in_channels, classes, cost="macs"):
    """The `Costs` of a `Space`, `cost` being a field of `Layer`: a block's depends only on its own choices and the
    width before it, so tables hold the whole space.
    """
    first = stem(in_channels, space.stem, space.resolution)
    tables, pixels, inputs = [], first.pixels, torch.tensor([space.stem])
    for block in space.blocks:
        i, outputs = inputs.view(-1, 1, 1), torch.tensor(block.widths)
        e = torch.tensor(block.expansions, dtype=torch.float64).view(1, -1, 1)
        hidden = ((e * i + 4) // 8 * 8).clamp(min=8).long()                                  # round8, (i, e, 1)
        ops = [sum(getattr(layer, cost) for layer in candidate(op, i, hidden, outputs, block.expand, block.stride, pixels))
               for op in CANDIDATES]
        tables.append(torch.stack(ops, 1).double())                                          # (i, op, e, o)
        pixels, inputs = half(pixels) if block.stride == 2 else pixels, outputs
    last = sum(getattr(layer, cost) for layer in head(inputs, space.head, classes, pixels))
    return Costs(float(getattr(first, cost)), tables, last.double())


def expected(costs, probabilities):
    """The mean cost of the networks that a supernet samples; differentiable in its probabilities.

    probabilities: for each block the three vectors (operations,), (expansions,), (widths,). Choices are independent, so
    the mean is the sum over blocks of each table's mean.
    """
    total, before = costs.fixed, torch.ones(1, dtype=torch.float64)
    for table, (op, expansion, width) in zip(costs.blocks, probabilities):
        total = total + torch.einsum("ijkl,i,j,k,l->", table, before, op.double(), expansion.double(), width.double())
        before = width.double()
    return total + costs.head @ before


def bounds(costs):
    """(cheapest, dearest) network of a space: exact, by dynamic programming over the widths."""
    ends = []
    for best in (torch.amin, torch.amax):
        total = torch.zeros(1, dtype=torch.float64)
        for table in costs.blocks:
            total = best(total.view(-1, 1) + best(table, (1, 2)), 0)
        ends.append(costs.fixed + float(best(total + costs.head, 0)))
    return tuple(ends)


def amount(text):
    """A number of MACs, parameters, ..: "20M" -> 2e7; suffixes k, M, G. "off" is 0. ValueError if it is not one."""
    if text == "off":
        return 0.0
    scale = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:], 0)
    value = float(text[:-1]) * scale if scale else float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def energy(seconds, device, processes=1):
    """(device hours, kWh, lb of CO2e) of `seconds` on `processes` devices: an estimate from the paper's kWh per GPU hour,
    or for a CPU from a stated wattage of each core that torch uses.
    """
    hours = seconds / 3600 * processes
    if torch.device(device).type == "cpu":
        kwh = hours * KWH_PER_CORE_HOUR * min(torch.get_num_threads(), os.cpu_count())
    else:
        kwh = hours * KWH_PER_GPU_HOUR
    return hours, kwh, kwh * CO2E_LB_PER_KWH
