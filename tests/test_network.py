"""A network that leaves: what it computes, what PyTorch's tools make of it, and the one file that it is.

The oracle is written from the paper's definitions, as textbook layers; the tools are PyTorch's own.
"""
import copy

import pytest
import torch
from oracles import Residual, assert_same_logits, images, kernel, near8, stir
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import prune
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import SqueezeExcitation

from network import InvertedResidual, Network
from space import Arch, ArchBlock

# All candidates' kinds, with and without expand convolution; residuals that are cut, padded, and neither.
ARCH = Arch("small", 0, 16, 3, 5, 16, 32, (ArchBlock("ir_k5_se_hs", 16, 12, 1, False, False),
                                           ArchBlock("ir_k3", 24, 16, 2, False, True),
                                           ArchBlock("ir_k5_hs", 40, 24, 1, True, True),
                                           ArchBlock("ir_k3_se", 72, 8, 1, True, True),
                                           ArchBlock("ir_k3_hs", 8, 8, 1, True, True)))


def trained(arch=ARCH, seed=0):
    """A network as after training: no statistic is as it began, and its logits depend on the images."""
    return stir(Network(arch), seed).eval()


def textbook(arch):
    """An `Arch` as layers, in the paper's words; its parameters stand in the network's order."""
    def norm_act(width, act):
        return [nn.BatchNorm2d(width), act()]
    layers, width = [nn.Conv2d(arch.in_channels, arch.stem, 3, 2, 1, bias=False),
                     *norm_act(arch.stem, nn.Hardswish)], arch.stem
    for b in arch.blocks:
        k, act = kernel(b.op), nn.Hardswish if b.op.endswith("_hs") else nn.ReLU
        body = [nn.Conv2d(width, b.hidden, 1, bias=False), *norm_act(b.hidden, act)] if b.expand else []
        body += [nn.Conv2d(b.hidden, b.hidden, k, b.stride, k // 2, groups=b.hidden, bias=False),
                 *norm_act(b.hidden, act)]
        if "se" in b.op.split("_"):
            body.append(SqueezeExcitation(b.hidden, near8(b.hidden / 4), nn.ReLU, nn.Hardsigmoid))
        body = nn.Sequential(*body, nn.Conv2d(b.hidden, b.out, 1, bias=False), nn.BatchNorm2d(b.out))
        layers.append(Residual(body) if b.residual else body)
        width = b.out
    return nn.Sequential(*layers, nn.Conv2d(width, arch.head, 1, bias=False),
                         *norm_act(arch.head, nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(arch.head, arch.classes))


@pytest.mark.parametrize("training", [False, True])
def test_a_network_computes_what_textbook_layers_compute(training):
    network, wanted = trained().double().train(training), textbook(ARCH).double().train(training)
    wanted.load_state_dict(dict(zip(wanted.state_dict(), network.state_dict().values(), strict=True)))
    x = images(4, 3, 16).double()
    found, expected = network(x), wanted(x)
    assert_same_logits(found, expected)
    for logits in (found, expected):
        logits.square().sum().backward()
    for mine, its in zip(network.parameters(), wanted.parameters(), strict=True):
        assert_close(mine.grad, its.grad)
    for mine, its in zip(network.buffers(), wanted.buffers(), strict=True):         # what a step leaves
        assert_close(mine, its)


def test_every_layer_is_called_and_what_it_computed_stays():
    network, seen = trained(), {}
    layers = {name: m for name, m in network.named_modules() if not list(m.children())}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, x, y, name=name: seen.update({name: (y, y.clone())}))
    network(images(2, 3, 16))
    assert set(seen) == set(layers) and all(torch.equal(*pair) for pair in seen.values())


def test_images_lie_with_their_channels_last_behind_the_stem():
    network, seen = Network(ARCH), []
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, InvertedResidual)):
            layer.register_forward_hook(lambda layer, x, y: seen.append(y))
    network(images(2, 3, 16))
    assert len(seen) > 20
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)


def float64(network):
    return network.double(), images(3, 3, 16).double()


def test_fx_traces_it_and_folds_every_batch_norm():
    network, x = float64(trained())
    folded = fuse(network)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert_same_logits(folded(x), network(x))


def test_features_are_those_of_its_blocks():
    network, x = trained(), images(2, 3, 16)
    found = create_feature_extractor(network, {"blocks.2": "middle", "blocks.4.project": "project"})(x)
    middle = network.blocks[:3](network.stem(x))
    assert_close(found["middle"], middle)
    assert_close(found["project"] + network.blocks[3](middle), network.blocks[3:](middle))


def test_scripted_and_exported_it_computes_the_same():
    network, x = trained(), images(3, 3, 16)
    assert_close(torch.jit.script(network)(x), network(x))
    assert_close(torch.export.export(network, (x,)).module()(x), network(x))


def test_statistics_are_measured_by_update_bn():
    network, x = trained(), images(16, 3, 16)
    update_bn([x], network)
    first = network.stem[0](x)
    assert_close(network.stem[1].running_mean, first.mean((0, 2, 3)))
    assert_close(network.stem[1].running_var, first.var((0, 2, 3)))


def test_pruned_layers_and_synchronised_batch_norm_take_effect():
    network, x = float64(trained())
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in sync.modules()) == 16
    assert_same_logits(sync(x), network(x))
    wanted = copy.deepcopy(network)
    prune.ln_structured(network.head[0], "weight", 0.5, 1, 0)
    wanted.head[0].weight.data.mul_(network.head[0].weight_mask)
    assert 0 < float(network.head[0].weight_mask.mean()) < 1
    assert_same_logits(network(x), wanted(x))


def test_it_drops_out_in_training_alone():
    network, x = stir(Network(ARCH, dropout=0.9)), images(2, 3, 16)
    assert not torch.equal(network(x), network(x))
    assert torch.equal(network.eval()(x), network(x))
