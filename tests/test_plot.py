"""What a reader of the pictures is promised: points, error bars, boxes and probabilities are those of the
files, runs that differ in more than the seed are never averaged, texts hide nothing, a mistake ends
in one line.

The oracles: the files that each test writes; means and deviations from `statistics`; entropies by hand; what
is drawn is read back from the figures.
"""
from machinery import pictures, results

import itertools
import json
import math
import random
import statistics

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.text import Annotation, Text
from PIL import Image

import plot
from space import CANDIDATES, SPACES

ACCURACIES = (0.5, 0.6, 0.7)
NAME = "curriculum search, patterns, small space"


@pytest.fixture
def unsaved(monkeypatch):
    """Figures are returned without being written: most of the time goes into that."""
    for module in (plot, pictures):
        monkeypatch.setattr(module, "save", lambda figure, path: figure)


def blocks(*rows):
    return [dict(zip(("op", "hidden", "out", "stride", "residual"), row)) for row in rows]


FACTS = {"space": "small", "resolution": 28, "in_channels": 1, "classes": 10, "stem": 16, "head": 256}
# 28 pixels, so 14 behind the stem and 7 from the second row on; A1 has one block more, in the second row.
NETWORKS = [blocks(("ir_k3", 16, 8, 1, False), ("ir_k5_se_hs", 24, 32, 2, False),
                   ("ir_k3_se", 32, 24, 1, False)),
            blocks(("ir_k5", 16, 16, 1, False), ("ir_k5_se", 24, 16, 2, False), ("ir_k3_hs", 48, 8, 1, True),
                   ("ir_k3", 8, 16, 1, False))]


def make(folder, seed=0, accuracies=ACCURACIES, **settings):
    """A run's folder with args.json, summary.json, A0.json and A1.json."""
    folder.mkdir()
    args = {"method": "cst", "space": "small", "data": "fake", "grow": True, "seed": seed, "device": "cpu"}
    (folder / "args.json").write_text(json.dumps(args | settings))
    rows = [{"stage": n, "flops": 1000000 * (n + 1) + seed, "params": 100000 * (n + 1) + seed, "accuracy": a}
            for n, a in enumerate(accuracies)]
    (folder / "summary.json").write_text(json.dumps(rows))
    for n, chosen in enumerate(NETWORKS):
        (folder / f"A{n}.json").write_text(json.dumps(FACTS | {"stage": n, "blocks": chosen}))
    return folder


def trained(folder, *rows):
    rows = [dict(zip(("name", "stage", "flops", "params", "accuracy"), row)) for row in rows]
    (folder / "trained.json").write_text(json.dumps(rows))


def log(folder, *rows):
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def uniform(n):
    return [1 / n] * n


def drawn(axis):
    """{label: (data line, [error bar segments])} of a panel."""
    return {c.get_label(): (c[0], [s for bars in c[2] for s in bars.get_segments() if len(s)])
            for c in axis.containers}


def test_error_bars_are_the_standard_deviation_over_seeds(unsaved, tmp_path):
    values = [(0.51, 0.70), (0.57, 0.72), (0.60, 0.71)]
    runs = [make(tmp_path / str(n), n, pair) for n, pair in enumerate(values)]
    left, right = plot.curve(runs, tmp_path / "curve.png").axes
    (line, bars), = drawn(left).values()
    for n in range(2):
        mean, std = (f([100 * pair[n] for pair in values]) for f in (statistics.mean, statistics.stdev))
        x, y = line.get_xydata()[n]
        assert (x, y) == pytest.approx(((1000000 * (n + 1) + 1) / 1e6, mean))
        upright = [s for s in bars if s[0][1] != s[1][1] and s[0][0] == pytest.approx(x)]
        assert [tuple(s[:, 1]) for s in upright] == [pytest.approx((mean - std, mean + std))]
    assert drawn(right)[NAME][0].get_xdata() == pytest.approx([0.100001, 0.200001])


