"""A raw row becomes a conversation, by the format that its dataset's spec names."""

from dataclasses import dataclass

from harness.rows import DataError

FORMATS = {  # format -> the fields it reads, each with the column it is in unless the spec says otherwise
    "instruction": {"instruction": "instruction", "input": "input", "output": "output"},
    "messages": {"messages": "messages"},
    "pairs": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
}


@dataclass
class Conversation:
    id: str  # part:digest, the same wherever the row stands in its source
    part: str
    messages: list[dict]
    rejected: str | None = None  # a worse last answer, where the row is a preference pair


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
