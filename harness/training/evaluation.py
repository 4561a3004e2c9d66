"""The evaluation, the same for every model: teacher-forced likelihoods, greedy answers, and their scores."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from harness import metrics
from harness.data import Example, batches_of, collate
from harness.record import RunRecord
from harness.store import OUTPUTS, RECORD
from harness.training import head
from harness.training.weights import Diverged

if TYPE_CHECKING:
    from harness.training.run import Run


def likelihoods(model, examples: list[Example], run: "Run") -> list[dict]:
    """tokens, nll (summed, in nats) and correct of each example's response, in the order of examples. Each
    device scores its share of the batches; of a model in parts all score each."""
    model.eval()
    scores: dict[str, dict] = {}
    batches = batches_of(examples, run.hp.eval_batch_size)
    for some in batches if run.sharded else run.devices.share(batches, cells):
        batch = collate(some, run.pad, run.device)
        # Weights that are gathered here are those of the next step.
        with torch.no_grad() if run.sharded else torch.inference_mode(), run.accelerator.autocast():
            logps, hits = run.whole(head.token_scores, model, batch)
        tokens = (batch["labels"][:, 1:] != -100).sum(1).tolist()
        nll, correct = (-logps.double().sum(1)).tolist(), hits.sum(1).tolist()
        for example, *values in zip(some, tokens, nll, correct, strict=True):
            scores[example.id] = dict(zip(("tokens", "nll", "correct"), values, strict=True))
        run.report(scored=len(scores), rows=len(examples))  # a sign of progress
    if run.sharded:
        run.whole.apart()
    scores = scores if run.sharded else run.devices.merged(scores)
    return [scores[example.id] for example in examples]


def cells(batch: list[Example]) -> int:
    return len(batch) * max(example.length for example in batch)


def mean_loss(scores: list[dict]) -> float:
    """Negative log-likelihood per response token, over all examples together."""
    return sum(s["nll"] for s in scores) / sum(s["tokens"] for s in scores)


def validate(model, run: "Run") -> float | None:
    """The mean loss on the validation examples, off the training's clock."""
    if not run.splits["validation"]:
        return None
    with run.meter.phase("validate"):
        return mean_loss(likelihoods(model, run.splits["validation"], run))


def test(model, run: "Run", examples: list[Example]) -> list[dict]:
    """An output of the model as it is for each example, with its likelihood and scores."""
    with run.meter.phase("evaluate"), head.arithmetic(model) as types:
        scores = likelihoods(model, examples, run)
    run.record.arithmetic["scoring"] = types
    check_finite(scores, run)
    questions = [run.template.question(example, run.hp.max_new_tokens) for example in examples]
    with run.meter.phase("generate"):
        answers = run.decoder.answers(model, questions, run.report)
    run.record.kernels.decoding = run.decoder.kernels
    run.record.warnings += [f"decoding: {reason}" for reason in run.decoder.refused]
    outputs = [
        {"id": example.id, "part": example.part, "prompt": example.prompt, "reference": example.reference}
        | answer | score
        for example, answer, score in zip(examples, answers, scores, strict=True)
    ]  # fmt: skip
    return [{**output, "sums": metrics.kept_sums(output, run.dataset)} for output in outputs]


def check_finite(scores: list[dict], run: "Run") -> None:
    """Raises where the loss on the test examples is no number, or one whose perplexity is none."""
    if mean_loss(scores) < math.log(sys.float_info.max):
        return
    what = f"the loss on the test rows is {mean_loss(scores):.3g} nats a token"
    if not run.method.trains:
        raise ValueError(f"{what} without any training")
    raise Diverged(what)


def add_margins(model, outputs: list[dict], before: list[dict], run: "Run") -> None:
    """Gives each output whose example has a worse answer its margin: by how many nats a token the reference
    is likelier. `before`: the untouched model's outputs."""
    examples = rejected(before, run)
    if not examples:
        return
    with run.meter.phase("evaluate"):
        scores = likelihoods(model, examples, run)
    worse = {e.id: mean_loss([score]) for e, score in zip(examples, scores, strict=True)}
    for output in outputs:
        if output["id"] in worse:
            output["margin"] = worse[output["id"]] - mean_loss([output])


def rejected(before: list[dict], run: "Run") -> list[Example]:
    """The scored examples with a worse response: the preference pair's, else the untouched model's answer, as
    far as that is another one than the reference."""
    answers = {answer["id"]: answer for answer in before}
    examples = []
    for example in run.scored:
        if not example.prompt:  # plain text has no better and worse answer
            continue
        ids = example.rejected_ids
        answer = answers.get(example.id)
        if not ids and answer and answer["output"] != example.reference:
            room = run.hp.max_length - len(example.prompt_ids)
            ids = run.template.response_ids(example.prompt, answer["output"])[:room]
            if answer["stopped"] and example.response_ids[-1] in run.decoder.stops:
                ids.append(example.response_ids[-1])
        if ids:
            examples.append(replace(example, response_ids=ids))
    return examples


def outputs_before(folder: str | None) -> list[dict]:
    """The test outputs of the untouched model, which ran before; none where that failed."""
    try:
        record = RunRecord.from_json((Path(folder or "") / RECORD).read_text("utf-8"))
        lines = (Path(folder or "") / OUTPUTS).read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines] if record.ok else []
    except (OSError, ValueError):
        return []
