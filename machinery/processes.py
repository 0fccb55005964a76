"""Several processes on one search or training: torchrun starts them, torch.distributed carries the messages.

All compute, each on its shard of every batch; rank 0 alone prints and writes. Without torchrun there is one
process, which is rank 0.
"""
from machinery import files
from machinery.workers import end_with

import contextlib
import datetime
import multiprocessing.connection
import os
import signal
import sys

import torch
import torch.distributed as dist


@contextlib.contextmanager
def process_group():
    """Join the processes that torchrun started, if it did. Only rank 0's standard output is shown."""
    if dist.is_torchelastic_launched():
        # torchrun keeps its store when it starts its processes anew, and with it the addresses of dead ones.
        timeout = datetime.timedelta(minutes=5)     # to wait for another; a death is mostly noticed at once
        store, number, count = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"launch {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=timeout)
    try:
        with contextlib.redirect_stdout(None if rank() else sys.stdout):
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


def shard():
    """(rank, world size): which part of every batch is this process's."""
    return rank(), world_size()


@contextlib.contextmanager
def all_alive():
    """Around a collective call: if another process has died, this one ends as well, in one line."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).partition(". ")[0]
        raise SystemExit(f"process {rank()} of {world_size()}: another one has died or does not answer, so "
                         f"this one ends too; --resume goes on from a checkpoint ({why})") from None


def choose_device(name):
    """The torch device of that name; `auto` is an accelerator if there is one. files.Refused if unusable.

    Of many processes each takes the accelerator of its local rank, unless the name has a number.
    """
    try:
        if name == "auto":
            name = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
        if dist.is_initialized() and name != "cpu" and ":" not in name:
            name = f"{name}:{os.environ['LOCAL_RANK']}"
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        device = torch.empty(1, device=name).device
        float(torch.zeros(1, device=device))                    # "meta" has no numbers to compute with
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise files.Refused(f"--device {name}: {str(error).splitlines()[0]}") from None


def write(path, content):
    """Rank 0 writes a text, bytes or a checkpoint, a dict, to `path`, whole or not at all."""
    if rank() == 0:
        files.write(path, files.pack(content) if isinstance(content, dict) else content)


def all_reduce_mean(parameters, *values):
    """Replace each gradient by its mean over all processes, and return the means of `values`, tensors.

    All travel in one flat bucket. What was not sampled has no gradient, and does not travel.
    """
    if world_size() == 1:
        return values
    sampled = [p for p in parameters if p.grad is not None]
    tensors = [p.grad for p in sampled] + [v.detach() for v in values]
    bucket = torch.cat([t.flatten() for t in tensors])
    with all_alive():
        dist.all_reduce(bucket)
    parts = (bucket / world_size()).split([t.numel() for t in tensors])
    for p, part in zip(sampled, parts):
        p.grad = part.view_as(p)
    return [part.view_as(v) for part, v in zip(parts[len(sampled):], values)]


@torch.no_grad()
def average_buffers(network):
    """Replace the batch-norm statistics of `network` by their means over all processes."""
    statistics = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    for buffer, mean in zip(statistics, all_reduce_mean([], *statistics)):
        buffer.copy_(mean)


def on_rank0(function, *arguments):
    """What `function(*arguments)` returns on rank 0, on all ranks; or what it refuses or exits with there."""
    if world_size() == 1:
        return function(*arguments)
    result = [None]
    if rank() == 0:
        try:
            result = [function(*arguments)]
        except (SystemExit, files.Refused, OSError) as error:
            result = [error]
    with all_alive():
        dist.broadcast_object_list(result)
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]


def all_gather(items):
    """The lists `items` of all processes as one, in all of them."""
    if world_size() == 1:
        return items
    lists = [None] * world_size()
    with all_alive():
        dist.all_gather_object(lists, items)
    return [item for some in lists for item in some]


def side_by_side(function, inputs, count, signals):
    """Call function(x) of each x of `inputs`, `count` at a time, in processes of their own with one thread.

    SystemExit if a signal has come or a process has failed: the others get SIGTERM, and are waited for.
    """
    context, waiting = multiprocessing.get_context("spawn"), list(inputs)
    running, status = [], 0
    while running or (waiting and not status):
        while waiting and len(running) < count and not status:
            running.append(context.Process(target=single, args=(function, waiting.pop(0), os.getpid())))
            running[-1].start()
        multiprocessing.connection.wait([process.sentinel for process in running], timeout=1)
        codes = [process.exitcode for process in running]
        running = [process for process, code in zip(running, codes) if code is None]
        if signals and not status:
            status = 128 + signals[0]
        status = status or next(filter(None, codes), 0)
        for process in running if status else ():
            process.terminate()
    if status:
        raise SystemExit(status if status > 0 else "a process was killed, of too little memory perhaps")


def single(function, x, parent):
    """What a process of `side_by_side` does. It ends with its parent."""
    end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # the parent hears Ctrl-C, and sends SIGTERM
    multiprocessing.set_start_method(None, force=True)    # of its workers: the usual, as spawning is slow
    torch.set_num_threads(1)
    function(x)


@contextlib.contextmanager
def catch_signals():
    """Yield a list that collects Ctrl-C and SIGTERM, so that a step ends before they are obeyed.

    A second Ctrl-C ends the process at once, whatever hangs; but not under torchrun, which passes on what
    the terminal has sent already.
    """
    caught = []

    def note(number, frame):
        caught.append(number)
        if number == signal.SIGINT and not dist.is_torchelastic_launched():
            signal.signal(number, signal.SIG_DFL)
    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def pending_signal(caught):
    """The number of a signal that any process has in its list `caught`, for all at once; 0 if none has."""
    number = caught[0] if caught else 0
    if world_size() > 1:
        flag = torch.tensor(number)                       # on the CPU, so that no device is waited for
        with all_alive():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        number = int(flag)
    return number
