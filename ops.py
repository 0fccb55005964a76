"""The eight inverted-residual candidates (Table 2), which share one set of weights, at any prefix width.

A candidate is expand 1x1, depthwise kxk, squeeze-excite or not, project 1x1; each convolution is followed
by batch norm and, but for the last, by ReLU or hswish. The weights are kept at the widest and with a 5x5
kernel. A narrower width is a prefix of them and a 3x3 kernel their middle, so `forward` slices: what lies
beyond is not computed.

Shapes: B batch; i, e, o input, expanded (hidden) and output channels; s squeezed channels; k kernel; H W
pixels.
"""
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from space import CANDIDATES, round8

ACTIVATIONS = {"relu": F.relu, "hswish": F.hardswish}


def middle(weight, kernel):
    """The middle of the filters `weight` (o, i, k, k): (o, i, kernel, kernel)."""
    margin = (weight.shape[-1] - kernel) // 2
    return F.pad(weight, (-margin,) * 4) if margin else weight


def conv(x, layer, outputs, columns=None, kernel=None):
    """The prefix of a convolution: the first `outputs` filters, over the channels that `x` (B, i, H, W) has.

    `kernel` is the size of the filters' middle that is used (None: all of them). `columns` (i,) scales the
    input channels of a 1x1 convolution; it is multiplied into the weights, which are far smaller than the
    image. A 1x1 convolution is a matrix product over the pixels, and computed as one: it costs the same for
    a width never seen before, whereas a convolution kernel is first generated for each new shape.
    """
    bias = None if layer.bias is None else layer.bias[:outputs]
    if layer.kernel_size == (1, 1):
        weight = layer.weight.flatten(1)[:outputs, :x.shape[1]]                # (o, i)
        weight = weight if columns is None else weight * columns
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    weight, groups = layer.weight[:outputs], outputs if layer.groups > 1 else 1
    kernel = kernel or layer.kernel_size[0]
    padding = kernel // 2
    if x.shape[-1] < kernel:        # oneDNN's gradient of such a kernel is three times faster without padding
        x, padding = F.pad(x, (padding,) * 4), 0
    return F.conv2d(x, middle(weight, kernel), bias, layer.stride, padding, 1, groups)


def norm(x, layer):
    """The prefix of a batch norm: the first channels, as many as `x` (B, c, H, W) has.

    The supernet normalises by the batch, in eval mode too: what is typical of a channel depends on the path
    drawn. A derived network measures statistics of its own (`derive.recalibrate`).
    """
    c = x.shape[1]
    return F.batch_norm(x, None, None, layer.weight[:c], layer.bias[:c], training=True, eps=layer.eps)


def mask(widths, gates):  # task 1.2
    """FBNetV2's channel mask: the sum of the prefix masks of `widths`, each times its gate: (max(widths),).

    widths: n numbers of channels; gates (n,), which sum to 1. The prefix mask of a width is 1 for so many
    channels and 0 beyond. If all widths are equal, the gates make no difference and get no gradient.
    """
    if len(set(widths)) == 1:
        return gates.new_ones(widths[0])
    prefixes = pad_sequence([gates.new_ones(width) for width in widths])       # (max(widths), n)
    return prefixes @ gates


def add_residual(y, x):  # task 1.1
    """y (B, o, H, W) + x (B, i, H, W), the input cut or padded with zeros to the output's width."""
    wider = y.shape[1] - x.shape[1]
    return y + (F.pad(x, (0, 0, 0, 0, 0, wider)) if wider > 0 else x[:, :y.shape[1]])


class InvertedResidual(nn.Module):
    """The layers of a block at their widest, in channels: the eight candidates of Table 2 share them.

    The residual is not part of it: the two sampled candidates of a block share one (see `add_residual`).
    """

    def __init__(self, inputs, hidden, outputs, stride=1, expand=True):
        super().__init__()
        squeezed = round8(hidden / 4)
        self.expand = nn.Conv2d(inputs, hidden, 1, bias=False) if expand else None
        self.norm1 = nn.BatchNorm2d(hidden, track_running_stats=False) if expand else None
        self.depthwise = nn.Conv2d(hidden, hidden, 5, stride, 2, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden, track_running_stats=False)
        self.squeeze = nn.Conv2d(hidden, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, hidden, 1)
        self.project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs, track_running_stats=False)

    def forward(self, x, ops, hidden, gates, outputs):  # task 1.3
        """x (B, i, H, W) -> a list: the output (B, outputs, H', W') of each of `ops`, names in Table 2.

        hidden: the hidden widths that were sampled, gates: their weights, as in `mask`. The mask belongs
        after the depthwise batch norm and activation (before a batch norm it would be divided out). All
        that follows is linear in the masked channels, so it scales the columns of the consumers. A squeezed
        width is a quarter of a hidden one by `round8`; these are masked alike behind their ReLU. Up to the
        first activation all ops compute the same, and it is computed once.
        """
        columns, widest = mask(hidden, gates), max(hidden)
        squeezed = [round8(width / 4) for width in hidden]
        if self.expand is not None:
            x = norm(conv(x, self.expand, widest), self.norm1)                 # expand: (B, e, H, W)
        found = []
        for kernel, se, activation in map(CANDIDATES.get, ops):
            act = ACTIVATIONS[activation]
            y = x if self.expand is None else act(x)
            y = act(norm(conv(y, self.depthwise, widest, kernel=kernel), self.norm2))   # (B, e, H', W')
            if se:
                s = F.relu(conv(y.mean((2, 3), keepdim=True), self.squeeze, max(squeezed), columns))
                s = conv(s, self.excite, widest, mask(squeezed, gates))        # (B, s, 1, 1) -> (B, e, 1, 1)
                y = y * F.hardsigmoid(s)
            found.append(norm(conv(y, self.project, outputs, columns), self.norm3))     # (B, o, H', W')
        return found


def initialise(module, generator):
    """He initialisation of convolutions and Xavier of the classifier, drawn from `generator`; biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
