"""Time as a budget: which layers a network is made of, their sums, the exact search, and what is measured
anew.

The oracles: a list of a network's layers, from its blocks, by the tests themselves; what PyTorch is asked to
compute, operation by operation; brute force over all networks of a tiny space, with random whole costs.
"""
from machinery import flags, latency

import itertools
import json

import numpy as np
import pytest
import torch
from oracles import TINY, chosen, near8, pixels, random_options, seeded
from test_derive import everything, supernet
from torch.utils._python_dispatch import TorchDispatchMode

import budget
import derive
import flops
from space import SPACES

TABLE_2 = {op: (int(op[4]), "se" in op, "hswish" if op.endswith("hs") else "relu")
           for op in ("ir_k3", "ir_k5", "ir_k3_hs", "ir_k5_hs", "ir_k3_se", "ir_k5_se", "ir_k3_se_hs",
                      "ir_k5_se_hs")}


def layers(arch):
    """A network's `flops.Layer`s as tuples: name, channels in, out, pixels in, out, kernel, activation."""
    size, width = pixels(arch.resolution, 3, 2), arch.stem
    found = [("stem", arch.in_channels, arch.stem, arch.resolution, size, 3, "hswish")]
    for b in arch.blocks:
        kernel, se, act = TABLE_2[b.op]
        after, squeezed = pixels(size, kernel, b.stride), near8(b.hidden / 4)
        found += [("expand", width, b.hidden, size, size, 1, act)] * b.expand
        found += [("depthwise", b.hidden, b.hidden, size, after, kernel, act)]
        found += [("squeeze", b.hidden, squeezed, after, 1, 1, "")] * se
        found += [("excite", squeezed, b.hidden, 1, after, 1, "")] * se
        found += [("project", b.hidden, b.out, after, after, 1, "")]
        found += [("residual", width, b.out, after, after, 0, "")] * b.residual
        size, width = after, b.out
    return [*found, ("head", width, arch.head, size, size, 1, "hswish"),
            ("classifier", arch.head, arch.classes, size, 1, 1, "")]


def random_times(seed=0):
    """A cost of each layer that has nothing to do with its MACs: whole nanoseconds, from 1 us to 1 ms."""
    g, times = np.random.default_rng(seed), {}
    return lambda layer: times.setdefault(tuple(layer), int(1000 * 1000 ** g.random()))


def table_of(space, times, in_channels=1, classes=10):
    return flops.costs(space, in_channels, classes, flops.each(times))


@pytest.mark.parametrize("text, nanoseconds", [("2ms", 2e6), ("1500us", 1.5e6), ("0.5s", 5e8), ("80ns", 80),
                                               ("1e-3s", 1e6)])
def test_durations(text, nanoseconds):
    assert flags.duration(text) == pytest.approx(nanoseconds)


