"""A trained network as a program that runs without this code: torch.export (.pt2) or ONNX (.onnx).

Its input `image` is uint8 pixels (batch, C, R, R) in 0..255, so that pixels of another range have a type that
the program refuses; its output is `logits` (batch, classes). Normalisation is its first layer. The facts of
the network's file (classes, architecture, accuracy, ..) travel as metadata, paths and source lines do not.
"""
from machinery.files import Refused, write

import copy
import importlib.util
import io
import json
import warnings
from pathlib import Path

import torch

FACTS = "facts.json"                # the name of a .pt2's extra file
BATCH = {"image": {0: torch.export.Dim("batch")}}


def check(path):
    """Refused if nothing can be exported to `path`, before any work."""
    if path.suffix not in (".pt2", ".onnx"):
        raise Refused(f"--export {path} ends neither in .pt2 nor in .onnx")
    if not path.parent.is_dir():
        raise Refused(f"--export {path}: there is no folder {path.parent}")
    if path.suffix == ".onnx" and not importlib.util.find_spec("onnxscript"):
        raise Refused("--export to .onnx needs onnx: pip install onnx onnxscript, or export to .pt2")


def export(trained, path):
    """Write a `network.TrainedNetwork` to `path`, a .pt2 or .onnx: one file, whole or not at all.

    Refused if the program's logits differ from the network's; those of ONNX need onnxruntime, else they are
    not compared.
    """
    trained = copy.deepcopy(trained).cpu().float().eval().to(memory_format=torch.contiguous_format)
    arch = trained.arch
    image = torch.randint(256, (2, arch.in_channels, arch.resolution, arch.resolution), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    form = {".pt2": pt2, ".onnx": onnx}[Path(path).suffix]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")                                   # of exporters about their own code
        raw, logits = form(trained, image)
        wanted = trained(image)
    off = 0 if logits is None else float((logits - wanted).abs().max())
    if not off <= 1e-3 * float(wanted.abs().max()):
        raise Refused(f"the logits of {path} differ by {off:.1e} from the network's")
    write(path, raw)
    print(f"exported: {path}")


def facts(trained):
    """What a program says of itself: {name: text}, where all but the architecture's text is JSON."""
    c, r = trained.arch.in_channels, trained.arch.resolution
    interface = {"image": f"uint8 (batch, {c}, {r}, {r}), 0 to 255",
                 "logits": f"float32 (batch, {trained.arch.classes})"}
    return {key: value if isinstance(value, str) else json.dumps(value)
            for key, value in {**trained.facts, **interface}.items()}


def program(trained, image):
    """The `torch.export.ExportedProgram` of a network, for batches of any size, with its output named."""
    found = torch.export.export(trained, (image,), dynamic_shapes=BATCH)
    for module in found.graph_module.modules():
        for node in module.graph.nodes:
            node.meta.pop("stack_trace", None)                            # paths and lines of this machine
    logits = found.graph.output_node().args[0][0]
    found.graph_signature.replace_all_uses(logits.name, "logits")
    logits.name = "logits"
    return found


def pt2(trained, image):
    """(the bytes of a .pt2, the logits of `image` by the program that is in them)."""
    file = io.BytesIO()
    torch.export.save(program(trained, image), file, extra_files={FACTS: json.dumps(facts(trained))})
    file.seek(0)
    return file.getvalue(), torch.export.load(file).module()(image)


def onnx(trained, image):
    """(the bytes of an .onnx, the logits of `image` by onnxruntime or, where that is missing, None)."""
    found = torch.onnx.export(program(trained, image), (image,), dynamo=True, verbose=False,
                              input_names=["image"], output_names=["logits"], dynamic_shapes=BATCH)
    found.model.metadata_props.update(facts(trained))
    raw = found.model_proto.SerializeToString()
    if not importlib.util.find_spec("onnxruntime"):
        return raw, None
    import onnxruntime
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    return raw, torch.from_numpy(session.run(["logits"], {"image": image.numpy()})[0])
