"""Processes that decode images for the main one: torch's DataLoader, which is waited for only so long.

Answers are no tensors, so that they travel through pipes and not through shared memory, of which a container
has too little.
"""
from machinery import files

import atexit
import multiprocessing
import os
import signal

import torch
from torch.utils.data import DataLoader, Dataset

PATIENCE = 50                                             # seconds that an answer may take


@atexit.register
def end():
    """End all workers, which ignore the SIGTERM that Python would end them by."""
    for worker in multiprocessing.active_children():
        worker.kill()
        worker.join()


def cores():
    """Cores for the workers of this process: its part of the machine's, up to 8."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, here // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class Calls(Dataset):
    """A `Dataset` whose item x is function(x)."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, x):
        return self.function(x)


def as_it_is(answer):
    return answer


def leave_signals(worker):
    """A worker ignores Ctrl-C and SIGTERM, which the main process obeys in its own time. It does not hold the
    run's folder, so that a run can go on at once after the main process was killed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    files.unlock()


def check_descriptors(count):
    """Refused if `count` workers need more file descriptors than are left: DataLoader fails at length."""
    opened = []
    try:
        opened += (os.dup(0) for _ in range(8 * count))                 # queues and pipes, on the safe side
    except OSError as error:
        raise files.Refused(f"{count} workers: {error.strerror}: take fewer --workers, or 0") from None
    finally:
        for descriptor in opened:
            os.close(descriptor)


def work(function, inputs, count, ahead=2):
    """Yield function(x) of each x of `inputs`, in order, from `count` processes (0: from this one).

    ahead: how many inputs each process is given in advance. Refused, in one line, if a process cannot start,
    dies, or gives no answer for `PATIENCE` seconds.
    """
    if not count:
        yield from map(function, inputs)
        return
    loader = DataLoader(Calls(function), batch_size=None, sampler=inputs, num_workers=count, timeout=PATIENCE,
                        collate_fn=as_it_is, worker_init_fn=leave_signals, prefetch_factor=ahead,
                        generator=torch.Generator())
    check_descriptors(count)
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        end()
        raise files.Refused(f"one of {count} workers has died, of too little memory perhaps, or gave no "
                            f"answer for {PATIENCE} seconds: take fewer --workers, or 0") from None
