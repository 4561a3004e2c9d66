"""What a row of a later split must not share with a held-out one, whatever either is shortened to.

A held-out row is scored at its last answer or, shortened, at an earlier one; training learns every answer.
So a later row is passed over where

- it answers what a held-out row is asked: an answer of each follows the same turns (`shared_turns`);
- it asks a held-out question in another place, or answers one by the same LONG words (`shared_questions`);
- PASSAGE words follow each other in it and in a held-out row, one of them or both plain text: what a
  conversation asks and answers may stand in a text, and the other way round (`shared_passages`);
- its prompt says nearly what a held-out one says, see harness.data.duplicates (`near_duplicates`).

System turns stand apart: another one does not make another question. No leak is what the user says in less
than OPENING words, a greeting; in less than LONG words, if it is but a turn of a held-out row ("yes, that
works for me"); and what rows answer in more than MANY ways, a form ("translate the text above"), unless a
held-out row asks it by itself (`questions`). A held-out row that is shortened to such a prompt, and training
goes through it, is itself left out, once all is tokens (`unanswered`). What is then learned and scored is
compared once more, token by token (`answered`).
"""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from itertools import chain

from harness.data.duplicates import MANY, Asked, Numbered, Seen, Words, words_of
from harness.data.formats import Conversation, is_text, said

OPENING = 4  # words: "how are you" is nobody's own question
LONG = 10  # words: "yes, that works for me, thank you" or "i need to find a doctor" may be said by chance
PASSAGE = 20  # words: more than a saying, a line of code or of a licence
WORDS = Words()
KINDS = {  # of a key -> as its leaks are counted
    "turns": "shared_turns", "question": "shared_questions", "answer": "shared_questions",
    "passage": "shared_passages", "quote": "shared_passages",
}  # fmt: skip
LEAKS = {  # as they are counted
    "shared_turns": "answer what a held-out row is asked, after the same turns",
    "shared_questions": "ask or answer in another place what a held-out row does",
    "shared_passages": "share a passage with a held-out row, one of them or both plain text",
    "near_duplicates": "ask nearly what a held-out row does",
}


class Held:
    """The rows of earlier splits. `among`: rows of the later one, to tell what is a form."""

    def __init__(self, rows: list[Conversation], among: list[Conversation], threshold: float):
        self.prompts = {prompt(row.messages) for row in rows}
        self.mixed = len({is_text(row.messages) for row in chain(rows, among)}) > 1
        self.keys = {key for row in rows for key, *_ in keys(row.messages, True, self.mixed)}
        ways: dict[tuple, set] = {key: set() for key in self.keys}
        for row in chain(rows, among):
            asked = self.mixed and not is_text(row.messages)
            for key, way, *_ in keys(row.messages, mixed=self.mixed):
                if key in ways and key[0] != "quote":
                    ways[key].add(way)
                # That texts repeat a quote makes no form of it: that conversations share it does.
                if asked and key[0] == "passage" and (quote := ("quote", key[1])) in ways:
                    ways[quote].add(way)
        forms = {key for key, found in ways.items() if len(found) > MANY}
        self.keys -= forms - questions(forms, rows, among)
        self.near = Seen(list(map(question, rows)), map(question, among), threshold) if threshold else None

    def leaks(self, rows: list[Conversation]) -> list[str | None]:
        """Which of LEAKS each row is, if any."""
        near = self.near.like(list(map(question, rows))) if self.near else [False] * len(rows)
        return [self.leak(row) or ("near_duplicates" if close else None)
                for row, close in zip(rows, near, strict=True)]  # fmt: skip

    def leak(self, row: Conversation) -> str | None:
        if prompt(row.messages) in self.prompts:
            return "shared_turns"
        own = {key for key, *_ in keys(row.messages, mixed=self.mixed)}
        found = {KINDS[kind] for kind, _ in self.keys & own}
        return next((leak for leak in LEAKS if leak in found), None)


def questions(forms: set, rows: list[Conversation], among: list[Conversation]) -> set:
    """Those of `forms` that are a held-out row's own question: the more ways training answers one, the more
    it leaks. A form is asked about something: with more than MANY inputs, of two held-out rows too,
    each of which stands before it alone, as a persona does not."""
    whole: set[tuple] = set()  # texts that are nothing but forms
    for row in rows:
        if is_text(row.messages) and (found := {key for key, *_ in keys(row.messages)}) <= forms:
            whole |= found
    asked: dict[tuple, set] = {}
    for key, _, given, own in (found for row in rows for found in keys(row.messages, held=True)):
        if own and key in forms:
            asked.setdefault(key, set()).add(given)
    if not asked:
        return whole
    after: dict[tuple, set] = {}  # kind and input -> what is asked about it
    for key, _, given, _ in (found for row in chain(rows, among) for found in keys(row.messages)):
        after.setdefault((key[0], given), set()).add(key)
    alone = {(kind, given) for (kind, given), found in after.items() if given and len(found) == 1}
    inputs = Counter(key for place in alone for key in after[place])
    return whole | {
        key for key, found in asked.items()
        if inputs[key] <= MANY or len(found) < 2 or not {(key[0], given) for given in found} <= alone
    }  # fmt: skip


