"""The evaluation of a model on rows: teacher-forced scores, and the one greedy decoder."""

import torch
from transformers import GenerationConfig

from harness.data import Row, batches_of, collate
from harness.head import causal_lm, token_scores
from harness.spec import Hyperparams


@torch.inference_mode()
def likelihoods(model, rows: list[Row], pad_id: int, hp: Hyperparams, accelerator) -> list[dict]:
    """tokens, nll (summed, in nats) and correct of each row's response, in the order of rows."""
    model.eval()
    found = {}
    for batch in batches_of(rows, hp.eval_batch_size):
        tensors = collate(batch, pad_id, accelerator.device)
        with accelerator.autocast():
            logps, hits = token_scores(model, tensors)
        tokens = (tensors["labels"][:, 1:] != -100).sum(1).tolist()
        nll, correct = (-logps.double().sum(1)).tolist(), hits.sum(1).tolist()
        for row, *values in zip(batch, tokens, nll, correct, strict=True):
            found[row.id] = dict(zip(("tokens", "nll", "correct"), values, strict=True))
    return [found[row.id] for row in rows]


def mean_loss(scores: list[dict]) -> float:
    """Negative log-likelihood per response token, over all rows together."""
    return sum(s["nll"] for s in scores) / sum(s["tokens"] for s in scores)


@torch.inference_mode()
def answers(model, rows: list[Row], tokenizer, stops: list[int], hp: Hyperparams, accelerator, report):
    """Greedy answers in the order of rows: output, new_tokens, stopped.

    Batches are the same for every method: by prompt length, left-padded. `report(**values)` is told
    of each batch.
    """
    model.eval()
    config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=hp.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    causal = causal_lm(model)
    own, causal.generation_config = causal.generation_config, config  # passed as an argument, it would be
    # filled up from the model's own, whose repetition penalty and the like are not greedy decoding
    by_length = sorted(rows, key=lambda row: len(row.prompt_ids), reverse=True)
    found = {}
    for start in range(0, len(rows), hp.eval_batch_size):
        batch = by_length[start : start + hp.eval_batch_size]
        width = max(len(row.prompt_ids) for row in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(batch):
            ids[i, width - len(row.prompt_ids) :] = torch.tensor(list(row.prompt_ids))
            mask[i, width - len(row.prompt_ids) :] = 1
        ids, mask = ids.to(accelerator.device), mask.to(accelerator.device)
        with accelerator.autocast():
            whole = model.generate(input_ids=ids, attention_mask=mask)
        if len(whole) != len(batch):
            raise RuntimeError(f"{len(whole)} answers to {len(batch)} prompts")
        for row, new in zip(batch, whole[:, width:].tolist(), strict=True):
            end = next((i for i, token in enumerate(new) if token in stops), None)
            text = tokenizer.decode(new[:end], skip_special_tokens=True).strip()
            found[row.id] = {
                "output": text,
                "new_tokens": len(new) if end is None else end + 1,
                "stopped": end is not None,
            }
        report(answered=len(found), rows=len(rows))
    causal.generation_config = own  # what is saved is the model, without the bench's limits
    return [found[row.id] for row in rows]
