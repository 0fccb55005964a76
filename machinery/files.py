"""Files that are whole or absent, and checked when they are read; and a lock, for one run a folder.

A checkpoint is a dict that `torch.load` opens with weights_only=True. It is a zip archive, whose checksums
PyTorch writes but does not look at: `load_checkpoint` does.
"""
import contextlib
import fcntl
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import torch

# All that readers of zip archives, pickles and images raise on foreign bytes.
BROKEN = (ArithmeticError, AssertionError, AttributeError, EOFError, ImportError, LookupError, MemoryError,
          OSError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError, struct.error,
          zipfile.BadZipFile, zlib.error)


class Refused(ValueError):
    """A file, or a flag, is not what it should be; the message says which, and what is wrong."""


def write(path, content):
    """Write text or bytes to `path` whole or not at all: to a temporary file, which then takes its name.

    OSError, with the file's name, if that cannot be done: a full disk, say. What was there before stays.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename, error.filename2 = str(path), None
        raise


def read_json(path, kind=dict):
    """The dict, or another `kind`, in a JSON file. Refused, with the file's name, if it holds no such."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is not JSON ({error})") from None
    if not isinstance(content, kind):
        raise Refused(f"{path} is not what a run writes: it holds a {type(content).__name__}")
    return content


@contextlib.contextmanager
def reading(file, what="what a run writes"):
    """In here, what goes wrong with the content of a file is Refused: it is not `what` it should be."""
    try:
        yield
    except BROKEN as error:
        why = str(error).partition("\n")[0] if isinstance(error, (RuntimeError, ValueError)) else repr(error)
        raise Refused(f"{file} is not {what} ({why})") from None


def pack(checkpoint):
    """A checkpoint, a dict -> bytes."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def unpack(content, path):
    """Inverse of `pack`: bytes -> dict. Refused, in the name of `path`, if the bytes are cut or changed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            broken = archive.testzip()
        checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except BROKEN as error:
        why = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise Refused(f"{path} is cut short, damaged or no checkpoint ({why})") from None
    if broken or not isinstance(checkpoint, dict):
        why = f" (the checksum of {broken})" if broken else ""
        raise Refused(f"{path} is damaged or no checkpoint{why}")
    return checkpoint


def load_checkpoint(path):
    """The dict in a checkpoint file. Refused if it is not whole, OSError if it cannot be read."""
    return unpack(Path(path).read_bytes(), path)


_locks = []                     # file handles of the folders that this process has locked


@contextlib.contextmanager
def lock(path, wait=False):
    """Lock a folder or a file until the end of the block, or of this process. If another one has locked it:
    BlockingIOError, or with `wait` its end is waited for.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        _locks.append(handle)
        yield
    finally:
        if handle in _locks:
            _locks.remove(handle)
        os.close(handle)


def unlock():
    """In a process forked from the one that locked a folder: give the lock up, so as not to outlive it."""
    while _locks:
        os.close(_locks.pop())
