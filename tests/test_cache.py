"""The cache gives back what was made, or makes it again: never something else, and never an error."""

import json
import os
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.data import cache, leaks, splits
from harness.data.spec import DatasetSpec, PartSpec
from harness.data.template import Example, Template, examples_hash

DATASET, PART = asdict(DatasetSpec()), asdict(PartSpec())

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
    for split in first.rows:
        assert examples_hash(again.rows[split]) == examples_hash(first.rows[split])
        assert [type(v) for v in vars(again.rows[split][0]).values()] == [
            type(v) for v in vars(first.rows[split][0]).values()
        ]
    drawn = cache.splits_of(world.dataset, world.locations)
    assert drawn == splits.make_splits(world.dataset, world.locations)
    assert first.sample == drawn.rows["test"]


def turns(*said: str) -> dict:
    roles = ["user", "assistant"] * len(said)
    return {"messages": [{"role": r, "content": s} for r, s in zip(roles, said, strict=False)]}


def learned_prompts(row) -> list[list[int]]:
    ids = list(row.prompt_ids)
    return [ids, *(ids[:start] for start in row.learned[::2])]


@pytest.mark.parametrize("opening", ["the dog sat on the house, and then it ran to the red cat {}.", "hi"])
@pytest.mark.parametrize("kind", ["chat", "instruction"])
def test_no_prompt_that_is_scored_is_answered_in_training(kind, opening, world):
    """Test conversations too long for max_length, whose first turns are other conversations."""
    world.dataset.update(train=60, test=30, parts=[{**PART, "name": "tiny", "format": "messages"}])
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [f"{a}{b}" for a in letters for b in letters][:90]
    openings = [opening.format(name) for name in names]
    long = [turns(text, "ok", f"and {name}? " * 60, "no") for text, name in zip(openings, names, strict=True)]
    short = [turns(text, "ok", f"say {name}", "no") for text, name in zip(openings, names[::-1], strict=True)]
    rows = [*long[:40], *short, *(turns(f"tell me all of {name} again", "no") for name in names)]
    world.write(rows)
    world.kind, world.max_length = kind, 96
    made = world.tokens()
    learned = [ids for row in made.rows["train"] for ids in learned_prompts(row)]
    for split in ("test", "validation"):
        assert made.rows[split] and not [row for row in made.rows[split] if list(row.prompt_ids) in learned]
        assert leaks.answered(made.rows[split], made.rows["train"]) == 0
    assert made.left_out["test_shortened"] > 2
    assert bool(made.left_out["test_answered"]) == (opening == "hi")


TEXTS = st.lists(st.text("ab", max_size=5), max_size=12)


@given(held=TEXTS, train=TEXTS)
def test_what_training_goes_through_is_found(held, train):
    rows = [[Example(str(i), "", text, "", tiny.array([]), tiny.array([])) for i, text in enumerate(texts, 1)]
            for texts in (held, [t for t in train if t])]  # fmt: skip
    kept = [row.prompt for row in leaks.unanswered(*rows) if row.prompt]
    assert kept == [text for text in held if text and not any(t.startswith(text) for t in train)]


@given(held=TEXTS, train=TEXTS, starts=st.lists(st.integers(0, 5), max_size=3))
def test_what_is_answered_is_counted(held, train, starts):
    def row(text, learned=()):
        spans = tiny.array(place for start in learned if start < len(text) for place in (start, start + 1))
        return Example("", "", "a prompt", "", tiny.array(map(ord, text)), tiny.array([1]), learned=spans)

    answered = {text[:start] for text in train for start in starts if start < len(text)} | set(train)
    found = leaks.answered([row(text) for text in held], [row(text, starts) for text in train])
    assert found == sum(text in answered for text in held)


def test_a_window_of_plain_text_is_not_learned_and_scored(world):
    world.dataset.update(train=2, validation=0, test=1, parts=[{**PART, "name": "tiny", "format": "text"}])
    world.dataset["near_duplicates"] = 0.0
    same = "the cat sat on the mat. " * 3
    world.write([{"text": same + f"{name} " * 40} for name in ("the first", "another", "the last")])
    world.max_length = 16
    made = world.tokens()
    learned = {(row.prompt_ids + row.response_ids).tobytes() for row in made.rows["train"]}
    assert not [r for r in made.rows["test"] if (r.prompt_ids + r.response_ids).tobytes() in learned]
    assert made.left_out["test_answered"] > 0


def test_a_plan_reads_the_source_for_the_run(world, monkeypatch):
    cache.splits_of(world.dataset, world.locations)
    monkeypatch.setattr(splits, "make_splits", None)  # called no more
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


@pytest.mark.parametrize("name", ["rows", "formats", "duplicates", "leaks", "splits", "template", "cache"])
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