def test_runs_are_averaged_only_if_they_differ_in_the_seed_alone(unsaved, tmp_path):
    runs = [make(tmp_path / name, seed, (0.5,), **settings) for name, seed, settings in (
        ("a", 0, {}), ("b", 1, {"device": "cuda"}), ("c", 0, {"grow": False}), ("d", 0, {"method": "direct"}),
        ("e", 0, {"method": "direct", "data": "cifar10"}))]
    labels = [f"{NAME}, grow", f"{NAME}, no grow", "direct search, patterns, small space",
              "direct search, CIFAR-10, small space"]
    assert results.experiments(runs) == dict(zip(labels, (runs[:2], runs[2:3], runs[3:4], runs[4:])))
    figure = plot.curve(runs, tmp_path / "curve.png")
    legend = [t.get_text() for t in figure.legends[0].texts]
    assert legend[:-1] == [f"{labels[0]}, 2 seeds", *(f"{label}, 1 seed" for label in labels[1:])]
    assert legend[-1] == "standard deviation over seeds"
    styles = [(line.get_color(), line.get_marker()) for line, _ in drawn(figure.axes[0]).values()]
    assert len({colour for colour, _ in styles}) == len({mark for _, mark in styles}) == 4


def test_where_words_cannot_tell_experiments_apart_the_folder_does(tmp_path):
    runs = [make(tmp_path / "a", epochs=[1, 1]), make(tmp_path / "b", epochs=[2, 2])]
    assert list(results.experiments(runs)) == [NAME, f"{NAME} ({runs[1]})"]


def test_the_same_seed_twice_does_not_count_twice(unsaved, tmp_path):
    runs = [make(tmp_path / "a"), make(tmp_path / "b")]
    with pytest.raises(ValueError, match="the seed of"):
        plot.curve(runs, tmp_path / "curve.png")


def test_a_folder_without_args_is_named_by_itself(tmp_path):
    (make(tmp_path / "run") / "args.json").unlink()
    assert list(results.experiments([str(tmp_path / "run")])) == ["run"]


def test_open_marks_for_the_supernets_weights_and_filled_for_trained(unsaved, tmp_path):
    run = make(tmp_path / "run", accuracies=(0.5, None, 0.7))                       # A1 was not measured
    trained(run, ("A2", 2, 3e6, 3e5, 0.9), ("A0", 0, 1e6, 1e5, 0.8))
    top, _, bottom, _ = plot.curve([run], tmp_path / "curve.png").axes
    assert all(not bars for axis in (top, bottom) for _, bars in drawn(axis).values())      # of one seed
    for axis, points, filled in ((top, [(1, 80), (3, 90)], True), (bottom, [(1, 50), (3, 70)], False)):
        line, _ = drawn(axis)[NAME]
        assert line.get_xydata().ravel().tolist() == pytest.approx([x for point in points for x in point])
        assert (line.get_markerfacecolor() == line.get_color()) == filled


def test_networks_from_inherited_weights_are_a_line_of_their_own(unsaved, tmp_path):
    run, rows = make(tmp_path / "run"), []
    for init, more in (("inherit", 0.05), ("scratch", 0)):
        rows += [{"name": f"A{n}", "stage": n, "init": init, "flops": 1e6 * (n + 1), "params": 1e5 * (n + 1),
                  "accuracy": 0.8 + n / 50 + more} for n in range(2)]
    (run / "trained.json").write_text(json.dumps(rows))
    figure = plot.curve([run], tmp_path / "curve.png")
    found, name = drawn(figure.axes[0]), NAME
    assert list(found) == [name, f"{name}, inherit"]
    assert [line.get_ydata().tolist() for line, _ in found.values()] == [pytest.approx([80, 82]),
                                                                         pytest.approx([85, 87])]
    one, other = ((line.get_color(), line.get_marker()) for line, _ in found.values())
    assert one[0] != other[0] and one[1] != other[1]
    assert [t.get_text() for t in figure.legends[0].texts] == [f"{name}, 1 seed", f"{name}, inherit, 1 seed"]


