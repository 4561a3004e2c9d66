"""What a model attends to in one conversation, before and after a training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from harness.data import Template
from harness.method import Method
from harness.record import RunRecord
from harness.spec import RunSpec
from harness.training import head
from harness.training.model import load_base, load_tokenizer

GROUPS = 4  # of layers, one behind another: more maps than that nobody compares
TOKENS = 48  # of the conversation, at most: more labels than that nobody reads
DIGITS = 4  # of a share


def attention(
    spec: RunSpec, record: RunRecord, method: Method, folder: Path, conversations: list[tuple[str, str]]
) -> dict:
    """Of the first conversation (prompt, answer) that has room in TOKENS, or the beginning of the shortest.

    -> tokens: their texts; answer: the place of the first that answers; layers: the first and last, from 1 on,
    of each group; before, after: (groups, T, T), how much of the attention of each token (row) goes to each,
    the mean over heads and layers, of the untouched model and of what the run saved in `folder`."""
    template = Template(load_tokenizer(spec), record.data.template or "auto")
    written = [(*encoded, answer) for encoded, (_, answer) in zip(
        template.encode_prompts([prompt for prompt, _ in conversations]), conversations, strict=True)]  # fmt: skip
    read = [[*ids, *template.response_ids(prompt, answer)] for (prompt, answer), (ids, *_) in zip(
        conversations, written, strict=True)]  # fmt: skip
    fitting = [i for i, ids in enumerate(read) if len(ids) <= TOKENS]
    chosen = fitting[0] if fitting else min(range(len(read)), key=lambda i: len(read[i]))
    ids, asked = read[chosen][:TOKENS], len(written[chosen][0])
    bf16 = record.provenance.precision == "bf16"
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if bf16 else "no")
    load = partial(load_base, spec, torch.bfloat16 if bf16 else torch.float32, accelerator.device)
    found = {}
    ways: dict[str, Callable] = {"before": load, "after": lambda: method.restore(load, folder)}
    for name, loaded in ways.items():
        with accelerator.autocast():
            by_layer = maps(loaded().to(accelerator.device).eval(), ids)
        borders = [round(i * len(by_layer) / GROUPS) for i in range(GROUPS + 1)]
        groups = [(a, b) for a, b in zip(borders, borders[1:], strict=False) if b > a]
        found[name] = [rounded(by_layer[a:b].mean(0)) for a, b in groups]
    tokens = [template.tokenizer.decode([token]) for token in ids]
    layers = [(a + 1, b) for a, b in groups]
    return {"tokens": tokens, "answer": min(asked, len(ids)), "layers": layers, **found}


@torch.no_grad()
def maps(model, ids: list[int]) -> torch.Tensor:
    """(layers, T, T), the mean over heads. By attention that is written out, as other kinds keep no shares."""
    causal = head.causal_lm(model)
    causal.set_attn_implementation("eager")
    read = causal(torch.tensor([ids]).to(causal.device), output_attentions=True, use_cache=False)
    if not read.attentions or read.attentions[0] is None:
        raise ValueError("this architecture does not say what its layers attend to")
    return torch.stack([layer[0].float().mean(0).cpu() for layer in read.attentions])


def rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(value, DIGITS) for value in row] for row in values.tolist()]
