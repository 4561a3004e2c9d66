"""The report's order: the decision first, then the numbers, then why they can be believed."""

from dataclasses import asdict
from math import isfinite

from harness.data import OPENING, marked
from harness.metrics import METRICS
from harness.report import blocks as b
from harness.report import differences, plots, tables
from harness.report.answer import answer, too_long
from harness.report.certificate import certificate, facts
from harness.report.comparison import SEEDS_TO_RANK, STATUS, Comparison, Technique, score
from harness.report.decision import Budget, decision
from harness.report.ensembles import together
from harness.report.grades import graded
from harness.report.outputs import endings
from harness.report.stats import CONFIDENCE, POWER
from harness.report.text import UNKNOWN, duration, listed, number, shorten
from harness.report.tuning import tracks
from harness.report.unseen import unseen
from harness.report.verdicts import Verdicts, judged
from harness.spec import EVALUATION, RunSpec
from harness.store import Store
from harness.tuning import found_by

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
LIVE = (
    "Peak memory: the highest bytes of live tensors while attaching and training (allocated): the method's "
    "own demand, which depends least on the machine. On a GPU reserved adds what the allocator held, device "
    "adds the GPU's context: what must fit on the card. On a CPU live tensors are counted in repeated steps "
    "off the clock; host is the resident memory of the process, Python and its libraries included."
)
RESIDENT = (
    "Peak memory: the highest resident memory of the run's process while attaching and training, as live "
    "tensors were not counted. Python, its libraries and the loaded model are in it."
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
TWINS = "{} score the same in every test row and with every seed, as one and the same method would."
OWN = (
    " The data hold no pairs: the rejected answer is the untouched model's own, which most fine-tuning "
    "comes to like less than the reference."
)
CORRUPT = (
    "Nothing of these was used, and nothing was deleted. The command that made one of them runs it again and "
    "sets aside what stands there now."
)
RANKS = (
    "A rank is the places that the verdicts below leave to a technique: behind all that beat it, before all "
    "that it beats. Techniques that share a letter cannot be told apart."
)
FAMILY = (
    f"Intervals of {CONFIDENCE:.0%} that hold at once: of each score and cost, all pairs of techniques "
    "that are ranked with each other, each against the untouched models and a tuned one against itself with "
    "the shared hyperparameters are one family. Other test rows and other seeds are the chance; rows are "
    "shared by all, seeds as far as two techniques answer alike with each, and the seeds of a technique are "
    "taken to vary as they did or as those of all did, whichever is more. The verdict is a difference where "
    f"the interval excludes 0, else a tie, and takes {SEEDS_TO_RANK} seeds. Perplexity and costs are "
    "compared by their ratios, costs over seeds. Where one technique is far less steady than the others "
    "three seeds are few: the intervals then hold at about 90%."
)
SINGLE = " Where a technique has a single seed its intervals speak of other test rows alone."
NOISE = (
    "The noise floor: a run of this bench repeated unchanged, and how far apart it came out. A difference "
    "below it may have no reason."
)
SCATTER = (
    " against peak memory and training time. Large markers are means, small dots seeds; the grey steps are "
    "the Pareto front as far as it is known: each technique on it is known to gain more than all that cost "
    "less; the dashed line is the untouched model, as far as it is near."
)
DASHED = " Dashed: with the shared hyperparameters."
HOLLOW = " Hollow: with the shared hyperparameters, and a line to the same method at its own best."
RATES = (
    "Against the learning rate: what the trials of each search were judged by, a run each (lines: at what "
    "was asked for; hollow: at another value of the further option; a cross: it broke; a ring: chosen), and "
    "the scores of all arms on the test rows (means over as many seeds as is said; hollow: other options)."
)
WENT_ON = (
    "From a checkpoint, in another process. Their times, energy and peaks are those of the steps that count; "
    "what was lost, and what it took to go on, stands here alone."
)
ENERGY = "Energy: of the whole card while attaching and training, nothing else of the machine."


def document(
    comparisons: list[Comparison], store: Store, corrupt: list[str], budget: Budget | None = None
) -> list[b.Block]:
    found = []
    for i, comparison in enumerate(comparisons, 1):
        found += section(comparison, store, "" if i == 1 else f"-{i}", corrupt if i == 1 else [], budget)
    if corrupt:
        found += [b.Heading("Records that could not be read"), b.Prose(CORRUPT), b.Listing(corrupt)]
    return found


def section(
    comparison: Comparison, store: Store, suffix: str, corrupt: list[str], budget: Budget | None = None
) -> list[b.Block]:
    """One comparison, whole. `suffix`: of its plots' names."""
    verdicts = judged(comparison, store)
    checks = certificate(comparison)
    return [
        b.Title(comparison.title),
        *decision(comparison, verdicts, budget),
        b.Heading("What was found"),
        *(b.Prose(paragraph) for paragraph in answer(comparison, verdicts)),
        *notices(comparison, checks, corrupt),
        *results(comparison),
        *figures(comparison, verdicts, suffix),
        *significance(comparison, verdicts),
        *tracks(comparison, verdicts),
        *hybrids(comparison),
        *together(comparison, verdicts),
        *more(comparison),
        *unseen(comparison, store),
        *endings(comparison, verdicts, store),
        b.Heading("Cost of each phase"),
        phases(comparison),
        *graded(comparison, store),
        *generations(comparison, store),
        *setup(comparison),
        *chat_template(comparison),
        *cards(comparison),
        *fairness(comparison, checks),
        *measuring(comparison),
        *reproduction(comparison),
    ]


def notices(comparison: Comparison, checks: list, corrupt: list[str]) -> list[b.Notice]:
    found = []
    if notice := comparison.spec.dataset.get("notice"):
        found.append(notice)
    if comparison.random_weights:
        found.append(
            "The model's weights were drawn at random: only the cost columns mean anything. "
            "Scores are left out."
        )
    if comparison.trained and not comparison.before(comparison.trained[0]):
        found.append("The untouched model has not been evaluated: there is no score before.")
    if differing := [f"{what} ({details})" for what, fine, details in checks if fine is False]:
        found.append("Not everything was the same for all rows. " + ". ".join(differing) + ".")
    if copies := local_copies(comparison.spec):
        found.append(
            f"The rows of {listed(copies)} were read from local copies (--source) in place of the hub. Their "
            "source and licence are as the dataset's spec names them, and hold if the copies are those."
        )
    found += comparison.warnings + preferences(comparison)
    if corrupt:
        found.append(f"Records that could not be read: {len(corrupt)}. They are listed at the end.")
    return [b.Notice(text) for text in found]


def preferences(comparison: Comparison) -> list[str]:
    """What keeps preference accuracies from being compared."""
    found, again = [], "run again with --force"
    if len(sides := comparison.preferred_to) > 1:
        named = " against ".join(listed(runs, 4) for runs in sides.values())
        found.append(
            f"Preference accuracy is left out: the untouched model had other answers for {named}; {again}."
        )
    without = [
        f"{t.label} (seed {r.spec.seed})"
        for t in comparison.techniques for r in t.done if score(r, "preference_accuracy") is None
    ]  # fmt: skip
    if without and len(without) < sum(len(t.done) for t in comparison.techniques):
        found.append(
            f"{listed(without, 4)} had no answers of the untouched model to prefer references to; {again}."
        )
    return found


def local_copies(spec: RunSpec) -> list[str]:
    """Parts that have a place on the hub, and were read from elsewhere."""
    parts = spec.dataset.get("parts", [])
    return [part["name"] for part in parts if part.get("hub") and part["name"] in spec.fingerprints]


def results(comparison: Comparison) -> list[b.Block]:
    marks, notes = deviations(comparison)
    found = [b.Heading("Results")]
    objectives = comparison.tables
    if "sft" in objectives or not objectives:
        found.append(tables.brief(comparison, [*comparison.bases, *objectives.pop("sft", [])], marks))
    for name, techniques in objectives.items():
        own = techniques[0].aim == "preference_accuracy" and not comparison.pairs
        aim = METRICS[techniques[0].aim].label.lower()
        said = f"Techniques with the {name} objective. It aims at {aim}, not at"
        found += [
            b.Prose(
                f"{said} the likelihood of references, so they are not ranked with the others." + own * OWN
            ),
            tables.brief(comparison, [*comparison.bases, *techniques], marks, techniques[0].aim),
        ]
    found[-1].notes += [LIVE if comparison.counted else RESIDENT, *notes]
    if beyond := comparison.out_of_reach:
        found[-1].notes.append(
            f"{beyond:,} of {len(comparison.parts):,} {too_long(comparison)}; no answer can equal them."
        )
    return found


def more(comparison: Comparison) -> list[b.Block]:
    """What the brief's table leaves out: other scores, what it cost, what has no result."""
    found: list[b.Block] = []
    if not comparison.random_weights:
        quality = tables.quality(comparison)
        if "BLEU-4 (own base)" in quality.columns:
            own = {comparison.own_base(t).label for t in comparison.techniques if comparison.own_base(t)}
            if started := [t.label for t in comparison.techniques if any(r.start for r in t.done)]:
                own.add(f"of {listed(started)} its own start, scored before the first step")
            quality.notes = [
                f"Own base: the model that a method starts from where that is not the untouched one "
                f"({'; '.join(sorted(own))}), so that what rounding or a start of its own costs or gains is "
                "seen apart from the training."
            ]
        found += [b.Heading("More on quality"), quality]
        if by_part := tables.by_part(comparison):
            found += [b.Heading("Scores on each part of the data"), by_part]
    found += [b.Heading("More on cost"), tables.cost(comparison)]
    lost = [
        f"{technique.label} (seed {r.spec.seed}): {r.error or STATUS[r.status]}"
        for technique in comparison.techniques
        for r in technique.records
        if not r.ok
    ]
    went_on = [
        f"{technique.label} (seed {r.spec.seed}): after step {one.step:,}, {duration(one.lost)} of steps "
        f"lost, {duration(one.spent)} until it went on"
        for technique in comparison.techniques
        for r in technique.done
        for one in r.resumed
    ]
    found += [b.Heading("Runs without a result"), b.Listing(lost)] if lost else []
    return found + ([b.Heading("Runs that were stopped, and went on"), b.Prose(WENT_ON), b.Listing(went_on)]
                    if went_on else [])  # fmt: skip


def deviations(comparison: Comparison) -> tuple[dict[str, str], list[str]]:
    """Label -> footnote mark, and the footnotes: what a method has left of what was asked for."""
    marks, notes = {}, []
    for technique in comparison.techniques:
        for reason, changed in left(comparison, technique).items():
            mark = str(len(notes) + 1).translate(tables.SUPERSCRIPT)
            marks[technique.label] = f"{marks.get(technique.label, '')} {mark}"
            notes.append(f"{mark} {technique.label}: {', '.join(changed)}: {reason}")
    notes += [TWINS.format(listed([t.label for t in same], len(same))) for same in comparison.twins]
    return marks, notes


def left(comparison: Comparison, technique: Technique) -> dict[str, list[str]]:
    """Reason -> the hyperparameters, and options of a tuned one, that are others than was asked for."""
    found = {}
    for name, (value, reason) in sorted(technique.newest.overrides.items()):
        shared = getattr(comparison.spec.hp, name, UNKNOWN)
        found.setdefault(reason, []).append(f"{words(name)} {value} instead of {shared}")
    if search := comparison.search_of(technique):
        asked = search.tuning.identical.options
        for name, value in technique.spec.options.items():
            if value != asked.get(name):
                reason = found_by(len(search.trials))
                found.setdefault(reason, []).append(f"{words(name)} {value} instead of {asked.get(name)}")
    return found


def words(name: str) -> str:
    return name.replace("_", " ")


def significance(comparison: Comparison, verdicts: Verdicts) -> list[b.Block]:
    if not verdicts.standings:
        return []
    found: list[b.Block] = []
    if ranks := differences.ranks(comparison, verdicts):
        found += [b.Heading("Ranks"), b.Prose(RANKS), *ranks]
    single = any(len(t.done) == 1 for t in comparison.trained)
    found += [
        b.Heading("Differences"),
        b.Prose(FAMILY + SINGLE * single + smallest(verdicts)),
        *differences.differences(comparison, verdicts),
    ]
    if floor := differences.noise_floor(comparison):
        found += [b.Prose(NOISE), floor]
    return found


def smallest(verdicts: Verdicts) -> str:
    """The true differences that the bench could have seen."""
    found = []
    for standing in verdicts.standings.values():
        quantity, least = standing.quantity, standing.detectable()
        if isfinite(least):
            found.append(f"{quantity.amounts(least)[0]} {differences.inside(quantity.label)}")
    told = "Between two techniques, the smallest difference that this bench could have seen (with a power of"
    return f" {told} {POWER:.0%}, the median of all pairs) is {listed(found)}." if found else ""


def figures(comparison: Comparison, verdicts: Verdicts, suffix: str) -> list[b.Block]:
    found = []

    def add(name: str, caption: str, images: dict[str, bytes] | None) -> None:
        if images:
            found.append(b.Plot(name + suffix, caption, images))

    if comparison.random_weights:
        add("cost", "Peak memory against training time. Small dots are seeds.", plots.cost_alone(comparison))
    else:
        labels = listed([metric.label for metric in comparison.metrics])
        tuned = any(comparison.untuned(t) for t in comparison.trained)
        add("scores", labels + SCATTER + HOLLOW * tuned, plots.scores_by_cost(comparison, verdicts))
        if fronts := differences.fronts(comparison, verdicts):
            found += [b.Prose("Pareto fronts, as far as differences are verdicts:"), b.Listing(fronts)]
        add("tuning", RATES, plots.by_learning_rate(comparison))
        for objective in sorted({technique.objective for technique in comparison.trained}):
            add(
                f"loss-{safe(objective)}",
                f"Loss of the {objective} objective. Thick lines are means over seeds (training: also over "
                "neighbouring steps), thin lines, where there is room, single seeds." + DASHED * tuned,
                plots.loss_curves(comparison, objective),
            )
    return [b.Heading("Plots"), *found] if found else []


def safe(name: str) -> str:
    """As part of a file's name."""
    return "".join(c for c in name.lower() if c.isascii() and c.isalnum()) or "other"


def phases(comparison: Comparison) -> b.Table:
    table = tables.phases(comparison)
    table.notes = ["Median seconds and highest peaks over seeds, each peak that of the phase alone."]
    return table


def generations(comparison: Comparison, store: Store) -> list[b.Block]:
    found = [] if comparison.random_weights else tables.examples(comparison, store)
    if not found:
        return []
    how = (
        "The same test rows for all, spread over the parts of the data and, within each, from the worst "
        "to the best mean ROUGE-L. Each technique answers with its lowest seed."
    )
    return [b.Heading("Answers side by side"), b.Prose(how), *found]


def setup(comparison: Comparison) -> list[b.Block]:
    spec = comparison.spec
    dataset = spec.dataset
    templates = {r.data.template for r in comparison.records} - {None}
    templates = {"none: plain text"} if comparison.plain_text else templates
    rows = [["Model", spec.model], ["Data", dataset.get("title") or dataset.get("name") or UNKNOWN]]
    for part in dataset.get("parts", []):
        said = ["only tested"] if part.get("unseen") else []
        said += [part.get(key) for key in ("title", "hub", "format", "mapping")]
        said += [f"licence {part['licence']}" if part.get("licence") else None]
        if part.get("name") in local_copies(spec):
            said.append(f"read from a local copy, fingerprint {spec.fingerprints[part['name']]}")
        rows.append([f"Part {part.get('name')}", "; ".join(dict.fromkeys(filter(None, said)))])
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
    own = {name for technique in comparison.trained for name in technique.spec.changes}
    rows += [
        [words(name).capitalize(), str(value) + ", but for rows with one of their own" * (name in own)]
        for name, value in hp.items()
    ]
    return [b.Heading("What was the same for all"), b.Table(["Setting", "Value"], rows, words=(0, 1))]


def first(values):
    """The first that says anything: what all records of a comparison share."""
    return next(filter(None, values), {})


def padding(comparison: Comparison) -> str:
    """Its share of what the steps read. Methods with steps of their own, such as pairs, read otherwise."""
    shares = {}
    for technique in comparison.trained:
        tokens = technique.newest.tokens
        if tokens.trained is not None and (read := tokens.trained + (tokens.padded or 0)):
            shares.setdefault(f"{(tokens.padded or 0) / read:.1%}", []).append(technique.label)
    if len(shares) == 1:
        return f"{next(iter(shares))} of what the steps read"
    return "; ".join(f"{share} for {listed(labels)}" for share, labels in shares.items())


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
        text = shorten(marked(form["pieces"]), tables.LONGEST * 2)
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


def hybrids(comparison: Comparison) -> list[b.Block]:
    """Each hybrid beside the techniques that it joins: why it should be good, and what was measured."""
    found = []
    for technique in comparison.trained:
        parents = [r for r in comparison.trained if r.spec.method in (technique.card.get("hybrid") or ())]
        if technique.card.get("hybrid"):
            aim = technique.aim
            why = technique.card.get("why") or {}
            found += [
                b.Prose(
                    f"{technique.label}: {technique.card.get('summary')} Why it should be good, before any "
                    "measurement:"
                ),
                b.Listing([f"{name.capitalize()}: {text}" for name, text in why.items()]),
                b.Prose("What was measured, beside the techniques that it joins and that were run:"),
                tables.brief(comparison, [*parents, technique], aim="" if aim == "bleu4" else aim),
            ]
    return [b.Heading("Hybrids"), *found] if found else []


def fairness(comparison: Comparison, checks: list) -> list[b.Block]:
    said = {True: "yes", False: "NO", None: UNKNOWN}
    rows = [[what, said[fine], details] for what, fine, details in checks]
    found = [
        b.Heading("Fairness certificate"),
        b.Table(["The same for all rows", "", "Details"], rows, words=(0, 1, 2)),
    ]
    warned = {}
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