def test_other_networks_are_points_with_their_familys_mark_and_their_width(unsaved, tmp_path):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", 1)]
    for run, more in zip(runs, ((("Other", 0, 3e6, 3e5, 0.87),), ())):
        trained(run, ("A0", 0, 1e6, 1e5, 0.8), ("MobileNetV2 x0.3", 0, 2e6, 2e5, 0.85), *more)
    lines = results.curves(runs)
    assert [(key, list(points)) for key, points in lines.items()] == [
        ((NAME, True, "trained.json"), ["A0"]), ((NAME, True, "summary.json"), ["A0", "A1", "A2"]),
        (("MobileNetV2", False, "trained.json"), ["MobileNetV2 x0.3"]),
        (("Other", False, "trained.json"), ["Other"])]
    assert list(lines.values())[2:] == [{"MobileNetV2 x0.3": [[2, 0.2, 85]]}, {"Other": [[3, 0.3, 87]]}]
    figure = plot.curve(runs, tmp_path / "curve.png")
    assert {"x0.3", "A0"} == {t.get_text() for t in figure.axes[0].texts}
    marks = {line.get_label().partition(",")[0]: line.get_marker()
             for line in figure.legends[0].legend_handles}
    stars = {name: line.get_marker() for name, (line, _) in drawn(figure.axes[0]).items() if name != NAME}
    assert stars == {"MobileNetV2": marks["MobileNetV2"], "Other": marks["Other"]}
    assert stars["Other"] != stars["MobileNetV2"]


def test_texts_of_the_curve_hide_nothing(unsaved, tmp_path):
    rng, runs = random.Random(0), []
    for n in range(6):
        accuracies = [0.4 + 0.1 * stage + rng.uniform(-0.05, 0.05) for stage in range(5)]
        runs.append(make(tmp_path / str(n), n % 2, (None,), method=f"method {n // 2}"))
        trained(runs[-1], *((f"A{s}", s, 1e6 + 1e6 * s, 1e5 + 1e5 * s, a) for s, a in enumerate(accuracies)),
                ("MobileNetV3-small x0.35", 0, 4e6, 4e5, 0.42))
    figure = plot.curve(runs, tmp_path / "curve.png")
    for axis in figure.axes:                                        # two, of trained.json
        boxes = [t.get_window_extent() for t in axis.texts if isinstance(t, Annotation)]
        assert len(boxes) >= 5
        frame = axis.get_window_extent()
        segments = [s for bars in axis.findobj(LineCollection) for s in bars.get_segments() if len(s)]
        segments += [line.get_xydata() for line, _ in drawn(axis).values()]
        paths = [Path(axis.transData.transform(segment)) for segment in segments]
        for n, box in enumerate(boxes):
            assert frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            assert not any(box.overlaps(other) for other in boxes[:n])
            assert not any(path.intersects_bbox(box, filled=False) for path in paths)


def test_the_legend_is_whole(unsaved, tmp_path):
    runs = [make(tmp_path / "a", method="cst", stages=2), make(tmp_path / "b", method="cst", distill=False)]
    figure = plot.curve(runs, tmp_path / "curve.png")
    box, = (legend.get_window_extent() for legend in figure.legends)
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width and box.y0 >= 0


def test_any_name_of_a_folder_or_a_network_can_be_drawn(unsaved, tmp_path):
    names = {"$_a_b_c$": "$_a_b_c$", "_hidden": "_hidden", "\udcff": "\\udcff", "a\nb": "a\nb"}
    runs = [make(tmp_path / name, accuracies=(n / 4,)) for n, name in enumerate(names)]
    for run in runs:
        (run / "args.json").unlink()
    trained(runs[0], *((f"{name} x0.5", 0, 1e6, 1e5, n / 4) for n, name in enumerate(names)))
    legend = [t.get_text() for t in plot.curve(runs, tmp_path / "curve.png").legends[0].texts]
    assert legend[:4] == [f"{shown}, 1 seed" for shown in names.values()]
    assert sorted(legend[4:]) == sorted(legend[:4])


