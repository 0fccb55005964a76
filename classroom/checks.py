"""Checks for students: each task's function alone, on inputs made by hand, in milliseconds.

    python -m pytest classroom/checks.py -k task_3_1         # one task
    python -m pytest classroom/checks.py                     # all

A task's checks pass while every other task is still unsolved: where its function calls another task's, a
stand-in answers, with a value that fits the check and no other. A check that fails says what was expected and
what came.
"""
import itertools
import math
from unittest import mock

import numpy as np
import torch
from torch import nn

import budget
import derive
import distill
import flops
import grow
import network
import ops
import space
import supernet


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def show(value):
    """A value as text: tensors as lists, and numbers with four decimals."""
    if isinstance(value, torch.Tensor):
        value = value.detach().double() if value.is_floating_point() else value
        return str(np.round(value.numpy(), 4).tolist())
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def expect(what, came, wanted, within=1e-5):
    """Fail with a sentence unless `came` is `wanted`: the same shape, and the same numbers up to rounding."""
    if isinstance(wanted, torch.Tensor):
        if not isinstance(came, torch.Tensor):
            fail(f"{what}: expected a tensor, came {show(came)}")
        if came.shape != wanted.shape:
            fail(f"{what}: expected the shape {tuple(wanted.shape)}, came {tuple(came.shape)}")
        same = torch.allclose(came.detach().double(), wanted.detach().double(), rtol=0, atol=within)
        if not same and wanted.numel() > 12:                # too many to print: the first that differs
            where = tuple(((came - wanted).abs().nan_to_num(math.inf) > within).nonzero()[0].tolist())
            what, came, wanted = f"{what}, at {list(where)}", came[where], wanted[where]
    elif isinstance(wanted, float):
        same = isinstance(came, (int, float)) and abs(came - wanted) <= within
    else:
        same = came == wanted
    if not same:
        fail(f"{what}: expected {show(wanted)}, came {show(came)}")


def fail(sentence):
    raise AssertionError(sentence)


def drawn_from_the_generator(what, draw):
    """Fail unless draw(generator), a tensor, repeats with an equal generator, and differs with another."""
    torch.manual_seed(1)
    one = draw(seeded(7))
    torch.manual_seed(2)
    expect(f"{what}, drawn again with the same generator", draw(seeded(7)), one)
    expect(f"{what}: whether another generator draws the same", torch.equal(draw(seeded(8)), one), False)


def planes(*values):
    """One image of a pixel, a channel for each value: (1, channels, 1, 1)."""
    return torch.tensor(values).view(1, -1, 1, 1)


def two_masks(widths, gates):
    """Stands in for 1.2: the channel mask of two ascending widths."""
    low, high = widths
    return torch.cat([torch.ones(low), gates[1] * torch.ones(high - low)])


# ---- 1.1 add_residual

def test_task_1_1_equal_widths_are_added():
    expect("[1, 2] + [10, 20]", ops.add_residual(planes(1., 2.), planes(10., 20.)), planes(11., 22.))


def test_task_1_1_a_wider_input_is_cut():
    expect("[1] + the first channel of [10, 20, 30]",
           ops.add_residual(planes(1.), planes(10., 20., 30.)), planes(11.))


def test_task_1_1_a_narrower_input_is_padded_with_zeros():
    expect("[1, 2, 3] + [10], and zeros behind it",
           ops.add_residual(planes(1., 2., 3.), planes(10.)), planes(11., 2., 3.))


def test_task_1_1_every_pixel_is_added_and_nothing_is_changed_in_place():
    y, x = torch.ones(2, 1, 2, 2), torch.arange(16.).view(2, 2, 2, 2)
    expect("ones + the first channel of two images", ops.add_residual(y, x), 1 + x[:, :1])
    expect("y, which was given, afterwards", y, torch.ones(2, 1, 2, 2))


# ---- 1.2 mask

def test_task_1_2_one_width_is_ones():
    expect("the mask of the width 3 with gate 1", ops.mask((3,), torch.ones(1)), torch.ones(3))


def test_task_1_2_two_widths_are_weighted():
    expect("the mask of 2 (gate 0.25) and 4 (gate 0.75)",
           ops.mask((2, 4), torch.tensor([0.25, 0.75])), torch.tensor([1, 1, 0.75, 0.75]))


def test_task_1_2_widths_come_in_any_order_and_twice():
    expect("the mask of 3 (0.1), 1 (0.2), 2 (0.3) and 1 (0.4)",
           ops.mask((3, 1, 2, 1), torch.tensor([0.1, 0.2, 0.3, 0.4])), torch.tensor([1, 0.4, 0.1]))


