"""The search as a whole, on the `fake` patterns: it repeats, it goes on, it never sees the test images, it
says no clearly.

The oracle is a second run: with the same seed, with another, undisturbed beside interrupted.
"""
import itertools
import json
import multiprocessing
import random
import re
import resource
import time
from unittest import mock

import pytest
import step as step_module
import torch
from oracles import macs, settle, without_norm

import data
import search
from derive import Network, derive, inherit, open_supernet, recalibrate
from flops import TARGETS
from grow import grow
from space import Arch

SHORT = ["--data", "fake", "--epochs", "0.4", "--batch-size", "32", "--checkpoint-every", "5",
         "--device", "cpu"]


def run(out, *more):
    main(*SHORT, "--stages", "2", "--out", str(out), *more)
    return contents(out)


def main(*flags):
    with mock.patch.object(search.plot, "curve"):  # it takes a third of such a run, and is tested elsewhere
        search.main([*flags])


def contents(out):
    """What a run left, without the times that it took."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    found = {"log": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
             "summary": [{k: row[k] for k in ("stage", "flops", "params", "accuracy")} for row in summary]}
    for stage in range(len(summary)):
        found[f"A{stage}"] = (out / f"A{stage}.json").read_text()
        found[f"weights {stage}"] = torch.load(out / f"A{stage}.pt", weights_only=True)
    return found


def same(one, other):
    """Whether two runs agree to the last bit, weights and alphas included."""
    weights = [key for key in one if key.startswith("weights")]
    return (all(one[key] == other[key] for key in one if key not in (*weights, "out"))
            and all(torch.equal(one[key][name], other[key][name]) for key in weights for name in one[key]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return run(out) | {"out": out}


def test_the_same_seed_gives_the_same_run(undisturbed, tmp_path):
    assert same(undisturbed, run(tmp_path / "again"))


def test_another_seed_gives_another_run(undisturbed, tmp_path):
    other = run(tmp_path / "other", "--seed", "1")
    assert not same(undisturbed, other)
    assert undisturbed["log"] != other["log"] and undisturbed["A0"] != other["A0"]


class Countdown(list):
    """Caught signals that turn up when they have been looked for `n` times."""
    def __init__(self, n):
        super().__init__([15])
        self.n = n

    def __bool__(self):
        self.n -= 1
        return self.n < 0


@pytest.mark.parametrize("looks", [
    pytest.param(3, marks=pytest.mark.slow), 12, 16])       # in A0, in A1, and after A0's last checkpoint
def test_a_stopped_run_goes_on_as_if_nothing_had_been(undisturbed, tmp_path, looks, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(search.processes, "catch_signals", lambda: search.contextlib.nullcontext(Countdown(looks)))
    with pytest.raises(SystemExit) as stopped:
        run(out)
    assert stopped.value.code == 143 and f"--resume --out {out}" in capsys.readouterr().out
    monkeypatch.undo()
    main("--resume", "--out", str(out))
    assert same(undisturbed, contents(out))


def test_macs_rise_from_stage_to_stage_and_files_are_there(tmp_path, capsys):
    search.main([*SHORT[:3], "0.05", "--device", "cpu", "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    macs = [row["flops"] for row in summary]
    assert len(macs) == 5 and macs == sorted(set(macs))
    assert set(summary[0]) == {"stage", "flops", "params", "accuracy", "seconds", "device_hours", "kwh",
                               "co2e_lb"}
    said = re.findall(r"^A(\d) step (\d+)/(\d+)  loss", capsys.readouterr().out, re.MULTILINE)
    assert said == [(str(k), "2", "2") for k in range(5)]                  # where a stage ends, at the least
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"args.json", "log.jsonl", "last.pt", "summary.json", "curve.png",
                     *(f"A{k}.{end}" for k in range(5) for end in ("json", "pt"))}


def test_the_search_never_sees_the_test_images(tmp_path, monkeypatch):
    load, asked = data.load, []
    monkeypatch.setattr(data, "load", lambda name, part: (asked.append(part), load(name, part))[1])
    run(tmp_path / "run", "--epochs", "0.1")
    assert asked == ["train"]


def test_a_stage_grows_ends_in_its_network_and_teaches_the_next(tmp_path, monkeypatch):
    """Figure 2 around the training, in place of which all grows likely that is dear."""
    out, begun, grown = tmp_path / "run", [], []

    def train(net, teacher, sgd, adam, loader, parts, *_):
        settle(net, net.space.stage)
        with torch.no_grad():
            for alpha in net.alphas():
                alpha[-1] = 9
        begun.append((teacher, loader, parts, derive(net)))
        return iter(())

    def growth(net, space, generator, how):
        grown.append(how)
        return grow(net, space, generator, how)
    monkeypatch.setattr(search, "train_surely", train)
    monkeypatch.setattr(search, "grow", growth)
    main(*SHORT, "--stages", "2", "--widen", "zero", "--seed", "4", "--out", str(out))
    summary, labels = json.loads((out / "summary.json").read_text()), data.load("fake", "train").labels
    assert grown == ["zero"] and begun[0][0] is None
    for stage, (teacher, loader, parts, likely) in enumerate(begun):
        assert all(torch.equal(one, two) for one, two in zip(parts, data.split(labels, 4), strict=True))
        arch = Arch.from_json((out / f"A{stage}.json").read_text())
        target = TARGETS["small"][stage]
        assert 0.9 * target < macs(arch) == summary[stage]["flops"] <= target < macs(likely)
        network = inherit(Network(arch), open_supernet(out, stage))
        batches = loader.shuffled(parts[0], 4, stage, search.WEIGHTS)
        recalibrate(network, itertools.islice(batches, 32))
        with torch.no_grad():
            right = [network(x).argmax(1) == y for x, y in loader.ordered(parts[1])]
        assert summary[stage]["accuracy"] == pytest.approx(float(torch.cat(right).float().mean()))
        if stage == 0:
            teacher, wanted = begun[1][0], network.state_dict()
            assert teacher.arch == arch and not teacher.training
            assert not any(p.requires_grad for p in teacher.parameters())
            assert all(torch.equal(wanted[name], tensor) for name, tensor in teacher.state_dict().items())


def test_the_teacher_learns_nothing_and_the_student_does():
    g = data.generator(0)
    net = search.SuperNet(search.SPACES["small"][0], 1, 10, g)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    x, y = torch.rand(8, 1, 28, 28, generator=g), torch.arange(8)
    loss, right = step_module.two_paths(net, teacher, x, y, 1.0, 0.5, g)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert net.classifier.weight.grad.abs().sum() > 0 and 0 <= float(right) <= 1


def test_both_steps_learn_from_the_teacher():
    """A teacher that says what the student does leaves nothing to learn; half of its words halve the rest."""
    net = search.SuperNet(search.SPACES["small"][0], 1, 10, data.generator(0)).train()
    weights, alphas = net.weights(), net.alphas()
    sgd, adam = torch.optim.SGD(weights, 0.0), torch.optim.Adam(alphas, 0.0)
    batch = torch.rand(8, 1, 28, 28, generator=data.generator(1)), torch.arange(8)
    for kind, parameters in ((0, weights), (1, alphas)):
        def echo(x, kind=kind):
            return net(x, net.sample(1.0, data.generator(0, 4, kind)))
        found = []
        for lam in (0.0, 0.5, 1.0):
            how = batch, 1, 1.0, lam, (0, 4)
            if kind:
                step_module.alpha_step(net, echo, adam, weights, alphas, lambda: None, *how)
            else:
                step_module.weight_step(net, echo, sgd, weights, *how)
            found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        size = float(found[0].abs().max())
        assert size > 1e-4 and float(found[2].abs().max()) < 1e-3 * size
        torch.testing.assert_close(found[1], found[0] / 2, rtol=1e-3, atol=1e-4 * size)


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [step_module.learning_rate(0.2, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.04) and rates[-1] == pytest.approx(0, abs=1e-9)
    assert max(rates) <= 0.2 and rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize("flags, grown, taught", [
    ([], True, True), (["--no-distill"], True, False), (["--no-grow"], False, True),
    (["--method", "direct"], False, False), (["--method", "naive"], True, False)])
def test_the_methods_differ_in_growth_and_teacher(tmp_path, flags, grown, taught, capsys):
    """Figs. 5 and 6. The oracles: what is printed of a growth, and the log's lambda."""
    found = run(tmp_path / "run", *flags, "--epochs", "0.1")
    said = capsys.readouterr().out
    moved = re.findall(r"A1: grown from A0: .* logits moved by (\S+) of their size", said)
    assert len(moved) == grown
    if grown:
        assert (float(moved[0]) > 1e-2) == ("naive" in flags)              # the others keep what it computes
    rows = found["log"]
    assert [row["lambda"] > 0 for row in rows] == [taught and row["stage"] == 1 for row in rows]


