"""How an answer ends, as far as its text tells: with nothing said, in a loop, as the user, in template marks.

A run keeps the text of an answer without its special tokens: where a mark was one, the role's name that stood
behind it is left.
"""

from collections.abc import Mapping, Sequence

LOOP = 24  # characters, at the least, of a phrase said again and again: "1,000,000,000" and "hahaha" are none
TIMES = 3  # that it is said
LOST = 2  # characters between two phrases, a paragraph's end at the most, that an answer has lost at its end
PROBE = 8  # last characters, which a phrase that is said again has brought before
TAIL = 4096  # last characters that are looked at: phrases of up to a third of it
USER_TURNS = {  # by their first character, of which most texts have few
    "\n": ("\nuser\n", "\nUser:", "\nUSER:", "\nHuman:", "\n### Instruction", "\n### Human", "\n### User"),
    "<": ("<start_of_turn>user", "<|im_start|>user", "<|start_header_id|>user", "<|user|>", "<｜User｜>"),
    "[": ("[INST]",),
}
MARKS = {
    "\n": ("\nuser\n", "\nmodel\n", "\nassistant\n"),
    "#": ("### Instruction:", "### Input:", "### Response:"),
    "<": (
        "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>",
        "<|end_header_id|>", "<|eot_id|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>",
        "<|end|>", "<｜", "<<SYS>>", "</s>", "<bos>", "<eos>", "<pad>",
    ),
    "[": ("[INST]", "[/INST]"),
}  # fmt: skip


def empty(text: str) -> bool:
    return not text or text.isspace()


def loops(text: str) -> bool:
    """Whether it ends in a phrase said TIMES times or more, over at least LOOP characters."""
    text = text[-TAIL:].rstrip()
    size, probe = len(text), text[-PROBE:]
    if size < LOOP:
        return False
    longest = (size + LOST) // TIMES
    at = text.find(probe, size - PROBE - longest, size - 1)
    while at >= 0:  # as long as a phrase would be, if it is one
        phrase = size - PROBE - at
        said = max(TIMES * phrase - LOST, LOOP)
        if text.endswith(text[size - said + phrase :], 0, size - phrase):
            return True
        at = text.find(probe, at + 1, size - 1)
    return False


def as_user(text: str) -> bool:
    return holds(text, USER_TURNS)


def marks(text: str) -> bool:
    return holds(text, MARKS)


def holds(text: str, written: Mapping[str, Sequence[str]]) -> bool:
    """Whether any of these is in it; its first and last line are lines like the others."""
    text = f"\n{text}\n"
    for first, marks in written.items():
        if first in text:
            for mark in marks:
                if mark in text:
                    return True
    return False
