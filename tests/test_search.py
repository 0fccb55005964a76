"""The search as a whole and one stage of it, step for step: it repeats, it goes on, it never sees the test
images, it trains as the paper says.

The oracles: Figure 2's box written out, two steps of w and one of alpha, each on its own part of the images,
by Eq. 4, at falling temperature and lambda, gradients by autograd and every update by its formula; and a
second run, with the same seed, with another, undisturbed beside interrupted.
"""
from machinery.run import Run
from machinery.settings import train_parser

import argparse
import itertools
import json
import math
import re
import resource
import shlex
from functools import partial

import pytest
import tiny
import torch
from oracles import TINY, chosen, macs, seeded, settle, without_norm
from test_run import Countdown
from test_train import rate

import data
import flops
import plot
import search
from derive import derive, evaluator, inherit, open_supernet, recalibrate
from derive import main as derive_main
from grow import grow
from network import Network
from ops import initialise
from space import SPACES, Arch
from supernet import SuperNet, require_grad

SPACE, STEPS, CPU = TINY._replace(resolution=16, stage=3), 11, torch.device("cpu")
SHORT = [*tiny.SHORT, "--stages", "2"]
pytestmark = pytest.mark.usefixtures("tiny_world")


def run(out, *more):
    search.main([*SHORT, "--out", str(out), *more])
    return contents(out)


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
    return (one.keys() == other.keys() and all(one[key] == other[key] for key in one if key not in weights)
            and all(torch.equal(one[key][name], other[key][name]) for key in weights for name in one[key]))


def settings(**more):
    """By this seed no two kernels are paired of which both see all pixels: rounding alone would part them."""
    return argparse.Namespace(**{
        "batch_size": 16, "lr": 0.2, "alpha_lr": 0.03, "weight_decay": 0.05, "seed": 7,
        "checkpoint_every": 500, "accumulate": 1, "draw": "uniform"} | more)


def by_hand(net, teacher, loader, parts, args, left_out):
    """Train `net` as `train_stage` should, by formulas. left_out: (kind, step) that are not taken."""
    weights, alphas = net.weights(), net.alphas()
    batches = [loader.shuffled(part, args.seed, SPACE.stage, kind)
               for part, kind in zip(parts, (search.WEIGHTS, search.ALPHAS))]
    speed, first, second = ([torch.zeros_like(p) for p in ps] for ps in (weights, alphas, alphas))
    net.train()
    for step in range(STEPS):
        at = step / STEPS
        tau, lam = 5 * (0.1 / 5) ** at, 0.5 + (0.05 - 0.5) * at if teacher else 0.0

        def loss(kind, tau=tau, lam=lam, step=step):
            total, batch = 0.0, next(batches[kind])
            for x, y in zip(*(part.chunk(args.accumulate) for part in batch)):    # each goes the same paths
                seed = args.seed, SPACE.stage, search.PATHS, step, kind
                g = data.generator(*seed)
                path = net.sample(0 if kind else tau, g, args.draw == "uniform" and not kind)  # alpha's: one
                log_p = net(x, path).log_softmax(1)
                hard = -log_p[torch.arange(len(y)), y]
                with torch.no_grad():
                    said = teacher(x).softmax(1) if teacher else log_p.exp()
                soft = (said * (said.log() - log_p)).sum(1)
                total = total + ((1 - lam) * hard + lam * soft).sum() / len(batch[1])
            return total
        gradients = torch.autograd.grad(loss(0), weights, allow_unused=True)
        with torch.no_grad():
            for p, g, v in zip(weights, gradients, speed):
                if g is not None and (0, step) not in left_out:           # what was not sampled stays
                    v.mul_(0.9).add_(g + args.weight_decay * p)
                    p -= rate(step, STEPS, args.lr) * v
        if step % 2 == 1:
            gradients = torch.autograd.grad(loss(1), alphas)
            if (1, step) in left_out:
                continue
            n = 1 + sum((1, earlier) not in left_out for earlier in range(1, step, 2))
            with torch.no_grad():
                for a, g, m, v in zip(alphas, gradients, first, second):                  # Adam's
                    m.mul_(0.5).add_(0.5 * g)
                    v.mul_(0.999).add_(0.001 * g ** 2)
                    move = args.alpha_lr * m / (1 - 0.5 ** n) / ((v / (1 - 0.999 ** n)).sqrt() + 1e-8)
                    a -= torch.where(g == 0, 0, move)                     # nor do options without a gradient


