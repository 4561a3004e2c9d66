"""A raw row becomes a conversation, by the format of its dataset's spec, or is refused with a reason."""

import json
import re
from dataclasses import dataclass
from difflib import SequenceMatcher
from math import isfinite
from string import ascii_uppercase as LETTERS
from typing import NamedTuple

SYSTEM = ("system", "system_prompt")
CONTEXT = ("context", "passage", "article")
LABEL = ("label", "kto_tag")
FORMATS = {  # format -> field -> the columns it may be in, unless the spec says; the first that is not empty
    "pairs": {
        "prompt": ("prompt", "conversations", "instruction", "question"),
        "input": ("input",),
        "context": CONTEXT,
        "chosen": ("chosen",),
        "rejected": ("rejected",),
        "system": SYSTEM,
    },
    "messages": {
        "messages": ("messages", "conversations", "conversation"),
        "system": SYSTEM,
        "tools": ("tools",),
        "label": LABEL,
        "ground_truth": ("ground_truth",),
    },
    "instruction": {
        "instruction": ("instruction",),
        "input": ("input",),
        "context": CONTEXT,
        "output": ("output", "response"),
        "system": SYSTEM,
        "history": ("history",),
        "label": LABEL,
    },
    "prompt": {
        "prompt": ("prompt",),
        "context": CONTEXT,
        "completion": ("completion", "response"),
        "system": SYSTEM,
        "label": LABEL,
    },
    "question": {
        "question": ("question",),
        "context": CONTEXT,
        "choices": ("choices", "options", "endings"),
        "answer": ("answer", "answers", "answerKey", "response"),
        "system": SYSTEM,
        "label": LABEL,
    },
    "text": {"text": ("text", "content")},
}
OPTIONAL = {"input", "context", "choices", "system", "history", "tools", "label", "ground_truth"}
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "function_call": "assistant", "tool_call": "assistant", "tool": "tool",
    "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # of the roles above: what is said is a call, in JSON
WEIGHTS = ("weight", "train")  # of a message, OpenAI's name and Axolotl's: 0 or false is not learned
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # columns and keys of what is no text
PLACEHOLDER = re.compile(r"<(\|?)(image|video|audio)\1>")  # stands for one in a text, as in LLaVA's rows
TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of a message's part
MESSAGE_KEYS = {"role", "from", "content", "value", "tool_calls", "function_call", *WEIGHTS}  # that are read
ANSWER_KEYS = {"text", "label"}  # of choices and of several people's answers
VERDICTS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
ALIKE = 0.8  # likeness of two columns' names, 0 to 1, from which on they may be one: promt and prompt
EMPTY_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")  # before a text
FOLLOWS = {  # role -> the roles that may come before it
    "system": {None},
    "user": {None, "system", "assistant"},
    "assistant": {"user", "tool"},
    "tool": {"assistant"},
}


