"""Texts that say nearly the same are found: MinHash proposes the pairs, an exact count decides.

A text is the bag of its words, so that neither their order nor case nor the punctuation around them
counts. Two are near duplicates if their bags agree to the threshold (Jaccard) and hold the same numbers:
with another number the question is another one, and so is its answer. Another word may as well be the one
that matters ("a sentence about cats", "about dogs"): where each of two questions has words that the other
lacks, they are near only if they are answered alike.

What many texts share says nothing about two of them: an instruction, the headings of a form, a passage
that twenty questions are asked about. So a run of RUN words that stands in more than MANY texts, which differ
before or after what they share, is taken away; what is left is compared.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, islice

import numpy as np

BANDS, ROWS = 20, 5  # a pair at 0.7 is missed once in 40, at 0.8 once in 2,500, at 0.9 once in 10 million
MULTIPLIERS = np.random.default_rng(17).integers(1, 2**63, BANDS * ROWS, dtype=np.uint64) * 2 + 1
RUN = 5  # words; a shorter run is common speech
MANY = 10  # texts; so few may be copies of each other
AROUND = ".,!?;:\"'()[]{}*`"
SILENT = frozenset(".,!?;:、。「」『』《》“”…")  # no word where it stands alone
HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
LETTERS = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff]+")  # Thai to Khmer, kana
CHUNK = 2000  # texts signed together
TOGETHER = 200  # candidates counted together
NOTHING = np.zeros(0, np.uint64)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # spreads the counts of a word over 64 bits


@dataclass
class Asked:
    """A question and its answer; of a plain text, which is all answer, the text and none."""

    text: str
    answer: str | None = None


class Seen:
    """Questions, against which others are held. `among`: such others, to tell what many texts share."""

    def __init__(self, asked: list[Asked], among: Iterable[Asked] = (), threshold: float = 0.8):
        self.asked, self.threshold, self.words = asked, threshold, Words()
        own = list(self.numbered(asked))
        self.shared = runs_of_many(own, self.numbered(among))
        self.bags, self.bands = [], [{} for _ in range(BANDS)]
        for bag, keys in self.signed(own):
            for band, key in zip(self.bands, keys, strict=False):
                band.setdefault(key, []).append(len(self.bags))
            self.bags.append(bag)

    def like(self, asked: list[Asked]) -> list[bool]:
        """For each question whether it is a near duplicate of any that was seen."""
        return [
            any(self.alike(one, bag, some) for some in chunks(self.candidates(keys), TOGETHER))
            for one, (bag, keys) in zip(asked, self.signed(self.numbered(asked)), strict=True)
        ]

    def candidates(self, keys: list[int]) -> set[int]:
        return {i for band, key in zip(self.bands, keys, strict=False) for i in band.get(key, ())}

    def alike(self, one: Asked, bag: np.ndarray, some: list[int]) -> bool:
        others = [self.bags[i] for i in some]
        sizes = np.array([len(other) for other in others])
        both = shared(bag, others)
        near = both >= self.threshold * (len(bag) + sizes - both)
        if (near & (both == np.minimum(len(bag), sizes))).any():  # one says nothing that the other does not
            return True
        return any(self.answered_alike(one, self.asked[some[i]]) for i in np.flatnonzero(near))

    def answered_alike(self, one: Asked, other: Asked) -> bool:
        if one.answer is None or other.answer is None:
            return True
        (answers,) = self.numbered([Asked(one.answer), Asked(other.answer)])
        bag, another = map(bag_of, answers.without(NOTHING))
        both = shared(bag, [another])[0]
        return both >= self.threshold * (len(bag) + len(another) - both)

    def signed(self, numbered: Iterable["Numbered"]) -> Iterator[tuple[np.ndarray, list[int]]]:
        """Of each text its bag, and a key for each band: near duplicates share one. An empty bag has none."""
        for some in numbered:
            bags = [bag_of(words) for words in some.without(self.shared)]
            keys = iter(band_keys([bag for bag in bags if len(bag)]).tolist())
            yield from ((bag, next(keys) if len(bag) else []) for bag in bags)

    def numbered(self, asked: Iterable[Asked]) -> Iterator["Numbered"]:
        for some in chunks(asked, CHUNK):
            yield Numbered([[self.words[word] for word in words_of(one.text)] for one in some])


class Words(dict):
    """Word -> 64 bits, the same in every process; the last of them is set for a number."""

    def __missing__(self, word: str) -> int:
        kept = word.strip(AROUND) or word
        number = not kept.isalpha() and any(map(str.isdigit, kept))
        self[word] = int.from_bytes(blake2b(kept.encode(), digest_size=8).digest(), "little") & ~1 | number
        return self[word]


class Numbered:
    """Texts as the values of their words, one text after the other; zeros make a short one a run."""

    def __init__(self, texts: list[list[int]]):
        lengths = [max(RUN, len(text)) for text in texts]
        padded = (text + [0] * (RUN - len(text)) for text in texts)
        self.words = np.array([word for text in padded for word in text], np.uint64)
        self.text = np.repeat(np.arange(len(texts)), lengths)  # of each word
        self.ends = np.cumsum(lengths)

    def each(self) -> list[np.ndarray]:
        return np.split(self.words, self.ends[:-1])

    def runs(self, length: int = RUN) -> tuple[np.ndarray, np.ndarray]:
        """Where each run within a text begins, and a value that tells it from others."""
        begins = np.flatnonzero(self.text[: 1 - length] == self.text[length - 1 :])
        found = np.zeros(len(begins), np.uint64)
        for i in range(length):
            found = (found ^ self.words[begins + i]) * GOLDEN
            found ^= found >> np.uint64(29)
        return begins, found

    def places(self, runs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each run its place among `runs`, and whether it follows on another of its text."""
        begins, found = self.runs()
        return places(found, runs)[0], np.diff(self.text[begins], prepend=-1) == 0

    def without(self, shared: np.ndarray) -> list[np.ndarray]:
        """Of each text the words that no shared run covers."""
        begins, runs = self.runs()
        begins = begins[places(runs, shared)[1]]
        change = np.zeros(len(self.words) + 1, np.int64)
        change[begins] += 1
        change[begins + RUN] -= 1
        left = (np.cumsum(change)[:-1] == 0) & (self.words != 0)
        texts = zip(self.each(), np.split(left, self.ends[:-1]), strict=True)
        return [words[kept] for words, kept in texts]


