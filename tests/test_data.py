"""Images in, batches out: w learns on 5/6 of the training data, alpha on the other 1/6 (Experiments).

The oracles: idx files written by hand, known facts of Fashion-MNIST, counts of each class, and augmentation
image by image in Python for the same draws.
"""
import gzip
import importlib.util
import itertools
import pickle
import struct

import numpy as np
import pytest
import torch
from oracles import seeded
from torch.testing import assert_close

import data
from data import PAD, Images, Loader, augment, fashion, load, read_idx, split


def idx(array, kind=8, sizes=None):
    """The bytes of an idx file of a uint8 tensor: 0 0 type dimensions, sizes (big-endian), values."""
    sizes = array.shape if sizes is None else sizes
    header = bytes((0, 0, kind, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes)
    return header + bytes(array.flatten().tolist())


def numbered(n, size=6, channels=1, batch_size=4, stats=None):
    """A loader of n random images whose label is their number."""
    pixels = torch.randint(256, (n, channels, size, size), generator=seeded(), dtype=torch.uint8)
    images = Images(pixels, torch.arange(n), n)
    return images, Loader(images, stats or images.statistics(torch.arange(n)), batch_size)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (300, 2, 1)])
def test_an_idx_file_is_read_back(tmp_path, shape):
    array = torch.randint(256, shape, generator=seeded(), dtype=torch.uint8)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(idx(array)))
    found = read_idx(path, len(shape))
    assert found.dtype == torch.uint8 and torch.equal(found, array)


ARRAY = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)


@pytest.mark.parametrize("content", [
    b"", idx(ARRAY)[:3], idx(ARRAY)[:4], idx(ARRAY)[:15], idx(ARRAY)[:16],        # cut in or after the header
    idx(ARRAY)[:-1], idx(ARRAY) + b"\0", idx(ARRAY, sizes=(2, 3, 5)),             # too few or too many values
    idx(ARRAY, kind=9), b"\1" + idx(ARRAY)[1:], idx(ARRAY, sizes=(6, 4)), idx(ARRAY, sizes=(2, 3, 2, 2)),
    idx(ARRAY)[:3] + b"\2" + idx(ARRAY)[4:],
    idx(ARRAY[:0], sizes=(2 ** 31, 2 ** 31, 4))])                                 # 2^64 values: 0 in 64 bits
def test_an_idx_file_that_is_cut_or_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=r"a\.gz: "):
        read_idx(path, 3)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-12], lambda raw: raw[:5], lambda raw: b"PK" + raw[2:],
                                    lambda raw: raw[:-8] + bytes(8),
                                    lambda raw: raw[:10] + b"\xff" + raw[11:]])   # cut, no gzip, CRC, flipped
def test_a_damaged_gzip_file_is_refused(tmp_path, damage):
    path = tmp_path / "a.gz"
    path.write_bytes(damage(gzip.compress(idx(ARRAY))))
    with pytest.raises(ValueError, match=r"a\.gz: a broken gzip file"):
        read_idx(path, 3)


@pytest.fixture(scope="module")
def train():
    return fashion("train")


def test_fashion_mnist_has_6000_images_of_each_class_to_train_and_1000_to_test(train):
    test = load("fashion", "test")
    for images, each, first in ((train, 6000, [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]),
                                (test, 1000, [9, 2, 1, 1, 6, 1, 4, 6, 5, 7])):
        assert images.pixels.shape == (10 * each, 1, 28, 28) and images.pixels.dtype == torch.uint8
        assert images.labels.dtype == torch.long and images.classes == 10
        assert torch.bincount(images.labels).tolist() == [each] * 10
        assert images.labels[:10].tolist() == first
    mean, std = train.statistics(torch.arange(60_000))
    assert float(mean) == pytest.approx(0.2860, abs=1e-4) and float(std) == pytest.approx(0.3530, abs=1e-4)


def test_missing_files_are_told():
    with pytest.raises(OSError):
        fashion("train", data.FASHION / "nowhere")


def test_the_split_is_five_sixths_and_one_sixth_of_every_class(train):
    weights, alphas = split(train.labels, 0)
    assert torch.bincount(train.labels[weights]).tolist() == [5000] * 10
    assert torch.bincount(train.labels[alphas]).tolist() == [1000] * 10
    both = torch.cat([weights, alphas])
    assert torch.equal(both.sort().values, torch.arange(60_000))        # disjoint, and nothing is left out
    again, other = split(train.labels, 0), split(train.labels, 1)
    assert torch.equal(again[0], weights) and torch.equal(again[1], alphas)
    shared = (other[1].view(-1, 1) == alphas[:500]).any(0).double().mean()
    assert 0.1 < shared < 0.25                                          # a sixth, as if drawn independently


def test_the_split_draws_from_all_of_a_class(train):
    _, alphas = split(train.labels, 3)
    assert abs(float(alphas.double().mean()) / 60_000 - 0.5) < 0.02