def test_task_1_2_the_gates_get_a_gradient():
    gates = torch.tensor([0.25, 0.75], requires_grad=True)
    found = ops.mask((2, 4), gates)
    expect("whether the mask has a gradient", found.requires_grad, True)
    found[3].backward()
    expect("the gradient of the last of 4 channels, by the gates of the widths 2 and 4",
           gates.grad, torch.tensor([0.0, 1.0]))


def test_task_1_2_equal_widths_give_no_gradient():
    gates = torch.tensor([0.25, 0.75], requires_grad=True)
    found = ops.mask((2, 2), gates)
    expect("the mask of 2 and 2", found, torch.ones(2))
    expect("whether the mask of 2 and 2 has a gradient", found.requires_grad, False)


# ---- 1.3 InvertedResidual.forward

def layers(inputs=1, hidden=64, stride=1, expand=True):
    """A block whose kernels are all ones, but depthwise, which has its middle tap alone; one output."""
    block = ops.InvertedResidual(inputs, hidden, 1, stride, expand)
    for p in block.parameters():
        nn.init.constant_(p, float(p.dim() > 1))            # and biases are zeros
    nn.init.dirac_(block.depthwise.weight, groups=hidden)
    return block


def candidates(block, x, names, hidden=(32, 64), gates=(0.25, 0.75), normalise=lambda x, layer: x):
    """The block's forward, with stand-ins for channel masks and for batch norm, which here does nothing."""
    with mock.patch.multiple(ops, mask=two_masks, norm=normalise), torch.no_grad():
        return block(x, names, hidden, torch.tensor(gates), 1)


def test_task_1_3_activations_and_the_mask():
    """32 channels of weight 1 and 32 of 0.75 count as 56; each is activated twice."""
    for name, value, wanted in (("ir_k3", 1., 56.), ("ir_k3", -1., 0.), ("ir_k3_hs", 3., 168.),
                                ("ir_k3_hs", 1., 56 * 11 / 27), ("ir_k3_hs", -1., -56 * 4 / 27)):
        found, = candidates(layers(), planes(value), [name])
        expect(f"{name} of a pixel of {value:g}, hidden widths 32 (gate 0.25) and 64 (0.75), kernels of ones",
               found, planes(wanted), 1e-3)


def test_task_1_3_squeeze_and_excite_are_masked_too():
    """56 reach squeeze; 8 squeezed channels of weight 1 and 8 of 0.75 count as 14."""
    block = layers()
    nn.init.constant_(block.squeeze.weight, 1 / 56)
    nn.init.constant_(block.excite.weight, 1 / 14)
    for name, value, wanted in (("ir_k3_se", 1., 56 * 4 / 6), ("ir_k3_se_hs", 3., 168.), ("ir_k3", 1., 56.)):
        found, = candidates(block, planes(value), [name])
        expect(f"{name} of a pixel of {value:g}, where squeeze and excite only take means", found,
               planes(wanted), 1e-3)


def test_task_1_3_the_mask_is_behind_batch_norm():
    block = layers()

    def normalise(x, layer):                # the batch norm behind depthwise divides a channel by its size
        return x / x.abs().amax((0, 2, 3), keepdim=True) if layer is block.norm2 else x
    found, = candidates(block, planes(3.), ["ir_k3"], normalise=normalise)
    expect("ir_k3 of a pixel of 3 that batch norm makes 1, hidden widths 32 (0.25) and 64 (0.75)", found,
           planes(56.), 1e-3)


def test_task_1_3_channels_beyond_the_widest_hidden_width_are_not_computed():
    block = layers()
    with torch.no_grad():
        block.expand.weight[32:] = block.depthwise.weight[32:] = block.project.weight[:, 32:] = math.nan
        block.squeeze.weight[8:] = block.squeeze.weight[:, 32:] = block.excite.weight[32:] = math.nan
    for name, wanted in (("ir_k5", 28.), ("ir_k5_se", 28.)):
        found, = candidates(block, planes(1.), [name], (16, 32))
        expect(f"{name} of hidden widths 16 (0.25) and 32 (0.75), where all weights beyond are nan", found,
               planes(wanted), 1e-3)


def test_task_1_3_a_3x3_kernel_is_the_middle_of_the_5x5_one():
    block = layers(hidden=8)
    nn.init.ones_(block.depthwise.weight)
    for name, taps in (("ir_k3", 9.), ("ir_k5", 25.)):
        found, = candidates(block, torch.ones(1, 1, 5, 5), [name], (8, 8))
        expect(f"the middle pixel of {name} over 5 x 5 ones, 8 hidden channels, kernels of ones",
               found[0, 0, 2, 2].item(), 8 * taps, 1e-3)


def test_task_1_3_without_an_expand_convolution_nothing_is_activated_before_depthwise():
    block = layers(8, 8, expand=False)
    with torch.no_grad():
        block.depthwise.weight.neg_()
    found, = candidates(block, planes(*[-1.] * 8), ["ir_k3"], (8, 8))
    expect("ir_k3 of 8 channels of -1 without expand, where depthwise multiplies by -1", found, planes(8.))


