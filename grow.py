"""SuperNet2SuperNet (Eqs. 1-3, Fig. 1): a larger supernet, whose largest network computes the same.

Wider: every set of channels that grows gets one map f (Eq. 1) from new channels to the old ones that they
copy. Whatever produces or carries these channels is copied by it (Eq. 2); whatever consumes them shares
its weights among the copies (Eq. 3). The sets are the outputs of a row, which its residuals tie together,
and the hidden and squeezed channels of every block. Deeper: a new block at the end of its row starts
as the identity.

`widen` says how the new channels are consumed:
  eq3    the paper's: weights are divided by the number of copies. The network of the largest widths
         computes the same; a narrower one does not, since its prefix has the divided weights and lacks
         the copies. Copies get equal gradients, and so stay twins unless a mask cuts between them.
  split  ours: as eq3, but by random shares that sum to one, other ones for each output (as LEMON has it,
         Wang et al. 2024). It keeps what eq3 keeps, and the gradients of copies differ at once.
  zero   ours: not at all at first. Every sub-network of the old supernet computes the same.
  naive  the ablation ("naive progressive search"): old weights in the old places, all others stay random.
"""
import torch
from torch import nn

from space import CANDIDATES
from supernet import SuperNet

WIDENINGS = ("eq3", "split", "zero", "naive")


def channel_map(old, new, generator=None):  # task 3.1
    """Eq. 1: f (new,), long. f[j] = j below `old`, then random samples from {0, .., old - 1}.

    They are drawn without replacement as far as they go: no channel is copied twice before all are once.
    """
    samples = [torch.randperm(old, generator=generator) for _ in range(old, new, old)]
    return torch.cat([torch.arange(old), *samples])[:new]


def produce(weight, f):  # task 3.2
    """Eq. 2: the filters (dimension 0) of the new channels are copies; batch-norm vectors alike.

    (old, ..) -> (new, ..).
    """
    return weight[f]


def consume(weight, f, widen="eq3", generator=None):  # task 3.3
    """Eq. 3: each input channel (dimension 1) is shared among its copies.

    weight (o, old, ..) -> (o, new, ..). The layout is PyTorch's, output first; the paper's is W[x, y,
    input, output]. The shares of a channel's copies sum to one: they are equal for `eq3`, random and
    other ones for each output for `split`, and for `zero` the new ones have none.
    """
    o, old = weight.shape[:2]
    part = torch.ones(o, len(f))
    if widen == "split":
        part.exponential_(generator=generator)              # normalised: uniform over all shares there are
    elif widen == "zero":
        part[:, old:] = 0
    part = part.to(weight)
    share = part / part.new_zeros(o, old).index_add(1, f, part)[:, f]                        # (o, new)
    return weight[:, f] * share.view(o, -1, *[1] * (weight.dim() - 2))


@torch.no_grad()
def grow(supernet, space, generator=None, widen="eq3"):
    """The supernet of `space`, the next stage, grown from `supernet`; which stays as it is.

    Architecture parameters are inherited; a new width or expansion starts from the logit of the old
    largest, which it equals in function. A new block has the widths' logits of the block before it, lest
    it cut what passes; its operations and expansions start uniform.
    """
    if widen not in WIDENINGS:
        raise ValueError(f"widen is {widen!r}, choose from {', '.join(WIDENINGS)}")
    classifier = supernet.classifier
    grown = SuperNet(space, supernet.stem.in_channels, classifier.out_features, generator)
    grown.to(classifier.weight.dtype)
    old_blocks = {(b.block.row, b.block.place): b for b in supernet.blocks}
    f_row = torch.arange(space.stem)                                   # the map of the channels that come in
    copy_layer(supernet.stem, grown.stem, widen, f_row, torch.arange(grown.stem.in_channels), generator)
    copy_layer(supernet.stem_norm, grown.stem_norm, widen, f_row)
    for n, new in enumerate(grown.blocks):
        row, place = new.block.row, new.block.place
        f_in = f_row
        if place == 0:                                                   # one map for all the blocks of a row
            f_row = channel_map(old_blocks[row, 0].block.widths[-1], new.block.widths[-1], generator)
        old = old_blocks.get((row, place))
        if old is not None:
            widen_layers(old.layers, new.layers, f_in, f_row, generator, widen)
            for name, alpha in new.alphas.items():
                known = old.alphas[name]
                alpha.copy_(torch.cat([known, known[-1].expand(len(alpha) - len(known))]))
        else:
            if "width" in new.alphas:
                new.alphas["width"].copy_(grown.blocks[n - 1].alphas["width"])  # of the same row: same widths
            if widen != "naive":
                identity(new.layers, widen, generator)
    f_head = torch.arange(space.head)
    copy_layer(supernet.head, grown.head, widen, f_head, f_row, generator)
    copy_layer(supernet.head_norm, grown.head_norm, widen, f_head)
    grown.classifier.load_state_dict(classifier.state_dict())
    return grown.to(classifier.weight.device).train(supernet.training)


