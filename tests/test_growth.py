"""What growth does, seen from inside: the networks are the same before and after, twins are copies."""
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import data
from grow import grow
from results import growth
from space import SPACES
from supernet import SuperNet

ROOT = Path(__file__).parents[1]
A0, A1 = SPACES["small"][:2]


def test_a_network_keeps_its_options_and_others_differ():
    drawn = [growth.drawn(A0, A1, n) for n in range(20)]
    for before, after in drawn:
        old = [n for n, place in enumerate(growth.positions(A1)) if place in growth.positions(A0)]
        assert [after[n] for n in old] == before and len(after) == len(A1.blocks)
    assert len({tuple(before) for before, _ in drawn}) == 20
    for block, options in zip(A0.blocks, zip(*(before for before, _ in drawn))):
        sizes = 8, len(block.expansions), len(block.widths)
        assert all(len(set(chosen)) > size / 2 for chosen, size in zip(zip(*options), sizes))


@torch.no_grad()
def test_with_its_new_blocks_bypassed_a_supernet_computes_what_the_old_one_did():
    small = SuperNet(A0, 1, 10, data.generator(0))
    x = torch.randn(4, 1, 28, 28, generator=data.generator(2))
    grown = grow(small, A1, data.generator(1), "zero")
    before, after = growth.drawn(A0, A1, 0)
    wanted = small(x, small.path(before))
    assert_close(grown(x, grown.path(after)), wanted, rtol=1e-4, atol=1e-5)
    for block in grown.blocks:
        if (block.block.row, block.block.place) not in growth.positions(A0):
            block.layers.norm3.weight.fill_(1)                                      # it has learnt something
            block.layers.norm3.bias.fill_(1)
    assert (grown(x, grown.path(after)) - wanted).abs().max() > 0.01
    assert_close(growth.bypassed(grown, A0)(x, grown.path(after)), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_twins_are_counted_whatever_their_scale():
    supernet = SuperNet(A0, 1, 10, data.generator(0))
    assert growth.twins(supernet) == 0
    filters = [block.layers.expand.weight for block in supernet.blocks if block.layers.expand is not None]
    filters[0][1], filters[0][2] = 2 * filters[0][0], 0.1 * filters[0][0]
    filters[1][0] = -filters[1][1]                                                  # these are none
    assert growth.twins(supernet) == 3 / sum(map(len, filters))


def test_the_picture_has_a_panel_a_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(growth, "ROWS", tmp_path / "growth.jsonl")
    rows = [*itertools.product([{"seed": 1}], (1, 2, 3), growth.WAYS),              # of another run
            *itertools.product([{"seed": 0}], (1, 2), growth.WAYS), ({"seed": 0}, 3, "before")]
    for run, stage, way in rows:                                                    # A3 is not finished
        row = {"run": run, "stage": stage, "way": way, "accuracies": [0.5, 0.6], "twins": 0}
        growth.add(growth.ROWS, row)
    figure = growth.picture(tmp_path / "growth.png")
    assert (tmp_path / "growth.png").exists() and len(figure.axes) == 2


def test_what_cannot_be_measured_or_drawn_ends_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(growth, "ROWS", tmp_path / "growth.jsonl")
    for argv, said in (([], "measure a run first"), ([str(tmp_path)], "args.json: No such file"),
                       (["--nosuch"], "unrecognized arguments: --nosuch")):
        with pytest.raises(SystemExit) as ended:
            growth.main(argv)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("script, ends", [
    ("plot.py", True), ("results/growth.py", True), ("tests/x.py", False)])
def test_ctrl_c_ends_a_script_at_once(script, ends):
    code = "import signal, machinery; print(signal.getsignal(signal.SIGINT) is signal.SIG_DFL)"
    code = f"import sys; sys.argv = [{script!r}]; {code}"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(ends)
