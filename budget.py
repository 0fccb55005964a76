"""The most likely network within a budget, exactly, and one that spends it: dynamic programming (Viterbi);
and compound scaling, the simplest way to spend a larger one (Fig. 5).

A network is a chain of choices, and what a block costs depends on its own choices and the width before it.
So for a given penalty on a MAC the best network, the one of the largest log-likelihood - penalty x MACs, is
found exactly by dynamic programming over the widths. Bisection finds the penalty that meets a budget, and a
short search the network in the gap that it leaves. Parameters and time have budgets in the same way.

Costs are whole numbers (MACs, parameters, nanoseconds), so that sums of them are exact in any order.
log_p: for each block the log-probabilities (operations,), (expansions,), (widths,), float64.
table: `flops.Costs`.
penalty: nats a unit of cost. A negative one rewards cost.
"""
from machinery.files import Refused

import math
from typing import NamedTuple

import numpy as np
import torch

from flops import best_ends, bounds, macs
from space import CANDIDATES, SPACES, positions, round8

SHARE = 0.95                    # of a budget, which a network should spend


class Solution(NamedTuple):
    """A network of a space: for each block (operation, expansion, width) as indices, and what it is worth."""
    options: list
    log_likelihood: float
    cost: float


def keep_operations(log_p, table, space, before, budget=None):
    """Restrict the `log_p` and the costs `table` of a `Space` to networks that keep the operation of each
    block of the `Arch` before. All are left if before is None, or if the budget lies below the cheapest of
    these, or above the dearest.

    Other operations have log-probability -inf, and the cost of the one that is kept, so that the cheapest
    and the dearest network are among those that are left.
    """
    if before is None:
        return log_p, table
    free = log_p, table
    ops = {stand: list(CANDIDATES).index(block.op) for stand, block in zip(positions(before), before.blocks)}
    log_p, blocks = [*log_p], [*table.blocks]
    for n, kept in enumerate(map(ops.get, positions(space))):
        if kept is not None:
            op, expansion, width = log_p[n]
            others = torch.arange(len(op)) != kept
            log_p[n] = op.masked_fill(others, -math.inf), expansion, width
            blocks[n] = blocks[n][:, [kept]].expand_as(blocks[n])
    table = table._replace(blocks=blocks)
    least, most = bounds(table)
    return free if budget and not least <= budget <= most else (log_p, table)


def viterbi(log_p, table, penalty):
    """The `Solution` of the largest log-likelihood - penalty x cost."""
    return viterbi_list(log_p, table, penalty, 1)[0]


@torch.no_grad()
def viterbi_list(log_p, table, penalty, count):  # task 5.4
    """The `count` best `Solution`s by log-likelihood - penalty x cost, best first.

    Dynamic programming over the width between two blocks: for each width the `count` best beginnings that
    end in it.
    """
    score, back = torch.zeros(1, 1, dtype=torch.float64), []  # (widths, beginnings)
    for p, cost in zip(log_p, table.blocks):
        gain = (joint(p) - penalty * cost).flatten(1, 2)                                 # (i, op x e, o)
        every = (score[:, :, None, None] + gain[:, None]).flatten(0, 2)  # (i x beginnings x op x e, o)
        best, chosen = every.topk(min(count, len(every)), 0)
        back.append((chosen, score.shape[1], cost.shape[1:3]))
        score = best.T
    ends = (score - penalty * table.head[:, None]).flatten()
    solutions = []
    for end in ends.topk(min(count, len(ends))).indices.tolist():
        width, rank = divmod(end, score.shape[1])
        likelihood, total, options = 0.0, table.fixed + float(table.head[width]), []
        for (chosen, ranks, (ops, expansions)), p, cost in zip(back[::-1], log_p[::-1], table.blocks[::-1]):
            rest, expansion = divmod(int(chosen[rank, width]), expansions)
            rest, op = divmod(rest, ops)
            before, rank = divmod(rest, ranks)
            options.append((op, expansion, width))
            likelihood += float(p[0][op] + p[1][expansion] + p[2][width])
            total += float(cost[before, op, expansion, width])
            width = before
        solutions.append(Solution(options[::-1], likelihood, total))
    return [solution for solution in solutions if solution.log_likelihood > -math.inf]


