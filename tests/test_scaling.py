"""What is promised: compound scaling (Fig. 5) makes all rows of a network wider and deeper, within a budget.

The oracle of what a network costs is the tests' own formula.
"""
import itertools

import pytest
from oracles import chosen, macs, random_options, seeded

from scaling import scale
from space import SPACES, Arch


def test_compound_scaling_fits_its_budget_and_grows_all_rows_alike():
    def rows(arch):
        starts = [n for n, b in enumerate(arch.blocks) if not b.residual] + [len(arch.blocks)]
        return [arch.blocks[a:b] for a, b in itertools.pairwise(starts)]
    arch = chosen(SPACES["small"][1], random_options(SPACES["small"][1], seeded(3)))
    sizes = []
    for factor in (1, 1.5, 2, 4):
        scaled = scale(arch, 2, factor * macs(arch))
        assert macs(scaled) <= factor * macs(arch) and scaled.stage == 2
        assert Arch.from_json(scaled.to_json()) == scaled
        assert (scaled.stem, scaled.head, scaled.resolution) == (arch.stem, arch.head, arch.resolution)
        for old, new in zip(rows(arch), rows(scaled), strict=True):
            repeated = [old[min(n, len(old) - 1)] for n in range(len(new))]  # the last one is repeated
            assert [b.op for b in new] == [b.op for b in repeated]
            assert [b.stride for b in new] == [old[0].stride] + [1] * (len(new) - 1)
            assert all(b.out >= a.out for a, b in zip(repeated, new))
        sizes.append(macs(scaled))
    assert sizes == sorted(sizes) and sizes[0] == macs(arch) and sizes[-1] > 2 * macs(arch)
    with pytest.raises(ValueError, match="does not fit"):
        scale(arch, 1, macs(arch) - 1)


def test_compound_scaling_begins_at_the_network_itself_and_goes_in_the_steps_of_its_table():
    space, g = SPACES["paper"][0], seeded(1)
    rows = [b for b in space.blocks if not b.residual]
    for _ in range(20):                                                   # widths of 12, 20, 28 among them
        arch = chosen(space, random_options(space, g), 3, 1000)
        assert scale(arch, 2, macs(arch)) == arch._replace(stage=2)
        n = -1
        for block in scale(arch, 2, 2 * macs(arch)).blocks:
            n += not block.residual
            assert (block.out - rows[n].widths[0]) % (rows[n].widths[1] - rows[n].widths[0]) == 0
