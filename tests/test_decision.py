"""What the decision says, against benches whose truth is known by hand, and against the records."""

import re
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import fabricate
import numpy as np
import pytest
from test_verdicts import random_bench

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from harness.cli import main
from harness.cli.arguments import parse_arguments
from harness.report import Budget, Report, conclusion, render
from harness.report.budget import rounded_up
from harness.report.comparison import comparisons, read_outputs
from harness.report.decision import choices_of, decision
from harness.report.stats import Sample
from harness.report.verdicts import MEMORY, TIME, Entrant, Quantity, Standing, Verdicts
from harness.store import Store

ROOT = Path(__file__).parents[1]
GIB, BLEU = 2**30, Quantity("bleu4", "BLEU-4", decimals=2)
pytestmark = pytest.mark.usefixtures("undrawn")


def bench(arms: dict[str, tuple], base: float | None = None, **changes):
    """-> a comparison, and verdicts over three seeds that lie close together. Arms: BLEU-4, GiB of the card
    (of live tensors: 3 less), hours of training (of the whole run: a tenth more)."""
    records = []
    for name, (_, gib, hours) in arms.items():
        for seed in range(3):
            record = fabricate.record(name, seed, **changes)
            record.card["title"] = name
            for phase in record.phases.values():
                phase.peak_device, phase.peak_reserved, phase.seconds = GIB, GIB // 2, 0.0
            record.phases["train"].seconds = hours * 3600
            record.phases["generate"].peak_device = int(gib * GIB)
            record.phases["evaluate"].seconds = hours * 360
            records.append(record)
    if base is not None:
        records.append(fabricate.record("base"))

    def standing(quantity, values, error, against=()):
        of = [
            Entrant(n, Sample.of_seeds([v - error, v, v + error]), ("",), against) for n, v in values.items()
        ]
        one = [Entrant("Base", Sample.of_seeds([base]))] if against else []
        return Standing(quantity, of + one)

    against = ("Base",) if base is not None else ()
    metrics = [standing(BLEU, {n: v[0] for n, v in arms.items()}, 0.1, against)]
    costs = [standing(MEMORY, {n: np.log(v[1] - 3) for n, v in arms.items()}, 0.001),
             standing(TIME, {n: np.log(v[2] * 3600) for n, v in arms.items()}, 0.001)]  # fmt: skip
    standings = {s.quantity.name: s for s in metrics + costs}
    return comparisons(records)[0], Given(standings=standings, metrics=metrics, costs=costs, pairs={})


class Given(SimpleNamespace, Verdicts):
    """Verdicts without records."""


def said(comparison, verdicts, budget=None) -> list[str]:
    """Lines, in order."""
    blocks = decision(comparison, verdicts, budget)
    return [line for b in blocks for line in (b.items if b.kind == "listing" else [b.text])]


ARMS = {  # dear is the best; twice and cheap tie; slow is like cheap and takes longer; poor is the worst
    "dear": (30.0, 40, 3), "twice": (25.05, 20, 2), "cheap": (25.0, 10, 2), "slow": (25.0, 10, 5),
    "poor": (10.0, 6, 1),
}  # fmt: skip


def test_the_least_of_a_card_is_told_where_it_is_not_that_of_live_tensors():
    comparison, verdicts = bench({"lean": (20.0, 6, 1), "tight": (20.0, 10, 1)})
    for technique in comparison.trained:
        for record in technique.records:  # lean's allocator holds much beside its tensors
            record.phases["generate"].peak_device = (12 if technique.label == "lean" else 10) * GIB
    assert "Least memory: lean, 3 GiB, of live tensors; of the card tight, 10 GiB." in said(
        comparison, verdicts
    )


