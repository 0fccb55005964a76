"""A world in which a whole search takes a second: stages of two to four blocks, 240 images of 16 pixels.

It stands in for the small space and the `fake` images, also in the processes that a test starts.
"""
import data
import derive
import flops
import plot
import search
import train
from space import SPACES, read

# The columns of space.py's tables. Every stage adds a block, widths or expansions.
STAGES = [(("tbs", (0.75, 1.75, 1), (8, 16, 8), 1), ("tbs", (0.75, 1.75, 1), (8, 16, 8), 1)),
          (("tbs", (0.75, 1.75, 1), (8, 16, 8), 1), ("tbs", (0.75, 1.75, 1), (8, 24, 8), 2)),
          (("tbs", (0.75, 2.75, 1), (8, 16, 8), 1), ("tbs", (0.75, 2.75, 1), (8, 32, 8), 2)),
          (("tbs", (0.75, 2.75, 1), (8, 16, 8), 1), ("tbs", (0.75, 3.75, 1), (8, 40, 8), 2)),
          (("tbs", (0.75, 2.75, 1), (8, 16, 8), 1), ("tbs", (0.75, 3.75, 1), (8, 40, 8), 3))]
SHORT = ["--data", "fake", "--epochs", "0.9", "--batch-size", "16", "--checkpoint-every", "4",
         "--device", "cpu"]                             # ten steps a stage, two of them of alpha as well
curve = plot.curve


def spaces():
    for stage, (first, second) in enumerate(STAGES):
        yield read(((16, "3x3", 1, 8, 1), (8, *first), (4, *second), (4, "1x1", None, 16, 1),
                    (1, "fc", None, 10, 1)), "small", stage)


def shrink(patch):
    """patch: a pytest.MonkeyPatch. No curve is drawn: that takes longer than such a search."""
    load = data.load
    sizes = {"train": (240, (0,)), "test": (96, (1,))}
    stages = tuple(spaces())
    ends = [flops.bounds(flops.costs(space, 1, 10)) for space in stages]
    patch.setattr(data, "load", lambda name, part: (
        data.fake(*sizes[part], size=16) if name == "fake" else load(name, part)))
    patch.setitem(SPACES, "small", stages)
    patch.setitem(flops.TARGETS, "small", tuple((low * high) ** 0.5 for low, high in ends))
    for module in (derive, train):
        patch.setattr(module, "RECALIBRATION", 4)
    patch.setattr(search, "HISTORY", 3)
    patch.setattr(plot, "curve", lambda *_: None)