def test_a_users_matplotlibrc_changes_nothing(tmp_path):
    run = make(tmp_path / "run")
    plot.curve([run], tmp_path / "plain.png")
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "savefig.bbox": "tight",
                                "axes.grid": True, "axes.xmargin": 0.4, "savefig.dpi": 30}):
        plot.curve([run], tmp_path / "theirs.png")
    assert (tmp_path / "theirs.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "-1", "1e999", "9" * 400, "0.5.5", '"1"'])
@pytest.mark.parametrize("file, content", [
    ("summary.json", '[{"stage": 0, "flops": ?, "params": 100, "accuracy": 0.5}]'),
    ("summary.json", '[{"stage": 0, "flops": 100, "params": ?, "accuracy": 0.5}]'),
    ("trained.json", '[{"name": "A0", "stage": 0, "flops": 100, "params": 100, "accuracy": ?}]'),
    ("log.jsonl", '{"stage": 0, "step": 1, "alphas": [[1, [{"op": [?, 1, 0, 0, 0, 0, 0, 0]}]]]}'),
    ("log.jsonl", '{"stage": ?, "step": 1, "alphas": [[1, [{"op": [1, 0, 0, 0, 0, 0, 0, 0]}]]]}'),
    ("A0.json", json.dumps(FACTS | {"stage": 0, "blocks": NETWORKS[0]}).replace("28", "?"))])
def test_no_number_beyond_reason_is_drawn(number, file, content, tmp_path, capsys):
    run = make(tmp_path / "run")
    (run / file).write_text(content.replace("?", number))
    with pytest.raises(SystemExit) as stopped:
        plot.main([str(run)])
    assert stopped.value.code == 2 and file in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not list(run.glob("*.png"))


def test_texts_stand_apart_the_last_comes_first_and_what_has_no_place_is_left_out():
    axis = Figure((3, 3)).add_subplot(xlim=(0, 1), ylim=(0, 1))
    texts = [(0.5, 0.5, "one", False), (0.5, 0.9, "x" * 60, True), (0.55, 0.5, "two", False)]
    plot.place(axis, [(*text, colour) for text, colour in zip(texts, ("red", "black", "blue"))])
    assert [(text.get_text(), text.get_color()) for text in axis.texts] == [("two", "blue"), ("one", "red")]
    two, one = (text.get_window_extent() for text in axis.texts)
    assert not one.overlaps(two)


@pytest.mark.parametrize("needed", [False, True])
def test_only_a_needed_text_may_cross_a_line(needed):
    axis = Figure((3, 3)).add_subplot(xlim=(0, 1), ylim=(0, 1))
    for y in np.arange(0.05, 1, 0.05):                              # nearer than a text is high
        axis.plot([0, 1], [y, y])
    plot.place(axis, [(0.5, 0.5, "name", needed, "red")])
    assert len(axis.texts) == needed


def test_one_wide_network_does_not_leave_the_panel_empty(unsaved, tmp_path):
    run = make(tmp_path / "run")
    trained(run, ("A0", 0, 1e6, 1e5, 0.8), ("MobileNetV3 x1", 0, 2e6, 2e6, 0.85))
    *_, macs, parameters = plot.curve([run], tmp_path / "curve.png").axes
    assert (macs.get_xscale(), parameters.get_xscale()) == ("linear", "log")
    parameters.figure.draw_without_rendering()
    ticks = (*parameters.xaxis.get_major_ticks(), *parameters.xaxis.get_minor_ticks())
    assert {"0.1", "0.2", "0.5", "1", "2"} <= {tick.label1.get_text() for tick in ticks}


def test_a_point_of_one_seed_among_means_says_so_in_its_lines_colour(unsaved, tmp_path):
    runs = [make(tmp_path / f"{n}{seed}", seed, [a - n / 5 for a in ACCURACIES[:3 - seed]], method=f"{n}")
            for n in range(3) for seed in range(2)]
    left, _ = plot.curve(runs, tmp_path / "curve.png").axes
    labels, colours = ["A2 (1 seed)", "A1", "A0"], plot.COLOURS[:3]
    assert [(t.get_text(), t.get_color()) for t in left.texts] == [
        (label, colour) for colour, its in zip(colours[::-1], (labels[:1], labels, labels)) for label in its]


def test_no_text_stands_nearer_to_the_point_of_another_line():
    axis = Figure((3, 3)).add_subplot(xlim=(0, 1), ylim=(0, 1))
    plot.place(axis, [(0.5, 0.5, "here", True, "red"), (0.53, 0.47, "", False, "red")])    # in its place
    note, = axis.texts
    (x, y), other = axis.transData.transform([(0.5, 0.5), (0.53, 0.47)])
    box = note.get_window_extent()

    def gap(point):
        return math.dist(point, (min(max(point[0], box.x0), box.x1), min(max(point[1], box.y0), box.y1)))
    assert gap((x, y)) < gap(other)


def test_architectures_are_the_files(unsaved, tmp_path):
    run = make(tmp_path / "run", accuracies=(0.5, None))
    figure = pictures.architectures(run, tmp_path / "a.png")
    axis, = figure.axes
    grey = [box for box in axis.patches if box.get_facecolor()[:3] == (0.85,) * 3]
    boxes, chosen = [box for box in axis.patches if box not in grey], [b for net in NETWORKS for b in net]
    assert len(boxes) == len(chosen) == 7 and len(grey) == 4                        # stems and heads
    for box, block in zip(boxes, chosen):
        colour, words = pictures.FILLS[block["op"][5:]]
        assert to_hex(box.get_facecolor()).upper() == colour
        assert box.get_height() / boxes[1].get_height() == pytest.approx(block["out"] / 32)
        assert (box.get_hatch() is not None) == ("k5" in block["op"])
        assert ("SE" in words, "hswish" in words) == ("se" in block["op"], "hs" in block["op"])
    first, second = ([box.get_x() for box in half] for half in (boxes[:3], boxes[3:]))
    assert second == sorted(second) and first == [second[0], second[1], second[3]]  # rows stand together
    for stem, head in (grey[:2], grey[2:]):
        assert stem.get_x() < min(second) and head.get_x() > max(second)
    strides = sum(b["stride"] == 2 for b in chosen) + 2
    words = [t.get_text() for t in axis.texts]
    assert [word for word in words if "▼" in word] == ["▼14", "▼7"] * 2 and strides == 4
    assert {"A0", "A1", "1.00 M MACs", "2.00 M MACs"} <= set(words)
    below = [f"{b['op'][4]}×{b['op'][4]}\n{b['out']}\n–\n{b['hidden']}" for b in chosen]
    stem, head = "3×3\n16\n\n", "1×1\n256\n\n"
    assert [word for word in words if "×" in word] == [stem, *below[:3], head, stem, *below[3:], head]


def test_an_expansion_is_an_option_of_the_table():
    """The options that are shown give the network; of those that rounding makes alike it is the least."""
    rng = random.Random(0)
    for space in (*SPACES["small"], *SPACES["paper"]):
        choices = [(rng.randrange(8), rng.randrange(len(b.expansions)), rng.randrange(len(b.widths)))
                   for b in space.blocks]
        arch = space.arch(choices, 1, 10)
        shown = [b.expansions.index(float(e)) for b, e in zip(space.blocks, pictures.expansions(arch))]
        assert space.arch([(op, n, out) for (op, _, out), n in zip(choices, shown)], 1, 10) == arch
        assert all(n <= chosen for (_, chosen, _), n in zip(choices, shown))
    # By hand: of 16 channels 0.75 and 1.25 make 16 and 24, of 8 both make 8; of 32 none makes 40.
    first = SPACES["small"][0].arch([(0, 0, 0), (0, 1, 0), (0, 1, 0), (0, 0, 0), (0, 3, 0)], 1, 10)
    assert pictures.expansions(first) == ["1", "0.75", "1.25", "0.75", "3"]
    *blocks, last = first.blocks
    assert pictures.expansions(first._replace(blocks=(*blocks, last._replace(hidden=40)))) == ["–"] * 5
    assert pictures.expansions(first._replace(space="another")) == ["–"] * 5


def test_the_operations_are_those_of_table_2():
    for op, (_, se, activation) in CANDIDATES.items():
        words = pictures.FILLS[op[5:]][1]
        assert ("SE" in words) == se
        assert ("hswish" in words) == (activation == "hswish") != ("ReLU" in words)


def test_operations_differ_in_grey():
    colours = [to_rgb(colour) for colour, _ in pictures.FILLS.values()]
    greys = sorted(0.299 * r + 0.587 * g + 0.114 * b for r, g, b in colours)
    assert min(b - a for a, b in itertools.pairwise(greys)) > 0.1


def test_entropy():
    assert pictures.entropy(uniform(8)) == pytest.approx(1)
    assert pictures.entropy([0, 0, 1, 0]) == 0
    assert pictures.entropy([0.5, 0.5, 0, 0, 0, 0, 0, 0]) == pytest.approx(1 / 3)
    assert pictures.entropy([0.25, 0.75]) == pytest.approx(-(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75)))


