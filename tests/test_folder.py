"""Folders of images: what is listed, drawn, refused; what is decoded; and that batches do not depend on
workers.

The oracles: files written by hand and with Pillow, torchvision's Resize and CenterCrop, its names of
ImageNet's classes, and the same batch from other workers, another start and in shards.
"""
from machinery import decode, flags, folder, settings, workers
from machinery.files import Refused

import contextlib
import itertools
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import photos
import pytest
import torch
from PIL import Image
from test_search import Countdown, contents, same
from test_workers import few_files
from torchvision.models._meta import _IMAGENET_CATEGORIES
from torchvision.transforms import v2

import data
import derive
import flops
import search
import train
from space import Arch

ROOT = Path(__file__).parent.parent


def picture(seed=0, size=(12, 10)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write(root, names="abc", each=6, **options):
    """Class folders of `each` random images, each its own."""
    for c, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(each):
            picture(100 * c + i).save(root / name / f"{i}.png", **options)
    return root


def open_folder(root, part="train", seed=0, resolution=8, **options):
    return folder.load(root, part, seed, resolution, **{"workers": 0} | options)


def names(images):
    return [os.fsdecode(name) for name in images.names]


def loader(root, workers=0, batch_size=4, part="train"):
    images = open_folder(root, part, workers=workers)
    return data.Loader(images, images.statistics(None), batch_size)


def decoded(path, image=None, **options):
    """What an image becomes on its way through a file, as an array (H, W, 3)."""
    if image is not None:
        image.save(path, **options)
    return np.asarray(decode.decode(str(path)))


# --- which files, which classes


def test_imagenets_layout_and_its_parts(tmp_path):
    write(tmp_path / "train", each=4)
    write(tmp_path / "val", "cb", each=3)                               # val/ need not test every class
    images, test = open_folder(tmp_path), open_folder(tmp_path, "test")
    assert images.class_names == test.class_names == ["a", "b", "c"] and images.classes == 3
    assert names(images) == [f"train/{c}/{i}.png" for c in "abc" for i in range(4)]
    assert images.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert names(test) == [f"val/{c}/{i}.png" for c in "bc" for i in range(3)]
    assert images.test == test.test == names(test)
    assert test.labels.tolist() == [1] * 3 + [2] * 3
    assert (images.channels, images.resolution) == (3, 8)


def test_of_class_folders_alone_a_sixth_of_each_is_held_out(tmp_path):
    write(tmp_path, "ab", each=12)
    write(tmp_path, "c", each=4)
    images, test = open_folder(tmp_path), open_folder(tmp_path, "test")
    assert torch.bincount(images.labels).tolist() == [10, 10, 3]
    assert torch.bincount(test.labels).tolist() == [2, 2, 1]
    both = names(images) + names(test)
    assert len(set(both)) == len(both) == 28 and images.test == names(test)
    assert names(open_folder(tmp_path, "test")) == names(test) != names(open_folder(tmp_path, "test", seed=1))


def test_the_draw_is_the_same_everywhere_and_for_ever():
    # random.Random(0): .84 .76 .42 .26 .51 .40 .78 .30 .48 .58
    assert folder.draw(10, 4, 0) == [2, 3, 5, 7]
    assert folder.draw(10, 4, b"0 cat") != folder.draw(10, 4, b"1 cat")
    counts = np.bincount([i for seed in range(1000) for i in folder.draw(10, 4, seed)], minlength=10)
    assert abs(counts - 400).max() < 60                                 # four standard deviations


def test_imagenet_100_is_the_draw_of_seed_0_from_imagenets_1000_classes():
    lines = (ROOT / "datasets" / "ImageNet-100.txt").read_text().splitlines()
    ids, classes = zip(*(line.split(" ", 1) for line in lines))
    assert list(classes) == [_IMAGENET_CATEGORIES[i] for i in folder.draw(1000, 100, 0)]
    assert list(ids) == sorted(set(ids)) and all(len(i) == 9 and i[0] == "n" for i in ids)


def test_classes_are_drawn_by_their_sorted_names(tmp_path):
    for name in "jihgfedcba":
        write(tmp_path, name, each=3)
    assert open_folder(tmp_path, classes=4).class_names == ["abcdefghij"[i] for i in folder.draw(10, 4, 0)]
    one, other = (open_folder(tmp_path, classes=4, part=part) for part in ("train", "test"))
    assert one.class_names == other.class_names
    with pytest.raises(ValueError, match="10 folders of images, one a class, but 11"):
        open_folder(tmp_path, classes=11)


def test_odd_names_hidden_files_and_files_that_are_no_images(tmp_path, capsys):
    write(tmp_path, ["Katze 猫", "собака", "b\udcff"], each=3)           # the last: no UTF-8
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "Katze 猫" / "._0.png").write_bytes(b"of a Mac")
    (tmp_path / "Katze 猫" / "notes.txt").write_text("!")
    (tmp_path / "Katze 猫" / "0.PNG").write_bytes((tmp_path / "Katze 猫" / "0.png").read_bytes())
    images = open_folder(tmp_path)
    assert len(images.class_names) == 3 and len(images.labels) + len(images.test) == 10
    assert "not taken for images: 1 .txt" in capsys.readouterr().out
    assert next(loader(tmp_path).ordered(torch.arange(7)))[0].shape == (7, 3, 8, 8)