def widen_layers(old, new, f_in, f_out, generator, widen):
    """Net2Wider of one block's layers, old -> new, given the maps of the channels that come in and go out."""
    if old.expand is None:
        f_hidden = f_in                                        # no expand convolution: hidden is the input
    else:
        f_hidden = channel_map(old.expand.out_channels, new.expand.out_channels, generator)
        copy_layer(old.expand, new.expand, widen, f_hidden, f_in, generator)
        copy_layer(old.norm1, new.norm1, widen, f_hidden)
    copy_layer(old.depthwise, new.depthwise, widen, f_hidden, torch.arange(1), generator)
    copy_layer(old.norm2, new.norm2, widen, f_hidden)
    f_squeeze = channel_map(old.squeeze.out_channels, new.squeeze.out_channels, generator)
    copy_layer(old.squeeze, new.squeeze, widen, f_squeeze, f_hidden, generator)
    copy_layer(old.excite, new.excite, widen, f_hidden, f_squeeze, generator)
    copy_layer(old.project, new.project, widen, f_out, f_hidden, generator)
    copy_layer(old.norm3, new.norm3, widen, f_out)


def copy_layer(old, new, widen, f_out, f_in=None, generator=None):
    """One convolution or batch norm, old -> new: its tensors are produced by the map f_out, and filters also
    consume by the map f_in.
    """
    for before, after in zip(old.parameters(), new.parameters(), strict=True):
        before = before.cpu()
        if widen == "naive":
            after[tuple(map(slice, before.shape[:2]))] = before
        else:
            before = produce(before, f_out)
            after.copy_(before if before.dim() == 1 else consume(before, f_in, widen, generator))


def identity(layers, widen, generator):  # task 3.4
    """A new block's layers: identity kernels, of the input's width and widened to the hidden width by
    Eqs. 1-3.

    Batch norm, activation and squeeze-excite between the kernels would still change the function, and the
    block adds its input back: so the scale of the last batch norm starts at zero, and block(x) = x
    exactly. Its gradient is not zero, but within our stages the block hardly learns (results/NOTES.md).
    """
    hidden, inputs = layers.expand.weight.shape[:2]
    f = channel_map(inputs, hidden, generator)
    eye = torch.eye(inputs)
    layers.expand.weight.copy_(produce(eye, f).view(hidden, inputs, 1, 1))
    nn.init.dirac_(layers.depthwise.weight, groups=hidden)
    layers.project.weight.copy_(consume(eye, f, widen, generator).view(inputs, hidden, 1, 1))
    nn.init.zeros_(layers.norm3.weight)


def describe(old, new, x):
    """What grew, in words: blocks, the widest width, the largest expansion, weights; and its `movement`."""
    def size(net):
        blocks = [b.block for b in net.blocks]
        return (len(blocks), max(b.widths[-1] for b in blocks), max(b.expansions[-1] for b in blocks),
                sum(p.numel() for p in net.weights()) / 1e6)
    (b0, w0, e0, p0), (b1, w1, e1, p1) = size(old), size(new)
    return (f"grown from A{old.space.stage}: {b0} -> {b1} blocks, widths up to {w0} -> {w1}, "
            f"expansions up to {e0:g} -> {e1:g}, {p0:.2f} -> {p1:.2f} M weights; "
            f"the largest network's logits moved by {movement(old, new, x):.1e} of their size")


@torch.no_grad()
def movement(old, new, x):
    """The largest change of the largest network's logits on images x, relative to the largest logit.

    Of all candidates the most. Float rounding leaves about 1e-6 where growth is exact.
    """
    moved = []
    for op in range(len(CANDIDATES)):
        before, after = (net(x, net.path([(op, -1, -1)] * len(net.blocks))) for net in (old, new))
        moved.append(float((after - before).abs().max() / before.abs().max()))
    return max(moved)
