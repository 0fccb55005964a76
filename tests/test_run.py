"""What carries a run: killed at any place it goes on to the same bits, a signal ends its step, a step that is
not finite is left out, and the log says what was.

The oracles: an undisturbed run, and the same training by formulas. The network is so small, and its gradients
are formulas too, that a run takes milliseconds, and that a process can be forked to be killed.
"""
from machinery import files, processes
from machinery.run import Run

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch

STEPS, EPOCH, EVERY, STAGES = 7, 4, 3, 2
CPU = torch.device("cpu")


def fit(out, signals=(), spoil=lambda stage, step, p: None, each_step=lambda: None, **more):
    """Train w (2,) to 1, 2, .. by SGD with momentum, as far as it goes; returns (w, momentum, rows)."""
    out.mkdir(exist_ok=True)
    run = Run(out / "last.pt", {"lr": 0.1}, CPU, signals, out / "log.jsonl", **more)
    run.resume()
    net = torch.nn.ParameterDict({"w": torch.zeros(2)})
    for stage in range(run.state["stage"], STAGES):
        sgd = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        start = run.begin(stage, net=net, sgd=sgd, teacher=None)
        for step in run.steps(STEPS, EPOCH, f"A{stage}", EVERY):
            each_step()
            assert step >= start
            net["w"].grad = gradient(net["w"].detach(), stage, step)
            metrics = torch.tensor([float(step), 1 / (1 + step)])
            spoil(stage, step, net["w"].grad)
            if run.synchronise([net["w"]], metrics):
                sgd.step()
            if run.ends_epoch(step):
                run.log({"stage": stage})
    momentum = sgd.state_dict()["state"].get(0, {}).get("momentum_buffer")
    return net["w"].detach(), momentum, rows_of(out), run


def gradient(w, stage, step):
    return w - (1 + step) * torch.tensor([1.0, -1.0 - stage])


def by_hand(left_out=()):
    """(w, momentum) after all steps but those (stage, step) that are left out."""
    w = torch.zeros(2)
    for stage in range(STAGES):
        speed = torch.zeros(2)
        for step in range(STEPS):
            if (stage, step) not in left_out:
                speed = 0.9 * speed + gradient(w, stage, step)
                w = w - 0.1 * speed
    return w, speed


def rows_of(out):
    """The log, without the time."""
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"}
            for line in (out / "log.jsonl").read_text().splitlines()]


def same(one, other):
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("undisturbed") / "run")


def test_a_run_takes_every_step_and_logs_every_epoch(undisturbed):
    w, speed = by_hand()
    torch.testing.assert_close(undisturbed[0], w)
    torch.testing.assert_close(undisturbed[1], speed)
    assert undisturbed[2] == [
        {"stage": stage, "step": step, "steps": STEPS, "loss": pytest.approx(loss), "accuracy": accuracy}
        for stage in range(STAGES) for step, loss, accuracy in (
            (4, 1.5, pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)),
            (7, 5.0, pytest.approx((1 / 5 + 1 / 6 + 1 / 7) / 3)))]


def count_places(monkeypatch, reached):
    """Call `reached` at every place where a kill might harm: before a file's bytes are surely written, before
    it takes its name, and after. Returns `reached`, which is to be called in every step too.
    """
    fsync, replace = os.fsync, os.replace

    def replaced(*names):
        reached()
        replace(*names)
        reached()
    monkeypatch.setattr(files.os, "fsync", lambda file: (reached(), fsync(file)))
    monkeypatch.setattr(files.os, "replace", replaced)
    return reached