def test_task_1_3_two_candidates_are_those_computed_alone():
    block, x, names = layers(8, 8), planes(*torch.linspace(-1, 1, 8).tolist()), list(space.CANDIDATES)
    nn.init.dirac_(block.expand.weight)
    before, alone = x.clone(), {name: candidates(block, x, [name], (8, 8))[0] for name in names}
    expect("x, which was given, afterwards", x, before)
    for pair in itertools.product(names, names):
        for name, found in zip(pair, candidates(block, x, pair, (8, 8)), strict=True):
            expect(f"{name}, computed in {pair}, beside {name} computed alone", found, alone[name])


# ---- 2.1 temperature

def test_task_2_1_the_ends():
    expect("temperature(0)", float(supernet.temperature(0.0)), 5.0)
    expect("temperature(1)", float(supernet.temperature(1.0)), 0.1)


def test_task_2_1_it_falls_exponentially():
    expect("temperature(0.5), the geometric mean of 5 and 0.1", float(supernet.temperature(0.5)), 0.5 ** 0.5)
    expect("temperature(0.25)", float(supernet.temperature(0.25)), 5 * 0.02 ** 0.25)


def test_task_2_1_other_ends():
    expect("temperature(0.5, first=4, last=1)", float(supernet.temperature(0.5, 4.0, 1.0)), 2.0)


# ---- 2.2 SuperNet.sample

CHAIN = space.Space("chain", 0, 8, 8, 8, (space.Block(0, 0, (1,), (8, 16), 1, False, False),
                                          *[space.Block(n, 0, (1, 2), (8, 16, 24), 1, False, True)
                                            for n in range(1, 40)]))
EXPANSION, WIDTH = [0.8, 0.2], [0.6, 0.3, 0.1]            # probabilities, the same in all 39 last blocks


def alike():
    net = supernet.SuperNet(CHAIN, 1, 2, seeded())
    with torch.no_grad():
        for block in list(net.blocks)[1:]:
            block.alphas["expansion"].copy_(torch.tensor(EXPANSION).log())
            block.alphas["width"].copy_(torch.tensor(WIDTH).log())
    return net


def drawn(net, name, tau=1.0, seeds=range(50)):
    """The draws of one choice in the last 39 blocks, for all seeds: 1,950."""
    return [draws[name] for seed in seeds for draws in net.sample(tau, seeded(seed))[1:]]


def test_task_2_2_two_options_of_each_choice_and_their_gates():
    path = alike().sample(1.0, seeded())
    expect("the number of dicts, one a block", len(path), 40)
    for n, draws in enumerate(path):
        expect(f"block {n}: its choices", set(draws), {"op", "expansion", "width"})
        for name, (options, gates) in draws.items():
            single = n == 0 and name == "expansion"              # there is but one
            expect(f"block {n}, {name}: options as a tuple, ascending and distinct",
                   options, (0,) if single else tuple(sorted(set(options))[:2]))
            expect(f"block {n}, {name}: the sum of the gates", gates.sum(), torch.tensor(1.0))
            expect(f"block {n}, {name}: the shape of the gates", tuple(gates.shape), (1 if single else 2,))


def test_task_2_2_pairs_are_drawn_without_replacement_from_the_softmax():
    found = [tuple(draw.options) for draw in drawn(alike(), "width")]
    for (a, b), wanted in (((0, 1), 0.7071), ((0, 2), 0.2167), ((1, 2), 0.0762)):
        expect(f"how often widths {a} and {b} are drawn together, of probabilities 0.6, 0.3 and 0.1",
               found.count((a, b)) / len(found), wanted, 0.04)


def test_task_2_2_uniform_draws_are_those_of_equal_logits_of_operations():
    net, equal = alike(), alike()
    with torch.no_grad():
        for block in net.blocks:
            block.alphas["op"][0] = 5.0
    paths = net.sample(1.0, seeded(), uniform=True), equal.sample(1.0, seeded())
    for n, (mine, wanted) in enumerate(zip(*paths)):
        for name in ("op", "expansion", "width"):
            (options, gates), (others, their) = mine[name], wanted[name]
            expect(f"block {n}, {name}: the options of a uniform draw", options, others)
            expect(f"block {n}, {name}: the gates of a uniform draw", gates, their)


def test_task_2_2_gates_are_of_the_perturbed_logits():
    """The difference of two Gumbels has mean 0 and mean size 1.386 around the difference of the logits."""
    gates = torch.stack([draw.gates for draw in drawn(alike(), "expansion")])
    odds = (gates[:, 0] / gates[:, 1]).log()
    expect("the mean of log(gate 0 / gate 1) at temperature 1, of probabilities 0.8 and 0.2",
           odds.mean().item(), math.log(4), 0.16)
    expect("how far log(gate 0 / gate 1) is from its mean, on average",
           (odds - math.log(4)).abs().mean().item(), 2 * math.log(2), 0.12)


