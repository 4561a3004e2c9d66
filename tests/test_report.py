import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import fabricate
import numpy as np
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from harness.record import SEAL, Data, Provenance, Sizes, Steps, Tokens
from harness.report import render
from harness.report.certificate import certificate
from harness.report.comparison import comparisons
from harness.report.differences import noise_floor
from harness.report.plots.labels import place_labels
from harness.report.tables import brief, choose
from harness.report.text import markdown, plain, shorten, spread
from harness.spec import Hyperparams
from harness.store import Store

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "</p></div><a href='javascript:alert(1)'>x</a>",
    "[x](javascript:alert(1)) ![x](http://evil/x.png)",
    "| a | b |\n| --- | --- |\n| c | d |",
    "`code` ```\nfence\n``` ~~gone~~ **loud** _quiet_ $x^2$",
    "\x1b[31mred\x1b[0m \x00 \x07",
    "\u202egnp.exe \u2066x\u2069 \u200bhidden",
    "\ud800 lone",
    "@everyone www.evil.example https://evil.example a@b.example #1 &lt;b&gt;",
    "<!-- comment --> <b>bold</b> {{ 7 * 7 }} {% raw %}",
    "- item\n# heading\n> quote\n1. one\n---\n===",
    "",
    "x" * 1_000_000,
]


pytestmark = pytest.mark.usefixtures("undrawn")