@pytest.mark.parametrize("taught, pieces, bad, draw", [
    (True, 1, [], "alpha"), (True, 1, [(0, 0), (1, 5), (0, 7)], "uniform"),
    (False, 3, [(0, 4), (0, 10)], "uniform")])
def test_a_stage_is_trained_step_for_step_as_the_paper_says(taught, pieces, bad, draw, monkeypatch):
    """Also where the numbers of some steps, of weights or of alpha, are not finite: those are left out."""
    images = data.fake(6 * 16 * STEPS // 5, (7,), size=16)
    args = settings(accumulate=pieces, draw=draw)
    parts = data.split(images.labels, 0)
    loader = data.Loader(images, images.statistics(parts[0]), args.batch_size, CPU)
    loader.mean, loader.std = loader.mean.double(), loader.std.double()
    net, wanted = (SuperNet(SPACE, 1, 10, seeded()).double() for _ in range(2))
    teacher = None
    if taught:
        teacher = Network(chosen(SPACE, [(2, 0, 0), (7, 1, 1), (4, 2, 1)])).double().requires_grad_(False)
        initialise(teacher, seeded(1))
        teacher(next(loader.ordered(parts[0][:64]))[0])                      # its batch norm is not trivial
        teacher.eval()
    args.epochs = [9, 9, 9, STEPS / (len(parts[0]) // args.batch_size), 9]
    backward, order = search.backward, [(k, n) for n in range(STEPS) for k in range(1 + (n % 2 == 1))]
    calls = iter(order)

    def sometimes(supernet, *given):
        metrics, parameters = backward(supernet, *given), supernet.weights()
        if next(calls) in bad:
            if not parameters[0].requires_grad:
                parameters = supernet.alphas()
            parameters[-1].grad[0] = math.inf
        return metrics
    monkeypatch.setattr(search, "backward", sometimes)
    run = Run(None, {}, CPU)
    search.train_stage(net, teacher, loader, parts, args, run)
    by_hand(wanted, teacher, loader, parts, args, bad)
    rows, wanted = run.state["rows"], wanted.state_dict()
    assert run.state["step"] == STEPS == rows[-1]["steps"] and next(calls, None) is None
    assert run.state["skipped"] == [step for _, step in bad]
    began = SuperNet(SPACE, 1, 10, seeded()).state_dict()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-9, msg=name)
    assert sum(not torch.equal(wanted[name].float(), began[name]) for name in began) > 40
    assert rows[-1]["temperature"] == pytest.approx(5 * math.exp(math.log(0.02) * (STEPS - 1) / STEPS))


def net_and_batch():
    g = data.generator(0)
    net = SuperNet(SPACES["small"][0], 1, 10, g).train()
    return net, (torch.rand(12, 1, 16, 16, generator=g), torch.arange(12) % 10)


def gradients(parameters):
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def test_the_teacher_learns_nothing_and_the_student_does():
    net, batch = net_and_batch()
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 10))
    loss, accuracy = search.backward(net, teacher, batch, partial(net.sample, 1.0), (0, 0), 0.5, 1)
    assert all(p.grad is None for p in teacher.parameters())
    assert net.classifier.weight.grad.abs().sum() > 0 and 0 <= float(accuracy) <= 1 < float(loss)


