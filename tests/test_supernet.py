"""Gumbel two-path sampling and channel masks (Architecture Space; the masks are FBNetV2's).

The oracles: FBNetV2 as defined, every convolution at its full width and every choice of width a soft mask
(`masked_supernet`), which slicing must equal; textbook layers at the chosen widths for one path alone; and
for the draws, the probabilities of drawing without replacement from the softmax, worked out by hand. Steps of
the two parameter sets are by search.py's `backward` and optimizers.
"""
import argparse
import copy
import itertools
import math
from functools import partial

import pytest
import torch
from oracles import (
    OPS,
    TINY,
    assert_same_logits,
    images,
    masked_supernet,
    plain_network,
    random_options,
    seeded,
    settle,
    share_of_images,
)
from torch.testing import assert_close

import data
from search import backward, optimizers
from space import SPACES, Block, Space
from supernet import CHOICES, Draw, SuperNet, require_grad, step_sampled, temperature

# Row 2 has no expand convolution: its hidden widths are its input widths, of which its second block has two.
UNEXPANDED = TINY._replace(blocks=(Block(0, 0, (1,), (8, 16, 24), 1, False, False),
                                   Block(0, 1, (1,), (8, 16, 24), 1, True, False), *TINY.blocks[1:]))
SETTINGS = argparse.Namespace(lr=0.1, weight_decay=1e-2, alpha_lr=0.02)


def small(stage=1, channels=1, space=None):
    return settle(SuperNet(space or SPACES["small"][stage], channels, 10, seeded()), 3)


@pytest.mark.parametrize("space", [TINY, TINY._replace(stem=12), UNEXPANDED, *SPACES["small"][0:4:3],
                                   SPACES["paper"][0]],
                         ids=["tiny", "tiny with a stem of 12", "unexpanded", "small A0", "small A3",
                              "paper A0"])