class Refused(Exception):
    """Why a row is not used: a reason to be counted by, and what is meant in this row."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclass
class Conversation:
    """`messages`: an optional system turn, then user, assistant, (user or tool), assistant, and so on; the
    last is the assistant's. Of a user's turn the `input` may stand apart; an earlier answer whose `learned`
    is False is read, not learned. A plain text is one assistant turn alone."""

    id: str  # part:digest, the same wherever the row stands in its source
    part: str
    messages: list[dict]
    rejected: str | None = None  # a worse last answer, where the row is a preference pair


def said(message: dict) -> str:
    """The whole text of a message, what stands apart included."""
    return "\n\n".join(filter(None, [message["content"], message.get("input")]))


def is_text(messages: list[dict]) -> bool:
    """Plain text to model, as a conversation has it: one message of the assistant, to no question."""
    return len(messages) == 1 and messages[0]["role"] == "assistant"


def learned(message: dict) -> bool:
    """Of an answer: its row may say that it is only to be read."""
    return message.get("learned", True)


# Columns


def detect(row: dict) -> str | None:
    """The first format all of whose fields a row has."""
    return next((name for name in FORMATS if not missing(row, name, {})), None)


def nearest(row: dict) -> tuple[str, dict[str, str]]:
    """-> the format that a row comes closest to, and of the fields that it lacks the columns that they may
    be in: of a like name, else in their order; "..." where there are not enough."""
    lacks = {name: missing(row, name, {}) for name in FORMATS}
    like = {name: {f: c for f in fields if (c := alike(row, name, f))} for name, fields in lacks.items()}
    has = {name: len(required(name)) - len(lacks[name]) + len(like[name]) for name in FORMATS}
    name = min(FORMATS, key=lambda name: (-has[name], len(lacks[name])))
    if not has[name]:  # no name is like ours, as in another language
        name = "text" if len(row) == 1 else "question"
    used = {*like[name].values(), *taken(row, name, {}).values()}
    rest = [column for column in row if column not in used]
    others = [field for field in lacks[name] if field not in like[name]]
    rest = rest if len(others) <= len(rest) else ["..."] * len(others)
    guess = like[name] | dict(zip(others, rest, strict=False))
    return name, {field: str(guess[field]) for field in lacks[name]}


def alike(row: dict, format: str, field: str) -> str | None:
    """The column whose name is most like those of a field, as Question or promt."""

    def likeness(column) -> float:
        names = FORMATS[format][field]
        return max(SequenceMatcher(None, str(column).casefold(), name.casefold()).ratio() for name in names)

    best = max(row, key=likeness, default="")
    return best if row and likeness(best) > ALIKE else None


def required(format: str) -> list[str]:
    return [field for field in FORMATS[format] if field not in OPTIONAL]


def missing(row: dict, format: str, mapped: dict) -> list[str]:
    wanted = [field for field in FORMATS[format] if field not in OPTIONAL or field in mapped]
    return [f for f in wanted if not any(column in row for column in columns(format, f, mapped))]


def columns(format: str, field: str, mapped: dict) -> tuple[str, ...]:
    return (mapped[field],) if field in mapped else FORMATS[format][field]


def taken(row: dict, format: str, mapped: dict) -> dict[str, str]:
    """Field -> the column that it is read from. A column that would say nothing is not taken."""
    held = {}
    for field in FORMATS[format]:
        there = [column for column in columns(format, field, mapped) if column in row]
        if there:
            held[field] = next((column for column in there if not empty(row[column])), there[0])
    value = {field: row[column] for field, column in held.items()}
    idle = []
    place = not empty(value.get("choices")) and type(value.get("label")) is not bool
    if place or judged(value.get("label")) is None or [*held.values()].count(held["label"]) > 1:
        idle = ["label"]  # a kind, a score or a choice, no verdict
    if format == "messages" and role_of_end(value.get("messages"), -1) != "user":  # it has its answer
        idle += ["ground_truth"]
    if format == "pairs" and all(
        role_of_end(value.get(side), 0) not in (None, "assistant") for side in ("chosen", "rejected")
    ):
        idle += ["prompt", "input", "context"]  # each is a whole conversation
    return {field: column for field, column in held.items() if field not in idle}


def unused(row: dict, part: dict) -> set[str]:
    """What a row holds and its conversation does not: columns, and `column.key` of what stands in one."""
    format = part["format"]
    row = gathered(row, part)
    held = taken(row, format, part["fields"])
    names = {column for column, value in row.items() if column not in held.values() and not empty(value)}
    for field, column in held.items():
        if field == "tools":  # they are written whole
            continue
        inner, known = row[column], ANSWER_KEYS if field in ("answer", "choices") else MESSAGE_KEYS
        for item in inner if isinstance(inner, list) else [inner]:
            if isinstance(item, dict):
                names |= {f"{column}.{key}" for key in item if key not in known and not empty(item[key])}
        if field == "answer" and len(several(inner)) > 1:
            names.add(f"{column}{'.text' * isinstance(inner, dict)} after the first")
    return {str(name).encode("utf-8", "backslashreplace").decode() for name in names}


def gathered(row: dict, part: dict) -> dict:
    """Choices that stand in the columns A, B, C... or choice1, choice2..., none mapped, as one column."""
    if part["format"] != "question" or "choices" in row:
        return row
    free = row.keys() - part["fields"].values()
    letters = [letter for letter in LETTERS if letter in free]
    numbered = [name for n in range(1, 10) if (name := f"choice{n}") in free]
    if letters[:2] == ["A", "B"]:
        choices = {"label": letters, "text": [row[letter] for letter in letters]}
    elif numbered[:2] == ["choice1", "choice2"]:
        letters, choices = numbered, [row[column] for column in numbered]
    else:
        return row
    return {column: row[column] for column in row if column not in letters} | {"choices": choices}


def empty(value) -> bool:
    """Null, NaN, no text and nothing in it."""
    return value is None or value != value or value in ([], {}) or (type(value) is str and not value.strip())


def listing(value) -> bool:
    """Whether it is a list of several texts, as choices are."""
    return isinstance(value, list) and len(value) > 1 and all(isinstance(item, str) for item in value)


def judged(label) -> bool | None:
    """Whether an answer is good, as KTO's rows say it; None for a label that is no verdict."""
    return VERDICTS.get(str(label).strip().casefold()) if isinstance(label, str | int | float) else None