@pytest.mark.parametrize("counts", [(6, 12, 7), (1, 5, 0, 13)])
def test_an_uneven_class_is_split_to_the_nearest_image_below(counts):
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=seeded())]
    weights, alphas = split(labels, 0)
    assert torch.bincount(labels[weights], minlength=len(counts)).tolist() == [n * 5 // 6 for n in counts]
    assert sorted(torch.cat([weights, alphas]).tolist()) == list(range(len(labels)))


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_normalised_to_mean_0_and_deviation_1(channels):
    pixels = torch.randint(256, (50, channels, 6, 7), generator=seeded(), dtype=torch.uint8)
    pixels = (pixels * torch.linspace(0.2, 1, channels).view(1, -1, 1, 1)).byte()
    images, index = Images(pixels, torch.arange(50), 50), torch.arange(10, 40)
    mean, std = images.statistics(index)
    assert mean.shape == std.shape == (1, channels, 1, 1) and (0 < mean).all() and (mean < 1).all()
    (x, y), = Loader(images, (mean, std), 8).ordered(index)
    assert x.dtype == torch.float32 and torch.equal(y, index)
    values = x.double().transpose(0, 1).flatten(1)
    assert_close(values.mean(1), torch.zeros(channels).double(), rtol=0, atol=1e-5)
    assert_close(values.std(1), torch.ones(channels).double(), rtol=0, atol=1e-5)
    assert_close(x, (pixels[index] / 255 - mean) / std)


@pytest.mark.parametrize("shape", [(60, 1, 6, 6), (30, 3, 5, 8)])
def test_augmentation_crops_the_padded_image_and_flips_it(shape):
    x = torch.randint(1, 256, shape, generator=seeded(), dtype=torch.uint8)
    found = augment(x, seeded(4))
    assert found.shape == x.shape and found.dtype == torch.uint8
    g, (n, channels, h, w) = seeded(4), shape                           # the same draws, image by image
    dy, dx = torch.randint(2 * PAD + 1, (2, n, 1), generator=g)
    flip = torch.rand(n, 1, generator=g) < 0.5
    for image, result, up, left, mirrored in zip(x, found, dy, dx, flip, strict=True):
        padded = torch.zeros(channels, h + 2 * PAD, w + 2 * PAD, dtype=torch.uint8)
        padded[:, PAD:PAD + h, PAD:PAD + w] = image
        crop = padded[:, int(up):int(up) + h, int(left):int(left) + w]
        assert torch.equal(result, crop.flip(2) if mirrored else crop)


def test_augmentation_moves_evenly_in_all_directions_and_flips_a_half():
    n = 5000
    x = torch.zeros(n, 1, 9, 9, dtype=torch.uint8)
    x[:, :, 4, 4], x[:, :, 4, 5] = 1, 2                                 # a pair of dots that shows the flip
    found = augment(x, seeded(1))[:, 0]
    at, right = ((found == v).flatten(1).int().argmax(1) for v in (1, 2))
    assert ((found == 1).flatten(1).sum(1) == 1).all()
    flipped = right < at
    assert abs(float(flipped.double().mean()) - 0.5) < 0.03
    counts = torch.bincount(at, minlength=81).view(9, 9)
    moved = torch.zeros(9, 9, dtype=torch.bool)
    moved[2:7, 2:7] = True
    assert (counts[~moved] == 0).all()
    chi2 = ((counts[moved] - n / 25) ** 2 / (n / 25)).sum()
    assert chi2 < 24 + 4 * 48 ** 0.5                                    # mean + 4 sigma of 24 degrees


def stream(loader, index, *position, start=0, n=12):
    return [(x, y) for x, y in itertools.islice(loader.shuffled(index, *position, start=start), n)]


@pytest.mark.parametrize("start", [1, 3, 4, 5, 8, 9])
def test_a_stream_that_starts_later_goes_on_as_the_whole_one(start):
    _, loader = numbered(18)                                            # four batches of 4 an epoch
    index = torch.arange(18)
    for (x, y), (again, label) in zip(stream(loader, index, 0, 1, n=12)[start:],
                                      stream(loader, index, 0, 1, start=start, n=12 - start), strict=True):
        assert torch.equal(x, again) and torch.equal(y, label)


def test_a_batch_depends_on_its_position_and_number_alone():
    _, loader = numbered(18)
    one, same = (stream(loader, torch.arange(18), 7, 2) for _ in range(2))
    torch.manual_seed(1)
    again = stream(loader, torch.arange(18), 7, 2)
    for a, b, c in zip(one, same, again):
        assert all(torch.equal(u, v) for u, v in zip(a, b)) and all(torch.equal(u, v) for u, v in zip(a, c))
    for other in ((7, 3), (8, 2), (2, 7)):
        pairs = zip(one, stream(loader, torch.arange(18), *other), strict=True)
        assert any(not torch.equal(y, z) for (_, y), (_, z) in pairs)


def test_an_epoch_shows_an_image_at_most_once_and_every_epoch_has_another_order():
    _, loader = numbered(18)
    index = torch.arange(1, 18)                                         # 17 images: 16 of them in an epoch
    labels = [y for _, y in stream(loader, index, 0, n=40)]
    epochs = [tuple(torch.cat(labels[n:n + 4]).tolist()) for n in range(0, 40, 4)]
    assert all(len(y) == 4 for y in labels)
    for epoch in epochs:
        assert len(set(epoch)) == 16 and set(epoch) <= set(range(1, 18))
    assert len(set(epochs)) == 10 and len({frozenset(epoch) for epoch in epochs}) > 1
    assert set().union(*epochs) == set(range(1, 18))


def test_training_batches_are_augmented_and_evaluation_is_not(monkeypatch):
    monkeypatch.setattr(data, "EVALUATED", 16)
    images, loader = numbered(18, size=8, stats=(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1) / 255))
    plain = images.pixels.float()
    x, y = zip(*loader.ordered(torch.arange(18)))
    assert [len(labels) for labels in y] == [16, 2]                     # all, in order, the last ones too
    assert torch.equal(torch.cat(y), torch.arange(18)) and torch.equal(torch.cat(x), plain)
    changed = sum(not torch.equal(image, plain[label]) for x, y in stream(loader, torch.arange(18), 0)
                  for image, label in zip(x, y))
    assert changed > 0.8 * 48                                           # 1 in 50 is neither moved nor flipped
    ways = {tuple(image.flatten().tolist()) for x, y in stream(loader, torch.tensor([3] * 4), 0)
            for image in x}
    assert len(ways) > 20                                               # not the same way each time