class Tags(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.text, self.policy = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def handle_comment(self, data):
        self.tags.append(("comment", {}))


UNKNOWN = {"sizes": Sizes(), "provenance": Provenance(), "tokens": Tokens(), "data": Data()}


def rendered(folder: Path, results: Path | None = None, **options) -> tuple[str, str]:
    """-> report.md, report.html"""
    render(Store(results or folder), folder / "out", now="noon", **options)
    return tuple((folder / "out" / f"report.{kind}").read_text("utf-8") for kind in ("md", "html"))


def part(text: str, heading: str) -> str:
    """Of a report.md, what stands under a heading."""
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> Path:
    """QLoRA and GaLore, 3 seeds, both bases."""
    return fabricate.results(tmp_path_factory.mktemp("usual"))


@pytest.mark.drawn
def test_rendered_twice_is_the_same_bytes_but_for_the_time(usual, tmp_path):
    def files(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    for now in ("noon", "night"):
        render(Store(usual), tmp_path / now, now=now)
    one, two = files(tmp_path / "noon"), files(tmp_path / "night")
    assert {"plots/scores.png", "plots/scores.svg", "plots/loss-sft.png"} <= set(one)
    for name in ("report.md", "report.html"):
        lines = zip(one.pop(name).splitlines(), two.pop(name).splitlines(), strict=True)
        assert [(a, b) for a, b in lines if a.replace(b"noon", b"night") != b] == []
        assert (tmp_path / "noon" / name).read_bytes() != (tmp_path / "night" / name).read_bytes()
    assert one == two


def test_the_briefs_table_has_its_columns_and_every_row(usual):
    [comparison] = comparisons(Store(usual).load()[0])
    table = brief(comparison, comparison.techniques)
    assert table.columns == [
        "Technique", "BLEU-4 (before)", "BLEU-4 (after)", "ROUGE-L (before)", "ROUGE-L (after)",
        "Perplexity (before)", "Perplexity (after)", "Peak memory (GiB)", "Training time (h)",
    ]  # fmt: skip
    assert [row[0] for row in table.rows] == ["Base", "Base, 4 bits", "QLoRA", "GaLore"]
    base, own, qlora, galore = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert base["BLEU-4 (before)"] == base["BLEU-4 (after)"] == qlora["BLEU-4 (before)"]
    assert own["BLEU-4 (before)"] == own["BLEU-4 (after)"] != base["BLEU-4 (after)"]
    assert base["Peak memory (GiB)"] == base["Training time (h)"] == "–"
    values = [r.scores["bleu4"] for r in Store(usual).load()[0] if r.spec.method == "galore"]
    assert galore["BLEU-4 (after)"] == f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def test_the_answer_says_the_difference_with_its_interval(usual, tmp_path):
    text, _ = rendered(tmp_path, usual)
    assert "GaLore has the highest BLEU-4" in text and "ahead of QLoRA (95% CI" in text
    assert "QLoRA took the least memory, 5.1 GiB; the highest mean, of GaLore, is 1.8 times as much." in text
    assert "Not everything was the same" not in text


def test_the_same_run_again_shows_the_noise_and_is_no_seed(tmp_path):
    results = fabricate.results(tmp_path / "r")
    again = [fabricate.record("qlora", 1, repeat=n) for n in (1, 2)]
    again[0].phases["train"].seconds *= 1.1
    records = Store(results).load()[0] + again
    [comparison] = comparisons(records)
    assert [len(t.records) for t in comparison.trained] == [3, 3]
    (technique,) = (t for t in comparison.trained if t.repeats)
    run = next(r for r in technique.records if r.spec.seed == 1)
    again[0].scores, again[1].scores = dict(run.scores), {**run.scores, "bleu4": run.scores["bleu4"] + 0.5}
    table = noise_floor(comparison)
    assert table.columns == [
        "The same run again",
        "Runs",
        "BLEU-4",
        "ROUGE-L",
        "Perplexity",
        "Peak memory",
        "Training time",
    ]
    assert table.rows == [["QLoRA (seed 1)", "3", "0.50", "0.000", "0.00", "0.0%", "10.0%"]]
    assert noise_floor(comparisons(Store(results).load()[0])[0]) is None


def test_a_run_that_was_disturbed_has_no_time(tmp_path):
    results = fabricate.results(tmp_path / "r")
    busy = "other processes took 0.9 of 2 cores"
    fabricate.keep(results, fabricate.record("qlora", 1, disturbed=[busy]))
    fabricate.keep(results, fabricate.record("qlora", 0, disturbed=[]))
    text, _ = rendered(tmp_path, results)
    lead = part(text, "What was found")
    assert "Times of disturbed runs are not ranked: QLoRA (1 run)." in lead
    assert "least memory" in lead and "least training time" not in lead
    main = part(text, "Results")
    marked = [line.split(" | ")[0] for line in main.split("\n") if line.endswith("\\* |")]
    assert marked == ["| QLoRA"] and "\\* With a run that was disturbed" in main
    fine, details = certified(*Store(results).load()[0])["A machine of its own"]
    assert (
        fine is False
        and f"QLoRA (seed 1): {busy}" in details
        and "not recorded for QLoRA (seed 2)" in details
    )
    assert "| A machine of its own | NO |" in text


@pytest.mark.parametrize("rows", [12, 20])
def test_few_rows_rank_nothing(tmp_path, rows):
    for method, seeds in (("base", [0]), ("qlora", range(3)), ("galore", range(3))):
        for seed in seeds:
            fabricate.keep(
                tmp_path / "r", fabricate.record(method, seed), fabricate.outputs(method, seed, rows)
            )
    text, _ = rendered(tmp_path, tmp_path / "r")
    few = rows < 20
    assert ("12 test rows: no ranking by scores" in text) == few == ("no ranking: 12 test rows" in text)
    assert ("has the highest BLEU-4" in text or "In BLEU-4, " in text) != few
    assert ("Against the untouched model, BLEU-4" in part(text, "What was found")) != few
    assert "took the least memory" in text


def test_one_seed_ranks_nothing(tmp_path):
    text, _ = rendered(tmp_path, fabricate.results(tmp_path / "r", seeds=(0,)))
    assert "Single seed: no ranking, which takes 3. Measured were QLoRA (BLEU-4 2" in text
    assert "highest" not in text.split("## Results")[0] + part(text, "What was found")
    assert "least memory" not in text


@pytest.mark.drawn
def test_failed_runs_stay_with_their_status(tmp_path):
    results = fabricate.results(tmp_path / "r")
    lost = {"phases": {}, "training": [], "hashes": {}, **UNKNOWN}
    for found in (
        fabricate.record("dora", status="oom_gpu", error="out of memory on the GPU", **lost),
        fabricate.record("lora", 1, status="diverged", error="the loss was nan at step 12 of 60", **lost),
        fabricate.record("reft", card={}, status="unsupported", error="needs pyreft", **lost),
        *(fabricate.record("lora", seed) for seed in (0, 2, 3)),
    ):
        fabricate.keep(results, found)
    text, _ = rendered(tmp_path, results)
    main = text.split("## Results")[1].split("##")[0]
    assert "| DoRA – out of GPU memory | " in main
    assert "| LoRA – 1 of 4 seeds: diverged at step 12 | " in main
    assert "| reft – unsupported: needs pyreft | " in main
    assert "LoRA (a seed diverged)" in text  # three good seeds do not make up for it
    assert "no ranking: a seed diverged" in text


def test_a_store_of_failures_alone_still_reports(tmp_path):
    nothing = {"card": {}, "hashes": {}, "phases": {}, **UNKNOWN}
    nothing |= {name: [] for name in ("training", "validation", "step_seconds")}
    for method in ("base", "qlora"):
        found = fabricate.record(method, status="failed", **nothing)
        fabricate.keep(tmp_path / "r", found)
    text, _ = rendered(tmp_path, tmp_path / "r")
    assert "None of them has a result." in text


@pytest.mark.drawn
def test_null_and_missing_numbers_are_dashes_not_zeros(tmp_path):
    results = tmp_path / "r"
    fabricate.keep(results, fabricate.record("base"))
    found = fabricate.record("qlora", sizes=Sizes(), tokens=Tokens(), step_seconds=[])
    found.training[3]["loss"] = None
    for phase in found.phases.values():
        phase.peak_allocated = phase.peak_host = phase.joules = None
    test = fabricate.outputs("qlora")
    test[0]["nll"] = None
    fabricate.keep(results, found, test)
    text, _ = rendered(tmp_path, results)
    brief = next(line.split(" | ") for line in text.splitlines() if line.startswith("| QLoRA |"))
    assert brief[7] == brief[8] == "–", "perplexity after, peak memory"
    assert "nan" not in text.lower().replace("nanogpt", "")


@pytest.mark.drawn
def test_random_weights_have_costs_and_no_scores(tmp_path):
    for method, seed in (("base", 0), ("qlora", 0), ("qlora", 1)):
        fabricate.keep(tmp_path / "r", fabricate.record(method, seed, model="random:big/model"))
    text, _ = rendered(tmp_path, tmp_path / "r")
    assert "only the cost columns mean anything" in text.split("## Results")[0]
    row = next(line for line in text.splitlines() if line.startswith("| QLoRA |"))
    assert row.startswith("| QLoRA | 2 | – | – | – | – | – | – | 5.10")
    assert "Answers side by side" not in text and "scores.png" not in text and "cost.png" in text


def test_notices_and_differences_stand_before_the_results(tmp_path):
    dataset = fabricate.DATASET | {"notice": "This shows the tool, not the methods."}
    fabricate.keep(tmp_path / "r", fabricate.record("base", dataset=dataset))
    fabricate.keep(tmp_path / "r", fabricate.record("qlora", dataset=dataset))
    other = fabricate.record("qlora", 1, dataset=dataset)
    other.hashes |= {"method_code": "new", "train": "other"}
    other.provenance = replace(other.provenance, device="cpu", packages={"torch": "1.0"})
    fabricate.keep(tmp_path / "r", other)
    galore = fabricate.record("galore", dataset=dataset)
    galore.hashes["batches"] = ["shuffled"]
    fabricate.keep(tmp_path / "r", galore)
    (tmp_path / "r" / "broken").mkdir()
    (tmp_path / "r" / "broken" / "record.json").write_text('{"schema": 1')
    text, _ = rendered(tmp_path, tmp_path / "r")
    front = text.split("## Results")[0]
    assert "This shows the tool, not the methods." in front
    assert "QLoRA (seed 0) against GaLore (seed 0)" in front
    assert "cpu for QLoRA (seed 1)" in front and "1.0 for QLoRA (seed 1)" in front
    assert "QLoRA: stale" in front
    assert "could not be read: 1" in front and "broken" in text.split("Records that could not be read")[-1]


# The certificate


def certified(*records) -> dict[str, tuple]:
    """What should be the same -> whether it is, and the details."""
    [comparison] = comparisons(list(records))
    return {what: (fine, details) for what, fine, details in certificate(comparison)}


def test_steps_that_went_wrong_after_their_trial_are_told():
    one, other = (fabricate.record(method) for method in ("qlora", "galore"))
    one.kernels, other.kernels = (Steps("compiled + graph", apart=0.03) for _ in range(2))
    assert certified(one, other)["Kernels of the steps"] == (True, "compiled + graph")
    other.kernels.apart = 2.0
    fine, details = certified(one, other)["Kernels of the steps"]
    assert fine is False and "kernels=eager" in details
    assert details.startswith("after its last step") and "GaLore" in details and "QLoRA" not in details


def reading(method, given, learned, trained, supervised, rows, **more):
    """A record as a run leaves it that read so much."""
    found = fabricate.record(method)
    found.hashes |= {"given": given, "learned": learned, **more}
    found.tokens = Tokens(trained=trained, supervised=supervised, rows=rows)
    return found


READ, LEARNED = "Tokens the model was given in each step", "Tokens that carried loss in each step"


def test_the_certificate_is_of_what_was_read_not_of_what_was_planned():
    """The same plan for all; one reads rejected answers too, one half of the prompts."""
    same = [reading(m, ["a", "b"], ["c", "d"], 690, 117, 16) for m in ("qlora", "galore")]
    found = certified(*same)
    assert found[READ] == found[LEARNED] == (True, "")
    pairs = reading("reft", ["a", "x"], ["y", "z"], 1337, 250, 16)
    half = reading("full", ["a", "a"], ["c", "d"], 700, 117, 8)
    found = certified(*same, pairs, half)
    assert found["Rows planned for each step"] == (True, "")
    fine, details = found[READ]
    assert fine is False and details == (
        "seed 0: 690 tokens of 16 training rows for QLoRA (seed 0) and GaLore (seed 0) "
        "against 1,337 tokens of 16 training rows for ReFT (seed 0), not the same in 1 of 2 steps "
        "against 700 tokens of 8 training rows for Full fine-tuning (seed 0), not the same in 1 of 2 steps"
    )
    fine, details = found[LEARNED]
    assert fine is False and "250 tokens for ReFT (seed 0), not the same in 2 of 2 steps" in details
    assert "117 tokens for QLoRA (seed 0), GaLore (seed 0) and Full fine-tuning (seed 0)" in details


def test_a_record_of_before_is_not_certified():
    old = [fabricate.record(method) for method in ("qlora", "galore")]
    assert certified(*old)[READ] == certified(*old)[LEARNED] == (None, "not recorded")
    new = reading("full", ["a"], ["b"], 1, 1, 1)
    assert certified(*old, new)[READ] == (None, "not recorded for QLoRA (seed 0) and GaLore (seed 0)")
    assert certified(*old)["Arithmetic of the training, as measured"] == (None, "not recorded")
    assert "Rejected answers" not in certified(*old)


def test_the_certificate_names_the_arithmetic_of_each_row():
    records = [fabricate.record(method) for method in ("base", "qlora", "full")]
    for record in records:
        phases = ("training", "scoring") if record.spec.trains else ("scoring",)
        record.arithmetic = {p: {"residual stream": "bfloat16", "products": "bfloat16"} for p in phases}
    fine, details = certified(*records)["Arithmetic of the training, as measured"]
    assert fine and details == "residual stream in bfloat16, products in bfloat16"
    records[-1].arithmetic["training"]["residual stream"] = "float32"
    fine, details = certified(*records)["Arithmetic of the training, as measured"]
    assert fine is False
    assert "residual stream in float32, products in bfloat16 for Full fine-tuning (seed 0)" in details
    assert certified(*records)["Arithmetic of the scoring, as measured"][0] is True


def test_the_certificate_says_whether_a_test_prompt_was_answered_in_training():
    what = "No test prompt was answered in training"
    records = [fabricate.record(method) for method in ("base", "qlora", "galore")]
    assert certified(*records)[what] == (None, "not recorded")
    for record in records[1:]:
        record.data = Data(answered={"test": 0, "validation": 0}, rows={"test": 5934})
    fine, details = certified(*records)[what]
    assert fine and details.startswith("0 of 5934") and "not recorded for Base" in details
    records[2].data.answered = {"test": 27, "validation": 0}
    fine, details = certified(*records)[what]
    assert fine is False and "27 test prompts were, in GaLore (seed 0)" in details


def test_rejected_answers_come_from_one_untouched_model():
    a, b, c = (reading(m, ["a"], ["b"], 1, 1, 1, before=x)
               for m, x in (("qlora", "aa"), ("galore", "aa"), ("full", None)))  # fmt: skip
    assert certified(a, b)["Rejected answers"][0] is True
    fine, details = certified(a, b, c)["Rejected answers"]
    assert fine is False and "no answers for Full fine-tuning (seed 0)" in details


def test_runs_that_are_no_runs_are_named_and_the_rest_is_reported(tmp_path):
    results = fabricate.results(tmp_path / "r", seeds=(0, 1))
    faults = {
        "qlora-s1": ("outputs.jsonl", lambda text: text[:5000]),
        "galore-s1": ("record.json", lambda text: text.replace('"axis"', '"aim"')),
    }
    for name, (file, change) in faults.items():
        (path,) = results.glob(f"{name}-*/{file}")
        path.write_text(change(path.read_text()))
    text, _ = rendered(tmp_path, results)
    assert "| QLoRA | ok | 1 of 1 |" in text and "| GaLore | ok | 1 of 1 |" in text
    end = text.split("## Records that could not be read")[1]
    assert all(name in end for name in faults) and "nothing was deleted" in end


def spoiled(method: str, seed: int = 0, **changes) -> list[dict]:
    """Outputs as a ruined model gives them: nothing is right, and all of it is unlikely."""
    test = fabricate.outputs(method, seed)
    for output in test:
        output["nll"] = 24.0 * output["tokens"]
        output["sums"]["bleu4"][2:6] = [0, 0, 0, 0]
        output["sums"]["rouge_l"] = output["sums"]["reward"] = [0.0, 1]
    return [{**output, **changes} for output in test]


@pytest.mark.drawn
def test_what_is_far_worse_than_the_untouched_model_is_said_first(tmp_path):
    results = fabricate.results(tmp_path / "r", methods=("qlora", "galore"), seeds=(0, 1, 2))
    fabricate.keep(results, fabricate.record("lora"), spoiled("lora"))
    fabricate.keep(results, fabricate.record("dora"), spoiled("dora", nll=1e6))
    lead = part(rendered(tmp_path, results)[0], "What was found")
    base = next(r for r in Store(results).load()[0] if r.spec.method == "base").scores
    said = (
        f"scored on the same 90 test rows. Worse than the untouched model by far: LoRA (perplexity "
        f"26,489,122,130 against {base['perplexity']:.2f}, BLEU-4 0.00 against "
        f"{base['bleu4']:.2f} and ROUGE-L 0.000 against {base['rouge_l']:.3f}) and "
        "DoRA (perplexity too large to write against"
    )
    assert said in lead.replace("\\", "")
    assert "QLoRA (perplexity" not in lead and "GaLore (perplexity" not in lead


def test_what_is_no_better_than_a_useless_untouched_model_is_not_far_worse(tmp_path):
    for method in ("base", "qlora"):  # neither can do anything
        test = [output | {"nll": 24.0 * output["tokens"]} for output in spoiled(method)]
        for output in test[: 3 * (method == "base")]:
            output["sums"]["bleu4"][2] = 1
        fabricate.keep(tmp_path / "poor", fabricate.record(method), test)
    for folder in (fabricate.results(tmp_path / "usual"), tmp_path / "poor"):
        assert "by far" not in rendered(tmp_path, folder)[0]


@pytest.mark.parametrize("beyond", [0, 3, 30])
def test_references_that_no_answer_can_reach_are_counted_beside_the_score(beyond, tmp_path):
    for method in ("base", "qlora"):
        test = fabricate.outputs(method)
        for i, output in enumerate(test):
            output["tokens"] = 130 if i < beyond else 129  # 128 and the end mark are what an answer may have
        fabricate.keep(tmp_path / "r", fabricate.record(method), test)
    text, _ = rendered(tmp_path, tmp_path / "r")
    text = text.replace("\\", "")
    said = f"{beyond} of 90 references are longer than an answer may be (hp.max_new_tokens, 128 tokens)"
    assert (said in part(text, "Results")) == (beyond > 0)
    assert (said in part(text, "What was found")) == (beyond > 9), (
        "a tenth of them concerns who reads nothing but the lead"
    )


def test_preferences_are_compared_over_the_same_answers_alone(tmp_path):
    answers = {"base": "a", "qlora": "a", "galore": "a"}

    def report(folder: str) -> tuple[str, str]:
        for method, digest in answers.items():
            found = fabricate.record(method)
            found.hashes["before"] = digest
            test = fabricate.outputs(method)
            if digest is None:
                test = [{k: v for k, v in output.items() if k != "margin"} for output in test]
            fabricate.keep(tmp_path / folder, found, test)
        text = rendered(tmp_path, tmp_path / folder)[0].replace("\\", "")
        return text.split("## Results")[0], text.split("## More on quality")[1].split("##")[0]

    lead, quality = report("same")
    assert "Preference accuracy (after)" in quality and "untouched model had other" not in lead
    answers["galore"] = None
    lead, quality = report("none")
    assert "Preference accuracy (after)" in quality
    assert "GaLore (seed 0) had no answers of the untouched model to prefer references to" in lead
    answers["galore"] = "b"
    lead, quality = report("others")
    assert "Preference accuracy" not in quality
    assert "other answers for Base (seed 0) and QLoRA (seed 0) against GaLore (seed 0)" in lead


def mixed(method: str, formats: dict, **changes):
    """A record whose parts are of these formats."""
    found = fabricate.record(method)
    parts = [{**part, "format": formats[part["name"]]} for part in found.spec.dataset["parts"]]
    found.spec = replace(found.spec, dataset={**found.spec.dataset, "parts": parts})
    found.hashes |= changes
    return found


def test_a_text_among_questions_has_no_reference_out_of_reach(tmp_path):
    names = [part["name"] for part in fabricate.record("base").spec.dataset["parts"]]
    formats = dict.fromkeys(names, "messages") | {names[0]: "text"}
    for method in ("base", "qlora"):
        test = [{**output, "tokens": 130} for output in fabricate.outputs(method)]
        fabricate.keep(tmp_path / "r", mixed(method, formats), test)
    asked = sum(output["part"] != names[0] for output in fabricate.outputs("base"))
    text, _ = rendered(tmp_path, tmp_path / "r")
    assert f"{asked} of 90 references are longer than an answer may be" in text and 0 < asked < 90


def test_preferences_over_pairs_alone_are_not_compared_with_those_over_all(tmp_path):
    """Where the untouched model failed, its answers are missing beside the pairs that the data have."""
    names = [part["name"] for part in fabricate.record("base").spec.dataset["parts"]]
    formats = dict.fromkeys(names, "messages") | {names[0]: "pairs"}
    for method, before in (("base", "a"), ("qlora", "a"), ("galore", None)):
        test = fabricate.outputs(method)
        for output in test if before is None else ():
            if output["part"] != names[0]:
                del output["margin"]
        fabricate.keep(tmp_path / "r", mixed(method, formats, before=before), test)
    text, _ = rendered(tmp_path, tmp_path / "r")
    assert "Preference accuracy is left out" in text and "Preference accuracy (after)" not in text


def test_declared_deviations_are_footnotes(tmp_path):
    fabricate.keep(tmp_path / "r", fabricate.record("galore", overrides={"learning_rate": [1e-3, "why"]}))
    text, _ = rendered(tmp_path, tmp_path / "r")
    assert "| GaLore ¹ |" in text and "¹ GaLore: learning rate 0.001 instead of 0.0002: why" in text


def test_footnotes_are_numbered_as_the_table_mentions_them(tmp_path):
    for method, score in (("lora", 10), ("dora", 40), ("galore", 30), ("base", 1)):
        for seed in range(3 if score > 1 else 1):
            found = fabricate.record(method, seed)
            found.overrides = {} if score == 1 else {"learning_rate": (1e-3, method)}
            found.scores = {"bleu4": score + seed / 10}
            fabricate.keep(tmp_path / "r", found)
    text, _ = rendered(tmp_path, tmp_path / "r")
    rows = part(text, "Results").split("|\n| ")[2:]
    assert re.findall("[¹²³]", " ".join(row.partition("|")[0] for row in rows)) == ["¹", "²", "³"]
    assert re.findall("^[¹²³]", part(text, "Results"), re.MULTILINE) == ["¹", "²", "³"]


def test_options_that_differ_name_the_rows():
    records = [fabricate.record("lora", options={"rank": r, "alpha": 16}) for r in (8, 64)]
    assert [t.label for t in comparisons(records)[0].techniques] == ["LoRA (rank 8)", "LoRA (rank 64)"]


def test_bases_join_every_comparison_evaluated_alike():
    records = [fabricate.record("base")]
    records += [fabricate.record("lora", hp=Hyperparams(learning_rate=lr)) for lr in (1e-4, 1e-3)]
    records[2].started = "2026"
    newest, older = comparisons(records)
    assert newest.spec.hp.learning_rate == 1e-3
    assert [len(c.bases) for c in (newest, older)] == [1, 1]
    assert sum(len(c.techniques) for c in (newest, older)) == 4
    assert comparisons(records[:1])[0].trained == []


def test_each_objective_has_a_table_of_its_own_with_what_it_aims_at(tmp_path):
    fabricate.keep(tmp_path / "r", fabricate.record("base"))
    fabricate.keep(tmp_path / "r", fabricate.record("qlora"))
    found = fabricate.record("orpo")
    found.card |= {"title": "ORPO", "objective": "preference", "aim": "preference_accuracy"}
    fabricate.keep(tmp_path / "r", found)
    text, _ = rendered(tmp_path, tmp_path / "r")
    first, second = part(text, "Results").split("with the preference")
    assert "| QLoRA |" in first and "| ORPO |" not in first and "Preference accuracy" not in first
    assert (
        "| ORPO |" in second
        and "| QLoRA |" not in second
        and "Preference accuracy\u00a0↑<br>(after)" in second
    )
    assert "| Base |" in first and "| Base |" not in second, "untouched models stand there once"
    assert "QLoRA and ORPO" not in part(text, "What was found").partition("tied")[2]


def test_a_hybrid_is_argued_beside_what_was_measured(tmp_path):
    for method in ("base", "qlora", "galore"):
        fabricate.keep(tmp_path / "r", fabricate.record(method))
    found = fabricate.record("dora")
    why = {"performance": "It should be good.", "efficiency": "Cheap.", "generalisation": "Unknown."}
    found.card |= {
        "title": "Both",
        "hybrid": ["qlora", "galore"],
        "why": why,
        "cannot": {"merging": "no sum"},
    }
    found.notes = {"share of something": 0.123456}
    fabricate.keep(tmp_path / "r", found)
    text, _ = rendered(tmp_path, tmp_path / "r")
    section = text.split("## Hybrids")[1].split("\n## ")[0]
    assert "It should be good." in section
    assert [line.split(" |")[0] for line in section.splitlines() if line.startswith("| ")][2:] == [
        "| QLoRA", "| GaLore", "| Both"
    ]  # fmt: skip
    assert "share of something: 0.1235" in text and "merging: no sum" in text


def test_rows_of_a_local_copy_are_not_said_to_come_from_the_hub(tmp_path):
    found = fabricate.record("qlora")
    part, *others = found.spec.dataset["parts"]
    dataset = {**found.spec.dataset, "parts": [{**part, "hub": "owner/rows"}, *others]}
    for copies, folder in (({}, "hub"), ({part["name"]: "0123456789ab"}, "copy")):
        found.spec = replace(found.spec, dataset=dataset, fingerprints=copies)
        fabricate.keep(tmp_path / folder, found)
    assert "local cop" not in rendered(tmp_path, tmp_path / "hub")[0]
    text, _ = rendered(tmp_path, tmp_path / "copy")
    assert f"The rows of {part['name']} were read from local copies" in text
    assert "read from a local copy, fingerprint 0123456789ab" in text


def test_columns_that_were_not_used_are_named(tmp_path):
    found = fabricate.record("qlora")
    found.data.unused = {"alpaca": [], "tulu": ["id", "score"]}
    fabricate.keep(tmp_path / "r", found)
    text, page = rendered(tmp_path, tmp_path / "r")
    assert "| Columns not used | tulu: id and score |" in text
    assert "Columns not used" in page


@pytest.mark.drawn
def test_objectives_share_no_loss_plot(tmp_path):
    fabricate.keep(tmp_path / "r", fabricate.record("qlora"))
    orpo = fabricate.record("orpo")
    orpo.card["objective"] = "orpo"
    fabricate.keep(tmp_path / "r", orpo)
    text, _ = rendered(tmp_path, tmp_path / "r")
    assert "loss-sft.png" in text and "loss-orpo.png" in text and "not ranked with the rest" in text


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[str, str]:
    """A report whose every foreign text is hostile."""
    folder = tmp_path_factory.mktemp("hostile")
    evil = " ".join(HOSTILE[:12])
    dataset = fabricate.DATASET | {"title": "<b>|`data`", "notice": evil.replace("\ud800", "")}
    for method in ("base", "qlora", "galore"):
        command = "rm -rf `x` </pre><script>"
        found = fabricate.record(method, dataset=dataset, command=command, warnings=[evil])
        found.card |= {"title": method + "<i>|$x$", "formula": "</pre>" + HOSTILE[0] + "\n\n# x",
                       "paper": evil, "why": {"performance": evil}}  # fmt: skip
        found.provenance.cpu = evil
        found.data.unused = {"alpaca": [evil]}
        test = fabricate.outputs(method)
        for i, output in enumerate(test):
            output["output"] = HOSTILE[i % len(HOSTILE)]
            output["prompt"] = HOSTILE[(i + 3) % len(HOSTILE)]
            output["reference"] = HOSTILE[(i + 5) % len(HOSTILE)]
        (folder / "r" / found.spec.folder).mkdir(parents=True)
        value = json.loads(found.to_json().encode("utf-8", "replace"))
        del value[SEAL]  # it was of the texts before
        fabricate.keep(folder / "r", found.from_json(json.dumps(value)), test)
    lost = fabricate.record("dora", dataset=dataset, status="failed", error=evil.replace("\ud800", ""))
    fabricate.keep(folder / "r", lost)
    return rendered(folder, folder / "r")


@pytest.mark.fault(22)
def test_hostile_text_is_inert_in_html(hostile):
    page = Tags(hostile[1])
    tags = [tag for tag, _ in page.tags]
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert links and all(re.fullmatch(r"#[a-z0-9-]+", link) for link in links)
    assert not {"b", "i", "comment", "iframe", "object", "link", "form"} & set(tags)
    kinds = [attributes.get("type", "") for tag, attributes in page.tags if tag == "script"]
    assert kinds == ["application/json", ""], "the data, and our own script"
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert images and all(set(a) == {"src", "alt"} for a in images)
    sources = [attributes for tag, attributes in page.tags if tag == "source"]
    assert all(set(a) == {"media", "srcset"} and a["srcset"].startswith("data:") for a in sources)
    assert all(a["src"].startswith("data:image/svg+xml;base64,") for a in images)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith(
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-"
    )
    text = "".join(page.text)
    assert "<script>alert(1)</script>" in text and "{{ 7 * 7 }}" in text  # shown, as it is
    assert "⟨U+001B⟩[31mred" in text and "⟨U+202E⟩" in text and "⟨U+D800⟩" in text
    assert not set("\x00\x1b\x07\u202e\u2066\ud800") & set(hostile[1])
    assert "more)" in text and len(hostile[1]) < 5_000_000


@pytest.mark.fault(22)
def test_hostile_text_is_inert_in_markdown(hostile):
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    columns, cells, kinds, markup = None, 0, set(), set()
    for token in parser.parse(hostile[0]):
        kinds.add(token.type)
        if token.type == "thead_open":
            columns = 0
        elif token.type == "th_open":
            columns += 1
        elif token.type == "tr_open":
            cells = 0
        elif token.type == "td_open":
            cells += 1
        elif token.type == "tr_close":
            assert cells in (0, columns)
        for child in token.children or []:
            kinds.add(child.type)
            if child.type == "html_inline":
                markup.add(child.content)
            if child.type == "image":
                assert child.attrs["src"].startswith("plots/")
            if child.type == "text":
                assert "https://" not in child.content and "@everyone" not in child.content
    assert markup == {"<br>"}
    assert not kinds & {"html_block", "link_open", "fence", "code_inline", "s_open", "em_open", "hr"}
    pairs = pairwise(parser.parse(hostile[0]))
    paragraphs = [text.content for opened, text in pairs if opened.type == "paragraph_open"]
    assert not any(text.startswith("|") for text in paragraphs)  # what a broken row would leave


@pytest.mark.parametrize("text", HOSTILE[:-1])
def test_escaped_markdown_reads_as_the_text_it_was(text):
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    line = " ".join(plain(text).split())
    tokens = parser.parseInline(markdown(line))[0].children
    assert {t.type for t in tokens} <= {"text", "text_special"}
    assert "".join(t.content for t in tokens).replace("\u2060", "") == line


def test_texts_and_numbers_read_well():
    assert shorten("a" * 12, 10) == "a" * 10 + "… (2 characters more)"
    assert shorten("short", 10) == "short"
    assert (spread([]), spread([5.1]), spread([1.0, 3.0]), spread([-2000.0])) == (
        "–", "5.10", "2.00 ± 1.41", "−2,000")  # fmt: skip


def test_an_empty_store_is_named(usual, tmp_path):
    with pytest.raises(ValueError, match=r"no run to report in .*nowhere"):
        render(Store(tmp_path / "nowhere"), tmp_path / "out")
    with pytest.raises(ValueError, match="unknown format docx"):
        render(Store(usual), tmp_path / "out", formats=("docx",))


def test_examples_spread_over_parts_and_quality():
    parts = ["a"] * 50 + ["b"] * 50 + ["c"] * 2
    chosen = choose(parts, np.linspace(0, 1, 102), 10)
    assert [sum(parts[i] == p for i in chosen) for p in "abc"] == [4, 3, 2]
    assert len(set(chosen)) == len(chosen) and chosen[0] < 10 and chosen[3] > 40
    assert choose(["a"] * 3, np.array([np.nan, 1, 0]), 10) == [0, 2, 1]


@pytest.mark.parametrize("count", [2, 6])
def test_plot_labels_do_not_overlap(count):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rng = np.random.default_rng(count)
    for _ in range(5):
        figure = Figure(figsize=(5, 4))
        ax = figure.subplots()
        ax.set(xlim=(0, 1), ylim=(0, 1))
        centres = rng.uniform(0.3, 0.7, (count, 2))
        ax.to_label = [(x, y, f"Method {i}", [((x, y - 0.02), (x, y + 0.02))])
                       for i, (x, y) in enumerate(centres)]  # fmt: skip
        place_labels(ax)
        renderer = FigureCanvasAgg(figure).get_renderer()
        boxes = [text.get_window_extent(renderer) for text in ax.texts]
        boxes = [type(b).from_bounds(b.x0, b.y0, b.width, b.height) for b in boxes]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
