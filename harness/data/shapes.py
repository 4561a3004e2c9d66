"""The few shapes that a training's micro-batches have, so that each can be compiled and captured once."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, exp, inf
from typing import NamedTuple

from harness.data.batches import learned_tokens
from harness.data.template import Example
from harness.spec import Hyperparams

SIZES = 4  # that a run has: each costs seconds to compile
GRAIN = 64  # tokens: sizes are multiples of it, as matrix products like them
WIDTHS = 64  # of padded rows that are told apart
LAUNCH = 48  # tokens that a further micro-batch costs: it reads all weights of a layer once more
HEAD = 0.1  # tokens that a target costs, as with 128,000 words; three times that in a small model of more
SAMPLE = 1024  # rows that sizes are tried on
TRIES = 300  # of sizes: more find little that is better
MANY = 5  # sequences of a step: beyond, how the last of them is filled matters little
ORDERS = 8  # in which rows are tried to fit; two while sizes are sought


class Need(NamedTuple):
    """What a row has, or some in one sequence."""

    tokens: int
    targets: int  # of them, places whose next token is learned


class Size(NamedTuple):
    """What a micro-batch is given."""

    tokens: int  # of a sequence
    targets: int  # places in all sequences whose next token may be learned
    sequences: int = 1

    @property
    def cost(self) -> float:
        return self.sequences * self.tokens + HEAD * self.targets + LAUNCH

    def holds(self, need: Need) -> bool:
        return self.tokens >= need.tokens and self.targets >= need.targets


Choice = tuple[Need, tuple[Size, ...]]  # sequences for a step, and what these hold together


@dataclass(frozen=True)
class Shape:
    """What a micro-batch is padded to."""

    tokens: int  # of a sequence
    targets: int  # places whose next token may be learned
    longest: int  # tokens of a row, at most
    rows: int = 0  # that share the one sequence, with those of the padding; 0: a row has its own

    def borders(self, rows: list[int]) -> list[int]:
        """Where rows begin and end, and behind them the padding's, which are no longer."""
        while rows[-1] < self.tokens:
            rows = [*rows, min(self.tokens, rows[-1] + self.longest)]
        return rows + [self.tokens] * (self.rows + 1 - len(rows))


class Shapes:
    """`cut` makes micro-batches of a step's examples, `of` tells the shape of one: one of four in all, as far
    as examples are those of `batches`.

    `packed`: the rows of a micro-batch lie one behind another in one sequence, as many of a step's rows as
    fit, and at most micro_batch_size * max_length tokens; `whole`: all of them. Else micro_batch_size rows
    have one width.
    """

    def __init__(self, batches: Iterable[list[Example]], hp: Hyperparams, packed: bool, whole: bool = False):
        self.hp, self.packed, self.whole = hp, packed, packed and whole
        if packed:
            steps = [[needed(example) for example in step] for step in batches]
            self.sizes = sizes_for([[together(rows)] for rows in steps] if whole else steps, hp)
            self.choices = choices(self.sizes)
        else:
            parts = [part for step in batches for part in self.cut(step)]
            self.sizes = few([(len(part), self.need(part)) for part in parts])

    def cut(self, examples: list[Example]) -> list[list[Example]]:
        if not self.packed:
            size = self.hp.micro_batch_size
            return [examples[i : i + size] for i in range(0, len(examples), size)]
        if self.whole:
            return [examples] if examples else []
        planned = [example for example in examples if max(self.sizes).holds(needed(example))]
        rows = [needed(example) for example in planned]
        parts = [[planned[i] for i in part] for _, part in fill(rows, orders(rows), self.choices)]
        return parts + [[example] for example in examples if not max(self.sizes).holds(needed(example))]

    def need(self, examples: list[Example]) -> Need:
        """Of a micro-batch: the tokens of its one sequence, or of its longest row."""
        tokens, targets = zip(*map(needed, examples), strict=True)
        return Need(sum(tokens) if self.packed else max(tokens), sum(targets))

    def of(self, examples: list[Example], targets: int) -> Shape:
        """For examples, `targets` of whose tokens are learned."""
        need, sequences = self.need(examples)._replace(targets=targets), 1 if self.packed else len(examples)
        holding = [size for size in self.sizes if size.sequences == sequences and size.holds(need)]
        size = min(holding, key=cost) if holding else self.roomy(need, sequences)
        if not self.packed:
            return Shape(size.tokens, size.targets, longest=size.tokens)
        longest = max(self.hp.max_length, *(example.length for example in examples))
        rows = max(self.hp.batch_size, len(examples)) + ceil(size.tokens / longest)
        return Shape(size.tokens, size.targets, longest, rows)

    def roomy(self, need: Need, sequences: int) -> Size:
        """For what was not planned, as a model's own answers: a width that others have, else GRAIN doubled
        until it is wide enough, half or all of it targets. It remembers nothing, so that a training that is
        continued has the same."""
        doubled = [GRAIN * 2**k for k in range(32) if GRAIN * 2**k < self.hp.max_length]
        wide = [*(size.tokens for size in self.sizes), *doubled, self.hp.max_length]
        tokens = min((width for width in wide if width >= need.tokens), default=need.tokens)
        half, whole = ceil(sequences * tokens / 2), sequences * tokens
        return Size(tokens, half if need.targets <= half else whole, sequences)


def needed(example: Example) -> Need:
    return Need(example.length, learned_tokens(example, history=True))


def cost(size: Size) -> float:
    return size.cost


