"""From a supernet to a network: its best, or the best under any FLOPs budget (Table 3).

The oracle is brute force: a space of three blocks is small enough to list all of its 82,944 networks, with
their likelihoods and their multiply-accumulates by the tests' own formula (`oracles.block_macs`). For larger
spaces: sampling, random networks, and textbook layers with copied weights.
"""
import copy
import itertools

import numpy as np
import pytest
import torch
from oracles import (
    OPS,
    TINY,
    assert_same_logits,
    block_macs,
    chosen,
    images,
    macs,
    near8,
    pixels,
    plain_network,
    random_options,
    seeded,
    settle,
)
from torch import nn
from torch.testing import assert_close

import derive
from budget import (
    alternatives,
    choose_stage,
    keep_operations,
    most_likely,
    scale,
    spend,
    viterbi,
    viterbi_list,
)
from derive import Network, inherit, space_costs
from flops import bounds
from space import SPACES, Arch
from supernet import CHOICES, SuperNet


def supernet(space=TINY, seed=0, channels=1, spread=1.0):
    net = SuperNet(space, channels, 10, seeded(seed))
    with torch.no_grad():
        for block, name in itertools.product(net.blocks, CHOICES):
            if name in block.alphas:
                block.alphas[name].normal_(0, spread, generator=seeded(100 * seed + len(block.alphas[name])))
    return net


def probabilities(net):
    """For each block the softmax of its logits of (operations, expansions, widths), in float64."""
    one = torch.zeros(1)
    return [[block.alphas.get(name, one).detach().double().softmax(0)
             for name in CHOICES] for block in net.blocks]


def everything(net):
    """(log-likelihoods, MACs) of all networks of TINY: arrays with an axis for each of its 3 x 3 choices."""
    size, before, likelihood, cost = pixels(TINY.resolution, 3, 2), (TINY.stem,), 0.0, 0.0
    cost += size ** 2 * TINY.stem * 9                                             # the stem, of one channel
    for n, (b, p) in enumerate(zip(TINY.blocks, probabilities(net))):
        table = np.array([[[[block_macs(op, i, near8(e * i), o, b.stride, b.expand, size) for o in b.widths]
                            for e in b.expansions] for op in OPS] for i in before], float)
        logs = sum(v.log().numpy().reshape([-1 if k == axis else 1 for k in range(3)])
                   for axis, v in enumerate(p))
        likelihood = likelihood + logs.reshape([1] * 3 * n + list(logs.shape) + [1] * (6 - 3 * n))
        shape = ([1] * (3 * n - 1) + [len(before)] if n else []) + list(table.shape[1:]) + [1] * (6 - 3 * n)
        cost = cost + table.reshape(shape)
        size, before = pixels(size, 3, b.stride), b.widths
    return likelihood, cost + size ** 2 * 16 * np.array(before) + 16 * 10


def as_options(index):
    index = [int(i) for i in index]
    return [tuple(index[n:n + 3]) for n in (0, 3, 6)]


def test_the_list_of_all_networks_is_right():
    """The oracle against the other one: counting each network for itself."""
    net, g = supernet(), seeded()
    likelihood, cost = everything(net)
    assert likelihood.shape == cost.shape == (8, 1, 2, 8, 3, 3, 8, 3, 3)
    assert np.exp(likelihood).sum() == pytest.approx(1)
    for _ in range(200):
        options = random_options(TINY, g)
        assert cost[sum(options, ())] == macs(chosen(TINY, options))


@pytest.mark.parametrize("penalty", [0.0, 1e-5, 3e-5, 1e-4, 1e-3, 1.0, -2e-5])
def test_viterbi_finds_the_best_network_at_a_price(penalty):
    for seed in range(3):
        net = supernet(seed=seed)
        likelihood, cost = everything(net)
        options, found, total = viterbi(derive.log_probabilities(net), space_costs(net), penalty)
        best = np.unravel_index((likelihood - penalty * cost).argmax(), cost.shape)
        assert options == as_options(best)
        assert found == pytest.approx(likelihood[best]) and total == cost[best]


