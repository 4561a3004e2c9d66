"""What a model attends to in one conversation, before and after a training."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
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


def attention_maps(
    spec: RunSpec, record: RunRecord, method: Method, folder: Path, conversations: list[tuple[str, str]]
) -> dict:
    """Of the first conversation (prompt, answer) that has room in TOKENS, or the beginning of the shortest.

    -> tokens: their texts; answer: the place of the first that answers; layers: the first and last of each
    group, from 1 on; before, after: (groups, T, T), a share of a token's (row's) attention, that to each one,
    a mean over heads and layers, of the untouched model and of what the run saved in `folder`. Raises
    ValueError where the architecture does not tell."""
    template = Template(load_tokenizer(spec), record.data.template or "auto")
    prompts, answers = zip(*conversations, strict=True)
    asked = [ids for ids, _ in template.encode_prompts(list(prompts))]
    told = template.responses(list(prompts), list(answers))
    whole = [[*question, *answer] for question, answer in zip(asked, told, strict=True)]
    fitting = [i for i, ids in enumerate(whole) if len(ids) <= TOKENS]
    chosen = fitting[0] if fitting else min(range(len(whole)), key=lambda i: len(whole[i]))
    ids = whole[chosen][:TOKENS]
    bf16 = record.provenance.precision == "bf16"
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if bf16 else "no")
    load = partial(load_base, spec, torch.bfloat16 if bf16 else torch.float32, accelerator.device)
    ways: dict[str, Callable] = {"before": load, "after": lambda: method.restore(load, folder)}
    found: dict[str, list] = {}
    for name, loaded in ways.items():
        with accelerator.autocast():
            by_layer = maps(loaded().to(accelerator.device).eval(), ids)
        borders = [round(i * len(by_layer) / GROUPS) for i in range(GROUPS + 1)]
        groups = [(a, b) for a, b in pairwise(borders) if b > a]
        found[name] = [rounded(by_layer[a:b].mean(0)) for a, b in groups]
    return {
        "tokens": [template.tokenizer.decode([token]) for token in ids],
        "answer": min(len(asked[chosen]), len(ids)),
        "layers": [[a + 1, b] for a, b in groups],
        **found,
    }


@torch.no_grad()
def maps(model, ids: list[int]) -> torch.Tensor:
    """(layers, T, T), the mean over heads, by attention that is written out: other kinds keep no shares."""
    causal = head.causal_lm(model)
    causal.set_attn_implementation("eager")
    read = causal(torch.tensor([ids]).to(causal.device), output_attentions=True, use_cache=False)
    if not read.attentions or read.attentions[0] is None:
        raise ValueError("this architecture does not tell what its layers attend to")
    return torch.stack([layer[0].float().mean(0).cpu() for layer in read.attentions])


def rounded(values: torch.Tensor) -> list[list[float]]:
    return [[round(value, DIGITS) for value in row] for row in values.tolist()]
