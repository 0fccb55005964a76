"""The instrument: networks that are compared cost what they should, statistics are those of textbooks."""
from machinery import settings

import functools
import itertools

import numpy as np
import pytest
import torch

import data
import derive
import flops
import search
import train
from budget import viterbi
from derive import log_probabilities, space_costs
from results import compare, networks
from space import SPACES, Arch
from supernet import SuperNet


@pytest.mark.parametrize("stage", [0, 2])
def test_networks_that_are_compared_lie_at_the_target(stage):
    target = flops.TARGETS["small"][stage]
    drawn, largest = networks.random_networks(stage, 4), networks.largest(stage)
    assert len(set(drawn)) == 4 and drawn[:2] == networks.random_networks(stage, 2)
    for arch in (*drawn, largest, networks.by_hand(stage)):
        assert 0.9 * target <= flops.macs(arch) <= target
    assert all(flops.macs(arch) >= 0.97 * target for arch in drawn)
    assert flops.params(largest) > max(map(flops.params, drawn))
    assert {block.op for block in networks.by_hand(stage).blocks} == {"ir_k3_se_hs"}


@pytest.mark.parametrize("target", [450_000, 550_000, 650_000])
def test_no_network_within_the_target_has_more_parameters_than_the_largest(target, monkeypatch):
    """By brute force over a space of A0's first two blocks, 1,024 networks."""
    space = SPACES["small"][0]
    space = space._replace(blocks=space.blocks[:2])
    tables = [flops.costs(space, 1, 10, cost) for cost in (flops.Layer.macs, flops.Layer.params)]
    monkeypatch.setattr(networks, "space_of", lambda stage: (space, *tables))
    monkeypatch.setitem(flops.TARGETS, "small", (target,))
    options = [itertools.product(range(8), range(len(block.expansions)), range(len(block.widths)))
               for block in space.blocks]
    every = [space.arch(chosen, 1, 10) for chosen in itertools.product(*options)]
    best = max((arch for arch in every if flops.macs(arch) <= target), key=flops.params)
    assert len(every) == 8 * 2 * 8 * 4 * 2 and best != max(every, key=flops.params)
    found = networks.largest(0)
    assert flops.params(found) == flops.params(best) and flops.macs(found) <= target


