"""A network that leaves: what it computes, what PyTorch's tools make of it, and the one file that it is.

The oracle is written from the paper's definitions, as textbook layers; the tools are PyTorch's own.
"""
from machinery import export, files
from machinery.decode import Folder

import copy
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import Residual, assert_same_logits, images, kernel, near8, seeded, stir
from PIL import Image
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import prune
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import SqueezeExcitation

import network as network_file
from network import InvertedResidual, Network, load, predict, read_image, save
from space import Arch, ArchBlock

# All candidates' kinds, with and without expand convolution; residuals that are cut, padded, and neither.
ARCH = Arch("small", 0, 16, 3, 5, 16, 32, (ArchBlock("ir_k5_se_hs", 16, 12, 1, False, False),
                                           ArchBlock("ir_k3", 24, 16, 2, False, True),
                                           ArchBlock("ir_k5_hs", 40, 24, 1, True, True),
                                           ArchBlock("ir_k3_se", 72, 8, 1, True, True),
                                           ArchBlock("ir_k3_hs", 8, 8, 1, True, True)))


def trained(arch=ARCH, seed=0):
    """A network as after training: no statistic is as it began, and its logits depend on the images."""
    return stir(Network(arch), seed).eval()


def textbook(arch):
    """An `Arch` as layers, in the paper's words; its parameters stand in the network's order."""
    def norm_act(width, act):
        return [nn.BatchNorm2d(width), act()]
    layers, width = [nn.Conv2d(arch.in_channels, arch.stem, 3, 2, 1, bias=False),
                     *norm_act(arch.stem, nn.Hardswish)], arch.stem
    for b in arch.blocks:
        k, act = kernel(b.op), nn.Hardswish if b.op.endswith("_hs") else nn.ReLU
        body = [nn.Conv2d(width, b.hidden, 1, bias=False), *norm_act(b.hidden, act)] if b.expand else []
        body += [nn.Conv2d(b.hidden, b.hidden, k, b.stride, k // 2, groups=b.hidden, bias=False),
                 *norm_act(b.hidden, act)]
        if "se" in b.op.split("_"):
            body.append(SqueezeExcitation(b.hidden, near8(b.hidden / 4), nn.ReLU, nn.Hardsigmoid))
        body = nn.Sequential(*body, nn.Conv2d(b.hidden, b.out, 1, bias=False), nn.BatchNorm2d(b.out))
        layers.append(Residual(body) if b.residual else body)
        width = b.out
    return nn.Sequential(*layers, nn.Conv2d(width, arch.head, 1, bias=False),
                         *norm_act(arch.head, nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(arch.head, arch.classes))


@pytest.mark.parametrize("training", [False, True])
def test_a_network_computes_what_textbook_layers_compute(training):
    network, wanted = trained().double().train(training), textbook(ARCH).double().train(training)
    wanted.load_state_dict(dict(zip(wanted.state_dict(), network.state_dict().values(), strict=True)))
    x = images(4, 3, 16).double()
    found, expected = network(x), wanted(x)
    assert_same_logits(found, expected)
    for logits in (found, expected):
        logits.square().sum().backward()
    for mine, its in zip(network.parameters(), wanted.parameters(), strict=True):
        assert_close(mine.grad, its.grad)
    for mine, its in zip(network.buffers(), wanted.buffers(), strict=True):         # what a step leaves
        assert_close(mine, its)


def test_every_layer_is_called_and_what_it_computed_stays():
    network, seen = trained(), {}
    layers = {name: m for name, m in network.named_modules() if not list(m.children())}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, x, y, name=name: seen.update({name: (y, y.clone())}))
    network(images(2, 3, 16))
    assert set(seen) == set(layers) and all(torch.equal(*pair) for pair in seen.values())


def test_images_lie_with_their_channels_last_behind_the_stem():
    network, seen = Network(ARCH), []
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, InvertedResidual)):
            layer.register_forward_hook(lambda layer, x, y: seen.append(y))
    network(images(2, 3, 16))
    assert len(seen) > 20
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in seen)


def float64(network):
    return network.double(), images(3, 3, 16).double()


def test_fx_traces_it_and_folds_every_batch_norm():
    network, x = float64(trained())
    folded = fuse(network)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert_same_logits(folded(x), network(x))


def test_features_are_those_of_its_blocks():
    network, x = trained(), images(2, 3, 16)
    found = create_feature_extractor(network, {"blocks.2": "middle", "blocks.4.project": "project"})(x)
    middle = network.blocks[:3](network.stem(x))
    assert_close(found["middle"], middle)
    assert_close(found["project"] + network.blocks[3](middle), network.blocks[3:](middle))


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_scripted_it_computes_the_same():
    network, x = trained(), images(3, 3, 16)
    assert_close(torch.jit.script(network)(x), network(x))


