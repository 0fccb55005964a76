"""Many processes, real ones, over gloo: they stay equal, compute what one does, notice each other's death.

The oracles: one process on whole batches, an undisturbed run, and a count of what a sampled path consists of.
"""
from machinery import files, processes, settings
from machinery.run import Run

import argparse
import contextlib
import itertools
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracles import OPS, TINY, chosen, without_norm
from test_search import contents, same
from test_train import PLAIN

import data
import search
import train
from derive import derive, evaluate, recalibrate
from network import Network
from ops import initialise
from space import SPACES
from supernet import SuperNet, temperature

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")
STEPS, BATCH = 20, 32
SHORT = [*tiny.SHORT, "--stages", "1"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
pytestmark = pytest.mark.usefixtures("tiny_world")


def stage(space=0, taught=False, lr=0.1, steps=STEPS, spoil=None, double=False):
    """A stage of so many steps on the `fake` patterns: its supernet, and its last row of the log.

    spoil: (step, rank) at which a gradient is infinite. double: in float64, where rounding is far below
    Adam's epsilon, and so moves no alpha.
    """
    images = data.load("fake", "train")
    parts = data.split(images.labels, 0)
    loader = data.Loader(images, images.statistics(parts[0]), BATCH)
    args = argparse.Namespace(batch_size=BATCH, epochs=[steps / (len(parts[0]) // BATCH)] * 5, lr=lr, seed=0,
                              alpha_lr=0.02, accumulate=1, weight_decay=1e-4, checkpoint_every=1,
                              draw="uniform")
    nets = [SuperNet(SPACES["small"][k], 1, 10, data.generator(n)) for n, k in enumerate((space, 0))]
    teacher = Network(derive(nets[1])).eval() if taught else None
    if taught:
        initialise(teacher, data.generator(2))
    if double:
        nets[0].double()
        loader.mean, loader.std = loader.mean.double(), loader.std.double()
    run, mean = Run(None, {}, CPU), processes.all_reduce_mean

    def sometimes(parameters, *values):
        if (run.state["step"], processes.rank()) == spoil:
            next(p for p in parameters if p.grad is not None).grad[0] = float("inf")
        return mean(parameters, *values)
    processes.all_reduce_mean = sometimes
    search.train_stage(nets[0], teacher, loader, parts, args, run)
    processes.all_reduce_mean = mean
    return nets[0], run.state["rows"][-1], run.state["skipped"]


def trained():
    """What `train` leaves of a small network, and the sizes of the batches that went through it."""
    images, index, sizes = data.load("fake", "train"), torch.arange(160), []
    loader = data.Loader(images, images.statistics(index), BATCH, CPU)
    network = Network(chosen(TINY._replace(resolution=16), [(0, 0, 0), (7, 1, 1), (4, 2, 1)]))
    initialise(network, data.generator(3))

    def note(network, x):
        if torch.is_grad_enabled():
            sizes.append(len(x[0]))
    network.register_forward_pre_hook(note)
    args, run = argparse.Namespace(**PLAIN | {"batch_size": BATCH, "lr": 0.1, "ema": 0.5}), Run(None, {}, CPU)
    network = train.train(network, 0, loader, index,
                          lambda net: evaluate(net, loader, torch.arange(160, 221)), args, run)
    rows = run.state["rows"]
    return {"network": network.state_dict(), "losses": [row["loss"] for row in rows], "sizes": sizes,
            "accuracies": [row["accuracy"] for row in rows]}


def recalibrated(shards):
    """A network's batch-norm statistics of three batches, of which it sees these `shards`: (rank, count)."""
    images, index = data.load("fake", "train"), torch.arange(160)
    loader = data.Loader(images, images.statistics(index), BATCH, CPU)
    network = Network(chosen(TINY._replace(resolution=16), [(0, 0, 0), (7, 1, 1), (4, 2, 1)]))
    initialise(network, data.generator(3))
    recalibrate(network, itertools.chain(*(
        itertools.islice(loader.shuffled(index, 5, shard=shard), 3) for shard in shards)))
    processes.average_buffers(network)
    return {name: value for name, value in network.state_dict().items() if "running" in name}


def work(rank, folder):
    """One of two processes: leaves what it found in the folder."""
    torch.set_num_threads(1)
    tiny.shrink(pytest.MonkeyPatch())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    travelled, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda x, *more: (travelled.append(x.numel()), all_reduce(x, *more))[1]
    net, row, _ = stage(space=1, taught=True)
    keys = ("loss", "accuracy", "alpha_loss")
    found = {"row": {k: row[k] for k in keys}, "travelled": list(travelled), "weights": net.state_dict()}
    found["recalibrated"] = recalibrated([processes.shard()])
    net, _, found["skipped"] = stage(steps=2, spoil=(1, 1))
    found["left out"] = net.state_dict()
    with pytest.MonkeyPatch.context() as patch:
        without_norm(patch.setattr)
        net, row, _ = stage(lr=0.01, steps=10, double=True)
        found.update(plain=net.state_dict(), plain_row={k: row[k] for k in keys})
        found["trained"] = trained()
    try:
        processes.on_rank0(settings.search_arguments, ["--batch-size", "33"], "")
    except files.Refused as error:
        found["refused"] = str(error)
    found["heard"] = processes.pending_signal([15] if rank else [])
    found["rank 0"] = processes.on_rank0(lambda: f"process {rank}")
    with contextlib.redirect_stdout(None if rank else sys.stdout):
        search.main([*SHORT, "--out", f"{folder}/run"])            # which leaves the group
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder):
    # Faster by forking, but a forked process cannot use an accelerator that its parent has initialised
    mp.start_processes(work, (folder,), 2,
                       start_method="spawn" if torch.accelerator.is_available() else "fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_all_processes_have_the_same_weights_to_the_last_bit(two):
    one, other = two
    start = SuperNet(SPACES["small"][1], 1, 10, data.generator(0)).state_dict()
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in one["weights"])
    assert not torch.equal(one["weights"]["stem.weight"], start["stem.weight"])
    assert any(not torch.equal(w, start[name]) for name, w in one["weights"].items() if ".alphas." in name)
    assert one["row"] == other["row"]                               # what the log says is of all processes


def test_all_leave_out_a_step_that_is_not_finite_in_one(two):
    """Step 1, of the weights and of alpha."""
    one, other = two
    assert one["skipped"] == other["skipped"] == [1, 1]
    assert all(torch.equal(one["left out"][name], other["left out"][name]) for name in one["left out"])
    assert all(torch.isfinite(w).all() for w in one["left out"].values())
    assert not any(w.any() for name, w in one["left out"].items() if ".alphas." in name)


def test_two_processes_compute_what_one_does(two, monkeypatch):
    without_norm(monkeypatch.setattr)
    net, row, _ = stage(lr=0.01, steps=10, double=True)
    start = SuperNet(SPACES["small"][0], 1, 10, data.generator(0)).state_dict()
    for name, p in net.state_dict().items():
        for found in two:
            torch.testing.assert_close(found["plain"][name], p, rtol=1e-3, atol=1e-5)
    moved = max(float((p - start[name]).abs().max()) for name, p in net.state_dict().items())
    assert moved > 1e-2                                             # a thousand times what is let pass
    accuracy = two[0]["plain_row"].pop("accuracy")  # where two labels nearly tie, rounding decides
    assert accuracy == pytest.approx(row["accuracy"], abs=1.5 / (10 * BATCH))
    assert {k: pytest.approx(row[k], rel=1e-4) for k in two[0]["plain_row"]} == two[0]["plain_row"]


def test_two_processes_train_a_network_as_one_does(two, monkeypatch):
    """Each sees half of every batch, and of the test images; what is said is of all of them."""
    without_norm(monkeypatch.setattr)
    wanted = trained()
    assert wanted["sizes"] == [BATCH] * 10
    for found in (process["trained"] for process in two):
        assert found["sizes"] == [BATCH // 2] * 10
        for name, tensor in wanted["network"].items():
            torch.testing.assert_close(found["network"][name], tensor, rtol=1e-3, atol=1e-5)
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-4)
        assert found["accuracies"] == pytest.approx(wanted["accuracies"], abs=1.5 / 61)
    assert wanted["losses"][1] < wanted["losses"][0] - 1e-3


def test_two_processes_measure_the_statistics_of_both_shards_of_a_batch(two):
    one, other = (found["recalibrated"] for found in two)
    halves, whole, mine = (recalibrated(shards) for shards in ([(0, 2), (1, 2)], [(0, 1)], [(0, 2)]))
    for name, value in one.items():
        assert torch.equal(value, other[name])
        torch.testing.assert_close(value, halves[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(value, whole[name], rtol=0.1, atol=0.02)
        assert not torch.allclose(value, mine[name], rtol=1e-3)
    torch.testing.assert_close(one["stem.1.running_mean"], whole["stem.1.running_mean"])


def test_only_what_was_sampled_travels(two):
    net = SuperNet(SPACES["small"][1], 1, 10, data.generator(0))
    with torch.no_grad():                                       # the alphas as they were at the first step
        path = net.sample(temperature(0), data.generator(0, 1, search.PATHS, 0, 0))
    count = sum(p.numel() for layer in (net.stem, net.stem_norm, net.head, net.head_norm, net.classifier)
                for p in layer.parameters())
    for block, draws in zip(net.blocks, path):
        se = any("_se" in OPS[op] for op in draws["op"].options)
        count += sum(p.numel() for name, p in block.layers.named_parameters()
                     if se or not name.startswith(("squeeze", "excite")))
    buckets = [n for n in two[0]["travelled"] if n > 1]             # beside them only the flag of a signal
    alphas = sum(a.numel() for a in net.alphas())
    assert buckets[0] == count + 2                                  # and loss and accuracy
    assert [n for n in buckets if n == alphas + 2] == [alphas + 2] * (STEPS // 2)
    assert len(buckets) == STEPS + STEPS // 2
    assert min(n for n in buckets if n != alphas + 2) < max(buckets)        # squeeze and excite are left out
    assert max(buckets) == sum(w.numel() for w in net.weights()) + 2


def test_a_signal_to_one_is_heard_by_all_and_rank_0_decides(two):
    assert [found["heard"] for found in two] == [15, 15]
    assert [found["rank 0"] for found in two] == ["process 0"] * 2
    assert [found["refused"] for found in two] == ["--batch-size 33 does not divide by the 2 processes"] * 2


@pytest.mark.parametrize("n", [2, 4])
def test_shards_make_up_the_batch(n):
    images = data.fake(60, (3,))
    loader = data.Loader(images, images.statistics(torch.arange(60)), 8)
    whole = list(itertools.islice(loader.shuffled(torch.arange(60), 5), 9))
    shards = [list(itertools.islice(loader.shuffled(torch.arange(60), 5, shard=(r, n)), 9)) for r in range(n)]
    for k, (x, y) in enumerate(whole):
        assert torch.equal(torch.cat([s[k][0] for s in shards]), x)
        assert torch.equal(torch.cat([s[k][1] for s in shards]), y)


# A process that kills itself: with SIGKILL, in the n-th update, of w or alpha, of the first launch.
DIES = """
import os, signal, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from machinery import processes
import pytest, tiny, {script}
tiny.shrink(pytest.MonkeyPatch())
mean, left = processes.all_reduce_mean, [{n}]
def average(*given):
    left[0] -= 1
    if left[0] == 0 and processes.rank() == {rank} and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return mean(*given)
processes.all_reduce_mean = average
{script}.main()
"""


def torchrun(*command):
    """The port is the system's choice."""
    return subprocess.run([*TORCHRUN, "--standalone", "--nproc_per_node", "2", *command], check=False,
                          cwd=ROOT, capture_output=True, text=True, timeout=240)


def dying(folder, script="search", rank=1, n=10):
    """n: of the update, of which there are three in two steps; none for 0."""
    file = folder / f"dies-{rank}-{n}.py"
    file.write_text(DIES.format(root=str(ROOT), script=script, rank=rank, n=n))
    return str(file)


@pytest.mark.slow
def test_a_death_is_noticed_and_a_restarted_run_ends_as_if_nothing_had_been(two, folder, tmp_path):
    """A process that waits for a dead one would wait longer than `torchrun` above does."""
    out = tmp_path / "run"
    done = torchrun("--max-restarts", "1", dying(tmp_path), *SHORT, "--resume", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert re.search("process 0 of 2: another one has died .* --resume", done.stderr)
    assert done.stdout.count("into ") == 2 and done.stdout.count("curve:") == 1         # one of them speaks
    assert same(contents(folder / "run"), contents(out))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_without_a_restart_a_death_ends_the_run_and_it_can_go_on(folder, two, tmp_path, rank):
    out = tmp_path / "run"
    ended = torchrun(dying(tmp_path, rank=rank), *SHORT, "--out", str(out))
    assert ended.returncode
    assert torch.load(out / "last.pt", weights_only=True)["step"] == 4         # it died in the seventh
    done = torchrun(dying(tmp_path, n=0), "--resume", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert same(contents(folder / "run"), contents(out))


@pytest.mark.slow
def test_a_restart_does_not_go_on_with_a_run_that_was_there_before(tmp_path):
    out = ["--out", str(tmp_path / "run")]
    assert torchrun(dying(tmp_path), *SHORT, *out).returncode
    done = torchrun("--max-restarts", "1", dying(tmp_path, n=0), *SHORT, *out)
    assert done.returncode and "holds something already" in done.stderr


@pytest.mark.slow
def test_training_a_network_restarts_too(folder, two, tmp_path):
    (tmp_path / "A0.json").write_text((folder / "run" / "A0.json").read_text())
    flags = [str(tmp_path / "A0.json"), "--data", "fake", "--epochs", "2", "--device", "cpu", "--resume"]
    rows = []
    for n in (0, 5):
        out = tmp_path / str(n)
        done = torchrun("--max-restarts", "1", dying(tmp_path, "train", n=n), *flags, "--out", str(out))
        assert done.returncode == 0, done.stderr
        row = json.loads((out / "trained.json").read_text())[0]
        rows.append([row["accuracy"], [e["loss"] for e in row["epochs"]]])
    assert rows[0] == rows[1]


@pytest.mark.slow
def test_two_hosts(folder, two, tmp_path):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = str(free.getsockname()[1])
    hosts = [subprocess.Popen([*TORCHRUN, "--nnodes", "2", "--node-rank", str(k), "--nproc_per_node", "1",
                               "--master-addr", "127.0.0.1", "--master-port", port,
                               dying(tmp_path, n=0), *SHORT, "--out", str(tmp_path / "run")], cwd=ROOT)
             for k in range(2)]
    assert [host.wait(timeout=240) for host in hosts] == [0, 0]
    assert same(contents(folder / "run"), contents(tmp_path / "run"))
