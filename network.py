"""One network of a space, alone (Table 3): needs `space` and `ops` only."""
import torch
import torch.nn.functional as F
from torch import nn

from ops import InvertedResidual, add_residual, conv, norm


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
        for layer in self.modules():                # unlike the supernet's, they keep running statistics
            if isinstance(layer, nn.BatchNorm2d):
                layer.__init__(layer.num_features)

    def forward(self, x):
        x = conv(x, self.stem, self.arch.stem).contiguous(memory_format=torch.channels_last)
        x = F.hardswish(norm(x, self.stem_norm))
        for block, chosen in zip(self.blocks, self.arch.blocks):
            y = block(x, (chosen.hidden,), x.new_ones(1), chosen.out)
            x = add_residual(y, x) if chosen.residual else y
        x = F.hardswish(norm(conv(x, self.head, self.arch.head), self.head_norm))
        return self.classifier(F.dropout(x.mean((2, 3)), self.dropout, self.training))
