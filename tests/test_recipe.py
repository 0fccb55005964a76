"""What is promised: a network is trained by the recipe, step for step.

The oracle is the recipe written out: gradients by autograd, and every update by its formula.
"""
import argparse
import copy
import math

import pytest
import torch
from oracles import TINY, chosen, seeded
from recipe import BATCHES, train

import data
from derive import Network
from supernet import initialise

PLAIN = {"epochs": 2, "batch_size": 16, "accumulate": 1, "lr": 0.3, "weight_decay": 0.0, "smoothing": 0.0,
         "dropout": 0.0, "ema": 0.0, "autocast": False, "init": "scratch", "seed": 3, "data": "made up",
         "resume": False, "validate": True, "checkpoint_every": 500}


def rate(step, steps, peak):
    """Linear over the first 5 %, then a cosine to zero."""
    at = (step + 1) / steps
    return peak * min(at / 0.05, (1 + math.cos(math.pi * at)) / 2)


def by_hand(network, loader, index, args):
    """What `train` should return of a copy of `network`."""
    steps = args.epochs * (len(index) // args.batch_size)
    batches = loader.shuffled(index, args.seed, TINY.stage, BATCHES)
    speed, average = {}, copy.deepcopy(network).state_dict()
    network.train()
    for step in range(steps):
        x, y = next(batches)
        network.zero_grad()
        log_p = network(x).log_softmax(1)
        hard, even = log_p[torch.arange(len(y)), y], log_p.mean(1)
        (-(1 - args.smoothing) * hard - args.smoothing * even).mean().backward()
        with torch.no_grad():
            for name, p in network.named_parameters():
                g = p.grad + (args.weight_decay * p if p.dim() > 1 else 0)    # of weight matrices alone
                speed[name] = g if step == 0 else 0.9 * speed[name] + g
                p -= rate(step, steps, args.lr) * (g + 0.9 * speed[name])     # Nesterov's
            decay = min(args.ema, (1 + step) / (10 + step)) if step else 0.0  # begins with the first step's
            for name, tensor in network.state_dict().items():
                average[name] = decay * average[name] + (1 - decay) * tensor
    return average


@pytest.mark.parametrize("more", [
    {}, {"smoothing": 0.3}, {"weight_decay": 0.1}, {"ema": 0.15}, {"ema": 0.95},
    {"smoothing": 0.1, "weight_decay": 0.05, "ema": 0.9}], ids=str)
def test_a_network_is_trained_by_the_recipe(more, tmp_path):
    images = data.fake(80, (5,), size=16)
    index, args = torch.arange(80), argparse.Namespace(**PLAIN | more)
    loader = data.Loader(images, images.statistics(index), args.batch_size, torch.device("cpu"))
    network = Network(chosen(TINY, [(0, 0, 0), (7, 1, 1), (4, 2, 1)]), args.dropout).double()
    initialise(network, seeded())
    loader.mean, loader.std = loader.mean.double(), loader.std.double()
    wanted = by_hand(copy.deepcopy(network), loader, index, args)
    found, rows = train(network, loader, index, loader, index, args, "tiny", TINY.stage, tmp_path / "none")
    for name, tensor in found.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name].to(tensor.dtype), rtol=1e-6, atol=1e-9, msg=name)
    assert [row["epoch"] for row in rows] == [0, 1] and not (tmp_path / "none").exists()
