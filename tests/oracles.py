"""What the tests share: oracles made of plain, full-width PyTorch layers, and networks that are not trivial.

An oracle is written from the paper's definitions. It reads a network's weights and a space's tables,
and calls none of the project's functions.
"""
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torchvision.ops import SqueezeExcitation

import ops
import supernet
from space import Arch, ArchBlock, Block, Space

# Table 2
OPS = ("ir_k3", "ir_k5", "ir_k3_hs", "ir_k5_hs", "ir_k3_se", "ir_k5_se", "ir_k3_se_hs", "ir_k5_se_hs")

# Small enough to list all of its 82,944 networks, with everything that a space has: a block without expand
# convolution, a stride, a residual. An expansion of 0.75 of 8 channels and one of 1.25 both round to 8.
TINY = Space("tiny", 0, 8, 8, 16, (Block(0, 0, (1,), (8, 16), 1, False, False),
                                   Block(1, 0, (0.75, 1.25, 2.75), (8, 16, 24), 2, False, True),
                                   Block(1, 1, (0.75, 1.25, 2.75), (8, 16, 24), 1, True, True)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def near8(x):
    """The nearest multiple of 8, halves up, and at least 8."""
    return max(8, 8 * math.floor(x / 8 + 0.5))


def without_norm(put=setattr):
    """Batch norm alone makes the images of a batch depend on each other; from here on it does nothing.

    put: monkeypatch.setattr, which puts it back.
    """
    for module in (ops, supernet):
        put(module, "norm", lambda x, layer: x)
    put(nn.BatchNorm2d, "forward", lambda layer, x: x)


def hidden_width(block, expansion, inputs):
    """Of the option `expansion`: as wide as the input where no convolution expands it."""
    return near8(block.expansions[expansion] * inputs) if block.expand else inputs


def images(n, channels, size, seed=0):
    """n random patterns under noise: they differ in their means, too."""
    g = seeded(seed)
    patterns = F.interpolate(torch.randn(n, channels, 3, 3, generator=g), size, mode="bilinear")
    return 1.5 * patterns + 0.3 * torch.randn(n, channels, size, size, generator=g)


@torch.no_grad()
def stir(module, seed=0):
    """No batch-norm statistic, scale, shift, bias or logit is 0 or 1, and no two are alike."""
    g = seeded(seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor, low, high in ((layer.weight, 0.5, 1.5), (layer.bias, -0.5, 0.5),
                                      (layer.running_mean, -0.5, 0.5), (layer.running_var, 0.5, 2)):
                if tensor is not None:                                  # a supernet keeps no statistics
                    tensor.uniform_(low, high, generator=g)
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.normal_(0, (2 / layer.weight[0].numel()) ** 0.5, generator=g)
            if layer.bias is not None:
                layer.bias.uniform_(-0.5, 0.5, generator=g)
    for name, p in module.named_parameters():
        if ".alphas." in name:
            p.uniform_(-1, 1, generator=g)
    return module


settle = stir                   # of a supernet: it keeps no statistics that would have to settle


def share_of_images(logits):
    """How much of the logits' size is due to the images, and not the same for all of them."""
    logits = logits.detach()
    return float((logits - logits.mean(0)).norm() / logits.norm())


def assert_same_logits(found, wanted):
    """In float64: the logits agree, and so does the part that is due to the images, which may be small."""
    assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    due, share = wanted - wanted.mean(0), share_of_images(wanted)
    assert share > 1e-7
    assert_close(found - found.mean(0), due, rtol=0, atol=1e-4 * float(due.detach().abs().max()))


def random_options(space, generator):
    """For each block one (operation, expansion, width), as indices, uniformly."""
    def one(n):
        return int(torch.randint(n, (1,), generator=generator))
    return [(one(8), one(len(b.expansions)), one(len(b.widths))) for b in space.blocks]


def chosen(space, options, in_channels=1, classes=10):
    """The `Arch` of these options."""
    blocks, width = [], space.stem
    for b, (op, expansion, out) in zip(space.blocks, options, strict=True):
        blocks.append(ArchBlock(OPS[op], hidden_width(b, expansion, width), b.widths[out],
                                b.stride, b.residual, b.expand))
        width = b.widths[out]
    return Arch(space.name, space.stage, space.resolution, in_channels, classes, space.stem, space.head,
                tuple(blocks))


def kernel(op):
    return int(op.split("_")[1][1:])


def pixels(size, kernel, stride):
    """Pixels a side behind a convolution padded by half its kernel."""
    return (size + 2 * (kernel // 2) - kernel) // stride + 1


def block_macs(op, inputs, hidden, outputs, stride, expand, size):
    """Multiply-accumulates of one candidate, into which `size` pixels a side come."""
    after = pixels(size, kernel(op), stride)
    total = size * size * hidden * inputs if expand else 0
    total += after * after * hidden * kernel(op) ** 2
    if "se" in op.split("_"):
        total += 2 * hidden * near8(hidden / 4)
    return total + after * after * outputs * hidden


def macs(arch):
    """Multiply-accumulates of a network for one image."""
    size, width = pixels(arch.resolution, 3, 2), arch.stem
    total = size * size * arch.stem * arch.in_channels * 9
    for b in arch.blocks:
        total += block_macs(b.op, width, b.hidden, b.out, b.stride, b.expand, size)
        size, width = pixels(size, kernel(b.op), b.stride), b.out
    return total + size * size * arch.head * width + arch.head * arch.classes


@torch.no_grad()
def corner(mine, source):
    """Copy into `mine` the leading corner of every tensor of the layer `source`; returns `mine`.

    Of a 5x5 kernel it is the taps 1, 2 and 3 each way, if `mine` has a 3x3 one.
    """
    mine.to(source.weight)
    for name, tensor in mine.named_parameters():
        theirs = getattr(source, name)
        if tensor.dim() == 4 and tensor.shape[2:] == (3, 3) and theirs.shape[2:] == (5, 5):
            theirs = theirs[:, :, 1:4, 1:4]
        tensor.copy_(theirs[tuple(slice(n) for n in tensor.shape)])
    return mine


def plain_candidate(source, op, inputs, hidden, outputs, stride, expand):
    """A candidate of Table 2 as textbook layers in train mode, with corners of a block's layers `source`."""
    k, act = kernel(op), nn.Hardswish if op.endswith("_hs") else nn.ReLU
    layers = []
    if expand:
        layers += [corner(nn.Conv2d(inputs, hidden, 1, bias=False), source.expand),
                   corner(nn.BatchNorm2d(hidden), source.norm1), act()]
    depthwise = nn.Conv2d(hidden, hidden, k, stride, k // 2, groups=hidden, bias=False)
    layers += [corner(depthwise, source.depthwise),
               corner(nn.BatchNorm2d(hidden), source.norm2), act()]
    if "se" in op.split("_"):
        se = SqueezeExcitation(hidden, near8(hidden / 4), nn.ReLU, nn.Hardsigmoid)
        corner(se.fc1, source.squeeze), corner(se.fc2, source.excite)
        layers.append(se)
    layers += [corner(nn.Conv2d(hidden, outputs, 1, bias=False), source.project),
               corner(nn.BatchNorm2d(outputs), source.norm3)]
    return nn.Sequential(*layers)


def fit(x, width):
    """x (B, C, H, W), cut or padded with zero channels to `width`."""
    return torch.cat([x, x.new_zeros(x.shape[0], width, *x.shape[2:])], 1)[:, :width]


class Residual(nn.Module):
    """body(x) + x, with x cut or padded to its width."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        y = self.body(x)
        return y + fit(x, y.shape[1])


def plain_network(net, options):
    """One network of the supernet `net` as textbook layers in train mode, with the corners of its weights."""
    space = net.space
    layers = [corner(nn.Conv2d(net.stem.in_channels, space.stem, 3, 2, 1, bias=False), net.stem),
              corner(nn.BatchNorm2d(space.stem), net.stem_norm), nn.Hardswish()]
    width = space.stem
    for b, mixed, (op, expansion, out) in zip(space.blocks, net.blocks, options, strict=True):
        hidden, outputs = hidden_width(b, expansion, width), b.widths[out]
        body = plain_candidate(mixed.layers, OPS[op], width, hidden, outputs, b.stride, b.expand)
        layers.append(Residual(body) if b.residual else body)
        width = outputs
    layers += [corner(nn.Conv2d(width, space.head, 1, bias=False), net.head),
               corner(nn.BatchNorm2d(space.head), net.head_norm), nn.Hardswish(), nn.AdaptiveAvgPool2d(1),
               nn.Flatten(), corner(nn.Linear(space.head, net.classifier.out_features), net.classifier)]
    return nn.Sequential(*layers)


def soft_mask(widths, gates, size):
    """FBNetV2's channel mask: the weighted sum of the prefix masks of `widths`, over all `size` channels."""
    total = 0
    for width, gate in zip(widths, gates, strict=True):
        total = total + gate * (torch.arange(size) < width).to(gate)
    return total.view(1, -1, 1, 1)


def masked_candidate(c, op, x, hidden, squeezed):
    """A candidate at its full width, with masks (1, C, 1, 1) behind batch norm and activation.

    A 3x3 kernel is the 5x5 one without its ring: all else of it is multiplied by zero.
    """
    act = F.hardswish if op.endswith("_hs") else F.relu
    if c.expand is not None:
        x = act(c.norm1(c.expand(x)))
    taps = torch.ones(5, 5).to(x)
    if kernel(op) == 3:
        taps[[0, -1]] = taps[:, [0, -1]] = 0
    x = F.conv2d(x, c.depthwise.weight * taps, None, c.depthwise.stride, 2, 1, c.depthwise.groups)
    x = act(c.norm2(x)) * hidden
    if "se" in op.split("_"):
        s = F.relu(c.squeeze(x.mean((2, 3), keepdim=True))) * squeezed
        x = x * F.hardsigmoid(c.excite(s))
    return c.norm3(c.project(x))


def masked_supernet(net, x, path):
    """FBNetV2's supernet: every convolution at its full width, every choice of width a soft mask.

    The hidden width of a network is its expansion x its input width. So the mask of the hidden channels is
    the sum, over both input widths and both expansions, of the masks that these networks have.
    """
    x, before = F.hardswish(net.stem_norm(net.stem(x))), [(net.space.stem, torch.ones(()))]
    for b, mixed, draws in zip(net.space.blocks, net.blocks, path, strict=True):
        size, hidden, squeezed = mixed.layers.depthwise.out_channels, 0, 0
        for (width, p), (expansion, q) in itertools.product(before, [*zip(*draws["expansion"])]):
            channels = hidden_width(b, expansion, width)
            hidden = hidden + soft_mask([channels], [p * q], size)
            squeezed = squeezed + soft_mask([near8(channels / 4)], [p * q], near8(size / 4))
        widths = [b.widths[w] for w in draws["width"].options]
        y = sum(gate * masked_candidate(mixed.layers, OPS[op], x, hidden, squeezed)
                for op, gate in zip(draws["op"].options, draws["op"].gates, strict=True))
        if b.residual:
            y = y + fit(x, b.widths[-1])
        x = y * soft_mask(widths, draws["width"].gates, b.widths[-1])
        before = [*zip(widths, draws["width"].gates, strict=True)]
    x = F.hardswish(net.head_norm(net.head(x)))
    return net.classifier(x.mean((2, 3)))