def test_task_2_2_all_randomness_is_the_generators():
    net = alike()

    def draws(generator):
        return [draw for block in net.sample(1.0, generator) for draw in block.values()]
    drawn_from_the_generator("the options", lambda g: torch.tensor([n for d in draws(g) for n in d.options]))
    drawn_from_the_generator("the gates", lambda g: torch.cat([d.gates for d in draws(g)]))


def test_task_2_2_the_temperature_divides():
    warm, cold = (torch.stack([draw.gates for draw in drawn(alike(), "width", tau, range(2))]).double()
                  for tau in (1.0, 0.5))
    expect("log(gate 0 / gate 1) at temperature 0.5, over that at 1 with the same generator (median)",
           ((cold[:, 0] / cold[:, 1]).log() / (warm[:, 0] / warm[:, 1]).log()).median().item(), 2.0, 1e-2)


def test_task_2_2_the_gates_give_the_logits_a_gradient():
    net = alike()
    for name, draw in net.sample(1.0, seeded())[1].items():
        expect(f"whether the gates of {name} have a gradient", draw.gates.requires_grad, True)
        draw.gates[0].backward(retain_graph=True)
    for name, alpha in net.blocks[1].alphas.items():
        expect(f"how many of the {name} logits get a gradient from a gate",
               0 if alpha.grad is None else int(alpha.grad.count_nonzero()), 2)


def test_task_2_2_at_temperature_0_one_path_has_the_gate_and_both_learn():
    net, found = alike(), []
    for tau in (0, 1.0):
        draw = net.sample(tau, seeded())[1]["width"]
        gradient, = torch.autograd.grad(draw.gates[0], net.blocks[1].alphas["width"])
        found.append((draw.gates.detach(), gradient))
    (hard, gradient), (soft, wanted) = found
    expect("the gates at temperature 0", hard, (soft == soft.max()).float())
    expect("the gradient of a gate at temperature 0, which is that at temperature 1", gradient, wanted)


# ---- 2.3 MixedBlock.forward

class Layers(nn.Module):
    """Stands in for 1.3: notes what is asked for, and answers ones for ir_k3 and tens for all others."""

    def forward(self, x, ops, hidden, gates, outputs):
        self.asked = {}
        for width, gate in zip(hidden, gates.tolist(), strict=True):
            self.asked[width] = round(self.asked.get(width, 0) + gate, 6)
        self.outputs = outputs
        return [torch.full((1, outputs, 1, 1), 1. if op == "ir_k3" else 10.) for op in ops]


def mixed(residual, width_gates=(0.25, 0.75)):
    """(what a MixedBlock returns, what its layers were asked for): widths 8 and 16 come in."""
    block = supernet.MixedBlock(space.Block(1, int(residual), (1, 2, 3), (8, 16, 24), 1, residual, True), 16)
    block.layers = Layers()
    draws = {"op": supernet.Draw((0, 5), torch.tensor([0.2, 0.8])),
             "expansion": supernet.Draw((0, 2), torch.tensor([0.3, 0.7])),
             "width": supernet.Draw((0, 2), torch.as_tensor(width_gates))}
    with mock.patch.multiple(supernet, mask=two_masks, add_residual=lambda y, x: y + 100):
        found = block(planes(*[1.] * 16), ((8, 16), torch.tensor([0.4, 0.6])), draws)
    return found, block.layers


def test_task_2_3_hidden_widths_are_of_all_pairs():
    _, asked = mixed(False)
    expect("hidden widths and their gates, of widths 8 (0.4) and 16 (0.6), expansions 1 (0.3) and 3 (0.7)",
           asked.asked, {8: 0.12, 16: 0.18, 24: 0.28, 48: 0.42})
    expect("the output channels that the layers compute", asked.outputs, 24)


def test_task_2_3_candidates_are_weighted_and_outputs_masked():
    (y, _), _ = mixed(False)
    expect("0.2 x 1 + 0.8 x 10, and beyond the width 8 times 0.75", y, planes(*[8.2] * 8, *[6.15] * 16))


def test_task_2_3_the_residual_is_masked_too():
    (y, _), _ = mixed(True)
    expect("8.2 + a residual of 100, and beyond the width 8 times 0.75", y,
           planes(*[108.2] * 8, *[81.15] * 16), 1e-3)


def test_task_2_3_widths_and_gates_go_on_to_the_next_block():
    (_, (widths, gates)), _ = mixed(False)
    expect("the output widths", tuple(widths), (8, 24))
    expect("their gates", gates, torch.tensor([0.25, 0.75]))