def test_the_sliced_supernet_is_the_full_width_masked_one(space):
    sliced = small(channels=2, space=space).double()
    for seed in range(1 if space.name == "paper" else 3):
        masked, x = copy.deepcopy(sliced), images(4, 2, 32, seed + 50).double()
        sliced.zero_grad()
        masked.zero_grad()
        logits = sliced(x, sliced.sample(1.0, seeded(seed)))
        full = masked_supernet(masked, x, masked.sample(1.0, seeded(seed)))
        assert_same_logits(logits, full)
        coefficients = torch.randn(logits.shape, generator=seeded(9), dtype=torch.float64)
        (logits * coefficients).sum().backward()
        (full * coefficients).sum().backward()
        for (name, p), q in zip(sliced.named_parameters(), masked.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("space", [SPACES["small"][4], SPACES["small"][1]._replace(stem=12),
                                   SPACES["paper"][0]],
                         ids=["small A4", "small A1 with a stem of 12", "paper A0"])
def test_one_path_is_the_network_of_its_choices(space):
    net, g = small(channels=3, space=space).double(), seeded()
    widest, narrowest = ([(op, end, end) for op in range(8)] * 3 for end in (-1, 0))
    n = len(space.blocks)
    for options in (*(random_options(space, g) for _ in range(4)), widest[:n], narrowest[:n]):
        x = images(4, 3, 32, 50).double()
        with torch.no_grad():
            found, wanted = net(x, net.path(options)), plain_network(net, options)(x)
        assert_same_logits(found, wanted)


@pytest.mark.parametrize("space", [UNEXPANDED, SPACES["small"][4], SPACES["small"][1]._replace(stem=12),
                                   SPACES["paper"][0]],
                         ids=["unexpanded", "small A4", "small A1 with a stem of 12", "paper A0"])
@torch.no_grad()
def test_gates_of_0_and_1_for_two_sampled_paths_give_the_network_of_one_of_them(space):
    net = small(channels=3, space=space).double()
    for seed in range(2 if space.name == "paper" else 6):
        options, path, x = [], [], images(8, 3, 32, seed).double()
        for draws in net.sample(1.0, seeded(seed)):
            chosen = {name: int(torch.randint(len(draw.options), (1,), generator=seeded(seed + len(options))))
                      for name, draw in draws.items()}
            path.append({name: Draw(draw.options, torch.eye(2).double()[chosen[name], :len(draw.options)])
                         for name, draw in draws.items()})
            options.append(tuple(draws[name].options[chosen[name]] for name in CHOICES))
        found, wanted = net(x, path), plain_network(net, options)(x)
        assert share_of_images(wanted) > 0.1
        assert float((found - wanted).norm() / wanted.norm()) < 1e-12


def test_the_supernet_is_its_parameters_alone_and_normalises_by_the_batch_in_every_mode():
    net, x = small(space=TINY), images(4, 1, 16)
    assert net.state_dict().keys() == dict(net.named_parameters()).keys()           # no running statistics
    path = net.sample(1.0, seeded())
    assert torch.equal(net.eval()(x, path), net.train()(x, path))


def test_a_narrow_input_makes_a_narrow_hidden_layer():
    """Hidden width = expansion x ACTIVE input width: 2.75 x 8 is 22, rounded to 24, not 2.75 x 16."""
    net = small(space=TINY)
    x = images(2, 8, 8)
    path = net.path([(0, 2, 0)])[0]
    one = torch.ones(1)
    before, _ = net.blocks[1](x, ((8,), one), path)
    with torch.no_grad():
        net.blocks[1].layers.depthwise.weight[24:].fill_(float("nan"))
    assert torch.equal(net.blocks[1](x, ((8,), one), path)[0], before)
    assert net.blocks[1](images(2, 16, 8), ((16,), one), path)[0].isnan().all()


def test_weights_and_alphas_are_two_parameter_sets_that_share_none():
    net = small(space=TINY)
    weights, alphas = ({id(p) for p in group} for group in (net.weights(), net.alphas()))
    assert not weights & alphas and weights | alphas == {id(p) for p in net.parameters()}
    # a block's choices: 8 operations, its expansions, its widths; none where there is one expansion
    assert [{name: len(a) for name, a in block.alphas.items()} for block in net.blocks] == [
        {"op": 8, "width": 2}, *[{"op": 8, "expansion": 3, "width": 3}] * 2]
    assert sum(a.numel() for a in net.alphas()) == 10 + 14 + 14
    assert all(not a.any() for a in SuperNet(TINY, 1, 10).alphas())                  # uniform at first


def test_the_same_generator_gives_the_same_weights_and_the_same_path():
    net, again = (SuperNet(TINY, 1, 10, seeded(4)) for _ in range(2))
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)
    drawn = [[(d[c].options, d[c].gates.tolist()) for d in net.sample(1.0, seeded(s)) for c in CHOICES]
             for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


CHAIN = Space("chain", 0, 8, 8, 8, tuple(Block(n, 0, (0.5, 1, 1.5, 2), (8, 16, 24), 1, False, True)
                                         for n in range(50)))


def alike(**logits):
    """A supernet of 50 blocks that share their logits, so that one path holds 50 draws of each choice."""
    net = SuperNet(CHAIN, 1, 10, seeded())
    with torch.no_grad():
        for block, (name, values) in itertools.product(net.blocks, logits.items()):
            block.alphas[name].copy_(torch.tensor(values))
    return net


def test_pairs_are_drawn_without_replacement_from_the_softmax():
    logits = {"op": [0.0, 1.0, -1.0, 0.5, 2.0, -0.5, 0.2, 0.0], "expansion": [0.3, -2.0, 1.0, 0.0],
              "width": [0.0, 3.0, 1.0]}
    net, counts, n = alike(**logits), {name: {} for name in logits}, 0
    for step in range(120):
        for draws in net.sample(1.0, seeded(step)):
            n += 1
            for name in logits:
                pair = draws[name].options
                counts[name][pair] = counts[name].get(pair, 0) + 1
    for name, values in logits.items():
        total = sum(math.exp(v) for v in values)
        p = [math.exp(v) / total for v in values]
        chi2, pairs = 0.0, list(itertools.combinations(range(len(p)), 2))
        for i, j in pairs:                                           # i first, then j of the rest; or j first
            wanted = n * (p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]))
            chi2 += (counts[name].get((i, j), 0) - wanted) ** 2 / wanted
        degrees = len(pairs) - 1
        assert set(counts[name]) <= set(pairs)                          # ascending and distinct
        assert chi2 < degrees + 4 * math.sqrt(2 * degrees), (name, chi2)             # mean + 4 sigma


def test_uniform_draws_are_those_of_equal_logits_of_operations():
    net, g = small(2), seeded(3)
    equal = small(2)
    with torch.no_grad():
        for block, other in zip(net.blocks, equal.blocks):
            for name, alpha in block.alphas.items():
                alpha.normal_(std=3.0, generator=g)
                other.alphas[name].copy_(torch.full_like(alpha, 0.7) if name == "op" else alpha)
    for step in range(5):
        mine, wanted, by_alpha = (some.sample(0.5, seeded(step), uniform) for some, uniform in (
            (net, True), (equal, False), (net, False)))
        for one, other in zip(mine, wanted, strict=True):
            for name in CHOICES:
                assert one[name].options == other[name].options
                assert_close(one[name].gates, other[name].gates)
        assert [d["op"].options for d in mine] != [d["op"].options for d in by_alpha]