def test_fake_images_can_be_learnt_and_repeat():
    images, test = load("fake", "train"), load("fake", "test")
    assert images.pixels.dtype == torch.uint8 and images.classes == 10
    assert set(images.labels.tolist()) == set(range(10))
    assert torch.equal(images.pixels, load("fake", "train").pixels)
    assert not torch.equal(images.pixels[:400], test.pixels)
    means = torch.stack([images.pixels[images.labels == c].float().mean(0) for c in range(10)])
    nearest = torch.cdist(test.pixels.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.95


def test_a_generator_is_a_function_of_its_position():
    def first(*position):
        return float(torch.rand(1, generator=data.generator(*position), dtype=torch.float64))
    places = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2, 3, 5), (2, 5, 3), (2 ** 40, 3, 5)]
    assert len({first(*p) for p in places}) == len(places)
    assert all(first(*p) == first(*p) for p in places)


@pytest.mark.parametrize("name, folder, files, key", [
    ("cifar10", "cifar-10-batches-py", {"train": [f"data_batch_{n}" for n in range(1, 6)],
                                        "test": ["test_batch"]}, "labels"),
    ("cifar100", "cifar-100-python", {"train": ["train"], "test": ["test"]}, "fine_labels")])
def test_cifar_is_what_its_archive_holds(monkeypatch, tmp_path, name, folder, files, key):
    """An archive of three images a file, which has another checksum than the real one."""
    classes, kind = int(name[5:]), {"cifar10": data.CIFAR10, "cifar100": data.CIFAR100}[name]
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *given: True)
    (tmp_path / folder).mkdir()
    g, pixels = np.random.default_rng(0), {}
    for part, names in files.items():
        for file in names:
            pixels[file] = g.integers(0, 256, (3, 3072), dtype=np.uint8)
            content = {"data": pixels[file], key: [0, 1, classes - 1]}
            (tmp_path / folder / file).write_bytes(pickle.dumps(content))
    meta = {"label_names": list(range(classes)), "fine_label_names": list(range(classes))}
    for file in ("batches.meta", "meta"):
        (tmp_path / folder / file).write_bytes(pickle.dumps(meta))
    for part, names in files.items():
        images = data.cifar(name, part, tmp_path)
        assert (images.classes, images.channels, images.resolution) == (classes, 3, 32)
        assert images.labels.tolist() == [0, 1, classes - 1] * len(names)
        # red, green, blue planes
        want = np.concatenate([pixels[file] for file in names]).reshape(-1, 3, 32, 32)
        assert np.array_equal(images.pixels.numpy(), want)


def test_cifar_without_a_network_says_where_the_archive_goes(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(data.CIFAR10, "download", offline)
    with pytest.raises(OSError, match=f"put cifar-10-python.tar.gz into {tmp_path}"):
        data.cifar("cifar10", "train", tmp_path)


def test_a_cifar_archive_that_is_not_whole_is_not_told_as_missing(monkeypatch, tmp_path):
    def offline(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half of it")
    with pytest.raises(OSError, match=r"cifar-10-python\.tar\.gz is not whole .*: delete it, or"):
        data.cifar("cifar10", "train", tmp_path)


def test_nobody_needs_a_home(monkeypatch):
    """As in a container whose user has neither HOME nor a name."""
    def nobody(number):
        raise KeyError(number)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    spec = importlib.util.spec_from_file_location("anew", data.__file__)
    anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(anew)
    assert len(anew.load("fake", "train").labels) == 1200
    with pytest.raises(OSError, match="cannot be downloaded .*home directory.*put cifar-10-python.tar.gz"):
        anew.load("cifar10", "train")