def test_task_2_3_the_widths_get_a_gradient():
    gates = torch.tensor([0.25, 0.75], requires_grad=True)
    (y, _), _ = mixed(False, gates)
    expect("whether the output has a gradient", y.requires_grad, True)
    y.sum().backward()
    expect("the gradient of the sum by the gates of the widths 8 and 24", gates.grad,
           torch.tensor([0, 16 * 8.2]), 1e-3)


# ---- 3.1 channel_map

def test_task_3_1_old_channels_stay():
    expect("channel_map(3, 3)", grow.channel_map(3, 3, seeded()), torch.arange(3))
    f = grow.channel_map(3, 5, seeded())
    expect("the first 3 of channel_map(3, 5)", f[:3], torch.arange(3))
    expect("the length of channel_map(3, 5)", len(f), 5)
    expect("its dtype, by which it can index", f.dtype, torch.long)


def test_task_3_1_no_channel_is_copied_twice_before_all_are_once():
    for seed in range(20):
        f = grow.channel_map(3, 8, seeded(seed)).tolist()
        expect(f"the first three new channels of channel_map(3, 8), which is {f}, in order", sorted(f[3:6]),
               [0, 1, 2])
        expect(f"how many different old channels the last two of {f} copy", len(set(f[6:])), 2)


def test_task_3_1_new_channels_are_random():
    firsts = [int(grow.channel_map(3, 4, seeded(seed))[3]) for seed in range(300)]
    for old in range(3):
        expect(f"how often the new channel of channel_map(3, 4) copies channel {old}",
               firsts.count(old) / 300, 1 / 3, 0.12)


def test_task_3_1_all_randomness_is_the_generators():
    drawn_from_the_generator("channel_map(50, 100)", lambda g: grow.channel_map(50, 100, g))


# ---- 3.2 produce

def test_task_3_2_a_vector():
    expect("the vector [10, 20] by f = [0, 1, 1, 0]",
           grow.produce(torch.tensor([10., 20.]), torch.tensor([0, 1, 1, 0])),
           torch.tensor([10., 20, 20, 10]))


def test_task_3_2_filters_are_dimension_0():
    expect("the filters [[1, 2, 3], [4, 5, 6]] by f = [0, 1, 1]",
           grow.produce(torch.tensor([[1., 2, 3], [4, 5, 6]]), torch.tensor([0, 1, 1])),
           torch.tensor([[1., 2, 3], [4, 5, 6], [4, 5, 6]]))


def test_task_3_2_kernels():
    weight = torch.arange(18.).view(2, 1, 3, 3)
    found = grow.produce(weight, torch.tensor([0, 1, 0]))
    expect("three 3 x 3 kernels", found, torch.stack([weight[0], weight[1], weight[0]]))
    expect("whether they share memory with the old ones",
           found.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr(), False)


# ---- 3.3 consume

MAP = torch.tensor([0, 1, 0, 0])                            # channel 0 has three copies, channel 1 one


def test_task_3_3_eq3_divides_by_the_number_of_copies():
    expect("[[9, 4], [3, 8]] by f = [0, 1, 0, 0]", grow.consume(torch.tensor([[9., 4], [3, 8]]), MAP),
           torch.tensor([[3., 4, 3, 3], [1, 8, 1, 1]]))


def test_task_3_3_zero_gives_the_new_channels_nothing():
    expect("[[9, 4]] by f = [0, 1, 0, 0] with widen='zero'",
           grow.consume(torch.tensor([[9., 4]]), MAP, "zero"), torch.tensor([[9., 4, 0, 0]]))


def test_task_3_3_split_gives_random_shares_that_sum_to_one():
    share = grow.consume(torch.ones(200, 2), MAP, "split", seeded())
    expect("the shape of what 200 outputs consume", tuple(share.shape), (200, 4))
    expect("channel 1 has no copy; its first four shares", share[:4, 1], torch.ones(4))
    expect("the sums of channel 0's shares, for the first four outputs", share[:4, [0, 2, 3]].sum(1),
           torch.ones(4))
    expect("how many shares are not above 0", int((share <= 0).sum()), 0)
    expect("the mean share of channel 0's first copy", share[:, 2].mean().item(), 1 / 3, 0.09)
    expect("whether the shares of different outputs are the same ones", bool(share[:, 2].std() < 0.1), False)


def test_task_3_3_kernels_and_their_dtype():
    weight = torch.arange(12., dtype=torch.float64).view(1, 2, 3, 2)
    for widen in ("eq3", "split", "zero"):
        found = grow.consume(weight, MAP, widen, seeded())
        expect(f"the shape with widen='{widen}'", tuple(found.shape), (1, 4, 3, 2))
        expect(f"the dtype with widen='{widen}'", found.dtype, torch.float64)
        expect(f"the sum over channel 0's copies with widen='{widen}'", found[:, [0, 2, 3]].sum(1),
               weight[:, 0])
    expect("the weight, which was given, afterwards", weight, torch.arange(12.).view(1, 2, 3, 2))


