"""What is promised: the MACs and parameters of every candidate, network and space are exact; so are the
cheapest and the dearest network of a space; hours, kWh and CO2e follow Table 4; the command line
says the same.

The oracles: PyTorch's own counter (torch.utils.flop_counter, which counts two a MAC) and its parameters;
forward hooks; brute force over a space of few networks; torchvision's MobileNets, layer by layer. Networks
are built on the device "meta", which computes shapes alone.
"""
from machinery import flags

import itertools
import math
import random

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torchvision.models import mobilenet_v2, mobilenet_v3_large, mobilenet_v3_small

import derive
import flops
from network import InvertedResidual
from space import CANDIDATES, SPACES, Arch, ArchBlock, Block, Space, round8

STAGES = [pytest.param(space, *flops.IMAGES[name], id=f"{name} A{space.stage}")
          for name, stages in SPACES.items() for space in stages]
COSTS = flops.Layer.macs, flops.Layer.params


def counter(net, channels, pixels):
    """PyTorch's counts for one image: (MACs, {module: MACs})."""
    with FlopCounterMode(display=False) as mode:
        net.eval()(torch.empty(1, channels, pixels, pixels, device="meta"))
    each = {name: sum(counts.values()) for name, counts in mode.get_flop_counts().items()}
    assert all(n % 2 == 0 for n in each.values())
    return mode.get_total_flops() // 2, {name: n // 2 for name, n in each.items()}


def numel(module):
    return sum(p.numel() for p in module.parameters())


def draw(space, seed):
    """Random options, (operation, expansion, width) a block."""
    rng = random.Random(seed)
    return [(rng.randrange(len(CANDIDATES)), rng.randrange(len(b.expansions)), rng.randrange(len(b.widths)))
            for b in space.blocks]


def network(space, channels, classes, options):
    """The `Arch` of options, written here a second time, in whole numbers."""
    blocks, width = [], space.stem
    for b, (op, expansion, out) in zip(space.blocks, options, strict=True):
        hidden = round8(b.expansions[expansion] * width)
        blocks.append(ArchBlock(list(CANDIDATES)[op], hidden, b.widths[out], b.stride, b.residual, b.expand))
        width = b.widths[out]
    return Arch(space.name, space.stage, space.resolution, channels, classes, space.stem, space.head,
                tuple(blocks))


def random_arch(space, channels, classes, seed):
    return network(space, channels, classes, draw(space, seed))


# ---- candidates and networks against PyTorch

