"""Conversations become token ids: what the model reads, and what it should answer.

The response's tokens are made apart from the prompt's, so that the text trained on begins with
exactly the tokens that generation starts from.
"""

import hashlib
from array import array
from dataclasses import dataclass

from harness.formats import Conversation
from harness.rows import DataError


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