@pytest.mark.parametrize("text", ["2", "", "ms", "0ms", "-1ms", "2m", "2M", "2sm", "nanms", "infs", "2 h"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError):
        flags.duration(text)


@pytest.mark.parametrize("space", [TINY, TINY._replace(stem=12), SPACES["small"][4], SPACES["paper"][0]])
def test_a_networks_time_is_the_sum_of_its_layers(space):
    times, g = random_times(), seeded()
    table = table_of(space, times, 3, 17)
    for _ in range(20):
        options, total = latency.draw(table, g)
        assert total == sum(map(times, layers(chosen(space, options, 3, 17))))
    every = torch.cat([t.flatten() for t in (*table.blocks, table.head)])
    assert (every == every.round()).all() and len(options) == len(space.blocks)


@pytest.mark.parametrize("name, stage", [("small", 4), ("paper", 2)])
@pytest.mark.parametrize("cost", [flops.Layer.macs, flops.Layer.params])
def test_layer_by_layer_the_tables_are_those_of_all_widths_at_once(name, stage, cost):
    space = SPACES[name][stage]
    found, wanted = table_of(space, cost), flops.costs(space, 1, 10, cost)
    assert found.fixed == wanted.fixed and torch.equal(found.head, wanted.head)
    assert all(torch.equal(a, b) for a, b in zip(found.blocks, wanted.blocks, strict=True))


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_no_network_within_a_time_is_more_likely(spread):
    for seed in range(3):
        net = supernet(seed=seed, spread=spread)
        likelihood, _ = everything(net)
        log_p, table = derive.log_probabilities(net), table_of(TINY, random_times(seed))
        a, b, c = table.blocks                             # (1, 8, 1, 2), (2, 8, 3, 3), (3, 8, 3, 3)
        cost = table.fixed + (a[0, :, :, :, *[None] * 6]
                              + b.movedim(0, 0)[None, None, :, :, :, :, *[None] * 3]
                              + c[None, None, None, None, None] + table.head).numpy()
        ends = flops.bounds(table)
        assert ends == (cost.min(), cost.max())
        for limit in (*np.linspace(*ends, 9), ends[0], ends[0] + 0.5, np.sort(cost.ravel())[1000]):
            options, value, total = budget.most_likely(log_p, table, float(limit))
            assert value == pytest.approx(likelihood[cost <= limit].max(), abs=1e-9)
            assert total == cost[sum(options, ())] <= limit
        with pytest.raises(ValueError, match="below the cheapest"):
            budget.most_likely(log_p, table, ends[0] - 0.5)


class Asked(TorchDispatchMode):
    """What PyTorch is asked to compute: the operations, with the sizes and strides of their tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        sizes = [(tuple(a.shape), a.stride()) if isinstance(a, torch.Tensor) else None for a in args]
        self.calls.append((str(f), str(sizes)))
        return f(*args, **kwargs or {})


@torch.no_grad()
def test_the_layers_ask_for_just_what_the_network_asks_for():
    for seed, (name, stage) in itertools.product(range(3), (("small", 3), ("paper", 1))):
        space = SPACES[name][stage]._replace(resolution=32)
        arch = chosen(space, random_options(space, seeded(seed)))
        network = derive.Network(arch).eval()
        with Asked() as whole:
            network(latency.random_image(1, 32))
        parts = []
        for layer in layers(arch):
            f = latency.build(flops.Layer(*layer))
            x = latency.random_image(*layer[1:4:2])
            with Asked() as part:
                f(x)
            parts += part.calls
        assert sorted(parts) == sorted(call for call in whole.calls if "randn" not in call[0])
        assert len(parts) > 100


def walk(spaces):
    """What `latency.tables` gets from derive.py, without supernets."""
    return lambda cost: [table_of(space, cost) for space in spaces]


def test_times_are_kept_and_what_is_missing_or_from_elsewhere_is_measured(tmp_path, monkeypatch):
    file, asked = tmp_path / "latency.json", []

    def measure(builders):
        asked.append(len(builders))
        return list(range(1, len(builders) + 1))
    monkeypatch.setattr(latency, "measure", measure)
    monkeypatch.setattr(latency, "sample", lambda tables, network: ([2, 8, 10], [3, 12, 20]))
    small = SPACES["small"]

    def tables(spaces):
        return latency.tables(walk(spaces), None, file)
    first, = tables(small[:1])
    again, = tables(small[:1])
    assert len(asked) == 1 and all(torch.equal(a, b) for a, b in zip(first.blocks, again.blocks))
    both = tables(small[:2])
    assert len(asked) == 2 and all(torch.equal(a, b) for a, b in zip(first.blocks, both[0].blocks))
    tables(small[1:2])
    assert len(asked) == 2 and asked[1] > 0
    saved = json.loads(file.read_text())
    assert saved["factor"] == 1.5
    assert both[0].fixed == round(1.5 * saved["nanoseconds"]["stem 1 16 28 14 3 hswish"])
    for key, value in (("machine", "other"), ("threads", 99), ("torch", "0.1"), ("device", "cuda")):
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
        tables(small[:2])
        assert asked[2:] == [asked[0] + asked[1]]
        asked.pop()
    for broken in ("{", "[]", "{}"):
        file.write_text(broken)
        tables(small[:2])
        assert asked.pop() == asked[0] + asked[1]


def test_the_sample_is_of_networks_of_each_space_with_their_costs(monkeypatch):
    spaces, made, times = SPACES["small"][:3], [], random_times()
    monkeypatch.setattr(latency, "measure_networks", lambda networks: [10 * n for n in networks])

    def network(which, options):
        made.append((which, chosen(spaces[which], options)))
        return len(made)
    sums, wholes = latency.sample(walk(spaces)(times), network)
    assert wholes == list(range(10, 211, 10)) and [which for which, _ in made] == [0, 1, 2] * 7
    assert len(set(made)) == 21 and sums == [sum(map(times, layers(arch))) for _, arch in made]


def test_a_time_is_the_lower_quartile_over_rounds_and_whole(monkeypatch):
    calls, clock = [], itertools.count()
    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: next(clock) ** 2)     # ever slower
    found = latency.measure([(lambda: calls.append, 3, 4)] * 2)
    assert len(calls) == 2 * latency.ROUNDS * (latency.CALLS + 1)
    assert {tuple(x.shape) for x in calls} == {(1, 3, 4, 4)}
    times = [(2 * n + 1) ** 2 - (2 * n) ** 2 for n in range(2 * latency.ROUNDS * latency.CALLS)]
    rounds = [times[n:n + latency.CALLS] for n in range(0, len(times), latency.CALLS)]
    for mine, value in zip((rounds[::2], rounds[1::2]), found):
        mine = sorted(itertools.chain(*mine))
        assert isinstance(value, int) and mine[len(mine) // 4 - 1] <= value <= mine[len(mine) // 4 + 1]
