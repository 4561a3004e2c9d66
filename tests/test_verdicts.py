"""No two places of a report disagree: random records are rendered, and what is read there is compared."""

import re
import sys
from itertools import combinations, permutations, product
from pathlib import Path

import fabricate
import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from harness.metrics import compared, row_sums, scores, total
from harness.report import write_markdown
from harness.report.comparison import comparisons, read_outputs
from harness.report.document import section
from harness.report.plots.cost import scores_by_cost
from harness.report.stats import Sample
from harness.report.verdicts import TIME, Entrant, Quantity, Standing, Verdicts
from harness.store import OUTPUTS, Tested

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import verdicts as simulation

SCORE = Quantity("rouge_l", "ROUGE-L")


def test_the_sets_that_cannot_be_told_apart_are_the_graphs_largest_cliques():
    """Also of fifty that are all tied: in no time, as each subset of them is tied too."""
    networkx, rng = pytest.importorskip("networkx"), np.random.default_rng(0)
    for spread, count in ((0.0, 50), (1.0, 30), (5.0, 30)):
        rows = rng.normal(0, 1, (count, 3, 60)) + spread * rng.random((count, 1, 1))
        sums = [[np.stack([seed, np.ones(60)], 1) for seed in seeds] for seeds in rows]
        samples = [Sample.of_rows(seeds, lambda of: of[..., 0] / of[..., 1]) for seeds in sums]
        found = Standing(SCORE, [Entrant(f"{i:02}", s, ("",)) for i, s in enumerate(samples)], draws=500)
        ties = networkx.Graph([(a, b) for a, b in found.pairs if found.verdict(a, b).word == "tied"])
        ties.add_nodes_from(found.ranked(""))
        both = {pair for a, b in found.pairs for pair in ((a, b), (b, a))}
        assert found.won == {pair for pair in both if found.verdict(*pair).word == "higher"}
        expected = sorted(map(sorted, networkx.find_cliques(ties)))
        assert sorted(map(sorted, found.alike(""))) == expected and (len(expected) > 1) == (spread > 0)


class Shelf(dict):
    """A store of test outputs in memory: (method, seed) -> outputs. Nobody has graded them."""

    folder = Path("nowhere")

    def outputs(self, record, chosen):
        return [self[record.spec.method, record.spec.seed][row] for row in chosen]

    def text(self, name, file):
        raise FileNotFoundError(file)

    def tested(self, record, file=OUTPUTS):
        if file != OUTPUTS:
            return None
        outputs = self[record.spec.method, record.spec.seed]
        return Tested.of(outputs, row_sums(outputs, record.spec.dataset))


def outputs(skill: float, lengths: np.ndarray, rng) -> list[dict]:
    """As a model of this skill, in logits, answers rows of these lengths."""
    sums = simulation.run(np.full(len(lengths), skill), lengths, rng)
    texts = {"part": "alpaca", "prompt": "?", "reference": "a", "output": "b", "stopped": True, "correct": 1}
    nll = lengths * np.exp(rng.normal(0.5 - skill / 4, 0.2, len(lengths)))
    return [
        {**texts, "id": str(i), "tokens": int(length), "nll": float(nll[i]),
         "sums": {"reward": [0, 1], **{metric: found[i].tolist() for metric, found in sums.items()}}}
        for i, length in enumerate(lengths)
    ]  # fmt: skip


def random_bench(rng):
    """-> its one comparison, and the store: techniques that tie and that do not, in score and in cost, some
    of another objective, with too few seeds, with a seed that diverged, or disturbed."""
    shelf, records = Shelf(), []
    lengths = rng.integers(8, 21, 30)
    on_gpu = rng.random() < 0.8
    for i in range(int(rng.integers(1, 8)) + 1):
        name = f"m{i}" if i else "base"
        skill, gib, seconds = (
            rng.choice([-1, 0, 0, 0.2, 0.6]),
            rng.choice([2, 4, 4, 8]),
            rng.choice([60, 80, 300]),
        )
        objective = "sft" if rng.random() < 0.8 else "preference"
        for seed in range(int(rng.choice([1, 2, 3, 3, 3, 3, 5])) if i else 1):
            record = fabricate.record(name, seed)
            if i:
                record.card |= {"title": name.upper(), "objective": objective}
                record.phases["train"].seconds = float(seconds * rng.lognormal(0, 0.05))
                record.disturbed = ["busy"] if rng.random() < 0.05 else []
                record.status = "diverged" if rng.random() < 0.02 else "ok"
            for phase in record.phases.values():
                phase.peak_allocated = int(gib * 2**30 * rng.lognormal(0, 0.01)) if on_gpu else None
            if record.ok:
                shelf[name, seed] = outputs(skill + rng.normal(0, 0.1), lengths, rng)
                record.scores = scores(total(shelf[name, seed], record.spec.dataset))
            records.append(record)
    return comparisons(records)[0], shelf