def test_without_a_budget_it_is_a_guide():
    lines = said(*bench(ARMS))
    apart = r"Best BLEU-4: dear, 30\.00; the next, twice, is 4\.95 worse \(95% CI 4\.\d\d to 5\.\d\d\)\."
    assert lines[1] == "dear, with the highest BLEU-4.", "a name stays as it is"
    assert lines[2] == "Best of both, score and cost: dear."
    assert re.fullmatch(apart, lines[3])
    assert lines[4:6] == ["Least memory: poor, 3 GiB.", "Least training time: poor, 60 min."]
    assert lines[6].startswith("Dominated") and lines[6].endswith(": twice and slow by cheap.")
    assert not any("fit" in line for line in lines)


def test_within_a_budget_it_says_what_fits_and_what_would_change_it():
    lines = said(*bench(ARMS), Budget(30 * GIB, 3 * 3600))
    assert (
        lines[1] == "Within 30 GiB and 3 h: cheap, tied for the highest BLEU-4; 1 other so tied is dominated."
    )
    assert lines[2] == "Fits: twice, cheap and poor, of 5."
    [over] = [line.removeprefix("Does not fit: ") for line in lines if line.startswith("Does not fit: ")]
    assert over == "dear (40 GiB, 10 GiB too much; 3.3 h, 18 min too long) and slow (5.5 h, 2.5 h too long)."
    [budget] = [line for line in lines if line.startswith("The budget: ")]
    assert re.fullmatch(
        r"The budget: dear, 4\.95 better \(95% CI 4\.\d\d to 5\.\d\d\) than twice, takes 40 GiB and 3.3 h\.",
        budget,
    )
    [tie] = [line for line in lines if line.startswith("More test rows")]
    assert "the tie of twice with cheap;" in tie
    assert lines[-1].startswith("Memory: what a run took of the card (device)") and "NVIDIA H200" in lines[-1]


def test_a_budget_that_nothing_fits_names_the_nearest():
    lines = said(*bench(ARMS), Budget(2 * 10**9, binary=False))
    assert lines[1] == "Within 2 GB: none of 5 techniques is known to fit."
    assert "The budget: poor needs least, 6.45 GB." in lines, "rounded up: who has 6.44 GB has too little"


def test_a_larger_budget_that_buys_nothing_is_said_to():
    arms = {"dear": (25.0, 40, 3), "cheap": (25.0, 10, 2), "small": (25.0, 9, 3)}
    lines = said(*bench(arms), Budget(30 * GIB))
    assert "No larger budget: in BLEU-4 nothing that does not fit is known to be better than cheap." in lines
    assert lines[1] == "Within 30 GiB: cheap or small, tied for the highest BLEU-4."
    assert any(
        "small has the lowest peak memory; cheap has the lowest training time." in line for line in lines
    )


def test_one_that_is_no_better_than_the_untouched_model_is_said_to_be():
    arms = {"a": (25.0, 10, 2), "b": (20.0, 9, 1)}
    assert "not known" not in said(*bench(arms, base=20.0))[1]
    worse = said(*bench(arms, base=25.02))[1]
    assert (
        worse == "a, with the highest BLEU-4, but not known to be better than the untouched model in BLEU-4."
    )
    harmed = said(*bench(arms, base=40.0))
    assert harmed[1] == "a, with the highest BLEU-4, but worse than the untouched model in BLEU-4: keep that."
    assert not any("Best of both" in line for line in harmed)
    assert [choice.take for choice in choices_of(*bench(arms, base=40.0), None)] == [[]]


def test_all_is_held_against_the_worst_seed_and_whole_runs():
    comparison, verdicts = bench(ARMS)
    cheap = next(t for t in comparison.trained if t.label == "cheap")
    cheap.records[1].phases["save"].peak_device = 31 * GIB
    lines = said(comparison, verdicts, Budget(30 * GIB))
    assert any("cheap (31 GiB, 1 GiB too much)" in line for line in lines)
    cheap.records[1].disturbed = ["other programs held up to 21 GiB of the card"]
    lines = said(comparison, verdicts, Budget(30 * GIB))
    assert lines[2].startswith("Fits: twice, cheap, slow") and any(
        line.startswith("Undisturbed runs of cheap") for line in lines
    )


