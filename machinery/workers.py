"""Processes that work for the main one, outlive neither it nor their use, and are waited for only so long.

They answer through pipes: of shared memory a container has too little, and of file descriptors there are few.
"""
from machinery import files

import atexit
import contextlib
import itertools
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque

import torch

PATIENCE = 50                                             # seconds that an answer may take


@atexit.register
def end():
    """End all workers, which ignore the SIGTERM that Python would end them by."""
    for worker in multiprocessing.active_children():
        worker.kill()


def cores():
    """Cores for the workers of this process: its part of the machine's, up to 8."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, here // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def serve(function, pipe, main_end):
    """What a worker does: it answers x from `pipe` with function(x), until the main process ends.

    It ignores Ctrl-C and SIGTERM, which the main process obeys in its own time. It does not hold the run's
    folder, so that a run can go on at once after the main process was killed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    main_end.close()
    files.unlock()
    torch.set_num_threads(1)
    answers = queue.SimpleQueue()

    def send():
        with contextlib.suppress(OSError):
            while True:
                pipe.send(answers.get())

    threading.Thread(target=send, daemon=True).start()    # the next answer need not wait for the main process
    with contextlib.suppress(EOFError, OSError):          # the main process has ended
        for x in iter(pipe.recv, None):
            try:
                answers.put(function(x))
            except files.BROKEN as error:
                answers.put(error)


def work(function, inputs, count, ahead=2):
    """Yield function(x) of each x of `inputs`, in order, from `count` processes (0: from this one).

    ahead: how many inputs each process is given in advance. An exception of `function` is raised here.
    Refused, in one line, if a process cannot start, dies, or gives no answer for `PATIENCE` seconds.
    """
    if not count:
        yield from map(function, inputs)
        return
    inputs, asked, pool = iter(inputs), deque(), []

    def ask(worker, pipe):
        for x in itertools.islice(inputs, 1):
            pipe.send(x)
            asked.append((worker, pipe))

    try:
        for _ in range(count):
            pipe, other_end = multiprocessing.Pipe()
            worker = multiprocessing.Process(target=serve, args=(function, other_end, pipe), daemon=True)
            worker.start()
            other_end.close()                             # so that the pipe ends when the worker does
            pool.append((worker, pipe))
        for worker, pipe in pool * ahead:
            ask(worker, pipe)
        while asked:
            worker, pipe = asked.popleft()
            limit = threading.Timer(PATIENCE, worker.kill)
            limit.start()
            try:
                answer = pipe.recv()
            finally:
                limit.cancel()
            ask(worker, pipe)
            if isinstance(answer, Exception):
                raise answer
            yield answer
    except (EOFError, ConnectionError):
        raise files.Refused(f"one of {count} workers has died, of too little memory perhaps, or gave no "
                            f"answer for {PATIENCE} seconds: take fewer --workers, or 0") from None
    except OSError as error:
        raise files.Refused(f"{count} workers: {error.strerror}: take fewer --workers, or 0") from None
    finally:
        for worker, pipe in pool:
            worker.kill()
            worker.join()
            pipe.close()
