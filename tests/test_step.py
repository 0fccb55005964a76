"""What is promised: a stage of the search is trained as the paper says, step for step.

The oracle is Figure 2's box written out: five steps of w, one of alpha, each on its own part of the images,
by Eq. 4, at falling temperature and lambda; gradients by autograd, and every update by its formula.
"""
import argparse
import math

import pytest
import torch
from checkpoint import blank
from oracles import TINY, chosen, seeded
from test_recipe import rate

import data
import search
from derive import Network, expected_macs, space_costs
from supernet import SuperNet, initialise

SPACE, STEPS = TINY._replace(resolution=16, stage=3), 11


def settings(**more):
    return argparse.Namespace(**{
        "batch_size": 16, "lr": 0.2, "mu": 0.7, "alpha_lr": 0.03, "weight_decay": 0.05, "seed": 5,
        "checkpoint_every": 500} | more)


def by_hand(net, teacher, loader, parts, args):
    """Train `net` as `train_stage` should, by formulas."""
    weights, alphas, target = net.weights(), net.alphas(), args.flops_target[SPACE.stage]
    batches = [loader.shuffled(part, args.seed, SPACE.stage, kind)
               for part, kind in zip(parts, (search.WEIGHTS, search.ALPHAS))]
    speed, first, second = ([torch.zeros_like(p) for p in ps] for ps in (weights, alphas, alphas))
    net.train()
    for step in range(STEPS):
        at = step / STEPS
        tau, lam = 5 * (0.1 / 5) ** at, 0.5 + (0.05 - 0.5) * at if teacher else 0.0

        def loss(kind, tau=tau, lam=lam, step=step):
            total, batch = 0.0, next(batches[kind])
            for x, y in zip(*(part.chunk(args.accumulate) for part in batch)):    # each goes the same paths
                path = net.sample(tau, data.generator(args.seed, SPACE.stage, search.PATHS, step, kind))
                log_p = net(x, path).log_softmax(1)
                hard = -log_p[torch.arange(len(y)), y]
                with torch.no_grad():
                    said = teacher(x).softmax(1) if teacher else log_p.exp()
                soft = (said * (said.log() - log_p)).sum(1)
                total = total + ((1 - lam) * hard + lam * soft).sum() / len(batch[1])
            return total
        gradients = torch.autograd.grad(loss(0), weights, allow_unused=True)
        with torch.no_grad():
            for p, g, v in zip(weights, gradients, speed):
                if g is not None:                                         # what was not sampled stays
                    v.mul_(0.9).add_(g + args.weight_decay * p)
                    p -= rate(step, STEPS, args.lr) * v
        if step % 5 == 4:
            pull = args.mu * (expected_macs(net, space_costs(net)) / target - 1).abs() if target else 0.0
            gradients, n = torch.autograd.grad(loss(1) + pull, alphas), step // 5 + 1
            with torch.no_grad():
                for a, g, m, v in zip(alphas, gradients, first, second):                  # Adam's
                    m.mul_(0.5).add_(0.5 * g)
                    v.mul_(0.999).add_(0.001 * g ** 2)
                    move = args.alpha_lr * m / (1 - 0.5 ** n) / ((v / (1 - 0.999 ** n)).sqrt() + 1e-8)
                    a -= torch.where(g == 0, 0, move)                     # nor do options without a gradient


@pytest.mark.parametrize("taught, target, pieces", [(False, None, 1), (True, 4e5, 1), (False, 9e5, 3)])
def test_a_stage_is_trained_step_for_step_as_the_paper_says(taught, target, pieces):
    images = data.fake(6 * 16 * STEPS // 5, (7,), size=16)
    args = settings(flops_target=[1e5] * 3 + [target, 1e5], accumulate=pieces)
    parts = data.split(images.labels, 0)
    loader = data.Loader(images, images.statistics(parts[0]), args.batch_size, torch.device("cpu"))
    loader.mean, loader.std = loader.mean.double(), loader.std.double()
    net, same = (SuperNet(SPACE, 1, 10, seeded()).double() for _ in range(2))
    teacher = None
    if taught:
        teacher = Network(chosen(SPACE, [(2, 0, 0), (7, 1, 1), (4, 2, 1)])).double().requires_grad_(False)
        initialise(teacher, seeded(1))
        teacher(loader.batch(parts[0][:64])[0])                           # its batch norm is not trivial
        teacher.eval()
    args.epochs = [9, 9, 9, STEPS / (len(parts[0]) // args.batch_size), 9]
    run = blank()
    rows = list(search.train_stage(net, teacher, *search.optimisers(net, args), loader, parts, args, run, []))
    by_hand(same, teacher, loader, parts, args)
    assert run["step"] == STEPS == rows[-1]["steps"]
    wanted, began = same.state_dict(), SuperNet(SPACE, 1, 10, seeded()).state_dict()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-9, msg=name)
    assert sum(not torch.equal(wanted[name].float(), began[name]) for name in began) > 50
    assert rows[-1]["temperature"] == pytest.approx(5 * math.exp(math.log(0.02) * (STEPS - 1) / STEPS))
