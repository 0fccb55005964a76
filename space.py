"""What can be chosen, and what has been: the paper's tables as literal tables, and an `Arch` as JSON.

Tables 1 and 5-8 (the spaces A0..A4) and Table 2 (the eight candidates) are copied column by column.
`SPACES` holds them read: a `Space` is a chain of `Block`s, each with the options that the search chooses
from. An `Arch` is one network: a chain of choices that were made.
"""
import itertools
import json
import math
from typing import NamedTuple

# Table 2: kernel, squeeze-excite, activation.
CANDIDATES = {"ir_k3":       (3, False, "relu"),
              "ir_k5":       (5, False, "relu"),
              "ir_k3_hs":    (3, False, "hswish"),
              "ir_k5_hs":    (5, False, "hswish"),
              "ir_k3_se":    (3, True,  "relu"),
              "ir_k5_se":    (5, True,  "relu"),
              "ir_k3_se_hs": (3, True,  "hswish"),
              "ir_k5_se_hs": (5, True,  "hswish")}

# (low, high, step) are inclusive; n is the number of blocks. A row's stride is its input resolution over
# the next row's. The paper's Input column also names a channel count, which it did not update from Table
# 1 to Tables 5-8: a row's input width is the output of the row above, so only the resolution stands here.
#             input  block  expansion          filters         n
PAPER = ((  # Table 1: A0
             (224, "3x3",  1,                  16,             1),
             (112, "tbs",  1,                  (12, 16, 4),    1),
             (112, "tbs",  (0.75, 3.75, 0.5),  (16, 28, 4),    1),
             (56,  "tbs",  (0.75, 3.75, 0.5),  (16, 40, 8),    2),
             (28,  "tbs",  (0.75, 4.25, 0.5),  (48, 96, 8),    3),
             (14,  "tbs",  (0.75, 4.5, 0.75),  (72, 128, 8),   2),
             (14,  "tbs",  (0.75, 5.25, 0.75), (112, 184, 8),  2),
             (7,   "tbs",  (0.75, 5.25, 0.75), (112, 184, 8),  1),
             (7,   "1x1",  None,               1280,           1),
             (1,   "fc",   None,               1000,           1)),
         (  # Table 5: A1
             (224, "3x3",  1,                  16,             1),
             (112, "tbs",  1,                  (12, 16, 4),    1),
             (112, "tbs",  (0.75, 3.75, 0.5),  (16, 32, 4),    2),
             (56,  "tbs",  (0.75, 3.75, 0.5),  (16, 48, 8),    3),
             (28,  "tbs",  (0.75, 4.25, 0.5),  (48, 104, 8),   4),
             (14,  "tbs",  (0.75, 4.5, 0.75),  (72, 136, 8),   3),
             (14,  "tbs",  (0.75, 5.25, 0.75), (112, 224, 8),  2),
             (7,   "tbs",  (0.75, 5.25, 0.75), (112, 256, 8),  1),
             (7,   "1x1",  None,               1280,           1),
             (1,   "fc",   None,               1000,           1)),
         (  # Table 6: A2
             (224, "3x3",  1,                  16,             1),
             (112, "tbs",  1,                  (12, 16, 4),    1),
             (112, "tbs",  (0.75, 4.75, 0.5),  (16, 36, 4),    2),
             (56,  "tbs",  (0.75, 4.75, 0.5),  (16, 56, 8),    3),
             (28,  "tbs",  (0.75, 5.25, 0.5),  (48, 112, 8),   4),
             (14,  "tbs",  (0.75, 5.25, 0.75), (72, 144, 8),   4),
             (14,  "tbs",  (0.75, 5.25, 0.75), (112, 256, 8),  4),
             (7,   "tbs",  (0.75, 5.25, 0.75), (112, 256, 8),  2),
             (7,   "1x1",  None,               1280,           1),
             (1,   "fc",   None,               1000,           1)),
         (  # Table 7: A3
             (224, "3x3",  1,                  16,             1),
             (112, "tbs",  1,                  (12, 16, 4),    1),
             (112, "tbs",  (0.75, 4.75, 0.5),  (16, 36, 4),    3),
             (56,  "tbs",  (0.75, 5.25, 0.5),  (16, 64, 8),    3),
             (28,  "tbs",  (0.75, 5.25, 0.5),  (48, 128, 8),   4),
             (14,  "tbs",  (0.75, 5.25, 0.75), (72, 160, 8),   5),
             (14,  "tbs",  (0.75, 6, 0.75),    (112, 256, 8),  4),
             (7,   "tbs",  (0.75, 6, 0.75),    (112, 336, 8),  2),
             (7,   "1x1",  None,               1280,           1),
             (1,   "fc",   None,               1000,           1)),
         (  # Table 8: A4
             (224, "3x3",  1,                  16,             1),
             (112, "tbs",  1,                  (12, 16, 4),    1),
             (112, "tbs",  (0.75, 5.75, 0.5),  (16, 40, 4),    3),
             (56,  "tbs",  (0.75, 5.75, 0.5),  (16, 64, 8),    3),
             (28,  "tbs",  (0.75, 5.75, 0.5),  (48, 128, 8),   5),
             (14,  "tbs",  (0.75, 6, 0.75),    (72, 160, 8),   5),
             (14,  "tbs",  (0.75, 6, 0.75),    (112, 256, 8),  6),
             (7,   "tbs",  (0.75, 6, 0.75),    (112, 336, 8),  3),
             (7,   "1x1",  None,               1280,           1),
             (1,   "fc",   None,               1000,           1)))

