"""What can be chosen: each stage only adds options (Tables 1, 5-8), and an `Arch` survives its JSON.

The oracles are the tables' own columns, plain convolution arithmetic, and hand-made breaches with the message
that each must get.
"""
import itertools
import json

import pytest
from oracles import TINY, chosen, near8, pixels, random_options, seeded

import space
from space import PAPER, SMALL, SPACES, Arch, ArchBlock, options, read, round8

STAGES = [(name, stage) for name in SPACES for stage in range(5)]


@pytest.mark.parametrize("spec, values", [
    ((12, 16, 4), (12, 16)), ((16, 16, 8), (16,)), (1, (1,)), ((0.75, 2.25, 0.5), (0.75, 1.25, 1.75, 2.25)),
    ((0.75, 6, 0.75), (0.75, 1.5, 2.25, 3, 3.75, 4.5, 5.25, 6)),
    ((112, 184, 8), (112, 120, 128, 136, 144, 152, 160, 168, 176, 184))])
def test_low_high_step_is_inclusive(spec, values):
    assert options(spec) == values


def test_steps_that_miss_high_are_refused():
    with pytest.raises(ValueError, match=r"\(16, 30, 8\).*30"):
        options((16, 30, 8))


def test_widths_round_to_the_nearest_multiple_of_8():
    halves = [n / 4 for n in range(1, 4000)]
    assert [round8(x) for x in halves] == [near8(x) for x in halves]
    assert [round8(x) for x in (1, 8, 11.9, 12, 20, 42)] == [8, 8, 8, 16, 24, 40]


def test_every_stage_only_adds_options():
    for name in SPACES:
        for small, large in itertools.pairwise(SPACES[name]):
            assert (small.stem, small.head, small.resolution) == (large.stem, large.head, large.resolution)
            places = {(b.row, b.place): b for b in large.blocks}
            for old in small.blocks:
                new = places[old.row, old.place]
                assert set(old.expansions) <= set(new.expansions) and set(old.widths) <= set(new.widths)
                assert old.expansions == new.expansions[:len(old.expansions)]    # the indices of options stay
                assert old.widths == new.widths[:len(old.widths)]
                assert (old.stride, old.residual, old.expand) == (new.stride, new.residual, new.expand)
            assert {row for row, _ in places} == {b.row for b in small.blocks}      # no new rows
            assert len(large.blocks) > len(small.blocks) or large.blocks != small.blocks


def test_strides_lead_from_one_input_resolution_to_the_next():
    for name, tables in (("paper", PAPER), ("small", SMALL)):
        for table, found in zip(tables, SPACES[name]):
            size = pixels(table[0][0], 3, 2)                                         # the stem has stride 2
            for r, row in enumerate(table[1:-2]):
                assert size == row[0]
                for b in found.blocks:
                    size = pixels(size, 3, b.stride) if b.row == r else size
            assert size == table[-2][0]


def test_only_the_first_block_of_a_row_strides_and_only_the_others_add_their_input():
    for name, stage in STAGES:
        blocks = SPACES[name][stage].blocks
        assert [(b.row, b.place) for b in blocks] == sorted({(b.row, b.place) for b in blocks})
        for b in blocks:
            assert b.residual == (b.place > 0) and (b.stride == 1 or b.place == 0)
            assert b.expand == (b.row > 0)                                       # row 2 alone has expansion 1
            assert all(a < c for both in (b.widths, b.expansions) for a, c in itertools.pairwise(both))


def test_the_paper_space_has_the_papers_blocks():
    def rows(found, what):
        return [what([b for b in found.blocks if b.row == r]) for r in range(7)]
    counts = [(1, 1, 2, 3, 2, 2, 1), (1, 2, 3, 4, 3, 2, 1), (1, 2, 3, 4, 4, 4, 2), (1, 3, 3, 4, 5, 4, 2),
              (1, 3, 3, 5, 5, 6, 3)]
    for found, count in zip(SPACES["paper"], counts, strict=True):
        assert (found.resolution, found.stem, found.head) == (224, 16, 1280)
        assert tuple(rows(found, len)) == count
        assert rows(found, lambda blocks: blocks[0].stride) == [1, 2, 2, 2, 1, 2, 1]
    assert SPACES["paper"][0].blocks[3].widths == (16, 24, 32, 40)
    assert SPACES["paper"][4].blocks[-1].expansions == (0.75, 1.5, 2.25, 3, 3.75, 4.5, 5.25, 6)


def test_the_small_space_grows_from_5_blocks_to_11():
    depths = [len(found.blocks) for found in SPACES["small"]]
    assert depths[0] == 5 and depths[-1] == 11 and depths == sorted(depths)
    for found in SPACES["small"]:
        firsts = [b.stride for b in found.blocks if b.place == 0]
        assert firsts == [1, 2, 1, 2, 1] and 2 * 2 * 2 * 4 - 4 == found.resolution == 28


def test_reading_a_table_gives_each_block_its_row():
    found = read(((32, "3x3", 1, 16, 1), (16, "tbs", 1, (8, 16, 8), 1), (16, "tbs", (0.5, 1, 0.5), 24, 2),
                  (8, "1x1", None, 64, 1), (1, "fc", None, 10, 1)), "mine", 3)
    assert found == space.Space("mine", 3, 32, 16, 64, (
        space.Block(0, 0, (1,), (8, 16), 1, False, False), space.Block(1, 0, (0.5, 1), (24,), 2, False, True),
        space.Block(1, 1, (0.5, 1), (24,), 1, True, True)))


