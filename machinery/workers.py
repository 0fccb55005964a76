"""Processes that decode images for the main one: torch's DataLoader, with a limit to waiting for it.

Answers are no tensors, so that they travel through pipes and not through shared memory, of which a container
has too little.
"""
from machinery import files

import atexit
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
import time

import torch
from torch.utils.data import DataLoader, Dataset

PATIENCE = 50                                             # seconds that an answer may take
AHEAD = 4                                                 # inputs that each process is given in advance


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


class Inputs(Dataset):
    """A `Dataset` whose item x is x: the collate_fn does the work."""

    def __getitem__(self, x):
        return x


def begin(main, worker):
    """A worker ignores Ctrl-C and SIGTERM, which the main process, of pid `main`, obeys in its own time. It
    does not hold the lock of the run's folder, and ends with the main process.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    files.unlock()
    end_with(main)


def end_with(main):
    """End this process when its parent, of pid `main`, has ended.

    DataLoader's workers look for their parent too, but wait for ever if it died before they first did.
    """
    def watch():
        while os.getppid() == main:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def work(function, inputs, count):
    """Yield function(x) of each x of `inputs`, in order, from `count` processes (0: from this one).

    Refused, in one line, if a process cannot start, dies, or gives no answer for `PATIENCE` seconds.
    """
    inputs = iter(inputs)
    first = list(itertools.islice(inputs, count))         # no more processes than inputs are started
    inputs, count = itertools.chain(first, inputs), len(first)
    if not count:
        yield from map(function, inputs)
        return
    loader = DataLoader(Inputs(), batch_size=None, sampler=inputs, num_workers=count, timeout=PATIENCE,
                        collate_fn=function, prefetch_factor=AHEAD, generator=torch.Generator(),
                        worker_init_fn=functools.partial(begin, os.getpid()))
    try:
        with contextlib.ExitStack() as stack:             # there are descriptors for its pipes
            for _ in range(8 * count):
                stack.enter_context(open(os.devnull))
        yield from loader
    except OSError as error:
        raise files.Refused(f"{count} workers: {error.strerror}: take fewer --workers, or 0") from None
    except files.Refused as error:                        # after a traceback, which DataLoader has added
        end()
        raise files.Refused(str(error).strip().rpartition("Refused: ")[2]) from None
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        end()
        raise files.Refused(f"one of {count} workers has died, of too little memory perhaps, or gave no "
                            f"answer for {PATIENCE} seconds: take fewer --workers, or 0") from None
