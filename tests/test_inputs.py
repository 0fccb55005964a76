"""A table of bad inputs: every script's flags out of range, of a wrong type or at odds, and its files
missing, cut, damaged or another's.

Each row is tried in a copy of a finished run. It must end with exit status 2, or 1 for what the file system
answers, and one line on stderr, which names the flag or the file and what would do, and must change no file.
"""
from machinery import files, results, settings

import gzip
import json
import random
import re
import shutil
import struct

import photos
import pytest
import tiny
import torch

import data
import derive
import flops
import plot
import search
import train
from space import Arch

WHOLE = "; what was written before is whole"                    # of what the file system answers
PHOTO = "../photos/bag/00023.jpg"
IMAGES, LABELS = (f"../fashion/train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
MAIN = {module.__name__: module.main for module in (search, train, derive, flops, plot)}


@pytest.fixture(scope="module")
def finished(tiny_world, tmp_path_factory):
    """A folder with a finished run, `run`, and one of images, `photos`."""
    at = tmp_path_factory.mktemp("finished")
    search.main([*tiny.SHORT, "--stages", "2", "--out", str(at / "run")])
    photos.write(at / "photos", 3)
    (at / "run" / "A0.last.pt").write_bytes(b"")
    (at / "run" / "trained.json").write_text("[]")
    (at / "fashion").mkdir()
    for name, values in (("images-idx3", torch.zeros(60, 28, 28)), ("labels-idx1", torch.arange(60) % 10)):
        (at / "fashion" / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(idx_bytes(values)))
    return at


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def flip(path):
    """Every bit of a hundred bytes in the middle: more than lie between two tensors of a file as padding."""
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle:middle + 100] = bytes(b ^ 255 for b in raw[middle:middle + 100])
    path.write_bytes(raw)


def empty(path):
    path.write_bytes(b"")


def folder(path):
    """A folder where a file should be: no user can read it."""
    path.unlink()
    path.mkdir()


def text(content):
    return lambda path: path.write_text(content, encoding="latin-1")


def facts(**change):
    """Change values at the top of a JSON object."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | change))


def block(**change):
    """Change values of the first block of an Arch."""
    def write(path):
        found = json.loads(path.read_text())
        found["blocks"][0] |= change
        path.write_text(json.dumps(found))
    return write


def packed(**change):
    """Change values of a checkpoint."""
    return lambda path: path.write_bytes(files.pack(files.load_checkpoint(path) | change))


def ops(*p):
    """A log with one row, of these probabilities of operations."""
    return text(json.dumps({"stage": 0, "step": 1, "alphas": [[1, [{"op": p}]]]}))


def idx_bytes(values):
    """An idx file of uint8: two zero bytes, type 8, dimensions, sizes (big-endian), values."""
    return bytes((0, 0, 8, values.dim())) + struct.pack(f">{values.dim()}I", *values.shape) + bytes(
        values.flatten().byte().tolist())


def idx(change):
    """Fashion-MNIST's labels or images, with `change` made to the bytes within their gzip file."""
    return lambda path: path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes())), 1))


