"""A dataset becomes conversations: every part's rows, sampled, without duplicates, split."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import repeat
from pathlib import Path

from harness.data.formats import Conversation, Refused, read_row, said, unused
from harness.data.leaks import Held, digest, prompt
from harness.data.rows import USUAL, holds, labelled, rows_of_dataset, rows_of_file
from harness.data.spec import PartSpec
from harness.errors import BadRequest

# Drawn in this order: more training rows leave the test alone.
SPLITS = ("test", "unseen", "validation", "train")
SIZES = {split: split for split in SPLITS} | {"unseen": "test"}  # split -> the key of its rows of each part
SHOWN = 10  # refused rows that are named
COMMIT = re.compile(r"\b[0-9a-f]{40}\b")


@dataclass
class Splits:
    """A dataset's rows, drawn, and what was not used of it."""

    rows: dict[str, list[Conversation]]  # by split, in the order of SPLITS; unseen where a part is
    left_out: dict[str, int]  # rows, by why: duplicates, each of leaks.LEAKS, and each reason of a refusal
    refused: list[dict]  # the first few of the refused: part, row (from 1), reason
    revisions: dict[str, str]  # part -> the commit that was read, of those from the hub
    origins: dict[str, dict[str, str]]  # part -> our split -> the split of its source that it is drawn from
    unused: dict[str, list[str]] = field(default_factory=dict)  # part -> its columns that no row was made of


@dataclass
class Pool:
    """One split of a part's source: its rows in the order of their hash, one for each prompt."""

    part: dict
    source: str  # the split's name there
    draws: list[str]  # which of our splits come from it
    rows: list[Conversation] = field(default_factory=list)
    usable: int = 0  # distinct rows in all; `rows` may be the first of them only
    whole: bool = True
    left_out: Counter = field(default_factory=Counter)
    copies: Counter = field(default_factory=Counter)  # of the duplicates, those of each other part


def make_splits(dataset: dict, locations: dict, room: int = 2) -> Splits:
    """The splits, disjoint as harness.data.leaks says, the rows of all parts mixed.

    A row's place is decided by a hash of the seed and its text: the order of the source does not
    matter. Of rows with the same prompt one is kept; of preference pairs all that differ, in one split. A
    row that leaks what is held out is passed over for the next. `room` times the rows asked for are held
    in memory. Raises BadRequest if there are too few.
    """
    found = Splits({}, Counter(), [], {}, {})
    pools = []
    for part in dataset["parts"]:
        own = [Pool(part, *source) for source in sources(part, locations.get(part["name"])).items()]
        found.origins[part["name"]] = {split: pool.source for pool in own for split in pool.draws}
        pools += own
    seen: dict[bytes, str] = {}
    # A test's own source first, and before it what is unseen: of a row in two parts one is left.
    for pool in sorted(pools, key=lambda pool: ("unseen" not in pool.draws, SPLITS.index(pool.draws[0]))):
        fill(pool, dataset, locations.get(pool.part["name"]), room, seen, found)
    earlier: list[Conversation] = []
    for split in SPLITS:
        count, from_pools = dataset[SIZES[split]], [pool for pool in pools if split in pool.draws]
        if not from_pools:  # nothing is unseen
            continue
        among = [row for pool in from_pools for row in pool.rows[:count]]
        held = Held(earlier, among, dataset["near_duplicates"]) if earlier else None
        drawn = []
        for pool in from_pools:
            rows = draw(pool, count, held)
            if len(rows) < count and not pool.whole:
                return make_splits(dataset, locations, 2 * room)
            if len(rows) < count:
                raise BadRequest(too_few(pool, split, len(rows), dataset, found))
            drawn += rows
        found.rows[split] = sorted(drawn, key=lambda c: c.id.rpartition(":")[2])  # mix the parts
        earlier += drawn
    for pool in pools:
        found.left_out.update(pool.left_out)
    return found