def test_statistics_are_measured_by_update_bn():
    network, x = trained(), images(16, 3, 16)
    update_bn([x], network)
    first = network.stem[0](x)
    assert_close(network.stem[1].running_mean, first.mean((0, 2, 3)))
    assert_close(network.stem[1].running_var, first.var((0, 2, 3)))


def test_pruned_layers_and_synchronised_batch_norm_take_effect():
    network, x = float64(trained())
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in sync.modules()) == 16
    assert_same_logits(sync(x), network(x))
    wanted = copy.deepcopy(network)
    prune.ln_structured(network.head[0], "weight", 0.5, 1, 0)
    wanted.head[0].weight.data.mul_(network.head[0].weight_mask)
    assert 0 < float(network.head[0].weight_mask.mean()) < 1
    assert_same_logits(network(x), wanted(x))


def test_it_drops_out_in_training_alone():
    network, x = stir(Network(ARCH, dropout=0.9)), images(2, 3, 16)
    assert not torch.equal(network(x), network(x))
    assert torch.equal(network.eval()(x), network(x))


# The one file

MEAN, STD, CLASSES = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6], ["ant", "bee", "cow", "dog", "eel"]
FACTS = {"statistics": (torch.tensor(MEAN).view(1, 3, 1, 1), STD), "classes": CLASSES, "accuracy": 0.75,
         "trained_on": {"data": "4 images", "seed": 3, "settings": {"lr": 0.2}}}


def pixels(n, seed=0):
    return torch.randint(256, (n, 3, 16, 16), dtype=torch.uint8, generator=seeded(seed))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("network") / "A3.net.pt"
    save(path, trained(), **FACTS)
    return path


def test_one_file_holds_the_network_and_what_it_is(file):
    found, network, image = load(file), trained(), pixels(4)
    assert os.listdir(file.parent) == [file.name]
    assert found.arch == ARCH and found.classes == CLASSES and not found.training
    assert {key: found.facts[key] for key in ("accuracy", "trained_on", "classes", "crop")} == {
        "accuracy": 0.75, "trained_on": FACTS["trained_on"], "classes": CLASSES, "crop": 1.0}
    assert_close(found.facts["mean"] + found.facts["std"], MEAN + STD)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    wanted = network((image / 255 - mean) / std)
    for same in (image, image / 255, (image / 255).double()):
        assert_close(found(same), wanted, rtol=1e-4, atol=1e-4)
    assert all(p.is_contiguous() for p in found.parameters())
    buffer = io.BytesIO()
    save(buffer, network, **FACTS)
    assert set(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)) == {"facts", "weights"}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_with_its_normalisation_it_is_traced_and_scripted(file):
    network, image = load(file), pixels(3)
    wanted, traced, scripted = network(image), torch.fx.symbolic_trace(network), torch.jit.script(network)
    layers = {"network.blocks.2": "middle", "network.classifier": "logits"}
    features = create_feature_extractor(network, layers)
    for same in (image, image / 255):
        for found in (traced(same), scripted(same), features(same)["logits"]):
            assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="not in"):
        traced(image.float())


@pytest.mark.parametrize("image, message", [
    (pixels(2).float(), "pixels from 0 to 255, not in"),
    (pixels(2) / 255 - 0.5, "pixels from -0.5 to 0.5, not in"),
    (torch.full((1, 3, 16, 16), float("nan")), "pixels from nan to nan"),
    (pixels(2).long(), "torch.int64, neither uint8"),
    (pixels(2)[:, :1], r"shape \(2, 1, 16, 16\), not \(B, 3, 16, 16\)"),
    (pixels(2)[0], r"shape \(3, 16, 16\), not"),
    (pixels(2)[..., :8], r"shape \(2, 3, 16, 8\), not")],
    ids=["0..255 as floats", "normalised", "nan", "int64", "grey", "no batch", "not square"])
def test_other_pixels_are_refused(file, image, message):
    with pytest.raises(ValueError, match=message):
        load(file)(image)


