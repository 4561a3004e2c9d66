"""A dataset spec becomes conversations, then token ids, then batches in an order of their own.

A conversation is a prompt (all messages but the last) and a response (the last, an assistant's), on
which alone there is loss. The response's tokens are made apart from the prompt's, so that the text
trained on begins with exactly the tokens that generation starts from.
"""

import hashlib
import json
import random
import tomllib
from array import array
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from harness import ROOT
from harness.errors import unknown
from harness.metrics import REWARDS
from harness.rows import SUFFIXES, DataError, rows_of_file
from harness.spec import Hyperparams

FOLDER = ROOT / "datasets_spec"
SPLITS = ("test", "validation", "train")  # drawn in this order: more training rows leave the test alone
PART = {  # what a part of a dataset says, and what holds where it is silent
    "name": "", "title": "", "hub": "", "path": "", "split": "train", "revision": "", "licence": "",
    "format": "instruction", "fields": {}, "mapping": "",
}  # fmt: skip
DATASET = {
    "name": "", "title": "", "notice": "", "template": "auto", "seed": 0, "language": "en",
    "reward": "rouge_l",
    "train": 1000, "validation": 64, "test": 200,
}  # fmt: skip
FORMATS = {  # format -> the fields it reads, each with the column it is in unless the spec says otherwise
    "instruction": {"instruction": "instruction", "input": "input", "output": "output"},
    "messages": {"messages": "messages"},
    "pairs": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
}
WINDOW = 16  # batches sorted by length together: most of the padding gone, the order still random


# Specs


def available() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_spec(name: str, overrides: dict) -> dict:
    """The whole spec of a dataset: `name` is one of `available()`, a TOML file, or a file of rows.

    `overrides` replaces top-level values. Raises DataError with everything that is wrong.
    """
    path = Path(name)
    if path.suffix in SUFFIXES:
        if not path.is_file():
            raise DataError(f"there is no dataset file {path}")
        first = next(iter(rows_of_file(path)), {})
        shape = "messages" if "messages" in first else "instruction"
        part = {"name": path.stem, "title": path.stem, "path": path.name, "format": shape}
        spec = {"name": path.stem, "title": path.name, "parts": [part]}
    else:
        spec = read_toml(path if path.suffix == ".toml" else FOLDER / f"{name}.toml", name)
    parts = spec.pop("parts", None) or [spec.pop("part", {})]
    for mixed in spec.pop("mixture", []):
        parts = [p for p in parts if p] + load_spec(mixed, {})["parts"]
    errors = [unknown(f"key in dataset {name}", key, DATASET) for key in set(spec) - set(DATASET)]
    settable = set(DATASET) - {"name", "title", "notice"}
    errors += [unknown("data option", key, settable) for key in set(overrides) - settable]
    for part in parts:
        errors += [unknown(f"key in a part of dataset {name}", key, PART) for key in set(part) - set(PART)]
        if part.get("format", "instruction") not in FORMATS:
            errors.append(unknown("format", part["format"], FORMATS))
    if errors:
        raise DataError("\n".join(errors))
    spec = {**DATASET, "name": name, **spec, **overrides}
    for key, default in DATASET.items():
        if type(spec[key]) is not type(default):
            errors.append(f"data.{key}: must be like {default!r}, not {spec[key]!r}")
    errors += [f"data.{s}: must be at least {int(s != 'validation')}, not {spec[s]}"
               for s in SPLITS if isinstance(spec[s], int) and spec[s] < (s != "validation")]  # fmt: skip
    for key, choices in (("template", ("auto", "chat", "instruction")), ("reward", REWARDS)):
        if spec[key] not in choices:
            errors.append(unknown(key, str(spec[key]), choices))
    if errors:
        raise DataError("\n".join(errors))
    return {**spec, "parts": [{**PART, **part} for part in parts]}


def read_toml(path: Path, name: str) -> dict:
    if not path.is_file():
        raise DataError(unknown("dataset", name, available()) + f", or a .toml or {', '.join(SUFFIXES)} file")
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not TOML: {error}") from error


# Rows