def test_alphas_are_the_log(unsaved, tmp_path):
    run, sure = make(tmp_path / "run"), [1.0] + 7 * [0.0]
    for n in range(2):
        facts = FACTS | {"stage": n, "blocks": NETWORKS[0][:2]}
        (run / f"A{n}.json").write_text(json.dumps(facts))
    start = [{"op": uniform(8), "width": uniform(2)},
             {"op": uniform(8), "expansion": uniform(4), "width": uniform(3)}]
    end = [{"op": sure, "width": [1.0, 0.0]},
           {"op": uniform(8), "expansion": [0.5, 0.5, 0.0, 0.0], "width": uniform(3)}]
    log(run, {"stage": 0, "step": 5, "alphas": [[3, start], [5, start]]}, {"stage": 0, "step": 7},
        {"stage": 0, "step": 10, "steps": 10, "alphas": [[10, end], [10, end]]},
        {"stage": 1, "step": 4, "steps": 4, "alphas": [[4, end]]})
    assert results.history(run) == {0: [(3, start), (5, start), (10, end)], 1: [(4, end)]}
    *maps, op, expansion, width, _ = pictures.alphas(run, tmp_path / "alphas.png").axes
    assert [axis.get_images()[0].get_array().tolist() for axis in maps] == [[sure, uniform(8)]] * 2
    falls, later = [[3, 1], [5, 1], [10, 0.5]], [[14, 0.5]]         # A1 begins where A0 ends
    for axis, name in ((op, "operation"), (expansion, "expansion"), (width, "width")):
        assert [line.get_xydata().tolist() for line in axis.lines] == [
            [pytest.approx(point) for point in points] for points in (falls, later)]
        assert axis.get_title() == name


