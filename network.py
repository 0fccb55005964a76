"""One network of a space, alone: plain PyTorch that needs this file and space.py only (Table 3).

A trained network is one file. It holds what its weights mean: architecture, normalisation, classes.

    python network.py A3.net.pt photo.jpg photos/       # a line an image: class and probability

    from network import load, predict
    network = load("A3.net.pt")                         # images (B, C, R, R) in, logits (B, classes) out
    for path, name, probability in predict(network, ["photo.jpg"]):
        print(f"{path}: {name}, {probability:.1%}")
"""
import argparse
import functools
import json
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation
from torchvision.transforms.functional import pil_to_tensor

from space import CANDIDATES, Arch, round8

ACTIVATIONS = {"relu": nn.ReLU, "hswish": nn.Hardswish}

# Image formats that are tried; a PostScript file would be run, by Ghostscript. Some builds lack AVIF.
FORMATS = [name for name in ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
           if name in Image.registered_extensions().values()]
# What reading foreign bytes may raise.
BROKEN = (ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, RuntimeError, TypeError,
          ValueError, pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error)

conv = functools.partial(Conv2dNormActivation, inplace=None)            # hooks see what each layer computed


class InvertedResidual(nn.Module):
    """A block of an `Arch`: one candidate of Table 2, and its residual. x (B, i, H, W) -> (B, o, H', W')."""

    def __init__(self, block, inputs):
        super().__init__()
        kernel, se, activation = CANDIDATES[block.op]
        hidden, outputs, act = block.hidden, block.out, ACTIVATIONS[activation]
        self.expand = conv(inputs, hidden, 1, activation_layer=act) if block.expand else nn.Identity()
        self.depthwise = conv(hidden, hidden, kernel, block.stride, groups=hidden, activation_layer=act)
        self.squeeze_excite = (SqueezeExcitation(hidden, round8(hidden / 4), scale_activation=nn.Hardsigmoid)
                               if se else nn.Identity())
        self.project = conv(hidden, outputs, 1, activation_layer=None)
        self.residual, self.outputs, self.wider = block.residual, outputs, outputs - inputs

    def forward(self, x):
        y = self.project(self.squeeze_excite(self.depthwise(self.expand(x))))
        if not self.residual:
            return y
        if self.wider > 0:
            x = F.pad(x, (0, 0, 0, 0, 0, self.wider))                   # channels of zeros
        elif self.wider < 0:
            x = x[:, :self.outputs]
        return y + x


class Network(nn.Module):
    """The stand-alone network of an `Arch`: normalised images (B, in_channels, H, W) -> logits (B, classes).

    dropout: probability before the classifier, when training. The weights lie with their channels last in
    memory, and so do all images behind the stem: training takes two thirds of the time on a CPU.
    """

    def __init__(self, arch, dropout=0.0):
        super().__init__()
        self.arch = arch
        self.stem = conv(arch.in_channels, arch.stem, 3, 2, activation_layer=nn.Hardswish)
        self.blocks = nn.Sequential(*map(InvertedResidual, arch.blocks, arch.inputs()))
        self.head = conv(arch.blocks[-1].out, arch.head, 1, activation_layer=nn.Hardswish)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(arch.head, arch.classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = self.head(self.blocks(self.stem(x)))
        return self.classifier(self.dropout(self.flatten(self.pool(x))))


def check(image, arch):
    """Raise ValueError unless `image` holds pixels for a network of `arch`, as `TrainedNetwork` says."""
    wanted = (arch.in_channels, arch.resolution, arch.resolution)
    if image.dim() != 4 or tuple(image.shape[1:]) != wanted:
        raise ValueError(f"image has the shape {tuple(image.shape)}, not (B, {', '.join(map(str, wanted))})")
    if image.dtype == torch.uint8:
        return
    if not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}, neither uint8 in 0..255 nor floating point in [0, 1]")
    low, high = (float(x) for x in image.aminmax()) if image.numel() else (0, 0)
    if not 0 <= low <= high <= 1:
        raise ValueError(f"image has floating-point pixels from {low:.4g} to {high:.4g}, not in [0, 1]: they "
                         "must not be normalised, and whole numbers in 0..255 must be uint8")


def scaled(image, like):
    """Pixels, uint8 in 0..255 or floating point in [0, 1], in 0..255 and of the type of `like`."""
    pixels = image.to(like.dtype)
    return pixels if image.dtype == torch.uint8 else 255 * pixels


torch.fx.wrap("check")                      # FX, which cannot trace their branches, keeps the calls
torch.fx.wrap("scaled")