def test_links_are_followed_but_not_in_circles(tmp_path):
    write(tmp_path / "in", "ab", each=4)
    write(tmp_path / "elsewhere", "c", each=3)
    (tmp_path / "in" / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (tmp_path / "in" / "a" / "again").symlink_to(tmp_path / "in" / "a")
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "a" / "top").symlink_to(tmp_path)
    (tmp_path / "in" / "b" / "deep").mkdir()
    (tmp_path / "in" / "b" / "deep" / "more.png").symlink_to(tmp_path / "elsewhere" / "c" / "0.png")
    images = open_folder(tmp_path / "in")
    assert sorted(names(images) + images.test) == [
        *(f"a/{i}.png" for i in range(4)), *(f"b/{i}.png" for i in range(4)), "b/deep/more.png",
        *(f"c/{i}.png" for i in range(3))]
    (tmp_path / "in" / "all").symlink_to(tmp_path / "in")
    with pytest.raises(ValueError, match="all has too few images"):
        open_folder(tmp_path / "in")


@pytest.mark.parametrize("folders, files, says", [
    ([], [], "0 folders"),
    (["a"], ["a/1.png"], "1 folders"),
    (["a", "b"], [], "a has too few images"),
    (["train/a", "train/b"], [], r"has train/, but it takes train/ and val/"),
    (["train/a", "test/a"], [], r"has test/ and train/, but"),
    (["train/a", "train/b", "val/z"], [], "val/z is no class of train/"),
    (["Training/a", "Training/b", "Testing/a", "Testing/b"],
     [f"{part}/{c}/{i}.png" for part in ("Training", "Testing") for c in "ab" for i in range(3)],
     "Testing/ and Training/ hold no image but folders of the same names: .*train/ and val/"),
    (["Train/a", "Train/b", "Val/a", "Val/b", "other"],
     [f"{part}/{c}/{i}.png" for part in ("Train", "Val") for c in "ab" for i in range(3)]
     + [f"other/{i}.png" for i in range(3)], "Train/ and Val/ hold no image but folders of the same names"),
    (["train/a", "train/b", "val"], [f"train/{c}/{i}.png" for c in "ab" for i in range(2)] + ["val/0.png"],
     "val/ has no images to test on: they belong into val/CLASS/"),
])
def test_a_folder_of_another_layout_is_refused(tmp_path, folders, files, says):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    for name in files:
        picture().save(tmp_path / name)
    with pytest.raises(ValueError, match=says):
        open_folder(tmp_path)


