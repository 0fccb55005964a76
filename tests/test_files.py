"""Files: whole or absent; a checkpoint that was cut, changed or is another's is refused; one run a folder.

The oracles: the bytes that were there, and a second process.
"""
from machinery import files, flags

import argparse
import os
import random
import resource
import signal
from pathlib import Path

import pytest
import torch

CHECKPOINT = {"step": 3, "weights": {"a": torch.arange(300.0), "b": torch.ones(2, 3)}, "log": [{"loss": 1.5}]}


def equal(one, other):
    return (one["step"], one["log"]) == (other["step"], other["log"]) and all(
        torch.equal(one["weights"][name], other["weights"][name]) for name in "ab")


def test_a_checkpoint_comes_back(tmp_path):
    files.write(tmp_path / "last.pt", files.pack(CHECKPOINT))
    assert equal(files.load_checkpoint(tmp_path / "last.pt"), CHECKPOINT)
    assert equal(torch.load(tmp_path / "last.pt", weights_only=True), CHECKPOINT)


def test_a_thousand_mutations_are_refused_or_change_nothing():
    raw, g, refused = files.pack(CHECKPOINT), random.Random(0), 0
    for _ in range(1000):
        broken = bytearray(raw)
        kind = g.randrange(3)
        if kind == 0:                                                    # cut short
            del broken[g.randrange(len(raw)):]
        elif kind == 1:                                                  # flipped bytes
            for _ in range(g.choice((1, 1, 5))):
                broken[g.randrange(len(raw))] ^= g.randrange(1, 256)
        else:                                                            # a stretch overwritten
            start = g.randrange(len(raw))
            stretch = g.randbytes(g.randrange(1, 200))
            broken[start:start + len(stretch)] = stretch
        try:
            assert equal(files.unpack(bytes(broken), "last.pt"), CHECKPOINT)
        except ValueError as error:
            assert str(error).startswith("last.pt ") and "\n" not in str(error)
            refused += 1
    assert refused > 700                                        # the rest hit names, dates and padding


def test_what_is_no_checkpoint_is_refused(tmp_path):
    for raw in (b"", b"PK", b"[1, 2]", files.pack([1, 2])):
        with pytest.raises(ValueError, match=r"^x\.pt is "):
            files.unpack(raw, "x.pt")
    with pytest.raises(FileNotFoundError):
        files.load_checkpoint(tmp_path / "none.pt")


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))
    with pytest.raises(ValueError):
        files.unpack(files.pack({"weights": Evil()}), "x.pt")
    assert not (tmp_path / "touched").exists()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "last.pt"
    files.write(path, b"old" * 1000)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, usual[1]))
    try:
        with pytest.raises(OSError, match=r"last\.pt"):
            files.write(path, b"new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert path.read_bytes() == b"old" * 1000 and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_held_by_one_and_freed_by_its_death(tmp_path):
    reader, writer = os.pipe()
    other = os.fork()
    if other == 0:
        try:
            with files.lock(tmp_path):
                os.write(writer, b"held")
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(reader, 4) == b"held"
    with pytest.raises(BlockingIOError), files.lock(tmp_path):
        pass
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    for _ in range(2):                                                   # and by its end
        with files.lock(tmp_path):
            pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("content", ["ein Bäckerdutzend\n", b"\x00\xff\n", ""])
def test_write_replaces_a_file_and_leaves_nothing_beside_it(tmp_path, content):
    path = tmp_path / "A0.json"
    for before in (None, b"something much longer than what comes after it"):
        if before:
            path.write_bytes(before)
        files.write(str(path), content)
        assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
        assert [p.name for p in tmp_path.iterdir()] == ["A0.json"]


@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_write_cut_short_leaves_the_old_file_whole(tmp_path, monkeypatch, place, error):
    """And no other beside it but for a death, of which the name ends in .tmp."""
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def fail(*_):
        raise error
    monkeypatch.setattr(files.os, place, fail)
    with pytest.raises(type(error), match="No space" if isinstance(error, OSError) else None) as raised:
        files.write(path, b"new" * 1000)
    assert path.read_bytes() == b"old"
    if isinstance(error, OSError):
        assert raised.value.filename == str(path) and list(tmp_path.iterdir()) == [path]
    assert all(file.suffix == ".tmp" for file in tmp_path.iterdir() if file != path)


@pytest.mark.parametrize("content", [b"[1, 2", b"\xff", b"[" * 100_000, b"", b"[1]", b'"a"'])
def test_what_is_no_json_object_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "args.json"
    path.write_bytes(content)
    with pytest.raises(files.Refused, match=r"args\.json is not ") as error:
        files.read_json(path)
    assert "\n" not in str(error.value)
    path.write_text('{"a": 1}')
    assert files.read_json(path) == {"a": 1}


def test_images_are_loaded_while_a_run_has_locked_the_projects_folder(monkeypatch):
    """The run's own processes load them, too, and would wait for it."""
    locked, lock = [], files.lock
    monkeypatch.setattr(files, "lock", lambda path, wait: locked.append(path) or lock(path, wait))
    flags.load_images(argparse.Namespace(**flags.DATA | {"data": "fake"}), "train")
    assert [Path(path).is_file() for path in locked] == [True]