def role_of(message) -> str | None:
    name = message.get("role") or message.get("from") if isinstance(message, dict) else None
    return ROLES.get(name.strip().casefold()) if isinstance(name, str) else None


def role_of_end(found, end: int) -> str | None:
    """Of the first message or the last; None for what is no list of messages."""
    return role_of(found[end]) if isinstance(found, list) and found else None


# A row


LEVELS = 64  # of lists in each other: no conversation has as many, and who walks through them recurses


def read_row(row, part: dict) -> tuple[list[dict], str | None]:
    """-> the messages of a row, and the worse last answer if it is a preference pair. Raises Refused."""
    if not isinstance(row, dict):
        raise Refused("not an object", f"a row is {type(row).__name__}")
    if None in row:  # where Python's csv puts them
        raise Refused("more cells than columns")
    format, mapped = part["format"], part["fields"]
    row = gathered(row, part)
    whole = format == "pairs" and not isinstance(row.get(mapped.get("chosen", "chosen")), str)
    if lacks := [field for field in missing(row, format, mapped) if not (whole and field == "prompt")]:
        other = detect(row)
        remedy = "Map it with fields = {...} in the spec"
        if other not in (None, format):
            remedy = f"These are columns of format {other!r}: is this the file that was meant?"
        raise Refused(
            "missing field",
            f"no field {mapped.get(lacks[0], lacks[0])!r} for format {format!r}; "
            f"a row has {', '.join(map(repr, row)) or 'none'}. {remedy}",
        )
    held = taken(row, format, mapped)
    if any(too_deep(row[column]) for field, column in held.items() if field != "label"):
        raise Refused("nested too deep")
    rest = {column: row[column] for column in row if column not in held.values()}
    text_alone(rest)
    value = {field: row[held[field]] if field in held else None for field in FORMATS[format]}
    if judged(value.get("label")) is False:
        raise Refused("labelled as bad")
    lists = [column for column in rest if listing(rest[column])]
    if lists and format == "question" and empty(value["choices"]) and type(value["answer"]) is int:
        place = f"{value['answer']}, perhaps in {lists[0]!r}: map it as choices, or drop that column"
        raise Refused("an answer by its place", place)
    return READERS[format](value)


def too_deep(value, levels: int = LEVELS) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(too_deep(item, levels - 1) for item in inside)


# Each format's fields become messages, and a worse answer


def instruction(value: dict) -> tuple[list[dict], None]:
    """A template may write the input of the last question apart."""
    turns = []
    history = [] if empty(value["history"]) else value["history"]
    for earlier in history if isinstance(history, list) else [history]:
        if not isinstance(earlier, list) or len(earlier) != 2:
            raise Refused("unreadable history", "it is a list of [question, answer]")
        turns += [Turn("user", asked(earlier[0])), answer(earlier[1])]
    text, more = asked(value["instruction"]), asked(value["input"], context=value["context"])
    turns += [Turn("user", text or more), answer(value["output"])]
    made = conversation(opened(turns, value["system"]))
    if text and more:
        made[-2]["input"] = more
    return made, None


def prompt(value: dict) -> tuple[list[dict], None]:
    turns = followed(prompted(value["prompt"], context=value["context"]), value["completion"])
    return conversation(opened(turns, value["system"])), None


def question(value: dict) -> tuple[list[dict], None]:
    lines, right = None, value["answer"]
    if not empty(value["choices"]):
        lines, right = chosen(value["choices"], right)
    else:
        right = next(iter(several(right)), None)
    turns = [Turn("user", asked(value["question"], lines, context=value["context"])), answer(right)]
    return conversation(opened(turns, value["system"])), None


def messages(value: dict) -> tuple[list[dict], None]:
    turns = opened(turns_of(value["messages"]), value["system"])
    if tools := listed(value["tools"]):
        system = [turns.pop(0).text] if turns and turns[0].role == "system" else []
        turns.insert(0, Turn("system", "\n\n".join([*system, tools])))
    if truth := text_of(value["ground_truth"]):
        if isinstance(json_value(truth), dict):  # the arguments of a check, as for instruction following
            raise Refused("no assistant turn", "its ground truth is a check, not an answer")
        turns.append(Turn("assistant", truth))
    return conversation(turns), None


def text(value: dict) -> tuple[list[dict], None]:
    return [{"role": "assistant", "content": plain(value["text"])}], None