def test_alphas_of_a_block_stay_in_its_row_and_derived_choices_are_marked(unsaved, tmp_path):
    run, sure, half = make(tmp_path / "run"), [1.0] + 7 * [0.0], 2 * [0.5] + 6 * [0.0]
    small, large = SPACES["small"][:2]
    for n, space in enumerate((small, large)):
        at, width, chosen = iter(itertools.cycle(CANDIDATES)), space.stem, []
        for b in space.blocks:
            chosen.append({"op": next(at), "hidden": b.hidden(width, 0), "out": b.widths[0],
                           "stride": b.stride, "residual": b.residual, "expand": b.expand})
            width = b.widths[0]
        (run / f"A{n}.json").write_text(json.dumps(FACTS | {"stage": n, "blocks": chosen}))
    rows = [(b.row, b.place) for b in large.blocks]
    kept = [rows.index((b.row, b.place)) for b in small.blocks]
    new, = set(range(6)) - set(kept)
    grown = [half if n == new else sure for n in range(6)]
    log(run, *({"stage": n, "step": 9, "alphas": [[9, [{"op": p} for p in ps]]]}
               for n, ps in enumerate(([uniform(8)] * 5, grown))))
    first, second, below, *_ = pictures.alphas(run, tmp_path / "alphas.png").axes
    values = first.get_images()[0].get_array()
    assert values[kept].tolist() == [uniform(8)] * 5 and np.isnan(np.ma.filled(values[new], np.nan)).all()
    assert second.get_images()[0].get_array().tolist() == grown
    assert [t.get_text() for t in first.get_yticklabels()] == [f"{r + 2}.{p + 1}" for r, p in rows]
    rings = [axis.lines[0].get_xydata().tolist() for axis in (first, second)]
    assert rings == [[[n, row] for n, row in enumerate(kept)], [[n, n] for n in range(6)]]
    assert len(first.lines) == 1 and second.lines[1].get_xydata().tolist() == [[-0.5, new]]
    # A block is averaged with those of its age, so that no mean moves because the set of blocks does.
    assert [(line.get_label(), line.get_xydata().tolist()) for line in below.lines] == [
        ("A0", [[9, pytest.approx(1)]]), ("A0", [[18, 0]]), ("A1", [[18, pytest.approx(1 / 3)]])]


