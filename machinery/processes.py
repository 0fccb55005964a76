"""Several processes on one search or training: torchrun starts them, torch.distributed carries what they say.

All compute, each on its share of every batch; the first alone speaks and writes. Without torchrun there is
one process, and nothing here does anything.
"""
import contextlib
import datetime
import os
import signal
import sys

import torch
import torch.distributed as dist

from machinery import files


@contextlib.contextmanager
def process_group(seconds=300):
    """Join the processes that torchrun started, if it did. All compute; the first alone speaks and writes.

    seconds: how long one waits for another before it gives up. A death is mostly noticed at once.
    """
    if dist.is_torchelastic_launched():
        # torchrun keeps its store when it starts its processes anew, and with it the addresses of dead ones.
        limit = datetime.timedelta(seconds=seconds)
        store, r, n = next(dist.rendezvous("env://", timeout=limit))
        store = dist.PrefixStore(f"launch {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                store=store, rank=r, world_size=n, timeout=limit)
    try:
        with contextlib.redirect_stdout(None if share()[0] else sys.stdout):
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank():
    """The number of this process, from 0 on."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share():
    """(rank, world size)."""
    return rank(), world_size()


@contextlib.contextmanager
def all_alive():
    """Around what all processes do at once: where another has died, this one ends as well, in one line."""
    try:
        yield
    except RuntimeError as error:
        (r, n), why = share(), str(error).partition(". ")[0]
        raise SystemExit(f"process {r} of {n}: another one has died or does not answer, so this one ends "
                         f"too; --resume goes on from a checkpoint ({why})") from None


def choose_device(p, name):
    """The torch device of that name; `auto` is an accelerator if there is one. A wrong name ends in p.error.

    Of many processes each takes the accelerator of its number on its machine, unless the name has a number.
    """
    try:
        if name == "auto":
            name = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
        if dist.is_initialized() and name != "cpu" and ":" not in name:
            name = f"{name}:{os.environ['LOCAL_RANK']}"
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        p.error(f"--device {name}: {str(error).splitlines()[0]}")


def write(path, content):
    """Write a text, or a dict as a checkpoint that loads with weights_only=True. The first process does."""
    if share()[0]:
        return
    files.write(path, files.pack(content) if isinstance(content, dict) else content)


def append(path, size, text):
    """Append `text` to the first `size` bytes of a file, and return its new size. The first process does."""
    return 0 if share()[0] else files.extend(path, size, text)


def all_reduce_mean(parameters, *values):
    """Replace each gradient by its mean over all processes, and return the means of `values`, tensors.

    They travel in one flat bucket. What was not sampled has no gradient, and does not travel.
    """
    n = share()[1]
    if n == 1:
        return values
    sampled = [p for p in parameters if p.grad is not None]
    tensors = [p.grad for p in sampled] + [v.detach() for v in values]
    bucket = torch.cat([t.flatten() for t in tensors])
    with all_alive():
        dist.all_reduce(bucket)
    parts = (bucket / n).split([t.numel() for t in tensors])
    for p, part in zip(sampled, parts):
        p.grad = part.view_as(p)
    return [part.view_as(v) for part, v in zip(parts[len(sampled):], values)]


def all_reduce_sum(tensor):
    """The sum of a tensor over all processes."""
    if share()[1] > 1:
        with all_alive():
            dist.all_reduce(tensor)
    return tensor


def broadcast(module):
    """Give all processes the first one's batch-norm statistics, each has its share's, and (equal) weights."""
    if share()[1] > 1:
        with all_alive():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


@contextlib.contextmanager
def catch_signals():
    """Ctrl-C and SIGTERM are noted in a list, which this yields: a step can end before they are obeyed."""
    caught = []
    usual = {number: signal.signal(number, lambda number, frame: caught.append(number))
             for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def pending_signal(caught):
    """The number of a signal that any process has in its list `caught`, for all at once; 0 if none has."""
    number = caught[0] if caught else 0
    if share()[1] > 1:
        flag = torch.tensor(number)                       # on the CPU, so that no device is waited for
        with all_alive():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        number = int(flag)
    return number


def on_rank0(make, *given):
    """For all processes what `make(*given)` returns in the first, or the SystemExit that it ends in there."""
    r, n = share()
    if n == 1:
        return make(*given)
    found = [None]
    if r == 0:
        try:
            found = [make(*given)]
        except SystemExit as stop:
            found = [stop]
    with all_alive():
        dist.broadcast_object_list(found)
    if isinstance(found[0], SystemExit):
        raise found[0]
    return found[0]


def all_gather(found):
    """The lists `found` of all processes as one, in all of them."""
    n = share()[1]
    if n == 1:
        return found
    lists = [None] * n
    with all_alive():
        dist.all_gather_object(lists, found)
    return [item for some in lists for item in some]


def rank0_first(make, *given):
    """What `make(*given)` returns, in the first process of each machine before it begins in the others.

    For what leaves files that they find, as a download does. It may take longer than `join` lets one wait.
    """
    if not dist.is_torchelastic_launched():
        return make(*given)
    keys = [f"{os.environ['TORCHELASTIC_RESTART_COUNT']} {given} done on {k}"
            for k in range(int(os.environ["GROUP_WORLD_SIZE"]))]
    store, mine = _store(), keys[int(os.environ["GROUP_RANK"])]
    try:
        found = make(*given) if os.environ["LOCAL_RANK"] == "0" else None
    finally:
        if os.environ["LOCAL_RANK"] == "0":
            store.set(mine, "")
    store.wait(keys, datetime.timedelta(days=1))
    return make(*given) if found is None else found


def note(key, text):
    """Let torchrun remember `text`, to `recall` after it has started its processes anew (--max-restarts)."""
    if dist.is_torchelastic_launched() and share()[0] == 0:
        _store().set(f"adasearch/{key}", text)


def recall(key):
    """What this torchrun was told to remember, or None."""
    if dist.is_torchelastic_launched() and _store().check([f"adasearch/{key}"]):
        return _store().get(f"adasearch/{key}").decode()
    return None


def _store():
    return dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