def test_a_file_that_does_not_fit_itself_is_refused_and_leaves_none(file, tmp_path):
    for name, wrong in (("classes", {"classes": CLASSES[1:]}), ("mean", {"statistics": ([0.5], STD)}),
                        ("std", {"statistics": (MEAN, [1.0] * 4)})):
        with pytest.raises(ValueError, match=f"{name} has . values, but the network needs"):
            save(tmp_path / "A3.net.pt", trained(), **FACTS | wrong)
    with pytest.raises(TypeError):
        save(tmp_path / "A3.net.pt", trained(), **FACTS | {"trained_on": {"seed": torch.ones(1)}})
    assert not os.listdir(tmp_path)
    raw, other = file.read_bytes(), torch.load(file, weights_only=True)
    place = raw.index(trained().classifier.weight.detach().numpy().tobytes())
    other["weights"].pop("classifier.bias")
    torch.save(other, lacks := io.BytesIO())
    torch.save({"weights": 1}, foreign := io.BytesIO())
    for broken in (raw[:-100], raw[:place] + b"!" + raw[place + 1:], b"", b"PK", lacks.getvalue(),
                   foreign.getvalue()):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(ValueError, match="broken is no trained network, or damaged"):
            load(tmp_path / "broken")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none")


@pytest.mark.parametrize("as_script", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_files_in_an_empty_folder_are_enough(as_script, file, tmp_path):
    """The examples of network.py run from another folder, with no other file of the project in reach."""
    code, elsewhere = tmp_path / "code", tmp_path / "elsewhere"
    code.mkdir(), elsewhere.mkdir()
    for name in ("network.py", "space.py"):
        shutil.copy(Path(network_file.__file__).with_name(name), code)
    shutil.copy(file, elsewhere)
    Image.new("RGB", (40, 30), "red").save(elsewhere / "photo.jpg")
    example = textwrap.dedent("    from network" + network_file.__doc__.partition("    from network")[2])
    (_, name, probability), = predict(load(file), [elsewhere / "photo.jpg"])
    command = [str(code / "network.py"), "A3.net.pt", "photo.jpg"] if as_script else ["-c", example]
    said = subprocess.run([sys.executable, *command], cwd=elsewhere, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(code)}, check=True).stdout
    assert said == f"photo.jpg: {name}, {probability:.1%}\n" and name in CLASSES


# Image files

def test_an_image_file_is_read_as_in_evaluation(tmp_path):
    noise = torch.randint(256, (50, 37, 4), dtype=torch.uint8, generator=seeded()).numpy()
    rotated = Image.Exif()
    rotated[0x112] = 6
    kinds = {"rgb.png": ("RGB", {}), "upright.jpg": ("RGB", {"exif": rotated}), "grey.png": ("L", {}),
             "cmyk.jpg": ("CMYK", {}), "clear.png": ("RGBA", {}), "palette.png": ("P", {}),
             "clear.gif": ("P", {"transparency": 7}), "deep.png": ("I;16", {})}
    for name, (mode, options) in kinds.items():
        image = Image.fromarray(noise)                                                          # RGBA
        if mode == "I;16":
            image = Image.fromarray(noise[..., 0].astype(np.uint16) * 250)
        elif mode != "RGBA":
            image = image.convert("RGB").convert(mode)
        image.save(tmp_path / name, **options)
    names = [name.encode() for name in kinds]
    folder = Folder(tmp_path, names, None, [], [], {}, "", 16, 0)
    for n, name in enumerate(kinds):
        assert torch.equal(read_image(tmp_path / name, ARCH, 224 / 256)[0], folder.image(n, -1)), name
    grey = read_image(tmp_path / "grey.png", ARCH._replace(in_channels=1, resolution=37), 1.0)
    assert torch.equal(grey[0, 0], read_image(tmp_path / "grey.png", ARCH._replace(resolution=37), 1.0)[0, 0])


def test_whatever_pillow_raises_is_told_in_a_line(tmp_path, monkeypatch):
    """Of a damaged AVIF file it raises a RuntimeError, of others of a dozen kinds."""
    def raising(*given, **more):
        raise RuntimeError("Failed to decode frame 0: Decoding of color planes failed")
    monkeypatch.setattr(Image, "open", raising)
    with pytest.raises(ValueError, match=r"a.avif cannot be read as an image \(Failed to decode frame 0"):
        read_image(tmp_path / "a.avif", ARCH, 1.0)


def test_an_image_of_its_size_is_taken_as_it_is(tmp_path):
    image = pixels(1)
    Image.fromarray(image[0].permute(1, 2, 0).numpy()).save(tmp_path / "same.png")
    assert torch.equal(read_image(tmp_path / "same.png", ARCH, 1.0), image)