FLAGS = [
    ("search", "--stages 0", "--stages.*choose from 1, 2, 3, 4, 5"),
    ("search", "--stages 6", "--stages.*choose from"),
    ("search", "--stages two", "--stages"),
    ("search", "--space large", "--space.*choose from .*paper"),
    ("search", "--data imagenette", "--data: .* one of fashion, .* nor a folder"),
    ("search", "--data photos/nowhere", "--data: .* nor a folder"),
    ("search", "--data fake --classes 3", "--classes is for a folder of images"),
    ("search", "--data fake --resolution 32", "--resolution is for a folder of images"),
    ("search", "--data photos --classes 1", "--classes: .* at least 2"),
    ("search", "--data photos --classes 11", "11 are needed"),
    ("search", "--data photos --resolution 4", "--resolution: .* at least 8"),
    ("search", "--data photos --resolution 16 --space paper --batch-size 2 --workers 0",
     "16 pixels a side are too few for A0, whose strides make one of 32: take a larger --resolution"),
    ("search", "--space paper --data photos --resolution 32 --batch-size 3 --accumulate 2 --workers 0",
     "a piece of one image, of which A0 leaves one pixel, .* a larger --batch-size, a smaller --accumulate"),
    ("search", "--data photos --workers -1", "--workers: .* at least 0"),
    ("search", "--data photos --batch-size 1000 --workers 0", "--batch-size 1000 is more than the .* images"),
    ("search", "--data cifar10", "put cifar-10-python.tar.gz into"),
    ("search", "--method darts", "--method.*choose from"),
    ("search", "--widen random", "--widen.*choose from"),
    ("search", "--draw fairly", "--draw.*choose from"),
    ("search", "--teacher nobody", "--teacher.*choose from"),
    ("search", "--epochs 0", "--epochs: .* at least"),
    ("search", "--epochs 1 2", "--epochs: 2 values for 5 stages; give one for each"),
    ("search", "--epochs nan", "--epochs: .* at least"),
    ("search", "--batch-size 0", "--batch-size: .* at least 1"),
    ("search", "--batch-size 1.5", "--batch-size"),
    ("search", "--batch-size 1000 --data fake", "--batch-size 1000 is more than the 40 images"),
    ("search", "--accumulate 0", "--accumulate: .* at least 1"),
    ("search", "--accumulate 64 --batch-size 32", "--accumulate 64 is more than the 32 images"),
    ("search", "--lr -1", "--lr: .* at least"),
    ("search", "--alpha-lr inf", "--alpha-lr: .* at least"),
    ("search", "--weight-decay=-1e-4", "--weight-decay: .* at least 0"),
    ("search", "--flops-target 20Q", "--flops-target"),
    ("search", "--data fake --flops-target 0.1M",
     "--flops-target 100,000 is out of reach: the networks of A0 have"),
    ("search", "--data fake --flops-target 1G", "--flops-target 1,000,000,000 is out of reach"),
    ("search", "--flops-target 1M 2M", "--flops-target: 2 values for 5 stages"),
    ("search", "--method scaling --flops-target off", "scaling needs a --flops-target"),
    ("search", "--checkpoint-every 0", "--checkpoint-every: .* at least 1"),
    ("search", "--seed -1", "--seed: .* at least 0"),
    ("search", "--device abacus", "--device abacus"),
    ("search", "--resume", "--resume needs --out"),
    ("search", "--resume --out run --seed 3", "--seed is 3, but the run in run has 0"),
    ("search", "--resume --out run --no-grow", "--no-grow is True, but the run in run has False"),
    ("search", "--resume --out photos", "photos is not the folder of a run, it has no args.json"),
    ("search", "--out run", "--out run holds something already: choose another .* --resume"),
    ("search", "--data fake --out run/args.json", "--out run/args.json: File exists"),
    ("search", "--data fake --out run/args.json/new", "--out run/args.json/new: Not a directory"),
    ("search", "--method naive --widen zero", "--method naive grows by random weights: not with .*--widen"),
    ("search", "--method naive --no-grow", "--method naive grows by random weights: not with --no-grow"),
    ("search", "--method direct --widen zero", "--widen zero: nothing grows by --method direct"),
    ("search", "--no-distill --teacher network", "--teacher network: nobody teaches .* --no-distill"),
    ("search", "--epochs 1 1 1 1 1 1", "--epochs: 6 values for 5 stages"),
    ("search", "--colour red", "unrecognized arguments: --colour red"),
    ("train", "", "ARCH.json|RUN"),
    ("train", "nowhere.json", "nowhere.json: No such file or directory$"),
    ("train", ".", "no A0.json, .*: it is not the folder of a run"),
    ("train", "run/args.json", "args.json: the network"),
    ("train", "run/A0.json --epochs 0", "--epochs: .* at least 1"),
    ("train", "run/A0.json --batch-size 0", "--batch-size: .* at least 1"),
    ("train", "run/A0.json --batch-size 5000", "--batch-size 5000 is more than the 240 images"),
    ("train", "run/A0.json --accumulate 0", "--accumulate: .* at least 1"),
    ("train", "run/A0.json --accumulate 65", "--accumulate 65 is more than the 64 images"),
    ("train", "run/A0.json --checkpoint-every 0", "--checkpoint-every: .* at least 1"),
    ("train", "run/A0.json --lr nan", "--lr: .* at least"),
    ("train", "run/A0.json --weight-decay -1", "--weight-decay: .* at least 0"),
    ("train", "run/A0.json --dropout 1", "--dropout: 1 is not a number of at least 0 and at most 0.999"),
    ("train", "run/A0.json --ema 2", "--ema: 2 is not a number of at least 0 and at most 1"),
    ("train", "run/A0.json --smoothing -1", "--smoothing: .* at least 0"),
    ("train", "run/A0.json --init magic", "--init.*choose from"),
    ("train", "run/A0.json --data pictures", "--data: .* nor a folder"),
    ("train", "run/A0.json --data photos --workers 0", "A0 is for 1 channels .* --data .*photos has 3"),
    ("train", "run/A0.json --classes 5", "--classes is for a folder of images"),
    ("train", "run/A0.json --export net.zip", "--export net.zip ends neither in .pt2 nor in .onnx"),
    ("train", "run --export net.pt2", "--export writes one network: name its ARCH.json"),
    ("train", "run/A0.json --data photos --resolution 7", "--resolution: .* at least 8"),
    ("train", "run/A0.json --data photos --workers 0.5", "--workers"),
    ("train", "run/A0.json --validate --resume",
     "--validate writes nothing, .* not with --resume or --export"),
    ("train", "run/A0.json --validate --export net.pt2", "--validate writes nothing, .* not with --resume"),
    ("train", "run/A0.json --export nowhere/net.pt2", "--export nowhere/net.pt2: there is no folder nowhere"),
    ("train", "run --jobs 0", "--jobs: 0 is not a number of at least 1"),
    ("train", "run --jobs 2 --validate", "--jobs .* not with --validate or torchrun"),
    ("train", "run/A0.json --seed -1", "--seed: .* at least 0"),
    ("train", "run/A0.json --device abacus", "--device abacus"),
    ("train", "run/A0.json --out run/A0.json", "--out run/A0.json: File exists"),
    ("derive", "run --points 2 --refine 2", "--refine is for one budget, not for --points"),
    ("derive", "run --data elsewhere", "--data is for --points and --refine"),
    ("derive", "run --points 2 --data photos", "--data: the run's images are fake, and .*photos does not"),
    ("derive", "nowhere --flops 1M", "nowhere/args.json: No such file"),
    ("derive", "run --flops 1Q", "--flops"),
    ("derive", "run --flops off", "a budget must be above 0"),
    ("derive", "run --flops 1k", "1,000 macs is out of reach: networks have .* to"),
    ("derive", "run --flops 1G", "1,000,000,000 macs is out of reach: networks have .* to"),
    ("derive", "run --params 1", "1 params is out of reach: networks have .* to"),
    ("derive", "run --flops 1M --params 1M", "--params: not allowed with argument --flops"),
    ("derive", "run --flops 1M --latency 1ms", "--latency: not allowed with argument --flops"),
    ("derive", "run --flops 1M --stage 4", "run has no A4.pt: no such stage was finished"),
    ("derive", "run --flops 1M --stage 5", "--stage.*choose from"),
    ("derive", "run --latency 2", "--latency"),
    ("derive", "run --latency 2M", "--latency"),
    ("derive", "run --points 1", "--points: 1 is not .* at least 2 and at most 1000"),
    ("derive", "run --flops 1M --refine 0", "--refine: 0 is not .* at least 1 and at most 1000"),
    ("derive", "run --flops 20k --out run/A0.json", "--out run/A0.json is a network of the run: name"),
    ("derive", "run --flops 20k --out nowhere/net.json", "net.json: there is no folder nowhere"),
    ("flops", "", "give either a network, ARCH.json, or a space"),
    ("flops", "run/A0.json --space paper", "give either a network"),
    ("flops", "--space large", "--space.*choose from"),
    ("flops", "--spaces", "unrecognized arguments"),
    ("flops", "nothing.json", "nothing.json: No such file or directory$"),
    ("flops", "run", "run: Is a directory$"),
    ("plot", "", "RUN"),
    ("plot", "nowhere", "nowhere is not a folder"),
    ("plot", "photos", "photos has no summary.json: it is not the folder of a finished run"),
    ("plot", "run run", "has the settings and the seed of run: name one of them"),
    ("plot", "run --out run/A0.json", f"run/A0.json: File exists{WHOLE}"),
]
FILES = [
    ("search", "--resume --out run", "args.json", cut, "args.json is not JSON"),
    ("search", "--resume --out run", "args.json", empty, "args.json is not JSON"),
    ("search", "--resume --out run", "args.json", text("\xff"), "args.json is not JSON"),
    ("search", "--resume --out run", "args.json", text("[" * 100_000), "args.json is not JSON"),
    ("search", "--resume --out run", "args.json", facts(seed="x"), "args.json .*--seed"),
    ("search", "--resume --out run", "args.json", facts(epochs=[]), "args.json .*--epochs"),
    ("search", "--resume --out run", "args.json", facts(epochs=[0]), "args.json .*--epochs"),
    ("search", "--resume --out run", "args.json", facts(flops_target="many"), "args.json .*--flops-target"),
    ("search", "--resume --out run", "args.json", facts(method=None), "args.json .*method is None"),
    ("search", "--resume --out run", "args.json", facts(grow="no"), "args.json .*grow is 'no', not True"),
    ("search", "--resume --out run", "args.json", facts(data=3), "args.json .*data is 3"),
    ("search", "--resume --out run", "args.json", facts(data="/gone"), "--data: /gone .* nor a folder"),
    ("search", "--resume --out run", "args.json", facts(colour="red"), "colour: missing or unknown"),
    ("search", "--resume --out run", "args.json", facts(lr=[1, 2]), "args.json .*unrecognized"),
    ("search", "--resume --out run", "args.json", facts(lr=0.2), "last.pt .*its lr is 0.1, not 0.2"),
    ("search", "--resume --out run", "args.json", folder, "args.json: Is a directory"),
    ("search", "--resume --out run", "last.pt", cut, "last.pt is cut short"),
    ("search", "--resume --out run", "last.pt", empty, "last.pt is cut short"),
    ("search", "--resume --out run", "last.pt", flip, "last.pt is .*damaged"),
    ("search", "--resume --out run", "last.pt", text("PK"), "last.pt is cut short, damaged or no checkpoint"),
    ("search", "--resume --out run", "last.pt", lambda path: path.unlink(), "finished stages but no last.pt"),
    ("search", "--resume --out run", "last.pt", packed(version=0), "last.pt is of version 0, .*: start anew"),
    ("search", "--resume --out run", "last.pt", packed(settings={}), "last.pt is not a checkpoint"),
    ("search", "--data photos --workers 0", PHOTO, empty, "bag/00023.jpg.*--skip-broken"),
    ("search", "--data photos --workers 0", PHOTO, cut, "bag/00023.jpg.*--skip-broken"),
    ("search", "--data photos --workers 0", PHOTO, text("no image"), "bag/00023.jpg: is no image"),
    ("train", "run", "args.json", text("[3]"), "args.json is not what a run writes"),
    ("train", "run", "args.json", facts(seed="x"), "args.json is not what a run writes .*--seed"),
    ("train", "run", "A0.json", cut, "A0.json: not JSON"),
    ("train", "run", "A0.json", empty, "A0.json: not JSON"),
    ("train", "run", "A0.json", text("\xff"), "A0.json: not JSON .*utf-8"),
    ("train", "run", "A0.json", block(op="ir_k7"), "A0.json: block 0: op 'ir_k7' is unknown, choose from"),
    ("train", "run", "A0.json", block(out=-8), "A0.json: block 0: out is -8, not a whole number"),
    ("train", "run", "A0.json", block(residual=0), "A0.json: block 0: residual is 0, not true or false"),
    ("train", "run", "A0.json", block(out=10 ** 11), "A0 needs .* GB to train .* smaller network"),
    ("train", "run", "A0.json", facts(head=10 ** 15), "A0 needs .* GB to train .* smaller network"),
    ("train", "run", "A0.json", facts(stage=-1), "A0.json: stage is -1, not a whole number"),
    ("train", "run", "A0.json", facts(classes=1e3), "A0.json: classes is 1000.0, not a whole number"),
    ("train", "run", "A0.json", facts(blocks={}), "A0.json: blocks is not a list"),
    ("train", "run", "A0.json", facts(colour="red"), "A0.json: the network: 'colour' is unknown"),
    ("train", "run --init inherit", "A1.pt", lambda path: path.unlink(), "--init inherit needs .*A1.pt"),
    ("train", "run --init inherit", "A0.pt", cut, "A0.pt is cut short"),
    ("train", "run --init inherit", "A0.pt", packed(stem=torch.ones(1)), "A0.pt is not the supernet of"),
    ("train", "run --init inherit", "A0.json", facts(classes=9), "A0 is for 1 channels and 9 classes"),
    ("train", "run", "summary.json", cut, "summary.json is not JSON"),
    ("train", "run", "trained.json", text("[{"), "trained.json is not JSON"),
    ("train", "run", "trained.json", text("[3]"), "trained.json is not what a run writes"),
    ("train", "run", "trained.json", text('[{"name": 3}]'), "trained.json is not what a run writes"),
    ("train", "run --resume", "A0.last.pt",
     lambda path: path.write_bytes(files.pack({"version": 3, "settings": {"epochs": 9}})),
     "A0.last.pt is not a checkpoint of this run .its epochs is 9, not 3."),
    ("train", "run --resume", "A0.last.pt", empty, "A0.last.pt is cut short"),
    ("train", "run --resume", "A0.last.pt", text("PK"), "A0.last.pt is cut short"),
    ("train", "run --resume", "A0.last.pt", lambda path: path.write_bytes(files.pack({"network": {}})),
     "A0.last.pt is of version None"),
    ("derive", "run --flops 1M", "args.json", text("{"), "run/args.json is not JSON"),
    ("derive", "run --flops 1M --refine 2", "args.json", facts(batch_size=None), "args.json is not what"),
    ("derive", "run --flops 1M --refine 2", "args.json", facts(seed="x"), "args.json is not what"),
    ("derive", "run --flops 1M --refine 2", "args.json", facts(colour="red"), "args.json is not what"),
    ("derive", "run --flops 1M --refine 2", "args.json", facts(data="nowhere"), "args.json is not what"),
    ("derive", "run --flops 1M", "A0.pt", flip, "A0.pt is .*damaged"),
    ("derive", "run --flops 1M", "A0.pt", folder, f"A0.pt: Is a directory{WHOLE}"),
    ("derive", "run --flops 1M", "A0.pt", lambda path: shutil.copy(path.with_name("A1.pt"), path),
     "A0.pt is not the supernet of A0.json"),
    ("derive", "run --flops 1M", "A0.pt", packed(**{"blocks.0.alphas.op": torch.full((8,), float("nan"))}),
     "its alphas are not finite"),
    ("derive", "run --flops 1M", "A0.pt", packed(**{"blocks.0.alphas.op": torch.zeros(8).double()}),
     "its weights are not float32"),
    ("derive", "run --flops 1M", "A0.json", facts(resolution=10 ** 9), "1000000000 is beyond reason"),
    ("derive", "run --flops 1M", "A0.json", facts(space="large"), "A0.json: no network of A0 of paper"),
    ("derive", "run --flops 1M", "A0.json", facts(stage=7), "A0.json: no network of A0"),
    ("derive", "run --flops 1M", "A0.json", facts(classes=10 ** 12), "A0.pt is not the supernet of A0.json"),
    ("flops", "run/A0.json", "A0.json", text("{"), "A0.json: not JSON"),
    ("flops", "run/A0.json", "A0.json", text("\xff"), "A0.json: not JSON .*utf-8"),
    ("flops", "run/A0.json", "A0.json", facts(resolution=2), "resolution 2 is too small"),
    ("flops", "run/A0.json", "A0.json", block(op="ir_k7"), "A0.json: block 0: op 'ir_k7' is unknown"),
    ("plot", "run", "summary.json", text("[{"), "summary.json is not JSON"),
    ("plot", "run", "summary.json", text('{"stage": 0}'), "summary.json is not what a run writes"),
    ("plot", "run", "summary.json", text('[{"stage": 0, "flops": "1M", "params": 1, "accuracy": 0.5}]'),
     "summary.json is not"),
    ("plot", "run", "summary.json", text('[{"stage": 0, "flops": 1e308, "params": 1, "accuracy": 0.5}]'),
     "summary.json is not"),
    ("plot", "run", "summary.json", text("\xff"), "summary.json is not"),
    ("plot", "run", "trained.json", text("[3]"), "trained.json is not what a run writes"),
    ("plot", "run", "args.json", text("[3]"), "args.json is not what a run writes"),
    ("plot", "run", "A1.json", block(op="conv"), "A1.json is not what a run writes"),
    ("plot", "run", "log.jsonl", text('{"stage": 0, "st'), "log.jsonl is not what a run writes"),
    ("plot", "run", "log.jsonl", ops(0.5, 0.6), "are not probabilities"),
    ("plot", "run", "log.jsonl", ops(0.5, 0.5), "not 8 operations"),
    ("search", "--out new", IMAGES, cut, "train-images-idx3-ubyte.gz: a broken gzip file"),
    ("search", "--out new", IMAGES, flip, "train-images-idx3-ubyte.gz: a broken gzip file"),
    ("search", "--out new", IMAGES, text("no gzip"), "train-images-idx3-ubyte.gz: a broken gzip file"),
    ("search", "--out new", IMAGES, lambda path: path.unlink(), "train-images-idx3-ubyte.gz"),
    ("search", "--out new", IMAGES, idx(lambda raw: b"\1" + raw[1:]), "not an idx file of 3 dimensions"),
    ("search", "--out new", IMAGES, idx(lambda raw: raw[:-1]), "not an idx file of 3 dimensions"),
    ("search", "--out new", LABELS, idx(lambda raw: raw[:-1] + b"\x0a"),
     "labels from 0 to 10 for 60 images: .* from 0 to 9"),
    ("search", "--out new", LABELS, idx(lambda raw: raw[:4] + b"\0\0\0\x3b" + raw[8:-1]),
     "59 labels .* for 60 images: there must be one each"),
]


