"""The cache gives back what was made, or makes it again: never something else, and never an error."""

import json
import os
from copy import deepcopy
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import cache, data
from harness.data import DATASET, PART
from harness.template import Template, rows_hash

ROWS = [{"instruction": f"Add one to {i}.", "input": "x" * (i % 3), "output": str(i + 1)} for i in range(40)]
PAIRS = [{"prompt": f"Add one to {i}.", "chosen": str(i + 1), "rejected": str(i + 2)} for i in range(20)]


class World:
    """A source, its spec and a template, each of which a test may change."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.monkeypatch = folder, monkeypatch
        self.write(ROWS)
        part = {**PART, "name": "tiny"}
        self.dataset = {**DATASET, "train": 10, "validation": 2, "test": 4, "parts": [part]}
        self.tokenizer = deepcopy(tiny.tokenizer())
        self.kind, self.max_length, self.made = "chat", 64, 0
        monkeypatch.setenv("TUNEOFF_CACHE", str(folder / "cache"))
        tokenize = cache.tokenize

        def counted(*args):
            self.made += 1
            return tokenize(*args)

        monkeypatch.setattr(cache, "tokenize", counted)

    def write(self, rows):
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @property
    def locations(self):
        return {"tiny": str(self.folder / "rows.jsonl")}

    def tokens(self):
        template = Template(self.tokenizer, self.kind)
        return cache.token_rows(self.dataset, self.locations, template, self.max_length)

    def files(self, kind="tokens"):
        return sorted((self.folder / "cache").glob(f"{kind}-*"))


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


@pytest.mark.parametrize("format", ["instruction", "pairs", "text"])
def test_what_comes_from_the_cache_is_what_was_made(format, world):
    world.dataset["parts"][0]["format"] = format
    made = {"instruction": ROWS, "pairs": [*PAIRS, {"prompt": "a", "chosen": "b", "rejected": ""}],
            "text": [{"text": row["instruction"] * 9} for row in ROWS]}  # fmt: skip
    world.write(made[format])
    first = world.tokens()
    assert world.made == 3
    again = world.tokens()
    assert world.made == 3
    assert again == first
    for split in data.SPLITS:
        assert rows_hash(again.rows[split]) == rows_hash(first.rows[split])
        assert [type(v) for v in vars(again.rows[split][0]).values()] == [
            type(v) for v in vars(first.rows[split][0]).values()
        ]
    drawn = cache.splits(world.dataset, world.locations)
    assert drawn == data.splits(world.dataset, world.locations)
    assert first.sample == drawn.rows["test"]


def test_a_plan_reads_the_source_for_the_run(world, monkeypatch):
    cache.splits(world.dataset, world.locations)
    monkeypatch.setattr(data, "splits", None)  # called no more
    assert world.tokens().rows["train"]


def edit_file(world):
    world.write([*ROWS[:-1], {"instruction": "Add.", "output": "?"}])


def edit_chat_template(world):
    world.tokenizer.chat_template = world.tokenizer.chat_template.replace("model", "robot")


def edit_end(world):
    world.tokenizer.eos_token = "<end_of_turn>"


def edit_vocabulary(world):
    world.tokenizer.add_tokens(["Add one"])


def edit_post_processor(world):
    world.tokenizer.backend_tokenizer.post_processor = None


def edit_code(world):
    folder = world.folder / "harness"
    folder.mkdir()
    for file in Path(cache.__file__).parent.glob("*.py"):
        (folder / file.name).write_bytes(file.read_bytes())
    world.monkeypatch.setattr(cache, "__file__", str(folder / "cache.py"))
    assert world.tokens() and world.made == 3  # the same code elsewhere is the same
    with (folder / world.code).open("a") as file:
        file.write("# changed\n")


CHANGES = {
    "source": edit_file,
    "rows asked for": lambda world: world.dataset.update(train=11),
    "seed": lambda world: world.dataset.update(seed=1),
    "format": lambda world: world.dataset["parts"][0].update(fields={"output": "instruction"}),
    "max_length": lambda world: setattr(world, "max_length", 48),
    "kind": lambda world: setattr(world, "kind", "instruction"),
    "chat template": edit_chat_template,
    "end mark": edit_end,
    "vocabulary": edit_vocabulary,
    "post-processor": edit_post_processor,
    "library": lambda world: world.monkeypatch.setattr(cache, "version", lambda name: "0"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_any_change_makes_it_again(change, world):
    world.tokens()
    change(world)
    world.tokens()
    assert world.made == 6


@pytest.mark.parametrize("name", ["rows", "formats", "duplicates", "data", "template", "cache"])
def test_other_code_makes_it_again(name, world):
    world.code = f"{name}.py"
    world.tokens()
    edit_code(world)
    world.tokens()
    assert world.made == 6


@settings(max_examples=40)
@given(draw=st.randoms(use_true_random=False), how=st.sampled_from(["cut", "flip", "empty", "junk", "swap"]))
def test_a_broken_file_is_made_again(draw, how, tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        world = World(tmp_path_factory.mktemp("broken"), monkeypatch)
        first = world.tokens()
        for file in world.files() + world.files("splits"):
            whole = file.read_bytes()
            place = draw.randrange(len(whole))
            flipped = whole[:place] + bytes([whole[place] ^ (1 << draw.randrange(8))]) + whole[place + 1 :]
            broken = {"cut": whole[:place], "flip": flipped, "empty": b"", "junk": draw.randbytes(100)}
            file.write_bytes(broken.get(how, whole))
        if how == "swap":  # a whole file that holds something else
            (one,), (other,) = world.files(), world.files("splits")
            one.write_bytes(other.read_bytes())
        assert world.tokens() == first
        assert world.tokens() == first


@pytest.mark.parametrize("kind", ["a file", "not writable"])
def test_a_folder_that_cannot_be_written_is_done_without(kind, world, monkeypatch):
    place = world.folder / "place"
    if kind == "a file":
        place.write_text("")
    else:
        monkeypatch.setattr(cache.tempfile, "NamedTemporaryFile", lambda **_: open("/nowhere/at/all", "wb"))
    monkeypatch.setenv("TUNEOFF_CACHE", str(place))
    assert world.tokens() == world.tokens()
    assert world.made == 6


def test_a_full_disk_leaves_no_part_of_a_file(world, monkeypatch):
    def full(*args, **more):
        args[0].write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(cache.np, "savez", full)
    assert world.tokens().rows["train"]
    assert not list((world.folder / "cache").iterdir())


def test_what_was_used_last_is_kept(world, monkeypatch):
    for length in (48, 56, 64):
        world.max_length = length
        world.tokens()
    oldest, *others = world.files()
    for age, file in enumerate([oldest, *others]):
        os.utime(file, (age, age))
    sizes = [file.stat().st_size for file in world.files("*")]
    monkeypatch.setattr(cache, "LIMIT", sum(sizes) + max(sizes) // 2)  # room for four, with the splits
    world.max_length = 72
    world.tokens()
    assert not oldest.exists()
    assert len(world.files()) == 3 and set(others) < set(world.files())


def test_a_tokenizer_that_cannot_be_told_is_not_cached(world):
    class Other:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            if name == "backend_tokenizer":
                raise AttributeError(name)
            return getattr(self.tokenizer, name)

        def __call__(self, *args, **more):
            return self.tokenizer(*args, **more)

    world.tokenizer = Other(world.tokenizer)
    assert world.tokens() == world.tokens()
    assert world.made == 6 and not world.files()


def test_the_cache_is_for_its_user_alone(world):
    world.tokens()
    assert (world.folder / "cache").stat().st_mode & 0o077 == 0