def test_the_choices_of_a_path_are_drawn_independently():
    net = alike(op=[0.0] * 8, expansion=[0.0] * 4, width=[0.0] * 3)
    rows = [[draws[c].options for c in CHOICES] for step in range(100)
            for draws in net.sample(1.0, seeded(step))]
    for one, other, neighbour in ((0, 1, 0), (1, 2, 0), (0, 0, 1), (2, 2, 1)):
        pairs = [(a[one], b[other]) for a, b in zip(rows, rows[neighbour:])]
        first, second = {a for a, _ in pairs}, {b for _, b in pairs}
        wanted = len(pairs) / len(first) / len(second)
        chi2 = sum((pairs.count(cell) - wanted) ** 2 / wanted for cell in itertools.product(first, second))
        degrees = (len(first) - 1) * (len(second) - 1)
        assert chi2 < degrees + 5 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("tau", [5.0, 1.0, 0.3])
def test_gates_are_the_softmax_of_the_two_perturbed_logits_over_the_temperature(tau):
    net = small(2)
    path = net.sample(tau, seeded(7))
    exponentials = torch.empty(sum(a.numel() for a in net.alphas())).exponential_(generator=seeded(7))
    noise = iter((-exponentials.log()).split([a.numel() for a in net.alphas()]))     # standard Gumbel
    assert path[0]["expansion"].options == (0,) and path[0]["expansion"].gates.tolist() == [1.0]
    for block, draws in zip(net.blocks, path, strict=True):
        assert set(draws) == set(CHOICES)
        for name, alpha in block.alphas.items():
            (options, gates), perturbed = draws[name], alpha + next(noise)
            assert_close(gates.sum(), torch.tensor(1.0))
            low, high = sorted(perturbed.topk(2).indices.tolist())
            assert options == (low, high)
            e = ((perturbed[[low, high]] - perturbed.max()) / tau).exp()
            assert_close(gates, e / e.sum())


def test_at_a_low_temperature_one_path_has_nearly_all_the_weight_and_at_a_high_one_half():
    net = small(2)
    for tau, low, high in ((1e-4, 0.999, 1.001), (1e4, 0.5, 0.501)):
        gates = torch.cat([d[c].gates.amax().view(1) for d in net.sample(tau, seeded(1)) for c in CHOICES
                           if len(d[c].options) == 2])
        assert (gates >= low).all() and (gates <= high).all()


@pytest.mark.parametrize("seed", range(3))
def test_at_temperature_0_one_network_is_computed_and_the_gates_learn_as_soft_ones_do(seed):
    net, x = small(2), torch.randn(4, 1, 16, 16, generator=seeded(seed))
    hard, soft = net.sample(0, seeded(seed)), net.sample(1.0, seeded(seed))
    assert [d[c].options for d in hard for c in CHOICES] == [d[c].options for d in soft for c in CHOICES]
    chosen = [tuple(d[c].options[d[c].gates.argmax()] for c in CHOICES) for d in soft]
    assert {gate for d in hard for c in CHOICES for gate in d[c].gates.tolist()} == {0.0, 1.0}
    assert_close(net(x, hard), net(x, net.path(chosen)), rtol=1e-4, atol=1e-5)
    weights = [torch.randn(2, generator=seeded(n)) for n in range(3 * len(net.blocks))]
    found = []
    for path in (hard, soft):
        gates = [d[c].gates for d in path for c in CHOICES]
        total = sum((w[:len(g)] * g).sum() for w, g in zip(weights, gates, strict=True))
        found.append(torch.autograd.grad(total, net.alphas()))
    assert any(g.abs().max() > 0.01 for g in found[1])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_the_temperature_falls_exponentially_from_5_to_a_tenth():
    values = [temperature(n / 10) for n in range(11)]
    assert values[0] == 5 and math.isclose(values[-1], 0.1)
    ratios = [b / a for a, b in itertools.pairwise(values)]
    assert all(math.isclose(r, ratios[0]) for r in ratios) and ratios[0] < 1


def test_a_path_of_choices_has_one_option_of_weight_1_each():
    net = small(space=TINY)
    path = net.path([(7, 0, 1), (0, 2, 0), (3, 1, 2)])
    assert [tuple(d[c].options[0] for c in CHOICES) for d in path] == [(7, 0, 1), (0, 2, 0), (3, 1, 2)]
    assert all(d[c].gates.tolist() == [1.0] and isinstance(d[c], Draw) for d in path for c in CHOICES)


def sampled(net, path):
    """The names of all weights on the path."""
    off = tuple(f"blocks.{n}.layers.{layer}." for n, draws in enumerate(path)
                if not any("_se" in OPS[op] for op in draws["op"].options) for layer in ("squeeze", "excite"))
    return {name for name in net.state_dict() if ".alphas." not in name and not name.startswith(off)}


@pytest.mark.parametrize("teacher", [None, torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))],
                         ids=["A0", "taught"])