def tree(at):
    """Every file below a folder, with its bytes."""
    return {path: path.read_bytes() for path in at.rglob("*") if path.is_file()}


def refused(script, argv, says, at, capsys):
    """That what main(argv) ends in is what this file's first lines say."""
    status = 1 if says.endswith(WHOLE) else 2
    before = tree(at)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        MAIN[script](argv.split())
    err = capsys.readouterr().err
    assert (stopped.value.code, err.count("\n")) == (status, 1), (stopped.value.code, err)
    assert re.match(rf"{script}\.py: .*{says}", err), err
    assert tree(at) == before


@pytest.fixture
def place(finished, tmp_path, monkeypatch):
    """A copy of `finished`, which becomes the current folder."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data.fashion, "__defaults__", (tmp_path / "fashion",))

    def offline(images):
        raise OSError("no network")
    monkeypatch.setattr(data.CIFAR10, "download", offline)
    monkeypatch.setattr(data.cifar, "__defaults__", (tmp_path / "cache",))
    return tmp_path


@pytest.mark.parametrize("script, argv, says", FLAGS)
def test_bad_flags_end_in_one_line(place, script, argv, says, capsys):
    refused(script, argv, says, place, capsys)


@pytest.mark.parametrize("script, argv, file, change, says", FILES)
def test_bad_files_end_in_one_line(place, script, argv, file, change, says, capsys):
    change(place / "run" / file)
    refused(script, argv, says, place, capsys)


def test_the_table_is_of_every_script_and_every_flag():
    """But for --help and switches that take no value and go with everything."""
    rows = {script: " ".join(argv for name, argv, *_ in FLAGS + FILES if name == script) for script in MAIN}
    parsers = {"search": settings.search_parser(None), "train": settings.train_parser(None),
               "derive": settings.derive_parser(None)}
    for script, p in parsers.items():
        for action in p._actions:
            if action.option_strings and action.nargs != 0:
                assert action.option_strings[0] in re.split("[ =]", rows[script]), (script, action)
    assert len(FLAGS + FILES) >= 60


def test_help_fits_a_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for p in (settings.search_parser(search.__doc__), settings.train_parser(train.__doc__),
              settings.derive_parser(derive.__doc__)):
        assert len(p.format_help().splitlines()) <= 50


def mutated(text, g):
    """A JSON text of which a stretch is gone, or a byte or a value is another."""
    kind = g.randrange(3)
    if kind == 0:
        start = g.randrange(len(text))
        return text[:start] + text[start + g.randrange(1, 30):]
    if kind == 1:
        at = g.randrange(len(text))
        return text[:at] + g.choice('0123456789-+.eE"{}[]:, xN\\\0') + text[at + 1:]
    values = list(re.finditer(r'(?<=[\[:]) ?("[^"]*"|[\w.+-]+)', text))
    old = g.choice(values)
    new = g.choice(("null", "true", "[]", "{}", '""', '"1"', "-1", "0", "1e400", "NaN", "9" * 40, "0.5",
                    "[1, 2]", '"ir_k3"'))
    return text[:old.start()] + new + text[old.end():]


def plain(arch):
    """An Arch as the object that its JSON text holds, with what that may leave out."""
    found = json.loads(arch.to_json())
    for row, b in zip(found["blocks"], arch.blocks, strict=True):
        row["expand"] = b.expand
    return found


def test_a_thousand_mutations_of_json_are_refused_or_read_as_they_stand(finished, tmp_path):
    g, refusals = random.Random(0), 0
    run = finished / "run"
    for n in range(1000):
        name = ("A0.json", "args.json", "summary.json", "log.jsonl")[n % 4]
        text = mutated((run / name).read_text(), g)
        (tmp_path / name).write_text(text)
        try:
            if name == "A0.json":
                arch = Arch.from_json(text)
                found = json.loads(text)
                for row, b in zip(found["blocks"], arch.blocks, strict=True):
                    row.setdefault("expand", b.expand)
                assert plain(arch) == found
            elif name == "args.json":
                assert settings.kept(settings.read(tmp_path)) == json.loads(text)
            elif name == "summary.json":
                rows = results.measured(tmp_path / name)
                found = [row for row in json.loads(text) if row["accuracy"] is not None]
                assert [row[2:] for row in rows] == [
                    (row["flops"] / 1e6, row["params"] / 1e6, 100 * row["accuracy"]) for row in found]
            else:
                read, found = results.history(tmp_path), {}
                for row in map(json.loads, text.splitlines()):
                    if "alphas" in row:
                        found.setdefault(row["stage"], {}).update(row["alphas"])
                assert {stage: dict(steps) for stage, steps in read.items()} == found
        except ValueError as error:
            refusals += 1
            assert "\n" not in str(error)
    assert 500 < refusals < 1000, refusals


@pytest.mark.parametrize("space", settings.DEFAULTS)
def test_a_run_gone_on_with_writes_the_same_args_json(space, tmp_path):
    """To the last character: what is written otherwise is another experiment to plot.py."""
    args = settings.completed(settings.search_parser(None).parse_args(["--space", space]))
    args.flops_target = flops.TARGETS[space]
    before = json.dumps(settings.kept(args))
    (tmp_path / "args.json").write_text(before)
    for argv in ([], ["--space", space, "--lr", str(args.lr)]):
        again = settings.search_arguments(["--resume", "--out", str(tmp_path), *argv], "")
        assert json.dumps(settings.kept(again)) == before


def test_a_folder_of_images_may_move_between_two_parts_of_a_run(tmp_path):
    """What is in it is looked at by `folder.record`."""
    new = tmp_path / "new"
    args = settings.completed(settings.search_parser(None).parse_args(["--data", str(tmp_path)]))
    new.mkdir()
    ran = settings.kept(args) | {"data": str(tmp_path / "old"), "flops_target": flops.TARGETS["small"]}
    (tmp_path / "args.json").write_text(json.dumps(ran))
    again = settings.search_arguments(["--resume", "--out", str(tmp_path), "--data", str(new)], "")
    assert again.data == str(new) and settings.same_run(again)["data"] == settings.same_run(args)["data"]
    with pytest.raises(files.Refused, match="--data is fake, but the run in .* has a folder"):
        settings.search_arguments(["--resume", "--out", str(tmp_path), "--data", "fake"], "")