@pytest.mark.parametrize("penalty", [0.0, 3e-5, -2e-5])
def test_the_list_of_viterbi_is_the_best_networks_in_order(penalty):
    net = supernet(seed=4)
    likelihood, cost = everything(net)
    score = likelihood - penalty * cost
    found = viterbi_list(derive.log_probabilities(net), space_costs(net), penalty, 200)
    values = [value - penalty * total for _, value, total in found]
    assert values == pytest.approx(np.sort(score.ravel())[:-201:-1])
    assert len({tuple(options) for options, _, _ in found}) == 200
    for options, value, total in found:
        assert likelihood[sum(options, ())] == pytest.approx(value) and cost[sum(options, ())] == total


def test_without_a_budget_the_most_likely_network_is_derived():
    for seed in range(5):
        net = supernet(seed=seed)
        best = np.unravel_index(everything(net)[0].argmax(), (8, 1, 2, 8, 3, 3, 8, 3, 3))
        assert derive.derive(net) == chosen(TINY, as_options(best))


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_under_a_budget_no_network_is_more_likely(spread):
    for seed in range(3):
        net = supernet(seed=seed, spread=spread)
        likelihood, cost = everything(net)
        log_p, table = derive.log_probabilities(net), space_costs(net)
        for budget in (*np.linspace(cost.min(), cost.max(), 12), cost.min() + 1, np.sort(cost.ravel())[1000]):
            options, value, total = most_likely(log_p, table, float(budget))
            assert total == macs(chosen(TINY, options)) <= budget
            assert value == pytest.approx(likelihood[cost <= budget].max(), abs=1e-9)
            assert likelihood[sum(options, ())] == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("new", [1, 2])