def test_a_weight_step_moves_what_it_sampled_and_nothing_else(teacher):
    net, y, idle = small(1).train(), torch.arange(4), 0
    require_grad(net.alphas(), False)
    sgd, _ = optimizers(net, SETTINGS)
    for step in range(4):                                            # after the first, there is momentum
        before = copy.deepcopy(net.state_dict())
        wanted = sampled(net, net.sample(1.0, data.generator(step, 0)))
        sgd.zero_grad()
        backward(net, teacher, (images(4, 1, 16, step), y), partial(net.sample, 1.0), (step, 0), 0.3, 1)
        sgd.step()
        moved = {name for name, now in net.state_dict().items() if not torch.equal(now, before[name])}
        assert moved == wanted
        idle += len(net.weights()) - len(wanted)
        assert all(a.grad is None for a in net.alphas())                # no gradient of a frozen parameter
        assert teacher is None or all(p.grad is None for p in teacher.parameters())
    assert idle                                         # squeeze and excite of two candidates without them


def active(net, path):
    """For each logit vector its sampled options that matter: two expansions may round to one hidden width."""
    inputs, found = [net.space.stem], []
    for block, draws in zip(net.blocks, path, strict=True):
        for name in block.alphas:
            options = draws[name].options
            if name == "expansion" and len({block.block.hidden(*pair)
                                            for pair in itertools.product(inputs, options)}) == 1:
                options = ()
            found.append((draws[name].options, options))
        inputs = [block.block.widths[option] for option in draws["width"].options]
    return found


def test_an_alpha_step_has_a_gradient_for_the_sampled_options_alone():
    net, y = small(3).train(), torch.arange(4)
    require_grad(net.weights(), False)
    for step in range(4):
        net.zero_grad()
        backward(net, None, (images(4, 1, 28, step), y), partial(net.sample, 1.0), (step,), 0.0, 1)
        path = net.sample(1.0, data.generator(step))
        for alpha, (drawn, moving) in zip(net.alphas(), active(net, path), strict=True):
            others = [o for o in range(len(alpha)) if o not in drawn]
            assert (alpha.grad[others] == 0).all() and (alpha.grad[list(moving)] != 0).all()
        assert all(p.grad is None for p in net.weights())


def test_an_alpha_step_moves_the_sampled_options_alone_whatever_their_momentum():
    net, y, stale = small(3).train(), torch.arange(4), 0
    _, adam = optimizers(net, SETTINGS)
    require_grad(net.weights(), False)
    for step in range(5):
        before = [a.detach().clone() for a in net.alphas()]
        weights = {name: p.detach().clone() for name, p in net.named_parameters() if ".alphas." not in name}
        wanted = active(net, net.sample(1.0, data.generator(step, 1)))
        adam.zero_grad()
        backward(net, None, (images(4, 1, 28, step), y), partial(net.sample, 1.0), (step, 1), 0.0, 1)
        step_sampled(adam, net.alphas())
        now = dict(net.named_parameters())
        assert all(torch.equal(now[name], p) for name, p in weights.items())
        assert all(p.grad is None for p in net.weights())               # nor is it computed
        for a, old, (_, moving) in zip(net.alphas(), before, wanted, strict=True):
            assert tuple((a.detach() != old).nonzero().flatten().tolist()) == moving
            stale += int(adam.state[a]["exp_avg"].count_nonzero()) - len(moving)
    assert stale > 20                                             # momentum that Adam alone would have used


def test_the_candidates_of_a_block_share_their_weights():
    """One step of one candidate moves all of them; a 3x3 kernel leaves the ring of the 5x5 one alone."""
    net, x = small(space=TINY), images(4, 1, 16)
    assert sum(p.numel() for name, p in net.named_parameters() if "depthwise" in name) == 25 * (8 + 48 + 64)

    def logits():
        with torch.no_grad():
            return [net(x, net.path([(op, -1, -1)] * 3)) for op in range(8)]
    for op in range(8):
        before, kernels = logits(), [block.layers.depthwise.weight.detach().clone() for block in net.blocks]
        sgd = torch.optim.SGD(net.weights(), 0.01)
        net(x, net.path([(op, -1, -1)] * 3)).square().sum().backward()
        sgd.step()
        sgd.zero_grad()
        assert not any(torch.equal(one, other) for one, other in zip(before, logits(), strict=True))
        for block, old in zip(net.blocks, kernels, strict=True):
            moved = (block.layers.depthwise.weight != old).any(0)[0]
            assert moved[1:4, 1:4].all() and moved.sum() == (9 if "_k3" in OPS[op] else 25)


def test_logged_probabilities_are_the_softmax_of_the_logits():
    net = small(space=TINY)
    for block, found in zip(net.blocks, net.probabilities(), strict=True):
        assert set(found) == set(block.alphas)
        for name, values in found.items():
            e = block.alphas[name].detach().exp()
            assert values == pytest.approx((e / e.sum()).tolist(), abs=6e-5)