def test_task_3_3_all_randomness_is_the_generators():
    drawn_from_the_generator("the shares", lambda g: grow.consume(torch.ones(2, 2), MAP, "split", g))


# ---- 3.4 identity

SHARES = {"eq3": [[0.5, 0, 0, 0.5], [0, 0.5, 0.5, 0]], "split": [[0.9, 0, 0, 0.1], [0, 0.2, 0.8, 0]],
          "zero": [[1., 0, 0, 0], [0, 1, 0, 0]]}


def new_block(widen="eq3"):
    """The layers of a block from 2 channels to 4 hidden ones, after `identity`; the map is [0, 1, 1, 0]."""
    block, given = ops.InvertedResidual(2, 4, 2), seeded()

    def channel_map(old, new, generator=None):
        expect("what channel_map is asked for: old and new channels", (old, new), (2, 4))
        expect("whether channel_map draws from the generator", generator is given, True)
        return torch.tensor([0, 1, 1, 0])

    def produce(weight, f):
        expect("the weight that is produced", weight.view(2, 2), torch.eye(2))
        return torch.tensor([[1., 0], [0, 1], [0, 1], [1, 0]]).view(4, 2, *weight.shape[2:])

    def consume(weight, f, widen="eq3", generator=None):
        expect("the weight that is consumed", weight.view(2, 2), torch.eye(2))
        return torch.tensor(SHARES[widen]).view(2, 4, *weight.shape[2:])
    with (mock.patch.multiple(grow, channel_map=channel_map, produce=produce, consume=consume),
          torch.no_grad()):
        block.norm3.weight.fill_(7)
        grow.identity(block, widen, given)
    return block


def test_task_3_4_expand_and_project():
    for widen, wanted in SHARES.items():
        block = new_block(widen)
        expect("the expand kernels, for the map [0, 1, 1, 0]", block.expand.weight.view(4, 2),
               torch.tensor([[1., 0], [0, 1], [0, 1], [1, 0]]))
        expect(f"the project kernels with widen='{widen}'", block.project.weight.view(2, 4),
               torch.tensor(wanted))


def test_task_3_4_depthwise_is_the_middle_tap():
    wanted = torch.zeros(4, 1, 5, 5)
    wanted[:, :, 2, 2] = 1
    expect("the depthwise kernels", new_block().depthwise.weight, wanted)


def test_task_3_4_the_last_scale_is_zero_and_learns():
    scale = new_block().norm3.weight
    expect("the scales of the last batch norm", scale, torch.zeros(2))
    expect("whether they still learn", scale.requires_grad, True)


# ---- 4.1 loss

EVEN, SURE = [[0.0, 0.0]], [[math.log(3), 0.0]]             # probabilities 1/2 and 1/2; 3/4 and 1/4
KL = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)


def test_task_4_1_equation_4():
    target = torch.tensor([0])
    for lam in (0.25, 1.0):
        expect(f"student (1/2, 1/2), teacher (3/4, 1/4), label 0, lambda {lam}",
               distill.loss(torch.tensor(EVEN), torch.tensor(SURE), target, lam).item(),
               (1 - lam) * math.log(2) + lam * KL)


def test_task_4_1_the_mean_over_the_batch():
    student, teacher = torch.tensor([*EVEN, *SURE]), torch.tensor([*SURE, *SURE])
    expect("of two images, on one of which student and teacher agree, lambda 1",
           distill.loss(student, teacher, torch.tensor([0, 1]), 1.0).item(), KL / 2)
    expect("without a teacher: the mean of ln 2 and ln 4",
           distill.loss(student, None, torch.tensor([0, 1]), 0.5).item(), 1.5 * math.log(2))


def test_task_4_1_without_a_teacher_it_is_the_cross_entropy():
    for teacher, lam in ((None, 0.5), (torch.tensor(SURE), 0.0), (torch.tensor(SURE), 0)):
        expect(f"student (1/2, 1/2), {'no' if teacher is None else 'a'} teacher, lambda {lam}",
               distill.loss(torch.tensor(EVEN), teacher, torch.tensor([0]), lam).item(), math.log(2))


def test_task_4_1_the_gradient_reaches_the_student_alone():
    student, teacher = (torch.tensor(values, requires_grad=True) for values in (EVEN, SURE))
    distill.loss(student, teacher, torch.tensor([0]), 1.0).backward()
    expect("the gradient by the student's logits, lambda 1: (1/2, 1/2) - (3/4, 1/4)",
           student.grad, torch.tensor([[-0.25, 0.25]]))
    expect("the gradient by the teacher's logits", teacher.grad, None)


