"""Training and exporting derived networks, on the `fake` patterns, and the command lines of train.py and
derive.py.

The oracle is a second run, a reloaded program, or the files that must be there.
"""
from machinery import files, latency

import json
import re
import types

import pytest
import recipe
import torch
from oracles import without_norm

import data
import derive
import search
import train
from space import Arch

FAST = ["--data", "fake", "--epochs", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    out = tmp_path_factory.mktemp("searched") / "run"
    search.main(["--data", "fake", "--stages", "2", "--epochs", "0.3", "--device", "cpu", "--out", str(out)])
    return out


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Latencies need not be right here."""
    monkeypatch.setattr(latency, "ROUNDS", 1)


def trained(out):
    rows = json.loads((out / "trained.json").read_text())
    return [{k: v for k, v in row.items() if k not in ("seconds", "epochs")} for row in rows]


def test_a_run_is_trained_and_the_same_seed_repeats_it(searched, tmp_path):
    for name in ("a", "b"):
        train.main([str(searched), *FAST, "--epochs", "1", "--dropout", "0.2", "--ema", "0.9",
                    "--out", str(tmp_path / name)])
    assert trained(tmp_path / "a") == trained(tmp_path / "b")
    assert [row["name"] for row in trained(tmp_path / "a")] == ["A0", "A1"]
    for stage in (0, 1):
        one, other = (torch.load(tmp_path / name / f"A{stage}.trained.pt",
                                 weights_only=True) for name in "ab")
        assert all(torch.equal(one[key], other[key]) for key in one)
        network = derive.Network(Arch.from_json((searched / f"A{stage}.json").read_text()))
        network.load_state_dict(one)


def test_training_goes_on_from_the_last_epoch(searched, tmp_path, monkeypatch):
    arch = str(searched / "A0.json")
    train.main([arch, *FAST, "--out", str(tmp_path / "whole"), "--ema", "0.9"])
    accuracy, calls = recipe.accuracy, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return accuracy(*args)
    monkeypatch.setattr(recipe, "accuracy", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main([arch, *FAST, "--out", str(tmp_path / "cut"), "--ema", "0.9"])
    monkeypatch.undo()
    train.main([arch, *FAST, "--out", str(tmp_path / "cut"), "--ema", "0.9", "--resume"])
    assert trained(tmp_path / "whole") == trained(tmp_path / "cut")
    assert not (tmp_path / "cut" / "A0.last.pt").exists()


def test_pieces_of_a_batch_train_as_the_whole(searched, tmp_path, monkeypatch):
    without_norm(monkeypatch.setattr)
    argv = [str(searched / "A0.json"), "--data", "fake", "--epochs", "1", "--lr", "0.01", "--device", "cpu",
            "--batch-size", "240"]
    for pieces in ("1", "3"):
        train.main([*argv, "--accumulate", pieces, "--out", str(tmp_path / pieces)])
    whole, other = (files.load(tmp_path / pieces / "A0.trained.pt") for pieces in ("1", "3"))
    for name, tensor in whole.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


def test_inherited_weights_are_the_supernets(searched):
    arch = Arch.from_json((searched / "A1.json").read_text())
    args = train.parser().parse_args([str(searched), "--init", "inherit", "--dropout", "0"])
    network, supernet = train.initial(arch, args, searched), derive.open_supernet(searched, 1)
    wanted = derive.inherit(derive.Network(arch), supernet).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in network.state_dict().items())


def test_a_network_stands_in_the_results_from_scratch_and_from_inherited_weights(searched, tmp_path, capsys):
    arch, out = str(searched / "A0.json"), ["--out", str(tmp_path)]
    train.main([arch, *FAST, *out])
    train.main([arch, *FAST, *out, "--init", "inherit", "--resume"])  # A0 from scratch is another
    rows = json.loads((tmp_path / "trained.json").read_text())
    assert [(row["name"], row["init"]) for row in rows] == [("A0", "inherit"), ("A0", "scratch")]
    assert capsys.readouterr().out.count(train.saving(rows, "A0")) == 1
    one, other = (torch.load(tmp_path / f"{name}.trained.pt", weights_only=True)
                  for name in ("A0", "A0.inherit"))
    assert not torch.equal(one["head.weight"], other["head.weight"])
    train.main([arch, *FAST, *out, "--resume"])                                        # both are trained
    train.main([arch, *FAST, *out, "--resume", "--init", "inherit"])
    said = [f"{label} is trained: {100 * row['accuracy']:.2f} % after epoch {len(row['epochs']) - 1}"
            for label, row in zip(("A0.inherit", "A0"), rows, strict=True)]
    assert capsys.readouterr().out.splitlines() == said[::-1]
    train.main([arch, *FAST, *out])                                                    # again, and only this
    assert [row["epochs"] == old["epochs"] for row, old in
            zip(json.loads((tmp_path / "trained.json").read_text()), rows, strict=True)] == [True, False]


def test_what_inherited_weights_save_is_read_from_the_epochs():
    def row(init, *accuracies):
        epochs = [{"epoch": n, "accuracy": a} for n, a in enumerate(accuracies)]
        return {"name": "A3", "init": init, "epochs": epochs}
    scratch, other = row("scratch", 0.7, 0.9, 0.8), {"name": "A2", "init": "inherit", "epochs": []}
    says = "A3 with the supernet's weights reaches 80.00 %, that of 3 epochs from scratch, "
    assert train.saving([scratch, row("inherit", 0.7, 0.8, 0.85)], "A3") == says + "after 2 of 3 epochs"
    assert train.saving([row("inherit", 0.81), scratch, other], "A3") == says + "after 1 of 1 epochs"
    assert train.saving([scratch, row("inherit", 0.7, 0.79)], "A3") == says + "not within 2 epochs"
    assert train.saving([scratch, other], "A3") is None and train.saving([other], "A2") is None


def test_an_onnx_file_computes_the_same(searched, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    file = tmp_path / "net.onnx"
    train.main([str(searched / "A1.json"), *FAST, "--out", str(tmp_path), "--export", str(file)])
    network = derive.Network(Arch.from_json((searched / "A1.json").read_text())).eval()
    network.load_state_dict(torch.load(tmp_path / "A1.trained.pt", weights_only=True))
    session = onnxruntime.InferenceSession(file)
    for n in (1, 3):                                                                   # any number of images
        x = torch.rand(n, 1, 28, 28, generator=data.generator(n))
        found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), network(x), rtol=1e-4, atol=1e-5)


def test_an_exported_program_computes_the_same_without_this_code(searched, tmp_path):
    train.main([str(searched / "A0.json"), *FAST, "--out", str(tmp_path), "--export",
                str(tmp_path / "net.pt2")])
    network = derive.Network(Arch.from_json((searched / "A0.json").read_text())).eval()
    network.load_state_dict(torch.load(tmp_path / "A0.trained.pt", weights_only=True))
    x = torch.rand(3, 1, 28, 28, generator=data.generator(0))
    with torch.no_grad():
        found = torch.export.load(tmp_path / "net.pt2").module()(x)
        torch.testing.assert_close(found, network(x), rtol=1e-5, atol=1e-5)


def test_a_program_that_computes_something_else_leaves_no_file(searched, tmp_path, monkeypatch):
    network = derive.Network(Arch.from_json((searched / "A0.json").read_text()))
    other = derive.Network(network.arch).eval()
    program = types.SimpleNamespace(module=lambda: other)
    monkeypatch.setattr(torch.export, "load", lambda file: program)
    with pytest.raises(files.Refused, match=f"the logits of {tmp_path}/net.pt2 differ by"):
        train.export(network, tmp_path / "net.pt2")
    assert not any(tmp_path.iterdir())


def test_validation_writes_nothing_and_asks_for_no_test_image(searched, monkeypatch, capsys):
    before, load, asked = {path.name for path in searched.iterdir()}, data.load, []
    monkeypatch.setattr(data, "load", lambda name, part: (asked.append(part), load(name, part))[1])
    train.main([str(searched / "A0.json"), "--data", "fake", "--epochs", "1", "--validate"])
    assert asked == ["train"]
    assert {path.name for path in searched.iterdir()} == before
    assert "accuracy" in capsys.readouterr().out


def test_validation_is_on_the_architecture_part_of_the_search(searched, tmp_path, monkeypatch, capsys):
    settings = json.loads((searched / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(settings | {"seed": 7}))
    (tmp_path / "A0.json").write_text((searched / "A0.json").read_text())
    seen, part = [], data.split(data.load("fake", "train").labels, 7)
    monkeypatch.setattr(train, "train", lambda *given: (seen.append(given), (None, []))[1])
    train.main([str(tmp_path / "A0.json"), "--validate", "--device", "cpu"])
    _, _, index, _, test_index, *_ = seen[0]
    assert torch.equal(index, part[0]) and torch.equal(test_index, part[1])
    monkeypatch.undo()
    monkeypatch.setattr(recipe.processes, "pending_signal", lambda caught: 15)
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "A0.json"), "--validate", "--device", "cpu"])
    assert "after step 1; nothing is kept of a --validate" in capsys.readouterr().out


def test_inherited_weights_are_of_a_network_that_the_supernet_has(searched, tmp_path, capsys):
    found = json.loads((searched / "A0.json").read_text())
    (tmp_path / "A0.pt").write_bytes((searched / "A0.pt").read_bytes())
    last = found["blocks"][-1]
    wide = [*found["blocks"][:-1], last | {"hidden": 1024}]
    for blocks in (wide, [*found["blocks"], last | {"stride": 1, "residual": True}]):
        (tmp_path / "A0.json").write_text(json.dumps(found | {"blocks": blocks}))
        refused(train.main, [str(tmp_path / "A0.json"), *FAST, "--init", "inherit"],
                f"the network is no part of the supernet in {tmp_path}/A0.pt", capsys)


def test_a_piece_of_one_pixel_is_refused(tmp_path, capsys):
    with torch.device("meta"):
        net = search.SuperNet(search.SPACES["paper"][0], 1, 10)
    (tmp_path / "A0.json").write_text(derive.arch(net, [(0, 0, 0)] * len(net.blocks)).to_json())
    refused(train.main, [str(tmp_path / "A0.json"), "--data", "fake", "--batch-size", "1"],
            "a piece of one image, of which A0 leaves one pixel", capsys)


def refused(main, flags, says, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.err.count("\n") == 1 and says in captured.err


@pytest.mark.parametrize("given, shown", [("1us", "0.001"), ("1s", "1000.000")])
def test_a_time_that_no_network_takes_is_refused(searched, given, shown, capsys):
    refused(derive.main, [str(searched), "--latency", given], f"{shown} ms is out of reach: networks have ",
            capsys)


def test_without_a_budget_it_is_the_last_stages_most_likely(searched, tmp_path, capsys):
    out = ["--out", str(tmp_path / "net.json")]
    derive.main([str(searched), *out])
    best = derive.derive(derive.open_supernet(searched, 1))
    assert Arch.from_json((tmp_path / "net.json").read_text()) == best
    derive.main([str(searched), "--stage", "0", "--refine", "2", *out])
    assert Arch.from_json((tmp_path / "net.json").read_text()).stage == 0
    assert "under the budget" not in capsys.readouterr().out


def test_a_budget_gives_a_network_that_keeps_it(searched, tmp_path):
    for flag, budget, count in (("--flops", 1e6, derive.macs), ("--params", 5e4, derive.params)):
        derive.main([str(searched), flag, str(budget), "--out", str(tmp_path / "net.json")])
        assert count(Arch.from_json((tmp_path / "net.json").read_text())) <= budget


def test_of_the_likeliest_near_a_budget_the_best_is_taken(searched, tmp_path, monkeypatch, capsys):
    supernet, measured = derive.open_supernet(searched, 0), {}
    for alpha in supernet.alphas():
        torch.nn.init.normal_(alpha, 0, 2, data.generator(3))
    monkeypatch.setattr(derive, "open_supernet", lambda *_: supernet)

    def measure(arch, *_):
        measured[arch] = (0.3, 0.2, 0.7, 0.5)[len(measured)]
        return None, measured[arch]
    monkeypatch.setattr(derive, "measure", measure)
    out = ["--stage", "0", "--out", str(tmp_path / "net.json")]
    derive.main([str(searched), "--flops", "1M", "--refine", "4", *out])
    found = Arch.from_json((tmp_path / "net.json").read_text())
    assert list(measured).index(found) == 2 and all(derive.macs(arch) <= 1e6 for arch in measured)
    said = capsys.readouterr().out
    likelihoods = [float(value) for value in re.findall(r"log-likelihood +(\S+)", said)]
    lost = float(re.search(r"it costs (\S+) nats", said)[1])
    derive.main([str(searched), *out])                                                # without a budget
    free = float(re.search(r"log-likelihood +(\S+)", capsys.readouterr().out)[1])
    assert likelihoods[4] == likelihoods[2] and lost == pytest.approx(free - likelihoods[2], abs=0.02)


def test_a_budget_of_time_gives_a_network_whose_layers_keep_it(searched, tmp_path, capsys):
    supernets = [derive.open_supernet(searched, stage) for stage in (0, 1)]
    low, high = derive.bounds(derive.measured_costs(supernets, searched / "latency.json")[0])
    for more in ([], ["--refine", "2"]):
        capsys.readouterr()
        derive.main([str(searched), "--latency", f"{(low + high) / 2e6}ms", "--out",
                     str(tmp_path / "net.json"), *more])
        out = capsys.readouterr().out
        assert "20 random networks" in out and "layers in" not in out and "measured as a whole" in out
        with pytest.raises(SystemExit):
            derive.main([str(searched), "--latency", "1us"])
        assert re.search(r"networks have [\d.]+\d ms to [\d.]+\d ms\n", capsys.readouterr().err)
        assert float(re.search(r"([\d.]+) ms by its layers", out)[1]) <= (low + high) / 2e6 + 1e-3
        assert ("best:" in out) == bool(more)
        Arch.from_json((tmp_path / "net.json").read_text())


def test_the_front_reaches_from_the_cheapest_to_the_dearest(searched, tmp_path):
    derive.main([str(searched), "--points", "4", "--out", str(tmp_path / "front.json")])
    rows = json.loads((tmp_path / "front.json").read_text())
    ends = [derive.bounds(derive.space_costs(derive.open_supernet(searched, stage))) for stage in (0, 1)]
    macs = [row["flops"] for row in rows]
    assert macs == sorted(set(macs)) and macs[0] == ends[0][0] and macs[-1] == ends[1][1]
    for row in rows:
        assert derive.macs(Arch.from_json(json.dumps(row["arch"]))) == row["flops"]
        assert 0 <= row["accuracy"] <= 1


def test_a_stopped_training_goes_on_within_its_epoch(searched, tmp_path, monkeypatch, capsys):
    arch, more = str(searched / "A0.json"), ["--ema", "0.9", "--dropout", "0.2"]
    train.main([arch, *FAST, *more, "--out", str(tmp_path / "whole")])
    heard, looks = recipe.processes.pending_signal, []
    monkeypatch.setattr(recipe.processes, "pending_signal",
                        lambda caught: looks.append(1) or (2 if len(looks) == 24 else 0))
    with pytest.raises(SystemExit) as stopped:
        train.main([arch, *FAST, *more, "--out", str(tmp_path / "cut")])
    monkeypatch.setattr(recipe.processes, "pending_signal", heard)
    assert stopped.value.code == 130 and "stopped in epoch 1 of A0, after step 6;" in capsys.readouterr().out
    saved = torch.load(tmp_path / "cut" / "A0.last.pt", weights_only=True)
    assert (len(saved["rows"]), saved["step"]) == (1, 6)
    with monkeypatch.context() as patch:
        patch.setattr(data, "load", lambda name, part: data.fake(1201, (0,)))
        refused(train.main, [arch, *FAST, *more, "--out", str(tmp_path / "cut"), "--resume"],
                "its data is 1,200 images of fake, not 1,201 images of fake", capsys)
    train.main([arch, *FAST, *more, "--out", str(tmp_path / "cut"), "--resume"])
    assert trained(tmp_path / "whole") == trained(tmp_path / "cut")
    one, other = (torch.load(tmp_path / name / "A0.trained.pt", weights_only=True)
                  for name in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [json.loads((tmp_path / name / "trained.json").read_text())[0]["epochs"]
            for name in ("whole", "cut")]
    assert [e["loss"] for e in rows[0]] == [e["loss"] for e in rows[1]]


def test_a_killed_training_loses_no_more_than_a_checkpoints_steps(searched, tmp_path, monkeypatch):
    argv = [str(searched / "A0.json"), *FAST, "--dropout", "0.2", "--checkpoint-every", "4", "--out"]
    train.main([*argv, str(tmp_path / "whole")])
    entropy, calls = recipe.F.cross_entropy, []

    def killed(*x, **more):
        calls.append(1)
        if len(calls) == 29:
            raise KeyboardInterrupt
        return entropy(*x, **more)
    monkeypatch.setattr(recipe.F, "cross_entropy", killed)
    with pytest.raises(KeyboardInterrupt):
        train.main([*argv, str(tmp_path / "cut")])
    saved = files.load(tmp_path / "cut" / "A0.last.pt")
    assert (len(saved["rows"]), saved["step"]) == (1, 8)                 # 18 steps an epoch, and ten more
    calls.clear()
    train.main([*argv, str(tmp_path / "cut"), "--resume"])
    assert len(calls) == 10
    one, other = (files.load(tmp_path / name / "A0.trained.pt") for name in ("whole", "cut"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_loss_that_is_not_finite_ends_the_training_and_is_not_saved(searched, tmp_path, monkeypatch):
    entropy, calls = recipe.F.cross_entropy, []

    def sometimes(*x, **more):
        calls.append(1)
        return entropy(*x, **more) * (float("nan") if len(calls) == 25 else 1)
    monkeypatch.setattr(recipe.F, "cross_entropy", sometimes)
    with pytest.raises(SystemExit, match="the loss of A0 is not finite in epoch 1; try a lower --lr"):
        train.main([str(searched / "A0.json"), *FAST, "--out", str(tmp_path)])
    saved = torch.load(tmp_path / "A0.last.pt", weights_only=True)
    assert len(saved["rows"]) == 1 and all(torch.isfinite(w).all() for w in saved["network"].values())


def test_two_trainings_do_not_share_a_folder(searched, tmp_path, capsys):
    with files.lock(tmp_path):
        refused(train.main, [str(searched / "A0.json"), *FAST, "--out", str(tmp_path)], "in use by another",
                capsys)
