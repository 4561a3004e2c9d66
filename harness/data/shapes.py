"""The few shapes that a training's micro-batches have, so that each can be compiled and captured once."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from math import ceil

from harness.data.batches import Batches, height
from harness.data.template import Example
from harness.spec import Hyperparams

SIZES = 4  # that a run has: each costs seconds to compile
GRAIN = 64  # tokens: sizes are multiples of it, as matrix products like them
LAUNCH = 48  # tokens that a further micro-batch costs: it reads all weights of a layer once more
SAMPLE = 32  # steps that sizes are tried on
MANY = 4  # sequences of a step: beyond, how the last of them is filled matters little
TARGETS = 1024  # a head's rows come in multiples of it


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
    """`cut` makes micro-batches of a step's examples, `of` tells the shape of one.

    `packed`: the rows of a micro-batch lie one behind another in one sequence of one of four sizes, as many
    of a step's rows as fit, and at most micro_batch_size * max_length tokens. Else micro_batch_size rows have
    one of four widths.
    """

    def __init__(self, batches: Batches, hp: Hyperparams, packed: bool):
        self.hp, self.packed = hp, packed
        steps = list(batches)
        if packed:
            self.sizes = sizes_for([sorted((e.length for e in step), reverse=True) for step in steps], hp)
        else:
            parts = [part for step in steps for part in self.cut(step)]
            needs = [height([[example] for example in part]) for part in parts]
            self.sizes = few([grains(need) for need in needs])

    def cut(self, examples: list[Example]) -> list[list[Example]]:
        if not self.packed:
            size = self.hp.micro_batch_size
            return [examples[i : i + size] for i in range(0, len(examples), size)]
        rows = sorted(examples, key=lambda example: example.length, reverse=True)
        bins = fill([row.length for row in rows], self.sizes)
        return [[rows[i] for i in part] for _, part in bins]

    def of(self, examples: list[Example], targets: int) -> Shape:
        """For examples, `targets` of whose tokens are learned. What is longer than any size keeps its own."""
        if self.packed:
            tokens = self.fitting(sum(example.length for example in examples))
            longest = max(self.hp.max_length, *(example.length for example in examples))
            rows = max(self.hp.batch_size, len(examples)) + ceil(tokens / longest)
            return Shape(tokens, rounded(targets, tokens), longest, rows)
        tokens = self.fitting(max(example.length for example in examples))
        return Shape(tokens, rounded(targets, len(examples) * tokens), longest=tokens)

    def fitting(self, need: int) -> int:
        found = bisect_left(self.sizes, need)
        return self.sizes[found] if found < len(self.sizes) else max(need, self.hp.max_length)


def rounded(targets: int, tokens: int) -> int:
    return max(1, ceil(targets / TARGETS)) * TARGETS if tokens > TARGETS else tokens


def sizes_for(steps: list[list[int]], hp: Hyperparams) -> list[int]:
    """Four sizes in which steps of rows of these lengths, the longest first, cost least."""
    longest = max(step[0] for step in steps)
    most = grains(max(longest, min(hp.micro_batch_size * hp.max_length, max(map(sum, steps)))))
    some = steps[:: max(1, len(steps) // SAMPLE)]

    def total(sizes) -> float:
        if sizes[0] < GRAIN or not longest <= sizes[-1] <= most or len(set(sizes)) < SIZES:
            return float("inf")
        return sum(size + LAUNCH for step in some for size, _ in fill(step, sizes))

    halved = [[grains(most / 2 ** (k + i)) for i in reversed(range(SIZES))] for k in range(SIZES)]
    best = min([*halved, [*halved[0][:-1], most]], key=total)
    while True:  # one size at a time, as long as that helps
        moved = [sorted([*best[:i], best[i] + move * GRAIN, *best[i + 1 :]])
                 for i in range(SIZES) for move in (-8, -2, -1, 1, 2, 8)]  # fmt: skip
        better = min(moved, key=total)
        if total(better) >= total(best):
            return sorted({size for step in steps for size, _ in fill(step, best)})
        best = better


def grains(tokens: float) -> int:
    return ceil(tokens / GRAIN) * GRAIN


def fill(lengths: list[int], sizes: list[int]) -> list[tuple[int, list[int]]]:
    """Rows, the longest first, into sequences of these sizes: -> (size, indices of its rows) of the cheapest
    choice of few sequences that holds them all, as far as placing each where it fits tightest can tell."""
    total, count = sum(lengths), ceil(sum(lengths) / sizes[-1])
    if MANY < count < len(lengths):  # there are thousands of choices: the largest size, but for the last
        first = placed(lengths, [sizes[-1]] * len(lengths)) or []
        return [(min(s for s in sizes if s >= sum(lengths[i] for i in rows)), rows) for _, rows in first]
    while count < len(lengths):
        choices = [c for more in range(3) for c in combinations_with_replacement(sizes, count + more)
                   if sum(c) >= total and c[-1] >= lengths[0]]  # fmt: skip
        for some in sorted(choices, key=lambda choice: sum(choice) + LAUNCH * len(choice)):
            if found := placed(lengths, some):
                return found
        count += 1
    return [(min(size for size in sizes if size >= length), [i]) for i, length in enumerate(lengths)]


def placed(lengths: list[int], sequences: Iterable[int]) -> list[tuple[int, list[int]]] | None:
    bins: list[tuple[int, int, list[int]]] = [(size, size, []) for size in sequences]  # size, left, rows
    for i, length in enumerate(lengths):
        fits = [b for b in range(len(bins)) if bins[b][1] >= length]
        if not fits:
            return None
        tightest = min(fits, key=lambda b: bins[b][1])
        size, left, rows = bins[tightest]
        bins[tightest] = size, left - length, [*rows, i]
    return [(size, rows) for size, _, rows in bins if rows]


def few(needs: list[int]) -> list[int]:
    """At most four sizes, so that the least is padded when each need is given the next size."""
    values = sorted(set(needs))
    counts = [needs.count(value) for value in values]
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # values served so far -> padded total, sizes
    for _ in range(SIZES):
        further = dict(best)
        for served, (total, sizes) in best.items():
            for end in range(served + 1, len(values) + 1):
                candidate = total + values[end - 1] * sum(counts[served:end]), (*sizes, values[end - 1])
                if end not in further or candidate < further[end]:
                    further[end] = candidate
        best = further
    return list(best[len(values)][1])
