"""The eight inverted-residual candidates (Table 2), at any prefix width.

A candidate is expand 1x1, depthwise kxk, squeeze-excite or not, project 1x1; each convolution is followed
by batch norm and, but for the last, by ReLU or hswish. Its weights are kept at the widest. A narrower
width is a prefix of them, so `forward` slices: what lies beyond the prefix is not computed.

Shapes: B batch; i, e, o input, expanded (hidden) and output channels; s squeezed channels; k kernel; H W
pixels.
"""
import torch
import torch.nn.functional as F
from torch import nn

from space import CANDIDATES, round8

ACTIVATIONS = {"relu": F.relu, "hswish": F.hardswish}


def conv(x, layer, outputs, columns=None):
    """The prefix of a convolution: the first `outputs` filters, over the channels that `x` (B, i, H, W) has.

    `columns` (i,) scales the input channels; it is multiplied into the weights, which are far smaller
    than the image. A 1x1 convolution is a matrix product over the pixels, and computed as one: it costs
    the same for a width never seen before, whereas a convolution kernel is first generated for each new
    shape.
    """
    bias = None if layer.bias is None else layer.bias[:outputs]
    if layer.kernel_size == (1, 1):
        weight = layer.weight.flatten(1)[:outputs, :x.shape[1]]                # (o, i)
        weight = weight if columns is None else weight * columns
        return F.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    groups, kernel, padding = outputs if layer.groups > 1 else 1, layer.kernel_size[0], layer.padding
    if x.shape[-1] < kernel:        # oneDNN's gradient of such a kernel is three times faster without padding
        x, padding = F.pad(x, (kernel // 2,) * 4), 0
    return F.conv2d(x, layer.weight[:outputs], bias, layer.stride, padding, 1, groups)


def norm(x, layer):
    """The prefix of a batch norm: the first channels, as many as `x` (B, c, H, W) has.

    The supernet normalises by the batch, in eval mode too: what is typical of a channel depends on the path
    drawn. A derived network measures statistics of its own (`derive.recalibrate`).
    """
    c = x.shape[1]
    tracked = layer.running_mean is not None        # by a `Network`
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight[:c], layer.bias[:c],
                        layer.training or not tracked, layer.momentum, layer.eps)


def mask(gates, low, high):  # task 1.2
    """FBNetV2's channel mask for two widths low <= high, of which nothing beyond `high` is left: (high,).

    gates: (2,), the weights of the two widths, summing to 1, or (1,) for one width alone. The sum of the
    two prefix masks is 1 below `low` and the weight of `high` from there on.
    """
    return torch.cat([gates.new_ones(low), gates[-1].expand(high - low)])


def add_residual(y, x):  # task 1.1
    """y (B, o, H, W) + x (B, i, H, W), the input cut or padded with zeros to the output's width."""
    wider = y.shape[1] - x.shape[1]
    return y + (F.pad(x, (0, 0, 0, 0, 0, wider)) if wider > 0 else x[:, :y.shape[1]])


class InvertedResidual(nn.Module):
    """One candidate of Table 2 at its widest: `op` is its name there, the widths are in channels.

    The residual is not part of it: the two sampled candidates of a block share one (see `add_residual`).
    """

    def __init__(self, op, inputs, hidden, outputs, stride=1, expand=True):
        super().__init__()
        kernel, se, activation = CANDIDATES[op]
        squeezed = round8(hidden / 4)
        self.act = ACTIVATIONS[activation]
        self.expand = nn.Conv2d(inputs, hidden, 1, bias=False) if expand else None
        self.norm1 = nn.BatchNorm2d(hidden, track_running_stats=False) if expand else None
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden, track_running_stats=False)
        self.squeeze = nn.Conv2d(hidden, squeezed, 1) if se else None
        self.excite = nn.Conv2d(squeezed, hidden, 1) if se else None
        self.project = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs, track_running_stats=False)

    def forward(self, x, hidden=None, gates=None, outputs=None):  # task 1.3
        """x (B, i, H, W) -> (B, outputs, H', W'), at prefix widths; without them, at the widest.

        hidden: (low, high), the widths of the two sampled expansions (low = high for one), gates: their
        weights. The mask of the expansion belongs after the depthwise batch norm and activation (before a
        batch norm it would be divided out). All that follows is linear in the masked channels, so it
        scales the columns of the consumers. The squeezed width, a quarter of the hidden one by `round8`, is
        masked alike behind its ReLU.
        """
        low, high = hidden or (self.depthwise.in_channels,) * 2
        outputs = outputs or self.project.out_channels
        columns = mask(gates, low, high) if low < high else None
        if self.expand is not None:
            x = self.act(norm(conv(x, self.expand, high), self.norm1))         # expand: (B, e, H, W)
        x = self.act(norm(conv(x, self.depthwise, high), self.norm2))          # depthwise: (B, e, H', W')
        if self.squeeze is not None:
            small, large = round8(low / 4), round8(high / 4)
            s = F.relu(conv(x.mean((2, 3), keepdim=True), self.squeeze, large, columns))       # (B, s, 1, 1)
            s = conv(s, self.excite, high, mask(gates, small, large) if low < high else None)  # (B, e, 1, 1)
            x = x * F.hardsigmoid(s)
        return norm(conv(x, self.project, outputs, columns), self.norm3)       # project: (B, o, H', W')


def initialise(module, generator):
    """He initialisation of convolutions and Xavier of the classifier, drawn from `generator`; biases zero."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