def pairs(value: dict) -> tuple[list[dict], str]:
    turns = prompted(value["prompt"], value["input"], context=value["context"])
    better, worse = (
        conversation(opened(followed(turns, value[side]), value["system"])) for side in ("chosen", "rejected")
    )
    if better[:-1] != worse[:-1]:
        raise Refused("two prompts", "chosen and rejected differ before their last answers")
    if better == worse:
        raise Refused("equal answers", "chosen and rejected are the same")
    return better, worse[-1]["content"]


READERS = {made.__name__: made for made in (pairs, messages, instruction, prompt, question, text)}


# Turns


class Turn(NamedTuple):
    role: str
    text: str
    learned: bool = True


def opened(turns: list[Turn], system) -> list[Turn]:
    """With the system turn that stands in a column of its own."""
    if not (said := text_of(system)):
        return turns
    if not turns or turns[0].role != "system":
        return [Turn("system", said), *turns]
    if turns[0].text != said:
        raise Refused("two system turns", "a column's, and another in its messages")
    return turns


def followed(turns: list[Turn], said) -> list[Turn]:
    """A prompt with its answer: a text, a message, messages, or the whole conversation once more."""
    if isinstance(said, list | dict):
        found = turns_of(said if isinstance(said, list) else [said])
    else:
        found = [answer(said)]
    if not found or found[0].role != "assistant":
        return found
    if turns and turns[-1].role == "assistant":
        raise Refused("two answers", "the prompt ends with one, and another follows")
    return turns + found


def prompted(found, *more, context=None) -> list[Turn]:
    """A text, or messages that end with one."""
    if not isinstance(found, list):
        return [Turn("user", asked(found, *more, context=context))]
    turns = turns_of(found)
    if turns and turns[-1].role == "user":
        turns[-1] = Turn("user", asked(turns[-1].text, *more, context=context))
    elif asked(*more, context=context):
        raise Refused("no assistant turn", "a context or an input, but no question that it belongs to")
    return turns


def asked(*texts, context=None) -> str:
    """A user's text; a context stands before it, unless it is in there already."""
    found, before = "\n\n".join(filter(None, map(text_of, texts))), text_of(context)
    return found if before in found else "\n\n".join(filter(None, [before, found]))


def answer(content) -> Turn:
    return Turn("assistant", answered(content))


def several(found) -> list:
    """Several people's answers: a list of them, or of objects with each one's `text`, or as SQuAD has them.
    The first is the reference. A message's parts, which have a type, are one answer."""
    if isinstance(found, dict):
        texts = found.get("text")
        return texts if isinstance(texts, list) else [found]
    if not isinstance(found, list) or any(isinstance(item, dict) and "type" in item for item in found):
        return [found]
    return [[item] if isinstance(item, dict) else item for item in found]


def chosen(choices, right) -> tuple[str, str]:
    """-> the choices, a lettered line each, and the right one's: it is given by its place (from 0), its
    letter or its text. Choices are a list of texts, or the `text` of some with the `label` of each."""
    labelled = isinstance(choices, dict)
    texts = choices.get("text") if labelled else choices
    labels = choices.get("label") if labelled else LETTERS
    if not isinstance(texts, list) or not isinstance(labels, list | str) or not 1 < len(texts) <= len(labels):
        raise Refused("unreadable choices", "they are a list of texts, or of texts and their labels")
    labels, texts = [text_of(label) for label in labels], [text_of(text) for text in texts]
    if type(right) is int and not labelled:
        places = [right] if 0 <= right < len(texts) else []
    else:
        said = text_of(right)
        places = [i for i, names in enumerate(zip(labels, texts, strict=False)) if said in names]
    if len(places) != 1:
        raise Refused(f"the answer is {'two choices' if places else 'no choice'}", f"{right!r}"[:40])
    lines = [f"{label}. {text}" for label, text in zip(labels, texts, strict=False)]
    return "\n".join(lines), lines[places[0]]


def turns_of(found) -> list[Turn]:
    """Of messages in OpenAI's shape (role, content, tool_calls) or ShareGPT's (from, value)."""
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise Refused("not a list of messages")
    turns = []
    for message in found:
        text_alone(message)
        name = message.get("role") or message.get("from")
        role = role_of(message)
        if role is None:
            raise Refused("unknown role", f"{name!r}"[:40])
        content = message["content"] if "content" in message else message.get("value")
        text = {"assistant": answered, "user": asked}.get(role, text_of)(content)
        calls = message.get("tool_calls") or message.get("function_call") or []
        if str(name).strip().casefold() in CALLS:
            calls, text = json_value(text) or text, ""
        text = "\n".join(filter(None, [text, *map(call, calls if isinstance(calls, list) else [calls])]))
        turns.append(Turn(role, text, role != "assistant" or learns(message)))
    return turns