def read(text: str) -> dict[str, list[list[str]]]:
    """The tables of a Markdown text, by their first heading; those of the same one joined."""
    found, rows = {}, None
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else None
        if cells is None:
            rows = None
        elif rows is None:
            rows = found.setdefault(cells[0], [])
            rows.append(cells)
        elif not set(line) <= set("|-: "):
            rows.append(cells)
    return found


def numbers(cell: str) -> list[float]:
    return [float(n.replace("−", "-").replace(",", "")) for n in re.findall(r"[+−]?\d[\d,]*(?:\.\d+)?", cell)]


def names(text: str) -> set[str]:
    return set(re.findall(r"\bM\d\b", text))


class Read:
    """What a rendered report says."""

    def __init__(self, text: str):
        text = text.replace("\\", "")
        self.lead, tables = text.split("## What was found")[1].split("\n## ")[0], read(text)
        self.words = {}  # (quantity, a, b) -> higher, lower or tied
        self.intervals = {}
        for columns, *rows in tables.values():
            for cells in rows if columns[2:3] == ["Verdict"] else ():
                a, b = cells[0].split(" − ")
                for quantity, interval, word in zip(columns[1::2], cells[1::2], cells[2::2], strict=True):
                    self.intervals[quantity, a, b] = numbers(interval)
                    self.words[quantity, a, b] = word
                    self.words[quantity, b, a] = {"higher": "lower", "lower": "higher"}.get(word, word)
        self.ranks = {}  # (quantity, label) -> first, last, of, letters
        ranked = text.split("## Ranks")[1].split("##")[0] if "## Ranks" in text else ""
        for line in ranked.split("\n\n"):
            for columns, *rows in read(line).values():
                for cells in rows:
                    for column, cell in zip(columns[1:], cells[1:], strict=True):
                        if m := re.fullmatch(r"(\d+)(?: to (\d+))? of (\d+), (\w+)", cell):
                            quantity = column.removeprefix("Rank in ")
                            quantity = quantity if "-" in quantity else quantity.capitalize()
                            first, last, of = int(m[1]), int(m[2] or m[1]), int(m[3])
                            self.ranks[quantity, cells[0]] = first, last, of, set(m[4])
        fronts = r"- (BLEU-4|ROUGE-L|Perplexity) against (.*?)( of the \w+ techniques)?: (.*)\."
        self.fronts = {(gain, cost, among): on for gain, cost, among, on in re.findall(fronts, text)}


def better(quantity: str) -> str:
    return "higher" if "-" in quantity else "lower"


def agree(said: Read, groups: dict[str, list[str]]) -> int:
    """Every place against the words of the tables; -> how many comparisons were made."""
    checked = 0
    for key, word in said.words.items():
        if key in said.intervals and word in ("higher", "lower", "tied"):
            value, low, high = said.intervals[key]
            assert low <= value <= high
            assert word == ("higher" if low > 0 else "lower" if high < 0 else "tied"), key
            checked += 1
    for quantity in {quantity for quantity, _ in said.ranks}:
        for group in groups.values():
            members = [label for label in group if (quantity, label) in said.ranks]
            for a, b in combinations(members, 2):
                word = said.words.get((quantity, a, b))
                if word:
                    assert (word == "tied") == bool(said.ranks[quantity, a][3] & said.ranks[quantity, b][3])
                    checked += 1
            for a in members:
                others = [said.words.get((quantity, a, b)) for b in members if b != a]
                if None not in others:
                    won = others.count(better(quantity))
                    lost = len(others) - won - others.count("tied")
                    assert said.ranks[quantity, a][:3] == (1 + lost, len(members) - won, len(members))
    return checked + agree_lead(said, groups) + agree_fronts(said, groups)