def test_classes_that_each_keep_their_images_in_a_folder_are_no_parts(tmp_path):
    for name in "ab":
        write(tmp_path / name, ["images"])
    assert open_folder(tmp_path).class_names == ["a", "b"]


def test_a_run_is_no_class_of_its_images(tmp_path):
    write(tmp_path / "photos", "ab")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    for out in ("photos", "photos/runs/001", "link/run", "photos/a/../b/run"):
        with pytest.raises(Refused, match=f"the folder of the run, .*{out}, lies in it: take another --out"):
            open_folder(tmp_path / "photos", run=tmp_path / out)
    for out in ("run", "photos-run", "photos/../run"):
        open_folder(tmp_path / "photos", run=tmp_path / out)


def test_images_are_the_same_wherever_they_lie(tmp_path):
    images, test = (open_folder(write(tmp_path / "a") if part == "train" else tmp_path / "a", part)
                    for part in ("train", "test"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "c").symlink_to(tmp_path / "b")
    for root in (tmp_path / "b", tmp_path / "c"):
        assert open_folder(root).digest == images.digest != test.digest == open_folder(root, "test").digest
    with open(tmp_path / "b" / names(images)[0], "ab") as file:
        file.write(b"more")
    assert open_folder(tmp_path / "b").digest != images.digest
    (tmp_path / "a" / names(images)[0]).rename(tmp_path / "a" / "a" / "new.png")
    assert open_folder(tmp_path / "a").digest != images.digest


# --- what an image becomes


def png(path, rows, bits, colour):
    """A PNG by hand: rows of samples, colour type 0 (grey) or 2 (RGB)."""
    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum
    raw = b"".join(b"\0" + np.array(row, ">u2" if bits == 16 else "u1").tobytes() for row in rows)
    size = struct.pack(">II", len(rows[0]) // (3 if colour == 2 else 1), len(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size + bytes((bits, colour, 0, 0, 0)))
                     + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))


def test_16_bits_become_8_and_are_not_cut(tmp_path):
    values = [[0, 257, 257 * 100, 257 * 200, 65535, 32768]]
    png(tmp_path / "grey.png", values, 16, 0)
    grey = decoded(tmp_path / "grey.png")
    assert grey.shape == (1, 6, 3) and grey[0, :, 0].tolist() == [0, 1, 100, 200, 255, 128]
    png(tmp_path / "rgb.png", values, 16, 2)
    assert decoded(tmp_path / "rgb.png").tolist() == [[[0, 1, 100], [200, 255, 128]]]
    Image.fromarray(np.array(values, np.uint16)).save(tmp_path / "grey.tif")
    assert np.array_equal(decoded(tmp_path / "grey.tif"), grey)
    with pytest.raises(OSError, match="^more than 16 bits"):
        decoded(tmp_path / "deep.tif", Image.fromarray(np.array([[-1, 70_000]], np.int32)))
    with pytest.raises(OSError, match="floats"):
        decoded(tmp_path / "float.tif", Image.fromarray(np.array([[0.5]], np.float32)))


def test_every_mode_becomes_rgb(tmp_path):
    image = picture()
    grey, rgb = np.asarray(image.convert("L")), np.asarray(image)
    assert np.array_equal(decoded(tmp_path / "1.png", image.convert("L")), np.stack([grey] * 3, 2))
    assert np.array_equal(decoded(tmp_path / "2.png", image), rgb)
    bits = image.convert("1")
    assert np.array_equal(decoded(tmp_path / "3.png", bits)[:, :, 0], np.asarray(bits) * np.uint8(255))
    palette = image.quantize(16)
    assert np.array_equal(decoded(tmp_path / "4.png", palette), np.asarray(palette.convert("RGB")))
    smooth = image.resize((40, 40), Image.Resampling.BICUBIC)
    ink = decoded(tmp_path / "5.jpg", smooth.convert("CMYK"), quality=95)
    assert abs(ink.astype(int) - np.asarray(smooth)).mean() < 8         # inverted inks would be far off