def searched(folder, stages, steps):
    """A run's folder with some stages of the small space, random probabilities at steps 1, 2, .. and random
    networks. Returns the folder and the rows of its log.
    """
    run, rng, rows = make(folder, accuracies=(0.5, 0.6)[:stages]), random.Random(0), []
    for space in SPACES["small"][:stages]:
        options = [(rng.randrange(8), rng.randrange(len(b.expansions)), rng.randrange(len(b.widths)))
                   for b in space.blocks]
        (run / f"A{space.stage}.json").write_text(space.arch(options, 1, 10).to_json())
        sizes = [{"op": 8, "expansion": len(b.expansions), "width": len(b.widths)} for b in space.blocks]
        alphas = [[step, [{name: np.random.default_rng([step, n]).dirichlet(n * [1]).tolist()
                           for name, n in block.items() if n > 1} for block in sizes]]
                  for step in range(1, steps + 1)]
        rows.append({"stage": space.stage, "step": steps, "alphas": alphas})
    log(run, *rows)
    return run, rows


def test_the_film_shows_the_likeliest_network_of_the_moment_and_then_the_derived_one(tmp_path, monkeypatch):
    run, rows = searched(tmp_path / "run", stages=2, steps=2)
    frames = []

    class Writer(pictures.PillowWriter):
        def grab_frame(self):
            boxes, heat, curve = self.fig.axes
            points = [p for line in curve.lines if line.get_alpha() != 0 for p in line.get_xydata().tolist()]
            frames.append(([t.get_text() for t in boxes.texts], heat.get_images()[0].get_array(), points,
                           curve.get_xlim() + curve.get_ylim()))

        def finish(self):
            self.outfile.write_bytes(b"GIF")
    monkeypatch.setattr(pictures, "PillowWriter", Writer)
    pictures.search(run, tmp_path / "search.gif")
    assert (tmp_path / "search.gif").read_bytes() == b"GIF"
    words = [f"A{n} {step}" for n in range(2) for step in [f"step {s}/2" for s in (1, 2, 2)]
             + 6 * [f"{n + 1}.00 M MACs"]]
    assert [" ".join(texts[:2]) for texts, *_ in frames] == words
    assert [len(points) for *_, points, _ in frames] == 3 * [0] + 9 * [1] + 6 * [2]
    assert frames[-1][2] == [[1, 50], [2, 60]] and len({limits for *_, limits in frames}) == 1
    for first, space, row in zip((0, 9), SPACES["small"], rows):
        for frame, (_, blocks) in zip(frames[first:], row["alphas"]):
            widths = [b.widths[p.index(max(p))] for b, p in zip(space.blocks, (b["width"] for b in blocks))]
            kernels = [list(CANDIDATES)[p.index(max(p))][4] for p in (b["op"] for b in blocks)]
            drawn = [text.split("\n")[:2] for text in frame[0] if "×" in text][1:-1]
            assert drawn == [[f"{k}×{k}", str(width)] for k, width in zip(kernels, widths)]
            heat = frame[1].compressed() if np.ma.isMaskedArray(frame[1]) else frame[1].ravel()
            assert heat[~np.isnan(heat)].tolist() == [q for block in blocks for q in block["op"]]
        arch = results.archs(run)[f"A{space.stage}"]
        drawn = [text.split("\n") for text in frames[first + 3][0] if "×" in text][1:-1]
        assert [(out, hidden) for _, out, _, hidden in drawn] == [(str(b.out), str(b.hidden))
                                                                  for b in arch.blocks]


def test_the_film_is_a_gif_that_repeats(tmp_path, monkeypatch):
    run, _ = searched(tmp_path / "run", stages=1, steps=2)
    moments = pictures.moments                                      # the first, and the second twice
    monkeypatch.setattr(pictures, "moments", lambda *args: itertools.islice(moments(*args), 3))
    pictures.search(run, tmp_path / "search.gif")
    with Image.open(tmp_path / "search.gif") as film:
        assert film.format == "GIF" and film.info["loop"] == 0 and film.size[0] == 720
        assert [film.seek(n) or film.info["duration"] for n in range(film.n_frames)] == [80, 160]


