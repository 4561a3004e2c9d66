"""One conversation in each form that a model could be taught it in: how many tokens, which of them are
special, and what the loss covers."""

from collections import Counter
from itertools import groupby
from statistics import fmean

from harness.data.formats import Conversation, said
from harness.data.template import Template, is_text
from harness.errors import BadRequest

SAMPLE = 100  # conversations that the means are over
READABLE = 1200  # characters of the conversation that is shown, if one is so short
UNCUT = 2**31


def study(tokenizer, conversations: list[Conversation], loss: str = "all") -> dict:
    """As JSON values; empty where there is no chat template to study, or no conversation.

    `id`, `rows` (that the means are over), and `forms`: name -> tokens, learned, special (token -> how
    often), mean_tokens, mean_learned and pieces, see `pieces`.
    """
    sample = [c for c in conversations if not is_text(c.messages)][:SAMPLE]
    if not tokenizer.chat_template or not sample:
        return {}
    written = {}
    for conversation in sample:
        try:
            written[conversation.id] = {
                name: form(tokenizer, conversation, loss) for name, form in FORMS.items()
            }
        except BadRequest:  # the chat template refuses it: counted with the rows themselves
            continue
    known = [c for c in sample if c.id in written]
    if not known:
        return {}
    chosen = min(known, key=lambda c: (size(c) > READABLE, -len({m["role"] for m in c.messages}),
                                       len(c.messages) < 3))  # fmt: skip
    special = special_ids(tokenizer)
    forms = {}
    for name, (ids, learned) in written[chosen.id].items():
        all_rows = [forms_of[name] for forms_of in written.values()]
        forms[name] = {
            "tokens": len(ids),
            "learned": sum(learned),
            "special": dict(Counter(tokenizer.convert_ids_to_tokens([i for i in ids if i in special]))),
            "mean_tokens": fmean(len(row) for row, _ in all_rows),
            "mean_learned": fmean(sum(flags) for _, flags in all_rows),
            "pieces": pieces(tokenizer, ids, learned),
        }
    return {"id": chosen.id, "rows": len(known), "forms": forms}


def size(conversation: Conversation) -> int:
    return sum(len(said(message)) for message in conversation.messages)


# The forms: each gives the ids of a conversation, and of each whether it is learned


def raw(tokenizer, conversation: Conversation, loss: str) -> tuple[list[int], list[bool]]:
    """As a base model is trained: the texts one after the other, all of them learned."""
    text = "\n\n".join(map(said, conversation.messages))
    alone = Conversation("", "", [{"role": "assistant", "content": text}])
    return tokens_of(Template(tokenizer, "instruction").windows(alone, UNCUT)[0])


def templated(kind: str):
    def form(tokenizer, conversation: Conversation, loss: str):
        counts: Counter[str] = Counter()
        rows = Template(tokenizer, kind, loss).examples([conversation], UNCUT, counts)
        if not rows:
            raise BadRequest(f"{conversation.id} cannot be written in the {kind} form")
        return tokens_of(rows[0])

    return form


FORMS = {
    "raw text": raw,
    "instruction form": templated("instruction"),
    "chat template": templated("chat"),
}


# What is shown of a row


def tokens_of(row) -> tuple[list[int], list[bool]]:
    """A row's ids, and of each whether training learns it."""
    learned = [False] * len(row.prompt_ids) + [True] * len(row.response_ids)
    for start, stop in zip(row.learned[::2], row.learned[1::2], strict=True):
        learned[start:stop] = [True] * (stop - start)
    return [*row.prompt_ids, *row.response_ids], learned


def pieces(tokenizer, ids: list[int], learned: list[bool]) -> list[list]:
    """[text, learned, special] of each run of tokens that are alike; the texts joined are the whole."""
    special = special_ids(tokenizer)
    kinds = [(flag, token in special) for token, flag in zip(ids, learned, strict=True)]
    ends = [i for i in range(1, len(ids) + 1) if i == len(ids) or kinds[i] != kinds[i - 1]]
    found, before = [], ""
    for end in ends:  # decoded from the start: what a token says may depend on those before it
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        found.append([text[len(before) :], *kinds[end - 1]])
        before = text
    return found


def special_ids(tokenizer) -> set[int]:
    """Also those that are not declared as special, such as the marks of a turn."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def marked(found: list[list]) -> str:
    """The text of pieces, what is learned between ⟦ and ⟧."""
    groups = groupby(found, key=lambda piece: piece[1])
    texts = [("".join(text for text, *_ in group), learned) for learned, group in groups]
    return "".join(f"⟦{text}⟧" if learned else text for text, learned in texts)
