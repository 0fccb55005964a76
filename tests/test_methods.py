"""Figures 5 and 6: ways are compared seed by seed, and pictures show the rows; many networks side by side
learn what train.py's own loop teaches one.
"""
from machinery.run import Run

import argparse
import itertools

import numpy as np
import pytest
import torch

import data
import flops
import train
from budget import scale
from results import many, methods, networks

ARGS = argparse.Namespace(stages=[0, 1, 4], searches=3, epochs=3)


@pytest.fixture
def small(monkeypatch):
    """A loader of 320 fake images in batches of 64, and their two parts of 256 and 64."""
    images = data.fake(320, (0,))
    loader = data.Loader(images, images.statistics(range(256)), 64)
    parts = torch.arange(256), torch.arange(256, 320)
    monkeypatch.setattr(networks, "loader_of", lambda *given: (loader, parts))
    return loader, parts


def test_all_batches_are_those_of_the_loader(small):
    loader, (index, _) = small
    x, y = many.all_batches(loader, index[:200], 3, 1, 8)              # 3 an epoch: into the third
    batches = loader.shuffled(index[:200], 3, 1, many.train.BATCHES)
    for n, (images, labels) in enumerate(itertools.islice(batches, 8)):
        assert torch.equal((x[n] - loader.mean) / loader.std, images) and torch.equal(y[n], labels)
    assert len(x) == len(y) == 8


def test_side_by_side_networks_learn_what_trains_own_loop_teaches(small, monkeypatch):
    (loader, parts), ends, archs = small, [], networks.random_networks(1, 2)
    monkeypatch.setattr(many, "evaluate", lambda network, *given: ends.append(network) or 0.5)
    for module in (train, many):
        monkeypatch.setattr(module, "RECALIBRATION", 2)
    args = networks.training_arguments(archs[0], 1, 2, torch.device("cpu"))
    assert many.train_many(archs, args, loader, parts) == [0.5, 0.5]
    for arch, end in zip(archs, ends, strict=True):
        one = train.train(train.initial(arch, args), 1, loader, parts[0], lambda network: 0.5, args,
                          Run(None, {}, loader.device))
        for (name, a), b in zip(one.state_dict().items(), end.state_dict().values()):
            assert torch.equal(a, b) or "num_batches" in name      # which nothing reads
    assert not torch.equal(ends[0].classifier.weight, ends[1].classifier.weight)


def arch_rows(flags, seeds):
    """Rows of searches: at each stage the network by hand, whatever the seed."""
    archs = [(stage, networks.by_hand(stage).to_json()) for stage in (0, 1, 4)]
    return [{"flags": flags, "seed": seed, "stage": stage, "arch": arch, "seconds": 1}
            for seed in seeds for stage, arch in archs]


def test_what_the_ways_derived_is_found_and_a0_is_scaled(monkeypatch):
    every = [*arch_rows(methods.ALPHA, range(4)), *arch_rows(["--no-grow", *methods.ALPHA], range(2)),
             *arch_rows([], range(2)), *arch_rows(["--lr", "1", *methods.ALPHA], range(2))]
    monkeypatch.setattr(networks, "rows", lambda file: every)
    found = methods.found(ARGS)
    first, last = ({(kind, seed) for kind, seed, arch in found if arch.stage == stage} for stage in (0, 4))
    assert first == {*((methods.CURRICULUM, n) for n in range(3)), ("searched", 0), ("searched", 1)}
    ways = {*first, ("no growth", 0), ("no growth", 1), ("scaling searched", 0), ("scaling searched", 1)}
    assert last == ways | {(kind, n) for kind in ("scaling", "random scaled") for n in range(3)}
    scaled = {kind: arch for kind, _, arch in found if arch.stage == 4}                 # the last of a kind
    bases = {"scaling": networks.by_hand(0), "random scaled": networks.random_networks(0, 3)[2]}
    for kind, base in bases.items():
        assert scaled[kind] == scale(base, 4, flops.TARGETS["small"][4])


def test_ways_are_compared_at_equal_seeds(monkeypatch, capsys, tmp_path):
    """Differences of 1, 2 and 3 points have a mean of 2, and an interval of 4.303 / sqrt(3) = 2.48."""
    def row(kind, stage, number, accuracy):
        return {"kind": kind, "stage": stage, "number": number, "seed": 0, "epochs": 3,
                "accuracy": accuracy / 100, "flops": 1_000_000 * (stage + 1)}
    ours = [row(methods.CURRICULUM, stage, n, 90 + 10 * n % 7) for stage in (0, 1, 4) for n in range(3)]
    theirs = [row("naive", stage, n, 90 + 10 * n % 7 - n - 1) for stage in (1, 4) for n in range(3)]
    theirs += [row("searched", stage, n, 80 + 4 * n) for stage in (0, 1) for n in range(3)]  # has its own A0
    theirs += [row("scaling searched", 1, n, 80 + 3 * n) for n in range(3)]
    monkeypatch.setattr(networks, "rows", lambda file: ours + theirs if file == networks.NETWORKS else [])
    methods.text(ARGS)
    said = capsys.readouterr().out
    assert "A0 searched              84.00" in said and "A0 scaling searched      84.00" in said
    assert "A1 scaling searched      83.00 +- 3.00 (3)  +1.00 +- 2.48" in said         # less "searched"
    assert said.count("+2.00 +- 2.48") == 3 and said.count("naive") == 4         # A1, A4, all; and A0
    figure = methods.picture((methods.CURRICULUM, "naive", "direct"), ARGS, tmp_path / "figure.png")
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    mean = np.mean([row["accuracy"] for row in ours[:3]]) * 100
    assert np.allclose(lines["AdaSearch (CST) (n = 3)"], [(1, mean), (2, mean), (5, mean)])
    theirs = lines["naive progressive search (n = 3)"]
    assert np.allclose(theirs, [(1, mean), (2, mean - 2), (5, mean - 2)])
    assert not any("direct" in str(label) for label in lines)                       # which has no rows
