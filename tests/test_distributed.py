"""Many processes, real ones, over gloo: they stay equal, compute what one does, notice each other's death.

The oracles: one process on whole batches, an undisturbed run, and a count of what a sampled path consists of.
"""
from machinery import flags, processes

import argparse
import contextlib
import io
import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import recipe
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from checkpoint import blank
from oracles import TINY, chosen, without_norm
from test_recipe import PLAIN
from test_search import contents, same

import data
import derive
import search
from supernet import initialise

ROOT = Path(__file__).parent.parent
STEPS, BATCH = 20, 32


def stage(space=0, taught=False, lr=0.1, steps=STEPS):
    """A stage of so many steps on the `fake` patterns: its supernet, and `train_stage` about to begin."""
    images = data.load("fake", "train")
    parts = data.split(images.labels, 0)
    loader = data.Loader(images, images.statistics(parts[0]), BATCH)
    args = argparse.Namespace(batch_size=BATCH, epochs=[steps * BATCH / len(parts[0])] * 5, lr=lr, mu=1.0,
                              alpha_lr=0.02, accumulate=1, weight_decay=1e-4, seed=0, checkpoint_every=1,
                              flops_target=[1e6] * 5)
    nets = [search.SuperNet(search.SPACES["small"][k], 1, 10, data.generator(n))
            for n, k in enumerate((space, 0))]
    teacher = derive.Network(derive.derive(nets[1])).eval() if taught else None
    if taught:
        initialise(teacher, data.generator(2))
    return nets[0], search.train_stage(nets[0], teacher, *search.optimisers(nets[0], args), loader, parts,
                                       args, blank(), [])


def trained():
    """What `recipe.train` leaves of a small network, and the sizes of the batches that went through it."""
    images, index, sizes = data.load("fake", "train"), torch.arange(240), []
    loader = data.Loader(images, images.statistics(index), BATCH, torch.device("cpu"))
    network = derive.Network(chosen(TINY._replace(resolution=28), [(0, 0, 0), (7, 1, 1), (4, 2, 1)]))
    initialise(network, data.generator(3))
    network.register_forward_pre_hook(lambda net, x: sizes.append(len(x[0])) if net.training else None)
    args = argparse.Namespace(**PLAIN | {"batch_size": BATCH, "lr": 0.1, "ema": 0.5})
    network, rows = recipe.train(network, loader, index, loader, torch.arange(240, 301), args, "tiny", 0,
                                 Path("none"))
    return {"network": network.state_dict(), "losses": [row["loss"] for row in rows], "sizes": sizes,
            "accuracies": [row["accuracy"] for row in rows]}


