"""Many small networks side by side on one GPU: the training step of each is a CUDA graph, on its own stream.

A step is some hundred kernels of a few microseconds. Python takes longer to launch them than a GPU to compute
them, and one network fills a small part of it. A graph launches them as one, and streams run side by side.
The recipe, the images of each step and the initial weights are those of train.py.
"""
import itertools

import torch
import torch.nn.functional as F

import data
import train
from derive import RECALIBRATION, evaluate, recalibrate

WARM = 3                        # steps before one is captured: those that begin momentum, and choose kernels


def all_batches(loader, index, seed, stage, steps):
    """The batches of `steps` training steps at once: pixels (steps, B, C, H, W) uint8, labels (steps, B)."""
    pixels, labels = (part.to(loader.device) for part in (loader.images.pixels, loader.images.labels))
    drawn, x, y = data.batch_indices(index, loader.batch_size, seed, stage, train.BATCHES), [], []
    for start in range(0, steps, 1000):
        some = [*itertools.islice(drawn, min(1000, steps - start))]
        order = torch.cat([which for which, _ in some]).to(loader.device)
        moves = zip(*(data.draw_moves(generator, loader.batch_size) for _, generator in some))
        x.append(data.move(pixels[order], *map(torch.cat, moves)))
        y.append(labels[order])
    return (torch.cat(part).unflatten(0, (steps, loader.batch_size)) for part in (x, y))


def training_step(network, args, loader, x, y):
    """A function that takes the next step of train.py's recipe each time, and reads nothing from the GPU."""
    steps, sgd, position = len(x), train.optimizer(network, args), torch.zeros(1, dtype=int, device=x.device)
    rates = torch.tensor([train.learning_rate(args.lr, n, steps) for n in range(steps)], device=x.device)
    rate = rates[0].clone()
    for group in sgd.param_groups:
        group["lr"] = rate                                      # a tensor, for the graph to read

    def step():
        rate.copy_(rates[position][0])
        image = (x[position][0] - loader.mean) / loader.std
        sgd.zero_grad()
        F.cross_entropy(network(image), y[position][0], label_smoothing=args.smoothing).backward()
        sgd.step()
        position.add_(1)
    return step


def captured(step, stream):
    """`step` as a CUDA graph on a `stream`, after its first `WARM` calls."""
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph


def train_many(archs, args, loader, parts):
    """The accuracies on `parts`[1] of networks of one stage, each trained on `parts`[0] as args of train.py
    say. On a CPU they take turns. ArithmeticError if weights are not finite.
    """
    torch.backends.cudnn.allow_tf32 = False                     # float32, as on a CPU
    stage, device = archs[0].stage, loader.device
    steps = args.epochs * (len(parts[0]) // loader.batch_size)
    x, y = all_batches(loader, parts[0], args.seed, stage, steps)
    networks = [train.initial(arch, args).to(device) for arch in archs]
    each = [training_step(network, args, loader, x, y) for network in networks]
    if device.type == "cuda":
        torch.cuda.synchronize()                        # batches and weights are there, for other streams
        streams = [torch.cuda.Stream() for _ in each]
        graphs = [captured(step, stream) for step, stream in zip(each, streams)]
        for _ in range(WARM, steps):
            for graph, stream in zip(graphs, streams):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
    else:
        for _, step in itertools.product(range(steps), each):
            step()
    accuracies = []
    for network in networks:
        if not all(p.isfinite().all() for p in network.parameters()):
            raise ArithmeticError("weights are not finite")
        batches = loader.shuffled(parts[0], args.seed, stage, train.STATISTICS, args.epochs - 1)
        recalibrate(network, itertools.islice(batches, RECALIBRATION))
        accuracies.append(evaluate(network, loader, parts[1]))
    return accuracies
