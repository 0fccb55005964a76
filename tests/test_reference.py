"""The reference networks are what the curve says they are: their MACs, their pixels, their shapes."""
from machinery import results

import json

import pytest
import reference
import torch
from torch import nn
from torchvision.models import mobilenet_v2, mobilenet_v3_small, shufflenet_v2_x1_0

import data
from derive import arch_of
from flops import macs
from space import SPACES
from supernet import SuperNet

ORIGINALS = {"MobileNetV3-small": mobilenet_v3_small, "MobileNetV2": mobilenet_v2,
             "ShuffleNetV2": shufflenet_v2_x1_0}


@pytest.mark.parametrize("name", reference.BUILDERS)
def test_the_networks_have_the_macs_of_their_target_and_the_pixels_of_ours(name):
    for target in (0.87e6, 4.7e6):                                  # about A0's and A4's
        _, network, count = reference.nearest(reference.BUILDERS[name], target, 1, 28, 10)
        assert abs(count / target - 1) < 0.1
        outputs = []
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(lambda layer, _, y, seen=outputs: seen.append((layer, y)))
        assert network.eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
        assert sum(layer.weight[0].numel() * y[0].numel() for layer, y in outputs) == count
        squeezed = {1} if "V3" in name else set()
        assert {y.shape[-1] for _, y in outputs if y.dim() == 4} == {14, 7, 4} | squeezed


@pytest.mark.parametrize("name", reference.BUILDERS)
def test_at_width_1_only_the_stem_the_strides_and_the_head_are_not_torchvisions(name):
    def inner(network):
        shapes = [tuple(m.weight.shape) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        return shapes[1:-2 if name != "MobileNetV3-small" else -3]
    assert inner(reference.BUILDERS[name](1.0, 1, 10, 0.0)) == inner(ORIGINALS[name]())


@pytest.mark.slow
def test_they_become_points_of_the_curve(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda name, part: data.fake(60, (0,)))
    net = SuperNet(SPACES["small"][0], 1, 10, data.generator(0))
    ours = arch_of(net, [(0, len(b.expansions) // 2, len(b.widths) // 2) for b in net.space.blocks])
    (tmp_path / "A0.json").write_text(ours.to_json())
    flags = [str(tmp_path), "--data", "fake", "--epochs", "1", "--batch-size", "30", "--device", "cpu"]
    reference.main(flags)
    rows = json.loads((tmp_path / "trained.json").read_text())
    assert [row["name"].split()[0] for row in rows] == sorted(reference.BUILDERS)
    lines = results.curves([tmp_path])
    assert [list(points) for points in lines.values()] == [[row["name"]] for row in rows]
    assert not any(searched for _, searched, _ in lines)
    assert all(abs(row["flops"] / macs(ours) - 1) < 0.2 for row in rows)
    assert not list(tmp_path.glob("*.pt"))
    capsys.readouterr()
    reference.main([*flags, "--resume"])
    assert not capsys.readouterr().out and json.loads((tmp_path / "trained.json").read_text()) == rows


def test_on_the_validation_split_nothing_is_written(tmp_path, monkeypatch):
    images, asked, trained, evaluated = data.fake(60, (0,)), [], [], []

    def train(network, stage, loader, index, test, args, run):
        trained.append((loader, index))
        test(network)
    monkeypatch.setattr(data, "load", lambda name, part: asked.append(part) or images)
    monkeypatch.setattr(reference.train, "train", train)
    monkeypatch.setattr(reference, "evaluate", lambda network, *given: evaluated.append(given))
    (tmp_path / "A0.json").write_text(SPACES["small"][0].arch([(0, 0, 0)] * 5, 1, 10).to_json())
    reference.main([str(tmp_path), "--data", "fake", "--batch-size", "30", "--validate", "--targets", "0.9M",
                    "--device", "cpu"])
    parts = data.split(images.labels, 0)
    wanted = data.Loader(images, images.statistics(parts[0]), 30)
    for seen, part in ((trained, parts[0]), (evaluated, parts[1])):
        assert len(seen) == 3
        for loader, index in seen:
            assert torch.equal(index, part)
            assert torch.equal(loader.mean, wanted.mean) and torch.equal(loader.std, wanted.std)
    assert asked == ["train"] and [path.name for path in tmp_path.iterdir()] == ["A0.json"]


@pytest.mark.parametrize("flag", ["--init inherit", "--export net.pt2", "--out elsewhere"])
def test_flags_that_mean_nothing_here_are_refused(tmp_path, flag, capsys):
    with pytest.raises(SystemExit):
        reference.main([str(tmp_path), *flag.split()])
    assert capsys.readouterr().err == f"reference.py: {flag.split()[0]} is for train.py alone\n"
    assert not any(tmp_path.iterdir())