def test_classes_and_probabilities_of_files_and_folders(file, tmp_path):
    network, every = load(file), pixels(3)
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    paths = [tmp_path / name for name in ("folder/a.png", "folder/deeper/b.PNG", "z.bmp")]
    for path, image in zip(paths, every):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    for name in ("page.eps", "folder/page.eps", "folder/page.pdf", "folder/._a.png"):       # none is tried
        Image.new("RGB", (16, 16)).save(tmp_path / name, "EPS")
    wanted = network(every).softmax(1)
    found = list(predict(network, [tmp_path / "folder", str(tmp_path / "z.bmp")]))
    assert [path for path, _, _ in found] == paths
    assert [name for _, name, _ in found] == [CLASSES[k] for k in wanted.argmax(1)]
    assert_close(torch.tensor([p for *_, p in found]), wanted.amax(1).detach())
    Image.new("F", (16, 16)).save(tmp_path / "floats.tiff")
    Image.new("I", (16, 16), 2 ** 16).save(tmp_path / "deep.tiff")
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:300])
    os.mkfifo(tmp_path / "fifo.png")                                            # which would be waited for
    os.mkfifo(tmp_path / "folder" / "fifo.png")
    (tmp_path / "folder" / "folder.png").mkdir()
    assert [path for path, *_ in predict(network, [tmp_path / "folder"])] == paths[:2]
    for name in ("folder/notes.txt", "floats.tiff", "deep.tiff", "cut.png", "none.png", "fifo.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            list(predict(network, [tmp_path / name]))
    with pytest.raises(ValueError, match="page.eps cannot be read as an image .cannot identify"):
        list(predict(network, [tmp_path / "page.eps"]))                     # and Ghostscript is not asked
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image files"):
        list(predict(network, [tmp_path / "empty"]))


# Programs

def tells_of_this_machine(raw):
    """Whether the bytes of a program hold a path or a source file's name."""
    folders = (os.fsencode(folder) + b"/" for folder in (Path(__file__).parent.parent, Path.home()))
    return any(word in raw for word in (b".py", b"site-packages", *folders))


def test_an_exported_program_says_what_it_is_and_tells_nothing_else(file, tmp_path):
    network, facts = load(file), {export.FACTS: ""}
    export.export(network, tmp_path / "net.pt2")
    assert os.listdir(tmp_path) == ["net.pt2"]
    program = torch.export.load(tmp_path / "net.pt2", extra_files=facts)
    assert program.graph_signature.user_inputs == ("image",)
    assert program.graph_signature.user_outputs == ("logits",)
    for n in (1, 5):
        assert_close(program.module()(pixels(n)), network(pixels(n)), rtol=1e-4, atol=1e-4)
    for wrong in (pixels(1) / 255, pixels(1)[:, :1], pixels(1)[..., :8]):
        with pytest.raises((RuntimeError, AssertionError)):
            program.module()(wrong)
    facts = json.loads(facts[export.FACTS])
    assert Arch.from_json(facts["arch"]) == ARCH and json.loads(facts["classes"]) == CLASSES
    assert json.loads(facts["trained_on"]) == FACTS["trained_on"] and facts["image"].startswith("uint8")
    with zipfile.ZipFile(tmp_path / "net.pt2") as archive:
        assert not any(tells_of_this_machine(archive.read(name)) for name in archive.namelist())


def test_an_onnx_file_is_one_file_and_says_what_it_is(file, tmp_path):
    pytest.importorskip("onnxscript")
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    network = load(file)
    export.export(network, tmp_path / "a.onnx")
    (tmp_path / "empty").mkdir()
    os.rename(tmp_path / "a.onnx", tmp_path / "empty" / "b.onnx")
    assert os.listdir(tmp_path) == ["empty"] and os.listdir(tmp_path / "empty") == ["b.onnx"]
    raw = (tmp_path / "empty" / "b.onnx").read_bytes()
    assert not tells_of_this_machine(raw)
    kinds = [node.op_type for node in onnx.load_from_string(raw).graph.node]
    assert "BatchNormalization" not in kinds and "Transpose" not in kinds and kinds.count("Conv") == 20
    session = runtime.InferenceSession(tmp_path / "empty" / "b.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == CLASSES
    for n in (1, 5):
        found, = session.run(["logits"], {"image": pixels(n).numpy()})
        assert_close(torch.from_numpy(found), network(pixels(n)), rtol=1e-4, atol=1e-4)
    with pytest.raises(Exception, match="expected: .tensor.uint8"):
        session.run(["logits"], {"image": (pixels(1) / 255).numpy()})


def test_a_program_that_computes_something_else_is_not_written(file, tmp_path, monkeypatch):
    network = load(file)
    for logits in (network(pixels(2)).detach() + 9, torch.full((2, 5), float("nan"))):
        monkeypatch.setattr(export, "pt2", lambda trained, image, logits=logits: (b"", logits))
        with pytest.raises(files.Refused, match=f"the logits of {tmp_path}/net.pt2 differ by"):
            export.export(network, tmp_path / "net.pt2")
    for path, message in ((tmp_path / "net.pth", "ends neither"), (tmp_path / "no" / "net.pt2", "no folder")):
        with pytest.raises(files.Refused, match=message):
            export.check(path)
    assert not os.listdir(tmp_path)
