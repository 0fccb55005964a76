"""One step of the search, from a batch to an update: of the weights w, or of the architecture alpha (Eq. 4).

Both go two sampled paths (`two_paths`), each on its own part of the training data.
"""
import math

import torch

import data
import distill
from machinery import processes
from supernet import require_grad, step_sampled


def weight_step(supernet, teacher, sgd, weights, batch, pieces, tau, lam, position):
    """A step of SGD for w, by Eq. 4 on a batch (x, y): (loss, share right) before it, (2,).

    pieces, tau, lam: as in `gradients`. position: numbers that seed the paths, at their end the step's.
    """
    sgd.zero_grad()                                 # to None: SGD does not touch what was not sampled
    found = gradients(supernet, teacher, batch, pieces, tau, lam, (*position, 0))
    found = checked(weights, found, position[-1])
    sgd.step()
    return found


def alpha_step(supernet, teacher, adam, weights, alphas, pull, batch, pieces, tau, lam, position):
    """A step of Adam for alpha, as `weight_step` is one for w.

    pull: a function of the term that draws the mean MACs to their target, or of None.
    """
    require_grad(weights, False)                    # no gradient of a frozen parameter is computed
    require_grad(alphas, True)
    adam.zero_grad()
    found = gradients(supernet, teacher, batch, pieces, tau, lam, (*position, 1))
    if (term := pull()) is not None:
        term.backward()
    found = checked(alphas, found, position[-1])
    step_sampled(adam, alphas)
    require_grad(alphas, False)
    require_grad(weights, True)
    return found


def gradients(supernet, teacher, batch, pieces, tau, lam, position):
    """Add the gradients of the mean loss of a batch, (x, y), to the parameters' .grad, in so many pieces.

    tau: temperature; lam: Eq. 4's lambda. All pieces go the same two paths, which `position` seeds. Returns
    what `two_paths` does, for the whole batch: (2,).
    """
    (x, y), total = batch, 0
    for part_x, part_y in zip(x.chunk(pieces), y.chunk(pieces)):
        generator = data.generator(*position)
        loss, right = two_paths(supernet, teacher, part_x, part_y, tau, lam, generator)
        share = len(part_y) / len(y)
        (share * loss).backward()
        total = total + share * torch.stack((loss.detach(), right))
    return total


def checked(parameters, found, step):
    """The means over all processes of `found`, (loss, share right), and of the gradients, which become these.

    FloatingPointError if the loss or a gradient is not finite.
    """
    found, = processes.all_reduce_mean(parameters, found)
    bad, unscaled = torch.tensor([0.0, 1.0], device=found.device)
    torch._amp_foreach_non_finite_check_and_unscale_(  # GradScaler's own: one pass over all of them
        [found, *(p.grad for p in parameters if p.grad is not None)], bad, unscaled)
    if bad.item():                              # the one number that is read from the device in every step
        raise FloatingPointError(step)
    return found


def two_paths(supernet, teacher, x, y, tau, lam, generator):
    """Eq. 4 for two sampled paths, on x (B, C, H, W) and y (B,): (loss, share of x named right)."""
    soft = None
    if teacher is not None:
        with torch.no_grad():
            soft = teacher(x)                                                   # (B, classes)
    logits = supernet(x, supernet.sample(tau, generator))                       # (B, classes)
    return distill.loss(logits, soft, y, lam), (logits.detach().argmax(1) == y).float().mean()


def learning_rate(peak, step, steps, warmup=0.05):
    """Linear warm-up over the first 5 % of the steps, then a cosine to zero. The paper is silent."""
    progress = (step + 1) / steps
    return peak * min(progress / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))