def test_the_logs_digits_need_not_add_up_to_one(tmp_path):
    run, p = make(tmp_path / "run"), [*28 * [0.033349], 0.066228]           # as many as the paper's widths
    assert sum(p) == pytest.approx(1) and len(SPACES["paper"][4].blocks[-1].widths) == len(p)
    log(run, {"stage": 0, "step": 5, "alphas": [
        [5, [{"op": uniform(8), "width": [round(q, 4) for q in p]}]]]})     # 0.9986
    assert list(results.history(run)) == [0]


def test_everything_can_be_read_in_print(tmp_path):
    run = make(tmp_path / "run")
    log(run, {"stage": 0, "step": 5, "alphas": [[5, [{"op": uniform(8)}] * 3]]})
    for draw, what in ((plot.curve, [run]), (pictures.architectures, run), (pictures.alphas, run)):
        figure = draw(what, tmp_path / "picture.png")
        assert figure.get_figwidth() <= 7.2
        assert all(text.get_fontsize() >= 8 for text in figure.findobj(Text) if text.get_text())
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_command_line(monkeypatch, tmp_path, capsys):
    for module, name in ((plot, "curve"), (pictures, "architectures"), (pictures, "search")):
        monkeypatch.setattr(module, name, lambda what, path: path.touch())
    runs = [make(tmp_path / "a"), make(tmp_path / "b", 1)]
    log(runs[0], {"stage": 0, "step": 5, "alphas": [[5, [{"op": uniform(8)}] * 3]]})
    plot.main([str(run) for run in runs])
    lines = [f"{name}: {runs[0] / name}.png\n" for name in ("curve", "architectures", "alphas")]
    assert capsys.readouterr() == ("".join(lines), "") and not (runs[0] / "search.gif").exists()
    plot.main([str(runs[0]), "--animate"])
    assert capsys.readouterr() == ("".join([*lines, f"search: {runs[0] / 'search.gif'}\n"]), "")
    plot.main([str(runs[1]), "--out", str(tmp_path / "new" / "folder")])
    out, err = capsys.readouterr()
    left = sorted(file.name for file in (tmp_path / "new" / "folder").iterdir())
    assert left == ["architectures.png", "curve.png"]
    assert len(out.splitlines()) == 2
    assert err.startswith('plot.py: no alphas.png: no "alphas" in ') and err.count("\n") == 1


def test_a_log_of_other_networks_is_refused(tmp_path):
    log(make(tmp_path / "run"), {"stage": 0, "step": 5, "alphas": [[5, [{"op": uniform(8)}]]]})
    with pytest.raises(ValueError, match="log.jsonl .*1 blocks of A0, which has 3"):
        pictures.alphas(tmp_path / "run", tmp_path / "alphas.png")


def test_a_stage_that_has_not_ended_is_drawn_without_choices(unsaved, tmp_path):
    run, blocks = make(tmp_path / "run"), [{"op": uniform(8)}] * len(SPACES["small"][1].blocks)
    log(run, {"stage": 1, "step": 5, "alphas": [[5, blocks]]})
    (run / "A1.json").unlink()
    axis, *_ = pictures.alphas(run, tmp_path / "alphas.png").axes
    assert axis.get_images()[0].get_array().shape == (6, 8) and not axis.lines


def test_a_log_without_alphas_is_refused(tmp_path):
    log(make(tmp_path / "run"), {"stage": 0, "step": 5, "steps": 5, "loss": 1.0})
    with pytest.raises(ValueError, match='no "alphas" in'):
        pictures.alphas(tmp_path / "run", tmp_path / "alphas.png")
    assert not (tmp_path / "alphas.png").exists()


def test_the_table_adds_up():
    costs = {"flops": 1e6, "params": 1e5, "seconds": 1.5, "kwh": 0.25, "co2e_lb": 0.5}
    rows = [{"stage": n, "accuracy": a} | costs for n, a in enumerate((0.5, None))]
    text = results.table(rows).splitlines()
    assert len(text) == 4
    assert text[1].split()[:4] == ["A0", "1.00", "0.100", "50.0"] and text[2].split()[3] == "-"
    assert text[3].split() == ["all", "3.0", "0.50000", "1.00000"]