def rows_of_part(part: dict, location: str | None):
    """Raw rows of a part: from where it lies on this machine, else from the hub."""
    if location:
        yield from rows_of_file(Path(location))
        return
    import datasets

    yield from datasets.load_dataset(part["hub"], split=part["split"], revision=part["revision"] or None)


def messages_of(row: dict, part: dict) -> list[dict] | None:
    """The conversation of a row, or None if it has no answer to learn from.

    Raises DataError for a row that lacks a field of its format.
    """
    columns = {**FORMATS[part["format"]], **part["fields"]}
    optional = {"input"}
    missing = [c for field, c in columns.items() if c not in row and field not in optional]
    if missing:
        raise DataError(
            f"part {part['name']}: no field {missing[0]!r} for format {part['format']!r}; "
            f"a row has {', '.join(map(repr, row))}. Map it with fields = {{...}} in the spec"
        )
    value = {field: row.get(column) for field, column in columns.items()}
    if part["format"] == "instruction":
        asked = [text_of(value["instruction"]), text_of(value["input"])]
        turns = [("user", "\n\n".join(filter(None, asked))), ("assistant", text_of(value["output"]))]
    elif part["format"] == "pairs" and isinstance(value["chosen"], str):
        turns = [("user", text_of(value["prompt"])), ("assistant", text_of(value["chosen"]))]
    else:
        found = value["chosen" if part["format"] == "pairs" else "messages"]
        if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
            return None
        turns = [(message.get("role"), text_of(message.get("content"))) for message in found]
        while turns and turns[-1][0] != "assistant":
            turns.pop()
    spoken = turns[1:] if turns and turns[0][0] == "system" else turns
    alternating = [role for role, _ in spoken] == ["user", "assistant"] * (len(spoken) // 2)
    if not spoken or not alternating or not all(text for _, text in turns):
        return None
    return [{"role": role, "content": text} for role, text in turns]


def rejected_of(row: dict, part: dict) -> str | None:
    """The worse answer of a preference pair; None where the row has none to learn from."""
    if part["format"] != "pairs":
        return None
    found = row.get(part["fields"].get("rejected", "rejected"))
    if isinstance(found, list) and found and isinstance(found[-1], dict):
        found = found[-1].get("content")
    return text_of(found) or None


def text_of(content) -> str | None:
    """A message's text, its text parts joined; None for what is no text, or cannot be encoded."""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if isinstance(content, int | float):
        content = str(content)
    if not isinstance(content, str):
        return None
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair: legal in JSON, not in a text
        return None
    return content.strip()


@dataclass
class Conversation:
    id: str  # part:digest, the same wherever the row stands in its source
    part: str
    messages: list[dict]
    rejected: str | None = None  # a worse last answer, where the row is a preference pair


def splits(dataset: dict, locations: dict) -> tuple[dict[str, list[Conversation]], dict[str, int]]:
    """split -> conversations, disjoint, the rows of all parts mixed; and what was left out, counted.

    A row's place is decided by a hash of the seed and its text: the order of the source does not
    matter. Of rows with the same prompt one is kept. Raises DataError if there are too few.
    """
    chosen = {split: [] for split in SPLITS}
    counts = {"unusable": 0, "duplicates": 0}
    seen = set()
    for part in dataset["parts"]:
        rows = []
        for row in rows_of_part(part, locations.get(part["name"])):
            if not isinstance(row, dict):
                raise DataError(f"part {part['name']}: a row is {type(row).__name__}, not an object")
            messages, rejected = messages_of(row, part), rejected_of(row, part)
            if messages and (rejected or part["format"] != "pairs"):
                said = [dataset["seed"], messages] + [rejected] * bool(rejected)
                text = json.dumps(said, ensure_ascii=False, sort_keys=True)
                rows.append((hashlib.sha256(text.encode()).hexdigest(), messages, rejected))
            else:
                counts["unusable"] += 1
        distinct = []
        for key, messages, rejected in sorted(rows, key=lambda row: row[0]):
            prompt = normalised(messages[:-1])
            if prompt in seen:
                counts["duplicates"] += 1
                continue
            seen.add(prompt)
            distinct.append(Conversation(f"{part['name']}:{key[:12]}", part["name"], messages, rejected))
        wanted = sum(dataset[split] for split in SPLITS)
        if len(distinct) < wanted:
            raise DataError(
                f"part {part['name']}: {wanted} rows are asked for ({describe(dataset)}), but it has "
                f"{len(distinct)} distinct usable ones. Ask for fewer with --set data.train=... "
            )
        start = 0
        for split in SPLITS:
            chosen[split] += distinct[start : start + dataset[split]]
            start += dataset[split]
    for split in SPLITS:  # mix the parts, by the same hash
        chosen[split].sort(key=lambda c: c.id.rpartition(":")[2])
    return chosen, counts


def describe(dataset: dict) -> str:
    return ", ".join(f"{dataset[split]} {split}" for split in reversed(SPLITS))


def normalised(messages: list[dict]) -> str:
    """Equal for prompts that differ in case, spacing and the punctuation around them alone."""
    return " ".join(" ".join(m["content"] for m in messages).casefold().split()).strip(" .,!?")


# Tokens


@dataclass
class Row:
    """One conversation as token ids: what the model reads, and what it should answer."""

    id: str
    part: str
    prompt: str
    reference: str
    prompt_ids: array  # of int32
    response_ids: array  # ends with the token that ends a turn, unless cut
    cut: int = 0  # tokens of the response that max_length took
    rejected_ids: array | None = None  # a worse response, where the row is a preference pair

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class Template:
    """Turns messages into text: the model's own chat template, or the Instruction/Response form."""

    def __init__(self, tokenizer, kind: str):
        if kind == "chat" and not tokenizer.chat_template:
            raise DataError("this tokenizer has no chat template: use --set data.template=instruction")
        self.tokenizer = tokenizer
        self.kind = "chat" if tokenizer.chat_template and kind != "instruction" else "instruction"

    def render(self, messages: list[dict]) -> tuple[str, str]:
        """-> prompt text, response text with the mark that ends it."""
        if self.kind == "instruction":
            return instruction_form(messages[:-1]), messages[-1]["content"] + self.tokenizer.eos_token
        from jinja2 import TemplateError

        try:
            prompt = self.tokenizer.apply_chat_template(
                messages[:-1], add_generation_prompt=True, tokenize=False
            )
            whole = self.tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise DataError(
                f"the model's chat template refuses a conversation ({error}): "
                "use --set data.template=instruction"
            ) from error
        if not whole.startswith(prompt):
            raise DataError(
                "this chat template writes a prompt otherwise than the start of the conversation: "
                "use --set data.template=instruction"
            )
        return prompt, whole[len(prompt) :].rstrip()  # nothing after the mark is learned

    def row(self, conversation: Conversation, max_length: int) -> Row | None:
        """None if the prompt alone fills max_length; a response is cut to what is left."""
        prompt, response = self.render(conversation.messages)
        # A chat template writes <bos> itself; the instruction form takes what the tokenizer adds.
        prompt_ids = self.tokenizer(prompt, add_special_tokens=self.kind == "instruction").input_ids
        if self.kind == "instruction" and prompt_ids and prompt_ids[-1] == self.tokenizer.eos_token_id:
            prompt_ids = prompt_ids[:-1]
        response_ids = self.response_ids(response)
        if len(prompt_ids) >= max_length:
            return None
        rejected = None
        if conversation.rejected:
            worse = [*conversation.messages[:-1], {"role": "assistant", "content": conversation.rejected}]
            rejected = self.response_ids(self.render(worse)[1])[: max_length - len(prompt_ids)]
        return Row(
            conversation.id,
            conversation.part,
            prompt,
            conversation.messages[-1]["content"],
            array("i", prompt_ids),
            response_ids[: max_length - len(prompt_ids)],
            max(0, len(prompt_ids) + len(response_ids) - max_length),
            rejected,
        )

    def response_ids(self, text: str) -> array:
        return array("i", self.tokenizer(text, add_special_tokens=False).input_ids)


def instruction_form(messages: list[dict]) -> str:
    """The `### Instruction / ### Response` form; earlier turns are written out before the last."""
    names = {"user": "Instruction", "assistant": "Response", "system": "System"}
    turns = [f"### {names[m['role']]}:\n{m['content']}\n\n" for m in messages]
    return "".join(turns) + "### Response:\n"


def tokenize(conversations: list[Conversation], template: Template, max_length: int):
    """-> rows; how many lost the end of their response; how many were left out, prompt too long."""
    rows = [template.row(c, max_length) for c in conversations]
    kept = [row for row in rows if row]
    return kept, sum(row.cut > 0 for row in kept), len(rows) - len(kept)


def rows_hash(rows: list[Row]) -> str:
    total = hashlib.sha256()
    for row in rows:
        total.update(row_bytes(row))
    return total.hexdigest()[:16]


def row_bytes(row: Row) -> bytes:
    parts = [row.prompt_ids, row.response_ids, *([row.rejected_ids] if row.rejected_ids else [])]
    lengths = array("i", [len(part) for part in parts])
    return b"".join(part.tobytes() for part in (lengths, *parts))


# Batches


class Batches:
    """The optimizer steps of a training, each a list of micro-batches; can be iterated again.

    The order comes from the seed alone, never from the global random state, so that it is the same
    for every method whatever a method draws. `decoder` is the harness's own, for a method that
    trains on answers of the model.
    """

    def __init__(self, rows: list[Row], hp: Hyperparams, seed: int, pad_id: int, device, decoder=None):
        self.rows, self.hp, self.pad_id, self.device = rows, hp, pad_id, device
        self.decoder = decoder
        self.steps = list(order([row.length for row in rows], hp, seed))  # row indices of each
        self.hashes = [rows_hash([rows[i] for i in step]) for step in self.steps]
        self.tokens = [sum(rows[i].length for i in step) for step in self.steps]

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self):
        size = self.hp.micro_batch_size
        for step in self.steps:
            chosen = [self.rows[i] for i in step]
            yield [self.collate(chosen[i : i + size]) for i in range(0, len(chosen), size)]

    def collate(self, rows: list[Row]) -> dict:
        return collate(rows, self.pad_id, self.device)