def test_what_was_not_measured_is_not_said_to_fit():
    comparison, verdicts = bench(ARMS)
    cheap = next(t for t in comparison.trained if t.label == "cheap")
    for record in cheap.records:
        for phase in record.phases.values():
            phase.peak_device = None
    lines = said(comparison, verdicts, Budget(30 * GIB))
    assert "Not measured, and not known to fit: cheap (its memory)." in lines
    assert "cheap" not in lines[2]


def test_one_with_a_seed_that_ran_out_of_it_is_not_said_to_fit():
    comparison, verdicts = bench(ARMS)
    by = {t.label: t for t in comparison.trained}
    by["cheap"].records[1].status, by["poor"].records[0].status = "oom_gpu", "timeout"
    lines = said(comparison, verdicts, Budget(30 * GIB, 5 * 3600))
    assert "Not measured, and not known to fit: cheap (its memory) and poor (its time)." in lines
    assert any("cheap (1 of 3 seeds: out of GPU memory" in line for line in lines)


def test_a_gauge_that_failed_in_a_phase_is_not_believed():
    comparison, verdicts = bench(ARMS)
    for record in next(t for t in comparison.trained if t.label == "cheap").records:
        record.phases["generate"].peak_device, record.phases["train"].peak_reserved = None, 9 * GIB
    lines = said(comparison, verdicts, Budget(30 * GIB))
    assert "Not measured, and not known to fit: cheap (its memory)." in lines


def test_on_a_cpu_it_is_resident_memory_and_says_so():
    comparison, verdicts = bench(ARMS)
    for technique in comparison.trained:
        for record in technique.records:
            for phase in record.phases.values():
                phase.peak_device = phase.peak_reserved = None
                phase.peak_host = 5 * GIB
    lines = said(comparison, verdicts, Budget(4 * GIB))
    assert any("dear (5 GiB, 1 GiB too much)" in line for line in lines)
    assert "resident memory, which says nothing of a GPU's" in lines[-1]


def kept(folder: Path, *records) -> list[str]:
    """The decision on runs with outputs, by the report's own verdicts."""
    for record in (fabricate.record("base"), *records):
        fabricate.keep(folder, record)
    store = Store(folder)
    comparison = comparisons(store.load()[0])[0]
    if not comparison.random_weights:
        read_outputs(comparison, store)
    return said(comparison, Verdicts(comparison), Budget(20 * GIB))


def runs(method: str, seeds=(0, 1, 2), **changes):
    return [fabricate.record(method, seed, **changes) for seed in seeds]


def test_where_nothing_can_be_said_it_says_why(tmp_path):
    single = kept(tmp_path / "single", *runs("qlora", [0]), *runs("galore", [0]))
    assert single[1] == "Within 20 GiB: no choice by scores (single seed)."
    assert any(
        line.startswith("3 seeds that all stay finite: they would rank QLoRA (single") for line in single
    )
    one = kept(tmp_path / "one", *runs("qlora"))
    assert one[1] == "Within 20 GiB: QLoRA alone has a result, so there is no choice."
    random = kept(tmp_path / "random", *runs("qlora", model="random:x"), *runs("galore", model="random:x"))
    assert random[1] == "Within 20 GiB: no choice by scores (the weights were drawn at random)."
    assert any(line.startswith("Least memory: QLoRA") for line in random)
    assert not any("BLEU" in line or "tuned" in line for line in random)
    failed = kept(tmp_path / "failed", *runs("qlora", status="failed", error="x"))
    assert failed[1] == "Within 20 GiB: no technique has a result, and there is nothing to choose."
    assert kept(tmp_path / "base") == []


