"""Time as a budget: which layers a network is made of, their sums, the exact search, and what is measured
anew.

The oracles: a list of a network's layers, from its blocks, by the tests themselves; what PyTorch is asked to
compute, operation by operation; brute force over all networks of a tiny space, with random whole costs.
"""
from machinery import latency

import itertools
import json
import statistics

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
    """The layers of a network, as keys of `latency.costs`."""
    size, width = pixels(arch.resolution, 3, 2), arch.stem
    found = [("stem", arch.in_channels, arch.stem, arch.resolution)]
    for b in arch.blocks:
        kernel, se, act = TABLE_2[b.op]
        after = pixels(size, kernel, b.stride)
        found += [("expand", width, b.hidden, act, size)] * b.expand
        found += [("depthwise", b.hidden, kernel, b.stride, act, size)] + [("squeeze", b.hidden, after)] * se
        found += [("project", b.hidden, b.out, after)] + [("residual", width, b.out, after)] * b.residual
        size, width = after, b.out
    return [*found, ("head", width, arch.head, arch.classes, size)]


def random_times(seed=0):
    """A cost of each layer that has nothing to do with its MACs: whole nanoseconds, from 1 us to 1 ms."""
    g, times = np.random.default_rng(seed), {}
    return lambda *key: times.setdefault(key, int(1000 * 1000 ** g.random()))


@pytest.mark.parametrize("text, nanoseconds", [("2ms", 2e6), ("1500us", 1.5e6), ("0.5s", 5e8), ("80ns", 80),
                                               ("1e-3s", 1e6)])
def test_durations(text, nanoseconds):
    assert latency.duration(text) == pytest.approx(nanoseconds)


@pytest.mark.parametrize("text", ["2", "", "ms", "0ms", "-1ms", "2m", "2M", "2sm", "nanms", "infs", "2 h"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError):
        latency.duration(text)


@pytest.mark.parametrize("space", [TINY, TINY._replace(stem=12), SPACES["small"][4], SPACES["paper"][0]])
def test_a_networks_time_is_the_sum_of_its_layers(space):
    times, g = random_times(), seeded()
    table = latency.costs(space, 3, 17, times)
    for _ in range(20):
        options, total = latency.draw(table, g)
        assert total == sum(times(*key) for key in layers(chosen(space, options, 3, 17)))
    every = torch.cat([t.flatten() for t in (*table.blocks, table.head)])
    assert (every == every.round()).all() and len(options) == len(space.blocks)


@pytest.mark.parametrize("name, stage", [("small", 4), ("paper", 2)])
def test_with_macs_for_times_the_tables_are_those_of_flops(name, stage):
    def macs(kind, first, *others):
        size = others[-1] ** 2
        return {"stem": lambda o, p: first * o * 9 * flops.half(p) ** 2, "residual": lambda *_: 0,
                "expand": lambda h, act, p: first * h * size, "project": lambda o, p: first * o * size,
                "depthwise": lambda k, s, act, p: first * k * k * (-(-p // s)) ** 2,
                "squeeze": lambda p: 2 * first * near8(first / 4),
                "head": lambda o, n, p: first * o * size + o * n}[kind](*others)
    found = latency.costs(SPACES[name][stage], 1, 10, macs)
    wanted = flops.costs(SPACES[name][stage], 1, 10, "macs")
    assert found.fixed == wanted.fixed and torch.equal(found.head, wanted.head)
    assert all(torch.equal(a, b) for a, b in zip(found.blocks, wanted.blocks, strict=True))


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0])
def test_no_network_within_a_time_is_more_likely(spread):
    for seed in range(3):
        net = supernet(seed=seed, spread=spread)
        likelihood, _ = everything(net)
        log_p, table = derive.log_probabilities(net), latency.costs(TINY, 1, 10, random_times(seed))
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
            network(latency.last(torch.randn(1, 1, 32, 32)))
        parts = []
        for kind, *sizes in layers(arch):
            f, channels, size = latency.LAYERS[kind](*sizes)
            x = latency.last(torch.randn(1, channels, size, size))
            with Asked() as part:
                f(x)
            parts += part.calls
        whole = [call for call in whole.calls if "randn" not in call[0]]
        assert sorted(parts) == sorted(whole) and len(parts) > 100


def test_times_are_kept_and_what_is_missing_or_from_elsewhere_is_measured(tmp_path, monkeypatch):
    file, asked = tmp_path / "latency.json", []

    def measure(makers):
        asked.append(len(makers))
        return list(range(1, len(makers) + 1))
    monkeypatch.setattr(latency, "measure", measure)
    monkeypatch.setattr(latency, "sample", lambda tables, network, seed: ([2, 8, 10], [3, 12, 20]))
    small = SPACES["small"]

    def tables(spaces):
        return latency.tables(spaces, 1, 10, None, file)
    first, = tables(small[:1])
    again, = tables(small[:1])
    assert len(asked) == 1 and all(torch.equal(a, b) for a, b in zip(first.blocks, again.blocks))
    both = tables(small[:2])
    assert len(asked) == 2 and all(torch.equal(a, b) for a, b in zip(first.blocks, both[0].blocks))
    tables(small[1:2])
    assert len(asked) == 2 and asked[1] > 0
    saved = json.loads(file.read_text())
    assert saved["factor"] == 1.5 and both[0].fixed == round(1.5 * saved["nanoseconds"]["stem 1 16 28"])
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
    tables = [latency.costs(space, 1, 10, times) for space in spaces]
    monkeypatch.setattr(latency, "measure_networks", lambda networks: [10 * n for n in networks])

    def network(which, options):
        made.append((which, chosen(spaces[which], options)))
        return len(made)
    sums, measured = latency.sample(tables, network, 1)
    assert measured == list(range(10, 211, 10)) and [which for which, _ in made] == [0, 1, 2] * 7
    assert len(set(made)) == 21 and sums == [sum(times(*key) for key in layers(a)) for _, a in made]


def test_a_time_is_the_lower_quartile_over_rounds_and_whole(monkeypatch):
    calls, clock = [], itertools.count()
    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: next(clock) ** 2)     # ever slower
    found = latency.measure([lambda: (calls.append, 3, 4)] * 2)
    assert len(calls) == 2 * latency.ROUNDS * (latency.CALLS + 1)
    assert {tuple(x.shape) for x in calls} == {(1, 3, 4, 4)}
    times = [(2 * n + 1) ** 2 - (2 * n) ** 2 for n in range(2 * latency.ROUNDS * latency.CALLS)]
    rounds = [times[n:n + latency.CALLS] for n in range(0, len(times), latency.CALLS)]
    for mine, value in zip((rounds[::2], rounds[1::2]), found):
        mine = sorted(itertools.chain(*mine))
        assert isinstance(value, int) and mine[len(mine) // 4 - 1] <= value <= mine[len(mine) // 4 + 1]


def test_the_error_of_sums():
    sums, measured = [1.0, 2.2, 2.25], [1.0, 2.0, 3.0]
    assert latency.error(sums, measured) == pytest.approx((0.1, 0.25, statistics.correlation(sums, measured)))