def test_the_interval_is_welchs():
    """By hand: variances 1 / 3 and 4 / 3, degrees (5/3)^2 / (1/18 + 16/18) = 2.94, t(2) = 4.303."""
    difference, half = compare.interval([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    assert difference == -2 and half == pytest.approx(4.303 * (5 / 3) ** 0.5)
    assert compare.interval([3.0, 3.0], [2.0, 2.0]) == (1, 0)                   # nothing deviates


def test_kendalls_tau_counts_pairs():
    one, other = np.random.default_rng(0).permutation(12), np.random.default_rng(1).permutation(12)
    pairs = [(a - b) * (c - d) > 0 for (a, c), (b, d) in itertools.combinations(zip(one, other), 2)]
    assert compare.kendall(one, other) == pytest.approx(2 * np.mean(pairs) - 1)
    tau, low, high = compare.with_interval(compare.kendall, [one, one, -one], one)
    assert tau == high == low == pytest.approx(1 / 3)
    assert compare.with_interval(compare.kendall, [other], one)[0] == compare.kendall(other, one)
    covered = 0
    for a, b in np.random.default_rng(2).normal(size=(100, 2, 20)):
        _, low, high = compare.with_interval(compare.kendall, [a], b, 100)
        covered += low <= 0 <= high
    assert 90 <= covered <= 99                                          # about 95 of 100


def test_the_highest_fifth_is_that_of_the_ranking():
    truth = np.arange(10.0)
    assert compare.highest_fifth(truth, truth) == 8.5 - 4.5
    assert compare.highest_fifth(-truth, truth) == 0.5 - 4.5


def test_how_long_to_train_is_told_by_networks_and_their_seeds(capsys):
    """Means of 88, 90 and 92 deviate by 2; two seeds of each, 1 beside it, by sqrt(2), which adds 1."""
    rows = [{"kind": kind, "stage": 2, "number": n, "seed": seed, "epochs": epochs,
             "accuracy": (mean + 2 * seed - 1) / 100}
            for n, mean in enumerate((88, 90, 92)) for seed in range(2)
            for kind, epochs in (("random", 6), ("largest", 10))]
    compare.lengths(2, [*rows, rows[0] | {"number": 7, "accuracy": 0.5}, rows[0] | {"stage": 1}])
    assert capsys.readouterr().out == (
        "A2, 6 epochs: networks deviate by 1.73 points, seeds of one by 1.41 (n = 3, 2 seeds)\n")


def test_searches_are_compared_seed_by_seed_over_all_stages(capsys):
    """Seeds 0, 1 and 2 are 1, 2 and 3 points better, in the mean of two stages; seed 3 lacks one of them."""
    default = {seed: (1.0, 80.0 + seed) for seed in range(3)}
    longer = [{seed: (1.0, 81.0 + 2 * seed + more) for seed in range(seeds)}
              for seeds, more in ((4, -1), (3, 1))]
    compare.over_stages([{"searched": default, "searched --x 1": each, "random": default} for each in longer])
    assert capsys.readouterr().out == ("searched --x 1: 83.00 % in the mean of these stages (n = 3), "
                                       "+2.00 +- 2.48 above the default (n = 3)\n")


def test_precision_at_5_is_the_share_of_the_best_five_that_are_ranked_so():
    truth = np.arange(10.0)
    assert compare.precision_at_5(truth, truth) == 1 and compare.precision_at_5(-truth, truth) == 0
    assert compare.precision_at_5(np.array([0, 0, 0, 5, 4, 0, 0, 1, 2, 3]), truth) == 3 / 5


@pytest.mark.parametrize("stage", [0, 3])
def test_a_networks_likelihood_is_what_the_derivation_maximises(stage):
    supernet, g = SuperNet(SPACES["small"][stage], 1, 10, data.generator(0)), data.generator(1)
    with torch.no_grad():
        for alpha in supernet.alphas():
            alpha.normal_(generator=g)
    log_p, table = log_probabilities(supernet), space_costs(supernet)
    for penalty in (0.0, 1e-6, 1e-5):
        best = viterbi(log_p, table, penalty)
        arch = supernet.space.arch(best.options, 1, 10)
        assert compare.log_likelihood(arch, supernet) == pytest.approx(best.log_likelihood)
    others = [compare.log_likelihood(arch, supernet) for arch in networks.random_networks(stage, 3)]
    assert max(others) < viterbi(log_p, table, 0.0).log_likelihood


def test_rows_are_kept_and_nothing_is_done_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "RANKS", tmp_path / "ranks.jsonl")
    for name in ("NETWORKS", "SEARCHES"):
        monkeypatch.setattr(networks, name, tmp_path / f"{name}.jsonl")
    monkeypatch.setattr(networks, "side_by_side", lambda function, wanted, jobs: [*map(function, wanted)])
    monkeypatch.setattr(data, "load", lambda name, part: data.fake(240, (0,)))
    monkeypatch.setattr(networks, "random_networks",
                        lambda stage, count, drawn=networks.random_networks: drawn(stage, min(count, 2)))
    for module in (train, derive):
        monkeypatch.setattr(module, "RECALIBRATION", 2)
    networks.loader_of.cache_clear()
    arch = networks.random_networks(0, 1)[0].to_json()
    monkeypatch.setattr(networks, "add_search", lambda wanted: networks.add(networks.SEARCHES, {
        "seed": wanted[1], "stage": 0, "flags": wanted[2], "arch": arch, "seconds": 1}))
    supernet, opened = SuperNet(SPACES["small"][0], 1, 10, data.generator(0)), []
    monkeypatch.setattr(compare, "open_supernet", lambda run, stage: opened.append(run) or supernet)
    for _ in range(2):
        compare.main(["find", "--stages", "0", "--searches", "2", "--draws", "2", "--epochs", "1"])
        for given in ([], ["--flags", "--draw", "alpha"]):
            compare.main(["rank", "--stages", "0", "--epochs", "1", "--searches", "1", *given])
        rows = networks.rows(networks.NETWORKS)
        assert sorted((row["kind"], row["number"], row["seed"]) for row in rows) == [
            ("by hand", 0, 0), ("largest", 0, 0), ("random", 0, 0), ("random", 1, 0),
            ("searched", 0, 0), ("searched", 1, 0)]
        assert [row["seed"] for row in networks.rows(networks.SEARCHES)] == [0, 1]
        assert [(row["number"], len(row["flags"])) for row in networks.rows(compare.RANKS)] == [
            (0, 0), (1, 0), (0, 2), (1, 2)]
        runs = networks.HERE / "runs"
        assert opened[-2:] == [runs / "seed0", runs / "draw-alpha" / "seed0"]
    by = {(row["kind"], row["number"], row["seed"]): row for row in rows}
    assert by["searched", 0, 0]["accuracy"] == by["random", 0, 0]["accuracy"]     # the same network and seed
    assert all(flops.macs(Arch.from_json(row["arch"])) == row["flops"] for row in rows)
    capsys.readouterr()
    compare.main(["table", "--stages", "0", "--epochs", "1"])
    said = capsys.readouterr().out
    accuracies = [100 * by["random", n, 0]["accuracy"] for n in range(2)]
    assert f"random {np.mean(accuracies):.2f} +- {np.std(accuracies, ddof=1):.2f} (n = 2)" in said
    networks.loader_of.cache_clear()


def test_the_table_compares_kinds_with_random_networks_and_flags_with_the_default(monkeypatch, capsys):
    """By the default's supernets six networks are ranked the wrong way round, by the others' rightly."""
    accuracies = [0.88, 0.90, 0.89, 0.92, 0.91, 0.93]
    trained = [{"kind": kind, "number": n, "stage": 0, "seed": 0, "epochs": 1, "accuracy": a + more,
                "flops": 1} for n, a in enumerate(accuracies)
               for kind, more in (("random", 0), ("found", 0.02))]
    ranks = [{"search": seed, "flags": given, "stage": 0, "number": n, "accuracy": sign * a,
              "log_likelihood": -sign * a} for n, a in enumerate(accuracies)
             for seed in range(2) for given, sign in ((["--x", "1"], 1), ([], -1))]
    searches = [{"flags": given, "seed": seed, "stage": stage, "seconds": 60 * (1 + seed)}
                for given, seeds in (([], 2), (["--x", "1"], 1))
                for seed in range(seeds) for stage in range(2)]
    files = {networks.NETWORKS: trained, compare.RANKS: ranks, networks.SEARCHES: searches}
    monkeypatch.setattr(networks, "rows", files.get)
    monkeypatch.setattr(compare, "with_interval", functools.partial(compare.with_interval, resamples=20))
    compare.main(["table", "--stages", "0", "--epochs", "1"])
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("A0 found 92.50 +- 1.87 (n = 6), above random +2.00 +- ")
    assert said[1] == "A0 random 90.50 +- 1.87 (n = 6)"
    for what, tau, first, above in (("accuracy", -1, 88, ""), ("accuracy --x 1", 1, 93, "+2"),
                                    ("log_likelihood", 1, 93, ""), ("log_likelihood --x 1", -1, 88, "-2")):
        both = [line for line in said if line.startswith(f"A0 {what}: tau ")]
        assert f": tau {tau:+.2f} [{tau:+.2f}, {tau:+.2f}], " in both[0]
        assert f" the first has {first:.2f} %, precision at 5 is " in both[0]
        assert both[0].endswith(" (by chance 0.83; n = 6, 2 rankings)")
        wanted = [f"A0 {what}: tau is {above}.00 [{above}.00, {above}.00] above the default's"]
        assert both[1:] == (wanted if above else [])
    assert said[-2:] == ["search.py: 3.0 minutes (n = 2)", "search.py --x 1: 2.0 minutes (n = 1)"]


def test_a_search_says_where_those_of_these_rows_ended():
    rows = networks.rows(networks.SEARCHES)
    for stage, (low, high) in enumerate(search.USUAL):
        ends = [row["accuracy"] for row in rows if row["stage"] == stage and not row["flags"]]
        assert len(ends) == 8 and (low, high) == (round(100 * min(ends), 1), round(100 * max(ends), 1))
    for argv, said in (([], 5), (["--seed", "9", "--device", "cpu", "--stages", "2"], 2),
                       (["--epochs", "2"], 0), (["--widen", "zero"], 0), (["--data", "fake"], 0),
                       (["--flops-target", "1M"], 0), (["--draw", "alpha"], 0)):
        args = settings.completed(settings.search_parser(None).parse_args(argv))
        args.flops_target = args.flops_target or list(flops.TARGETS["small"])
        assert search.usual(args).count(" to ") == (said and said + 1)