def agree_lead(said: Read, groups: dict[str, list[str]]) -> int:
    def tied_with(quantity, label):
        """By their letters, as the tables of differences hold no more than some pairs of many techniques."""
        letters = said.ranks[quantity, label][3]
        others = [b for b in group_of[label] if b != label and (quantity, b) in said.ranks]
        return {b for b in others if letters & said.ranks[quantity, b][3]}

    group_of = {label: group for group in groups.values() for label in group}
    checked = 0
    highest = (
        r"(M\d) has the (highest|lowest) (BLEU-4|ROUGE-L|perplexity), [\d.]+"
        r"(, but is tied with [^.;]+)?"
        r"(?:[;,] (?:it is )?([\d.]+)%? (?:ahead of|below) (M\d) \(95% CI ([\d.]+)%? to ([\d.]+)%?\))?\."
    )
    for best, most, name, tied, ahead, behind, low, high in re.findall(highest, said.lead):
        quantity = name.replace("perplexity", "Perplexity")
        assert (most == "highest") == (better(quantity) == "higher")
        assert said.ranks[quantity, best][0] == 1 and names(tied) == tied_with(quantity, best)
        if behind:
            assert said.words.get((quantity, best, behind), better(quantity)) == better(quantity)
            assert behind not in tied_with(quantity, best)
            if shown := said.intervals.get((quantity, best, behind)):
                signed = shown if most == "highest" else [-shown[0], -shown[2], -shown[1]]
                assert [float(ahead), float(low), float(high)] == pytest.approx(signed, abs=0.0051)
        checked += 1
    for quantity, tied in re.findall(r"[Ii]n (BLEU-4|ROUGE-L|perplexity), ([^.]+) are tied", said.lead):
        quantity, pairs = quantity.replace("perplexity", "Perplexity"), combinations(sorted(names(tied)), 2)
        assert all(b in tied_with(quantity, a) for a, b in pairs)
        checked += 1
    if told := re.search(r"Against the untouched model, BLEU-4 (.*?)\)\.", said.lead):
        verbs = {"rose with": "higher", "fell with": "lower", "not measurably change with": "tied"}
        parts = re.split("(" + "|".join(verbs) + ")", told[1])
        for verb, labels in zip(parts[1::2], parts[2::2], strict=True):
            assert {said.words["BLEU-4", label, "Base"] for label in names(labels)} == {verbs[verb]}
            checked += 1
    least = r"(M\d) took the least (memory|training time), [^;,]+(, but is tied with [^.;]+)?[.;]"
    for best, what, tied in re.findall(least, said.lead):
        quantity = {"memory": "Peak memory", "training time": "Training time"}[what]
        assert said.ranks[quantity, best][0] == 1 and names(tied) == tied_with(quantity, best)
        checked += 1
    return checked


def agree_fronts(said: Read, groups: dict[str, list[str]]) -> int:
    """Each front against its definition, over the words of the tables, where all pairs stand there; what is
    not said to have one has none."""
    checked, gains = 0, ("BLEU-4", "ROUGE-L", "Perplexity")
    for gain, cost, among in product(gains, ("Peak memory", "Training time"), groups):
        front, group = said.fronts.get((gain, cost.lower(), among), ""), groups[among]
        members = [m for m in group if (gain, m) in said.ranks and (cost, m) in said.ranks]
        if any((q, a, b) not in said.words for a, b in combinations(members, 2) for q in (gain, cost)):
            continue
        shown = []
        for label in members:
            cheaper = [m for m in members if said.words.get((cost, m, label)) == "lower"]
            ahead = [m for m in members if said.words.get((gain, m, label)) == better(gain)]
            on = all(said.words[gain, label, m] == better(gain) for m in cheaper)
            on &= all(said.words[cost, label, m] == "lower" for m in ahead)
            shown += [label] * on
        trade = [
            said.words[cost, a, b] == "higher" and said.words[gain, a, b] == better(gain)
            for a, b in permutations(shown, 2)
        ]
        assert names(front) == (set(shown) if any(trade) else set())
        checked += len(members)
    return checked


def test_no_verdict_disagrees_in_lead_tables_and_fronts(undrawn, monkeypatch):
    monkeypatch.setattr(Standing.__init__, "__defaults__", (500,))  # draws: of other widths, read alike
    rng, blocks, groups = np.random.default_rng(0), [], []
    for _ in range(100):
        comparison, shelf = random_bench(rng)
        blocks += section(comparison, shelf, "", [])
        groups.append({name: [t.label for t in of] for name, of in comparison.groups.items()})
    texts = write_markdown(blocks, "noon").split("\n# ")
    checked = [agree(Read(text), of) for text, of in zip(texts, groups, strict=True)]
    assert sum(checked) > 2000