def work(rank, folder):
    """One of two processes: leaves what it found in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    travelled, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda x, *more: (travelled.append(x.numel()), all_reduce(x, *more))[1]
    net, steps = stage(space=1, taught=True)
    row = list(steps)[-1]
    found = {"row": {k: row[k] for k in ("loss", "accuracy", "alpha_loss")}, "travelled": list(travelled),
             "weights": {name: p.detach().clone() for name, p in net.named_parameters()},
             "buffers": {name: b.clone() for name, b in net.named_buffers()}}
    processes.broadcast(net)
    found["spread"] = net.state_dict()
    without_norm()
    net, steps = stage(lr=0.01, steps=10)
    row = list(steps)[-1]
    found.update(plain=net.state_dict(), plain_row={k: row[k] for k in ("loss", "accuracy", "alpha_loss")})
    found["trained"] = trained()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            processes.on_rank0(flags.settings, flags.parser(), ["--batch-size", "33", "--out", f"{folder}/none"])
        except SystemExit as stop:
            found.update(code=stop.code, said=said.getvalue())
    found["heard"] = processes.pending_signal([15] if rank else [])
    found["first"] = processes.on_rank0(lambda: f"process {rank}")
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    mp.start_processes(work, (folder,), 2, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_all_processes_have_the_same_weights_to_the_last_bit(two):
    one, other = two
    start = stage(space=1)[0].state_dict()
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    assert not torch.equal(one["weights"]["stem.weight"], start["stem.weight"])
    assert any(not torch.equal(w, start[name]) for name, w in one["weights"].items() if ".alphas." in name)
    assert one["row"] == other["row"]                               # what the log says is of all processes


def test_batch_norm_statistics_are_the_first_processes(two):
    one, other = two
    assert any(not torch.equal(one["buffers"][name], other["buffers"][name]) for name in one["buffers"])
    for found in two:
        assert all(torch.equal(found["spread"][name], b) for name, b in one["buffers"].items())
        assert all(torch.equal(found["spread"][name], w) for name, w in one["weights"].items())


def test_two_processes_compute_what_one_does(two, monkeypatch):
    without_norm(monkeypatch.setattr)
    net, steps = stage(lr=0.01, steps=10)
    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    row = list(steps)[-1]
    for name, p in net.named_parameters():
        for found in two:
            torch.testing.assert_close(found["plain"][name], p.detach(), rtol=1e-3, atol=1e-5)
    moved = max(float((p.detach() - start[name]).abs().max()) for name, p in net.named_parameters())
    assert moved > 1e-2                                             # a thousand times what is let pass
    accuracy = two[0]["plain_row"].pop("accuracy")  # where two labels nearly tie, rounding decides
    assert accuracy == pytest.approx(row["accuracy"], abs=1.5 / (10 * BATCH))
    assert {k: pytest.approx(row[k], rel=1e-4) for k in two[0]["plain_row"]} == two[0]["plain_row"]


def test_two_processes_train_a_network_as_one_does(two, monkeypatch):
    """Each sees half of every batch, and of the test images; what is said is of all of them."""
    without_norm(monkeypatch.setattr)
    wanted = trained()
    assert wanted["sizes"] == [BATCH] * 14
    for found in (process["trained"] for process in two):
        assert found["sizes"] == [BATCH // 2] * 14
        for name, tensor in wanted["network"].items():
            torch.testing.assert_close(found["network"][name], tensor, rtol=1e-3, atol=1e-5)
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
        assert found["accuracies"] == pytest.approx(wanted["accuracies"], abs=1.5 / 61)
    assert min(wanted["accuracies"]) > 0.1 and wanted["losses"][1] < wanted["losses"][0] - 5e-3


def test_only_what_was_sampled_travels(two):
    net, _ = stage(space=1)
    with torch.no_grad():                                       # the alphas as they were at the first step
        path = net.sample(search.temperature(0), data.generator(0, 1, search.PATHS, 0, 0))
    count = sum(p.numel() for layer in (net.stem, net.stem_norm, net.head, net.head_norm, net.classifier)
                for p in layer.parameters())
    for block, draws in zip(net.blocks, path):
        count += sum(p.numel() for op in draws["op"].options for p in block.candidates[op].parameters())
    buckets = [n for n in two[0]["travelled"] if n > 1]             # beside them only the flag of a signal
    alphas = sum(a.numel() for a in net.alphas())
    assert buckets[0] == count + 2                                  # and loss and accuracy
    assert [n for n in buckets if n == alphas + 2] == [alphas + 2] * (STEPS // 5)
    assert len(buckets) == STEPS + STEPS // 5
    assert max(buckets) < 0.4 * sum(w.numel() for w in net.weights())


def test_a_signal_to_one_is_heard_by_all_and_the_first_decides(two):
    assert [found["heard"] for found in two] == [15, 15]
    assert [found["first"] for found in two] == ["process 0"] * 2


def test_a_batch_that_does_not_divide_is_refused_in_one_line(two):
    assert [found["code"] for found in two] == [2, 2]
    assert two[0]["said"] == "search.py: --batch-size 33 does not divide by the 2 processes\n"
    assert two[1]["said"] == ""


@pytest.mark.parametrize("n", [2, 4])
def test_shares_make_up_the_batch(n):
    images = data.fake(60, (3,))
    loader = data.Loader(images, images.statistics(torch.arange(60)), 8)
    whole = list(itertools.islice(loader.shuffled(torch.arange(60), 5), 9))
    shares = [list(itertools.islice(loader.shuffled(torch.arange(60), 5, share=(r, n)), 9)) for r in range(n)]
    for k, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([s[k][0] for s in shares]), x)
        assert torch.equal(torch.cat([s[k][1] for s in shares]), y)


# A process that kills itself: with SIGKILL, in the n-th step of the first launch.
DIES = """
import os, signal, sys
sys.path.insert(0, {root!r})
from machinery import processes; import {script}
mean, left = processes.all_reduce_mean, [{n}]
def average(*given):
    left[0] -= 1
    if left[0] == 0 and processes.share()[0] == {rank} and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return mean(*given)