def joint(p):
    """The sums of one block's log-probabilities (operations,), (expansions,), (widths,): (1, op, e, o)."""
    op, expansion, width = p
    return op.view(1, -1, 1, 1) + expansion.view(1, 1, -1, 1) + width.view(1, 1, 1, -1)


@torch.no_grad()
def most_likely(log_p, table, budget):
    """The most likely `Solution` whose cost is at most `budget`. Exact.

    Bisection gives a good network within the budget, and its penalty an upper bound for any (Lagrangian
    relaxation). `close_gap` searches what lies between the two, which is little.
    """
    free = viterbi(log_p, table, 0.0)
    if free.cost <= budget:
        return free
    return close_gap(log_p, table, budget, *bisect(log_p, table, budget, 0.0))


def spend(log_p, table, budget):
    """A likely `Solution` that spends a budget: at most all of it, and at least `SHARE` of it if it can be.

    It is the most likely one within the budget, exactly, if that costs enough. Else cost is rewarded until
    networks come near the budget: of the 256 best at this reward, it is the best that costs enough, or if
    none does, the network of `bisect`.
    """
    solution = most_likely(log_p, table, budget)
    if solution.cost >= SHARE * budget:
        return solution
    penalty, nearest = bisect(log_p, table, budget, -1e3 / budget)
    listed = viterbi_list(log_p, table, penalty, 256)
    return next((s for s in listed if SHARE * budget <= s.cost <= budget), nearest)


def bisect(log_p, table, budget, low):
    """(a penalty, the most likely `Solution` that it gives within `budget`), by bisection from `low` up.

    A negative `low` comes near to budgets beyond the most likely network as well. ValueError, with the
    bounds, if the budget lies below the cheapest network.
    """
    least, most = bounds(table)
    if budget < least:
        raise ValueError(f"{budget:,.0f} is below the cheapest network, of {least:,.0f} (the dearest: "
                         f"{most:,.0f})")
    while low < 0 and viterbi(log_p, table, low).cost < min(budget, most) * (1 - 1e-9):
        low *= 4                                    # the reward is too small to reach the budget
    high = 1 / budget
    while (best := viterbi(log_p, table, high)).cost > budget:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        solution = viterbi(log_p, table, middle)
        if solution.cost > budget:
            low = middle
        else:
            high, best = middle, solution
    return high, best


def close_gap(log_p, table, budget, penalty, best):
    """The most likely of all `Solution`s within `budget`, given what `bisect` returns.

    Follows block by block the few beginnings of networks that can still end in a better one than `best`. Of
    those that end in the same width, one that is dearer and less likely than another is dropped.
    """
    gains = [joint(p) - penalty * cost for p, cost in zip(log_p, table.blocks)]
    # The most that log-likelihood - penalty x cost can still gain, and the least that is still to pay
    ahead = best_ends(gains, -penalty * table.head, torch.amax)
    remaining = best_ends(table.blocks, table.head, torch.amin)
    # What a better network must reach at least
    floor = best.log_likelihood - penalty * (budget - table.fixed) - 1e-9
    # Beginnings of networks, a tensor each: their last width, log-likelihood, cost, and the one that they
    # go on from.
    width, likelihood = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
    cost, trail = likelihood + table.fixed, []
    for n, (p, costs_n) in enumerate(zip(log_p, table.blocks)):
        score = (likelihood - penalty * (cost - table.fixed)).view(-1, 1, 1, 1)
        hopeful = score + gains[n][width] + ahead[n + 1] >= floor
        hopeful &= cost.view(-1, 1, 1, 1) + costs_n[width] + remaining[n + 1] <= budget
        parent, op, expansion, out = hopeful.nonzero(as_tuple=True)
        cost = cost[parent] + costs_n[width[parent], op, expansion, out]
        likelihood = likelihood[parent] + p[0][op] + p[1][expansion] + p[2][out]
        order = torch.from_numpy(np.lexsort((-likelihood, cost, out)))  # by width, then cost, then likelihood
        likelihood, out = likelihood[order], out[order]
        undominated = torch.ones(len(order), dtype=torch.bool)
        for o in out.unique():
            rows = (out == o).nonzero().flatten()
            undominated[rows[1:]] = likelihood[rows[1:]] > likelihood[rows].cummax(0).values[:-1]
        order, likelihood, width = order[undominated], likelihood[undominated], out[undominated]
        cost = cost[order]
        trail.append((parent[order], op[order], expansion[order], width))
    cost = cost + table.head[width]
    if not len(cost) or likelihood.max() <= best.log_likelihood:
        return best
    end = label = int(likelihood.argmax())
    options = []
    for parent, op, expansion, width in reversed(trail):
        options.append((int(op[label]), int(expansion[label]), int(width[label])))
        label = int(parent[label])
    return Solution(options[::-1], float(likelihood[end]), float(cost[end]))


