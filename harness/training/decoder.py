"""The one decoder."""

import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig

from harness.data import Example
from harness.record import EAGER
from harness.spec import Hyperparams
from harness.training.devices import Devices
from harness.training.engine import Engine, distance, forced
from harness.training.head import causal_lm, tolerance
from harness.training.slots import slot_bytes

READ = 2**14  # prompt tokens read at once: a device is busy with them, and they take a few GiB at most
LOOK = 8  # steps on a GPU between two looks at which answers have ended: a look waits for it
TRIED = 4  # tokens of the trial of a model: the first is of its prompt, the others of steps
REFILL = 8  # 1 / 8 of the slots is free before prompts are read into them: reading stops all others


class Decoder:
    """Prompts become new tokens up to a stop: for the evaluation, and for every method that trains on answers
    of its own model. Prompts wait, the longest first, until an answer before them has ended."""

    def __init__(
        self, tokenizer, stops: list[int], hp: Hyperparams, accelerator, devices: Devices | None = None
    ):
        self.devices = devices or Devices()  # each writes the answers to its share of the prompts
        self.tokenizer, self.stops, self.hp, self.accelerator = tokenizer, stops, hp, accelerator
        self.kernels: str | None = None  # of the steps decoded last
        self.refused: list[str] = []  # faster ones that were tried, and why they are not used
        self.times = 1  # that it is asked for as much
        self.reasons: WeakKeyDictionary = WeakKeyDictionary()  # model -> why it is generated, or None

    @contextmanager
    def asked(self, times: int) -> Iterator[None]:
        """Within, as often: who rolls out decodes little at each step of a training."""
        self.times = times
        try:
            yield
        finally:
            self.times = 1

    def answers(self, model, examples: list[Example], report=lambda **_: None) -> list[dict]:
        """Greedy answers in the order of examples: output, new_tokens, stopped. `report(**values)` is
        told as they end."""
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
        """In the order of examples, `copies` of each: the new tokens, the stop token too if there was one.
        Above temperature 0 they are drawn by numbers of torch's own generator on the CPU: as many for each
        copy, whatever is drawn beside it."""
        if not examples:
            return []
        model.eval()
        with self.accelerator.autocast():
            reason = self.unfit(model, examples)
            self.kernels, self.refused = "generate" if reason else None, [reason] if reason else []
            decode = self.generated if reason else self.decoded
            own = self.devices.share(list(range(len(examples))), lambda i: len(examples[i].prompt_ids))
            found = decode(model, examples, own, at_once, new_tokens, copies, temperature, report)
        found = self.devices.merged(found)
        return [found[i] for i in range(len(examples))]

    def decoded(self, model, examples, own, at_once, new_tokens, copies, temperature, report):
        """Place of each of its `own` examples -> their answers."""
        prompts = [example.prompt_ids for example in examples]
        order = sorted(own, key=lambda i: len(prompts[i]), reverse=True)
        asked = [(i, copy) for i in order for copy in range(copies)]
        numbers = torch.rand(len(prompts), copies, new_tokens) if temperature else None
        if not asked:
            return {}
        longest = len(prompts[order[0]])
        count = min(max(1, at_once // copies) * copies, len(asked), room(model, longest + new_tokens))
        engine = Engine(model, count, longest, new_tokens, self.stops, temperature)
        look = LOOK if engine.device.type == "cuda" else 1
        free, held = list(range(count)), dict[int, tuple[int, int]]()  # slot -> what was asked
        found: dict[tuple, list[int]] = {}
        left = dict.fromkeys(own, copies)
        while asked or held:
            if held and new_tokens > 1:
                engine.run(look)
            for slot, ids in (ended := engine.ended()).items():
                i, copy = held.pop(slot)
                found[i, copy], left[i] = ids, left[i] - 1
                free.append(slot)
            if ended:
                report(answered=[*left.values()].count(0), rows=len(own))
            enough = max(1, count // REFILL)
            if asked and len(free) >= min(enough, len(asked)):
                while asked and len(free) >= min(enough, len(asked)):
                    some = asked[: fitting(prompts, asked, len(free))]
                    slots, free, asked = free[: len(some)], free[len(some) :], asked[len(some) :]
                    engine.read(
                        prompts, slots, [i for i, _ in some],
                        None if numbers is None else torch.stack([numbers[pair] for pair in some]),
                    )  # fmt: skip
                    held |= dict(zip(slots, some, strict=True))
                if self.kernels is None:
                    steps = self.times * math.ceil(len(examples) * copies / count) * (new_tokens - 1)
                    self.kernels = EAGER if self.hp.kernels == EAGER else engine.capture(steps)
                    self.refused = engine.refused
            elif held and engine.graph is None and REFILL * len(free) >= len(held) + len(free):
                held = dict(enumerate(held[slot] for slot in engine.keep()))
                free = []
        if engine.graph:
            del engine
            torch.cuda.empty_cache()  # of the graph's own pool, which nothing else would be given
        return {i: [found[i, copy] for copy in range(copies)] for i in own}

    def generated(self, model, examples, own, at_once, new_tokens, copies, temperature, report):
        """The same by transformers' own loop, for what the engine cannot decode: left-padded, by length."""
        config = self.config(temperature, new_tokens)
        by_length = sorted(own, key=lambda i: len(examples[i].prompt_ids), reverse=True)
        size = max(1, at_once // copies)
        found = {}
        for start in range(0, len(own), size):
            places = by_length[start : start + size]
            batch = [examples[i] for i in places]
            whole, width = self.generate(model, batch, copies, config)
            if len(whole) != len(batch) * copies:
                raise RuntimeError(f"{len(whole)} answers to {len(batch)} prompts")
            new = [self.until_stop(tokens) for tokens in whole[:, width:].tolist()]
            for n, i in enumerate(places):
                found[i] = new[n * copies : (n + 1) * copies]
            report(answered=len(found), rows=len(own))
        return found

    def generate(self, model, examples, copies, config):
        """-> what transformers generates, and the width of the prompts in it"""
        causal = causal_lm(model)
        own, causal.generation_config = causal.generation_config, config
        # passed as an argument, it would be filled up from the model's own, whose repetition penalty and
        # the like are not this decoder's
        ids, mask = left_padded(examples, self.tokenizer.pad_token_id, self.accelerator.device)
        try:
            return model.generate(
                input_ids=ids.repeat_interleave(copies, 0), attention_mask=mask.repeat_interleave(copies, 0)
            ), ids.shape[1]
        finally:
            causal.generation_config = own  # what is saved is the model, without the bench's limits

    def config(self, temperature: float, new_tokens: int, **more) -> GenerationConfig:
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        return GenerationConfig(
            **{"do_sample": False, "num_beams": 1, "eos_token_id": self.stops, **drawn, **more},
            max_new_tokens=new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
        )

    def until_stop(self, tokens: list[int]) -> list[int]:
        end = next((i for i, token in enumerate(tokens) if token in self.stops), len(tokens))
        return tokens[: end + 1]

    def unfit(self, model, examples: list[Example]) -> str | None:
        """Why the engine cannot decode this model, or None: on two prompts its first logits must be those of
        transformers' own loop. Asked once a model."""
        causal = causal_lm(model)
        if causal not in self.reasons:
            by_length = sorted(examples, key=lambda example: len(example.prompt_ids))
            self.reasons[causal] = reason = self.difference(model, [by_length[0], by_length[-1]])
            if reason:
                warnings.warn(
                    f"{type(causal).__name__} is decoded by generate, slowly: {reason}", stacklevel=2
                )
        return self.reasons[causal]

    def difference(self, model, examples: list[Example]) -> str | None:
        config = self.config(0.0, TRIED, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
        own, width = self.generate(model, examples, 1, config)
        try:
            found = forced([e.prompt_ids for e in examples], own.sequences[:, width:], model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture does otherwise
            return f"{type(error).__name__}: {error}"
        far = distance(found, torch.stack(own.logits, 1))
        return None if far <= tolerance(model) else f"its logits would differ by {far:.1%}"


def room(model, length: int) -> int:
    """How many texts of so many tokens half of the free memory has keys and values for: reading prompts
    takes some, too."""
    if model.device.type != "cuda":
        return sys.maxsize
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return max(1, free // 2 // slot_bytes(causal_lm(model), length))


def fitting(prompts, asked, most: int) -> int:
    """How many of those asked are read at once, the first of which is the longest."""
    return max(1, min(most, READ // len(prompts[asked[0][0]])))


def left_padded(examples: list[Example], pad_id: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt ids and their mask, each (B, T)."""
    width = max(len(example.prompt_ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    mask = torch.zeros_like(ids)
    for i, example in enumerate(examples):
        ids[i, width - len(example.prompt_ids) :] = torch.tensor(list(example.prompt_ids))
        mask[i, width - len(example.prompt_ids) :] = 1
    return ids.to(device), mask.to(device)