# The same rules for images of 28-32 pixels on a CPU: five searched rows instead of seven. Strides, the stem's
# first, are 2, 1, 2, 1, 2, 1 (the paper's: 2, 1, 2, 2, 2, 1, 2, 1). Expansions are about 0.6 of the paper's,
# the widths of the last rows a third to a half; depth grows from 5 blocks to 11. Four rows never change.
FIRST = (    (28,  "3x3",  1,                  16,             1),
             (14,  "tbs",  1,                  (8, 16, 8),     1))
LAST = (     (4,   "1x1",  None,               256,            1),
             (1,   "fc",   None,               10,             1))
SMALL = tuple((*FIRST, *rows, *LAST) for rows in (
         (  # A0
             (14,  "tbs",  (0.75, 2.25, 0.5),  (16, 24, 8),    1),
             (7,   "tbs",  (0.75, 2.25, 0.5),  (16, 32, 8),    1),
             (7,   "tbs",  (0.75, 3, 0.75),    (32, 48, 8),    1),
             (4,   "tbs",  (0.75, 3, 0.75),    (48, 64, 8),    1)),
         (  # A1
             (14,  "tbs",  (0.75, 2.25, 0.5),  (16, 24, 8),    1),
             (7,   "tbs",  (0.75, 2.25, 0.5),  (16, 40, 8),    2),
             (7,   "tbs",  (0.75, 3, 0.75),    (32, 56, 8),    1),
             (4,   "tbs",  (0.75, 3, 0.75),    (48, 80, 8),    1)),
         (  # A2
             (14,  "tbs",  (0.75, 2.75, 0.5),  (16, 24, 8),    1),
             (7,   "tbs",  (0.75, 2.75, 0.5),  (16, 40, 8),    2),
             (7,   "tbs",  (0.75, 3.75, 0.75), (32, 64, 8),    2),
             (4,   "tbs",  (0.75, 3.75, 0.75), (48, 88, 8),    1)),
         (  # A3
             (14,  "tbs",  (0.75, 2.75, 0.5),  (16, 32, 8),    1),
             (7,   "tbs",  (0.75, 3.25, 0.5),  (16, 48, 8),    2),
             (7,   "tbs",  (0.75, 3.75, 0.75), (32, 72, 8),    3),
             (4,   "tbs",  (0.75, 4.5, 0.75),  (48, 96, 8),    2)),
         (  # A4
             (14,  "tbs",  (0.75, 3.25, 0.5),  (16, 32, 8),    2),
             (7,   "tbs",  (0.75, 3.75, 0.5),  (16, 48, 8),    3),
             (7,   "tbs",  (0.75, 4.5, 0.75),  (32, 80, 8),    3),
             (4,   "tbs",  (0.75, 4.5, 0.75),  (48, 112, 8),   2))))


