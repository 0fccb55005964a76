"""From a supernet to a network: its most likely one, or a likely one that spends a budget (Table 3).

    python derive.py runs/001                    # the last stage's most likely
    python derive.py runs/001 --flops 2M
    python derive.py runs/001 --latency 2ms      # measured here, for one image

The most likely network within a budget is found exactly, and one that spends it (budget.py). Of grown
supernets it is the most likely one that keeps the operations of the network before.
"""
from machinery import files, flags, folder, latency, processes, settings
from machinery.files import Refused

import itertools
import json

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import data
from budget import alternatives, choose_stage, keep_operations, spend, viterbi, viterbi_list
from flops import Layer, bounds, costs, each, macs, params
from network import Network
from ops import middle
from space import CANDIDATES, SPACES
from supernet import CHOICES, SuperNet

RECALIBRATION = 32              # training batches that measure a derived network's batch-norm statistics


def log_probabilities(supernet):
    """For each block the log-softmax of its three logits (operations,), (expansions,), (widths,), in float64.

    A choice with one option has log-probability 0.
    """
    single = torch.zeros(1)
    return [tuple(F.log_softmax(block.alphas.get(name, single).cpu().double(), 0) for name in CHOICES)
            for block in supernet.blocks]


def space_costs(supernet, cost=Layer.macs):
    """The `flops.Costs` of the supernet's space, for its own images and classes."""
    return costs(supernet.space, supernet.stem.in_channels, supernet.classifier.out_features, cost)


def arch_of(supernet, options):
    """`Space.arch` for the supernet's images and classes."""
    return supernet.space.arch(options, supernet.stem.in_channels, supernet.classifier.out_features)


def derive(supernet, flops=None, before=None):
    """The supernet's most likely network, as an `Arch`; with `flops`, the most likely within so many MACs if
    it spends 95 % of them, else a likely one that does (`budget.spend`). ValueError if even the cheapest has
    more.

    before: the `Arch` of the stage before, whose blocks keep their operations (`budget.keep_operations`).
    """
    (log_p, table), = spaces_of([supernet], [space_costs(supernet)], [before], flops)
    solution = spend(log_p, table, flops) if flops else viterbi(log_p, table, 0.0)
    return arch_of(supernet, solution.options)


def spaces_of(supernets, tables, before, budget=None):
    """[(log_p, costs), ..], one a supernet, each restricted by `keep_operations`."""
    return [keep_operations(log_probabilities(supernet), table, supernet.space, arch, budget)
            for supernet, table, arch in zip(supernets, tables, before)]


def arch_before(run, stage):
    """The `Arch` from which the search in the folder `run` has grown a stage, to be given to `derive`; None
    for A0, and where every stage began from scratch. Refused if that file is another stage's.
    """
    if not stage or not files.read_json(run / "args.json").get("grow"):
        return None
    return arch_in(run, stage - 1)


def arch_in(run, stage):
    """The `Arch` in A<stage>.json in the folder `run`. Refused if it is none of that stage."""
    file = run / f"A{stage}.json"
    arch = flags.read_arch(file)
    if arch.space not in SPACES or arch.stage != stage:
        raise Refused(f"{file}: no network of A{stage} of {' or '.join(SPACES)}")
    return arch


@torch.no_grad()
def inherit(network, supernet):  # task 5.2
    """Copy the supernet's weights into a derived `network`, which is returned.

    Both hold their tensors in the same order, but for squeeze and excite, which a block of the network may
    lack. Every width is a prefix, so a tensor is the leading corner of the supernet's; of a 5x5 kernel, a 3x3
    one is the middle. Batch-norm statistics are left to `recalibrate`.
    """
    theirs = [supernet.stem, supernet.stem_norm]
    for block, layers in zip(network.arch.blocks, [mixed.layers for mixed in supernet.blocks], strict=True):
        _, se, _ = CANDIDATES[block.op]
        theirs += [layer for layer in layers.children() if se or layer not in (layers.squeeze, layers.excite)]
    theirs += [supernet.head, supernet.head_norm, supernet.classifier]
    for tensor, source in zip(network.parameters(), nn.ModuleList(theirs).parameters(), strict=True):
        corner = source[tuple(slice(n) for n in tensor.shape[:2])]
        tensor.copy_(middle(corner, tensor.shape[-1]) if corner.dim() == 4 else corner)
    return network


