"""What stands at a report's end: what was the same for all, what each technique is, why the numbers can be
believed, and how to make them again."""

from dataclasses import asdict

from harness.data import OPENING, marked
from harness.metrics import METRICS
from harness.report import blocks as b
from harness.report import tables
from harness.report.certificate import facts
from harness.report.comparison import Comparison, Technique
from harness.report.results import LIVE, RESIDENT, words
from harness.report.text import UNKNOWN, listed, number, shorten
from harness.spec import EVALUATION, RunSpec

MEASURED = (
    "BLEU-4: corpus level, 0 to 100, against one reference. ROUGE-L: F1, 0 to 1, mean over test rows.",
    "Perplexity: exp of the summed negative log-likelihood over the summed response tokens. "
    "Token accuracy: share of these tokens that the model ranks first. Both teacher-forced.",
    "Stop rate: share of answers that ended by themselves, before the length limit.",
    "Training time: attaching the method, all optimizer steps, and the answers that a method samples for "
    "them (rollout); loading, validating, evaluating and saving are not in it. Step: median of the "
    "optimizer steps after the warm-up.",
    "Tokens/s: tokens read in steps and before the first, all answers of a pair or a group counted, padding "
    "not, over the training time.",
    "± is the sample standard deviation over seeds. GiB is 2^30 bytes. An en dash is unknown, not 0.",
)
TEXT_MEASURED = (
    "The rows are plain text: windows of up to the longest length; every token but the first is scored. "
    f"To generate, a model is given the first {OPENING} tokens of a window (half of a shorter one) and its "
    "output is scored against as many of the next as it may write."
)
LOSS = {
    "all": "every answer of a conversation, with its end mark; scores and validation are of the last answer",
    "last": "the last answer of a conversation, with its end mark",
}
PLAIN_TEXT = "every token of the text but the first of a row"
ENERGY = "Energy: of the whole card while attaching and training, nothing else of the machine."


def setup(comparison: Comparison) -> list[b.Block]:
    spec = comparison.spec
    dataset = spec.dataset
    templates = {r.data.template for r in comparison.records if r.data.template}
    templates = {"none: plain text"} if comparison.plain_text else templates
    rows = [["Model", spec.model], ["Data", dataset.get("title") or dataset.get("name") or UNKNOWN]]
    for part in dataset.get("parts", []):
        said = ["only tested"] * bool(part.get("unseen"))
        said += [str(part[key]) for key in ("title", "hub", "format", "mapping") if part.get(key)]
        said += [f"licence {part['licence']}"] if part.get("licence") else []
        if part.get("name") in local_copies(spec):
            said.append(f"read from a local copy, fingerprint {spec.fingerprints[part['name']]}")
        rows.append([f"Part {part.get('name')}", "; ".join(dict.fromkeys(said))])
    sizes = {split: dataset.get(split) for split in ("train", "validation", "test")}
    rows.append(["Rows of each part", ", ".join(f"{s} {n}" for s, n in sizes.items() if n is not None)])
    origins = first(record.data.origins for record in comparison.records)
    own = {part: found for part, found in origins.items() if len(set(found.values())) > 1}
    if told := [f"{part}: {s} from its {own[part][s]}" for part in own for s in sizes if s in own[part]]:
        rows.append(["Splits of the source", ", ".join(told)])
    if left_out := first(record.data.left_out for record in comparison.records):
        rows.append(["Rows left out or cut", ", ".join(f"{words(k)} {n}" for k, n in left_out.items())])
    unused = first(record.data.unused for record in comparison.records)
    if named := [f"{part}: {listed(columns)}" for part, columns in unused.items() if columns]:
        rows.append(["Columns not used", "; ".join(named)])
    rows.append(["Prompt template", listed(sorted(templates)) or dataset.get("template") or UNKNOWN])
    if losses := {LOSS[loss] for r in comparison.records if (loss := r.data.loss)}:
        rows.append(["What is learned", PLAIN_TEXT if comparison.plain_text else listed(sorted(losses))])
    if padded := padding(comparison):
        rows.append(["Padding", padded])
    hp = asdict(spec.hp)
    if spec.untouched:
        hp = {name: hp[name] for name in EVALUATION}
    varied = {name for technique in comparison.trained for name in technique.spec.changes}
    rows += [
        [words(name).capitalize(), str(value) + ", but for rows with one of their own" * (name in varied)]
        for name, value in hp.items()
    ]
    return [b.Heading("What was the same for all"), b.Table(["Setting", "Value"], rows, words=(0, 1))]


def first(values):
    """The first that says anything: what all records of a comparison share."""
    return next(filter(None, values), {})


def padding(comparison: Comparison) -> str:
    """Its share of what the steps read. Methods with steps of their own, such as pairs, read otherwise."""
    shares: dict[str, list[str]] = {}
    for technique in comparison.trained:
        tokens = technique.newest.tokens
        if tokens.trained is not None and (read := tokens.trained + (tokens.padded or 0)):
            shares.setdefault(f"{(tokens.padded or 0) / read:.1%}", []).append(technique.label)
    if len(shares) == 1:
        return f"{next(iter(shares))} of what the steps read"
    return "; ".join(f"{share} for {listed(labels)}" for share, labels in shares.items())


def local_copies(spec: RunSpec) -> list[str]:
    """Parts that have a place on the hub, and were read from elsewhere."""
    parts = spec.dataset.get("parts", [])
    return [part["name"] for part in parts if part.get("hub") and part["name"] in spec.fingerprints]


