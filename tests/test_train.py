"""Training a network: by the recipe, step for step; again, and on, to the same bits; exported; and what
train.py and derive.py do with a run.

The oracles: the recipe written out, gradients by autograd and every update by its formula; a second run, a
reloaded program, or the files that must be there.
"""
from machinery import files, latency
from machinery.run import Run

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from oracles import TINY, chosen, seeded, without_norm
from test_run import Countdown

import data
import derive
import search
import train
from flops import bounds, macs, params
from network import Network, load
from ops import initialise
from space import CANDIDATES, SPACES, Arch
from supernet import SuperNet

FAST = ["--data", "fake", "--epochs", "2", "--batch-size", "32", "--device", "cpu"]  # seven steps an epoch
PLAIN = {"name": "tiny", "epochs": 2, "batch_size": 16, "accumulate": 1, "lr": 0.3, "weight_decay": 0.0,
         "smoothing": 0.0, "dropout": 0.0, "ema": 0.0, "autocast": False, "seed": 3, "checkpoint_every": 500}
pytestmark = pytest.mark.usefixtures("tiny_world")


def rate(step, steps, peak):
    """In the middle of a step: linear over the first 5 %, then a cosine to zero."""
    at = (step + 0.5) / steps
    return peak * min(at / 0.05, (1 + math.cos(math.pi * at)) / 2)


def by_hand(network, loader, index, args):
    """What `train` should return of a copy of `network`."""
    steps = args.epochs * (len(index) // args.batch_size)
    batches = loader.shuffled(index, args.seed, TINY.stage, train.BATCHES)
    speed, average = {}, copy.deepcopy(network).state_dict()
    network.train()
    for step in range(steps):
        x, y = next(batches)
        network.zero_grad()
        log_p = network(x).log_softmax(1)
        hard, even = log_p[torch.arange(len(y)), y], log_p.mean(1)
        (-(1 - args.smoothing) * hard - args.smoothing * even).mean().backward()
        with torch.no_grad():
            for name, p in network.named_parameters():
                g = p.grad + (args.weight_decay * p if p.dim() > 1 else 0)    # of weight matrices alone
                speed[name] = g if step == 0 else 0.9 * speed[name] + g
                p -= rate(step, steps, args.lr) * (g + 0.9 * speed[name])     # Nesterov's
            decay = min(args.ema, (1 + step) / (10 + step)) if step else 0.0  # begins with the first step's
            for name, p in network.named_parameters():
                average[name] = decay * average[name] + (1 - decay) * p
    network.load_state_dict(average)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = None                                             # a plain mean over batches
            layer.reset_running_stats()
    batches = loader.shuffled(index, args.seed, TINY.stage, train.STATISTICS, args.epochs - 1)
    with torch.no_grad():
        for _ in range(train.RECALIBRATION):
            network(next(batches)[0])
    return network.state_dict()


@pytest.mark.parametrize("more", [
    {}, {"smoothing": 0.3}, {"weight_decay": 0.1}, {"ema": 0.15}, {"ema": 0.95},
    {"smoothing": 0.1, "weight_decay": 0.05, "ema": 0.9}], ids=str)
def test_a_network_is_trained_by_the_recipe(more):
    images = data.fake(80, (5,), size=16)
    index, args = torch.arange(80), argparse.Namespace(**PLAIN | more)
    loader = data.Loader(images, images.statistics(index), args.batch_size, torch.device("cpu"))
    network = Network(chosen(TINY, [(0, 0, 0), (7, 1, 1), (4, 2, 1)]), args.dropout).double()
    initialise(network, seeded())
    loader.mean, loader.std = loader.mean.double(), loader.std.double()
    wanted = by_hand(copy.deepcopy(network), loader, index, args)
    tested, run = [], Run(None, {}, torch.device("cpu"))
    found = train.train(network, TINY.stage, loader, index, lambda net: tested.append(net) or 0.25, args, run)
    for name, tensor in found.state_dict().items():
        if "num_batches" not in name:                                         # which nothing reads
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-9, msg=name)
    assert [(row["epoch"], row["accuracy"]) for row in run.state["rows"]] == [(0, 0.25), (1, 0.25)]
    assert tested == [found] * 2


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [train.learning_rate(0.2, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.02) and 0 < rates[-1] < 1e-4
    assert max(rates) <= 0.2 and rates[5:] == sorted(rates[5:], reverse=True)


@pytest.fixture(scope="module")
def searched(tiny_world, tmp_path_factory):
    out = tmp_path_factory.mktemp("searched") / "run"
    search.main([*tiny.SHORT, "--stages", "2", "--out", str(out)])
    return out


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """Latencies need not be right here."""
    monkeypatch.setattr(latency, "ROUNDS", 1)


LOAD, MANY = data.load, train.RECALIBRATION         # what a process of its own has, without the tiny world


@pytest.mark.parametrize("looks", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_networks_trained_side_by_side_are_those_trained_one_by_one(
        searched, tmp_path, monkeypatch, capsys, looks):
    """looks: at the signals, until there is one; the same command then goes on. Forked processes begin faster
    than spawned ones, but cannot compute where there is an accelerator.
    """
    if not looks and not torch.accelerator.is_available():
        fork = multiprocessing.get_context("fork")
        monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(data, "load", LOAD)
    monkeypatch.setattr(train, "RECALIBRATION", MANY)
    argv = [str(searched), "--epochs", "1", "--ema", "0.9", "--device", "cpu", "--resume", "--out"]
    train.main([*argv, str(tmp_path / "one")])
    argv += [str(tmp_path / "two"), "--jobs", "2"]
    if looks:
        stop = contextlib.nullcontext(Countdown(looks))
        with monkeypatch.context() as patch:
            patch.setattr(train.processes, "catch_signals", lambda: stop)
            with pytest.raises(SystemExit) as stopped:
                train.main(argv)
        assert stopped.value.code == 143 and not list((tmp_path / "two").glob("*.net.pt"))
    train.main(argv)
    assert trained(tmp_path / "one") == trained(tmp_path / "two")
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"A0.net.pt", "A1.net.pt", "trained.json"}
    for name in ("A0.net.pt", "A1.net.pt"):
        assert equal(load(tmp_path / "one" / name), load(tmp_path / "two" / name))
    (tmp_path / "two" / "A1.net.pt").unlink()
    argv.remove("--resume")
    with pytest.raises(SystemExit):                     # before anything is trained
        train.main(argv)
    assert "A0.net.pt is there already" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"A0.net.pt", "trained.json"}


