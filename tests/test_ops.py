"""The eight candidates (Table 2): expand, depthwise, squeeze-excite or not, project, at any prefix width, and
with one set of weights.

The oracle is a plain nn.Sequential of nn.Conv2d, nn.BatchNorm2d and torchvision's SqueezeExcitation, built
at the narrow width from the leading corner of every weight. For masks: all channels, then multiplied.
"""
import itertools

import pytest
import torch
import torch.nn.functional as F
from oracles import (
    OPS,
    fit,
    kernel,
    masked_candidate,
    near8,
    pixels,
    plain_candidate,
    seeded,
    soft_mask,
    stir,
)
from torch import nn
from torch.testing import assert_close

from ops import InvertedResidual, add_residual, conv, mask, norm
from space import CANDIDATES

WIDE = (16, 48, 24)                                                     # inputs, hidden, outputs
NARROW = (WIDE, (8, 48, 24), (16, 24, 24), (16, 48, 8), (8, 8, 8), (12, 40, 20))


def layers(stride=1, expand=True, wide=WIDE):
    inputs, hidden, outputs = wide
    return stir(InvertedResidual(inputs, hidden if expand else inputs, outputs, stride, expand).double())


def image(channels, size=5, seed=1):
    return torch.randn(3, channels, size, size, generator=seeded(seed), dtype=torch.float64)


def test_table_2_has_eight_candidates_named_by_what_they_are():
    assert tuple(CANDIDATES) == OPS
    for op, (k, se, activation) in CANDIDATES.items():
        assert k == kernel(op) and se == ("_se" in op) and activation == ("hswish" if "_hs" in op else "relu")


