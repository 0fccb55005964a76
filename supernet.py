"""The SuperNet: Gumbel two-path sampling over operation, expansion and width, with channel masks
(Architecture Space).

Every block chooses three times: an operation of Table 2, an expansion, an output width. Each choice has
its logits, the architecture parameters alpha. A step draws two options of each without replacement
(Gumbel top-2) and adds them up by gates, the softmax of their perturbed logits over the temperature. When
the weights learn, operations are drawn and weighted as if their logits were equal (search.py's default). Only
these two paths are computed, forward and backward. With gates of 0 and 1 they are one network of the space.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from ops import InvertedResidual, add_residual, conv, initialise, mask, norm
from space import CANDIDATES

CHOICES = ("op", "expansion", "width")


class Draw(NamedTuple):
    """The sampled options of one choice (indices, ascending) and their gates (weights that sum to 1)."""
    options: tuple
    gates: torch.Tensor


def temperature(progress, first=5.0, last=0.1):  # task 2.1
    """The softmax temperature at `progress` in [0, 1] of a stage: it falls exponentially, from 5 to 0.1.

    The paper is silent; these are common ends for Gumbel-softmax searches.
    """
    return first * (last / first) ** progress


class MixedBlock(nn.Module):
    """One searchable block: the layers that its eight candidates share, and the logits of its three choices.

    The candidates differ by what they are, and not by how often they were drawn: all weights but those of
    squeeze-excite learn in every step. A choice with a single option (expansion 1 in row 2) has no logits.
    """

    def __init__(self, block, inputs):
        super().__init__()
        self.block = block
        hidden, outputs = block.hidden(inputs, -1), block.widths[-1]
        self.layers = InvertedResidual(inputs, hidden, outputs, block.stride, block.expand)
        sizes = {"op": len(CANDIDATES), "expansion": len(block.expansions), "width": len(block.widths)}
        self.alphas = nn.ParameterDict({name: torch.zeros(n) for name, n in sizes.items() if n > 1})

    def forward(self, x, inputs, draws):  # task 2.3
        """x (B, i, H, W) and its `inputs` -> y (B, o, H', W') and its `outputs`.

        inputs, outputs: the sampled widths of x and of y, and their gates; i and o are the widest. Each pair
        of an input width and an expansion has a hidden width, weighted by the product of their gates. The
        sampled candidates are added up by their gates, then the residual is added, then the output widths
        mask the sum. So gates of 0 and 1 give exactly the network of these choices.
        """
        (widths, gates), expansions = inputs, draws["expansion"]
        hidden = [self.block.hidden(width, option) for width in widths for option in expansions.options]
        hidden_gates = torch.outer(gates, expansions.gates).flatten()
        outputs = [self.block.widths[option] for option in draws["width"].options], draws["width"].gates
        ops = [list(CANDIDATES)[option] for option in draws["op"].options]
        found = self.layers(x, ops, hidden, hidden_gates, max(outputs[0]))
        y = sum(gate * each for gate, each in zip(draws["op"].gates, found))
        if self.block.residual:
            y = add_residual(y, x)
        return y * mask(*outputs).view(1, -1, 1, 1), outputs


class SuperNet(nn.Module):
    """The supernet of one stage's `space`, for images of `in_channels` and `classes` labels.

    generator: where the initial weights come from (None: torch's global one).
    """

    def __init__(self, space, in_channels, classes, generator=None):
        super().__init__()
        self.space = space
        self.stem = nn.Conv2d(in_channels, space.stem, 3, 2, 1, bias=False)
        self.stem_norm = nn.BatchNorm2d(space.stem, track_running_stats=False)
        blocks, width = [], space.stem
        for block in space.blocks:
            blocks.append(MixedBlock(block, width))
            width = block.widths[-1]
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(width, space.head, 1, bias=False)
        self.head_norm = nn.BatchNorm2d(space.head, track_running_stats=False)
        self.classifier = nn.Linear(space.head, classes)
        initialise(self, generator)

    def weights(self):
        """The network's parameters, w: trained by SGD on 5/6 of the training data."""
        return [p for name, p in self.named_parameters() if ".alphas." not in name]

    def alphas(self):
        """The architecture parameters, alpha, block by block: trained by Adam on the other 1/6."""
        return [a for block in self.blocks for a in block.alphas.values()]

    def probabilities(self):
        """For each block a dict from a choice's name to the softmax of its logits, to four digits."""
        return [{name: [round(p, 4) for p in F.softmax(alpha.detach(), 0).tolist()]
                 for name, alpha in block.alphas.items()} for block in self.blocks]

    def sample(self, tau, generator, uniform=False):  # task 2.2
        """Draw two paths at temperature tau: for each block a dict from `CHOICES` to `Draw`. If
        `uniform`, operations are drawn and weighted as if their logits were equal.

        Gumbel top-2: the two largest of logits + Gumbel noise are a draw without replacement from their
        softmax. At tau = 0, the limit, the gates are 1 and 0, which is one network; their gradient is then
        that of temperature 1 (the straight-through estimator of Jang et al. 2017).

        All choices are drawn at once, padded to the longest, so that an accelerator is read only once for
        all of them. The noise, -log of exponential draws, comes from the CPU's `generator`, so that every
        device and process draws the same.
        """
        alphas = [torch.zeros_like(alpha) if uniform and name == "op" else alpha
                  for block in self.blocks for name, alpha in block.alphas.items()]
        sizes = [len(alpha) for alpha in alphas]
        noise = -torch.empty(sum(sizes)).exponential_(generator=generator).log()
        logits = pad_sequence(alphas, batch_first=True, padding_value=-math.inf)      # (choices, options)
        perturbed = logits + pad_sequence(noise.split(sizes), batch_first=True).to(logits.device)
        options = perturbed.topk(2).indices.sort().values                             # (choices, 2)
        gates = F.softmax(perturbed.gather(1, options) / (tau or 1.0), 1)
        if tau == 0:
            gates = gates + (F.one_hot(gates.argmax(1), gates.shape[1]) - gates).detach()
        draws = (Draw(tuple(pair), pair_gates) for pair, pair_gates in zip(options.tolist(), gates))
        single = Draw((0,), gates.new_ones(1))
        return [dict.fromkeys(CHOICES, single) | dict(zip(block.alphas, draws)) for block in self.blocks]

    def likeliest(self):
        """The most likely option of every choice: for each block (operation, expansion, width) as indices."""
        return [tuple(int(block.alphas[name].argmax()) if name in block.alphas else 0 for name in CHOICES)
                for block in self.blocks]

    def path(self, options):
        """The path of one network, given for each block its (operation, expansion, width) as indices."""
        single = torch.ones(1, device=self.classifier.weight.device)
        return [{name: Draw((option,), single) for name, option in zip(CHOICES, chosen)}
                for chosen in options]

    def forward(self, x, path):
        """x (B, in_channels, H, W), a path from `sample` or `path` -> logits (B, classes)."""
        x = conv(x, self.stem, self.space.stem).contiguous(memory_format=torch.channels_last)
        x = F.hardswish(norm(x, self.stem_norm))
        widths = (self.space.stem,), path[0]["width"].gates.new_ones(1)
        for block, draws in zip(self.blocks, path):
            x, widths = block(x, widths, draws)
        x = F.hardswish(norm(conv(x, self.head, self.space.head), self.head_norm))
        return self.classifier(x.mean((2, 3)))


def step_sampled(optimizer, alphas):
    """An optimiser step for the options that have a gradient: momentum does not move the others."""
    before = [a.detach().clone() for a in alphas]
    optimizer.step()
    with torch.no_grad():
        for alpha, old in zip(alphas, before):
            alpha.copy_(torch.where(alpha.grad == 0, old, alpha))


def require_grad(parameters, on):
    """Turn the gradients of parameters on or off."""
    for p in parameters:
        p.requires_grad_(on)