def test_blocks_that_were_there_before_keep_their_operations(new):
    """So many blocks are new. By brute force over the networks that are left; where the budget lies
    outside of what these cost, over all.
    """
    freed = 0
    for seed in range(3):
        net, options = supernet(seed=seed), random_options(TINY, seeded(seed))
        before = chosen(TINY, options)
        before = before._replace(blocks=before.blocks[:3 - new])
        likelihood, cost = everything(net)
        left = tuple(options[n // 3][0] if n % 3 == 0 and n // 3 < 3 - new else slice(None) for n in range(9))
        kept = keep_operations(derive.log_probabilities(net), space_costs(net), TINY, before)
        assert bounds(kept[1]) == (cost[left].min(), cost[left].max())
        least, most = cost[left].min(), cost[left].max()
        for budget in (*np.quantile(cost[left], (0, 0.02, 0.3, 0.7, 1)).tolist(), least - 1, most + 1):
            if not least <= budget <= most:
                if budget >= cost.min():
                    freed += 1
                    assert derive.derive(net, budget, before) == derive.derive(net, budget)
                continue
            found = derive.derive(net, budget, before)
            best = likelihood[left][cost[left] <= budget].max()
            assert most_likely(*kept, budget).log_likelihood == pytest.approx(best)
            solution = spend(*kept, budget)
            assert found == chosen(TINY, solution.options) and macs(found) == solution.cost <= budget
            assert [b.op for b in found.blocks[:3 - new]] == [b.op for b in before.blocks]
        assert derive.derive(net, None, before) == chosen(TINY, viterbi(*kept, 0.0).options)
    assert freed > 3


def test_a_budget_is_spent():
    """The most likely network within it is taken if it costs 95 % of it, else another that does."""
    rewarded = 0
    for seed in range(3):
        net = supernet(seed=seed)
        likelihood, cost = everything(net)
        log_p, table = derive.log_probabilities(net), space_costs(net)
        for budget in np.quantile(cost, (0, 0.01, 0.5, 0.8, 1)).tolist():
            best, solution = most_likely(log_p, table, budget), spend(log_p, table, budget)
            assert chosen(TINY, solution.options) == derive.derive(net, budget)
            assert likelihood[sum(solution.options, ())] == pytest.approx(solution.log_likelihood)
            if best.cost >= 0.95 * budget:
                assert solution == best
            else:
                assert 0.95 * budget <= solution.cost <= budget
                enough = likelihood[(0.95 * budget <= cost) & (cost <= budget)]
                assert solution.log_likelihood >= np.sort(enough)[::-1][:200][-1] - 1e-9
                rewarded += 1
    assert 1 < rewarded < 14


@pytest.mark.parametrize("seed", range(3))
def test_alternatives_are_the_most_likely_networks_within_a_budget(seed):
    net = supernet(seed=seed)
    likelihood, cost = (array.ravel() for array in everything(net))
    log_p, table = derive.log_probabilities(net), space_costs(net)
    for budget in np.quantile(cost, (0.01, 0.3, 0.7)):
        found = alternatives(log_p, table, float(budget), 20)
        inside = np.sort(likelihood[cost <= budget])[::-1]
        first = spend(log_p, table, float(budget))
        assert first in found and 2 < len(found) <= 20
        assert len({tuple(options) for options, *_ in found}) == len(found)
        for options, value, total in found:
            assert macs(chosen(TINY, options)) == total <= budget
            assert value >= inside[500] - 1e-9 or first.log_likelihood < inside[0] - 1e-9
        assert found == sorted(found, key=lambda network: -network[1])
        assert len(alternatives(log_p, table, float(budget), 2)) == 2


def test_of_several_stages_the_one_that_loses_least_has_the_network():
    nets, which = [supernet(seed=seed, spread=1 + seed) for seed in range(3)], set()
    every = [[array.ravel() for array in everything(net)] for net in nets]
    spaces = [(derive.log_probabilities(net), space_costs(net)) for net in nets]
    for budget in np.quantile(every[0][1], np.linspace(0.001, 1, 9)):
        lost = [likelihood.max() - spend(*space, float(budget)).log_likelihood
                for (likelihood, _), space in zip(every, spaces)]
        stage, solution = choose_stage(spaces, float(budget), str)
        assert stage == max(k for k in range(3) if lost[k] < min(lost) + 1e-9)
        assert solution.log_likelihood == pytest.approx(every[stage][0].max() - min(lost))
        which.add(stage)
    assert len(which) > 1


@pytest.mark.parametrize("spread", [0.1, 3.0, 100.0])
def test_what_comes_nearest_to_a_budget_at_a_penalty_reaches_both_ends(spread):
    net = supernet(SPACES["small"][2], spread=spread)
    spaces = [(derive.log_probabilities(net), space_costs(net))]
    for end in bounds(spaces[0][1]):
        assert choose_stage(spaces, end, str, nearest=True)[1].cost == end


def test_a_budget_below_the_cheapest_network_is_refused():
    net = supernet()
    cheapest = int(everything(net)[1].min())
    assert macs(derive.derive(net, flops=cheapest)) == cheapest
    for budget in (cheapest - 1, cheapest / 2, 1):
        with pytest.raises(ValueError, match=f"cheapest network, of {cheapest:,}"):
            derive.derive(net, flops=budget)


@pytest.mark.parametrize("name, stage", [("small", 4), ("paper", 0)])
def test_in_a_large_space_a_budget_is_kept_and_no_cheaper_network_found_is_more_likely(name, stage):
    space, g = SPACES[name][stage], seeded()
    net = supernet(space, 1)
    p = [[v.log() for v in three] for three in probabilities(net)]

    def likelihood(options):
        return sum(float(v[o]) for three, some in zip(p, options) for v, o in zip(three, some))
    log_p, table = derive.log_probabilities(net), space_costs(net)
    free = macs(derive.derive(net))
    for share in (0.5, 0.7, 0.9):
        options, value, _ = most_likely(log_p, table, share * free)
        assert macs(chosen(space, options)) <= share * free and value == pytest.approx(likelihood(options))
        for penalty in np.geomspace(1e-3, 1e2, 60) / free:              # what a penalty alone finds
            other, found, total = viterbi(log_p, table, penalty)
            assert total > share * free or found <= value + 1e-9
        for _ in range(300):                                            # one choice changed
            other, n = list(options), int(torch.randint(len(options), (1,), generator=g))
            other[n] = random_options(space, g)[n]
            assert macs(chosen(space, other)) > share * free or likelihood(other) <= value + 1e-9


@pytest.mark.parametrize("name, stage", [("small", 4), ("paper", 0)])
def test_a_networks_facts_are_those_of_its_choices(name, stage):
    net, g = SuperNet(SPACES[name][stage], 3, 17), seeded(2)
    for _ in range(10):
        options = random_options(net.space, g)
        assert derive.arch_of(net, options) == chosen(net.space, options, 3, 17)


@pytest.mark.parametrize("name, stage", [("small", 4), ("paper", 0)])
@torch.no_grad()
def test_a_derived_network_computes_what_its_path_computed(name, stage):
    net, g = settle(SuperNet(SPACES[name][stage], 3, 10, seeded())).double(), seeded(2)
    x = images(3, 3, 32, 50).double()
    for _ in range(3):
        options = random_options(net.space, g)
        network = inherit(Network(derive.arch_of(net, options)).double(), net)
        wanted = plain_network(net, options)(x)
        assert_same_logits(network(x), wanted)
        assert_same_logits(net(x, net.path(options)), wanted)


def test_a_network_inherits_the_leading_corner_of_every_tensor():
    net = settle(SuperNet(TINY, 1, 10, seeded()))
    options = [(5, 0, 1), (7, 2, 1), (2, 1, 0)]
    network = Network(derive.arch_of(net, options))
    assert inherit(network, net) is network
    theirs = copy.deepcopy(net.state_dict())
    for name, tensor in network.named_parameters():
        for mine, its in (("stem.0", "stem"), ("stem.1", "stem_norm"), ("head.0", "head"),
                          ("head.1", "head_norm"), ("expand.0", "expand"), ("expand.1", "norm1"),
                          ("depthwise.0", "depthwise"), ("depthwise.1", "norm2"),
                          ("squeeze_excite.fc1", "squeeze"), ("squeeze_excite.fc2", "excite"),
                          ("project.0", "project"), ("project.1", "norm3")):
            name = name.replace(mine, its)
        part, *rest = name.split(".")
        if part == "blocks":
            name = ".".join(("blocks", rest[0], "layers", *rest[1:]))
        source = theirs[name]
        if "depthwise.weight" in name and options[int(rest[0])][0] % 2 == 0:          # 3x3: the middle of 5x5
            source = source[:, :, 1:4, 1:4]
        for axis, n in enumerate(tensor.shape):
            source = source.narrow(axis, 0, n)
        assert torch.equal(tensor, source)
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(0)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in net.state_dict().items())


def test_a_network_drops_out_only_in_training():
    arch, x = chosen(TINY, [(0, 0, 1), (7, 2, 1), (2, 1, 0)]), images(4, 1, 8)
    network = inherit(Network(arch, dropout=0.9), settle(SuperNet(TINY, 1, 10, seeded())))
    without = copy.deepcopy(network)
    without.dropout.p = 0.0
    assert torch.equal(network.eval()(x), without.eval()(x))
    assert not torch.equal(network.train()(x), without.train()(x))


def test_log_probabilities_are_those_of_the_logits():
    net = supernet()
    for found, wanted in zip(derive.log_probabilities(net), probabilities(net), strict=True):
        assert len(found) == 3
        for a, b in zip(found, wanted, strict=True):
            assert_close(a.exp(), b)


def test_recalibrated_statistics_are_the_mean_over_batches_of_their_statistics():
    net = settle(SuperNet(SPACES["small"][0], 1, 10, seeded()))
    options = random_options(net.space, seeded(1))
    network = inherit(Network(derive.arch_of(net, options)), net).double()
    before = copy.deepcopy(network.state_dict())
    batches = [(images(n, 1, 28, n).double(), torch.zeros(n)) for n in (5, 8, 16)]

    plain, seen = plain_network(net, options).double().train(), {}
    for number, layer in enumerate(m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)):
        def note(_, inputs, key=number):
            values = inputs[0].transpose(0, 1).flatten(1)                          # (channels, all others)
            seen.setdefault(key, []).append((values.mean(1), values.var(1)))
        layer.register_forward_pre_hook(note)
    with torch.no_grad():
        for x, _ in batches:
            plain(x)

    assert derive.recalibrate(network, iter(batches)) is network and not network.training
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == len(seen) > 10
    for number, layer in enumerate(norms):
        means, variances = (torch.stack(values).mean(0) for values in zip(*seen[number]))
        assert_close(layer.running_mean, means, rtol=1e-6, atol=1e-9)
        assert_close(layer.running_var, variances, rtol=1e-6, atol=1e-9)
        assert layer.momentum == 0.1
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_the_accuracy_counts_images_and_not_batches():
    class Loader:
        """Logits as images, in batches of three."""
        device = "cpu"
        x, y = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 2, 1]]), torch.tensor([0, 1, 1, 0])

        def ordered(self, index):
            return [(self.x[part], self.y[part]) for part in index.split(3)]
    network = nn.Sequential(nn.Identity()).train()
    assert derive.evaluate(network, Loader(), torch.arange(4)) == 0.5 and not network.training
    assert derive.evaluate(network, Loader(), torch.arange(3)) == pytest.approx(2 / 3)


