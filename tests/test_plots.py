"""Plots: they show what was measured; no name is lost, covered or cut; all can be told apart."""

import base64
import random
import re
from itertools import combinations, product
from pathlib import Path

import fabricate
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from scipy.optimize import isotonic_regression

from harness.record import Memory, Phase
from harness.report import Report, render
from harness.report.blocks import Plot, Title
from harness.report.comparison import GIB, Comparison, comparisons
from harness.report.page import write_html
from harness.report.plots import figures
from harness.report.plots.cost import cost_alone, scores_by_cost
from harness.report.plots.curves import loss_curves
from harness.report.plots.labels import apart, overlap
from harness.report.plots.memory import memory_by_part, parts
from harness.report.plots.style import COLOURS, FAINT, MARKERS, looks
from harness.report.reaching import SHARE, Goal, cost_to_reach, goal_of, reached
from harness.report.verdicts import Verdicts
from harness.store import Store

METHODS = sorted(p.stem for p in (Path(__file__).parents[1] / "methods").glob("*.py"))
METHODS = [name for name in METHODS if name not in ("__init__", "base", "base_nf4", "peft")]
REFERENCE = Path(__file__).parents[1] / "results/reference/english-17m"
LONG = "A plugin with a title that says everything about how it was made, by whom and what for"

# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB
SIGHT = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def crowd(names: list[str], seeds: int = 3) -> list:
    """Records of so many methods, of which every fifth failed and one has a very long title."""
    found = [fabricate.record("base")]
    found[0].scores = {"bleu4": 10.0, "rouge_l": 0.2, "perplexity": 9.0}
    for i, (name, seed) in enumerate(product(names, range(seeds))):
        luck = random.Random(name)
        record = fabricate.record(name, seed)
        record.card["title"] = LONG if name in names[1:2] else name
        record.phases["train"].seconds *= luck.uniform(0.4, 1.6)
        for gauge in ("peak_allocated", "peak_device"):
            setattr(record.phases["train"], gauge, int(luck.uniform(4.5, 9) * GIB))
        base = luck.uniform(0, 1)
        for point in record.training + record.validation:
            point["loss"] += base
        record.scores = {"bleu4": 20 + 20 * base + random.Random(i).gauss(0, 1),
                         "rouge_l": 0.3 + 0.2 * base + random.Random(i).gauss(0, 0.01),
                         "perplexity": 8 - 3 * base + random.Random(i).gauss(0, 0.1)}  # fmt: skip
        if names.index(name) % 5 == 4:
            record.status, record.scores = ("oom_gpu", "failed")[names.index(name) % 2], {}
            record.error = "it broke"
        found.append(record)
    return found


@pytest.fixture(scope="module")
def many() -> Comparison:
    return comparisons(crowd([*METHODS[:22], "peft.vera", "peft.oft", "mine"]))[0]


@pytest.fixture(scope="module")
def scattered(many):
    return scores_by_cost(many, Verdicts(many)).figure


# Looks


def lab(colour: str, matrix) -> np.ndarray:
    """CIELAB of a colour as somebody sees it; by the formulas of sRGB and of CIE 1976."""
    value = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(matrix) @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
              [0.0193339, 0.1191920, 0.9503041]]  # fmt: skip
    xyz = to_xyz @ seen / [0.95047, 1, 1.08883]
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
def test_colours_of_one_marker_differ_to_everybody(sight):
    seen = {colour: lab(colour, SIGHT[sight]) for colour in COLOURS}
    least = min(np.linalg.norm(seen[a] - seen[b]) for a, b in combinations(COLOURS, 2))
    assert least > 15  # 2.3 can just be told apart


def of_names(*names: str) -> dict:
    return looks(comparisons([fabricate.record(name) for name in names])[0])


def test_a_name_has_its_look_whoever_else_is_there():
    alone = {name: of_names(name)[name] for name in METHODS}
    assert len({tuple(look.values()) for look in alone.values()}) == len(METHODS)
    assert of_names(*METHODS) == of_names(*reversed(METHODS)) == alone
    every = of_names(*METHODS, *(f"peft.variant{i}" for i in range(100)))
    assert len({tuple(look.values()) for look in every.values()}) == len(COLOURS) * len(MARKERS)