def chat_template(comparison: Comparison) -> list[b.Block]:
    """One conversation in each form it could be taught in."""
    study = next((r.study for r in comparison.records if r.study), None)
    if not study:
        return []
    columns = ["Form", "Tokens", "Learned", "Tokens a row", "Learned a row", "Special tokens"]
    rows = [
        [
            name,
            str(form["tokens"]),
            str(form["learned"]),
            number(form["mean_tokens"], 0),
            number(form["mean_learned"], 0),
            " ".join(f"{count}×{token}" for token, count in form["special"].items()),
        ]
        for name, form in study["forms"].items()
    ]
    table = b.Table(columns, rows, words=(0, 5))
    table.notes = [
        f"The test conversation {study['id']}, uncut; a row: the mean of {study['rows']} of them. Learned: "
        "tokens that carry loss. As raw text all but the first do; in the other forms the answers do, with "
        "the mark that ends them."
    ]
    found: list[b.Block] = [b.Heading("The chat template, studied"), table]
    found.append(b.Prose("The same conversation in each form. What is learned stands between ⟦ and ⟧."))
    for name, form in study["forms"].items():
        text = shorten(marked([list(piece) for piece in form["pieces"]]), tables.LONGEST * 2)
        found += [b.Prose(name.capitalize() + ":"), b.Code(text.split("\n"))]
    return found


def cards(comparison: Comparison) -> list[b.Block]:
    found: list[b.Block] = []
    methods: dict[str, list[Technique]] = {}
    for technique in (*comparison.trained, *comparison.ensembles):
        methods.setdefault(technique.spec.method, []).append(technique)
    for techniques in methods.values():
        technique, card = techniques[0], techniques[0].card

        def of_each(said: list[str], techniques: list[Technique] = techniques) -> str:
            """Once where it is the same for all arms, else under the label of each."""
            labelled = (f"{t.label}: {text}" for t, text in zip(techniques, said, strict=True) if text)
            return said[0] if len(set(said)) == 1 else "; ".join(labelled)

        options = of_each([
            ", ".join(f"{words(k)} {v}" for k, v in sorted(t.spec.options.items()) if not t.spec.members)
            for t in techniques
        ])  # fmt: skip
        notes = of_each([
            ", ".join(f"{k}: {noted(v)}" for k, v in t.newest.notes.items()) for t in techniques
        ])  # fmt: skip
        why = card.get("why") or {}
        facts = [
            ("What it is", card.get("summary")),
            ("Paper", card.get("paper")),
            ("What it changes", card.get("axis")),
            ("Objective", card.get("objective")),
            ("Options", options),
            ("Weights", technique.newest.weights),
            ("This run found", notes),
            ("It cannot do", "; ".join(f"{k}: {v}" for k, v in (card.get("cannot") or {}).items())),
            *((name.capitalize(), why.get(name)) for name in ("performance", "efficiency", "generalisation")),
        ]
        found.append(
            b.Card(
                card.get("title") or technique.spec.method,
                card.get("formula") or "",
                [(k, v) for k, v in facts if v],
            )
        )
    return [b.Heading("The techniques"), *found] if found else []


def noted(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def fairness(comparison: Comparison, checks: list) -> list[b.Block]:
    said = {True: "yes", False: "NO", None: UNKNOWN}
    rows = [[what, said[fine], details] for what, fine, details in checks]
    found = [
        b.Heading("Fairness certificate"),
        b.Table(["The same for all rows", "", "Details"], rows, words=(0, 1, 2)),
    ]
    warned: dict[str, list[str]] = {}
    for technique in comparison.techniques:
        for record in technique.records:
            for warning in record.warnings:
                warned.setdefault(warning, []).append(f"{technique.label} (seed {record.spec.seed})")
    if warned:
        found += [b.Prose("Warnings of the runs themselves:")]
        found += [b.Listing([f"{text} ({listed(runs, 4)})" for text, runs in warned.items()])]
    return found


def measuring(comparison: Comparison) -> list[b.Block]:
    signatures = {
        f"{METRICS[metric].label}: {record.signatures[metric]}"
        for record in comparison.records
        for metric, value in record.scores.items()
        if value is not None and metric in record.signatures and not METRICS[metric].fault
    }
    energy = any((phase.joules is not None) for r in comparison.records for phase in r.phases.values())
    text = [TEXT_MEASURED] if comparison.plain_text else []
    items = [*MEASURED, *text, LIVE if comparison.counted else RESIDENT, *([ENERGY] if energy else [])]
    found = [b.Heading("How each number is measured"), b.Listing(items)]
    return found + ([b.Prose("Signatures:"), b.Listing(sorted(signatures))] if signatures else [])


def reproduction(comparison: Comparison) -> list[b.Block]:
    found: list[b.Block] = []
    made = [facts(record) for record in comparison.records]
    rows = []
    for key in dict.fromkeys(key for each in made for key in each):
        values = dict.fromkeys(str(each[key]) for each in made if each.get(key) is not None)
        if values:
            rows.append([words(key.removeprefix("packages.")), "; ".join(values)])
    if rows:
        found += [b.Heading("Environment"), b.Table(["What", "Value"], rows, words=(0, 1))]
    trials = [record for found in comparison.searches for record in found.records]
    commands = dict.fromkeys(r.command for r in [*comparison.records, *trials] if r.command)
    if commands:
        found += [b.Heading("Commands"), b.Code(list(commands))]
    spent = sum(p.seconds or 0 for r in comparison.records for p in r.phases.values())
    runs = len(comparison.records)
    found.append(b.Prose(f"{runs} runs, {number(spent / 3600, 2)} hours of them measured in phases."))
    return found