processes.all_reduce_mean = average
{script}.main()
"""
SHORT = ["--data", "fake", "--stages", "1", "--epochs", "0.4", "--batch-size", "32", "--device", "cpu",
         "--checkpoint-every", "5"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(*command, n=2, launcher=("--standalone",), cwd=ROOT):
    return subprocess.run([*TORCHRUN, *launcher, "--nproc_per_node", str(n), *command],
                          check=False, cwd=cwd, capture_output=True, text=True, timeout=180)


def dying(folder, script="search", rank=1, n=10):
    file = folder / "dies.py"
    file.write_text(DIES.format(root=str(ROOT), script=script, rank=rank, n=n))
    return str(file)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("distributed") / "run"
    done = torchrun("search.py", *SHORT, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("into ") == 1 and "curve:" in done.stdout             # one of them speaks
    return contents(out)


def test_a_death_ends_the_run_within_a_minute_and_it_can_go_on(undisturbed, tmp_path):
    clock = time.monotonic()
    ended = torchrun(dying(tmp_path), *SHORT, "--out", str(tmp_path / "run"))
    assert ended.returncode and time.monotonic() - clock < 60
    assert re.search("process 0 of 2: another one has died .* --resume", ended.stderr)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 5
    done = torchrun("search.py", "--resume", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert same(undisturbed, contents(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", [["--standalone"], ["--master-port", "29555"]])
def test_a_restarted_run_ends_as_if_nothing_had_been(undisturbed, tmp_path, rank, launcher):
    script, launcher = dying(tmp_path, rank=rank), [*launcher, "--max-restarts", "1"]
    done = torchrun(script, *SHORT, launcher=launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["001"]     # where the first launch wrote
    assert same(undisturbed, contents(tmp_path / "runs" / "001"))


@pytest.mark.slow
def test_a_restart_does_not_go_on_with_a_run_that_was_there_before(undisturbed, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    assert torchrun(dying(tmp_path), *SHORT, *out).returncode
    done = torchrun("search.py", *SHORT, *out, launcher=["--standalone", "--max-restarts", "1"])
    assert done.returncode and "holds something already" in done.stderr


@pytest.mark.slow
def test_training_a_network_restarts_too(undisturbed, tmp_path):
    (tmp_path / "A0.json").write_text(undisturbed["A0"])
    flags = [str(tmp_path / "A0.json"), "--data", "fake", "--epochs", "2", "--device", "cpu"]
    rows = []
    for script, *launcher in (["train.py"], [dying(tmp_path, "train", n=25), "--max-restarts", "1"]):
        out = tmp_path / Path(script).stem
        done = torchrun(script, *flags, "--out", str(out), launcher=["--standalone", *launcher])
        assert done.returncode == 0, done.stderr
        row = json.loads((out / "trained.json").read_text())[0]
        rows.append([row["accuracy"], [e["loss"] for e in row["epochs"]]])
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_two_hosts(undisturbed, tmp_path):
    hosts = [subprocess.Popen([*TORCHRUN, "--nnodes", "2", "--node-rank", str(k), "--nproc_per_node", "1",
                               "--master-addr", "127.0.0.1", "--master-port", "29556",
                               "search.py", *SHORT, "--out", str(tmp_path / "run")], cwd=ROOT)
             for k in range(2)]
    assert [host.wait(timeout=180) for host in hosts] == [0, 0]
    assert same(undisturbed, contents(tmp_path / "run"))