@pytest.mark.parametrize("kind", ["weights", "alphas"])
def test_both_steps_learn_from_the_teacher(kind):
    """A teacher that says what the student does leaves nothing to learn; half of its words halve the rest."""
    net, batch = net_and_batch()
    require_grad(net.alphas(), kind == "alphas"), require_grad(net.weights(), kind == "weights")

    def echo(x):
        return net(x, net.sample(1.0, data.generator(0, 4)))
    found = []
    for lam in (0.0, 0.5, 1.0):
        net.zero_grad()
        search.backward(net, echo, batch, partial(net.sample, 1.0), (0, 4), lam, 1)
        found.append(gradients(getattr(net, kind)()))
    size = float(found[0].abs().max())
    assert size > 1e-4 and float(found[2].abs().max()) < 1e-3 * size
    torch.testing.assert_close(found[1], found[0] / 2, rtol=1e-3, atol=1e-4 * size)


def test_pieces_of_a_batch_give_the_gradient_of_the_whole(monkeypatch):
    without_norm(monkeypatch.setattr)
    found = []
    for pieces in (1, 3, 5):
        net, batch = net_and_batch()
        metrics = search.backward(net, None, batch, partial(net.sample, 1.0), (2,), 0.0, pieces)
        found.append((metrics, gradients(net.parameters())))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def undisturbed(tiny_world, tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed") / "run")


def test_the_same_seed_gives_the_same_run(undisturbed, tmp_path):
    assert same(undisturbed, run(tmp_path / "again"))


def test_another_seed_gives_another_run(undisturbed, tmp_path):
    other = run(tmp_path / "other", "--seed", "1")
    assert not same(undisturbed, other)
    assert undisturbed["log"] != other["log"]


def test_derive_measures_what_the_search_measured(tiny_world, tmp_path):
    run(tmp_path / "run", "--stages", "2")
    measure = evaluator(tmp_path / "run", None)
    for row in json.loads((tmp_path / "run" / "summary.json").read_text()):
        arch = Arch.from_json((tmp_path / "run" / f"A{row['stage']}.json").read_text())
        assert measure(open_supernet(tmp_path / "run", row["stage"]), arch) == row["accuracy"]


def test_the_log_has_probabilities_of_every_few_steps(undisturbed, tmp_path):
    log = run(tmp_path / "run", "--stages", "1", "--epochs", "1.3")["log"]
    assert [[step for step, _ in row["alphas"]] for row in log] == [[3, 6, 9, 12, 12], [15, 16]]
    row = undisturbed["log"][1]
    assert set(row) == {"stage", "epoch", "step", "steps", "temperature", "lambda", "alphas",
                        "loss", "accuracy", "alpha_loss", "alpha_accuracy"}
    assert undisturbed["log"][0]["lambda"] == 0 and row["lambda"] == pytest.approx(0.5 - 0.45 * 10 / 11)


@pytest.mark.parametrize("looks", [10, 14])        # at the end of a stage, and within the one after it
def test_a_stopped_run_goes_on_as_if_nothing_had_been(undisturbed, tmp_path, looks, monkeypatch, capsys):
    out, stop = tmp_path / "run", search.contextlib.nullcontext(Countdown(looks))
    with monkeypatch.context() as patch:
        patch.setattr(search.processes, "catch_signals", lambda: stop)
        with pytest.raises(SystemExit) as stopped:
            run(out)
    assert stopped.value.code == 143 and "--resume goes on" in capsys.readouterr().out
    search.main(["--resume", "--out", str(out)])
    assert same(undisturbed, contents(out))


def test_resume_begins_a_run_where_there_is_none_and_takes_the_command_that_began_it(undisturbed, tmp_path):
    out = tmp_path / "run"
    assert same(undisturbed, run(out, "--resume"))
    (out / "summary.json").unlink()
    assert same(undisturbed, run(out, "--resume"))              # it is at its end


def test_a_finished_run_goes_on_with_another_stage(undisturbed, tmp_path):
    out = tmp_path / "run"
    run(out, "--stages", "1")
    search.main(["--resume", "--out", str(out), "--stages", "2"])
    assert same(undisturbed, contents(out))


def test_five_stages_grow_within_their_targets_and_files_are_there(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(plot, "curve", tiny.curve)
    search.main([*SHORT, "--stages", "5", "--epochs", "0.2", "--out", str(out)])
    summary = json.loads((out / "summary.json").read_text())
    assert [row["stage"] for row in summary] == list(range(5))
    assert all(row["flops"] <= target for row, target in zip(summary, flops.TARGETS["small"], strict=True))
    assert set(summary[0]) == {"stage", "flops", "params", "accuracy", "seconds", "device_hours", "kwh",
                               "co2e_lb"}
    said = [f"cst on fake, seed 0, into {out}"]
    for k in range(5):
        said += [rf"A{k}: grown from A{k - 1}: .* moved by \S+ of their size"] * (k > 0) + [
            rf"A{k}: 2 steps, each on two of 10\^\d+ networks, " + (f"taught by A{k - 1}" if k else ".*"),
            rf"A{k} step 2/2: loss .*",                                    # where a stage ends, at the least
            rf"A{k}: derived a network of \d\.\d\d M MACs, \d+\.\d % right on the validation split"]
    said += ["stage .*", *(f"A{k} .*" for k in range(5)), "all .*", f"curve: {out}/curve.png; next, .*:",
             f"    python train.py {out}", rf"    python derive.py {out} --flops \d+"]
    lines = capsys.readouterr().out.splitlines()
    for line, pattern in zip(lines, said, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    scripts = {"train.py": train_parser(None).parse_args, "derive.py": derive_main}
    for command in lines[-2:]:
        _, script, *argv = shlex.split(command)
        scripts[script](argv)
    assert list(out.glob("flops-*.json"))
    next(out.glob("flops-*.json")).unlink()
    names = {path.name for path in out.iterdir()}
    assert names == {"args.json", "log.jsonl", "last.pt", "summary.json", "curve.png",
                     *(f"A{k}.{end}" for k in range(5) for end in ("json", "pt"))}


def test_the_search_never_sees_the_test_images(tmp_path, monkeypatch):
    load, asked = data.load, []
    monkeypatch.setattr(data, "load", lambda name, part: (asked.append(part), load(name, part))[1])
    run(tmp_path / "run", "--epochs", "0.1")
    assert asked == ["train"]


@pytest.mark.parametrize("by", ["supernet", "network"])
def test_a_stage_grows_ends_in_its_network_and_teaches_the_next(tmp_path, monkeypatch, by):
    """Figure 2 around the training, in place of which all grows likely that is dear."""
    out, begun, grown = tmp_path / "run", [], []

    def train(net, teacher, loader, parts, *_):
        settle(net, net.space.stage)
        with torch.no_grad():
            for alpha in net.alphas():
                alpha[-1] = 9
        begun.append((teacher, loader, parts, derive(net)))

    def growth(net, space, generator, how):
        grown.append(how)
        return grow(net, space, generator, how)
    monkeypatch.setattr(search, "train_stage", train)
    monkeypatch.setattr(search, "grow", growth)
    search.main([*SHORT, "--widen", "zero", "--seed", "4", "--teacher", by, "--out", str(out)])
    summary, labels = json.loads((out / "summary.json").read_text()), data.load("fake", "train").labels
    assert grown == ["zero"] and begun[0][0] is None
    for stage, (teacher, loader, parts, likely) in enumerate(begun):
        assert all(torch.equal(one, two) for one, two in zip(parts, data.split(labels, 4), strict=True))
        arch = Arch.from_json((out / f"A{stage}.json").read_text())
        assert macs(arch) == summary[stage]["flops"] <= flops.TARGETS["small"][stage] < macs(likely)
        network = inherit(Network(arch), open_supernet(out, stage))
        batches = loader.shuffled(parts[0], 4, stage, search.WEIGHTS)
        recalibrate(network, itertools.islice(batches, 4))                 # as many as tiny.py says
        with torch.no_grad():
            right = [network(x).argmax(1) == y for x, y in loader.ordered(parts[1])]
        assert summary[stage]["accuracy"] == pytest.approx(float(torch.cat(right).float().mean()))
        if stage == 0:
            x = next(loader.ordered(parts[1][:8]))[0]
            if by == "supernet":                # on its most likely path, normalised by the batch
                network = inherit(Network(likely), open_supernet(out, stage)).train()
            with torch.no_grad():
                torch.testing.assert_close(begun[1][0](x), network(x))
            assert not begun[1][0](x).requires_grad


@pytest.mark.parametrize("flags, grown, taught", [
    ([], True, True), (["--no-distill"], True, False), (["--no-grow"], False, True),
    (["--method", "direct"], False, False), (["--method", "naive"], True, False)])
def test_the_methods_differ_in_growth_and_teacher(tmp_path, flags, grown, taught, capsys):
    """Figs. 5 and 6. The oracles: what is printed of a growth, the log's lambda, and the networks: what has
    grown keeps the operations of A0's network, of whose blocks A1's are the first.
    """
    found = run(tmp_path / "run", *flags, "--epochs", "0.1")
    moved = re.findall(r"A1: grown from A0: .* logits moved by (\S+) of their size", capsys.readouterr().out)
    assert len(moved) == grown
    if grown:
        assert (float(moved[0]) > 1e-2) == ("naive" in flags)              # the others keep what it computes
    rows = found["log"]
    assert [row["lambda"] > 0 for row in rows] == [taught and row["stage"] == 1 for row in rows]
    small, large = (Arch.from_json((tmp_path / "run" / f"A{k}.json").read_text()) for k in range(2))
    old = [block.op for block in small.blocks]
    free = derive(open_supernet(tmp_path / "run", 1), flops.TARGETS["small"][1])
    assert [block.op for block in free.blocks[:2]] != old
    assert [block.op for block in large.blocks[:2]] == old if grown else large == free


def test_compound_scaling_searches_a0_alone_and_goes_on(tmp_path):
    out, flags = tmp_path / "run", [*SHORT, "--method", "scaling", "--epochs", "0.1"]
    search.main([*flags, "--stages", "1", "--out", str(out)])
    search.main(["--stages", "2", "--resume", "--out", str(out)])
    first, second = json.loads((out / "summary.json").read_text())
    assert second["accuracy"] is None and not (out / "A1.pt").exists()
    assert first["flops"] <= second["flops"] <= flops.TARGETS["small"][1]
    assert {json.loads(line)["stage"] for line in (out / "log.jsonl").read_text().splitlines()} == {0}


def test_a_dry_run_says_what_a_run_would_cost_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    """A line a stage: steps, seconds a step, hours, kWh, CO2e. It is said as soon as it is measured."""
    monkeypatch.chdir(tmp_path)
    line = re.compile(r"^(A\d +\d+ +\d+\.\d{3}|all) +\d+\.\d{3} +\d+\.\d{4} +\d+\.\d{4}$", re.MULTILINE)
    search.main([*SHORT, "--dry-run"])
    assert [found.split()[0] for found in line.findall(capsys.readouterr().out)] == ["A0", "A1", "all"]

    def train_stage(supernet, *given, usual=search.train_stage):
        if supernet.space.stage == 1:
            raise KeyboardInterrupt
        usual(supernet, *given)
    monkeypatch.setattr(search, "train_stage", train_stage)
    with pytest.raises(KeyboardInterrupt):
        search.main([*SHORT, "--dry-run"])
    assert [found.split()[0] for found in line.findall(capsys.readouterr().out)] == ["A0"]
    assert not any(tmp_path.iterdir())


def test_a_full_disk_ends_in_one_line_and_the_run_goes_on(undisturbed, tmp_path, capsys):
    usual, out = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "run"
    run(out, "--stages", "1")
    limit = (out / "last.pt").stat().st_size + 1                           # enough for A0, not for A1
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            run(out, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and said == (
        f"search.py: {out}/last.pt: File too large; what was written before is whole\n")
    assert torch.load(out / "last.pt", weights_only=True)["stage"] == 0
    assert same(undisturbed, run(out, "--resume"))