class TrainedNetwork(nn.Module):
    """A trained `Network` behind its normalisation: image (B, C, R, R) -> logits (B, classes).

    image: uint8 pixels in 0..255, or floating-point ones in [0, 1]. ValueError for anything else, but not
    within a compiled, scripted or exported program. facts: what its file holds beside the weights, a dict.
    """

    def __init__(self, facts):
        super().__init__()
        self.facts, self.classes, self.arch = facts, facts["classes"], Arch.from_json(facts["arch"])
        for key, n in (("classes", self.arch.classes), ("mean", self.arch.in_channels),
                       ("std", self.arch.in_channels)):
            if len(facts[key]) != n:
                raise ValueError(f"{key} has {len(facts[key])} values, but the network needs {n}")
        for name in ("mean", "std"):                                    # (C, 1, 1), of pixels in 0..255
            self.register_buffer(name, 255 * torch.as_tensor(facts[name], dtype=torch.float32).view(-1, 1, 1))
        self.network = Network(self.arch)

    def forward(self, image):
        if not (torch.jit.is_scripting() or torch.compiler.is_compiling()):
            check(image, self.arch)
        return self.network((scaled(image, self.mean) - self.mean) / self.std)


def save(file, network, statistics, classes, accuracy, trained_on, crop=1.0):
    """Write a trained `Network` to `file`, a path or a binary file, as what `load` reads.

    statistics: mean and standard deviation of the training images' pixels in [0, 1], a value a channel.
    classes: their names, in the order of the logits. accuracy: in [0, 1]. trained_on: a dict for JSON. crop:
    the share of an image's shorter side that the network sees, in the middle (224/256 in ImageNet's usual
    evaluation). ValueError, and no file, if these do not fit the network.
    """
    mean, std = (torch.as_tensor(values).flatten().tolist() for values in statistics)
    facts = {"arch": network.arch.to_json(), "mean": mean, "std": std, "classes": list(classes), "crop": crop,
             "accuracy": accuracy, "trained_on": json.loads(json.dumps(trained_on))}
    TrainedNetwork(facts)
    torch.save({"facts": facts, "weights": network.state_dict()}, file)


def load(path):
    """The `TrainedNetwork` in the file at a path, written by `save`, on the CPU, in eval mode. ValueError if
    it is none.

    Its weights are contiguous, which is what exporters expect; `.to(memory_format=torch.channels_last)` makes
    it faster in PyTorch.
    """
    try:
        broken = zipfile.ZipFile(path).testzip()                   # PyTorch does not look at its checksums
        if broken:
            raise ValueError(f"the checksum of {broken} is wrong")
        content = torch.load(path, map_location="cpu", weights_only=True)
        trained = TrainedNetwork(content["facts"])
        trained.network.load_state_dict(content["weights"])
    except BROKEN as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is no trained network, or damaged ({why})") from None
    return trained.to(memory_format=torch.contiguous_format).eval()


def open_image(path):
    """The image file at a path, opened by PIL. ValueError for what is no file: a FIFO would be waited for."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("is no regular file")
    return Image.open(path, formats=FORMATS)


def converted(image, mode):
    """A PIL image of any mode as "RGB" or grey, "L": upright, transparent is white, 16 bits become 8.

    ValueError for numbers whose white is unknown.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):                         # 16 bits; Pillow's own conversion cuts at 255
        values = np.asarray(image).astype(np.int64)
        if not 0 <= values.min() <= values.max() < 2 ** 16:
            raise ValueError("more than 16 bits a pixel")
        values[values == image.info.get("transparency", -1)] = 65535            # white
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))       # 65535 = 257 * 255
    if image.mode == "F":
        raise ValueError("its pixels are floats, of unknown range")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def cropped(image, resolution, crop):
    """The middle of a PIL image, `crop` of its shorter side, as uint8 pixels (C, R, R)."""
    side = crop * min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    return pil_to_tensor(image.resize((resolution, resolution), Image.Resampling.BILINEAR,
                                      (left, top, left + side, top + side)))


def read_image(path, arch, crop):
    """The middle of an image file as uint8 pixels (1, C, R, R). ValueError, with the path, if it has none."""
    try:
        with open_image(path) as image:
            image = converted(image, "RGB" if arch.in_channels == 3 else "L")
    except (*BROKEN, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from None
    return cropped(image, arch.resolution, crop)[None]


@torch.no_grad()
def predict(network, paths):
    """For each image file yield (path, class name, probability), by a `TrainedNetwork`.

    A folder stands for all image files in it and below. ValueError for a file that is no image, and for a
    folder without one.
    """
    formats = Image.registered_extensions()
    for path in map(Path, paths):
        files = [path] if not path.is_dir() else sorted(
            file for file in path.rglob("[!.]*")
            if formats.get(file.suffix.lower()) in FORMATS and file.is_file())
        if not files:
            raise ValueError(f"{path} holds no image files")
        for file in files:
            image = read_image(file, network.arch, network.facts["crop"]).to(network.mean.device)
            probability, index = network(image).softmax(1)[0].max(0)
            yield file, network.classes[index], float(probability)


def main(argv=None):
    p = argparse.ArgumentParser(prog="network.py", description=__doc__.partition("\n")[0])
    p.add_argument("network", type=Path, metavar="A3.net.pt", help="a network, as train.py leaves it")
    p.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of them")
    args = p.parse_args(argv)
    try:
        for path, name, probability in predict(load(args.network), args.images):
            print(f"{path}: {name}, {probability:.1%}")
    except (OSError, ValueError) as error:
        p.exit(2, f"network.py: {error}\n")


if __name__ == "__main__":
    main()
