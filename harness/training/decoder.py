"""The one decoder."""

import torch
from transformers import GenerationConfig

from harness.data import Example
from harness.spec import Hyperparams
from harness.training.head import causal_lm


class Decoder:
    """Prompts, left-padded and batched by length, become new tokens up to a stop: for the evaluation, and for
    every method that trains on answers of its own model."""

    def __init__(self, tokenizer, stops: list[int], hp: Hyperparams, accelerator):
        self.tokenizer, self.stops, self.hp, self.accelerator = tokenizer, stops, hp, accelerator

    def answers(self, model, examples: list[Example], report=lambda **_: None) -> list[dict]:
        """Greedy answers in the order of examples: output, new_tokens, stopped. `report(**values)` is
        told of each batch."""
        return [
            {"output": self.text_of(ids), "new_tokens": len(ids), "stopped": ids[-1] in self.stops}
            for [ids] in self.continuations(
                model, examples, self.hp.eval_batch_size, self.hp.max_new_tokens, report=report
            )
        ]

    def text_of(self, ids: list[int]) -> str:
        ended = ids and ids[-1] in self.stops
        return self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).strip()

    @torch.inference_mode()
    def continuations(
        self, model, examples, at_once, new_tokens, copies=1, temperature=0.0, report=lambda **_: None
    ):
        """In the order of examples, `copies` of each: the new tokens, the stop token too if there was one."""
        model.eval()
        causal = causal_lm(model)
        config = self.config(temperature, new_tokens)
        own, causal.generation_config = causal.generation_config, config
        # passed as an argument, it would be filled up from the model's own, whose repetition penalty and
        # the like are not this decoder's
        by_length = sorted(examples, key=lambda example: len(example.prompt_ids), reverse=True)
        size = max(1, at_once // copies)
        found = {}
        for start in range(0, len(examples), size):
            batch = by_length[start : start + size]
            ids, mask = left_padded(batch, self.tokenizer.pad_token_id, self.accelerator.device)
            with self.accelerator.autocast():
                whole = model.generate(
                    input_ids=ids.repeat_interleave(copies, 0),
                    attention_mask=mask.repeat_interleave(copies, 0),
                )
            if len(whole) != len(batch) * copies:
                raise RuntimeError(f"{len(whole)} answers to {len(batch)} prompts")
            new = [self.until_stop(tokens) for tokens in whole[:, ids.shape[1] :].tolist()]
            for i, example in enumerate(batch):
                found[example.id] = new[i * copies : (i + 1) * copies]
            report(answered=len(found), rows=len(examples))
        causal.generation_config = own  # what is saved is the model, without the bench's limits
        return [found[example.id] for example in examples]

    def config(self, temperature: float, new_tokens: int) -> GenerationConfig:
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        return GenerationConfig(
            **{"do_sample": False, "num_beams": 1, **drawn},
            max_new_tokens=new_tokens,
            eos_token_id=self.stops,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
        )

    def until_stop(self, tokens: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(tokens) if token in self.stops), len(tokens))
        return tokens[: end + 1]


def left_padded(examples: list[Example], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt ids and their mask, each (B, T)."""
    width = max(len(example.prompt_ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, example in enumerate(examples):
        ids[i, width - len(example.prompt_ids) :] = torch.tensor(list(example.prompt_ids))
        mask[i, width - len(example.prompt_ids) :] = 1
    return ids.to(device), mask.to(device)
