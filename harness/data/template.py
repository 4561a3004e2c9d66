"""Conversations become token ids: what the model reads, and what it should answer.

The prompt is tokenised by itself, as it is when the model is asked, and the response after it: the text
trained on begins with exactly the tokens that generation starts from.
"""

import hashlib
import re
from array import array
from dataclasses import dataclass, field, replace
from itertools import chain

from harness.data.formats import Conversation, is_text, learned, said
from harness.errors import BadRequest

COUNTED = {  # what happened to the rows of a split on their way to tokens
    "truncated": "lost the end of their response to max_length",
    "shortened": "lost their last turns to max_length",
    "too_long": "left out: the prompt fills max_length",
    "windows": "made of plain texts longer than max_length, beyond the first of each",
    "refused": "left out: the chat template cannot write them",
    "answered": "left out: their prompt, as it is scored, is answered in training",
    "last_only": "learn their last answer alone: where the earlier ones begin cannot be told",
}
BATCH = 1024  # conversations tokenised at a time: enough for all threads, little memory
OPENING = 32  # tokens of a plain text that the generation starts from; half of a shorter one
MARKS = "\ue000", "\ue001"  # private characters that show where the template puts an answer


@dataclass
class Example:
    """One conversation, or one window of a plain text, as token ids.

    `learned`: start, stop, start, stop... in prompt_ids of the earlier answers that training learns as
    well; an evaluation is of the response alone.
    """

    id: str
    part: str
    prompt: str  # empty for a plain text: it has none, and all but its first token is the response
    reference: str
    prompt_ids: array  # of int32
    response_ids: array  # ends with the token that ends a turn, unless cut
    cut: int = 0  # tokens of the response that max_length took
    rejected_ids: array | None = None  # a worse response, where the row is a preference pair
    learned: array = field(default_factory=lambda: array("i"))  # also in training: see above

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


