"""A run's trained model becomes a plain one of transformers, which is tried before it is kept."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness.data import Example, Template, collate
from harness.keeping import beside
from harness.method import Method
from harness.plain import listed
from harness.record import RunRecord
from harness.spec import RunSpec
from harness.training import head
from harness.training.decoder import Decoder
from harness.training.model import load_base, model_source, stop_tokens

PROMPTS, TOKENS = 4, 64  # of the test, and new tokens of each: enough to part, and seconds on a CPU
SAME = 1e-2  # nats, in fp32: what differs by less, differs by rounding alone, and hurts nobody
SPARE = 2**26  # bytes for the tokenizer and the rest


@dataclass(frozen=True)
class Trial:
    """How the merged model, read back from its folder, answers some test prompts, beside the run's own saved
    form; both as the run computed. `dtype`: of its weights. `parted`: at which new token, of those answers
    that differ. `apart`: nats, the most by which the log-probability of a token of the answers differs."""

    dtype: str
    texts: int
    parted: list[int]
    apart: float

    def __str__(self) -> str:
        same = self.texts - len(self.parted)
        where = f"; others part at token {listed(list(map(str, self.parted)))}" * bool(self.parted)
        return (
            f"beside what the run saved, on {self.texts} test prompts:\n"
            f"  greedy text: {same} of {self.texts} the same{where}\n"
            f"  log-probabilities of its tokens: at most {self.apart:.2g} nats apart\n"
            f"  weights: in {self.dtype}, the type of its base's files"
        )


def merge(
    spec: RunSpec, record: RunRecord, made: Callable[[], Method], folder: Path, prompts: list[str],
    to: Path, finish: Callable[[Path], object],
) -> Trial:  # fmt: skip
    """Writes the model that a run saved in `folder` as a plain one into `to`, whole or not at all:
    safetensors in the base's type, and the tokenizer. `made()` is the method, afresh; `finish` may add to the
    new folder. `prompts`: of test rows, to try it on.

    Merged in fp32 and rounded once, as a small change can vanish in a large 16-bit weight. Raises Unsupported
    where the method cannot, ValueError where the merged model is another one."""
    bf16 = record.provenance.precision == "bf16"
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if bf16 else "no")
    device = accelerator.device
    template = Template(AutoTokenizer.from_pretrained(folder), record.data.template or "auto")
    source, revision = model_source(spec), record.provenance.model_revision
    same = {"revision": revision} if revision and source == spec.model else {}  # as the run had it of the hub
    held = torch.bfloat16 if bf16 else torch.float32  # as the run computed
    own = AutoConfig.from_pretrained(source, trust_remote_code=False, **same).dtype
    dtype = own or held  # old configurations name none

    def restored(dtype):
        return made().restore(partial(load_base, spec, dtype, device, **same), folder).to(device).eval()

    with beside(to, (record.sizes.parameters or 0) * dtype.itemsize + SPARE) as part, torch.no_grad():
        saved = restored(held)
        decoder = Decoder(template.tokenizer, stop_tokens(template, saved, []), spec.own_hp, accelerator)
        asked = questions(template, prompts)
        answers = texts(saved, asked, decoder)
        expected = likelihoods(saved, answers, accelerator)
        del saved
        model = restored(torch.float32).float()
        before = likelihoods(model, answers)
        model = made().merge(model)
        if (changed := distance(before, likelihoods(model, answers))) > SAME:
            raise ValueError(
                f"merged, its log-probabilities change by up to {changed:.3g} nats: the method's merge is "
                "not exact, and nothing was kept"
            )
        model.to(dtype).save_pretrained(part)
        template.tokenizer.save_pretrained(part)
        del model
        merged = read_back(part, held).to(device).eval()
        said, wanted = texts(merged, asked, decoder), [list(answer.response_ids) for answer in answers]
        pairs = zip(wanted, [list(answer.response_ids) for answer in said], strict=True)
        parted = [first_difference(*pair) for pair in pairs if pair[0] != pair[1]]
        apart = distance(expected, likelihoods(merged, answers, accelerator))
        finish(part)
    return Trial(str(dtype).removeprefix("torch."), len(asked), parted, apart)


def questions(template: Template, prompts: list[str]) -> list[Example]:
    """As the run asked them: a prompt is the text that the model read."""
    encoded = template.encode_prompts(prompts)
    return [Example(str(i), "", prompt, "", array("i", ids), array("i"))
            for i, (prompt, (ids, _)) in enumerate(zip(prompts, encoded, strict=True)) if ids]  # fmt: skip


def texts(model, asked: list[Example], decoder: Decoder) -> list[Example]:
    """The questions with the model's own greedy answers."""
    answers = decoder.continuations(model, asked, PROMPTS, min(TOKENS, decoder.hp.max_new_tokens))
    return [replace(e, response_ids=array("i", ids)) for e, [ids] in zip(asked, answers, strict=True)]


def likelihoods(model, answers: list[Example], accelerator: Accelerator | None = None) -> torch.Tensor:
    """(T,): the log-probabilities of all tokens of the answers; computed in the model's own type, or as a run
    of this accelerator computes."""
    found = []
    for answer in answers:
        batch = collate([answer], 0, model.device)
        if accelerator:
            with accelerator.autocast():
                logps, _ = head.token_scores(model, batch)
        else:
            logps, _ = head.token_scores(model, batch)
        found.append(logps[0, -len(answer.response_ids) :].float().cpu())
    return torch.cat(found)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


def first_difference(one: list[int], other: list[int]) -> int:
    """From 1 on."""
    return next((i for i, pair in enumerate(zip(one, other, strict=False), 1) if pair[0] != pair[1]),
                min(len(one), len(other)) + 1)  # fmt: skip


def read_back(folder: Path, held):
    """As any user loads it. Raises ValueError where a weight was not written, and would be drawn."""
    model, said = AutoModelForCausalLM.from_pretrained(
        folder, dtype=held, use_safetensors=True, output_loading_info=True
    )
    lost = sorted({*said["missing_keys"], *said["unexpected_keys"], *map(str, said["mismatched_keys"])})
    if lost:
        raise ValueError(f"the merged model is no plain one: see its weights {listed(lost)}")
    return model