def test_two_names_of_one_look_are_told_apart_in_their_comparison():
    taken = of_names("lora")["lora"]
    twin = next(name for i in range(2000) if of_names(name := f"plugin{i}")[name] == taken)
    both = of_names("lora", twin)
    assert both["lora"] == taken != both[twin] and both == of_names(twin, "lora")


# Scatter


def named(ax) -> dict:
    return {text.get_text(): text for text in ax.texts}


def text_boxes(figure, ax) -> np.ndarray:
    """Of all words in a panel, without their hairlines."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in ax.texts:
        text.update_positions(renderer)
    return np.array([Text.get_window_extent(text, renderer).extents for text in ax.texts if text.get_text()])


def test_of_25_techniques_every_name_is_there_once_whole_and_uncovered(many, scattered):
    done = {t.label for t in many.trained if t.done}
    for ax in scattered.axes:
        names = [text.get_text() for text in ax.texts]
        assert sum("…" in name for name in names) == 1 and done - {LONG} <= set(names)
        found = text_boxes(scattered, ax)
        pairs = [overlap(a, b) for a, b in combinations(found, 2)]
        assert max(pairs) < 20, f"{max(pairs)} square pixels of names are covered"
        width, height = scattered.canvas.get_width_height()
        assert (found[:, :2] >= 0).all() and (found[:, 2] <= width).all() and (found[:, 3] <= height).all()
    [legend] = scattered.legends
    said = {text.get_text() for text in legend.get_texts()}
    lost = {t.label: t.status for t in many.trained if not t.done}
    assert said == {f"{name}: {status}" for name, status in lost.items()} and len(lost) == 5
    assert {"failed", "out of GPU memory"} == set(lost.values())


def test_bars_are_standard_deviations_over_seeds_in_both_directions(many, scattered):
    ax = scattered.axes[0]
    place = {label: (x, y, bars) for x, y, label, bars in ax.to_label}
    technique = next(t for t in many.trained if t.label == "lora")
    x, y, ((left, right), (low, high)) = place["lora"]
    memory = [record.peak("peak_allocated") / GIB for record in technique.done]
    bleu = [record.scores["bleu4"] for record in technique.done]
    assert np.allclose([x, y], [np.mean(memory), np.mean(bleu)])
    assert np.allclose([right[0] - x, x - left[0]], np.std(memory, ddof=1))
    assert np.allclose([high[1] - y, y - low[1]], np.std(bleu, ddof=1))


def test_where_a_front_means_nothing_there_is_none(many):
    one = comparisons(crowd(["lora"]))[0]
    figures = [scores_by_cost(one, Verdicts(one)).figure, cost_alone(many).figure]
    assert not [line for f in figures for ax in f.axes for line in ax.lines if len(line.get_xdata()) == 3]


def test_a_caption_says_what_is_drawn_alone(many):
    [real] = Report.of(Store(REFERENCE)).judged
    alone = comparisons(crowd(["lora", "dora"], seeds=1))[0]
    seen = []
    for comparison, verdicts in (real, (many, Verdicts(many)), (alone, Verdicts(alone))):
        plots = {block.name: block for block in figures(comparison, verdicts, "") if isinstance(block, Plot)}
        scores, memory, loss = (plots[name] for name in ("scores", "memory", "loss-sft"))
        panels, bars, curves = (plot.images.figure.axes for plot in (scores, memory, loss))
        paths = [path.vertices for ax in panels for path in ax.collections[0].get_paths()]
        drawn = {
            "grey steps": any(line.get_color() == FAINT for ax in panels for line in ax.lines),
            "bars ±": any(np.ptp(path, axis=0).any() for path in paths),
            "brackets": any("(" in text.get_text() for text in bars[0].texts),
            "thin lines": any(line.get_alpha() for ax in curves for line in ax.lines),
        }
        said = scores.caption + memory.caption + loss.caption
        assert {words: words in said for words in drawn} == drawn
        seen.append(tuple(drawn.values()))
    assert all(set(drawn) == {True, False} for drawn in list(zip(*seen, strict=True))[:3])


def test_where_better_is_stands_above_each_panel(scattered):
    arrows = [next(arrow for arrow in "↖↙" if f"{arrow} better" in named(ax)) for ax in scattered.axes]
    assert arrows == ["↖"] * 4 + ["↙"] * 2


def test_a_figure_is_drawn_only_as_it_is_asked_for(tmp_path):
    store = Store(fabricate.results(tmp_path / "r", methods=("qlora",), seeds=(0,), bases=("base",)))
    render(store, tmp_path / "out", formats=("md",), now="noon")
    files = {path.name for path in (tmp_path / "out" / "plots").iterdir()}
    assert files == {"scores.png", "memory.png", "loss-sft.png"}
    assert (tmp_path / "out" / "plots" / "memory.png").read_bytes().startswith(b"\x89PNG")


# Lines


def test_places_are_moved_as_little_as_may_be():
    rng = np.random.default_rng(0)
    for count in (1, 2, 7, 25):
        places = np.sort(rng.uniform(0, 100, count))
        found = np.array(apart(places.tolist(), 3, -1e9, 1e9))
        gaps = 3 * np.arange(count)
        assert np.allclose(found, isotonic_regression(places - gaps).x + gaps)  # another's least squares
        inside = np.array(apart(places.tolist(), 3, 10, 90))
        assert inside.min() >= 10 - 1e-9 and inside.max() <= 90 + 1e-9 and (np.diff(inside) >= 3 - 1e-9).all()


def test_every_line_is_named_at_its_end_in_order(many):
    figure = loss_curves(many, "sft").figure
    left, right = figure.axes
    done = [t for t in many.trained if t.done]
    found = text_boxes(figure, right)
    assert max(overlap(a, b) for a, b in combinations(found, 2)) < 4
    assert found[:, 2].max() <= figure.canvas.get_width_height()[0] and not left.texts
    heights = {text.get_text(): text.xyann[1] for text, _ in right.ends}
    ends = {t.label: np.mean([r.validation[-1]["loss"] for r in t.done]) for t in done if t.label != LONG}
    assert len(heights) == len(done)
    assert sorted(ends, key=ends.get) == sorted(ends, key=heights.get)
    alone = loss_curves(comparisons(crowd(["lora"]))[0], "sft").figure.axes[1]
    [(text, _)] = alone.ends
    at_end = alone.transAxes.inverted().transform(alone.transData.transform(text.xy))
    assert np.isclose(at_end[1], text.xyann[1])


# Memory


def test_the_parts_of_memory_are_the_whole(many):
    record = fabricate.record("lora")
    train = record.phases["train"]
    found = parts(record)
    assert sum(found.values()) == train.peak_device
    assert sum(found.values()) - found["allocator, context"] == train.peak_allocated
    assert found["weights"] == 2 * GIB and found["optimizer state"] == GIB // 20
    record.phases["attach"] = Phase(3.0, 30 * GIB, 31 * GIB, 32 * GIB)  # before there are moments
    assert parts(record)["gradients, activations"] == 28 * GIB and not parts(record)["optimizer state"]
    record.memory = Memory(weights=5, gradients=7, moments=11, activations=13)
    assert sum(parts(record).values()) == record.memory.peak
    record.memory, record.sizes.weight_bytes = None, 40 * GIB  # more than the whole: not known
    assert parts(record) == {}


def test_bars_are_sorted_and_end_where_the_memory_does(many):
    figure = memory_by_part(many).figure
    bars = figure.axes[0].patches
    ends = {}
    for bar in bars:
        ends[round(bar.get_y() + bar.get_height() / 2)] = bar.get_x() + bar.get_width()
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    of = {t.label: t for t in many.trained}
    done = [name for name in names if name in of and of[name].done]
    least = [of[name].mean(many.peak_memory) for name in done]
    assert least == sorted(least) and len(names) == 25
    for name in done:
        whole = np.mean([r.peak("peak_device") for r in of[name].done]) / GIB
        assert np.isclose(ends[names.index(name)], max(whole, of[name].mean(many.peak_memory)))
    lost = [name for name in names if name in of and not of[name].done]
    assert names[-len(lost) :] == lost
    said = named(figure.axes[0])
    assert "failed" in said and "out of GPU memory" in said


# Reaching


def run(losses: dict[int, float | None], seed: int = 0, method: str = "lora"):
    """A training of 100 steps, the first half of which takes a second each, the second three."""
    record = fabricate.record(method, seed)
    record.card["title"] = method
    record.validation = [{"step": step, "loss": loss} for step, loss in losses.items()]
    record.step_seconds = [1.0] * 50 + [3.0] * 50
    record.phases["attach"] = Phase(10.0, joules=100.0)
    record.phases["train"] = Phase(400.0, joules=8000.0)  # twice what the steps alone took
    record.tokens.trained, record.tokens.attach = 2000, 30
    return record


def test_what_a_loss_cost_by_hand():
    record = run({0: 4.0, 50: 3.0, 100: 2.0})
    spent = reached(record, 2.5)  # half way from step 50 to 100, where 125 of the 200 seconds are spent
    assert (spent.step, spent.seconds, spent.joules, spent.tokens) == (75, 10 + 250, 100 + 5000, 30 + 1500)
    assert reached(record, 4.5).seconds == 10 and reached(record, 4.5).step == 0
    assert reached(record, 2.0).seconds == 410 and reached(record, 1.99) is None
    assert reached(run({0: 4.0, 50: None, 100: 2.0}), 2.5).step == 100  # no line from what is unknown
    record.phases["train"].joules = None
    record.tokens.trained = None
    assert (reached(record, 2.5).joules, reached(record, 2.5).tokens) == (None, None)
    assert reached(run({}), 2.0) is None


def test_the_goal_is_of_all_and_who_never_reaches_it_is_last():
    records = [run({0: 4.0, 100: 2.0}, seed, "best") for seed in (0, 1)]
    records += [run({0: 4.0, 50: 2.0, 100: 2.2}, seed, "quick") for seed in (0, 1)]
    records += [run({0: 4.2, 100: 3.0 if seed else 2.0}, seed, "half") for seed in (0, 1)]
    records += [run({0: 4.0, 100: 3.0}, seed, "never") for seed in (0, 1)]
    [comparison] = comparisons(records)
    goal = goal_of(comparison.trained)
    assert goal == Goal(4.0, 2.0) and np.isclose(goal.loss, 4 - 2 * SHARE)
    table = cost_to_reach(comparison, comparison.trained, goal)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == ["quick", "best", "half", "never"]
    assert [row["Seeds that reach it"] for row in rows.values()] == ["2 of 2", "2 of 2", "1 of 2", "never"]
    assert rows["never"]["Optimizer steps"] == "–" and rows["never"]["At the end (% of the way)"] == "50.0"
    assert rows["quick"]["Optimizer steps"] == "48 ± 0" and rows["best"]["Optimizer steps"] == "95 ± 0"
    assert rows["quick"]["Training time (min)"] == "1.75 ± 0.00"  # 10 s, and 47.5 of 200 s of 400


def test_no_goal_where_no_loss_falls_or_it_is_not_what_is_learned():
    assert goal_of(comparisons([run({0: 2.0, 100: 2.5})])[0].trained) is None
    assert goal_of(comparisons([run({})])[0].trained) is None
    other = run({0: 4.0, 100: 2.0})
    other.card["objective"] = "grpo"
    assert goal_of(comparisons([other])[0].trained) is None


def test_on_a_phone_panels_stand_below_each_other(tmp_path):
    """The browser takes the narrow picture where the page is narrow."""
    fabricate.results(tmp_path, seeds=(0,))
    store = Store(tmp_path)
    [comparison] = comparisons(store.load()[0])
    for images in (loss_curves(comparison, "sft"), memory_by_part(comparison)):
        images |= images.made(["svg", "narrow"])
        sizes = [re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', images[kind]) for kind in ("svg", "narrow")]
        (wide, low), (narrow, tall) = [map(float, size.groups()) for size in sizes]
        assert narrow < 0.5 * wide and tall > 1.5 * low
    html = write_html([Title("t"), Plot("memory", "caption", images)], "noon", None)
    source, image = (base64.b64encode(images[kind]).decode() for kind in ("narrow", "svg"))
    assert f'(max-width: 40rem)" srcset="data:image/svg+xml;base64,{source}"' in html
    assert f'<img src="data:image/svg+xml;base64,{image}"' in html