@pytest.mark.parametrize("name, stage", STAGES)
def test_a_network_survives_its_json(name, stage):
    g = seeded(stage)
    for _ in range(20):
        arch = chosen(SPACES[name][stage], random_options(SPACES[name][stage], g), 3, 100)
        text = arch.to_json()
        assert Arch.from_json(text) == arch and len(text.splitlines()) == len(arch.blocks) + 3
        rows = json.loads(text)["blocks"]
        for row, b, inputs in zip(rows, arch.blocks, (arch.stem, *(b.out for b in arch.blocks))):
            # the usual: no expand convolution, and hidden = input; or one that changes the width
            assert ("expand" in row) == (b.expand and b.hidden == inputs)


def test_expand_must_be_said_where_rounding_makes_hidden_the_input():
    arch = chosen(TINY, [(0, 0, 0), (3, 0, 0), (3, 0, 0)])             # 0.75 x 8 is 6, rounded to 8
    assert [(b.hidden, b.expand) for b in arch.blocks] == [(8, False), (8, True), (8, True)]
    assert Arch.from_json(arch.to_json()) == arch
    found = json.loads(arch.to_json())
    del found["blocks"][1]["expand"]
    assert Arch.from_json(json.dumps(found)).blocks[1] == ArchBlock("ir_k5_hs", 8, 8, 2, False, expand=False)


def test_the_json_is_as_documented():
    arch = Arch("small", 0, 28, 1, 10, 16, 256, (ArchBlock("ir_k3_se_hs", 64, 24, 2, False, True),))
    assert json.loads(arch.to_json()) == {
        "space": "small", "stage": 0, "resolution": 28, "in_channels": 1, "classes": 10, "stem": 16,
        "head": 256,
        "blocks": [{"op": "ir_k3_se_hs", "hidden": 64, "out": 24, "stride": 2, "residual": False}]}


def spoilt(where, **values):
    """The JSON of three blocks, with keys changed or dropped (`...`) in one of them or at the top."""
    found = json.loads(chosen(TINY, [(0, 0, 0), (7, 2, 1), (2, 2, 1)]).to_json())
    target = found if where is None else found["blocks"][where]
    target |= values
    for key in [key for key, value in target.items() if value is ...]:
        del target[key]
    return json.dumps(found)


@pytest.mark.parametrize("text, message", [
    ("", r"not JSON"),
    ("{", r"not JSON"),
    ("[" * 100_000, r"not JSON"),
    ("[]", r"the network is not a JSON object"),
    ("3", r"the network is not a JSON object"),
    ("null", r"the network is not a JSON object"),
    ("{}", r"the network: '\w+' is missing"),
    (spoilt(None, head=...), r"the network: 'head' is missing"),
    (spoilt(None, blocks=...), r"the network: 'blocks' is missing"),
    (spoilt(None, colour="red"), r"the network: 'colour' is unknown"),
    (spoilt(None, space=3), r"space is 3, not a name"),
    (spoilt(None, stage=-1), r"stage is -1"),
    (spoilt(None, stage=True), r"stage is True"),
    (spoilt(None, resolution=0), r"resolution is 0"),
    (spoilt(None, resolution=28.0), r"resolution is 28.0, not a whole number"),
    (spoilt(None, in_channels="1"), r"in_channels is '1'"),
    (spoilt(None, classes=1), r"classes is 1, not a whole number of at least 2"),
    (spoilt(None, classes=None), r"classes is None"),
    (spoilt(None, stem=0), r"stem is 0"),
    (spoilt(None, head=[]), r"head is \[\]"),
    (spoilt(None, blocks=[]), r"blocks is not a list of at least one block"),
    (spoilt(None, blocks={}), r"blocks is not a list of at least one block"),
    (spoilt(None, blocks=[3]), r"block 0 is not a JSON object"),
    (spoilt(None, resolution=2), r"resolution 2 is too small for a total stride of 4"),
    (spoilt(1, op=...), r"block 1: 'op' is missing"),
    (spoilt(1, residual=...), r"block 1: 'residual' is missing"),
    (spoilt(2, kernel=3), r"block 2: 'kernel' is unknown"),
    (spoilt(2, op="ir_k7"), r"block 2: op 'ir_k7' is unknown, choose from ir_k3, "),
    (spoilt(2, op=["ir_k3"]), r"block 2: op \['ir_k3'\] is unknown"),
    (spoilt(2, hidden=0), r"block 2: hidden is 0"),
    (spoilt(2, hidden=1e3), r"block 2: hidden is 1000.0"),
    (spoilt(1, out=-8), r"block 1: out is -8"),
    (spoilt(1, out=None), r"block 1: out is None"),
    (spoilt(1, stride=3), r"block 1: stride is 3, not 1 or 2"),
    (spoilt(1, stride=False), r"block 1: stride is False"),
    (spoilt(2, residual=1), r"block 2: residual is 1, not true or false"),
    (spoilt(1, expand="yes"), r"block 1: expand is 'yes', not true or false"),
    (spoilt(1, expand=None), r"block 1: expand is None, not true or false"),
    (spoilt(1, residual=True), r"block 1: a residual needs stride 1, but the stride is 2"),
    (spoilt(1, expand=False), r"block 1: without an expand convolution hidden must be the 8 .*, but is 24"),
    (spoilt(0, expand=False, hidden=16), r"block 0: without an expand convolution hidden must be the 8 ")])
def test_a_bad_json_is_refused_by_block_and_key(text, message):
    with pytest.raises(ValueError, match=message):
        Arch.from_json(text)


def test_a_network_must_not_be_strided_away():
    Arch.from_json(spoilt(None, resolution=4))
    blocks = json.loads(chosen(TINY, [(0, 0, 0), (7, 2, 1), (2, 2, 1)]).to_json())["blocks"]
    with pytest.raises(ValueError, match="resolution 8 is too small for a total stride of 16"):
        Arch.from_json(spoilt(None, blocks=[blocks[0], *[blocks[1] | {"hidden": 48}] * 3]))