@torch.no_grad()
def recalibrate(network, batches):  # task 5.3
    """Measure the batch-norm statistics of `network` anew, as the mean over `batches` of (images, labels).

    Returns it, in eval mode.
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    usual = [m.momentum for m in norms]
    network.train()
    for n, (x, _) in enumerate(batches):
        for m in norms:
            m.momentum = 1 / (n + 1)                          # the n-th batch joins a running mean
        network(x)
    for m, momentum in zip(norms, usual):
        m.momentum = momentum
    return network.eval()


@torch.no_grad()
def evaluate(network, loader, index):
    """The accuracy of `network`, in eval mode, on the images at `index`; each process has a shard of them."""
    network.eval()
    rank, world_size = processes.shard()
    correct = 0
    for x, y in loader.ordered(index[rank::world_size]):
        correct += (network(x).argmax(1) == y).sum()
    return sum(processes.all_gather([int(correct)])) / len(index)


def evaluate_derived(arch, supernet, loader, parts, *position):
    """(network, accuracy): `arch` with the supernet's weights, recalibrated on the first of the two `parts`
    of the training data and evaluated on the second. `position` seeds the order of the batches.
    """
    network = inherit(Network(arch).to(loader.device), supernet).requires_grad_(False)
    batches = loader.shuffled(parts[0], *position, shard=processes.shard())
    processes.average_buffers(recalibrate(network, itertools.islice(batches, RECALIBRATION)))
    return network, evaluate(network, loader, parts[1])


def open_supernet(run, stage):
    """The supernet in A<stage>.json and A<stage>.pt of a run, on the CPU. Refused if these are none."""
    arch, weights = arch_in(run, stage), run / f"A{stage}.pt"
    space = SPACES[arch.space][stage]._replace(resolution=arch.resolution)
    with torch.device("meta"):                      # takes no memory for what the file does not hold
        supernet = SuperNet(space, arch.in_channels, arch.classes)
    try:
        supernet.load_state_dict(files.load_checkpoint(weights), assign=True)
        if not all(p.dtype == torch.float32 for p in supernet.parameters()):
            raise RuntimeError("its weights are not float32")
        if not all(alpha.isfinite().all() for alpha in supernet.alphas()):
            raise RuntimeError("its alphas are not finite")
    except RuntimeError as error:
        why = " ".join(str(error).split()[:12])
        raise Refused(f"{weights} is not the supernet of A{stage}.json ({why} ..)") from None
    return supernet


@flags.command
def main(argv=None):
    args = settings.derive_parser(__doc__).parse_args(argv)
    if args.points and args.refine > 1:
        raise Refused("--refine is for one budget, not for --points")
    if args.data and not args.points and args.refine == 1:
        raise Refused("--data is for --points and --refine, which alone look at images")
    if 0 in (args.flops, args.params):
        raise Refused("a budget must be above 0")
    if args.out and args.out.resolve() in [(args.run / f"A{k}.json").resolve() for k in range(5)]:
        raise Refused(f"--out {args.out} is a network of the run: name another file")
    if args.out and not args.out.parent.is_dir():
        raise Refused(f"--out {args.out}: there is no folder {args.out.parent}")
    files.read_json(args.run / "args.json")                                 # else it is no run
    stages = [k for k in range(5) if (args.run / f"A{k}.pt").exists() and args.stage in (None, k)]
    if not (args.points or args.flops or args.params or args.latency):
        stages = stages[-1:]
    supernets = [open_supernet(args.run, k) for k in stages]
    if not supernets:
        raise Refused(f"{args.run} has no A{args.stage or 0}.pt: no such stage was finished")
    accuracy = evaluator(args.run, args.data) if args.points or args.refine > 1 else None
    before = [arch_before(args.run, k) for k in stages]
    if args.points:
        rows = front(supernets, before, args.points, accuracy)
        name, text = "points", json.dumps(rows, indent=1) + "\n"
    else:
        name, text = under_budget(args, supernets, before, accuracy)
    path = args.out or args.run / f"{name}.json"
    files.write(path, text)
    print(f"written: {path}")


def evaluator(run, moved):
    """A function (supernet, arch) -> accuracy on the validation split of the search in the folder `run`.

    moved: --data, or None. Refused if the run's images are not there.
    """
    args = settings.read(run, moved)
    if moved not in (None, args.data):
        raise Refused(f"--data: the run's images are {args.data}, and {moved} does not hold the same")
    images = flags.load_images(args, "train", run)
    folder.unchanged(images, run)
    parts = data.split(images.labels, args.seed)
    loader = data.Loader(images, images.statistics(parts[0]), args.batch_size)

    def accuracy(supernet, arch):
        batches = args.seed, arch.stage, 0                  # search.py's, so that its number comes out
        return evaluate_derived(arch, supernet, loader, parts, *batches)[1]
    return accuracy


def front(supernets, before, points, accuracy):
    """Rows of `points` networks from the cheapest to the dearest, evenly on a logarithmic scale of MACs."""
    tables = [space_costs(supernet) for supernet in supernets]
    ends = [end for table in tables for end in bounds(table)]
    budgets = np.geomspace(min(ends), max(ends), points).clip(min(ends), max(ends))
    chosen = [choose_stage(spaces_of(supernets, tables, before, budget), budget, str, nearest=True)
              for budget in budgets]
    return [report(supernets[which], solution, accuracy) for which, solution in chosen]


def under_budget(args, supernets, before, accuracy):
    """(name of its file, text): the network of `budget.spend` for the budget which `args` names, or without
    one the supernet's most likely. Of args.refine likely ones it is the most accurate.
    """
    budget = args.flops or args.params or args.latency
    if args.latency:
        show, name = latency.show, f"latency-{budget / 1e6:g}ms"
        tables = latency_costs(supernets, args.run / "latency.json")
    elif budget:
        name, unit, cost = ("flops", "macs", Layer.macs) if args.flops else ("params", "params", Layer.params)
        show, name = f"{{:,.0f}} {unit}".format, f"{name}-{budget:.0f}"
        tables = [space_costs(supernet, cost) for supernet in supernets]
    else:
        show, name = str, f"A{supernets[0].space.stage}-likely"
        tables = [space_costs(supernets[0])]
    spaces = spaces_of(supernets, tables, before, budget)
    which, solution = choose_stage(spaces, budget, show) if budget else (0, viterbi(*spaces[0], 0.0))
    if args.refine > 1:
        log_p, table = spaces[which]
        solutions = (alternatives(log_p, table, budget, args.refine) if budget else
                     viterbi_list(log_p, table, 0.0, args.refine))
        accuracies = [report(supernets[which], s, accuracy)["accuracy"] for s in solutions]
        solution = solutions[accuracies.index(max(accuracies))]
        print("best:")
    report(supernets[which], solution)
    arch = arch_of(supernets[which], solution.options)
    if args.latency:
        whole, = latency.measure_networks([Network(arch)])
        print(f"{show(solution.cost)} by its layers, {show(whole)} measured as a whole")
    if budget:
        lost = viterbi(*spaces[which], 0.0).log_likelihood - solution.log_likelihood
        print(f"{100 * (1 - solution.cost / budget):.2f} % under the budget; it costs {lost:.2f} nats of "
              "likelihood")
    return name, arch.to_json()


def latency_costs(supernets, file):
    """The `flops.Costs` of each supernet's space in nanoseconds; `file` keeps what is measured."""
    return latency.tables(lambda cost: [space_costs(supernet, each(cost)) for supernet in supernets],
                          lambda which, options: Network(arch_of(supernets[which], options)), file)


def report(supernet, solution, accuracy=None):
    """Print a `Solution` as a line; returns its row for a JSON file. accuracy: what `evaluator` returns."""
    arch = arch_of(supernet, solution.options)
    row = {"stage": arch.stage, "flops": macs(arch), "params": params(arch),
           "log_likelihood": solution.log_likelihood, "accuracy": accuracy and accuracy(supernet, arch),
           "arch": json.loads(arch.to_json())}
    measured = f"  {100 * row['accuracy']:5.1f} % on the validation split" if accuracy else ""
    print(f"A{arch.stage}  {row['flops'] / 1e6:8.3f} M MACs  {row['params'] / 1e6:7.3f} M parameters  "
          f"log-likelihood {solution.log_likelihood:8.2f}{measured}", flush=True)
    return row


if __name__ == "__main__":
    main()
