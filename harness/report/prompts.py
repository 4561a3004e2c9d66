"""A prompt as people read it: its turns, without the marks that a template put around them."""

import re

# What opens a turn, and whose it is: Gemma's, ChatML's, Llama 3's, Phi's and the Instruction form; [INST] of
# Mistral and Llama 2. A mark that no template here writes stays where it is: it may be what was said.
OPENS = re.compile(
    r"<start_of_turn>(?P<gemma>\w+)\n|<\|im_start\|>(?P<chatml>\w+)\n"
    r"|<\|start_header_id\|>(?P<llama>\w+)<\|end_header_id\|>\n\n|<\|(?P<phi>system|user|assistant)\|>\n?"
    r"|^### (?P<form>System|Tool|Instruction|Input|Response):\n|(?P<inst>\[/?INST\])",
    re.MULTILINE,
)
ENDS = re.compile(
    r"<bos>|<eos>|<s>|</s>|<\|begin_of_text\|>|<\|endoftext\|>|<end_of_turn>|<\|im_end\|>|<\|eot_id\|>|<\|end\|>"
)
ROLES = {"model": "Assistant", "response": "Assistant", "[/inst]": "Assistant", "instruction": "User",
         "[inst]": "User"}  # fmt: skip


def asked(prompt: str) -> str:
    """One question alone; of a conversation each turn after its role. A prompt without marks as it is."""
    opened = list(OPENS.finditer(prompt))
    if not opened or ENDS.sub("", prompt[: opened[0].start()]).strip():
        return prompt
    turns: list[tuple[str, str]] = []
    stops = [*(found.start() for found in opened[1:]), len(prompt)]
    for found, stop in zip(opened, stops, strict=True):
        named = found[found.lastgroup or 0].lower()
        role, text = ROLES.get(named, named.capitalize()), ENDS.sub("", prompt[found.end() : stop]).strip()
        if role == "Input" and turns:
            turns[-1] = (turns[-1][0], f"{turns[-1][1]}\n\n{text}")
        elif text:
            turns.append((role, text))
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{role}: {text}" for role, text in turns)
