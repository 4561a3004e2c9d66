"""The card of a run's model, as the hub reads it: metadata in YAML, then what was trained on what and how
well it did, from records alone."""

import json
import os
import re
import shlex
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from harness.metrics import METRICS, Metric
from harness.plain import listed, plain
from harness.record import RunRecord
from harness.report import blocks as b
from harness.report.certificate import facts
from harness.report.comparison import Comparison, Technique, score, seconds, watt_hours
from harness.report.differences import interval
from harness.report.stats import CONFIDENCE
from harness.report.text import UNKNOWN, duration, number, size
from harness.report.verdicts import Verdicts

ADAPTER, WHOLE, PARTS = "adapter", "whole", "parts"  # what a folder holds
WHAT = {ADAPTER: "An adapter for", WHOLE: "A whole model, from", PARTS: "The trained parts of"}
LIBRARY = {ADAPTER: "peft", WHOLE: "transformers"}
# As the hub's metrics are called.
METRIC_IDS = {"bleu4": "bleu", "rouge_l": "rouge", "token_accuracy": "accuracy"}
WRITTEN = {"chat": "the model's chat template", "instruction": "the Instruction/Response form"}
OVERLAP = "BLEU and ROUGE measure overlap with one reference, not helpfulness, truth or safety."
CHOSEN = "This is one run of a comparison of methods. Nobody has tried the model beyond these scores."


@dataclass(frozen=True)
class Origin:
    """What records do not know of a model. `base`: the base's id on the hub, null where it has none or nobody
    said it; `licence`: the base's; `address`: of these files; `form`: what they are; `merged`: made of what
    the run saved."""

    base: str | None
    licence: str | None
    address: str
    form: str
    merged: bool


def form_of(folder: Path) -> str:
    """What lies in a folder: an adapter alone, all weights, or parts that their method knows."""
    weights = {str(file.relative_to(folder)) for file in folder.rglob("*.safetensors")}
    if weights == {"adapter_model.safetensors"}:
        return ADAPTER
    return WHOLE if (folder / "config.json").is_file() else PARTS


# The head


