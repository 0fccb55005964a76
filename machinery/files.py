"""Files that are whole or absent, and checked when they are read; and one run a folder.

A checkpoint is a dict that `torch.load` opens with weights_only=True. It is a zip archive, whose checksums
PyTorch writes but does not look at: `load` does.
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

# There is no end to what foreign bytes do to those who read them.
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
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)
        raise


def read_json(path, kind=dict):
    """The dict, or another `kind`, in a JSON file. Refused, with the file's name, if it holds no such."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is not JSON ({error})") from None
    if not isinstance(found, kind):
        raise Refused(f"{path} is not what a run writes: {type(found).__name__} instead of {kind.__name__}")
    return found


def extend(path, size, text):
    """Cut the file at `path` to `size` bytes, append `text`, and return the new size in bytes.

    ValueError, with the file's name, if it is shorter; OSError likewise if that cannot be done.
    """
    try:
        with open(path, "ab") as file:
            if file.tell() < size:
                raise Refused(f"{path} is shorter than last.pt says, {file.tell()} instead of {size} "
                                 "bytes: start anew")
            file.truncate(size)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
            return size + len(text.encode())
    except OSError as error:
        error.filename = str(path)
        raise


def pack(checkpoint):
    """A checkpoint, a dict, as bytes."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def unpack(raw, path, device="cpu"):
    """The dict that `pack` made the bytes `raw`, read from `path`, of. ValueError if they are not whole."""
    try:
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            broken = archive.testzip()
        found = torch.load(io.BytesIO(raw), map_location=device, weights_only=True)
    except BROKEN as error:
        why = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise Refused(f"{path} is cut short, damaged or no checkpoint ({why})") from None
    if broken or not isinstance(found, dict):
        why = f" (the checksum of {broken})" if broken else ""
        raise Refused(f"{path} is damaged or no checkpoint{why}")
    return found


def load(path, device="cpu"):
    """The checkpoint in a file, a dict. ValueError if it is not whole, OSError if it cannot be read."""
    return unpack(Path(path).read_bytes(), path, device)


held = []                       # what `lock` has opened


@contextlib.contextmanager
def lock(folder):
    """Hold `folder` in here, or until this process dies. BlockingIOError if another one holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held.append(handle)
        yield
    finally:
        if handle in held:
            held.remove(handle)
        os.close(handle)


def unlock():
    """Let go, in a process that was forked from the one that holds a folder, not to outlive it."""
    while held:
        os.close(held.pop())