def learns(message: dict) -> bool:
    """False where a weight of 0 says that an answer is context alone."""
    weights = [message[name] for name in WEIGHTS if message.get(name) is not None]
    if any(isinstance(weight, str | list | dict) or weight not in (0, 1) for weight in weights):
        raise Refused("unreadable weight", "an answer's weight is 0 or 1")
    return all(weights)


def conversation(turns: list[Turn]) -> list[dict]:
    """Messages up to the last answer that is learned, turns of one role in a row joined. Raises Refused."""
    answers = [turn.learned for turn in turns if turn.role == "assistant"]
    if not any(answers):
        raise Refused("no answer to learn" if answers else "no assistant turn")
    while turns[-1].role != "assistant" or not turns[-1].learned:
        turns = turns[:-1]
    made = []
    for role, text, learned in turns:
        if held := PLACEHOLDER.search(text):
            raise Refused("not text alone", f"{held[0]} stands for {held[2]}")
        if not text and role != "tool":  # a tool may have nothing to say
            raise Refused("empty answer" if role == "assistant" else "empty prompt")
        before = made[-1]["role"] if made else None
        if role == before:
            if learned != made[-1].get("learned", True):
                raise Refused("two weights in one turn")
            made[-1]["content"] += "\n\n" + text
        elif before in FOLLOWS[role]:
            made.append({"role": role, "content": text} | ({} if learned else {"learned": False}))
        else:
            raise Refused("roles out of order", f"{role} {f'after {before}' if before else 'first'}")
    return made


# Texts


def plain(content) -> str:
    """A text as it stands, but for the line ends around it: an indentation belongs to code."""
    if not text_of(content):
        raise Refused("empty text")
    return raw(content).strip("\r\n")


def answered(content) -> str:
    """An answer as it stands, but for empty lines before it and spaces after it: it may begin indented."""
    return EMPTY_LINES.sub("", raw(content)).rstrip()


def text_of(content) -> str:
    return raw(content).strip()


def raw(content) -> str:
    """A message's text, its text parts joined; "" for none. Raises Refused for what is no text."""
    if content is None:
        return ""
    if isinstance(content, list):
        content = "".join(map(part_of, content))
    if isinstance(content, bool):
        raise Refused("not a text", f"{str(content).lower()}: write it out, as yes or no")
    if isinstance(content, float) and not isfinite(content):
        raise Refused("not a text", f"the number {content}")
    if isinstance(content, int | float):
        content = str(content)
    if not isinstance(content, str):
        raise Refused("not a text", f"a {type(content).__name__}")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair: legal in JSON, not in a text
        raise Refused("not a text", "half of a surrogate pair") from error
    return content


def part_of(part) -> str:
    """Of a message's content in parts, one."""
    if not isinstance(part, dict):
        raise Refused("not a text", f"a list of {type(part).__name__}")
    text_alone(part)
    if part.get("type") not in TEXT_PARTS:
        raise Refused("not text alone", f"a part of type {part['type']!r}"[:60])
    if not isinstance(part.get("text"), str):
        raise Refused("not a text", "a part without text")
    return part["text"]


def text_alone(found: dict) -> None:
    """Raises Refused where a row, a message or a part of one brings an image or a sound."""
    if held := [name for name in MEDIA if not empty(found.get(name))]:
        raise Refused("not text alone", held[0])


# Tools: calls and lists of them are text, as Hermes and Qwen write it


def call(made) -> str:
    """One call, its name and arguments in JSON, or as it stands where it is neither."""
    if isinstance(made, dict):
        made = made.get("function") or made
    if isinstance(made, dict):
        arguments = made.get("arguments")
        parsed = json_value(arguments) if isinstance(arguments, str) else arguments
        made = {"name": made.get("name"), "arguments": arguments if parsed is None else parsed}
    return f"<tool_call>\n{written(made)}\n</tool_call>"


def listed(tools) -> str:
    """The tools that a conversation may call, for its system turn."""
    value = json_value(tools) if isinstance(tools, str) else tools
    value = tools if value is None else value
    if empty(value) or value == "null":
        return ""
    if not isinstance(value, str | list | dict):
        raise Refused("unreadable tools", f"{value!r}"[:40])
    return f"<tools>\n{written(value)}\n</tools>"


def json_value(text: str):
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def written(value) -> str:
    if isinstance(value, str):
        return text_of(value)
    try:
        return text_of(json.dumps(value, ensure_ascii=False, default=str, allow_nan=False))
    except ValueError as error:
        raise Refused("not a text", "a call with NaN or an infinite number") from error