def test_a_runs_supernet_opens_as_it_was_saved(tmp_path):
    net = settle(SuperNet(SPACES["small"][1]._replace(resolution=32), 3, 7, seeded()))
    (tmp_path / "A1.json").write_text(derive.derive(net).to_json())
    torch.save(net.state_dict(), tmp_path / "A1.pt")
    found = derive.open_supernet(tmp_path, 1)
    assert found.space == net.space
    wanted = net.state_dict()
    assert all(torch.equal(t, wanted[name]) for name, t in found.state_dict().items())


# ---- compound scaling (Fig. 5)

def test_compound_scaling_fits_its_budget_and_grows_all_rows_alike():
    def rows(arch):
        starts = [n for n, b in enumerate(arch.blocks) if not b.residual] + [len(arch.blocks)]
        return [arch.blocks[a:b] for a, b in itertools.pairwise(starts)]
    arch = chosen(SPACES["small"][1], random_options(SPACES["small"][1], seeded(3)))
    sizes = []
    for factor in (1, 1.5, 2, 4):
        scaled = scale(arch, 2, factor * macs(arch))
        assert macs(scaled) <= factor * macs(arch) and scaled.stage == 2
        assert Arch.from_json(scaled.to_json()) == scaled
        assert (scaled.stem, scaled.head, scaled.resolution) == (arch.stem, arch.head, arch.resolution)
        for old, new in zip(rows(arch), rows(scaled), strict=True):
            repeated = [old[min(n, len(old) - 1)] for n in range(len(new))]  # the last one is repeated
            assert [b.op for b in new] == [b.op for b in repeated]
            assert [b.stride for b in new] == [old[0].stride] + [1] * (len(new) - 1)
            assert all(b.out >= a.out for a, b in zip(repeated, new))
        pairs = list(zip(rows(arch), rows(scaled)))
        assert any(all(len(new) == round(len(old) * 1.2 ** phi) for old, new in pairs) and
                   all(b.hidden == near8(a.hidden * 1.1 ** phi)
                       for old, new in pairs for a, b in zip(old, new) if a.expand)
                   for phi in np.arange(100) / 20)
        sizes.append(macs(scaled))
    assert sizes == sorted(sizes) and sizes[0] == macs(arch) and sizes[-1] > 2 * macs(arch)
    with pytest.raises(ValueError, match="does not fit"):
        scale(arch, 1, macs(arch) - 1)


def test_compound_scaling_begins_at_the_network_itself_and_goes_in_the_steps_of_its_table():
    space, g = SPACES["paper"][0], seeded(1)
    rows = [b for b in space.blocks if not b.residual]
    for _ in range(20):                                                   # widths of 12, 20, 28 among them
        arch = chosen(space, random_options(space, g), 3, 1000)
        assert scale(arch, 2, macs(arch)) == arch._replace(stage=2)
        n = -1
        for block in scale(arch, 2, 2 * macs(arch)).blocks:
            n += not block.residual
            assert (block.out - rows[n].widths[0]) % (rows[n].widths[1] - rows[n].widths[0]) == 0
