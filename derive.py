"""From a supernet to a network: its most likely one, or the most likely under any FLOPs budget (Table 3).

A network is a chain of choices, and what a block costs depends on its own choices and the width before it. So for a
given price of a MAC the best network, the one of the largest log-likelihood - price x MACs, is found exactly by dynamic
programming over the widths (Viterbi), and the price that meets a budget by bisection.
"""
import torch
import torch.nn.functional as F
from torch import nn

from flops import costs, expected
from ops import InvertedResidual, add_residual, conv, norm
from space import CANDIDATES, Arch, ArchBlock
from supernet import CHOICES


class Network(nn.Module):
    """The stand-alone network of an `Arch`: images (B, in_channels, H, W) -> logits (B, classes).

    dropout: probability before the classifier, when training.
    """

    def __init__(self, arch, dropout=0.0):
        super().__init__()
        self.arch, self.dropout = arch, dropout
        self.stem = nn.Conv2d(arch.in_channels, arch.stem, 3, 2, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(arch.stem)
        self.blocks = nn.ModuleList(InvertedResidual(b.op, inputs, b.hidden, b.out, b.stride, b.expand)
                                    for inputs, b in zip(arch.inputs(), arch.blocks))
        self.head = nn.Conv2d(arch.blocks[-1].out, arch.head, 1, bias=False)
        self.head_norm = nn.BatchNorm2d(arch.head)
        self.classifier = nn.Linear(arch.head, arch.classes)

    def forward(self, x):
        x = conv(x, self.stem, self.arch.stem).contiguous(memory_format=torch.channels_last)
        x = F.hardswish(norm(x, self.stem_norm))
        for block, chosen in zip(self.blocks, self.arch.blocks):
            y = block(x)
            x = add_residual(y, x) if chosen.residual else y
        x = F.hardswish(norm(conv(x, self.head, self.arch.head), self.head_norm))
        return self.classifier(F.dropout(x.mean((2, 3)), self.dropout, self.training))


@torch.no_grad()
def inherit(network, supernet):
    """Copy the supernet's weights and batch-norm statistics into a derived `network`, which is returned.

    Every width is a prefix, so a tensor of the network is the leading corner of the supernet's.
    """
    pairs = [(network.get_submodule(name), supernet.get_submodule(name))
             for name in ("stem", "stem_norm", "head", "head_norm", "classifier")]
    for mine, chosen, mixed in zip(network.blocks, network.arch.blocks, supernet.blocks, strict=True):
        pairs.append((mine, mixed.candidates[list(CANDIDATES).index(chosen.op)]))
    for mine, theirs in pairs:
        source = theirs.state_dict()
        for name, tensor in mine.state_dict().items():
            tensor.copy_(source[name][tuple(slice(n) for n in tensor.shape)])
    return network


def arch(supernet, options):
    """The `Arch` of one option a choice: `options` is, for each block, (operation, expansion, width) as indices."""
    space, blocks, width = supernet.space, [], supernet.space.stem
    for mixed, (op, expansion, chosen) in zip(supernet.blocks, options, strict=True):
        block = mixed.block
        blocks.append(ArchBlock(list(CANDIDATES)[op], mixed.hidden(width, expansion), block.widths[chosen],
                                block.stride, block.residual, block.expand))
        width = block.widths[chosen]
    return Arch(space.name, space.stage, space.resolution, supernet.stem.in_channels,
                supernet.classifier.out_features, space.stem, space.head, tuple(blocks))


def log_probabilities(supernet):
    """For each block the log-softmax of its three logits (operations,), (expansions,), (widths,), in float64.

    Differentiable in alpha. A choice with one option has log-probability 0.
    """
    single = torch.zeros(1, dtype=torch.float64)
    return [tuple(F.log_softmax(block.alphas[name].double().cpu(), 0) if name in block.alphas else single
                  for name in CHOICES) for block in supernet.blocks]


def space_costs(supernet, cost="macs"):
    """The `flops.Costs` of the supernet's space, for its own images and classes."""
    return costs(supernet.space, supernet.stem.in_channels, supernet.classifier.out_features, cost)


def expected_macs(supernet, table):
    """The mean MACs of the networks that the supernet samples, differentiable in alpha; `table` from `space_costs`."""
    return expected(table, [tuple(p.exp() for p in block) for block in log_probabilities(supernet)])


@torch.no_grad()
def viterbi(log_p, table, price):
    """The options of the network with the largest log-likelihood - price x cost, and its (log-likelihood, cost)."""
    score, back = torch.zeros(1, dtype=torch.float64), []
    for (op, expansion, width), cost in zip(log_p, table.blocks):
        gain = op.view(1, -1, 1, 1) + expansion.view(1, 1, -1, 1) + width - price * cost      # (i, op, e, o)
        best, inner = gain.flatten(1, 2).max(1)                                               # (i, o)
        score, before = (score.view(-1, 1) + best).max(0)                                     # (o,)
        back.append((before, inner, len(expansion)))
    width = int((score - price * table.head).argmax())
    total, likelihood, options = table.fixed + float(table.head[width]), 0.0, []
    for (before, inner, n), p, cost in zip(reversed(back), reversed(log_p), reversed(table.blocks)):
        i = int(before[width])
        op, expansion = divmod(int(inner[i, width]), n)
        options.append((op, expansion, width))
        likelihood += float(p[0][op] + p[1][expansion] + p[2][width])
        total += float(cost[i, op, expansion, width])
        width = i
    return options[::-1], likelihood, total


def derive(supernet, flops=None):
    """The supernet's most likely network, as an `Arch`; with `flops`, one whose MACs do not exceed this budget.

    ValueError if even the cheapest network exceeds it.
    """
    log_p, table = log_probabilities(supernet), space_costs(supernet)
    options, _, total = viterbi(log_p, table, 0.0)
    if flops is None or total <= flops:
        return arch(supernet, options)
    low, high = 0.0, 1 / flops                                # nats a MAC: too cheap, and dear enough
    while viterbi(log_p, table, high)[2] > flops:
        low, high = high, high * 2
        if high > 1e6:
            raise ValueError(f"no network of A{supernet.space.stage} has {flops:,.0f} MACs or fewer")
    for _ in range(60):
        middle = (low + high) / 2
        if viterbi(log_p, table, middle)[2] > flops:
            low = middle
        else:
            high = middle
    return arch(supernet, viterbi(log_p, table, high)[0])


@torch.no_grad()
def recalibrate(network, batches):
    """Measure the batch-norm statistics of `network` anew, as the mean over `batches` of (images, labels)."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [m.momentum for m in norms]
    network.train()
    for n, (x, _) in enumerate(batches):
        for m in norms:
            m.momentum = 1 / (n + 1)                          # the n-th batch joins a running mean
        network(x)
    for m, momentum in zip(norms, usual):
        m.momentum = momentum
    return network.eval()


@torch.no_grad()
def accuracy(network, batches):
    """The share of `batches` of (images, labels) that `network` names right, in eval mode: in [0, 1]."""
    network.eval()
    right, seen = 0, 0
    for x, y in batches:
        right += (network(x).argmax(1) == y).sum()
        seen += len(y)
    return float(right) / seen
