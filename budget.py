"""The most likely network under a budget, exactly: dynamic programming over the widths (Viterbi).

A network is a chain of choices, and what a block costs depends on its own choices and the width before
it. So for a given price of a MAC the best network, the one of the largest log-likelihood - price x MACs,
is found exactly by dynamic programming over the widths, the price that meets a budget by bisection, and
what it misses by a short search. The same goes for parameters and for time: one mechanism, three costs.

Costs are whole numbers (MACs, parameters, nanoseconds), so that sums of them are exact in any order.
log_p: for each block the log-probabilities (operations,), (expansions,), (widths,), float64.
table: `flops.Costs`.
"""
import numpy as np
import torch

from flops import bounds


def viterbi(log_p, table, price):
    """The options of the network with the largest log-likelihood - price x cost, its log-likelihood, and
    its cost.

    price: nats a unit of cost, of either sign.
    """
    return viterbi_list(log_p, table, price, 1)[0]


@torch.no_grad()
def viterbi_list(log_p, table, price, count):  # task 5.4
    """The `count` best networks by log-likelihood - price x cost, best first; as `viterbi` gives one.

    Dynamic programming over the width between two blocks: for each width the `count` best beginnings that
    end in it.
    """
    score, back = torch.zeros(1, 1, dtype=torch.float64), []  # (widths, beginnings)
    for p, cost in zip(log_p, table.blocks):
        gain = (likelihoods(p) - price * cost).flatten(1, 2)                             # (i, op x e, o)
        every = (score[:, :, None, None] + gain[:, None]).flatten(0, 2)  # (i x beginnings x op x e, o)
        best, chosen = every.topk(min(count, len(every)), 0)
        back.append((chosen, score.shape[1], cost.shape[1:3]))
        score = best.T
    ends = (score - price * table.head[:, None]).flatten()
    networks = []
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
        networks.append((options[::-1], likelihood, total))
    return networks


def likelihoods(p):
    """One block's log-probabilities (operations,), (expansions,), (widths,) added up: (1, op, e, o)."""
    op, expansion, width = p
    return op.view(1, -1, 1, 1) + expansion.view(1, 1, -1, 1) + width.view(1, 1, 1, -1)


@torch.no_grad()
def most_likely(log_p, table, budget):
    """The options of the most likely network whose cost is at most `budget`, its log-likelihood, and its
    cost. Exact.

    A price (Viterbi) and its bisection find a good network within the budget and an upper bound for any.
    What lies between the two is small, so few beginnings of networks could still end in a better one:
    these are followed block by block, and of those that end in the same width, one that is dearer and
    less likely than another is dropped.
    """
    free = viterbi(log_p, table, 0.0)
    if free[2] <= budget:
        return free
    price, best = bisect(log_p, table, budget, 0.0)
    return within(log_p, table, budget, price, best)


def bisect(log_p, table, budget, low):
    """(a price, the most likely network that it gives within `budget`), by bisection from the price `low` up.

    From a negative price, which rewards cost, the network comes near to budgets beyond the most likely
    network as well. ValueError, with the bounds, if the budget lies below the cheapest network.
    """
    least, most = bounds(table)
    if budget < least:
        raise ValueError(f"{budget:,.0f} is below the cheapest network, of {least:,.0f} (the dearest: "
                         f"{most:,.0f})")
    while low < 0 and viterbi(log_p, table, low)[2] < min(budget, most) * (1 - 1e-9):
        low *= 4                                    # a reward too small to reach the budget
    high = 1 / budget
    while (best := viterbi(log_p, table, high))[2] > budget:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        found = viterbi(log_p, table, middle)
        if found[2] > budget:
            low = middle
        else:
            high, best = middle, found
    return high, best


def within(log_p, table, budget, price, best):
    """`most_likely`'s exact part: the best of all networks within the budget, given a good one, a price."""
    ahead, gains = [-price * table.head], []  # the most that log-likelihood - price x cost can still gain
    for p, cost in zip(reversed(log_p), reversed(table.blocks)):
        gains.append(likelihoods(p) - price * cost)
        ahead.append((gains[-1] + ahead[-1]).amax((1, 2, 3)))
    floor = best[1] - price * (budget - table.fixed) - 1e-9  # what a better network must reach at least
    # Beginnings of networks, a tensor each: their last width, log-likelihood, cost, and the one that they
    # go on from.
    width, likelihood = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.float64)
    cost = likelihood + table.fixed
    trail, remaining = [], cheapest_ends(table)
    for n, (p, costs_n) in enumerate(zip(log_p, table.blocks)):
        score = (likelihood - price * (cost - table.fixed)).view(-1, 1, 1, 1)
        keep = score + gains[-1 - n][width] + ahead[-2 - n] >= floor
        keep &= cost.view(-1, 1, 1, 1) + costs_n[width] + remaining[n + 1] <= budget
        parent, op, expansion, out = keep.nonzero(as_tuple=True)
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
    if not len(cost) or likelihood.max() <= best[1]:
        return best
    end = label = int(likelihood.argmax())
    options = []
    for parent, op, expansion, width in reversed(trail):
        options.append((int(op[label]), int(expansion[label]), int(width[label])))
        label = int(parent[label])
    return options[::-1], float(likelihood[end]), float(cost[end])


def cheapest_ends(table):
    """For each block, by the width that comes in, the least it and what follows cost; the head's last."""
    ends = [table.head]
    for cost in reversed(table.blocks):
        ends.append((cost + ends[-1]).amin((1, 2, 3)))
    return ends[::-1]


def choose(spaces, budget, show, near=False):
    """The network for a budget from several stages: (lost, which, (options, log-likelihood, cost)).

    spaces: (log_p, table) of each stage. Log-likelihoods of different spaces do not compare. What the budget
    takes from a stage's most likely network does, in nats: the stage that loses the least (of equals the
    last) searched networks of this size.
    near: not the most likely within the budget, but what comes nearest to it from below at a price, even a
    negative one. ValueError, with the bounds as `show` writes them, for a budget that no network meets, or
    every one does.
    """
    best, ends = None, []
    for which, (log_p, table) in enumerate(spaces):
        ends += bounds(table)
        if not ends[-2] <= budget <= ends[-1]:
            continue
        found = bisect(log_p, table, budget, -1e3 / budget)[1] if near else most_likely(log_p, table, budget)
        lost = viterbi(log_p, table, 0.0)[1] - found[1]
        if best is None or lost <= best[0]:
            best = lost, which, found
    if best is None:
        raise ValueError(f"{show(budget)} is out of reach: networks have {show(min(ends))} to "
                         f"{show(max(ends))}")
    return best


def alternatives(log_p, table, budget, count):
    """Up to `count` of the most likely networks near and within a budget, as by `viterbi`, best first.

    The first is exact. The others are those that are best at the budget's price and lie within it; the price
    lists networks on both sides of the budget: ever more, until enough lie within.
    """
    first = most_likely(log_p, table, budget)
    price = 0.0 if viterbi(log_p, table, 0.0)[2] <= budget else bisect(log_p, table, budget, 0.0)[0]
    found, length = [], 4 * count
    while len(found) < count:
        listed = viterbi_list(log_p, table, price, length)
        found = [first, *(n for n in listed if n[2] <= budget and n[0] != first[0])][:count]
        if len(listed) < length or length >= 1024:                         # there are no more, or too many
            break
        length *= 4
    return sorted(found, key=lambda network: -network[1])