def sources(part: dict, location: str | None) -> dict[str, list[str]]:
    """Split of a part's source -> which of our splits come from it.

    What the source holds out itself, under the name that the spec gives or a usual one, is taken from there;
    what it lacks is cut from the training rows. A folder without training rows is one source for all.
    """
    own = {"train": part["split"], **{s: part[f"{s}_split"] for s in USUAL if s != "train"}}
    if location:
        path = Path(location)
        named = {name for name in own.values() if part["path"]} - {"", PartSpec.split}
        if lacks := sorted(name for name in named if not holds(path, name)):  # a copy of the hub's may
            there = sorted({name for labels in labelled(path).values() for name in labels.begins})
            there = ", ".join(there) or "none"
            raise BadRequest(f"part {part['name']}: {path} has no split {lacks[0]!r}. There are: {there}")
        own = {s: next((n for n in (own[s], *USUAL[s]) if n and holds(path, n)), "") for s in USUAL}
        own = own if own["train"] or holds(path) else {}
    else:
        offered = from_hub(part["hub"], part["config"], part["split"], part["revision"]).info.splits or {}
        own = {s: own[s] or next((n for n in USUAL[s] if n in offered), "") for s in USUAL}
    train = own.get("train") or part["split"]
    names = {split: own.get(SIZES[split]) or train for split in SPLITS}
    splits = [split for split in SPLITS if (split == "unseen") == bool(part.get("unseen"))]
    names = {split: names[split] for split in splits}
    return {name: [s for s in names if names[s] == name] for name in dict.fromkeys(names.values())}


def fill(pool: Pool, dataset: dict, location: str | None, room: int, seen: dict, found: Splits) -> None:
    """Reads a pool's rows. `seen`: the prompts of those before it, each with its part."""
    part = pool.part
    name = part["name"]
    wanted = room * sum(dataset[SIZES[split]] for split in pool.draws)
    best = {}  # prompt -> the least place of its rows
    held = {}  # prompt -> that row, if its place is below the limit
    limit = "~"  # above every place
    columns = set(found.unused.get(name, []))
    for number, row in enumerate(rows_of_part(part, location, pool.source, found.revisions), 1):
        try:
            messages, rejected = read_row(row, part)
        except Refused as refusal:
            pool.left_out[refusal.reason] += 1
            if len(found.refused) < SHOWN:
                found.refused.append({"part": name, "row": number, "reason": str(refusal)})
            continue
        columns |= unused(row, part)
        told = [{"role": m["role"], "content": said(m)} for m in messages]
        key = place = hashed([dataset["seed"], told] + [rejected] * bool(rejected))
        asked = prompt(messages)
        if rejected is not None:  # all pairs of a prompt stand together, to be drawn into one split
            asked += digest(messages[-1]["content"]) + digest(rejected)  # as small as the difference may be
            place = hashed([dataset["seed"], told[:-1]]) + key
        if asked in seen or asked in best:
            pool.left_out["duplicates"] += 1
            pool.copies[seen.get(asked, name)] += 1
        if asked in seen or place >= best.get(asked, "~"):
            continue
        best[asked] = place
        if place < limit:
            held[asked] = Conversation(f"{name}:{key[:12]}", name, messages, rejected)
        if len(held) > 2 * wanted:
            limit = sorted(best.values())[wanted]
            held = {asked: row for asked, row in held.items() if best[asked] < limit}
    found.unused[name] = sorted(columns)
    seen.update(dict.fromkeys(best, name))
    pool.rows = [held[asked] for asked in sorted(held, key=best.get)]
    pool.usable, pool.whole = len(best), len(held) == len(best)


def hashed(value) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def draw(pool: Pool, count: int, held: Held | None) -> list[Conversation]:
    """The next rows of a pool that leak nothing of what is held out."""
    drawn = []
    while len(drawn) < count and pool.rows:
        rows, pool.rows = pool.rows[: count - len(drawn)], pool.rows[count - len(drawn) :]
        for row, leak in zip(rows, held.leaks(rows) if held else repeat(None), strict=False):
            if leak:
                pool.left_out[leak] += 1
            else:
                drawn.append(row)
    return drawn