def test_compound_scaling_searches_a0_alone(tmp_path):
    out = tmp_path / "run"
    main(*SHORT, "--stages", "2", "--method", "scaling", "--epochs", "0.1", "--out", str(out))
    first, second = json.loads((out / "summary.json").read_text())
    assert second["accuracy"] is None and not (out / "A1.pt").exists()
    assert first["flops"] < second["flops"] <= 1.65e6                      # the small space's target for A1
    assert {json.loads(line)["stage"] for line in (out / "log.jsonl").read_text().splitlines()} == {0}


def test_pieces_of_a_batch_give_the_gradient_of_the_whole(monkeypatch):
    without_norm(monkeypatch.setattr)
    x, y = torch.rand(12, 1, 28, 28, generator=data.generator(1)), torch.arange(12) % 10
    found = []
    for pieces in (1, 3, 5):
        net = search.SuperNet(search.SPACES["small"][0], 1, 10, data.generator(0))
        means = step_module.gradients(net, None, (x, y), pieces, 1.0, 0.0, (2,))
        found.append([means, *(p.grad for p in net.parameters() if p.grad is not None)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("target", [None, 0.5])
def test_a_step_has_no_gradients_but_its_own(target):
    """At a rate of 0 nothing moves, so that the same step has the same gradients once more."""
    net = search.SuperNet(search.SPACES["small"][0], 1, 10, data.generator(0)).train()
    weights, alphas = net.weights(), net.alphas()
    sgd, adam = torch.optim.SGD(weights, 0.0), torch.optim.Adam(alphas, 0.0)
    batch = torch.rand(8, 1, 28, 28, generator=data.generator(1)), torch.arange(8)

    def pull():
        return target and target * torch.cat(alphas).sum()
    found = []
    for _ in range(2):
        step_module.alpha_step(net, None, adam, weights, alphas, pull, batch, 1, 1.0, 0.0, (0, 4))
        assert all(p.requires_grad for p in weights) and not any(a.requires_grad for a in alphas)
        found.append([a.grad.clone() for a in alphas])
        step_module.weight_step(net, None, sgd, weights, batch, 1, 1.0, 0.0, (0, 4))
        found[-1] += [p.grad.clone() for p in weights if p.grad is not None]
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
    assert all(g.count_nonzero() for g in found[0][:len(alphas)])


@pytest.mark.parametrize("first, times, step, more", [
    pytest.param(9, 1, 7, 2, marks=pytest.mark.slow),  # the bad one, 5 and 6 once more, 7 never
    (12, 1, 9, 4),                  # the bad one, an alpha step; 5 to 8 once more, neither step of 9
    (9, 6, 7, 0)])
def test_bad_numbers_never_reach_a_weight(tmp_path, first, times, step, more, monkeypatch, capsys):
    two_paths, calls = step_module.two_paths, []

    def sometimes(net, *args):
        loss, right = two_paths(net, *args)
        assert all(torch.isfinite(p).all() for p in net.parameters())
        if net.space.stage == 1:
            calls.append(1)
            if first <= len(calls) < first + times:
                return loss * float("nan"), right
        return loss, right
    monkeypatch.setattr(step_module, "two_paths", sometimes)
    if times == 1:
        found = run(tmp_path / "run")
        said = capsys.readouterr().out
        assert (f"A1: loss or gradients of step {step} are not finite; back to step 5, that batch is sk"
                in said)
        assert all(torch.isfinite(w).all() for key in ("weights 0", "weights 1") for w in found[key].values())
        saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
        assert saved["skipped"] == [step]                                  # which counts on after a kill
        steps = found["log"][-1]["steps"]
        assert len(calls) == steps + steps // 5 + more
        alphas = [found["weights 1"][name] for name in found["weights 1"] if ".alphas." in name]
        assert all(a.count_nonzero() > 0 for a in alphas)          # later steps moved them
        return
    monkeypatch.setattr(search, "MOST_SKIPPED", 2)
    with pytest.raises(SystemExit, match="not finite in 3 steps .* gives up"):
        run(tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["stage"] == 1 and all(torch.isfinite(w).all() for w in saved["supernet"].values())


def test_an_undefined_gradient_is_noticed_too():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, float("inf"), 0.0])
    with pytest.raises(FloatingPointError):
        step_module.checked([p], torch.tensor([1.0, 0.5]), 4)
    p.grad = torch.ones(3)
    assert [float(v) for v in step_module.checked([p], torch.tensor([1.0, 0.5]), 4)] == [1.0, 0.5]


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on(undisturbed, tmp_path, capsys):
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (undisturbed["out"] / "last.pt").stat().st_size - 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))           # enough for A0, not for A1
    try:
        with pytest.raises(SystemExit, match=r"last\.pt: File too large; .* --resume"):
            run(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    whole = torch.load(undisturbed["out"] / "last.pt", weights_only=True)
    assert saved["stage"] == whole["stage"] and saved["step"] < whole["step"]
    main("--resume", "--out", str(tmp_path / "run"))
    assert same(undisturbed, contents(tmp_path / "run"))


@pytest.mark.parametrize("kills, least, epochs, seconds", [
    (2, 1, "0.4", 2.5), pytest.param(20, 20, "3", 1.5, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments_changes_nothing(undisturbed, tmp_path, kills, least, epochs, seconds):
    """A chain of real processes: each is killed at a random moment after its work began, the next goes on.

    A short run may end before the second kill.
    """
    wanted = undisturbed if epochs == "0.4" else run(tmp_path / "whole", "--epochs", epochs)
    context = multiprocessing.get_context("forkserver")                # imports torch once, not 20 times
    context.set_forkserver_preload(["search"])
    g, out, left = random.Random(kills), tmp_path / "run", kills
    flags = [*SHORT, "--stages", "2", "--epochs", epochs, "--out", str(out)]
    while True:
        process = context.Process(target=search.main, args=(flags,))
        process.start()
        while process.is_alive() and not (out / "args.json").exists():
            time.sleep(0.01)
        process.join(g.uniform(0, seconds) if left else None)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        left -= 1
        flags = ["--resume", "--out", str(out)]
    assert process.exitcode == 0
    for name in ("log.jsonl", "summary.json", "args.json"):
        assert (out / name).read_text().endswith("\n")
    assert same(wanted, contents(out)) and kills - left >= least