class Template:
    """Turns messages into text: the model's own chat template, or the Instruction/Response form.

    `loss`: all, every answer of a conversation is learned; last, only its last one.
    """

    def __init__(self, tokenizer, kind: str, loss: str = "all"):
        if kind == "chat" and not tokenizer.chat_template:
            raise BadRequest("this tokenizer has no chat template: use --set data.template=instruction")
        self.tokenizer = tokenizer
        self.kind = "chat" if tokenizer.chat_template and kind != "instruction" else "instruction"
        self.loss = loss
        self.added = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        if self.kind == "chat":
            self.drops = self.unwritten_roles()
            self.trims = self.trims_answers()
            self.header = self.header_of_an_answer()

    # Text

    def render(self, messages: list[dict]) -> tuple[str, str, list[tuple[int, int] | None]]:
        """-> prompt, response with the mark that ends it, and for each earlier answer its characters in
        the prompt, end mark included; None where they cannot be told."""
        if self.kind == "instruction":
            return self.render_instruction(messages)
        from jinja2 import TemplateError

        if self.trims:
            messages = [{**m, "content": m["content"].strip()} for m in messages]
        forms = [folded(messages)]
        if not self.drops & {m["role"] for m in messages}:
            forms.insert(0, [{"role": m["role"], "content": said(m)} for m in messages])
        for form in forms:
            try:
                return self.render_chat(form)
            except (TemplateError, TypeError) as error:  # TypeError: of an operator within the template
                reason = error
        raise BadRequest(f"the model's chat template refuses a conversation ({reason})")

    def render_instruction(self, messages):
        end = self.tokenizer.eos_token or ""
        prompt, answers = "", []
        for message in messages[:-1]:
            if message["role"] == "assistant":
                prompt += "### Response:\n"
                answers.append((len(prompt), len(prompt) + len(message["content"] + end)))
                prompt += f"{message['content']}{end}\n\n"
            else:
                prompt += f"### {HEADINGS[message['role']]}:\n{message['content']}\n\n"
                if message.get("input"):
                    prompt += f"### Input:\n{message['input']}\n\n"
        return prompt + "### Response:\n", messages[-1]["content"] + end, answers

    def render_chat(self, messages):
        prompt = self.written(messages[:-1], asks=True)
        opening, closing = MARKS
        marked = [
            {**m, "content": opening + m["content"] + closing} if m["role"] == "assistant" else m
            for m in messages[:-1]
        ]
        text = self.written([*marked, messages[-1]])
        whole = text.replace(opening, "").replace(closing, "")
        told = whole.startswith(prompt) and text.count(opening) == text.count(closing)
        if not told:  # this template looks into its answers
            whole = self.written(messages)
        if not whole.startswith(prompt):
            raise BadRequest(
                "this chat template writes a prompt otherwise than the start of the conversation: "
                "use --set data.template=instruction"
            )
        response = whole[len(prompt) :].rstrip()  # nothing after the mark is learned
        content = messages[-1]["content"]
        end = response.rpartition(content)[2] if content and content in response else ""
        count = sum(m["role"] == "assistant" for m in messages[:-1])
        answers = self.answers_between(text, prompt, end) if told else []
        return prompt, response, answers if len(answers) == count else [None] * count

    def answers_between(self, text: str, prompt: str, end: str) -> list[tuple[int, int] | None]:
        """Characters in the prompt, which has no marks, of the answers between marks in the text."""
        found = []
        for i, match in enumerate(re.finditer("{}(.*?){}".format(*MARKS), text, re.DOTALL)):
            start = match.start() - 2 * i
            stop = start + len(match[1])
            asked = prompt[:start].endswith(self.header)  # as generation would ask for it
            found.append((start, stop + len(end) * prompt.startswith(end, stop)) if asked else None)
        return found

    def written(self, messages: list[dict], asks: bool = False) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False)

    def unwritten_roles(self) -> set[str]:
        """Roles that this chat template leaves out without a word. What it refuses, it says itself."""
        user, assistant = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
        trials = {"system": lambda said: [said, user], "tool": lambda said: [user, assistant, said]}
        found = set()
        for role, trial in trials.items():
            try:
                text = self.written(trial({"role": role, "content": "Zwölf"}), asks=True)
                if "Zwölf" not in text:
                    found.add(role)
            except Exception:  # a template raises what it likes: here it only has to write or not
                pass
        return found

    def trims_answers(self) -> bool:
        """Whether it takes the spaces from before an answer, as Gemma's does: then no mark may stop it."""
        turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "  Zwölf"}]
        try:
            return self.written([*turns, *turns]).count("  Zwölf") < 2
        except Exception:  # as above
            return False

    def header_of_an_answer(self) -> str:
        """What asks for an answer, at the end of every prompt."""
        user = [{"role": "user", "content": "u"}]
        try:
            return self.written(user, asks=True).removeprefix(self.written(user))
        except Exception:  # such a template will refuse its rows, by name
            return ""

    # Tokens

    def examples(
        self, conversations: list[Conversation], max_length: int, counts: dict[str, int]
    ) -> list[Example]:
        """Adds to `counts` what COUNTED says. A response is cut to what its prompt leaves of max_length."""
        made: list[list[Example]] = [[] for _ in conversations]
        todo = []
        for i, conversation in enumerate(conversations):
            if is_text(conversation.messages):
                made[i] = self.windows(conversation, max_length)
                counts["windows"] += max(0, len(made[i]) - 1)
                counts["too_long"] += not made[i]
            else:
                todo.append((i, conversation.messages))
        while todo:
            todo = self.encode(todo, conversations, max_length, counts, made)
        return [row for rows in made for row in rows]

    def encode(self, todo, conversations, max_length, counts, made) -> list[tuple[int, list[dict]]]:
        """Writes the rows of (index, messages) into `made`. -> those to try again, with fewer turns."""
        asked, again = [], []
        for i, messages in todo:
            try:
                asked.append((i, messages, *self.render(messages)))
            except BadRequest:
                counts["refused"] += 1
        if not asked:
            return []
        encoded = self.encode_prompts([prompt for _, _, prompt, _, _ in asked])
        fitting = []
        for (i, messages, prompt, response, answers), (ids, places) in zip(asked, encoded, strict=True):
            spans = [place(*span, places) if span and places else None for span in answers]
            if len(ids) < max_length:
                kept = [learned(m) for m in messages[:-1] if m["role"] == "assistant"]
                spans = [span for span, learn in zip(spans, kept, strict=True) if learn]
                counts["shortened"] += len(messages) < len(conversations[i].messages)
                counts["last_only"] += self.loss == "all" and None in spans
                fitting.append((i, messages, prompt, response, ids, spans))
            elif (fewer := shortened(messages, spans, max_length)) and not conversations[i].rejected:
                again.append((i, fewer))
            else:
                counts["too_long"] += 1
        prompts = [prompt for _, _, prompt, *_ in fitting]
        responses = self.responses(prompts, [response for _, _, _, response, *_ in fitting])
        for (i, messages, prompt, _, ids, spans), response in zip(fitting, responses, strict=True):
            conversation, room = conversations[i], max_length - len(ids)
            counts["truncated"] += len(response) > room
            row = Example(
                conversation.id, conversation.part, prompt, messages[-1]["content"], array("i", ids),
                response[:room], max(0, len(response) - room),
                learned=array("i", chain(*filter(None, spans)) if self.loss == "all" else ()),
            )  # fmt: skip
            if conversation.rejected:
                worse = [*messages[:-1], {"role": "assistant", "content": conversation.rejected}]
                row.rejected_ids = self.response_ids(prompt, self.render(worse)[1])[:room]
            made[i] = [row]
        return again

    def encode_prompts(self, prompts: list[str]) -> list[tuple[list[int], object]]:
        """-> ids of each, and what tells which characters a token stands for, if the tokenizer can."""
        # A chat template writes <bos> itself; the instruction form takes what the tokenizer adds.
        own = self.kind == "instruction"
        found = self.encoded(prompts, add_special_tokens=own)
        places = found.encodings or [None] * len(prompts)
        end = self.tokenizer.eos_token_id
        return [
            (ids[:-1] if own and ids and ids[-1] == end else ids, p)
            for ids, p in zip(found.input_ids, places, strict=True)
        ]

    def responses(self, prompts: list[str], texts: list[str]) -> list[array]:
        """Ids of each response as they follow its prompt's last character: a tokenizer that begins every
        text with a space would else put one there. Where the two would merge, as they follow a line's
        end; and where that would merge too, alone."""
        ends = ["" if prompt.endswith(self.added) else prompt[-1:] for prompt in prompts]
        found: list[array | None] = [None] * len(texts)
        for borders in (ends, ["\n"] * len(texts), [""] * len(texts)):
            todo = [i for i, ids in enumerate(found) if ids is None]
            before = {end: self.ids([end])[0] if end else [] for end in {borders[i] for i in todo}}
            joined = self.ids([borders[i] + texts[i] for i in todo])
            for i, ids in zip(todo, joined, strict=True):
                n = len(before[borders[i]])
                if ids[:n] == before[borders[i]]:
                    found[i] = array("i", ids[n:])
        return found

    def response_ids(self, prompt: str, text: str) -> array:
        return self.responses([prompt], [text])[0]

    def ids(self, texts: list[str]) -> list[list[int]]:
        return self.encoded(texts, add_special_tokens=False).input_ids if texts else []

    def encoded(self, texts: list[str], add_special_tokens: bool):
        return self.tokenizer(
            texts, add_special_tokens=add_special_tokens, return_attention_mask=False, verbose=False
        )

    # Plain text

    def windows(self, conversation: Conversation, max_length: int) -> list[Example]:
        """A plain text in rows of max_length in which all but the first token is learned: <bos>, or where
        the tokenizer has none, the token before. So each token of the text is learned once."""
        ids = self.ids([conversation.messages[0]["content"]])[0]
        bos = self.tokenizer.bos_token_id
        if bos is not None:
            ids = [bos, *ids]
        found = []
        for start in range(1, len(ids), max_length - 1) if max_length > 1 else ():
            before = bos if bos is not None else ids[start - 1]
            name = conversation.id + f"+{len(found)}" * bool(found)
            window = array("i", ids[start : start + max_length - 1])
            found.append(Example(name, conversation.part, "", "", array("i", [before]), window))
        return found

    def question(self, row: Example, new_tokens: int) -> Example:
        """The row as generation is asked it: a plain text's first tokens are the prompt, and as many as
        may be generated are the reference. Other rows have a prompt."""
        if row.prompt:
            return row
        ids = row.prompt_ids + row.response_ids
        n = min(OPENING, (len(ids) + 1) // 2)
        begun, goes_on = (
            self.tokenizer.decode(part, skip_special_tokens=True).strip()
            for part in (ids[:n], ids[n : n + new_tokens])
        )
        return replace(row, prompt=begun, reference=goes_on, prompt_ids=ids[:n], response_ids=ids[n:])


HEADINGS = {"user": "Instruction", "system": "System", "tool": "Tool"}  # of the instruction form


def folded(messages: list[dict]) -> list[dict]:
    """What the system and tools say as part of the user's turn, for a template that refuses it."""
    turns: list[dict] = []
    for message in messages:
        role = "assistant" if message["role"] == "assistant" else "user"
        if turns and turns[-1]["role"] == role == "user":
            turns[-1]["content"] += "\n\n" + said(message)
        else:
            turns.append({"role": role, "content": said(message)})
    return turns


def place(start: int, stop: int, encoding) -> tuple[int, int] | None:
    """First and past-last token of those that lie wholly within these characters."""
    within = []
    for token in range(encoding.char_to_token(start) or 0, len(encoding)):
        found = encoding.token_to_chars(token)
        if found and found[0] >= stop:
            break
        if found and start <= found[0] < found[1] <= stop:
            within.append(token)
    return (within[0], within[-1] + 1) if within else None


def shortened(messages: list[dict], spans: list, max_length: int) -> list[dict] | None:
    """Up to the last earlier answer to learn that begins before max_length, as far as that is known."""
    places = [i for i, message in enumerate(messages[:-1]) if message["role"] == "assistant"]
    for i, span in reversed(list(zip(places, spans, strict=True))):
        if learned(messages[i]) and (span is None or span[0] < max_length):
            return messages[: i + 1]
    return None


def tokenize(conversations: list[Conversation], template: Template, max_length: int):
    """-> examples in the order of the conversations, and how many of each kind of COUNTED."""
    examples, counts = [], dict.fromkeys(COUNTED, 0)
    for start in range(0, len(conversations), BATCH):
        examples += template.examples(conversations[start : start + BATCH], max_length, counts)
    return examples, counts


def examples_hash(examples: list[Example]) -> str:
    total = hashlib.sha256()
    for example in examples:
        total.update(example_bytes(example))
    return total.hexdigest()[:16]


def example_bytes(example: Example) -> bytes:
    parts = (example.prompt_ids, example.response_ids, example.rejected_ids or array("i"), example.learned)
    lengths = array("i", [len(part) for part in parts])
    return b"".join(part.tobytes() for part in (lengths, *parts))