def test_task_4_1_a_sure_teacher():
    student, teacher = torch.tensor([[50.0, -50.0]]), torch.tensor([[-200.0, 200.0]])
    expect("a student that is sure of class 0, a teacher that is sure of class 1, label 1, lambda 0.5",
           distill.loss(student, teacher, torch.tensor([1]), 0.5).item(), 100.0, 1e-3)


# ---- 4.2 ratio

def test_task_4_2_the_ends():
    expect("ratio(0)", float(distill.ratio(0.0)), 0.5)
    expect("ratio(1)", float(distill.ratio(1.0)), 0.05)


def test_task_4_2_it_falls_linearly():
    expect("ratio(0.5)", float(distill.ratio(0.5)), 0.275)
    expect("ratio(0.2)", float(distill.ratio(0.2)), 0.41)


def test_task_4_2_other_ends():
    expect("ratio(0.25, first=1, last=0)", float(distill.ratio(0.25, 1.0, 0.0)), 0.75)


# ---- 5.1 candidate

def test_task_5_1_with_squeeze_and_excite():
    found = flops.candidate("ir_k5_se", 16, 64, 24, True, 2, 7)
    expect("ir_k5_se, 16 -> 64 -> 24 channels, stride 2, 7 pixels (name, inputs, outputs, pixels in, pixels, "
           "kernel)", [layer[:6] for layer in found],
           [("expand", 16, 64, 7, 7, 1), ("depthwise", 64, 64, 7, 4, 5), ("squeeze", 64, 16, 4, 1, 1),
            ("excite", 16, 64, 1, 4, 1), ("project", 64, 24, 4, 4, 1)])


def test_task_5_1_without_squeeze_excite_or_expand():
    found = flops.candidate("ir_k3_hs", 16, 16, 8, False, 1, 14)
    expect("ir_k3_hs, 16 -> 16 -> 8 channels, no expand, stride 1, 14 pixels", [layer[:6] for layer in found],
           [("depthwise", 16, 16, 14, 14, 3), ("project", 16, 8, 14, 14, 1)])


def test_task_5_1_activations():
    for op, act in (("ir_k3", "relu"), ("ir_k5_se_hs", "hswish")):
        found = {layer.name: layer.act for layer in flops.candidate(op, 16, 64, 24, True, 1, 7)}
        for name, wanted in (("expand", act), ("depthwise", act), ("project", "")):
            expect(f"the activation of {name} in {op}", found.get(name), wanted)


def test_task_5_1_macs():
    found = flops.candidate("ir_k3_se", 16, 64, 24, True, 2, 7)
    expect("the MACs of ir_k3_se's layers, 16 -> 64 -> 24, stride 2, 7 pixels", [x.macs() for x in found],
           [49 * 16 * 64, 16 * 9 * 64, 64 * 16, 16 * 64, 16 * 64 * 24])


def test_task_5_1_squeezed_widths_also_of_tensors():
    hidden = torch.tensor([8, 48, 80, 160])
    found = {layer.name: layer for layer in flops.candidate("ir_k3_se", 16, hidden, 24, True, 1, 7)}
    expect("the squeezed widths of the hidden widths 8, 48, 80 and 160", found["squeeze"].outputs,
           torch.tensor([8, 16, 24, 40]))
    expect("the MACs of project for these", found["project"].macs(), 24 * 49 * hidden)


# ---- 5.2 inherit

TWO = space.Space("two", 0, 8, 8, 16, (space.Block(0, 0, (1, 4), (8, 16), 2, False, True),
                                       space.Block(1, 0, (1, 4), (8, 16), 1, False, True)))


def inherited():
    """(network, supernet): a narrow block without and a wide one with squeeze-excite; all weights differ."""
    net = supernet.SuperNet(TWO, 1, 3, seeded())
    with torch.no_grad():
        for n, p in enumerate(net.weights()):
            p.copy_(torch.arange(p.numel()).view(p.shape) / p.numel() + n)
    small = network.Network(TWO.arch([(0, 0, 0), (5, 1, 1)], 1, 3))
    found = derive.inherit(small, net)
    expect("whether the network that was given is returned", found is small, True)
    return small, net


def test_task_5_2_stem_head_and_classifier():
    small, net = inherited()
    expect("the stem's weights", small.stem[0].weight, net.stem.weight)
    expect("the classifier's weights", small.classifier.weight, net.classifier.weight)
    expect("the head's weights, of 16 channels", small.head[0].weight, net.head.weight)
    expect("the classifier's biases", small.classifier.bias, net.classifier.bias)