def metadata(comparison: Comparison, technique: Technique, record: RunRecord, origin: Origin) -> str:
    """The card's YAML, its fences with it."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = record.spec.dataset
    parts = [part for part in dataset.get("parts", []) if not part.get("unseen")]
    hubs = [part["hub"] for part in parts if part.get("hub")]
    name = named_data(record)
    results = [
        EvalResult(
            "text-generation", hubs[0] if len(parts) == len(hubs) == 1 else name, name,
            METRIC_IDS.get(metric.name, metric.name), round(value, 6),
            dataset_split="test", metric_name=metric.label,
        )
        for metric in scored(comparison) if (value := score(record, metric.name)) is not None
    ]  # fmt: skip
    relation = "adapter" if origin.form == ADAPTER else "finetune"
    data = ModelCardData(
        language=dataset.get("language"),
        license=licence(origin, parts),
        library_name=LIBRARY.get(origin.form),
        pipeline_tag="text-generation",
        base_model=origin.base,
        base_model_relation=relation if origin.base else None,
        datasets=hubs or None,
        tags=["tuneoff", record.spec.method],
        model_name=record.folder,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def licence(origin: Origin, parts: list) -> str | None:
    """As the hub spells it, where base and data have one and the same; else they stand in words alone."""
    texts = [origin.licence, *(part.get("licence") for part in parts)]
    found = {"-".join(text.lower().split()) if text else None for text in texts}  # CC BY 4.0 -> cc-by-4.0
    return found.pop() if len(found) == 1 else None


def scored(comparison: Comparison) -> list[Metric]:
    if comparison.random_weights:
        return []
    return list(dict.fromkeys([*comparison.metrics, METRICS["perplexity"], METRICS["token_accuracy"]]))


def title(technique: Technique, record: RunRecord) -> str:
    label = " ".join(technique.label.split())
    return f"{record.spec.model.rpartition('/')[2]} with {label}, on {named_data(record)}"


def named_data(record: RunRecord) -> str:
    dataset = record.spec.dataset
    return " ".join(plain(dataset.get("title") or dataset.get("name") or "own data").split())


# Below it


def card(
    comparison: Comparison, technique: Technique, record: RunRecord, origin: Origin, verdicts: Verdicts
) -> list[b.Block]:
    return [
        *opening(record, origin),
        *scores(comparison, technique, record, verdicts),
        *use(record, origin, comparison.own_base(technique)),
        *trained_on(record, origin),
        *settings(record),
        *took(comparison, record),
        *limits(record, origin.merged),
    ]


def base_in_words(record: RunRecord, origin: Origin) -> str:
    if origin.base:
        return origin.base
    own = record.spec.fingerprints.get("model", UNKNOWN)
    return f"{record.spec.model}, a local folder (fingerprint {own})"


def opening(record: RunRecord, origin: Origin) -> list[b.Block]:
    told, run = record.card, f"Run {record.folder} (seed {record.spec.seed}) of a comparison by Tuneoff."
    method, summary = told.get("title") or record.spec.method, told.get("summary", "").rstrip(".")
    what = f"{WHAT[origin.form]} {base_in_words(record, origin)}, trained with {method}"
    paper = f" Method: {told['paper']}." if told.get("paper") else ""
    return [b.Lead(f"{what}: {summary}." if summary else f"{what}."), b.Prose(run + paper)]


def scores(
    comparison: Comparison, technique: Technique, record: RunRecord, verdicts: Verdicts
) -> list[b.Block]:
    """Of this run, and how far its method is from the untouched model."""
    before, rows = comparison.before(technique), []
    for metric in scored(comparison):
        if (value := score(record, metric.name)) is None:
            continue
        was = before.mean(partial(score, metric=metric.name)) if before else None
        standing, said = verdicts.standings.get(metric.name), [UNKNOWN, UNKNOWN]
        if standing and before:
            verdict = standing.verdict(technique.label, before.label)
            said = [interval(verdict.difference, standing.quantity), verdict.word or UNKNOWN]
        numbers = number(was, metric.decimals), number(value, metric.decimals)
        rows.append([f"{metric.label} ({metric.unit}; {metric.better} is better)", *numbers, *said])
    if not rows:
        return []
    n = len(technique.done)
    note = (
        f"On {len(comparison.parts):,} test rows. Difference: the mean over {n} seed{'s' * (n > 1)} of this "
        f"method less the untouched model, with an interval of {CONFIDENCE:.0%}: all of its comparison hold "
        "at once, and other test rows and other seeds are the chance. In percent where ratios count."
    )
    columns = ["Score", "Untouched", "This model", "Difference", "Verdict"]
    return [b.Heading("Scores"), b.Table(columns, rows, [note], words=(0, 3, 4))]


def use(record: RunRecord, origin: Origin, own: Technique | None) -> list[b.Block]:
    """Python that loads and asks it, and what that takes. `own`: the base in a form of its own, as 4 bits."""
    spec, said = record.spec, []
    base, here = json.dumps(origin.base or "BASE"), json.dumps(origin.address)
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if origin.form == WHOLE:
        load = [f"model = AutoModelForCausalLM.from_pretrained({here})"]
    elif origin.form == ADAPTER:
        lines.append("from peft import PeftModel")
        load = [f"base = AutoModelForCausalLM.from_pretrained({base})",
                f"model = PeftModel.from_pretrained(base, {here})"]  # fmt: skip
        if own:
            form = own.card.get("summary", "").rstrip(".") or "see its card in a report"
            said.append(f"The scores are with the base as Tuneoff's {own.spec.method} loads it: {form}.")
    else:
        lines += ["from pathlib import Path", "from harness import method  # Tuneoff's"]
        load = ["known = method.known_methods()",
                f"cls = method.resolve({spec.method!r}, method.find({spec.method!r}, known))",
                f"base = lambda **more: AutoModelForCausalLM.from_pretrained({base}, **more)",
                f"model = method.build(cls, {spec.options!r}).restore(base, Path({here}))"]  # fmt: skip
        said.append("Its method alone knows how these files act on the base.")
    if origin.form != WHOLE and not origin.base:
        said.append(f"BASE is {base_in_words(record, origin)}.")
    load.append(f"tokenizer = AutoTokenizer.from_pretrained({here})")
    if record.data.template == "chat" and not record.data.plain_text:
        load += ['asked = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}],',
                 '    add_generation_prompt=True, return_tensors="pt", return_dict=True)']  # fmt: skip
    else:
        text = "Once" if record.data.plain_text else "### Instruction:\\nSay hello.\\n\\n### Response:\\n"
        load.append(f'asked = tokenizer("{text}", return_tensors="pt")')
    load.append(f"told = model.generate(**asked, max_new_tokens={spec.hp.max_new_tokens})")
    load.append('print(tokenizer.decode(told[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))')
    prose = [b.Prose(" ".join(said))] if said else []
    return [b.Heading("Use it"), b.Code([*lines, "", *load]), *prose]


def trained_on(record: RunRecord, origin: Origin) -> list[b.Block]:
    dataset, data, rows = record.spec.dataset, record.data, []
    for part in (part for part in dataset.get("parts", []) if not part.get("unseen")):
        what = "; ".join(filter(None, dict.fromkeys([part.get("title"), part.get("mapping")])))
        source = part.get("hub") or f"{part.get('name')}, own rows"
        rows.append([source, part.get("licence") or "not known", what or UNKNOWN])
    splits = [split for split in ("train", "validation", "test") if split in data.rows]
    counts = [f"{data.rows[split]:,} {split}" for split in splits]
    said = [f"Rows: {listed(counts)}."] if counts else []
    if data.plain_text:
        said.append("Plain text, learned whole.")
    elif data.template in WRITTEN:
        learned = "the last answer" if data.loss == "last" else "every answer"
        said.append(f"Written in {WRITTEN[data.template]}, with loss on {learned} of a conversation.")
    own = origin.licence or "not known here, see its own card"
    said.append(f"Licence of the base: {own}. Mind it and those of the data before you share this model.")
    notice = [b.Notice(dataset["notice"])] if dataset.get("notice") else []
    table = b.Table(["Source", "Licence", "What it is"], rows, words=(0, 1, 2))
    return [b.Heading("Trained on"), *notice, table, b.Prose(" ".join(said))]


def settings(record: RunRecord) -> list[b.Block]:
    """Hyperparameters as they were for this run, and the method's options."""
    spec = record.spec
    said = asdict(spec.own_hp) | {name: value for name, (value, _) in record.overrides.items()}
    rows = [[name.replace("_", " "), plainly(value)] for name, value in said.items()]
    for name, (_, why) in record.overrides.items():
        rows.append([f"{name.replace('_', ' ')}: why its own", why])
    rows += [[f"{spec.method}.{name}", plainly(value)] for name, value in spec.options.items()]
    rows += [["weights", record.weights]] if record.weights else []
    return [b.Heading("Hyperparameters"), b.Table(["Setting", "Value"], rows, words=(0, 1))]


