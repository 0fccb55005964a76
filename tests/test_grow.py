"""SuperNet2SuperNet (Eqs. 1-3, Fig. 1): the larger supernet's largest network computes the same as before.

The oracle is the smaller supernet itself: its logits, in eval mode, with batch-norm statistics, scales and
shifts that are not trivial. What the equations say of single weights is checked on the maps f, which are read
off the copied batch-norm vectors, since no two values in an old one are alike.
"""
import copy
import functools
import itertools

import pytest
import torch
from oracles import assert_same_logits, images, random_options, seeded, settle, share_of_images
from torch import nn
from torch.testing import assert_close

from grow import WIDENINGS, channel_map, consume, describe, grow, movement
from space import SPACES
from supernet import CHOICES, Draw, SuperNet

ENDS = ("stem", "stem_norm", "head", "head_norm", "classifier")


def apart(found, wanted):
    """By how much two tensors differ, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def chain(name, widen, stages=4, dtype=torch.float32):
    """(old, new) for each growth A0 -> A1 -> ..; the old one is as after training, as the new one will be."""
    new = SuperNet(SPACES[name][0], 3, 10, seeded()).to(dtype)
    for stage in range(stages):
        old = settle(new, stage).eval()
        new = grow(old, SPACES[name][stage + 1], seeded(stage), widen)
        yield old, new


@functools.cache
def small(widen="eq3"):
    """The four growths of the small space: tests only read them."""
    return [(old, copy.deepcopy(new)) for old, new in chain("small", widen)]


def counterparts(old, new):
    """(old block or None, new block) in order."""
    blocks = {(b.block.row, b.block.place): b for b in old.blocks}
    return [(blocks.get((b.block.row, b.block.place)), b) for b in new.blocks]


def inserted(old, new, path, g):
    """An old path in the new supernet: a new block draws anything, but of the width before it, once."""
    path, found = iter(path), []
    for before, after in counterparts(old, new):
        if before is not None:
            found.append(next(path))
            continue
        width = found[-1]["width"].options[-1:]                          # one row, so the same index
        pair = tuple(sorted(torch.randperm(8, generator=g)[:2].tolist()))
        ends = (0, len(after.block.expansions) - 1)
        found.append({"op": Draw(pair, torch.tensor([0.4, 0.6])), "width": Draw(width, torch.ones(1)),
                      "expansion": Draw(ends, torch.tensor([0.3, 0.7]))})
    return found


@pytest.mark.parametrize("name, widen, stages, dtype, most", [
    ("small", "eq3", 4, torch.float32, 1e-4), ("small", "split", 4, torch.float32, 1e-4),
    ("paper", "eq3", 1, torch.float32, 1e-4),
    pytest.param("paper", "eq3", 4, torch.float64, 1e-11, marks=pytest.mark.slow)])   # where rounding adds up
@torch.no_grad()
def test_the_grown_supernet_computes_the_same_at_its_largest(name, widen, stages, dtype, most, monkeypatch):
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda *_, **__: None)         # overwritten, and slow
    x, g = images(8, 3, 32, 50).to(dtype), seeded(9)
    for old, new in small(widen) if name == "small" else chain(name, widen, stages, dtype):
        for op in range(8):
            before = old(x, old.path([(op, -1, -1)] * len(old.blocks)))
            after = new(x, new.path([(op, -1, -1)] * len(new.blocks)))
            assert share_of_images(before) > 5e-3 and apart(after, before) < most
        for _ in range(2):                                          # and with operations that differ by block
            options = [(int(torch.randint(8, (1,), generator=g)), -1, -1) for _ in new.blocks]
            kept = [o for o, (before, _) in zip(options, counterparts(old, new)) if before is not None]
            assert apart(new(x, new.path(options)), old(x, old.path(kept))) < most


@torch.no_grad()
def test_growth_is_as_exact_as_its_numbers():
    """In float64 nothing of the supernet is rounded to float32 on the way."""
    old, x = settle(SuperNet(SPACES["small"][2], 1, 10, seeded())).double().eval(), images(2, 1, 28).double()
    for widen in ("eq3", "split", "zero"):
        new = grow(old, SPACES["small"][3], seeded(), widen)
        before, after = (net(x, net.path([(7, -1, -1)] * len(net.blocks))) for net in (old, new))
        assert after.dtype == torch.float64 and apart(after, before) < 1e-12


@pytest.mark.parametrize("name", ["small", pytest.param("paper", marks=pytest.mark.slow)])
@torch.no_grad()
def test_zero_widening_preserves_every_sub_network(name):
    x, g = images(2, 3, 32, 50).double(), seeded(3)
    for pair in small("zero") if name == "small" else chain(name, "zero", 1):
        old, new = (copy.deepcopy(net).double() for net in pair)
        for _ in range(8):
            path = old.path(random_options(old.space, g))
            assert_same_logits(new(x, inserted(old, new, path, g)), old(x, path))


@torch.no_grad()
def test_eq_3_alone_does_not_preserve_narrower_networks():
    """Why `zero` is there: a prefix has the divided weights, but lacks the copies."""
    for widen in ("eq3", "split"):
        old, new = small(widen)[2]
        x, g, path = images(2, 3, 32, 50), seeded(), old.path([(0, -1, 0)] * 7)
        assert apart(new(x, inserted(old, new, path, g)), old(x, path)) > 1e-2


@torch.no_grad()
def test_naive_growth_does_not_preserve_the_function():
    x = images(2, 3, 32, 50)
    for old, new in small("naive"):
        for op in range(8):
            before = old(x, old.path([(op, -1, -1)] * len(old.blocks)))
            assert apart(new(x, new.path([(op, -1, -1)] * len(new.blocks))), before) > 0.02
        kept = [(before.layers, after.layers) for before, after in counterparts(old, new) if before]
        for before, after in (*kept, *((getattr(old, layer), getattr(new, layer)) for layer in ENDS)):
            found = after.state_dict()                                  # old weights are in the old places
            for name, tensor in before.state_dict().items():
                assert torch.equal(found[name][tuple(slice(n) for n in tensor.shape)], tensor)


@pytest.mark.parametrize("widen", WIDENINGS)
def test_growth_leaves_the_old_supernet_as_it_is(widen):
    old = settle(SuperNet(SPACES["small"][0], 1, 10, seeded()))
    before, x = copy.deepcopy(old.state_dict()), images(2, 1, 16)
    for training in (True, False):
        new = grow(old.train(training), SPACES["small"][1], seeded(), widen)
        assert old.training == training == new.training and old.space == SPACES["small"][0]
        new.train()(x, new.sample(1.0, seeded())).sum().backward()
        with torch.no_grad():
            for p in new.parameters():
                p.fill_(7)
        assert all(torch.equal(tensor, before[name]) for name, tensor in old.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in old.parameters())
        assert all(p.requires_grad for p in new.parameters())


def test_growth_is_a_function_of_its_generator():
    old = settle(SuperNet(SPACES["small"][0], 1, 10, seeded()))
    one, same, other = (grow(old, SPACES["small"][1], seeded(s)).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_another_widening_is_refused():
    with pytest.raises(ValueError, match="'eq4', choose from eq3, split, zero, naive"):
        grow(SuperNet(SPACES["small"][0], 1, 10), SPACES["small"][1], widen="eq4")


@pytest.mark.parametrize("op", range(8))
@pytest.mark.parametrize("widen", ["eq3", "split", "zero"])
def test_a_new_block_is_exactly_the_identity(op, widen):
    old, new = small(widen)[2]
    added = [after for before, after in counterparts(old, new) if before is None]
    assert added
    for training, block in itertools.product((False, True), added):
        block = copy.deepcopy(block).train(training)
        for option, e in itertools.product((0, -1), (0, -1)):
            x = torch.randn(2, block.block.widths[option], 5, 5, generator=seeded(op))
            for signed in (x, x.abs(), -x.abs()):
                one = {name: Draw((i,), torch.ones(1)) for name, i in zip(CHOICES, (op, e, option))}
                widths = (x.shape[1],), torch.ones(1)
                assert torch.equal(block(signed, widths, one)[0], signed)


@pytest.mark.parametrize("op", range(8))
def test_a_new_block_learns_from_the_first_step(op):
    old, new = small()[2]
    for before, after in counterparts(old, new):
        if before is None:
            block = copy.deepcopy(after).train()
            x = torch.randn(3, block.block.widths[-1], 5, 5, generator=seeded(op))
            one = {name: Draw((i,), torch.ones(1)) for name, i in zip(CHOICES, (op, -1, -1))}
            y, _ = block(x, ((x.shape[1],), torch.ones(1)), one)
            (y * torch.randn(y.shape, generator=seeded(8))).sum().backward()
            scale = block.layers.norm3.weight
            assert (scale.grad != 0).all() and scale.count_nonzero() == 0


def test_a_new_block_has_identity_kernels():
    """As the paper says: without what lies between them, they map every channel to itself."""
    old, new = small()[2]
    for before, after in counterparts(old, new):
        if before is None:
            c = after.layers
            expand, project = c.expand.weight[:, :, 0, 0], c.project.weight[:, :, 0, 0]
            assert set(expand.flatten().tolist()) == {0, 1} and (expand.sum(1) == 1).all()
            assert_close(project @ expand, torch.eye(after.block.widths[-1]))
            assert (project.count_nonzero(0) == 1).all()                # Eq. 3: every copy has its share
            centre = nn.functional.pad(torch.ones(1, 1), (2,) * 4)
            assert torch.equal(c.depthwise.weight, centre.expand_as(c.depthwise.weight))


@pytest.mark.parametrize("widen", WIDENINGS)
def test_architecture_parameters_are_inherited(widen):
    for old, new in small(widen):
        for before, after in counterparts(old, new):
            for name, alpha in after.alphas.items():
                if before is None:
                    previous = new.blocks[list(new.blocks).index(after) - 1]
                    start = previous.alphas[name] if name == "width" else torch.zeros(len(alpha))   # uniform
                    assert torch.equal(alpha, start)
                    continue
                known = before.alphas[name]
                assert torch.equal(alpha[:len(known)], known)
                assert (alpha[len(known):] == known[-1]).all()          # equals the old largest in function


def test_eq_1_keeps_old_channels_and_samples_the_new_ones():
    f = channel_map(8, 4000, seeded())
    assert f[:8].tolist() == list(range(8)) and f.dtype == torch.long and len(f) == 4000
    assert torch.bincount(f[8:]).tolist() == [499] * 8
    assert channel_map(8, 8, seeded()).tolist() == list(range(8))


def test_no_channel_is_copied_twice_before_all_are_once():
    counts = torch.zeros(8)
    for seed in range(400):
        f = channel_map(8, 19, seeded(seed))
        assert sorted(f[8:16].tolist()) == list(range(8)) and len(set(f[16:].tolist())) == 3
        counts += torch.bincount(f[16:], minlength=8)
    assert ((counts - 150).square() / 150).sum() < 24.3             # chi-square, 7 degrees, 0.1 %


def test_split_shares_are_random_positive_and_sum_to_one():
    """For each output other ones, and for all of a channel's copies; what has no copy keeps its weight."""
    f = torch.tensor([0, 1, 2, 0, 2, 0])
    share = consume(torch.ones(50, 3, 1, 1), f, "split", seeded()).view(50, 6)
    assert (share > 0).all() and (share[:, 1] == 1).all()
    for channel, copies in ((0, 3), (2, 2)):
        mine = share[:, f == channel]
        assert mine.shape[1] == copies
        assert_close(mine.sum(1), torch.ones(50))
        assert (mine.std(0) > 0.1).all() and (mine.mean(0) - 1 / copies).abs().max() < 0.15