class Block(NamedTuple):
    """One searchable block ("tbs"): its row in the table, its place in that row, and what it can choose."""
    row: int
    place: int                # 0 for the first block of its row
    expansions: tuple         # hidden width over input width, ascending
    widths: tuple             # output channels, ascending
    stride: int
    residual: bool            # adds its input back: exactly the blocks that are not the first of their row
    expand: bool              # has an expand convolution: all rows but the one with the literal expansion 1

    def hidden(self, inputs, option):
        """Hidden width in channels: expansion x active input width, rounded to a multiple of 8; or without an
        expand convolution the input width itself.
        """
        return round8(self.expansions[option] * inputs) if self.expand else inputs


class Space(NamedTuple):
    """One stage of the curriculum: everything that A0, or A1, .. can choose."""
    name: str
    stage: int
    resolution: int           # pixels of the square input that the table is made for
    stem: int                 # channels of the 3x3 convolution of stride 2 in front
    head: int                 # channels of the 1x1 convolution at the end
    blocks: tuple

    def arch(self, options, in_channels, classes):
        """The `Arch` of the options chosen: for each block (operation, expansion, width) as indices."""
        blocks, width = [], self.stem
        for block, (op, expansion, chosen) in zip(self.blocks, options, strict=True):
            op, hidden, width = list(CANDIDATES)[op], block.hidden(width, expansion), block.widths[chosen]
            blocks.append(ArchBlock(op, hidden, width, block.stride, block.residual, block.expand))
        return Arch(self.name, self.stage, self.resolution, in_channels, classes, self.stem, self.head,
                    tuple(blocks))