def test_the_steps_of_a_plot_are_differences_in_both(monkeypatch):
    rng, drawn, gains = np.random.default_rng(3), 0, {m.name: m.better for m in compared()}
    monkeypatch.setattr("harness.report.plots.cost.finish", lambda figure: None)
    for _ in range(30):
        comparison, shelf = random_bench(rng)
        read_outputs(comparison, shelf)
        verdicts = Verdicts(comparison)
        fronts = product(("peak_memory", "seconds"), gains, comparison.groups)
        if not any(verdicts.steps(*front) for front in fronts):
            continue
        figure = scores_by_cost(comparison, verdicts).figure
        panels = product(gains, ("peak_memory", "seconds"))
        for ax, (gain, cost) in zip(figure.axes, panels, strict=True):
            at = {(x, y): label for x, y, label, _ in ax.to_label}
            for line in ax.lines:
                if len(line.get_xdata()) == 3:
                    points = line.get_xydata()
                    a, b = at[tuple(points[0])], at[tuple(points[2])]
                    assert verdicts.standings[cost].verdict(b, a).word == "higher"
                    assert verdicts.standings[gain].verdict(b, a).word == gains[gain]
                    assert len({t.objective for t in comparison.trained if t.label in (a, b)}) == 1
                    drawn += 1
    assert drawn > 5


def standing(
    points: dict[str, float], error: float = 0.01, quantity: Quantity = SCORE, **options
) -> Standing:
    """Techniques whose three seeds lie `error` apart."""
    seeds = {name: Sample.of_seeds([p - error, p, p + error]) for name, p in points.items()}
    return Standing(quantity, [Entrant(name, sample, "g", **options) for name, sample in seeds.items()])


def test_ranks_are_the_places_that_verdicts_leave():
    found = standing({"a": 0.9, "b": 0.5, "c": 0.49, "d": 0.1})
    assert [found.rank(name, "g") for name in "abcd"] == [(1, 1, 4), (2, 3, 4), (2, 3, 4), (4, 4, 4)]
    assert found.alike("g") == [["a"], ["b", "c"], ["d"]]
    chain = standing({"a": 0.00, "b": 0.025, "c": 0.05}, 0.012)
    assert chain.tied("b", "g") == ["c", "a"] and chain.tied("a", "g") == ["b"]
    assert chain.alike("g") == [["c", "b"], ["b", "a"]] and chain.rank("b", "g") == (1, 3, 3)
    lower = standing({"a": 0.9, "b": 0.5}, quantity=TIME)
    assert lower.ranked("g") == ["b", "a"] and lower.rank("a", "g") == (2, 2, 2)


def test_techniques_that_share_a_letter_are_those_that_tie():
    rng = np.random.default_rng(0)
    for _ in range(30):
        found = standing({f"m{i}": p for i, p in enumerate(rng.normal(0, 0.05, 7))}, 0.01)
        together = {frozenset(pair) for members in found.alike("g") for pair in combinations(members, 2)}
        tied = {frozenset((a, b)) for a, b in combinations(found.entrants, 2) if b in found.tied(a, "g")}
        assert together == tied


def test_what_is_not_ranked_has_its_difference_and_no_verdict():
    found = standing({"a": 0.9, "b": 0.1}, unranked="single seed")
    verdict = found.verdict("a", "b")
    assert verdict.word == "no ranking: single seed" and verdict.sign == 0 and verdict.difference.low > 0
    assert found.ranked("g") == [] and not found.beats("a", "b")


def test_groups_are_not_compared():
    entrants = [Entrant(n, Sample.of_seeds([p, p + 0.01, p - 0.01]), tuple(g)) for n, p, g in
                (("a", 0.9, "x"), ("b", 0.1, "y"), ("c", 0.5, "xz"), ("d", 0.3, "z"))]  # fmt: skip
    found = Standing(SCORE, entrants)
    assert found.family.pairs == [("a", "c"), ("c", "d")] and found.verdict("a", "b").word == ""


@pytest.mark.parametrize(("count", "metric"), [(2, "bleu4"), (6, "bleu4"), (12, "bleu4"), (6, "perplexity")])
def test_intervals_hold_and_equals_are_not_told_apart(count, metric):
    """The bench that benchmarks/verdicts.py simulates, a few times."""
    world = simulation.World((0.0,) * count, (0.1,) * count, rows=60)
    found = simulation.judged(world, metric, 80)
    assert found["hold"] >= 0.88  # 95 % less three standard errors
    assert found["equal"] <= 0.12


def test_a_true_difference_is_found_as_often_as_stated():
    better = simulation.better_by_a_point(0.0)
    world = simulation.World((6 * better, 0.0), (0.0, 0.0), rows=120)
    found = simulation.judged(world, "bleu4", 100)
    assert 0.2 < found["stated"] < 0.95 and abs(found["found"] - found["stated"]) < 0.16