def trained(out):
    rows = json.loads((out / "trained.json").read_text())
    return [{k: v for k, v in row.items() if k not in ("seconds", "epochs")} for row in rows]


def equal(one, other):
    """Whether two networks are, to the last bit."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(),
                                                 strict=True))


def test_a_run_is_trained_and_the_same_seed_repeats_it(searched, tmp_path):
    for name in ("a", "b"):
        train.main([str(searched), *FAST, "--epochs", "1", "--dropout", "0.2", "--ema", "0.9",
                    "--out", str(tmp_path / name)])
    assert trained(tmp_path / "a") == trained(tmp_path / "b")
    assert [row["name"] for row in trained(tmp_path / "a")] == ["A0", "A1"]
    for stage in (0, 1):
        one, other = (load(tmp_path / name / f"A{stage}.net.pt") for name in "ab")
        assert one.arch.to_json() == (searched / f"A{stage}.json").read_text()
        assert equal(one, other)


def test_pieces_of_a_batch_train_as_the_whole(searched, tmp_path, monkeypatch):
    without_norm(monkeypatch.setattr)
    argv = [str(searched / "A0.json"), "--data", "fake", "--epochs", "1", "--lr", "0.01", "--device", "cpu",
            "--batch-size", "240"]
    for pieces in ("1", "3"):
        train.main([*argv, "--accumulate", pieces, "--out", str(tmp_path / pieces)])
    whole, other = (load(tmp_path / pieces / "A0.net.pt") for pieces in ("1", "3"))
    for name, tensor in whole.named_parameters():
        torch.testing.assert_close(other.get_parameter(name), tensor, rtol=1e-3, atol=1e-5)


def test_inherited_weights_are_the_supernets(searched):
    arch = Arch.from_json((searched / "A1.json").read_text())
    args = argparse.Namespace(run_folder=searched, init="inherit", dropout=0.0, seed=0)
    wanted = derive.inherit(Network(arch), derive.open_supernet(searched, 1)).state_dict()
    assert all(torch.equal(tensor, wanted[name])
               for name, tensor in train.initial(arch, args).state_dict().items())


def test_a_network_is_trained_from_scratch_and_from_inherited_weights(searched, tmp_path, capsys):
    arch, out = str(searched / "A0.json"), ["--out", str(tmp_path)]
    train.main([arch, *FAST, *out])
    inherit = [arch, *FAST, *out, "--init", "inherit", "--resume"]            # A0 from scratch is another
    train.main([*inherit, "--export", str(tmp_path / "net.pt2")])
    rows = json.loads((tmp_path / "trained.json").read_text())
    assert [(row["name"], row["init"]) for row in rows] == [("A0", "inherit"), ("A0", "scratch")]
    scratch, other = (load(tmp_path / f"{name}.net.pt") for name in ("A0", "A0.inherit"))
    x = torch.randint(256, (3, 1, 16, 16), generator=seeded(), dtype=torch.uint8)
    with torch.no_grad():
        exported = torch.export.load(tmp_path / "net.pt2").module()(x)
        torch.testing.assert_close(exported, other(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(scratch(x), other(x))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    train.main([arch, *FAST, *out, "--resume"])                                        # both are trained
    train.main(inherit)
    assert capsys.readouterr().out.splitlines() == [
        f"{name} is trained: {tmp_path}/{name}.net.pt" for name in ("A0", "A0.inherit")]
    refused(train.main, [arch, *FAST, *out], f"{tmp_path}/A0.net.pt is there already", capsys)
    refused(train.main, [arch, *FAST, *out, "--resume", "--lr", "0.01"],
            "A0.net.pt was trained with lr 0.2, not 0.01", capsys)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_another_network_of_its_name_is_refused_in_a_line(searched, tmp_path, monkeypatch, capsys):
    arch, file = Arch.from_json((searched / "A0.json").read_text()), tmp_path / "A0.json"
    asked = [str(file), *FAST]
    file.write_text(arch.to_json())
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.processes, "pending_signal", lambda caught: 2)
        train.main(asked)
    wider = arch.blocks[0]._replace(hidden=48), *arch.blocks[1:]
    others = [("head", "16, not 24", {"head": 24}), ("block 0", "{", {"blocks": wider}),
              ("blocks", f"{len(arch.blocks)}, not 1", {"blocks": arch.blocks[:1]})]
    for where, verb in (("A0.last.pt", " is "), ("A0.net.pt", " ")):
        before = (tmp_path / where).read_bytes()
        for name, values, other in others:
            file.write_text(arch._replace(**other).to_json())
            refused(train.main, [*asked, "--resume"], name + verb + values, capsys)
        assert (tmp_path / where).read_bytes() == before
        file.write_text(arch.to_json())
        train.main([*asked, "--resume"])


def test_a_network_that_is_trained_is_exported_as_it_is(searched, tmp_path, capsys):
    train.main([str(searched / "A0.json"), *FAST, "--out", str(tmp_path)])
    path = tmp_path / "A0.net.pt"
    refused(train.main, [str(path)], f"{path} is trained already: --export", capsys)
    others = (["--resolution", "64"], "--resolution"), (["--lr", "1", "--resume"], "--lr, --resume")
    for more, named in others:
        refused(train.main, [str(path), "--export", str(tmp_path / "a.pt2"), *more],
                f"{named}: {path} is trained already", capsys)
    assert not (tmp_path / "a.pt2").exists()
    train.main([str(path), "--export", str(tmp_path / "a.pt2"), "--device", "cpu"])
    assert (tmp_path / "a.pt2").exists()


def test_a_network_for_a_phone_by_the_readmes_commands(tmp_path, monkeypatch):
    """As they stand there, but for images, epochs and the budget."""
    monkeypatch.chdir(tmp_path)
    text = (Path(train.__file__).parent / "README.md").read_text(encoding="utf-8").split("for a phone")[1]
    commands = [shlex.split(line, comments=True) for line in text.split("\n\n")[1].splitlines()]
    assert [script for _, script, *_ in commands] == ["search.py", "derive.py", "train.py", "train.py"]
    small = ["--stages", "2", *tiny.SHORT], ["--flops", "30k"], ["--epochs", "1"], []
    for (_, script, *argv), change in zip(commands, small):
        {"search.py": search, "derive.py": derive, "train.py": train}[script].main([*argv, *change])
    arch = load(tmp_path / "runs/phone/2M.net.pt").arch
    program = torch.export.load(tmp_path / "2M.pt2").module()
    assert macs(arch) <= 3e4
    assert program(torch.zeros(2, 1, arch.resolution, arch.resolution, dtype=torch.uint8)).shape == (2, 10)


def test_validation_writes_nothing_and_asks_for_no_test_image(searched, monkeypatch, capsys):
    before, load, asked = {path.name for path in searched.iterdir()}, data.load, []
    monkeypatch.setattr(data, "load", lambda name, part: (asked.append(part), load(name, part))[1])
    train.main([str(searched / "A0.json"), "--data", "fake", "--epochs", "1", "--validate"])
    assert asked == ["train"]
    assert {path.name for path in searched.iterdir()} == before
    assert "accuracy" in capsys.readouterr().out


def test_validation_is_on_the_validation_split_of_the_search(searched, tmp_path, monkeypatch, capsys):
    settings = json.loads((searched / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(settings | {"seed": 7}))
    (tmp_path / "A0.json").write_text((searched / "A0.json").read_text())
    seen, part = [], data.split(data.load("fake", "train").labels, 7)
    monkeypatch.setattr(train, "train_one", lambda *given: (seen.append(given), (None, None))[1])
    train.main([str(tmp_path / "A0.json"), "--validate", "--device", "cpu"])
    assert all(torch.equal(one, two) for one, two in zip(seen[0][3], part, strict=True))
    monkeypatch.undo()
    monkeypatch.setattr(train.processes, "pending_signal", lambda caught: 15)
    with pytest.raises(SystemExit):
        train.main([str(tmp_path / "A0.json"), "--validate", "--device", "cpu"])
    assert "after step 1; nothing is kept" in capsys.readouterr().out


def test_inherited_weights_are_of_a_network_that_the_supernet_has(searched, tmp_path, capsys):
    found = json.loads((searched / "A0.json").read_text())
    (tmp_path / "A0.pt").write_bytes((searched / "A0.pt").read_bytes())
    last = found["blocks"][-1]
    wide = [*found["blocks"][:-1], last | {"hidden": 1024}]
    for blocks in (wide, [*found["blocks"], last | {"stride": 1, "residual": True}]):
        (tmp_path / "A0.json").write_text(json.dumps(found | {"blocks": blocks}))
        refused(train.main, [str(tmp_path / "A0.json"), *FAST, "--init", "inherit"],
                f"the network is no part of the supernet in {tmp_path}/A0.pt", capsys)
    args = argparse.Namespace(run_folder=searched, init="inherit", dropout=0.0, seed=0)
    arch = Arch.from_json((searched / "A0.json").read_text())
    for more in ({"in_channels": 3}, {"classes": 9}):       # one filter would serve all; a class would go
        with pytest.raises(files.Refused, match="no part of the supernet"):
            train.initial(arch._replace(**more), args)


def test_a_piece_of_one_pixel_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load", lambda name, part: data.fake(40, (0,), size=32))
    with torch.device("meta"):
        net = SuperNet(SPACES["paper"][0], 1, 10)
    (tmp_path / "A0.json").write_text(derive.arch_of(net, [(0, 0, 0)] * len(net.blocks)).to_json())
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
    run = shutil.copytree(searched, tmp_path / "run")
    likely, before = derive.derive(derive.open_supernet(run, 1)), derive.arch_in(run, 0)
    other = next(op for op in CANDIDATES if op != likely.blocks[0].op)
    before = before._replace(blocks=(before.blocks[0]._replace(op=other), *before.blocks[1:]))
    (run / "A0.json").write_text(before.to_json())
    derive.main([str(run), *out])
    best = Arch.from_json((tmp_path / "net.json").read_text())
    assert best == derive.derive(derive.open_supernet(run, 1), None, before) != likely
    assert best.blocks[0].op == other                                           # A0's operations are kept
    derive.main([str(searched), "--stage", "0", "--refine", "2", *out])
    likely = derive.open_supernet(searched, 0)
    solutions = derive.viterbi_list(derive.log_probabilities(likely), derive.space_costs(likely), 0.0, 2)
    assert Arch.from_json((tmp_path / "net.json").read_text()) in [
        derive.arch_of(likely, solution.options) for solution in solutions]
    assert "under the budget" not in capsys.readouterr().out


def test_a_budget_gives_a_network_that_keeps_it(searched, tmp_path):
    for flag, budget, count in (("--flops", 3e4, macs), ("--params", 1e3, params)):
        derive.main([str(searched), flag, str(budget), "--out", str(tmp_path / "net.json")])
        assert count(Arch.from_json((tmp_path / "net.json").read_text())) <= budget


def test_a_budget_that_kept_operations_do_not_reach_is_reached_without_them(searched, tmp_path):
    supernet = derive.open_supernet(searched, 1)
    for end in bounds(derive.space_costs(supernet)):
        derive.main([str(searched), "--stage", "1", "--flops", str(end), "--out", str(tmp_path / "net.json")])
        assert macs(Arch.from_json((tmp_path / "net.json").read_text())) == end


def test_a_network_before_is_that_of_the_stage_before(searched, tmp_path, capsys):
    for name in ("args.json", "A0.json", "A1.json", "A1.pt"):
        shutil.copy(searched / name, tmp_path)
    shutil.copy(searched / "A1.json", tmp_path / "A0.json")
    refused(derive.main, [str(tmp_path)], "A0.json: no network of A0", capsys)


def test_of_the_likeliest_near_a_budget_the_best_is_taken(searched, tmp_path, monkeypatch, capsys):
    supernet, measured = derive.open_supernet(searched, 0), {}
    for alpha in supernet.alphas():
        torch.nn.init.normal_(alpha, 0, 2, data.generator(3))
    monkeypatch.setattr(derive, "open_supernet", lambda *_: supernet)

    def evaluate(arch, *_):
        measured[arch] = (0.3, 0.2, 0.7, 0.5)[len(measured)]
        return None, measured[arch]
    monkeypatch.setattr(derive, "evaluate_derived", evaluate)
    out = ["--stage", "0", "--out", str(tmp_path / "net.json")]
    derive.main([str(searched), "--flops", "20k", "--refine", "4", *out])
    found = Arch.from_json((tmp_path / "net.json").read_text())
    assert list(measured).index(found) == 2 and all(macs(arch) <= 2e4 for arch in measured)
    said = capsys.readouterr().out
    likelihoods = [float(value) for value in re.findall(r"log-likelihood +(\S+)", said)]
    lost = float(re.search(r"it costs (\S+) nats", said)[1])
    derive.main([str(searched), *out])                                                # without a budget
    free = float(re.search(r"log-likelihood +(\S+)", capsys.readouterr().out)[1])
    assert likelihoods[4] == likelihoods[2] and lost == pytest.approx(free - likelihoods[2], abs=0.02)


def test_a_budget_of_time_gives_a_network_whose_layers_keep_it(searched, tmp_path, capsys):
    supernets = [derive.open_supernet(searched, stage) for stage in (0, 1)]
    low, high = bounds(derive.latency_costs(supernets, searched / "latency.json")[0])
    for more in ([], ["--refine", "2"]):
        capsys.readouterr()
        derive.main([str(searched), "--latency", f"{(low + high) / 2e6}ms", "--out",
                     str(tmp_path / "net.json"), *more])
        out = capsys.readouterr().out
        assert "layers in" not in out and "measured as a whole" in out
        with pytest.raises(SystemExit):
            derive.main([str(searched), "--latency", "1us"])
        assert re.search(r"networks have [\d.]+\d ms to [\d.]+\d ms\n", capsys.readouterr().err)
        assert float(re.search(r"([\d.]+) ms by its layers", out)[1]) <= (low + high) / 2e6 + 1e-3
        assert ("best:" in out) == bool(more)
        Arch.from_json((tmp_path / "net.json").read_text())


def test_the_front_reaches_from_the_cheapest_to_the_dearest(searched, tmp_path):
    derive.main([str(searched), "--points", "3", "--out", str(tmp_path / "front.json")])
    rows = json.loads((tmp_path / "front.json").read_text())
    ends = [bounds(derive.space_costs(derive.open_supernet(searched, stage))) for stage in (0, 1)]
    sizes = [row["flops"] for row in rows]
    assert sizes == sorted(set(sizes)) and sizes[0] == ends[0][0] and sizes[-1] == ends[1][1]
    for row in rows:
        assert macs(Arch.from_json(json.dumps(row["arch"]))) == row["flops"]
        assert 0 <= row["accuracy"] <= 1


def test_two_trainings_do_not_share_a_folder(searched, tmp_path, capsys):
    with files.lock(tmp_path):
        refused(train.main, [str(searched / "A0.json"), *FAST, "--out", str(tmp_path)], "in use by another",
                capsys)


MORE = ["--ema", "0.9", "--dropout", "0.2", "--checkpoint-every", "4"]


@pytest.fixture(scope="module")
def whole(searched, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train.main([str(searched / "A0.json"), *FAST, *MORE, "--out", str(out)])
    return out


def same_training(one, other):
    """Whether two folders have the same weights and the same rows, but for times."""
    rows = [json.loads((out / "trained.json").read_text())[0]["epochs"] for out in (one, other)]
    for row in (*rows[0], *rows[1]):
        row.pop("seconds")
    return (trained(one) == trained(other) and rows[0] == rows[1]
            and equal(load(one / "A0.net.pt"), load(other / "A0.net.pt")))


class Killed(BaseException):
    """Nothing catches it."""


@pytest.mark.parametrize("place, n, step", [("evaluate", 1, 4), ("evaluate", 2, 12), ("cross_entropy", 11, 8),
                                            ("save", 1, 14), ("enter", 1, 14)])
def test_a_killed_training_goes_on(searched, whole, tmp_path, monkeypatch, place, n, step):
    """In its n-th evaluation or step, or at its end, when the network is trained, but not all is written."""
    argv = [str(searched / "A0.json"), *FAST, *MORE, "--out", str(tmp_path)]
    where = train.F if place == "cross_entropy" else train
    usual, calls = getattr(where, place), []

    def killed(*given, **more):
        calls.append(1)
        if len(calls) == n:
            raise Killed
        return usual(*given, **more)
    monkeypatch.setattr(where, place, killed)
    with pytest.raises(Killed):
        train.main(argv)
    assert files.load_checkpoint(tmp_path / "A0.last.pt")["step"] == step
    train.main([*argv, "--resume"])
    assert {path.name for path in tmp_path.iterdir()} == {"A0.net.pt", "trained.json"}
    assert same_training(whole, tmp_path)


def test_a_stopped_training_goes_on_within_its_epoch(searched, whole, tmp_path, monkeypatch, capsys):
    argv, looks = [str(searched / "A0.json"), *FAST, *MORE, "--out", str(tmp_path)], []
    with monkeypatch.context() as patch:
        patch.setattr(train.processes, "pending_signal",
                      lambda caught: looks.append(1) or (2 if len(looks) == 10 else 0))
        with pytest.raises(SystemExit) as stopped:
            train.main(argv)
    assert stopped.value.code == 130 and "stopped in A0 after step 10;" in capsys.readouterr().out
    saved = files.load_checkpoint(tmp_path / "A0.last.pt")
    assert (len(saved["rows"]), saved["step"]) == (1, 10)
    with monkeypatch.context() as patch:
        patch.setattr(data, "load", lambda name, part: data.fake(241, (0,), size=16))
        refused(train.main, [*argv, "--resume"], "its data is 240 images of fake, not 241 images of fake",
                capsys)
    train.main([*argv, "--resume"])
    assert same_training(whole, tmp_path)


def test_a_loss_that_is_not_finite_ends_the_training_and_is_not_saved(searched, tmp_path, monkeypatch):
    entropy, calls = train.F.cross_entropy, []

    def sometimes(*x, **more):
        calls.append(1)
        return entropy(*x, **more) * (float("nan") if len(calls) == 10 else 1)
    monkeypatch.setattr(train.F, "cross_entropy", sometimes)
    with pytest.raises(SystemExit, match="loss or gradients are not finite in step 9; try a lower --lr"):
        train.main([str(searched / "A0.json"), *FAST, "--out", str(tmp_path)])
    saved = files.load_checkpoint(tmp_path / "A0.last.pt")
    assert saved["step"] == 7 and all(torch.isfinite(w).all() for w in saved["network"].values())
