"""torch's caching allocator, as far as it decides how much of a card is reserved for how many live bytes.

After c10/cuda/CUDACachingAllocator.cpp: sizes are rounded, taken from the smallest free block that holds
them, what is left of it stays free, and a segment is asked of the card where no block does. Nothing goes back
but by torch.cuda.empty_cache.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import count

ROUND = 512  # bytes: all sizes are multiples
SMALL, SMALL_SEGMENT = 2**20, 2**21  # up to which size blocks are small, and what holds them
MEDIUM, MEDIUM_SEGMENT = 10 * 2**20, 20 * 2**20  # below which size a segment has 20 MiB
LARGE_ROUND = 2**21  # of a segment for more than that


@dataclass(eq=False)
class Block:
    size: int
    small: bool
    free: bool = False
    before: "Block | None" = None  # its neighbours in the segment
    after: "Block | None" = None


class Allocator:
    def __init__(self) -> None:
        self.reserved = 0
        self.free_blocks: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        self.order = count()
        self.places: dict[int, tuple[int, int]] = {}

    def take(self, size: int) -> Block:
        """Of at least one byte, as each allocation of a tensor that holds any."""
        size = max(ROUND, -(-size // ROUND) * ROUND)
        small = size <= SMALL
        pool = self.free_blocks[small]
        place = bisect_left(pool, (size, -1))
        if place < len(pool):
            *_, block = pool.pop(place)
        else:
            block = Block(segment(size), small)
            self.reserved += block.size
        block.free = False
        left = block.size - size
        if left >= ROUND if small else left > SMALL:
            rest = Block(left, small, before=block, after=block.after)
            if rest.after:
                rest.after.before = rest
            block.size, block.after = size, rest
            self.keep(rest)
        return block

    def free(self, block: Block) -> None:
        for other in (block.before, block.after):
            if other and other.free:
                self.free_blocks[other.small].remove((other.size, self.places.pop(id(other))[1], other))
                first, second = (other, block) if other is block.before else (block, other)
                block.size += other.size
                block.before, block.after = first.before, second.after
        if block.before:
            block.before.after = block
        if block.after:
            block.after.before = block
        self.keep(block)

    def keep(self, block: Block) -> None:
        block.free = True
        number = next(self.order)
        self.places[id(block)] = block.size, number
        insort(self.free_blocks[block.small], (block.size, number, block))

    def empty_cache(self) -> None:
        """Segments that are free as a whole go back."""
        for pool in self.free_blocks.values():
            for entry in [entry for entry in pool if not (entry[2].before or entry[2].after)]:
                pool.remove(entry)
                self.places.pop(id(entry[2]))
                self.reserved -= entry[0]


def segment(size: int) -> int:
    if size <= SMALL:
        return SMALL_SEGMENT
    return MEDIUM_SEGMENT if size < MEDIUM else -(-size // LARGE_ROUND) * LARGE_ROUND