def runs_of_many(own: list[Numbered], among: Iterable[Numbered]) -> np.ndarray:
    """The runs of one's own texts that stand in more than MANY of all, and lead to what varies: the copies of
    a text, each with another word changed, have as much in common, but go on as most of them do."""
    runs = distinct(np.concatenate([NOTHING, *(some.runs()[1] for some in own)]))
    counts = np.zeros(len(runs), np.int64)
    for some in chain(own, among):
        begins, found = some.runs()
        place, known = places(found, runs)
        once = distinct(place[known] * CHUNK + some.text[begins[known]])  # in each text
        counts += np.bincount(once // CHUNK, minlength=len(counts))
    many, varied, forms = counts > MANY, np.ones((2, len(runs)), bool), np.zeros(len(runs), bool)
    for some in own:  # what comes before a run, and after it
        place, follows = some.places(runs)
        for side, step in zip(varied, (-1, 1), strict=True):
            beside = np.where(follows if step < 0 else np.roll(follows, -1), np.roll(place, -step), place)
            side[place[2 * counts[beside] >= counts[place]]] = False
    texts = Counter(words.tobytes() for some in own for words in some.each())
    for some in own:
        place, follows = some.places(runs)
        again = np.array([texts[words.tobytes()] > 1 for words in some.each()])  # wholly a form
        varies = varied.any(0)[place] | again[some.text[some.runs()[0]]]
        block = np.cumsum(~(follows & many[place] & np.roll(many[place], 1)))  # runs of many in a row
        leads = np.bincount(block, many[place] & varies) > 0
        forms[place[many[place] & leads[block]]] = True
    return runs[forms]


def words_of(text: str) -> list[str]:
    """Where no spaces are written, a Han character is a word, and so are two other letters in a row."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = LETTERS.sub(lambda run: f" {' '.join(pairs(run[0]))} ", HAN.sub(r" \g<0> ", text))
    words = text.casefold().split()
    return [word for word in words if word not in SILENT] or words or [text]


def pairs(letters: str) -> list[str]:
    return [letters[i : i + 2] for i in range(len(letters) - 1)] or [letters]


def bag_of(words: np.ndarray) -> np.ndarray:
    """Distinct 64-bit values: a word's second occurrence is another value than its first."""
    ordered = np.sort(words)
    place, count = np.arange(len(ordered)), np.arange(len(ordered))
    place[1:][ordered[1:] == ordered[:-1]] = 0
    first = np.maximum.accumulate(place)
    return ordered + (count - first).astype(np.uint64) * (GOLDEN << np.uint64(1))  # the last bit stays


def band_keys(bags: list[np.ndarray]) -> np.ndarray:
    """(text, band) from the least of each hash over a bag: Jaccard is the chance that two leasts agree.
    Texts with other numbers, or as many of another, have other keys."""
    values = np.concatenate([NOTHING, *bags])
    starts = np.cumsum([0, *map(len, bags)])[:-1]
    numbers = np.add.reduceat(np.where(values & np.uint64(1), mixed(values, GOLDEN), np.uint64(0)), starts)
    keys = np.tile(numbers, (BANDS, 1))
    for i, multiplier in enumerate(MULTIPLIERS):
        band = keys[i // ROWS]
        band ^= np.minimum.reduceat(mixed(values, multiplier), starts)
        band *= GOLDEN
    return keys.T


def mixed(values: np.ndarray, multiplier: np.uint64) -> np.ndarray:
    found = values * multiplier
    found ^= found >> np.uint64(32)  # a product's high bits are the random ones
    return found * multiplier


def shared(bag: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """How many words a bag has in common with each of the others."""
    starts = np.cumsum([0, *map(len, others)])[:-1]
    return np.add.reduceat(places(np.concatenate(others), np.sort(bag))[1], starts, dtype=np.int64)


def places(values: np.ndarray, ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each value stands in the ordered ones, and whether it does."""
    place = np.searchsorted(ordered, values)
    return place, np.append(ordered, ~np.uint64(0))[place] == values


def distinct(values: np.ndarray) -> np.ndarray:
    """np.unique, which is slower for many: it hashes."""
    ordered = np.sort(values)
    return ordered[np.flatnonzero(np.diff(ordered, prepend=~ordered[:1]))]


def chunks(values: Iterable, size: int) -> Iterator[list]:
    rest = iter(values)
    while some := list(islice(rest, size)):
        yield some