def sources(old, new):
    """Read the map f off two vectors: the place in `old`, whose values all differ, of each value in `new`."""
    same = new.view(-1, 1) == old.view(1, -1)
    assert (same.sum(1) == 1).all()
    f = same.int().argmax(1)
    assert f[:len(old)].tolist() == list(range(len(old)))               # Eq. 1: the old channels stay
    return f


def shared(new, old, f_out, f_in):
    """Eqs. 2 and 3: new filters are copies; over the copies of an input channel the weights add up."""
    summed = torch.zeros(len(f_out), *old.shape[1:]).index_add(1, f_in, new)
    assert_close(summed, old[f_out], rtol=1e-5, atol=1e-6)
    counts = torch.bincount(f_in, minlength=old.shape[1])
    assert_close(new, (old / counts.view(1, -1, 1, 1))[f_out][:, f_in], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_one_map_serves_all_that_carry_a_channel():
    """Producers, batch norms, depthwise filters, squeeze and excite, the residual chain, the consumer."""
    old, new = small()[2]
    f_in, rows, wider = torch.arange(16), {}, 0
    for before, after in counterparts(old, new):
        f_row = rows.get(after.block.row)
        if f_row is None:                                               # from the first block of the row
            f_row = sources(before.layers.norm3.bias, after.layers.norm3.bias)
            rows[after.block.row] = f_row
        if before is None:
            f_in = f_row
            continue
        a, b = before.layers, after.layers
        f = f_in if a.expand is None else sources(a.norm1.bias, b.norm1.bias)
        if a.expand is not None:
            shared(b.expand.weight, a.expand.weight, f, f_in)
        for mine, theirs, g in ((b.norm1, a.norm1, f), (b.norm2, a.norm2, f), (b.norm3, a.norm3, f_row)):
            for what in ("weight", "bias") if mine is not None else ():
                assert torch.equal(getattr(mine, what), getattr(theirs, what)[g])
        assert torch.equal(b.depthwise.weight, a.depthwise.weight[f])
        f_squeeze = sources(a.squeeze.bias, b.squeeze.bias)
        shared(b.squeeze.weight, a.squeeze.weight, f_squeeze, f)
        shared(b.excite.weight, a.excite.weight, f, f_squeeze)
        assert torch.equal(b.excite.bias, a.excite.bias[f])
        shared(b.project.weight, a.project.weight, f_row, f)
        wider += len(f) - len(a.norm2.weight)
        f_in = f_row
    shared(new.head.weight, old.head.weight, torch.arange(256), f_in)
    assert wider > 0 and any(len(f) > len(set(f.tolist())) for f in rows.values())
    for name in set(ENDS) - {"head"}:
        for p, q in zip(getattr(new, name).state_dict().values(), getattr(old, name).state_dict().values()):
            assert torch.equal(p, q)


@torch.no_grad()
def test_copies_are_drawn_anew_for_every_set_of_channels():
    """Eq. 1 draws one map for each; the hidden channels of two blocks are two sets, also in one row."""
    old, new = small()[3]
    one, other = (sources(a.layers.norm1.bias, b.layers.norm1.bias).tolist()
                  for a, b in counterparts(old, new) if a is not None and a.block[:2] in ((3, 1), (3, 2)))
    assert len(one) == len(other) and one != other


def train(net, steps=10):
    """Train the largest network by gradient descent on random images."""
    x, y, path = images(8, 1, 28), torch.arange(8), net.train().path([(0, -1, -1)] * len(net.blocks))
    sgd = torch.optim.SGD(net.weights(), 0.05)
    for _ in range(steps):
        sgd.zero_grad()
        nn.functional.cross_entropy(net(x, path), y).backward()
        sgd.step()


def twins(layers):
    """The share of hidden channels that do the same as another one, up to their size: cosines above 0.99."""
    same = 1
    for weight in (layers.expand.weight, layers.depthwise.weight, layers.project.weight.transpose(0, 1)):
        unit = nn.functional.normalize(weight.detach().flatten(1), dim=1)
        same = same * (unit @ unit.T > 0.99)
    return float((same.sum(1) > 1).float().mean())


def test_uneven_shares_part_the_copies_and_equal_ones_do_not():
    """Eq. 3 in equal shares leaves twins, which add nothing to the network however long it trains."""
    old = settle(SuperNet(SPACES["small"][0], 1, 10, seeded()))
    share = {}
    for widen in ("eq3", "split"):
        new = grow(old, SPACES["small"][1], seeded(), widen)
        train(new)
        share[widen] = twins(new.blocks[-1].layers)
    hidden, before = (net.blocks[-1].block.hidden(net.blocks[-2].block.widths[-1], -1) for net in (new, old))
    assert share["eq3"] == pytest.approx(2 * (hidden - before) / hidden) and share["split"] < 0.05


@torch.no_grad()
def test_consumers_ignore_new_channels_after_zero_widening():
    for old, new in small("zero"):
        for before, after in counterparts(old, new):
            for name in ("expand", "squeeze", "excite", "project") if before is not None else ():
                was, now = (getattr(block.layers, name) for block in (before, after))
                if was is not None:
                    o, i = was.weight.shape[:2]
                    assert torch.equal(now.weight[:o, :i], was.weight) and not now.weight[:, i:].any()


@torch.no_grad()
def test_the_report_of_growth_is_right():
    old, new = small()[2]
    x = images(2, 3, 32, 50)
    wanted = [apart(new(x, new.path([(op, -1, -1)] * len(new.blocks))),
                    old(x, old.path([(op, -1, -1)] * len(old.blocks)))) for op in range(8)]
    assert movement(old, new, x) == pytest.approx(max(wanted))
    text = describe(old, new, x)
    assert f"moved by {max(wanted):.1e} of their size" in text
    assert f"from A2: {len(old.blocks)} -> {len(new.blocks)} blocks" in text and "88 -> 96" in text
    millions = [sum(p.numel() for name, p in net.named_parameters() if ".alphas." not in name) / 1e6
                for net in (old, new)]
    assert "{:.2f} -> {:.2f} M weights".format(*millions) in text