def sizes_for(steps: list[list[Need]], hp: Hyperparams) -> list[Size]:
    """Four sizes in which steps of these rows cost little; one of them holds any row."""
    longest = Need(*map(max, zip(*(row for step in steps for row in step), strict=True)))
    most = max(sum(row.tokens for row in step) for step in steps)
    most = max(longest.tokens, min(hp.micro_batch_size * hp.max_length, most))
    some = [(step, orders(step)[:2]) for step in steps[:: ceil(sum(map(len, steps)) / SAMPLE)]]

    def size(tokens: float, targets: float) -> Size:
        tokens = grains(min(tokens, most))
        return Size(tokens, min(grains(targets), tokens))

    def total(sizes: list[Size]) -> float:
        if not max(sizes).holds(longest):
            return inf
        possible = choices(sizes)
        return sum(size.cost for rows, tried in some for size, _ in fill(rows, tried, possible))

    def used(sizes: list[Size]) -> set[Size]:
        possible = choices(sizes)
        return {max(sizes), *(size for rows, tried in some for size, _ in fill(rows, tried, possible))}

    halved = [[size(most / 2 ** (k + i), most / 2 ** (k + i)) for i in range(SIZES)] for k in range(SIZES)]
    best = min([*halved, *([size(most, most), *half[1:]] for half in halved)], key=total)
    least, draw = total(best), random.Random(0)
    for n in range(TRIES):
        moved, spread = list(best), 0.5 ** (1 + 6 * n / TRIES)
        for i in draw.sample(range(SIZES), draw.choice((1, 2))):
            tokens, share = (exp(draw.gauss(0, spread)) for _ in range(2))
            moved[i] = size(best[i].tokens * tokens, best[i].targets * tokens * share)
        if (found := total(moved)) < least:
            best, least = moved, found
    return sorted(used(best))


def grains(tokens: float) -> int:
    return max(1, ceil(tokens / GRAIN)) * GRAIN


def choices(sizes: list[Size]) -> list[Choice]:
    """Of up to MANY sequences, the cheapest first."""
    made: list[tuple[float, Need, tuple[Size, ...]]] = [(0.0, Need(0, 0), ())]
    for size in sizes:  # to what is made so far, n of it
        cost, tokens, targets = size.cost, size.tokens, size.targets
        made += [
            (
                price + n * cost,
                Need(held.tokens + n * tokens, held.targets + n * targets),
                chosen + (size,) * n,
            )
            for price, held, chosen in made
            for n in range(1, MANY + 1 - len(chosen))
        ]
    return [(held, chosen) for _, held, chosen in sorted(made)[1:]]


def together(rows: Sequence[Need]) -> Need:
    return Need(sum([row.tokens for row in rows]), sum([row.targets for row in rows]))


def orders(rows: list[Need]) -> list[list[int]]:
    """Indices of rows, the longest first; then such that up to 0.4 of a length is left to chance."""
    found = []
    for n in range(ORDERS):
        draw = random.Random(n)
        lengths = [row.tokens * (1 - bool(n) * draw.uniform(0, 0.4)) for row in rows]
        found.append(sorted(range(len(rows)), key=lengths.__getitem__, reverse=True))
    return found


def fill(rows: list[Need], tried: list[list[int]], possible: list[Choice]) -> list[tuple[Size, list[int]]]:
    """-> (size, indices of its rows) of the cheapest choice of sequences that holds all rows, as far as
    placing each where it fits tightest can tell, in the orders that are tried."""
    need = together(rows)
    for held, sizes in possible:
        if held.tokens >= need.tokens and held.targets >= need.targets:
            for order in tried:
                if found := placed(rows, order, sizes):
                    return found
    single = [sizes[0] for _, sizes in possible if len(sizes) == 1]
    parts = [part for _, part in placed(rows, tried[0], [max(single)] * len(rows)) or []]
    needs = [together([rows[i] for i in part]) for part in parts]
    return [(next(size for size in single if size.holds(need)), part)
            for need, part in zip(needs, parts, strict=True)]  # fmt: skip


def placed(rows: list[Need], order: list[int], sizes: Sequence[Size]) -> list[tuple[Size, list[int]]] | None:
    bins: list[list] = [[size.tokens, size.targets, size, []] for size in sizes]  # left of both; whose rows
    for i in order:
        tokens, targets = rows[i]
        tightest = None
        for one in bins:
            if one[0] >= tokens and one[1] >= targets and (tightest is None or one[0] < tightest[0]):
                tightest = one
        if tightest is None:
            return None
        tightest[0] -= tokens
        tightest[1] -= targets
        tightest[3].append(i)
    return [(size, part) for _, _, size, part in bins if part]


def few(parts: list[tuple[int, Need]]) -> list[Size]:
    """At most four sizes, so that these micro-batches of (rows, need) cost least when each is given one of as
    many rows and at least its width."""
    grain = max(8, ceil(max(need.tokens for _, need in parts) / WIDTHS))
    alike: dict[tuple[int, int], list[int]] = {}  # rows and width -> targets of each
    for rows, need in parts:
        alike.setdefault((rows, ceil(need.tokens / grain) * grain), []).append(need.targets)
    values = sorted(alike)
    best: dict[int, tuple[float, list[Size]]] = {0: (0.0, [])}  # values served so far -> cost, sizes
    for _ in range(SIZES):
        further = dict(best)
        for served, (before, sizes) in best.items():
            count = targets = 0
            for end in range(served, len(values)):
                rows, width = values[end]
                if rows != values[served][0]:
                    break
                count, targets = count + len(alike[rows, width]), max(targets, *alike[rows, width])
                size = Size(width, min(grains(targets), rows * width), rows)
                candidate = before + count * size.cost, [*sizes, size]
                further[end + 1] = min(further.get(end + 1, candidate), candidate)
        best = further
    return best[len(values)][1]