def round8(x):
    """The nearest multiple of 8 (halves up) and at least 8: the rule for hidden and squeeze widths."""
    return max(8, int(x + 4) // 8 * 8)


def options(spec):
    """`(low, high, step)` or one number -> all values. ValueError if they do not end at `high`."""
    if not isinstance(spec, tuple):
        return (spec,)
    low, high, step = spec
    values = tuple(low + i * step for i in range(int((high - low) / step) + 1))
    if values[-1] != high:
        raise ValueError(f"({low}, {high}, {step}): steps of {step} from {low} do not end at {high}")
    return values


def read(table, name, stage):
    """A literal table -> its `Space`."""
    (resolution, _, _, stem, _), *rows, (_, _, _, head, _), _ = table
    blocks = []
    for r, (size, _, expansion, filters, n) in enumerate(rows):
        stride = round(size / table[r + 2][0])                       # over the resolution of the row below
        for place in range(n):
            blocks.append(Block(r, place, options(expansion), options(filters), stride=1 if place else stride,
                                residual=place > 0, expand=expansion != 1))
    return Space(name, stage, resolution, stem, head, tuple(blocks))


# A stage only adds options to the one before, so that a supernet can grow (tests/test_space.py).
SPACES = {name: tuple(read(table, name, stage) for stage, table in enumerate(tables))
          for name, tables in (("paper", PAPER), ("small", SMALL))}


class ArchBlock(NamedTuple):
    """One block of a network. `expand` says whether it has an expand convolution; see `Arch`."""
    op: str
    hidden: int
    out: int
    stride: int
    residual: bool
    expand: bool


class Arch(NamedTuple):
    """One network: what was chosen in every block, and where it was chosen (`space` and `stage`).

    In JSON a block's `expand` is left out where it says the usual: there is an expand convolution exactly
    if `hidden` differs from the input width. It must be said where rounding makes the two equal (0.75 x
    16 gives 16).
    """
    space: str
    stage: int
    resolution: int
    in_channels: int
    classes: int
    stem: int
    head: int
    blocks: tuple

    def inputs(self):
        """The input width of every block."""
        return (self.stem, *(b.out for b in self.blocks[:-1]))

    def to_json(self):
        """The text of the JSON file, a line a block."""
        rows = []
        for i, b in zip(self.inputs(), self.blocks):
            row = b._asdict()
            if b.expand == (b.hidden != i):
                del row["expand"]
            rows.append("  " + json.dumps(row))
        facts = self._asdict()
        del facts["blocks"]
        return json.dumps(facts)[:-1] + ",\n \"blocks\": [\n" + ",\n".join(rows) + "\n ]}\n"

    @classmethod
    def from_json(cls, text):
        """The `Arch` in JSON, text or bytes. ValueError, with the block and what is wrong, if it is none."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error})") from None
        _keys(found, set(cls._fields), "the network")
        _need(isinstance(found["space"], str), f"space is {found['space']!r}, not a name")
        for key in ("stage", "resolution", "in_channels", "classes", "stem", "head"):
            _whole(found[key], {"stage": 0, "classes": 2}.get(key, 1), key)
        _need(found["resolution"] <= 2 ** 16, f"resolution {found['resolution']} is beyond reason")
        _need(isinstance(found["blocks"], list) and found["blocks"],
              "blocks is not a list of at least one block")
        blocks, width = [], found["stem"]
        for n, row in enumerate(found["blocks"]):
            blocks.append(_block(row, width, f"block {n}"))
            width = blocks[-1].out
        arch = cls(**found | {"blocks": tuple(blocks)})
        strides = total_stride(blocks)
        _need(2 * arch.resolution > strides,
              f"resolution {arch.resolution} is too small for a total stride of {strides}")
        return arch


def positions(network):
    """Where each block of an `Arch` or a `Space` stands: (its row in the tables, its place in that row)."""
    rows = list(itertools.accumulate(not block.residual for block in network.blocks))
    return [(row - 1, rows[:n].count(row)) for n, row in enumerate(rows)]


def total_stride(blocks):
    """The product of the strides of the stem and the `blocks`."""
    return 2 * math.prod(b.stride for b in blocks)


def _block(row, inputs, where):
    """The checked `ArchBlock` of a JSON object, behind a width of `inputs`."""
    _keys(row, set(ArchBlock._fields), where, optional={"expand"})
    _need(isinstance(row["op"], str) and row["op"] in CANDIDATES,
          f"{where}: op {row['op']!r} is unknown, choose from {', '.join(CANDIDATES)}")
    for key in ("hidden", "out", "stride"):
        _whole(row[key], 1, f"{where}: {key}")
    block = ArchBlock(**{"expand": row["hidden"] != inputs, **row})
    _need(block.stride in (1, 2), f"{where}: stride is {block.stride}, not 1 or 2")
    for key in ("residual", "expand"):
        value = getattr(block, key)
        _need(isinstance(value, bool), f"{where}: {key} is {value!r}, not true or false")
    _need(block.stride == 1 or not block.residual,
          f"{where}: a residual needs stride 1, but the stride is {block.stride}")
    _need(block.expand or block.hidden == inputs,
          f"{where}: without an expand convolution hidden must be the {inputs} channels that come in, "
          f"but is {block.hidden}")
    return block


def _need(condition, message):
    if not condition:
        raise ValueError(message)


def _keys(found, names, where, optional=frozenset()):
    _need(isinstance(found, dict), f"{where} is not a JSON object")
    for key in sorted(names - set(found) - optional):
        raise ValueError(f"{where}: {key!r} is missing")
    for key in sorted(set(found) - names):
        raise ValueError(f"{where}: {key!r} is unknown")


def _whole(value, least, what):
    _need(isinstance(value, int) and not isinstance(value, bool) and value >= least,
          f"{what} is {value!r}, not a whole number of at least {least}")