def test_a_failed_row_is_named_with_the_card_that_it_did_not_fit(tmp_path):
    full = runs("full", status="oom_gpu", error="CUDA out of memory")
    for record in full:
        record.provenance.device_bytes = 24 * GIB
    lines = kept(tmp_path, *runs("qlora"), *runs("galore"), *full)
    assert "Without a result: Full fine-tuning (out of GPU memory on a card of 24 GiB)." in lines
    assert "A result of Full fine-tuning, where there is none yet." in lines


def test_plain_text_is_judged_by_its_perplexity(tmp_path):
    methods = [*runs("qlora"), *runs("galore")]
    assert any("BLEU-4" in line for line in kept(tmp_path / "asked", *methods))
    for record in methods:
        record.data.plain_text = True
    lines = kept(tmp_path / "text", *methods)
    assert "the lowest perplexity" in lines[1] and not any("BLEU-4" in line for line in lines)


def test_each_objective_has_a_decision_of_its_own(tmp_path):
    other = runs("dora") + runs("lora")
    for record in other:
        record.card |= {"objective": "orpo", "aim": "preference_accuracy"}
    lines = kept(tmp_path, *runs("qlora"), *runs("galore"), *other)
    heads = [line for line in lines if line.startswith("Of the ")]
    assert [line.split(",")[0] for line in heads] == ["Of the sft techniques", "Of the orpo techniques"]
    assert "What they aim at, preference accuracy, has no verdicts: it is in the table alone." in lines
    mine = lines[lines.index(heads[0]) : lines.index(heads[1])]
    assert not any("DoRA" in line for line in mine)


def words(verdicts, name: str, one: str, other: str) -> int:
    """1: known to be better, -1: to be worse, 0: a tie; from the verdict's own word."""
    standing = verdicts.standings[name]
    up = 1 if standing.quantity.better == "higher" else -1
    return {"higher": up, "lower": -up, "tied": 0}[standing.verdict(one, other).word]


def test_random_benches_are_decided_as_their_verdicts_say(monkeypatch):
    monkeypatch.setattr(Standing.__init__, "__defaults__", (300,))
    rng, seen = np.random.default_rng(5), dict.fromkeys(("fits", "lead", "dominated", "budget"), 0)
    for _ in range(80):
        comparison, shelf = random_bench(rng)
        read_outputs(comparison, shelf)
        verdicts = Verdicts(comparison)
        for technique in comparison.trained:
            takes = int(rng.choice([5, 5, 7, 20]) * GIB)
            for record in technique.records:
                record.phases["generate"].peak_device = takes
        limit, seconds = 8 * GIB, float(rng.choice([150, 900, 900]))
        for group, members in comparison.groups.items():
            asked = ("trained", "searches", "random_weights", "plain_text", "twins", "base")
            only = SimpleNamespace(groups={group: members}, **{n: getattr(comparison, n) for n in asked})
            lines = said(only, verdicts, Budget(limit, seconds))
            text = "\n".join(lines)
            done = [t for t in members if t.done]
            fits = set()
            for t in done:  # from the records' own numbers
                runs = [r for r in t.done if not r.disturbed] or t.done
                room = max(p.peak_device for r in runs for p in r.phases.values()) <= limit
                if room and max(sum(p.seconds for p in r.phases.values()) for r in runs) <= seconds:
                    fits.add(t.label)
            if done:
                told = next(line for line in lines if line.startswith("Fits: "))
                assert set(re.findall(r"\bM\d\b", told)) == fits
                seen["fits"] += 1
            quantities = [n for n, s in verdicts.standings.items() if s.ranked(group)]
            ranked = (
                [n for n in verdicts.standings["bleu4"].ranked(group) if n in fits]
                if verdicts.metrics
                else []
            )
            beaten = {
                b for a, b in permutations(fits, 2)
                if all({a, b} <= set(verdicts.standings[q].ranked(group)) for q in quantities)
                and {words(verdicts, q, a, b) for q in quantities} in ({0, 1}, {1})
            }  # fmt: skip
            found = re.search(r"^Dominated, by.*?: (.*)\.$", text, re.M)
            pairs = re.findall(r"((?:M\d(?:, | and )?)+) by (M\d)", found[1]) if found else []
            assert {n for names, _ in pairs for n in re.findall(r"M\d", names)} == beaten
            for names, by in pairs:
                for name in re.findall(r"M\d", names):
                    assert {words(verdicts, q, by, name) for q in quantities} in ({0, 1}, {1})
                    seen["dominated"] += 1
            if len(ranked) > 1 and len(fits) > 1:
                first = next(line for line in lines if "ithin" in line)
                tied = {n for n in ranked if n == ranked[0] or words(verdicts, "bleu4", ranked[0], n) == 0}
                named = set(re.findall(r"M\d", first.split(" tied for")[0].split(", with the")[0]))
                assert named <= tied and named, first
                assert ("tied for" in first) == (len(tied) > 1)
                best = next(line for line in lines if line.startswith("Best BLEU-4: "))
                assert set(re.findall(r"M\d", best.split("; the next")[0])) == tied
                if "the next" in best:
                    behind = re.search(r"the next, (M\d), is ([\d.]+) worse \(95% CI ([\d.]+) to", best)
                    assert words(verdicts, "bleu4", ranked[0], behind[1]) == 1 and float(behind[3]) >= 0
                seen["lead"] += 1
            if dearer := re.search(r"^The budget: (M\d), .* better .* than (M\d), takes", text, re.M):
                assert dearer[1] not in fits and words(verdicts, "bleu4", dearer[1], dearer[2]) == 1
                seen["budget"] += 1
    assert min(seen.values()) > 4, seen