@pytest.mark.parametrize("op", OPS)
def test_a_candidate_at_any_prefix_width_is_a_plain_one_with_sliced_weights(op):
    for stride, expand in itertools.product((1, 2), (True, False)):
        for inputs, hidden, outputs in NARROW:
            hidden = hidden if expand else inputs
            wide = layers(stride, expand)
            plain = plain_candidate(wide, op, inputs, hidden, outputs, stride, expand)
            x = image(inputs)
            found, = wide(x, [op], (hidden,), torch.ones(1), outputs)
            assert found.shape == (3, outputs, pixels(5, kernel(op), stride), pixels(5, kernel(op), stride))
            assert_close(found, plain(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_a_narrow_candidate_stay_in_the_prefix(op):
    wide, x = layers(), image(8).requires_grad_()
    plain, z = plain_candidate(wide, op, 8, 24, 16, 1, True), x.detach().clone().requires_grad_()
    wide(x, [op], (24,), torch.ones(1), 16)[0].square().sum().backward()
    plain(z).square().sum().backward()
    assert_close(x.grad, z.grad, rtol=1e-9, atol=1e-9)
    mine = [p.grad for name, p in wide.named_parameters()
            if "_se" in op or name.split(".")[0] not in ("squeeze", "excite")]
    theirs = [p.grad for p in plain.parameters()]
    for found, small in zip(mine, theirs, strict=True):                 # both in the order of computation
        corner = [slice(n) for n in small.shape]
        if small.shape[2:] == (3, 3):                                   # the middle of the 5x5 kernel
            corner[2:] = [slice(1, 4)] * 2
        assert_close(found[tuple(corner)], small, rtol=1e-9, atol=1e-9)
        rest = found.clone()
        rest[tuple(corner)] = 0
        assert not rest.any()
    assert "_se" in op or wide.squeeze.weight.grad is wide.excite.bias.grad is None    # SGD leaves them alone


@torch.no_grad()
def test_candidates_that_are_computed_together_are_those_computed_alone():
    """None of them changes what they share: neither in any order nor twice."""
    for expand in (True, False):
        wide, x = layers(expand=expand), image(16)
        gates = torch.tensor([0.3, 0.7], dtype=torch.float64)
        alone = {op: wide(x, [op], (16, 8), gates, 24)[0] for op in OPS}
        for pair in itertools.product(OPS, OPS):
            for op, y in zip(pair, wide(x, pair, (16, 8), gates, 24), strict=True):
                assert torch.equal(y, alone[op])
        assert all(not torch.equal(alone[a], alone[b]) for a, b in itertools.combinations(OPS, 2))


@pytest.mark.parametrize("op", OPS)
def test_hidden_widths_are_one_soft_mask_behind_batch_norm_and_activation(op):
    for widths in ((8, 48), (24, 40), (24, 24), (8, 16), (8, 24, 16, 40)):  # of 8 and 16 both squeeze to 8
        for stride in (1, 2):
            wide, x = layers(stride), image(16)
            gates = torch.arange(1, 1 + len(widths), dtype=torch.float64).softmax(0)
            found, = wide(x, [op], widths, gates, 24)
            hidden, squeezed = (soft_mask(sizes, gates, size) for sizes, size in (
                (widths, 48), ([near8(width / 4) for width in widths], 16)))
            assert_close(found, masked_candidate(wide, op, x, hidden, squeezed), rtol=1e-9, atol=1e-9)


def test_the_weights_have_the_papers_shapes():
    c = InvertedResidual(16, 48, 24, 2)
    assert c.expand.weight.shape == (48, 16, 1, 1) and c.project.weight.shape == (24, 48, 1, 1)
    assert c.depthwise.weight.shape == (48, 1, 5, 5) and c.depthwise.stride == (2, 2)
    assert c.expand.bias is c.depthwise.bias is c.project.bias is None
    assert [len(n.weight) for n in (c.norm1, c.norm2, c.norm3)] == [48, 48, 24]
    assert c.squeeze.weight.shape == (16, 48, 1, 1) and c.excite.weight.shape == (48, 16, 1, 1)
    assert c.squeeze.bias is not None and c.excite.bias is not None     # a quarter of 48 is 12, rounded to 16
    assert InvertedResidual(16, 16, 24, expand=False).expand is None


@pytest.mark.parametrize("layer, inputs, outputs", [
    (nn.Conv2d(6, 10, 1), 4, 7), (nn.Conv2d(6, 10, 1, bias=False), 4, 7),
    (nn.Conv2d(6, 10, 3, 2, 1, bias=False), 6, 7), (nn.Conv2d(6, 6, 5, 2, 2, groups=6, bias=False), 4, 4)])
def test_a_convolution_is_the_prefix_of_the_whole_one(layer, inputs, outputs):
    layer, x = stir(layer.double()), image(inputs)
    assert_close(conv(x, layer, outputs), layer(fit(x, 6))[:, :outputs], rtol=1e-9, atol=1e-9)
    if layer.kernel_size == (5, 5):
        small = F.conv2d(x, layer.weight[:outputs, :, 1:4, 1:4], None, 2, 1, groups=outputs)
        assert_close(conv(x, layer, outputs, kernel=3), small, rtol=1e-9, atol=1e-9)
    if layer.kernel_size == (1, 1):                                     # the consumers of masked channels
        scale = torch.linspace(0, 2, inputs, dtype=torch.float64)
        full = layer(fit(x * scale.view(1, -1, 1, 1), 6))[:, :outputs]
        assert_close(conv(x, layer, outputs, scale), full, rtol=1e-9, atol=1e-9)


def test_batch_norm_is_by_the_batch_in_every_mode():
    layer = stir(nn.BatchNorm2d(6, eps=0.01, track_running_stats=False).double())
    x = image(6)
    channels = x.transpose(0, 1).flatten(1)                             # (channels, all others)
    mean, variance = (values.view(-1, 1, 1) for values in (channels.mean(1), channels.var(1, correction=0)))
    wanted = (x - mean) / (variance + 0.01).sqrt() * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    for training in (False, True):
        assert_close(norm(x[:, :4], layer.train(training)), wanted[:, :4], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("widths", [(8, 24), (1, 2), (3, 3), (8, 24, 16, 40), (16, 8, 8, 16), (5,)])
def test_the_mask_is_the_weighted_sum_of_prefixes(widths):
    gates = torch.arange(1.0, 1 + len(widths)) / sum(range(1, 1 + len(widths)))
    found = mask(widths, gates)
    assert found.shape == (max(widths),)
    for channel, value in enumerate(found.tolist()):
        assert value == pytest.approx(sum(g for width, g in zip(widths, gates.tolist()) if channel < width))


def test_a_residual_is_cut_or_padded_to_the_output():
    x, y = image(6), image(4, seed=2)
    assert torch.equal(add_residual(y, x), y + x[:, :4])                              # cut
    wider = add_residual(x, y)                                                        # padded
    assert torch.equal(wider[:, :4], x[:, :4] + y) and torch.equal(wider[:, 4:], x[:, 4:])
    assert torch.equal(add_residual(x, x), 2 * x)