def killed_at(place, out, monkeypatch):
    """Whether a process of its own, which trains in `out`, was killed with SIGKILL at its n-th place."""
    pid = os.fork()
    if pid == 0:
        left = [place]

        def reached():
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        try:
            fit(out, each_step=count_places(monkeypatch, reached))
        finally:
            os._exit(left[0] < 0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def places(tmp_path):
    """How many places a whole run has."""
    reached = []
    with pytest.MonkeyPatch.context() as patch:
        fit(tmp_path / "counted", each_step=count_places(patch, lambda: reached.append(1)))
    return len(reached)


@pytest.mark.parametrize("how_many", [12, pytest.param(None, marks=pytest.mark.slow)])
def test_a_kill_at_any_place_changes_nothing(undisturbed, tmp_path, monkeypatch, how_many):
    n = places(tmp_path)
    assert n > 2 * STAGES * STEPS
    for place in random.Random(1).sample(range(n), how_many or n):
        out = tmp_path / str(place)
        assert killed_at(place, out, monkeypatch)
        assert len(list(out.glob("*.tmp"))) <= 1
        assert same(fit(out), undisturbed)
    assert not killed_at(n, tmp_path / "whole", monkeypatch)


def test_nor_does_one_kill_after_another(undisturbed, tmp_path, monkeypatch):
    g, kills = random.Random(0), 0
    while killed_at(g.randrange(40), tmp_path / "run", monkeypatch):
        kills += 1
    assert kills > 3 and same(fit(tmp_path / "run"), undisturbed)


def test_a_kill_loses_no_more_steps_than_lie_between_checkpoints(tmp_path):
    for n in range(STAGES * STEPS):
        out, left = tmp_path / str(n), iter([None] * n)
        with pytest.raises(StopIteration):
            fit(out, each_step=lambda left=left: next(left))
        saved = files.load_checkpoint(out / "last.pt")
        at = max(k for k in (0, 3, 4, 6, 7) if k <= n % STEPS)             # every third, and an epoch's end
        assert (saved["stage"], saved["step"]) == (n // STEPS, at)


class Countdown(list):
    """Caught signals that turn up when they have been looked for `n` times."""

    def __init__(self, n, number=signal.SIGTERM):
        super().__init__([number])
        self.n = n

    def __bool__(self):
        self.n -= 1
        return self.n < 0


@pytest.mark.parametrize("looks", [0, 3, 6, 10])                # the stage's first step, an epoch's last, ..
def test_a_signal_ends_its_step_and_the_run_goes_on(undisturbed, tmp_path, capsys, looks):
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "run", signals=Countdown(looks))
    stage, step = divmod(looks, STEPS)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().out.endswith(f"stopped in A{stage} after step {step + 1}; --resume goes on\n")
    assert files.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == step + 1
    assert same(fit(tmp_path / "run"), undisturbed)


def test_without_a_checkpoint_nothing_is_kept(tmp_path, capsys):
    run = Run(None, {}, CPU, Countdown(0, signal.SIGINT))
    run.resume()
    run.begin(0)
    with pytest.raises(SystemExit) as stopped:
        list(run.steps(3, 3, "A0", 1))
    assert stopped.value.code == 130 and "after step 1; nothing is kept" in capsys.readouterr().out


def test_a_signal_is_noted_and_a_second_ctrl_c_is_obeyed_at_once(monkeypatch):
    usual = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with processes.catch_signals() as caught:
        assert not processes.pending_signal(caught)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)                    # which a cluster may send twice
        assert caught == [signal.SIGTERM] * 2 and processes.pending_signal(caught) == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert usual == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")              # torchrun passes on what a terminal has sent
    with processes.catch_signals() as caught:
        for n in range(3):
            os.kill(os.getpid(), signal.SIGINT)
    assert caught == [signal.SIGINT] * 3