def order(lengths: list[int], hp: Hyperparams, seed: int):
    """Row indices of each optimizer step, a fresh order every epoch.

    Rows are shuffled, sorted by length within windows of some batches, and the batches shuffled
    again: rows of a batch are about as long, and little is padded. The epoch's last rows, too few
    for a batch, are a step of their own.
    """
    steps = hp.max_steps or ceil(hp.epochs * ceil(len(lengths) / hp.batch_size))
    epoch = 0
    while steps > 0 and lengths:
        draw = random.Random(f"data order, seed {seed}, epoch {epoch}")
        indices = list(range(len(lengths)))
        draw.shuffle(indices)
        window = WINDOW * hp.batch_size
        grouped = []
        for start in range(0, len(indices), window):
            grouped += sorted(indices[start : start + window], key=lambda i: lengths[i])
        batches = [grouped[i : i + hp.batch_size] for i in range(0, len(grouped), hp.batch_size)]
        draw.shuffle(batches)
        yield from batches[:steps]
        steps -= len(batches)
        epoch += 1


def collate(rows: list[Row], pad_id: int, device) -> dict:
    """Right-padded input_ids, attention_mask and labels, each (B, T), labels only on the response;
    prompt_lengths (B,); and the rows themselves."""
    import torch

    longest = max(row.length for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), -100)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        p, n = len(row.prompt_ids), row.length
        ids[i, :n] = torch.tensor(list(row.prompt_ids) + list(row.response_ids))
        labels[i, p:n] = ids[i, p:n]
        mask[i, :n] = 1
    lengths = torch.tensor([len(row.prompt_ids) for row in rows])
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels, "prompt_lengths": lengths}
    return {
        "rows": rows, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    }  # fmt: skip


def batches_of(rows: list[Row], size: int) -> list[list[Row]]:
    """Longest first, so that a batch has little padding and the largest comes at the start."""
    by_length = sorted(rows, key=lambda row: row.length, reverse=True)
    return [by_length[i : i + size] for i in range(0, len(by_length), size)]