def test_transparent_is_white(tmp_path):
    image = picture().convert("RGBA")
    alpha = np.zeros((10, 12), np.uint8)
    alpha[:5], alpha[5] = 255, 51
    image.putalpha(Image.fromarray(alpha))
    found, rgb = decoded(tmp_path / "a.png", image), np.asarray(image)[:, :, :3].astype(int)
    assert np.array_equal(found[:5], rgb[:5]) and (found[6:] == 255).all()
    assert abs(found[5] - (0.2 * rgb[5] + 0.8 * 255)).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert decoded(tmp_path / "b.png", palette, transparency=1).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    deep = Image.fromarray(np.array([[257, 2570]], np.uint16))
    assert decoded(tmp_path / "c.png", deep, transparency=257).tolist() == [[[255] * 3, [10] * 3]]


@pytest.mark.parametrize("orientation, turned", [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]),
                                                 (6, lambda a: np.rot90(a, -1)), (8, np.rot90)])
def test_a_photograph_on_its_side_is_turned(tmp_path, orientation, turned):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(tmp_path / "a.png", picture(), exif=exif), turned(np.asarray(picture())))


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF"])
def test_a_file_of_one_format_may_have_the_ending_of_another(kind, tmp_path):
    more = {"append_images": [picture(1)], "save_all": True} if kind == "MPO" else {}
    assert decoded(tmp_path / "x.jpg", picture(), format=kind, **more).shape == (10, 12, 3)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "JPEG2000", "PCX", "TGA"])
def test_other_formats_are_not_opened_whatever_their_ending(kind, tmp_path):
    """A PostScript file would be run by Ghostscript."""
    with pytest.raises(OSError, match="^is no image"):
        decoded(tmp_path / "x.jpg", picture(), format=kind)


def test_what_is_no_regular_file_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").mkdir()
    (tmp_path / "c.jpg").symlink_to("/dev/zero")
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        with pytest.raises(OSError, match="^is no regular file"):
            decoded(tmp_path / name)


def test_an_image_is_not_broken_because_there_are_no_file_descriptors(tmp_path):
    picture().save(tmp_path / "a.png")
    with few_files(0), pytest.raises(Refused, match=r"a\.png: Too many open files: take fewer --workers"):
        decoded(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2000)])
def test_images_one_pixel_wide(tmp_path, size):
    write(tmp_path, "ab")
    picture(size=size).save(tmp_path / "a" / "0.png")
    (x, _), = loader(tmp_path).read([(torch.arange(10), data.generator(1))])
    assert x.shape == (10, 3, 8, 8) and x.isfinite().all()
    assert sum(y.numel() for _, y in loader(tmp_path).ordered(torch.arange(10))) == 10


def test_an_image_is_evaluated_as_by_resize_and_center_crop(tmp_path):
    smooth = picture(size=(6, 6)).resize((120, 120), Image.Resampling.BICUBIC)
    write(tmp_path, "ab", each=3)
    for i in range(3):
        smooth.save(tmp_path / "a" / f"{i}.png")
    found = open_folder(tmp_path, resolution=56).image(0, -1)
    wanted = v2.Compose([v2.Resize(64), v2.CenterCrop(56), v2.PILToTensor()])(smooth)
    assert found.shape == (3, 56, 56) and (found.int() - wanted.int()).abs().float().mean() < 1.5
    assert (found.int() - wanted.roll(4, 2).int()).abs().float().mean() > 5  # elsewhere it would differ


# --- batches


def stream(loader, *position, start=0, n=6, shard=(0, 1), index=None):
    index = torch.arange(len(loader.images.labels)) if index is None else index
    return list(itertools.islice(loader.shuffled(index, *position, start=start, shard=shard), n))


def equal(one, other):
    return all(torch.equal(x, z) and torch.equal(y, w) for (x, y), (z, w) in zip(one, other, strict=True))


