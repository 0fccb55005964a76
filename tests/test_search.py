"""The search as a whole, on the `fake` patterns: it repeats, it goes on, it never sees the test images, it says no clearly.

The oracle is a second run: with the same seed, with another, undisturbed beside interrupted.
"""
import json

import pytest
import torch

import data
import search

SHORT = ["--data", "fake", "--epochs", "0.4", "--batch-size", "32", "--checkpoint-every", "5", "--device", "cpu"]


def run(out, *more):
    search.main([*SHORT, "--stages", "2", "--out", str(out), *more])
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
    return (all(one[key] == other[key] for key in one if key not in weights)
            and all(torch.equal(one[key][name], other[key][name]) for key in weights for name in one[key]))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run(tmp_path_factory.mktemp("undisturbed") / "run")


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


@pytest.mark.parametrize("looks", [3, 12, 16])                    # in A0, in A1, and after A0's last checkpoint
def test_a_stopped_run_goes_on_as_if_nothing_had_been(undisturbed, tmp_path, looks, monkeypatch, capsys):
    out = tmp_path / "run"
    monkeypatch.setattr(search, "signals", lambda: search.contextlib.nullcontext(Countdown(looks)))
    with pytest.raises(SystemExit) as stopped:
        run(out)
    assert stopped.value.code == 143 and f"--resume --out {out}" in capsys.readouterr().out
    monkeypatch.undo()
    search.main(["--resume", "--out", str(out)])
    assert same(undisturbed, contents(out))


def test_macs_rise_from_stage_to_stage_and_files_are_there(tmp_path):
    search.main([*SHORT[:3], "0.2", "--device", "cpu", "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    macs = [row["flops"] for row in summary]
    assert len(macs) == 5 and macs == sorted(set(macs))
    assert set(summary[0]) == {"stage", "flops", "params", "accuracy", "seconds", "device_hours", "kwh", "co2e_lb"}
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"args.json", "log.jsonl", "last.pt", "summary.json", "curve.png",
                     *(f"A{k}.{end}" for k in range(5) for end in ("json", "pt"))}


def test_the_search_never_sees_the_test_images(tmp_path, monkeypatch):
    load, asked = data.load, []
    monkeypatch.setattr(data, "load", lambda name, part: (asked.append(part), load(name, part))[1])
    run(tmp_path / "run")
    assert asked == ["train"]


def test_the_teacher_learns_nothing_and_the_student_does():
    g = data.generator(0)
    net = search.SuperNet(search.SPACES["small"][0], 1, 10, g)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    x, y = torch.rand(8, 1, 28, 28, generator=g), torch.arange(8)
    loss, right = search.two_paths(net, teacher, x, y, 1.0, 0.5, g)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert net.classifier.weight.grad.abs().sum() > 0 and 0 <= float(right) <= 1


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [search.learning_rate(0.2, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.04) and rates[-1] == pytest.approx(0, abs=1e-9)
    assert max(rates) <= 0.2 and rates[5:] == sorted(rates[5:], reverse=True)


@pytest.mark.parametrize("flags, says", [
    (["--stages", "0"], "--stages"),
    (["--stages", "6"], "--stages"),
    (["--stages", "two"], "--stages"),
    (["--space", "large"], "--space"),
    (["--data", "imagenette"], "--data"),
    (["--method", "darts"], "--method"),
    (["--widen", "naive"], "--widen"),
    (["--epochs", "0"], "--epochs"),
    (["--epochs", "1", "2"], "--epochs"),
    (["--epochs", "nan"], "--epochs"),
    (["--batch-size", "0"], "--batch-size"),
    (["--batch-size", "1.5"], "--batch-size"),
    (["--lr", "-1"], "--lr"),
    (["--alpha-lr", "inf"], "--alpha-lr"),
    (["--weight-decay", "-1e-4"], "--weight-decay"),
    (["--mu", "0"], "--mu"),
    (["--flops-target", "20Q"], "--flops-target"),
    (["--flops-target", "1M", "2M"], "--flops-target"),
    (["--seed", "-1"], "--seed"),
    (["--device", "abacus"], "--device"),
    (["--resume"], "--resume"),
    (["--method", "scaling", "--flops-target", "off"], "--flops-target"),
    (["--colour", "red"], "--colour"),
])
def test_bad_use_ends_in_one_line(flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        search.main(flags)
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.err.count("\n") == 1 and says in captured.err and not captured.out
    assert not list(tmp_path.iterdir())                            # before any work


def test_a_folder_that_holds_something_is_refused(tmp_path, capsys):
    (tmp_path / "args.json").write_text("{}")
    for flags, says in ((["--out", str(tmp_path)], "--resume"),
                        (["--out", str(tmp_path / "args.json")], "--out"),
                        (["--resume", "--out", str(tmp_path / "none")], "--resume")):
        with pytest.raises(SystemExit) as stopped:
            search.main(flags)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("\n") == 1 and says in error
    assert (tmp_path / "args.json").read_text() == "{}"


def test_resume_refuses_settings_that_are_not_the_runs(tmp_path, capsys):
    run(tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        search.main(["--resume", "--out", str(tmp_path / "run"), "--seed", "3"])
    assert stopped.value.code == 2 and "--seed is 3" in capsys.readouterr().err