def ends(how):
    """In a process of its own."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "waits":
        signal.pause()
    raise SystemExit(how)


@pytest.mark.parametrize("ways, signals, status, begun", [
    ([0, 0, 0], [], None, 3), ([0, "waits", 3, 0, "waits"], [], 3, 3), (["waits"] * 3, [2], 130, 2),
    (["waits", "killed"], [], "a process was killed, of too little memory perhaps", 2)], ids=str)
def test_of_processes_side_by_side_one_ends_all(ways, signals, status, begun, monkeypatch):
    fork, started = multiprocessing.get_context("fork"), []
    monkeypatch.setattr(fork, "Process", lambda args, usual=fork.Process, **more: (
        started.append(args[1]), usual(args=args, **more))[1])
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    with pytest.raises(SystemExit) if status else contextlib.nullcontext() as stopped:
        processes.side_by_side(ends, ways, 2, signals)
    assert status is None or stopped.value.code == status
    assert started == ways[:begun] and not multiprocessing.active_children()


def spoiled(*steps, value=float("nan")):
    def spoil(stage, step, grad):
        if (stage, step) in steps:
            grad[1] = value
    return spoil


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_step_that_is_not_finite_is_left_out(tmp_path, capsys, value):
    """Weights, momentum and means are as if it had not been; the others are taken, also after a kill."""
    bad, out = ((0, 0), (0, 5), (1, 3)), tmp_path / "run"
    w, speed = by_hand(bad)
    found = fit(out, spoil=spoiled(*bad, value=value))
    torch.testing.assert_close(found[0], w)
    torch.testing.assert_close(found[1], speed)
    assert [row["loss"] for row in found[2]] == [2.0, 5.0, 1.0, 5.0]
    assert "loss or gradients of step 5 are not finite; it is left out" in capsys.readouterr().out
    assert found[3].state["skipped"] == [3]                     # of the last stage
    with pytest.raises(SystemExit):
        fit(tmp_path / "cut", signals=Countdown(5), spoil=spoiled(*bad, value=value))
    assert files.load_checkpoint(tmp_path / "cut" / "last.pt")["skipped"] == [0, 5]
    assert same(fit(tmp_path / "cut", spoil=spoiled(*bad, value=value)), found)


def test_a_loss_that_is_not_finite_is_noticed_beside_finite_gradients():
    p, run = torch.nn.Parameter(torch.ones(3)), Run(None, {}, CPU)
    p.grad = torch.ones(3)
    assert run.synchronise([p], torch.tensor([1.0, 0.5])) and run.synchronise([p], torch.tensor([3.0, 0.0]))
    assert not run.synchronise([p], torch.tensor([float("nan"), 0.5]))
    assert run.synchronise([p], torch.tensor([7.0, 1.0]), "alpha_")
    assert run.means() == {"loss": 2.0, "accuracy": 0.25, "alpha_loss": 7.0, "alpha_accuracy": 1.0}


def test_too_many_such_steps_end_the_run_whose_checkpoint_stays(tmp_path):
    bad = [(1, 1), (1, 3), (1, 6)]
    fit(tmp_path / "borne", spoil=spoiled((0, 1), *bad[1:]), most_skipped=2)    # two in the second stage
    with pytest.raises(SystemExit, match="not finite in step 1, 3, 6; try a lower --lr"):
        fit(tmp_path / "run", spoil=spoiled((0, 1), *bad), most_skipped=2)
    saved = files.load_checkpoint(tmp_path / "run" / "last.pt")
    assert (saved["stage"], saved["step"], saved["skipped"]) == (1, 6, [1, 3])
    assert torch.isfinite(saved["net"]["w"]).all()
    with pytest.raises(SystemExit, match="not finite in step 1, 3, 6;"):
        fit(tmp_path / "run", spoil=spoiled(*bad), most_skipped=2)


def test_the_log_is_the_checkpoints_whatever_has_become_of_its_file(undisturbed, tmp_path):
    for n, change in enumerate((lambda log: log.unlink(), lambda log: log.write_text('{"stage": 0, "lo'))):
        with pytest.raises(SystemExit):
            fit(tmp_path / str(n), signals=Countdown(5))
        change(tmp_path / str(n) / "log.jsonl")
        assert same(fit(tmp_path / str(n)), undisturbed)


def test_the_time_that_a_run_lay_still_is_not_counted(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def tick():
        now[0] += 10
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", signals=Countdown(8), each_step=tick)
    now[0] += 1e6
    assert fit(tmp_path / "run", each_step=tick)[3].seconds() == 10 * STEPS      # of the last stage
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] for line in lines] == [40, 70] * 2


def test_a_line_now_and_then_says_how_it_goes(capsys):
    run = Run(None, {}, CPU)
    run.begin(2)
    for step in run.steps(600, 10 ** 6, "A2", 10 ** 6):
        run.synchronise([], torch.tensor([2.0 if step < 500 else 8.0, 0.5]))
        if step == 499:
            run.log({})
    assert capsys.readouterr().out.splitlines() == [
        "A2 step 250/600: loss 2.000, accuracy 50.0 %", "A2 step 500/600: loss 2.000, accuracy 50.0 %",
        "A2 step 600/600: loss 8.000, accuracy 50.0 %"]


@pytest.mark.parametrize("change, says", [
    ({"version": 0}, r"last\.pt is of version 0, this is version \d+: start anew"),
    ({"settings": {"lr": 0.2}}, r"last\.pt is not a checkpoint of this run \(its lr is 0\.2, not 0\.1\)"),
    ({"settings": {}}, r"last\.pt is not a checkpoint of this run \(its lr is None, not 0\.1\)"),
    ({"settings": 3}, r"last\.pt is not a checkpoint of this run"),
    ({"step": "x"}, r"last\.pt is not a checkpoint of this run \(invalid literal"),
    ({"step": -1}, r"last\.pt is not a checkpoint of this run \(there is no such stage, or step"),
    ({"stage": 5}, r"last\.pt is not a checkpoint of this run \(there is no such stage, or step"),
    ({"metrics": {"": 3}}, r"last\.pt is not a checkpoint of this run \("),
    ({"net": {}}, r"last\.pt is not a checkpoint of this run \(Error"),
    ({"net": {"w": torch.zeros(3)}}, r"last\.pt is not a checkpoint of this run \(Error"),
    ({"sgd": {}}, r"last\.pt is not a checkpoint of this run \("),
    ({"momentum": torch.zeros(1)}, r"last\.pt is not a checkpoint of this run \(sgd is of other shapes"),
    ({"momentum": 0.5}, r"last\.pt is not a checkpoint of this run \(")])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, change, says):
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", signals=Countdown(5))
    path = tmp_path / "run" / "last.pt"
    before = files.load_checkpoint(path)
    if "momentum" in change:                            # a fused step would write beyond its end
        group = before["sgd"] | {"state": {0: {"momentum_buffer": change["momentum"]}}}
        change = {"sgd": group}
    missing = {key: value for key, value in before.items() if key not in change}
    for content, pattern in ((before | change, says), (missing, "last.pt is ")):
        files.write(path, files.pack(content))
        with pytest.raises(files.Refused, match=pattern) as error:
            fit(tmp_path / "run")
        assert "\n" not in str(error.value)
