"""A raw row becomes a conversation, by the format of its dataset's spec, or is refused with a reason."""

import json
from dataclasses import dataclass

FORMATS = {  # format -> field -> the columns it may be in, unless the spec says; the first there is holds
    "pairs": {
        "prompt": ("prompt", "conversations", "instruction", "question"),
        "input": ("input",),
        "chosen": ("chosen",),
        "rejected": ("rejected",),
    },
    "messages": {
        "messages": ("messages", "conversations", "conversation"),
        "tools": ("tools",),
        "label": ("label",),
        "ground_truth": ("ground_truth",),
    },
    "instruction": {
        "instruction": ("instruction",),
        "input": ("input",),
        "output": ("output",),
        "system": ("system",),
        "history": ("history",),
    },
    "prompt": {
        "prompt": ("prompt",),
        "completion": ("completion", "response"),
        "system": ("system",),
        "label": ("label",),
    },
    "question": {"question": ("question",), "answer": ("answer",)},
    "text": {"text": ("text", "content")},
}
OPTIONAL = {"input", "system", "history", "tools", "label", "ground_truth"}
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "function_call": "assistant", "tool_call": "assistant", "tool": "tool",
    "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # of the roles above: what is said is a call, in JSON
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
    last is the assistant's. Of a user's turn the `input` may stand apart. A plain text is one assistant
    turn alone."""

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


def detect(row: dict) -> str | None:
    """The first format all of whose fields a row has."""
    return next((name for name in FORMATS if not missing(row, name, {})), None)


def nearest(row: dict) -> tuple[str, list[str]]:
    """-> the format that a row comes closest to, and the fields that it lacks."""
    lacks = {name: missing(row, name, {}) for name in FORMATS}
    has = {name: len(required(name)) - len(fields) for name, fields in lacks.items()}
    name = min(FORMATS, key=lambda name: (-has[name], len(lacks[name])))
    return name, lacks[name]


def required(format: str) -> list[str]:
    return [field for field in FORMATS[format] if field not in OPTIONAL]


def missing(row: dict, format: str, mapped: dict) -> list[str]:
    return [f for f in required(format) if not any(column in row for column in columns(format, f, mapped))]


def columns(format: str, field: str, mapped: dict) -> tuple[str, ...]:
    return (mapped[field],) if field in mapped else FORMATS[format][field]


def read(row, part: dict) -> tuple[list[dict], str | None]:
    """-> the messages of a row, and the worse last answer if it is a preference pair. Raises Refused."""
    if not isinstance(row, dict):
        raise Refused("not an object", f"a row is {type(row).__name__}")
    format, mapped = part["format"], part["fields"]
    whole = format == "pairs" and not isinstance(row.get(mapped.get("chosen", "chosen")), str)
    if lacks := [field for field in missing(row, format, mapped) if not (whole and field == "prompt")]:
        raise Refused(
            "missing field",
            f"no field {mapped.get(lacks[0], lacks[0])!r} for format {format!r}; "
            f"a row has {', '.join(map(repr, row)) or 'none'}. Map it with fields = {{...}} in the spec",
        )
    value = {}
    for field in FORMATS[format]:
        found = [column for column in columns(format, field, mapped) if column in row]
        value[field] = row[found[0]] if found else None
    if str(value.get("label")).casefold() in ("false", "0"):
        raise Refused("labelled as bad")
    try:
        if format == "pairs":
            return pair(value)
        if format == "instruction":
            return instruction(value), None
        if format == "text":
            return [{"role": "assistant", "content": plain(value["text"])}], None
        return conversation(TURNS[format](value)), None
    except RecursionError as error:
        raise Refused("nested too deep") from error


# Each format's fields become turns: (role, text)


def instruction(value: dict) -> list[dict]:
    """Its messages: a template may write the input of the last question apart."""
    turns = [("system", system)] if (system := text_of(value["system"])) else []
    history = value["history"] or []
    for earlier in history if isinstance(history, list) else [history]:
        if not isinstance(earlier, list) or len(earlier) != 2:
            raise Refused("unreadable history", "it is a list of [question, answer]")
        turns += [("user", text_of(earlier[0])), ("assistant", text_of(earlier[1]))]
    text, more = text_of(value["instruction"]), text_of(value["input"])
    made = conversation([*turns, ("user", text or more), answer(value["output"])])
    if text and more:
        made[-2]["input"] = more
    return made


def prompt(value: dict) -> list[tuple[str, str]]:
    turns = [("system", system)] if (system := text_of(value["system"])) else []
    return turns + followed(prompted(value["prompt"]), value["completion"])


def question(value: dict) -> list[tuple[str, str]]:
    return [("user", asked(value["question"])), answer(value["answer"])]


def messages(value: dict) -> list[tuple[str, str]]:
    turns = turns_of(value["messages"])
    if tools := listed(value["tools"]):
        system = [turns.pop(0)[1]] if turns and turns[0][0] == "system" else []
        turns.insert(0, ("system", "\n\n".join([*system, tools])))
    truth = text_of(value["ground_truth"])
    if truth and turns and turns[-1][0] == "user":
        if isinstance(json_value(truth), dict):  # the arguments of a check, as for instruction following
            raise Refused("no assistant turn", "its ground truth is a check, not an answer")
        turns.append(("assistant", truth))
    return turns


TURNS = {"prompt": prompt, "question": question, "messages": messages}


def pair(value: dict) -> tuple[list[dict], str]:
    turns = prompted(value["prompt"], value["input"])
    better, worse = (conversation(followed(turns, value[side])) for side in ("chosen", "rejected"))
    if better[:-1] != worse[:-1]:
        raise Refused("two prompts", "chosen and rejected differ before their last answers")
    if better == worse:
        raise Refused("equal answers", "chosen and rejected are the same")
    return better, worse[-1]["content"]


def followed(turns: list[tuple[str, str]], said) -> list[tuple[str, str]]:
    """A prompt with its answer: a text, a message, messages, or the whole conversation once more."""
    if not isinstance(said, list | dict):
        return [*turns, answer(said)]
    found = turns_of(said if isinstance(said, list) else [said])
    return turns + found if found and found[0][0] == "assistant" else found


def prompted(found, more=None) -> list[tuple[str, str]]:
    return turns_of(found) if isinstance(found, list) else [("user", asked(found, more))]


def asked(*texts) -> str:
    return "\n\n".join(filter(None, map(text_of, texts)))


def answer(content) -> tuple[str, str]:
    return "assistant", text_of(content)


def turns_of(found) -> list[tuple[str, str]]:
    """Of messages in OpenAI's shape (role, content, tool_calls) or ShareGPT's (from, value)."""
    if not isinstance(found, list) or not all(isinstance(message, dict) for message in found):
        raise Refused("not a list of messages")
    turns = []
    for message in found:
        name = message.get("role") or message.get("from")
        role = ROLES.get(str(name).strip().casefold())
        if role is None:
            raise Refused("unknown role", f"{name!r}"[:40])
        text = text_of(message["content"] if "content" in message else message.get("value"))
        calls = message.get("tool_calls") or message.get("function_call") or []
        if str(name).strip().casefold() in CALLS:
            calls, text = json_value(text) or text, ""
        turns.append((role, "\n".join(filter(None, [text, *map(call, listed_calls(calls))]))))
    return turns


# Texts


def conversation(turns: list[tuple[str, str]]) -> list[dict]:
    """Messages up to the last answer, turns of one role in a row joined. Raises Refused."""
    while turns and turns[-1][0] != "assistant":
        turns = turns[:-1]
    if not turns:
        raise Refused("no assistant turn")
    made = []
    for role, text in turns:
        if not text and role != "tool":  # a tool may have nothing to say
            raise Refused("empty answer" if role == "assistant" else "empty prompt")
        before = made[-1]["role"] if made else None
        if role == before:
            made[-1]["content"] += "\n\n" + text
        elif before in FOLLOWS[role]:
            made.append({"role": role, "content": text})
        else:
            raise Refused("roles out of order", f"{role} {f'after {before}' if before else 'first'}")
    return made


def plain(content) -> str:
    """A text as it stands, but for the line ends around it: an indentation belongs to code."""
    if not text_of(content):
        raise Refused("empty text")
    return content.strip("\r\n") if isinstance(content, str) else text_of(content)


def text_of(content) -> str:
    """A message's text, its text parts joined; "" for none. Raises Refused for what is no text."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if isinstance(content, int | float):
        content = str(content)
    if not isinstance(content, str):
        raise Refused("not a text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair: legal in JSON, not in a text
        raise Refused("not a text", "half of a surrogate pair") from error
    return content.strip()


# Tools: calls and lists of them are text, as Hermes and Qwen write it


def listed_calls(calls) -> list:
    return calls if isinstance(calls, list) else [calls]


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
    return (
        f"<tools>\n{written(value if value is not None else tools)}\n</tools>"
        if value or (value is None and tools)
        else ""
    )


def json_value(text: str):
    """None for what is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def written(value) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text_of(text)
