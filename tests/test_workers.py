"""Workers: their answers are those of one process, in order; they outlive neither their use nor the main
process, leave signals to it, and one that dies or hangs is told in one line, in time.
"""
from machinery import workers
from machinery.files import Refused
from machinery.workers import work

import contextlib
import itertools
import multiprocessing
import os
import resource
import select
import signal
import threading
import time

import numpy as np
import pytest


def square(x):
    return x * x


def misbehave(x):
    """0: killed; 1: stopped; 2: stopped, while an answer of 10 MB is under way; 3: ended."""
    if x == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if x == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if x == 3:
        os._exit(0)
    return np.ones(10 ** 7, np.uint8)


def be_signalled(x):
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    return x


def refuse(x):
    if x == 2:
        raise Refused("no 2")
    return x


@pytest.mark.parametrize("count", [0, 1, 3])
def test_answers_come_in_order_and_no_more_is_asked_than_is_wanted(count):
    asked = []
    inputs = (asked.append(x) or x for x in range(1000))
    assert list(itertools.islice(work(square, inputs, count), 10)) == [x * x for x in range(10)]
    assert len(asked) <= 10 + (workers.AHEAD + 1) * count
    assert list(work(square, range(7), count)) == [x * x for x in range(7)]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("count", [0, 2])
def test_what_a_worker_raises_is_raised(count):
    answers = work(refuse, range(4), count)
    assert [next(answers), next(answers)] == [0, 1]
    with pytest.raises(Refused, match="^no 2$"):
        next(answers)


@pytest.mark.parametrize("inputs", [[0], [1], [2, 1], [2, 2, 0], [3]])
def test_a_worker_that_dies_or_hangs_is_told_in_one_line(inputs, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE", 0.3)
    with pytest.raises(Refused, match=r"one of 1 workers has died, .* --workers, or 0$") as refused:
        list(work(misbehave, inputs, 1))
    assert "\n" not in str(refused.value) and not multiprocessing.active_children()
    assert not any(isinstance(thread, threading.Timer) and not thread.finished.is_set()
                   for thread in threading.enumerate())             # which Python would wait for at its end


def test_workers_leave_signals_to_the_main_process():
    assert list(work(be_signalled, range(4), 2)) == [0, 1, 2, 3]


@contextlib.contextmanager
def few_files(free):
    """In here so many files can be opened, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
    opened = []
    try:
        with contextlib.suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(free):
            os.close(opened.pop())
        yield
    finally:
        for file in opened:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_few_file_descriptors_are_told():
    with few_files(10), pytest.raises(Refused, match="8 workers: Too many open files: take fewer --workers"):
        list(work(square, range(9), 8))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("started", [True, False])
def test_workers_end_with_the_main_process(number, started, monkeypatch):
    """The writing end of a pipe is open as long as any of them lives; the main process dies when each has
    answered, or before any has looked who started it.
    """
    def begin(main, worker, begin=workers.begin):
        if not started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(main, number)
            while os.getppid() == main:
                time.sleep(0.01)
        begin(main, worker)
    monkeypatch.setattr(workers, "begin", begin)
    reading, writing = os.pipe()
    main = os.fork()
    if not main:
        first, second = (work(square, itertools.count(), 2) for _ in range(2))
        next(first), next(second)
        os.kill(os.getpid(), number)
    os.close(writing)
    os.waitpid(main, 0)
    assert select.select([reading], [], [], 60)[0] and os.read(reading, 1) == b""
    os.close(reading)


def test_workers_in_use_are_ended_before_python_waits_for_them():
    answers = work(square, itertools.count(), 2)
    next(answers)
    started = multiprocessing.active_children()
    workers.end()
    for worker in started:
        worker.join()
    assert [worker.exitcode for worker in started] == [-signal.SIGKILL] * 2