def rows_of_part(part: dict, location: str | None, split: str, revisions: dict):
    """Raw rows of one split: from where it lies on this machine, else from the hub."""
    if location:
        path = Path(location)
        configured = path / part["config"]
        yield from rows_of_file(configured if configured.is_dir() else path, split)
        return
    found = from_hub(part["hub"], part["config"], split, part["revision"])
    if revision := revision_of(found):
        revisions[part["name"]] = revision
    yield from rows_of_dataset(found)


def hub_identity(part: dict) -> list:
    """What changes when the hub's rows of a part do."""
    found = [from_hub(part["hub"], part["config"], name, part["revision"]) for name in sources(part, None)]
    return [[revision_of(dataset), dataset._fingerprint] for dataset in found]


@cache
def from_hub(name: str, config: str, split: str, revision: str):
    from datasets import load_dataset

    try:
        return load_dataset(name, config or None, split=split, revision=revision or None)
    except Exception as error:  # of the hub's client, its transport or a builder
        raise BadRequest(
            f"dataset {name}: the hub does not give its split {split!r}: {error}. "
            "Read a copy with --source NAME=PATH"
        ) from error


def revision_of(dataset) -> str | None:
    """The commit of a dataset from the hub: it names the folder of the files made of it."""
    for file in dataset.cache_files:
        if commit := COMMIT.search(Path(file["filename"]).parent.as_posix()):
            return commit[0]
    return None


def too_few(pool: Pool, split: str, drawn: int, dataset: dict, found: Splits) -> str:
    name, wanted = pool.part["name"], sum(dataset[SIZES[split]] for split in pool.draws)
    own = f"its split {pool.source!r}" if set(found.origins[name].values()) != {pool.source} else "it"
    left_out = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in pool.left_out.items())
    first = {r["reason"]: r["row"] for r in reversed(found.refused) if r["part"] == name}
    refused = "; ".join(f"row {row}: {reason}" for reason, row in list(first.items())[-3:][::-1])
    copies = ", ".join(f"{n} of them of part {part}" for part, n in pool.copies.items() if part != name)
    fewer = " ".join(f"--set data.{SIZES[s]}={n}" for s, n in enough(pool, split, drawn, dataset).items())
    remedies = [f"ask for fewer with {fewer}"] if fewer else []
    if dataset[SIZES[split]] - drawn <= pool.left_out["near_duplicates"]:
        remedies.append("take near ones too with --set data.near_duplicates=off")
    return (
        f"part {name}: {wanted} rows are asked for ({describe(dataset, pool.draws)}), but {own} has "
        f"{pool.usable} distinct usable ones"
        + (f", {drawn} of which can be {split} rows. " if pool.usable >= wanted else ". ")
        + (f"Left out: {left_out}{' (' + copies + ')' if copies else ''}. " if left_out else "")
        + (f"Refused: {refused}. " if refused else "")
        + (", or ".join(remedies).capitalize() if pool.usable else "")
    ).strip()


def enough(pool: Pool, split: str, drawn: int, dataset: dict) -> dict[str, int]:
    """Rows of each split that a pool has enough for, where it has but `drawn` for one of them: fewer of that
    one; where nothing of it would be left, fewer of all."""
    at = pool.draws.index(split)
    left = drawn - sum(dataset[SIZES[later]] for later in pool.draws[at + 1 :])
    if left > 0:
        return {split: left}
    asked = {s: dataset[SIZES[s]] for s in pool.draws if dataset[SIZES[s]]}
    rows = drawn + sum(dataset[SIZES[earlier]] for earlier in pool.draws[:at])
    found = {s: max(1, n * rows // sum(asked.values())) for s, n in asked.items()}
    found[max(found, key=found.get)] += rows - sum(found.values())
    return found if min(found.values(), default=0) > 0 else {}


def describe(dataset: dict, draws: Iterable[str] = USUAL) -> str:
    return ", ".join(f"{dataset[SIZES[split]]} {split}" for split in sorted(draws, key=SPLITS.index)[::-1])
