"""One network of a space, alone: plain PyTorch that needs this file and space.py only (Table 3)."""
import functools

import torch
from torch import nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from space import CANDIDATES, round8

ACTIVATIONS = {"relu": nn.ReLU, "hswish": nn.Hardswish}

conv = functools.partial(Conv2dNormActivation, inplace=None)            # hooks see what each layer computed


class Cut(nn.Module):
    """x (B, i, H, W) -> its first channels (B, channels, H, W)."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def forward(self, x):
        return x[:, :self.channels]


class InvertedResidual(nn.Module):
    """A block of an `Arch`: one candidate of Table 2, and its residual. x (B, i, H, W) -> (B, o, H', W')."""

    def __init__(self, block, inputs):
        super().__init__()
        kernel, se, activation = CANDIDATES[block.op]
        hidden, outputs, act = block.hidden, block.out, ACTIVATIONS[activation]
        self.expand = conv(inputs, hidden, 1, activation_layer=act) if block.expand else nn.Identity()
        self.depthwise = conv(hidden, hidden, kernel, block.stride, groups=hidden, activation_layer=act)
        self.squeeze_excite = (SqueezeExcitation(hidden, round8(hidden / 4), scale_activation=nn.Hardsigmoid)
                               if se else nn.Identity())
        self.project = conv(hidden, outputs, 1, activation_layer=None)
        self.shortcut = None
        if block.residual:                                              # at the width of the output
            self.shortcut = (nn.Identity() if inputs == outputs else Cut(outputs) if inputs > outputs else
                             nn.ZeroPad3d((0, 0, 0, 0, 0, outputs - inputs)))           # of (C, H, W)

    def forward(self, x):
        y = self.project(self.squeeze_excite(self.depthwise(self.expand(x))))
        return y if self.shortcut is None else y + self.shortcut(x)


class Network(nn.Module):
    """The stand-alone network of an `Arch`: normalised images (B, in_channels, H, W) -> logits (B, classes).

    dropout: probability before the classifier, when training. The weights lie with their channels last in
    memory, and so do all images behind the stem: training takes two thirds of the time on a CPU.
    """

    def __init__(self, arch, dropout=0.0):
        super().__init__()
        self.arch = arch
        self.stem = conv(arch.in_channels, arch.stem, 3, 2, activation_layer=nn.Hardswish)
        self.blocks = nn.Sequential(*map(InvertedResidual, arch.blocks, arch.inputs()))
        self.head = conv(arch.blocks[-1].out, arch.head, 1, activation_layer=nn.Hardswish)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(arch.head, arch.classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(self.dropout(self.flatten(self.pool(x))))
