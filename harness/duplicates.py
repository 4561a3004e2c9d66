"""Texts that say nearly the same are found: MinHash proposes the pairs, an exact count decides.

A text is the bag of its words, so that neither their order nor case nor the punctuation around them
counts. Two are near duplicates if their bags agree to 0.8 (Jaccard) and hold the same numbers: with
another number the question is another one, and so is its answer.
"""

from hashlib import blake2b

import numpy as np

THRESHOLD = 0.8
BANDS, ROWS = 20, 5  # a pair at 0.8 is missed once in 2,500, one at 0.9 once in 10 million
MULTIPLIERS = np.random.default_rng(17).integers(1, 2**63, BANDS * ROWS, dtype=np.uint64) * 2 + 1
AROUND = ".,!?;:\"'()[]{}*`"
CHUNK = 2000  # texts signed together
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # spreads the counts of a word over 64 bits


class Words(dict):
    """Word -> 64 bits, the same in every process."""

    def __missing__(self, word: str) -> int:
        kept = word.strip(AROUND) or word
        self[word] = int.from_bytes(blake2b(kept.encode(), digest_size=8).digest(), "little")
        return self[word]


class Seen:
    """Texts, against which others are held."""

    def __init__(self):
        self.words, self.bags, self.bands = Words(), [], [{} for _ in range(BANDS)]

    def add(self, texts: list[str]) -> None:
        for bag, keys in self.signed(texts):
            for band, key in zip(self.bands, keys, strict=True):
                band.setdefault(key, []).append(len(self.bags))
            self.bags.append(bag)

    def like(self, texts: list[str]) -> list[bool]:
        """For each text whether it is a near duplicate of any that was added."""
        found = []
        for bag, keys in self.signed(texts):
            alike = {i for band, key in zip(self.bands, keys, strict=True) for i in band.get(key, ())}
            found.append(bool(alike) and agrees(bag, [self.bags[i] for i in alike]))
        return found

    def signed(self, texts: list[str]):
        """Of each text its bag, and a key for each band: near duplicates share one."""
        for start in range(0, len(texts), CHUNK):
            split = [text.casefold().split() for text in texts[start : start + CHUNK]]
            bags = [bag_of([self.words[word] for word in words]) for words in split]
            keys = band_keys(bags, [numbers_of(words) for words in split])
            yield from zip(bags, keys.tolist(), strict=True)


def bag_of(words: list[int]) -> np.ndarray:
    """Distinct 64-bit values: a word's second occurrence is another value than its first."""
    ordered = np.sort(np.array(words, np.uint64))
    place = np.arange(len(ordered))
    first = np.maximum.accumulate(np.where(np.r_[True, ordered[1:] != ordered[:-1]], place, 0))
    return ordered + (place - first).astype(np.uint64) * GOLDEN


def numbers_of(words: list[str]) -> int:
    """Equal for texts that hold the same numbers as often, in any order."""
    found = sorted(w.strip(AROUND) for w in words if not w.isalpha() and any(map(str.isdigit, w)))
    return int.from_bytes(blake2b(" ".join(found).encode(), digest_size=8).digest(), "little")


def band_keys(bags: list[np.ndarray], numbers: list[int]) -> np.ndarray:
    """(text, band) from the least of each hash over a bag: Jaccard is the chance that two leasts agree."""
    values = np.concatenate(bags)
    starts = np.cumsum([0, *(len(bag) for bag in bags[:-1])])
    keys = np.tile(np.array(numbers, np.uint64), (BANDS, 1))
    for i, multiplier in enumerate(MULTIPLIERS):
        mixed = values * multiplier
        mixed ^= mixed >> np.uint64(32)  # a product's high bits are the random ones
        band = keys[i // ROWS]
        band ^= np.minimum.reduceat(mixed * multiplier, starts)
        band *= GOLDEN
    return keys.T


def agrees(bag: np.ndarray, others: list[np.ndarray]) -> bool:
    sizes = np.array([len(other) for other in others])
    starts = np.cumsum([0, *sizes[:-1]])
    shared = np.add.reduceat(np.isin(np.concatenate(others), bag), starts, dtype=np.int64)
    return bool((shared >= THRESHOLD * (len(bag) + sizes - shared)).any())