def choose_stage(spaces, budget, show, nearest=False):
    """(which stage, its `Solution`) for a budget, from the (log_p, table) of each of several stages.

    Log-likelihoods of different spaces do not compare. What a stage's most likely network loses to the budget
    does, in nats: the stage that loses the least is chosen, and of equals the last.
    nearest: the `Solution` is not the most likely within the budget, but the one at the penalty or reward
    that comes nearest to it from below. Refused, with bounds as `show` writes them, if no stage spans it.
    """
    best, ends = None, []
    for which, (log_p, table) in enumerate(spaces):
        ends += bounds(table)
        if not ends[-2] <= budget <= ends[-1]:
            continue
        solution = bisect(log_p, table, budget, -1e3 / budget)[1] if nearest else spend(log_p, table, budget)
        lost = viterbi(log_p, table, 0.0).log_likelihood - solution.log_likelihood
        if best is None or lost <= best[0]:
            best = lost, which, solution
    if best is None:
        raise Refused(f"{show(budget)} is out of reach: networks have {show(min(ends))} to {show(max(ends))}")
    return best[1:]


def alternatives(log_p, table, budget, count):
    """Up to `count` of the most likely `Solution`s near and within a budget, best first.

    One is by `spend`. The others are those that are best at the budget's penalty and lie within it. The
    list at this penalty has networks on both sides of the budget, and grows until enough lie within.
    """
    first = spend(log_p, table, budget)
    least = min(SHARE * budget, first.cost)                              # the others spend it as well
    free = viterbi(log_p, table, 0.0).cost
    low = -1e3 / budget if free < first.cost else 0.0                    # the first was rewarded for its cost
    penalty = 0.0 if free == first.cost else bisect(log_p, table, budget, low)[0]
    found, length = [], 4 * count
    while len(found) < count:
        listed = viterbi_list(log_p, table, penalty, length)
        others = [s for s in listed if least <= s.cost <= budget and s.options != first.options]
        found = [first, *others][:count]
        if len(listed) < length or length >= 1024:                         # there are no more, or too many
            break
        length *= 4
    return sorted(found, key=lambda solution: -solution.log_likelihood)


def scale(arch, stage, target):
    """Compound scaling (Fig. 5): `arch`, wider and deeper, as the network of a later `stage`, of at most
    `target` MACs. Refused if not even `arch` fits.

    The paper leaves its multipliers open: depth 1.2^phi and width 1.1^phi are EfficientNet's (Tan and Le
    2019), for the largest phi that fits, in steps of 0.05. Stem, head and resolution stay. Widths go in the
    steps of the space's own table, so that phi = 0 is `arch` itself. Rows of equal depth get a block at the
    same phi, so the last steps may leave much of the target unused.
    """
    best, phi = None, 0.0
    while macs(larger := scaled(arch, stage, 1.2 ** phi, 1.1 ** phi)) <= target:
        best, phi = larger, phi + 0.05
    if best is None:
        raise Refused(f"the network of {macs(arch):,} MACs does not fit into {target:,.0f} at all")
    return best


def scaled(arch, stage, depth, width):
    """`arch` with every row's depth and every block's widths multiplied; a row's last block is repeated."""
    starts, blocks = [n for n, b in enumerate(arch.blocks) if not b.residual], []
    steps = [b.widths[1] - b.widths[0] for b in SPACES[arch.space][arch.stage].blocks if not b.residual]
    for start, end, step in zip(starts, [*starts[1:], None], steps, strict=True):
        row = arch.blocks[start:end]
        more = round(len(row) * depth) - len(row)
        for b in [*row, *[row[-1]._replace(stride=1, residual=True, expand=True)] * more]:
            inputs = blocks[-1].out if blocks else arch.stem
            hidden = round8(b.hidden * width) if b.expand else inputs
            blocks.append(b._replace(hidden=hidden, out=int(b.out * width / step + 0.5) * step))
    return arch._replace(stage=stage, blocks=tuple(blocks))