def keys(
    messages: list[dict], held: bool = False, mixed: bool = False
) -> Iterator[tuple[tuple, bytes, bytes, bool]]:
    """What a row asks and answers, wherever it may be cut: one of KINDS with a digest; what tells one way to
    answer it from another; what else stands before it, if anything; whether it is asked last, and no small
    talk. The way of a passage, and of a short question with its answer ("thanks", "you are welcome"), is the
    row. `mixed`: there are texts and conversations. A passage is of a held-out text, which any row may have;
    a quote of a held-out conversation, which only a text must not have: two of these may be about one."""
    row, no_turns = digest(" ".join(map(said, messages))), is_text(messages)
    if no_turns or mixed:
        turns_said = (words_of(said(message)) for message in messages if message["role"] != "system")
        words = Numbered([[WORDS[word] for word in chain.from_iterable(turns_said)]])
        kinds = ["passage"] * (no_turns or not held) + ["quote"] * (mixed and no_turns != held)
        for passage in words.runs(PASSAGE)[1].tolist():
            yield from (((kind, passage), row, b"", False) for kind in kinds)
    turns, system, asked, told, before = hashlib.sha256(), "", "", 0, b""
    alone = sum(message["role"] == "user" for message in messages) == 1
    for place, message in enumerate(messages):
        text, role, last = normalised(said(message)), message["role"], message is messages[-1]
        if role == "assistant" and asked:
            if told >= (LONG if held and not last else OPENING):
                given = digest(f"{place} {system}") if system else b""
                yield ("turns", turns.digest()), digest(text), given, last and (alone or told >= LONG)
            if size(asked) >= (LONG if held and not alone else OPENING):
                yield ("question", digest(asked)), digest(text), before, last
            if size(text) >= LONG:
                yield ("answer", digest(f"{asked}\n{text}")), b"" if size(asked) >= LONG else row, b"", False
        elif role == "user":
            asked, told = text, told + size(text)
            before = digest(system + turns.hexdigest()) if place else b""
        if role == "system":
            system = text
        else:
            turns.update(f"{role}\n{text}\n".encode())


def size(text: str, most: int = LONG) -> int:
    """Words of a normalised text, counted as far as `most`."""
    return len(text.split(" ", most)[:most] if text.isascii() else words_of(text[: 10 * most])[:most])


def question(row: Conversation) -> Asked:
    """What nearness is told by: a system turn, often the same and long, would make all rows near."""
    *before, answer = row.messages
    if not before:
        return Asked(said(answer))
    return Asked(" ".join(said(m) for m in before if m["role"] != "system"), said(answer))


def prompt(messages: list[dict]) -> bytes:
    """A digest of the normalised prompt; of a plain text, of the text."""
    return digest(normalised(" ".join(map(said, messages[:-1] or messages))))


def normalised(text: str) -> str:
    """Equal for texts that differ in case, spacing and the punctuation around them alone."""
    return " ".join(text.casefold().split()).strip(" .,!?")


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# Rows of tokens


def unanswered(held: list, train: list) -> list:
    """The held-out rows without those whose prompt, as it is scored, begins a training row's."""
    prompts = sorted({row.prompt for row in held if row.prompt})
    shorter: list[int] = []  # the place of the longest other prompt that each begins with
    within: list[int] = []  # of those so far
    for i, text in enumerate(prompts):
        while within and not text.startswith(prompts[within[-1]]):
            within.pop()
        shorter.append(within[-1] if within else -1)
        within.append(i)
    begun = set()
    for row in train:
        i = bisect_right(prompts, row.prompt) - 1
        while i >= 0:  # what the row begins with, the prompt that sorts just before it begins with as well
            if row.prompt.startswith(prompts[i]):
                begun.add(prompts[i])
            i = shorter[i]
    learned = {scored(row) for row in train if not row.prompt}
    return [row for row in held if (row.prompt not in begun if row.prompt else scored(row) not in learned)]


def answered(held: list, train: list) -> int:
    """How many held-out rows are asked, token by token, what a training row learns to answer."""
    learned = {scored(row) for row in train}
    learned |= {row.prompt_ids[:start].tobytes() for row in train for start in row.learned[::2]}
    return sum(scored(row) in learned for row in held)


def scored(row) -> bytes:
    """The tokens of its prompt; of a plain text, of its window."""
    return (row.prompt_ids if row.prompt else row.prompt_ids + row.response_ids).tobytes()