def plainly(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def took(comparison: Comparison, record: RunRecord) -> list[b.Block]:
    """Cost, machine, packages, and the command that makes it again."""
    sizes, rows = record.sizes, []
    if sizes.parameters and sizes.trainable is not None:
        share = number(100 * sizes.trainable / sizes.parameters, 3)
        rows.append(["trained parameters", f"{sizes.trainable:,} of {sizes.parameters:,} ({share} %)"])
    measured = {
        "training time": (seconds(record), duration),
        "peak memory of training": (comparison.peak_memory(record), size),
        "energy of the card in training": (watt_hours(record), lambda value: f"{number(value)} Wh"),
        "tokens read in training": (record.tokens.trained, lambda value: f"{value:,}"),
    }
    rows += [[what, shown(value)] for what, (value, shown) in measured.items() if value is not None]
    for name, value in facts(record).items():
        if value is not None:
            rows.append([name.removeprefix("packages.").replace("_", " "), str(value)])
    again = [b.Prose("The command that makes it again:"), b.Code([placeless(record.command)])]
    table = b.Table(["What", "Value"], rows, words=(0, 1))
    return [b.Heading("What it took"), table, *(again if record.command else [])]


def limits(record: RunRecord, merged: bool) -> list[b.Block]:
    spec, items = record.spec, [CHOSEN, OVERLAP]
    if language := spec.dataset.get("language"):
        items.append(f"Data and scores are of one language: {language}.")
    items.append(f"Rows were cut at {spec.hp.max_length} tokens, greedy answers at {spec.hp.max_new_tokens}.")
    if merged:
        items.append("The scores are of the run's own form; here it is merged into weights that are rounded.")
    items += [f"Its time is not its own: {reason}." for reason in record.disturbed or []]
    items += [PLACE.sub(r"\1", warning) for warning in record.warnings]
    return [b.Heading("Limits"), b.Listing(items)]


# No word of the machine

PLACE = re.compile(r"(?<![\w.:/~-])~?/(?:[^\s/'\"]+/)+([^\s/'\"]*)")  # a folder's or a file's; its last name


def placeless(command: str) -> str:
    """A command in which a last name stands for each place of the machine that it was typed on."""
    try:
        words = shlex.split(command)
    except ValueError:  # quotes of another program
        words = PLACE.sub(r"\1", command).split()
    return shlex.join(map(named, words))


def named(word: str) -> str:
    """`alpaca=/data/x.jsonl` -> `alpaca=x.jsonl`."""
    key, equals, value = word.rpartition("=")
    drawn = "random:" * value.startswith("random:")
    place = value.removeprefix(drawn)
    if os.path.isabs(place) or place.startswith(("~", "..")):
        value = drawn + os.path.basename(place.rstrip("/"))
    return key + equals + value