def test_what_it_needs_is_enough():
    rng = np.random.default_rng(0)
    sizes = {"s": 1, "min": 60, "h": 3600}
    for amount in np.exp(rng.uniform(-4, 14, 3000)):
        number, unit = rounded_up(amount, ((1, "s"), (60, "min"), (3600, "h"))).split()
        again = float(number.replace(",", "")) * sizes[unit]
        assert amount * (1 - 1e-5) <= again <= amount * 1.0101
    assert str(Budget(24e9, 4 * 3600, False)) == "24 GB and 4 h" and str(Budget(24 * GIB)) == "24 GiB"


SIZES = {"24GB": 24e9, "24 gb": 24e9, "24Gb": 24e9, "24GiB": 24 * GIB, "0.5TB": 5e11, "24000MB": 24e9,
         ".5GiB": GIB / 2}  # fmt: skip
TIMES = {"4": 14400, "0.5": 1800, "4h": 14400, "4 hours": 14400, "90min": 5400, "90m": 5400, "30 S": 30}
WRONG = {
    ("--memory", "24"): "24GB", ("--memory", "24G"): "24GB", ("--memory", "24,5GB"): "24.5GB",
    ("--memory", "24 gigabytes"): "24GB", ("--memory", "0GB"): "24GB", ("--memory", "lots"): "24GB",
    ("--memory", "1e3GB"): "1GB", ("--memory", "infGB"): "24GB",
    ("--memory", "9" * 400 + "GB"): "9" * 9 + "GB",
    ("--hours", "4hrs"): "4h", ("--hours", "0"): "4h", ("--hours", "nan"): "4h", ("--hours", "4,5"): "4.5h",
    ("--hours", ""): "4h",
}  # fmt: skip


@pytest.mark.parametrize("command", ["run", "report"])
def test_sizes_and_hours_are_read_in_several_spellings(command):
    for text, size in SIZES.items():
        assert parse_arguments([command, "--memory", text])[1].memory == (size, "i" in text)
    for text, seconds in TIMES.items():
        options = parse_arguments([command, "--hours", text])[1]
        assert options.hours == seconds and options.memory is None


