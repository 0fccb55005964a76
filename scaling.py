"""Compound scaling: larger networks without a search, to compare with (Fig. 5).

The paper leaves its multiplier open: depth 1.2^phi and width 1.1^phi are EfficientNet's (Tan and Le 2019).
"""
from machinery import files

from flops import macs
from space import SPACES, round8


def scale(arch, stage, target):
    """`arch` in larger widths and depths, as the network of a later `stage`: of at most `target` MACs.

    The largest phi, in steps of 0.05, that fits. Stem, head and resolution stay. Widths go in the steps of
    the space's own table, so that phi = 0 is `arch` itself. Rows of equal depth get a block at the same phi,
    so the last steps may leave much of the target unused. files.Refused if not even `arch` fits.
    """
    best, phi = None, 0.0
    while (scaled := _scaled(arch, stage, 1.2 ** phi, 1.1 ** phi)) and macs(scaled) <= target:
        best, phi = scaled, phi + 0.05
    if best is None:
        raise files.Refused(f"the network of {macs(arch):,} MACs does not fit into {target:,.0f} at all")
    return best


def _scaled(arch, stage, depth, width):
    """`arch` with every row's depth and every block's widths multiplied; a row's last block is repeated."""
    rows, blocks = [], []
    steps = [b.widths[1] - b.widths[0] for b in SPACES[arch.space][arch.stage].blocks if not b.residual]
    for block in arch.blocks:
        if not block.residual:
            rows.append([])
        rows[-1].append(block)
    for row, step in zip(rows, steps, strict=True):
        row += [row[-1]._replace(stride=1, residual=True, expand=True)] * (round(len(row) * depth) - len(row))
        for b in row:
            hidden = round8(b.hidden * width) if b.expand else blocks[-1].out if blocks else arch.stem
            blocks.append(b._replace(hidden=hidden, out=int(b.out * width / step + 0.5) * step))
    return arch._replace(stage=stage, blocks=tuple(blocks))