def test_task_5_2_a_narrow_block_is_the_leading_corner():
    small, net = inherited()
    mine, theirs = small.blocks[0], net.blocks[0].layers
    expect("the depthwise kernels of 8 of 32 hidden channels, 3 x 3 of 5 x 5", mine.depthwise[0].weight,
           theirs.depthwise.weight[:8, :, 1:4, 1:4])
    expect("the project kernels, 8 outputs of 8 hidden channels", mine.project[0].weight,
           theirs.project.weight[:8, :8])
    expect("the scales behind expand", mine.expand[1].weight, theirs.norm1.weight[:8])
    expect("the shifts behind project", mine.project[1].bias, theirs.norm3.bias[:8])


def test_task_5_2_a_wide_block_with_squeeze_and_excite():
    small, net = inherited()
    mine, theirs = small.blocks[1], net.blocks[1].layers
    expect("the expand kernels, 32 of 64 filters over 8 of 16 channels", mine.expand[0].weight,
           theirs.expand.weight[:32, :8])
    expect("the 5 x 5 depthwise kernels", mine.depthwise[0].weight, theirs.depthwise.weight[:32])
    expect("the squeeze weights", mine.squeeze_excite.fc1.weight, theirs.squeeze.weight[:8, :32])
    expect("the excite biases", mine.squeeze_excite.fc2.bias, theirs.excite.bias[:32])


def test_task_5_2_the_supernet_keeps_its_own():
    small, net = inherited()
    before = net.stem.weight.clone()
    nn.init.constant_(small.stem[0].weight, 99)
    expect("the supernet's stem after the network's has changed", net.stem.weight, before)


# ---- 5.3 recalibrate

def batches():
    for values in ((0., 2.), (4., 10.), (3., 3.)):
        yield torch.tensor(values).view(2, 1, 1, 1), torch.zeros(2)


def recalibrated():
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(99)
    norm.running_var.fill_(99)
    net = nn.Sequential(nn.Identity(), norm)
    found = derive.recalibrate(net.eval(), batches())
    expect("whether the network that was given is returned", found is net, True)
    return net


def test_task_5_3_statistics_are_means_over_batches():
    norm = recalibrated()[1]
    expect("the mean over batches of means 1, 7 and 3", norm.running_mean, torch.tensor([11 / 3]))
    expect("the mean over batches of variances 2, 18 and 0", norm.running_var, torch.tensor([20 / 3]))


def test_task_5_3_the_network_ends_in_eval_mode():
    expect("whether it is in train mode", recalibrated().training, False)


def test_task_5_3_momentum_is_as_before():
    expect("the momentum afterwards", recalibrated()[1].momentum, 0.1)


# ---- 5.4 viterbi_list

def chain():
    """(log_p, costs) of two blocks: two operations, two expansions, two widths each; 64 networks."""
    g = seeded(3)
    log_p = [tuple(torch.randn(2, generator=g, dtype=torch.float64).log_softmax(0) for _ in range(3))
             for _ in range(2)]
    tables = [torch.randint(1, 9, (i, 2, 2, 2), generator=g).double() for i in (1, 2)]
    return log_p, flops.Costs(5.0, tables, torch.tensor([1., 3.], dtype=torch.float64))


def every(log_p, costs, penalty):
    """All 64 networks as (log-likelihood - penalty x cost, options, log-likelihood, cost), best first."""
    found = []
    for options in itertools.product(itertools.product(range(2), repeat=3), repeat=2):
        likelihood = sum(float(p[k][option]) for p, block in zip(log_p, options)
                         for k, option in enumerate(block))
        (a, b, width), (c, d, last) = options
        first, second = costs.blocks
        cost = 5 + float(first[0, a, b, width] + second[width, c, d, last] + costs.head[last])
        found.append((likelihood - penalty * cost, list(options), likelihood, cost))
    return sorted(found, key=lambda row: -row[0])


def listed(penalty, count):
    """Compare the first `count` networks with the best of all 64."""
    log_p, costs = chain()
    found = budget.viterbi_list(log_p, costs, penalty, count)
    expect(f"how many networks there are, of {count} asked for and 64 in all", len(found), min(count, 64))
    for rank, (solution, (score, options, likelihood, cost)) in enumerate(
            zip(found, every(log_p, costs, penalty))):
        what = f"penalty {penalty:g}, network {rank}"
        expect(f"{what}: log-likelihood - penalty x cost",
               float(solution.log_likelihood - penalty * solution.cost), score)
        expect(f"{what}: its (operation, expansion, width) a block", [tuple(b) for b in solution.options],
               options)
        expect(f"{what}: its cost", float(solution.cost), cost)
        expect(f"{what}: its log-likelihood", float(solution.log_likelihood), likelihood)


def test_task_5_4_the_most_likely_network():
    listed(0.0, 1)


def test_task_5_4_the_best_at_a_price():
    for penalty in (0.17, 3.1, -0.23):
        listed(penalty, 1)


def test_task_5_4_the_list_is_in_order():
    for penalty in (0.0, 0.17):
        listed(penalty, 12)


def test_task_5_4_all_networks():
    listed(0.0, 100)