@pytest.mark.parametrize("option, text", WRONG)
def test_wrong_ones_are_told_the_nearest_right_one(option, text, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(["report", option, text])
    error = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and f"did you mean {WRONG[option, text]}? Available: " in error


def test_the_report_begins_with_it_and_is_in_order(tmp_path):
    fabricate.results(tmp_path / "r", ("qlora", "galore", "lora"))
    render(Store(tmp_path / "r"), tmp_path, budget=Budget(9 * GIB))
    text = (tmp_path / "report.md").read_text("utf-8")
    heads = re.findall(r"^## (.*)$", text, re.M)
    order = ["Decision", "Results", "Plots", "Differences", "What was found", "More on quality"]
    assert [head for head in heads if head in order] == order
    order = [heads.index(h) for h in ("Plots", "Ranks", "Differences", "More on quality")]
    assert order == sorted(order)
    assert "Within 9 GiB: " in text.split("## Results")[0]
    assert "Within 9 GiB: " in (tmp_path / "report.html").read_text("utf-8")


def test_the_terminal_has_the_same_words_at_80_columns(tmp_path):
    fabricate.results(tmp_path / "r", ("qlora", "galore"))
    store = Store(tmp_path / "r")
    told = conclusion(Report.of(store, Budget(24e9, 3600, False)))
    assert max(map(len, told.splitlines())) <= 80
    told = told.partition("in the report:")[2].partition("\n")[2]  # below the table
    render(store, tmp_path, ("md",), budget=Budget(24e9, 3600, False))
    lead = (tmp_path / "report.md").read_text("utf-8").split("## More on quality")[0].replace("\\", "")
    for paragraph in re.split(r"\n\n|\n  - ", told.replace("\n    ", " ")):
        line = " ".join(paragraph.split("\n")).removesuffix(" --------").strip()
        assert line.removeprefix("- ") in " ".join(lead.split()), line
    other = conclusion(Report.of(store), [fabricate.record("lora", model="another")])
    assert other == "", "no comparison of the store holds this run"


def test_documents_of_an_earlier_rendering_are_named(tmp_path, capsys):
    fabricate.results(tmp_path / "r", ("qlora", "galore"))
    command = ["report", "--results", str(tmp_path / "r"), "--reports", str(tmp_path / "out"), "--format"]
    assert main([*command, "csv", "tex"]) == 0 and not capsys.readouterr().err
    for name in ("report-0123456789ab.md", "report-mine.md"):
        (tmp_path / "out" / name).write_text("earlier")
    assert main([*command, "csv", "md"]) == 0
    [note] = capsys.readouterr().err.splitlines()
    named = [str(tmp_path / "out" / name) for name in ("report-0123456789ab.md", "report.tex")]
    assert note.startswith("note: not rendered now") and note.endswith(": " + ", ".join(named))


def test_strangers_words_are_shown_and_do_nothing(tmp_path):
    for seed in range(3):
        for method in ("qlora", "galore"):
            record = fabricate.record(method, seed)
            record.card["title"] = f"\x1b[31m<b>{method}</b>|[x](y)"
            fabricate.keep(tmp_path / "r", record)
    store = Store(tmp_path / "r")
    told = conclusion(Report.of(store))
    assert "\x1b" not in told and "⟨U+001B⟩" in told
    render(store, tmp_path)
    markdown, html = ((tmp_path / f"report.{kind}").read_text("utf-8") for kind in ("md", "html"))
    assert "<b>" not in html and "\\<b\\>" in markdown and "[x](y)" not in markdown


def test_the_command_prints_it_last(tmp_path):
    fabricate.results(tmp_path / "r", ("qlora", "galore"))
    command = [sys.executable, ROOT / "run_bench.py", "report", "--results", tmp_path / "r"]
    command += ["--reports", tmp_path, "--format", "md", "--memory", "6GiB"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Within 6 GiB: none of 2" in " ".join(told.split()) and told.splitlines()[-1].startswith(
        "report: "
    )