@pytest.mark.parametrize("op", CANDIDATES)
@pytest.mark.parametrize("stride, expand", [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize("pixels", [7, 8])                      # odd and even; networks have the others
def test_candidate(op, stride, expand, pixels):
    for inputs, hidden, outputs in ((8, 8, 12), (24, 72, 40)):  # of 8 channels a quarter is 2, and so 8
        hidden = hidden if expand else inputs
        with torch.device("meta"):
            module = InvertedResidual(ArchBlock(op, hidden, outputs, stride, False, expand), inputs)
        found = flops.candidate(op, inputs, hidden, outputs, expand, stride, pixels)
        assert sum(layer.macs() for layer in found) == counter(module, inputs, pixels)[0]
        assert sum(layer.params() for layer in found) == numel(module)
        y = module(torch.empty(1, inputs, pixels, pixels, device="meta"))
        assert y.shape == (1, outputs, found[-1].pixels, found[-1].pixels)


@pytest.mark.parametrize("space, channels, classes", STAGES)
def test_networks(space, channels, classes):
    arch = random_arch(space, channels, classes, 0)
    with torch.device("meta"):
        net = derive.Network(arch)
    total, each = counter(net, channels, arch.resolution)
    assert flops.macs(arch) == total
    assert flops.params(arch) == numel(net)
    for n, block in enumerate(net.blocks):                                   # and block by block
        mine = [layer for name, layer in flops.layers(arch).items() if name.startswith(f"{n} ")]
        assert sum(layer.macs() for layer in mine) == each[f"Network.blocks.{n}"]
        assert sum(layer.params() for layer in mine) == numel(block)


class Steps(TorchDispatchMode):
    """Every convolution and matrix product in order by the counter's formulas: [(MACs, values put out)]."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            flop = flop_registry[function._overloadpacket]
            self.rows.append((flop(*args, **(kwargs or {}), out_val=out) // 2, out.numel()))
        return out


@pytest.mark.parametrize("name", SPACES)
def test_layers_are_the_steps_and_shapes_of_a_network(name):
    arch = random_arch(SPACES[name][-1], *flops.IMAGES[name], 1)
    with torch.device("meta"):
        net, shapes = derive.Network(arch).eval(), []
    for block in net.blocks:
        block.register_forward_hook(lambda module, x, y: shapes.append(tuple(y.shape[1:])))
    with Steps() as steps:
        net(torch.empty(1, arch.in_channels, arch.resolution, arch.resolution, device="meta"))
    found = flops.layers(arch).values()
    assert [(x.outputs, x.pixels, x.pixels) for x in found if x.name == "project"] == shapes
    before = arch.in_channels, arch.resolution
    for layer, step in zip(found, steps.rows, strict=True):      # excite: one pixel, then it scales the image
        pixels = 1 if layer.name == "excite" else layer.pixels
        assert (layer.macs(), layer.outputs * pixels ** 2) == step
        assert (layer.inputs, layer.pixels_in) == before          # of the layer before
        if layer.name == "depthwise":
            scaled = layer.outputs, layer.pixels
        before = layer.outputs, layer.pixels
        assert layer.name != "excite" or before == scaled


# ---- torchvision's MobileNets as an Arch

def measured(model):
    """What PyTorch says of a model's layers in order, [(MACs, parameters, channels, pixels)].

    A batch norm's parameters belong to the convolution before it.
    """
    names, rows = {module: name for name, module in model.named_modules()}, []

    def hook(module, x, y):
        if isinstance(module, nn.BatchNorm2d):
            rows[-1][1] += numel(module)
        else:
            rows.append([f"{type(model).__name__}.{names[module]}", numel(module), y.shape[1],
                         y.shape[-1] if y.dim() == 4 else 1])
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)):
            module.register_forward_hook(hook)
    total, each = counter(model, 3, 224)
    rows = [(each[name], *others) for name, *others in rows]
    assert (sum(r[0] for r in rows), sum(r[1] for r in rows)) == (total, numel(model))
    return rows


def ours(arch):
    """The same of an `Arch`, with names. An excite puts out one pixel, ours the scaled image."""
    return [(name, (x.macs(), x.params(), x.outputs, 1 if x.name == "excite" else x.pixels))
            for name, x in flops.layers(arch).items()]


def test_mobilenet_v2():
    """Sandler et al. 2018, Table 2. Every layer is equal: 300.8 M MACs and 3.5 M parameters.

    Its first block has no expand convolution, like our row 2. Which activation it has makes no difference.
    """
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
            (6, 320, 1, 1))
    blocks, width = [], 32
    for expansion, out, n, stride in rows:
        for place in range(n):
            blocks.append(ArchBlock("ir_k3", expansion * width, out, 1 if place else stride, place > 0,
                                    expansion > 1))
            width = out
    arch = Arch("MobileNetV2", 0, 224, 3, 1000, 32, 1280, tuple(blocks))
    with torch.device("meta"):
        theirs = measured(mobilenet_v2())
    assert [row for _, row in ours(arch)] == theirs
    assert (flops.macs(arch), flops.params(arch)) == (300_774_272, 3_504_872)


#              k  exp  out  se     act       stride   (Howard et al. 2019, Tables 1 and 2)
V3_LARGE = ((3, 16,  16,  False, "relu",   1),
            (3, 64,  24,  False, "relu",   2),
            (3, 72,  24,  False, "relu",   1),
            (5, 72,  40,  True,  "relu",   2),
            (5, 120, 40,  True,  "relu",   1),
            (5, 120, 40,  True,  "relu",   1),
            (3, 240, 80,  False, "hswish", 2),
            (3, 200, 80,  False, "hswish", 1),
            (3, 184, 80,  False, "hswish", 1),
            (3, 184, 80,  False, "hswish", 1),
            (3, 480, 112, True,  "hswish", 1),
            (3, 672, 112, True,  "hswish", 1),
            (5, 672, 160, True,  "hswish", 2),
            (5, 960, 160, True,  "hswish", 1),
            (5, 960, 160, True,  "hswish", 1))
V3_SMALL = ((3, 16,  16,  True,  "relu",   2),
            (3, 72,  24,  False, "relu",   2),
            (3, 88,  24,  False, "relu",   1),
            (5, 96,  40,  True,  "hswish", 2),
            (5, 240, 40,  True,  "hswish", 1),
            (5, 240, 40,  True,  "hswish", 1),
            (5, 120, 48,  True,  "hswish", 1),
            (5, 144, 48,  True,  "hswish", 1),
            (5, 288, 96,  True,  "hswish", 2),
            (5, 576, 96,  True,  "hswish", 1),
            (5, 576, 96,  True,  "hswish", 1))


@pytest.mark.parametrize("build, rows, head, hidden, differing", [
    (mobilenet_v3_large, V3_LARGE, 960, 1280, {"3 ir_k5_se squeeze", "3 ir_k5_se excite"}),
    (mobilenet_v3_small, V3_SMALL, 576, 1024, set())], ids=["large", "small"])
def test_mobilenet_v3(build, rows, head, hidden, differing):
    """All layers are equal but for two differences.

    The classifier of V3 has a hidden linear layer: it stands here for our classifier, and the last one is
    left over. A squeeze width that rounding would make smaller than 90 % of a quarter is rounded up in V3: of
    72 hidden channels it squeezes 24, and we (72 / 4 = 18, to the nearest multiple of 8) 16. Its residual
    rule (equal widths and stride 1, so that the first block of V3-Large has one) differs from ours, and costs
    nothing.
    """
    ops, blocks, width = {value: op for op, value in CANDIDATES.items()}, [], 16
    for kernel, expanded, out, se, activation, stride in rows:
        blocks.append(ArchBlock(ops[kernel, se, activation], expanded, out, stride,
                                residual=stride == 1 and width == out, expand=expanded != width))
        width = out
    arch = Arch("MobileNetV3", 0, 224, 3, hidden, 16, head, tuple(blocks))
    with torch.device("meta"):
        *theirs, last = measured(build())
    assert last == (hidden * 1000, (hidden + 1) * 1000, 1000, 1)
    mine = ours(arch)
    assert len(mine) == len(theirs)
    assert {name for (name, row), their in zip(mine, theirs) if row != their} == differing
    if differing:
        n = [name for name, _ in mine].index("3 ir_k5_se squeeze")
        assert [row for _, row in mine[n:n + 2]] == [(72 * 16, 73 * 16, 16, 1), (16 * 72, 17 * 72, 72, 1)]
        assert theirs[n:n + 2] == [(72 * 24, 73 * 24, 24, 1), (24 * 72, 25 * 72, 72, 1)]


# ---- the costs of a whole space

@pytest.mark.parametrize("space, channels, classes", STAGES)
@pytest.mark.parametrize("cost", COSTS)
def test_tables_hold_the_costs_of_candidates(space, channels, classes, cost):
    rng, table = random.Random(2), flops.costs(space, channels, classes, cost)
    pixels, widths = (space.resolution + 1) // 2, (space.stem,)
    assert len(table.blocks) == len(space.blocks) and table.head.shape == (len(space.blocks[-1].widths),)
    for block, found in zip(space.blocks, table.blocks):
        assert found.shape == (len(widths), len(CANDIDATES), len(block.expansions), len(block.widths))
        for _ in range(20):
            i, op, e, o = (rng.randrange(n) for n in found.shape)
            layers = flops.candidate(list(CANDIDATES)[op], widths[i], round8(block.expansions[e] * widths[i]),
                                     block.widths[o], block.expand, block.stride, pixels)
            assert found[i, op, e, o] == sum(map(cost, layers))
        pixels, widths = math.ceil(pixels / block.stride), block.widths


def total(table, options):
    """The cost of one network, looked up."""
    i, found = 0, table.fixed
    for entries, (op, e, o) in zip(table.blocks, options):
        found += float(entries[i, op, e, o])
        i = o
    return found + float(table.head[i])


@pytest.mark.parametrize("space, channels, classes", STAGES)
def test_tables_add_up_to_networks_within_the_bounds(space, channels, classes):
    for cost, count in zip(COSTS, (flops.macs, flops.params)):
        table = flops.costs(space, channels, classes, cost)
        low, high = flops.bounds(table)
        for seed in range(10):
            options = draw(space, seed)
            found = count(network(space, channels, classes, options))
            assert total(table, options) == found
            assert low < found < high
    widest = [(list(CANDIDATES).index("ir_k5_se"), -1, -1)] * len(space.blocks)   # has the most parameters
    assert high == flops.params(network(space, channels, classes, widest))


TINY = Space("tiny", 0, 13, 16, 24, (Block(0, 0, (1,), (4, 12), 1, False, False),
                                     Block(1, 0, (0.75, 3), (8, 20), 2, False, True),
                                     Block(1, 1, (1.25,), (8, 20), 1, True, True)))


@pytest.mark.parametrize("cost", COSTS)
def test_bounds_are_those_of_brute_force(cost):
    choices = [itertools.product(range(len(CANDIDATES)), range(len(b.expansions)), range(len(b.widths)))
               for b in TINY.blocks]
    count = {flops.Layer.macs: flops.macs, flops.Layer.params: flops.params}[cost]
    every = [count(network(TINY, 2, 5, options)) for options in itertools.product(*choices)]
    assert len(every) == flops.networks(TINY) == 8 ** 3 * (1 * 2) * (2 * 2) * (1 * 2)
    assert flops.bounds(flops.costs(TINY, 2, 5, cost)) == (min(every), max(every))


def test_bounds_of_any_table_are_those_of_brute_force():
    """In a space the narrowest is the cheapest. Not here: it takes the whole chain to find the ends."""
    g = torch.Generator().manual_seed(0)
    shapes = ((1, 2, 2, 3), (3, 2, 1, 4), (4, 1, 3, 2))
    for _ in range(20):
        table = flops.Costs(5.0, [torch.rand(shape, generator=g).double() for shape in shapes],
                            torch.rand(2, generator=g).double())
        every = [total(table, options) for options in itertools.product(
            *(itertools.product(*map(range, shape[1:])) for shape in shapes))]
        assert flops.bounds(table) == pytest.approx((min(every), max(every)), rel=1e-12)


# ---- targets, the middle, energy, amounts

@pytest.mark.parametrize("stage", range(5))
def test_our_targets_lie_where_table_3_lies(stage):
    at = {name: flops.position(flops.TARGETS[name][stage],
                                *flops.bounds(flops.costs(stages[stage], *flops.IMAGES[name])))
          for name, stages in SPACES.items()}
    assert at["small"] == pytest.approx(at["paper"], rel=0.01)


def test_position():
    assert flops.position(1, 1, 100) == 0 and flops.position(100, 1, 100) == 1
    assert flops.position(10, 1, 100) == pytest.approx(0.5)


def test_the_middle_of_the_papers_spaces():
    """A0: 103.4 M MACs and 2.4 M parameters; A4: 390.9 M and 7.8 M. A counter that takes the pooling and the
    scaling of squeeze-excite for a MAC a value each says 105 M and 395 M; ours, as PyTorch's, does not.
    """
    for stage, found, with_scaling, params in ((0, 103.4, 104.8, 2.4), (4, 390.9, 395.2, 7.8)):
        arch = flops.middle_arch(SPACES["paper"][stage], 3, 1000)
        scaled = sum(x.outputs * x.pixels ** 2 for x in flops.layers(arch).values() if x.name == "excite")
        assert round(flops.macs(arch) / 1e6, 1) == found
        assert round((flops.macs(arch) + 2 * scaled) / 1e6, 1) == with_scaling
        assert round(flops.params(arch) / 1e6, 1) == params


def test_energy_of_a_gpu_is_table_4():
    hours, kwh, co2e = flops.energy(456 * 3600 / 8, "cuda", processes=8)
    assert (hours, round(kwh, 2)) == (456, 135.96)
    assert co2e == pytest.approx(129.70, abs=0.01)
    for hours, kwh, co2e in ((216, 64.21, 61.26), (648, 192.63, 183.78), (89.6, 26.75, 25.52),
                             (74.4, 22.19, 21.17), (87.2, 25.97, 24.77), (96.8, 28.94, 27.61),
                             (108, 32.11, 30.63)):
        assert flops.energy(3600 * hours, "cuda") == pytest.approx((hours, kwh, co2e), rel=0.004)


def test_energy_of_a_cpu():
    cores = min(torch.get_num_threads(), flops.os.cpu_count())
    assert flops.energy(7200, "cpu") == pytest.approx((2, 2 * cores * 0.004375, 2 * cores * 0.004375 * 0.954))


@pytest.mark.parametrize("text, value", [("20M", 2e7), ("0.9M", 9e5), ("1.5G", 1.5e9), ("3k", 3e3),
                                         ("3K", 3e3), ("107e6", 107e6), ("512000000", 512e6), ("off", 0)])
def test_amount(text, value):
    assert flags.amount(text) == value


@pytest.mark.parametrize("text", ["", "M", "-1M", "0", "0M", "nan", "inf", "1T", "1 2", "offM", "1MM"])
def test_amount_of_nonsense(text):
    with pytest.raises(ValueError):
        flags.amount(text)


# ---- the command line

@pytest.mark.parametrize("name", SPACES)
def test_space_on_the_command_line(name, capsys):
    flops.main(["--space", name])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    rows = [line.split() for line in lines if line[:1] == "A" and line[1:2].isdigit()]
    assert [row[0] for row in rows] == ["A0", "A1", "A2", "A3", "A4"]
    for space, row in zip(SPACES[name], rows):
        assert int(row[1]) == len(space.blocks)
        assert float(row[2].removeprefix("10^")) == pytest.approx(math.log10(flops.networks(space)), abs=0.05)
        arch = flops.middle_arch(space, *flops.IMAGES[name])
        for cost, count, cells in zip(COSTS, (flops.macs, flops.params), (row[3:6], row[8:11])):
            low, high = flops.bounds(flops.costs(space, *flops.IMAGES[name], cost))
            found = [low / 1e6, count(arch) / 1e6, high / 1e6]
            assert [float(cell) for cell in cells] == pytest.approx(found, rel=1e-3)
        assert float(row[6]) == flops.TARGETS[name][space.stage] / 1e6
        assert row[11] == (f"{flops.TABLE3_PARAMS[space.stage] / 1e6:g}" if name == "paper" else "-")
    assert [row[7] for row in rows] == ["62%", "81%", "78%", "74%", "72%"]    # the same for both


def test_network_on_the_command_line(tmp_path, capsys):
    arch = random_arch(SPACES["paper"][4], 3, 1000, 5)
    (tmp_path / "A4.json").write_text(arch.to_json())
    flops.main([str(tmp_path / "A4.json")])
    lines = capsys.readouterr().out.splitlines()
    found, last = flops.layers(arch), lines[-1].replace(",", "").split()
    assert len(lines) == len(found) + 3 and max(map(len, lines)) <= 110
    for (name, layer), line in zip(found.items(), lines[2:]):
        cells = line.replace(",", "").removeprefix(name).split()
        assert cells == [f"{layer.outputs}", "x", f"{layer.pixels}", "x", f"{layer.pixels}",
                         f"{layer.macs()}", f"{layer.params()}", f"{4 * layer.outputs * layer.pixels ** 2}"]
    assert last[:3] == ["all", f"{flops.macs(arch)}", f"{flops.params(arch)}"]
    assert int(last[3]) == sum(int(line.replace(",", "").split()[-1]) for line in lines[2:-1])


def test_targets_lie_in_every_space_where_table_3_lies_in_the_papers():
    for name in SPACES:
        pixels = SPACES[name][0].resolution
        assert flops.targets(name, 3, pixels, 100) == list(flops.TARGETS[name])
        for shape in ((3, 32, 10), (1, 299, 1000)):
            for space, found, target in zip(SPACES[name], flops.targets(name, *shape), flops.TARGETS[name]):
                low, high = flops.bounds(flops.costs(space._replace(resolution=shape[1]), shape[0], shape[2]))
                first, last = flops.bounds(flops.costs(space, *flops.IMAGES[name]))
                assert math.log(found / low) / math.log(high / low) == pytest.approx(
                    math.log(target / first) / math.log(last / first)) and low < found < high


@pytest.mark.parametrize("op, times", [("ir_k3", 2.0), ("ir_k3_se_hs", 2.3)])
@pytest.mark.parametrize("space, channels, classes", STAGES[:2] + STAGES[-1:])
def test_the_estimate_of_a_trainings_memory_is_what_backward_keeps(space, channels, classes, op, times):
    """The oracle: PyTorch's hooks, which see each tensor that forward keeps, counted by storage."""
    arch = flops.middle_arch(space._replace(resolution=64 if channels == 3 else 28), channels, classes)
    arch = arch._replace(blocks=tuple(b._replace(op=op) for b in arch.blocks))
    network, kept = derive.Network(arch).train(), {}
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.zeros(4, channels, arch.resolution, arch.resolution)).sum()
    found = sum(size for pointer, size in kept.items() if pointer not in own)
    state = 4 * 4 * sum(p.numel() for p in network.parameters())
    estimate = flops.training_memory(arch, 4)
    assert estimate - state == pytest.approx(2 / times * found, rel=0.12) and estimate < state + found