def test_shared_memory_is_not_needed(tmp_path):
    """What workers are told and what they answer holds no tensor, which would travel through /dev/shm."""
    images = open_folder(write(tmp_path, "ab"))
    chunk, = decode.chunks([(torch.arange(4), data.generator(0))], (0, 1))
    assert {type(value) for pair in chunk[0] for value in pair} == {int} and chunk[1] is True
    assert [type(part) for part in images.read_chunk(chunk)] == [np.ndarray, np.ndarray, bool]


def test_batches_do_not_depend_on_workers_starts_or_other_draws(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(decode, "CHUNK", 3)                             # a batch of 4 in two chunks
    whole = stream(loader(tmp_path), 0, 5)
    for count in (1, 2):
        torch.manual_seed(count)
        assert equal(whole, stream(loader(tmp_path, count), 0, 5))
    for start in (1, 3, 4):                                             # 3: where the second epoch begins
        assert equal(whole[start:], stream(loader(tmp_path, 2), 0, 5, start=start, n=6 - start))
    assert not equal(whole, stream(loader(tmp_path), 0, 6))
    assert not equal(whole, stream(loader(tmp_path), 1, 5))


def test_the_global_generator_is_left_alone(tmp_path):
    write(tmp_path, "ab")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    stream(loader(tmp_path), 0), stream(loader(tmp_path, 1), 0)
    list(loader(tmp_path, 1).ordered(torch.arange(10)))
    assert torch.equal(before, torch.get_rng_state())


def test_shards_make_up_the_batch(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(decode, "CHUNK", 1)
    whole = stream(loader(tmp_path), 7)
    shards = [stream(loader(tmp_path), 7, shard=(r, 2)) for r in range(2)]
    assert all(len(y) == 2 for part in shards for _, y in part)
    assert equal(whole, [tuple(map(torch.cat, zip(*pair))) for pair in zip(*shards)])
    (drawn,), (both,) = (loader(tmp_path).read([(torch.arange(6), data.generator(0))], shard)
                         for shard in ((1, 2), (0, 1)))
    assert equal([drawn], [tuple(t[3:] for t in both)])


def test_a_shard_reads_no_other_files(tmp_path, monkeypatch):
    write(tmp_path)
    read, seen = decode.decode, []
    monkeypatch.setattr(decode, "decode", lambda path: (seen.append(path), read(path))[1])
    list(itertools.islice(loader(tmp_path).shuffled(torch.arange(15), 0, shard=(1, 4)), 3))
    assert len(seen) <= 4                                               # of 12: one each, and one under way


def test_augmentation_differs_from_epoch_to_epoch_and_image_to_image(tmp_path):
    write(tmp_path)
    seen = {tuple(x.flatten().tolist()) for x, _ in stream(loader(tmp_path, batch_size=1), 0, n=20,
                                                           index=torch.tensor([2]))}
    assert len(seen) == 20
    (same, _), = loader(tmp_path).read([(torch.tensor([2, 2]), data.generator(0))])
    assert not torch.equal(same[0], same[1])


def test_an_epoch_shows_every_image_at_most_once_and_labels_are_right(tmp_path):
    write(tmp_path)                                                     # 15 images: three batches of 4
    images = open_folder(tmp_path)
    for c in range(3):                                                  # each class has its own colour
        for name in np.array(names(images))[images.labels == c]:
            Image.new("RGB", (9, 9), [(250, 0, 0), (0, 250, 0), (0, 0, 250)][c]).save(tmp_path / name)
    for x, y in stream(loader(tmp_path, 2), 0):
        assert torch.equal(x.mean((2, 3)).argmax(1), y)
    labels = torch.cat([y for _, y in stream(loader(tmp_path), 0, n=3)])
    assert torch.bincount(labels, minlength=3).max() <= 5


def test_evaluation_is_in_order_repeats_and_is_normalised(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(decode, "CHUNK", 3)
    monkeypatch.setattr(data, "EVALUATED", 4)
    index = torch.tensor([3, 1, 14, 0, 7])
    one, other = list(loader(tmp_path, 2).ordered(index)), list(loader(tmp_path).ordered(index))
    assert equal(one, other) and [len(y) for _, y in one] == [4, 1]
    images = open_folder(tmp_path)
    assert torch.equal(torch.cat([y for _, y in one]), images.labels[index])
    pixels = torch.stack([images.image(i, -1) for i in index.tolist()])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(torch.cat([x for x, _ in one]), (pixels / 255 - mean) / std)


# --- broken files


def broken(root):
    """Break some images of a folder; returns their names, sorted."""
    picture(size=(200, 200)).save(root / "a" / "1.jpg")
    content = (root / "a" / "1.jpg").read_bytes()
    (root / "a" / "1.jpg").write_bytes(content[:len(content) // 2])
    (root / "a" / "2.jpg").write_text("no image")
    (root / "b" / "3.png").write_bytes((root / "b" / "3.png").read_bytes()[:60])
    (root / "b" / "4.gif").symlink_to(root / "nowhere.gif")
    (root / "b" / "5.jpeg").touch()
    (root / "b" / "6.bmp").mkdir()                                      # a folder, which is looked into
    return ["a/1.jpg", "a/2.jpg", "b/3.png", "b/4.gif", "b/5.jpeg"]


@pytest.mark.parametrize("count", [0, 2])
def test_broken_files_are_refused_by_name_or_left_out(tmp_path, count, capsys):
    write(tmp_path / "val", "a", each=1)
    bad = [f"train/{name}" for name in broken(write(tmp_path / "train", each=8))]
    with pytest.raises(ValueError, match=r"train/a/1\.jpg: .*truncated.*; --skip-broken"):
        open_folder(tmp_path, workers=count)
    capsys.readouterr()
    images = open_folder(tmp_path, workers=count, skip_broken=True)
    assert sorted(images.broken) == bad and not set(bad) & set(names(images)) and len(images.names) == 23
    told = capsys.readouterr().out
    assert all(told.count(f"{tmp_path / name}: ") == 1 for name in bad)
    assert len(list(data.Loader(images, images.statistics(None), 4).ordered(torch.arange(23)))) == 1


def test_a_class_of_which_nothing_is_whole_is_refused(tmp_path):
    write(tmp_path, each=3)
    for i in range(3):
        (tmp_path / "b" / f"{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="too few images of b are whole"):
        open_folder(tmp_path, skip_broken=True)


def test_an_image_that_breaks_later_ends_a_run_in_one_line(tmp_path):
    write(tmp_path)
    images = loader(tmp_path, 1)
    for path in tmp_path.glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(Refused, match=r"^[^\n]*\.png: .*: this image was whole[^\n]*$"):
        next(images.shuffled(torch.arange(15), 0))


# --- the scripts

SHORT = ["--epochs", "0.3", "--batch-size", "4", "--device", "cpu", "--workers", "1", "--resolution", "16"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory, tiny_world):
    """A folder of "photographs", one of them broken, and a run that searched on four of its classes."""
    at = tmp_path_factory.mktemp("photographs")
    photos.write(at / "photos", 8)
    bad = open_folder(at / "photos", classes=4, seed=1)
    (at / "photos" / names(bad)[5]).write_bytes(b"broken")
    search.main(["--data", str(at / "photos"), "--classes", "4", "--stages", "2", "--seed", "1",
                 "--skip-broken", *SHORT,
                 "--out", str(at / "run")])
    return at / "photos", at / "run", names(bad)[5]


def refused(main, argv, says, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and says in error, error


def test_a_search_leaves_its_classes_and_its_split(searched):
    root, run, bad = searched
    images = open_folder(root, seed=1, classes=4, skip_broken=True)
    assert (run / "classes.txt").read_text().splitlines() == images.class_names
    split = json.loads((run / "split.json").read_text())
    alphas = [names(images)[i] for i in data.split(images.labels, 1)[1]]
    assert split["test"] == images.test and split["architecture"] == alphas
    assert not {bad, *split["test"]} & set(names(images)) and set(alphas) < set(names(images))
    assert list(json.loads((run / "checked.json").read_text()).values()) == [
        {bad: "is no image"}]
    arch = Arch.from_json((run / "A1.json").read_text())
    assert (arch.in_channels, arch.classes, arch.resolution) == (3, 4, 16)


def test_what_was_checked_is_not_checked_again(searched, monkeypatch, tmp_path):
    _, run, _ = searched
    monkeypatch.setattr(folder, "check", lambda *given: pytest.fail("checked again"))
    search.main(["--resume", "--out", str(run)])
    derive.main([str(run), "--points", "2", "--out", str(tmp_path / "points.json")])
    assert len(json.loads((tmp_path / "points.json").read_text())) == 2


def test_a_stopped_search_goes_on_as_if_nothing_had_been(searched, tmp_path, monkeypatch):
    root, run, _ = searched
    argv = ["--data", str(root), "--classes", "4", "--stages", "2", "--seed", "1", "--skip-broken", *SHORT,
            "--checkpoint-every", "1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(search.processes, "catch_signals", lambda: contextlib.nullcontext(Countdown(2)))
    with pytest.raises(SystemExit):
        search.main(argv)
    monkeypatch.undo()
    search.main(["--resume", "--out", str(tmp_path / "run"), "--workers", "0"])
    assert same(contents(run), contents(tmp_path / "run"))


def test_a_run_on_other_images_than_it_began_with_is_refused(searched, capsys):
    root, run, _ = searched
    new = root / (run / "classes.txt").read_text().splitlines()[0] / "new.png"
    picture().save(new)
    try:
        refused(search.main, ["--resume", "--out", run], "is not what it was when the run began", capsys)
    finally:
        new.unlink()


def test_networks_are_trained_on_the_runs_images_or_on_more_classes(searched, tmp_path, monkeypatch):
    root, run, _ = searched
    loaded = []
    load = folder.load
    monkeypatch.setattr(folder, "load", lambda *given: (loaded.append(load(*given)), loaded[-1])[1])
    fast = ["--epochs", "1", "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    train.main([str(run / "A0.json"), *fast, "--init", "inherit", "--out", str(tmp_path / "same")])
    assert sorted(names(loaded[1])) == sorted(json.loads((run / "split.json").read_text())["test"])
    train.main([str(run / "A0.json"), *fast, "--data", str(root), "--classes", "9", "--resolution", "8",
                "--out", str(tmp_path / "more")])
    arch = train.read_trained(tmp_path / "more" / "A0.net.pt").arch
    assert (arch.classes, arch.resolution) == (9, 8)


def test_a_runs_images_may_move(searched, tmp_path, monkeypatch, capsys):
    root, run, bad = searched
    shutil.copytree(root, tmp_path / "moved", symlinks=True)
    shutil.copytree(run, tmp_path / "run")
    ran = json.loads((run / "args.json").read_text()) | {"data": str(tmp_path / "gone")}
    (tmp_path / "run" / "args.json").write_text(json.dumps(ran))
    assert folder.is_same(tmp_path / "moved", 1, 4, run) and not folder.is_same(tmp_path / "moved", 2, 4, run)
    monkeypatch.setattr(folder, "check", lambda *given: pytest.fail("checked again"))
    moved = ["--data", str(tmp_path / "moved")]
    refused(search.main, ["--resume", "--out", tmp_path / "run"], "gone is neither one of", capsys)
    search.main(["--resume", *moved, "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "args.json").read_text())["data"] == moved[1]
    (tmp_path / "run" / "args.json").write_text(json.dumps(ran))
    derive.main([str(tmp_path / "run"), "--points", "2", *moved])
    args, archs = settings.train_parser(None).parse_args([str(run), *moved]), train.read_archs(run)[0]
    args.run_folder = run
    wanted = settings.own_images(args, archs)
    assert (wanted.own, wanted.data, wanted.classes, wanted.seed) == (True, moved[1], 4, 1)
    monkeypatch.undo()
    (tmp_path / "moved" / bad).unlink()
    refused(derive.main, [tmp_path / "run", "--points", "2", *moved], "moved does not hold the same", capsys)
    refused(search.main, ["--resume", *moved, "--out", tmp_path / "run"], "is not what it was", capsys)
    assert not settings.own_images(args, archs).own and not folder.is_same(tmp_path / "moved", 1, 4, run)


def test_bad_use_of_a_folder_ends_in_one_line(searched, tmp_path, capsys):
    root, run, _ = searched
    out = ["--out", tmp_path / "run"]
    refused(search.main, ["--data", root, *SHORT, *out], "; --skip-broken leaves out", capsys)
    refused(train.main, [run / "A0.json", "--init", "inherit", "--classes", "5"], "is for 3 channels and 4",
            capsys)
    assert not (tmp_path / "run").exists()
    for name in ("checked.json", "split.json"):
        whole = (run / name).read_text()
        for broken in (whole[:-9], "[]"):
            (run / name).write_text(broken)
            refused(search.main, ["--resume", "--out", run], f"{name} is not", capsys)
        (run / name).write_text(whole)


def test_a_dry_run_checks_nothing(tiny_world, tmp_path, monkeypatch):
    write(tmp_path / "photos")
    monkeypatch.setattr(folder, "check", lambda *given: pytest.fail("checked"))
    search.main(["--data", str(tmp_path / "photos"), *SHORT, "--batch-size", "2", "--stages", "1",
                 "--dry-run", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_process_without_images_has_no_batches(tmp_path):
    write(tmp_path, "ab", 3)
    images = open_folder(tmp_path)
    loader = data.Loader(images, images.statistics(torch.arange(2)), 4)
    assert list(loader.ordered(torch.arange(2).tensor_split(3)[2])) == []


def test_the_runs_own_images_must_be_what_they_were(searched, tmp_path, capsys):
    """Else images that the search has seen would be tested on."""
    root, run, _ = searched
    given = ["--epochs", "1", "--batch-size", "8", "--workers", "0", "--device", "cpu", "--out", tmp_path]
    for name in (run / "classes.txt").read_text().splitlines():
        shutil.copy(next((root / name).glob("*[0-9].*")), root / name / "more.png")
    try:
        for main, argv in ((train.main, [run / "A0.json", *given]),
                           (derive.main, [run, "--flops", "1M", "--refine", "2"])):
            refused(main, argv, "is not what it was when the run began", capsys)
        train.main([str(a) for a in (run / "A0.json", "--classes", "3", *given)])  # others are not its own
    finally:
        for more in root.glob("*/more.png"):
            more.unlink()


@pytest.mark.parametrize("available", [1, 3, 64])
def test_workers_are_as_many_as_cores_up_to_eight(available, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(available)), raising=False)
    assert workers.cores() == min(8, available)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers.cores() == min(8, max(1, available // 4))


def test_flags_of_a_folder_have_the_spaces_resolution(tmp_path):
    write(tmp_path, "ab")
    for space, resolution in (("paper", 224), ("small", 32)):
        args = settings.search_arguments(["--data", str(tmp_path), "--space", space, "--workers", "0"], "")
        assert flags.load_images(args, "train").resolution == resolution


def test_a_search_aims_at_what_its_images_allow(tmp_path):
    write(tmp_path, "ab", each=3)
    argv = ["--space", "paper", "--data", str(tmp_path), "--workers", "0", "--batch-size", "1"]
    for pixels in (224, 64):
        args = settings.search_arguments([*argv, "--batch-size", "1", "--resolution", str(pixels)], "")
        images = flags.load_images(args, "train")._replace(labels=torch.arange(12) % 2)
        found = search.check(args, images).flops_target
        assert found == flops.targets("paper", 3, pixels, 2) and (found[0] == 107e6) == (pixels == 224)
    args.flops_target = [107e6] * 5                             # more than any network of 64 pixels has
    with pytest.raises(Refused, match="out of reach"):
        search.check(args, images)
