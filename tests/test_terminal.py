"""What a terminal shows: the table at any width, the time that is left, lists, what is said after Ctrl-C."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import fmean, stdev

import fabricate
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from harness.cli import main
from harness.cli.progress import Lines
from harness.cli.remaining import Remaining
from harness.plan import Plan
from harness.record import Phase
from harness.report.comparison import comparisons
from harness.report.terminal import results
from harness.tuning import Tuning

GIB = 2**30
ROOT = Path(__file__).resolve().parents[1]


def shown(records: list, width: int) -> tuple[list[str], list[str], str]:
    """-> the lines of a table's head, of its rows, and what is said below."""
    [comparison] = comparisons(records)
    text = results(comparison, width)
    table, _, notes = text.partition("\n\n")
    lines = table.split("\n")
    rule = next(i for i, line in enumerate(lines) if set(line) == {"─"})
    return lines[:rule], lines[rule + 1 :], " ".join(notes.split())


def scored(method: str, seed: int, bleu4: float, **changes):
    record = fabricate.record(method, seed, **changes)
    record.scores = {"bleu4": bleu4, "rouge_l": bleu4 / 100, "perplexity": 100 / bleu4}
    return record


def bench(**changes) -> list:
    made = [scored("base", 0, 11.5)]
    luck = {"qlora": (40.25, 42.5, 41.0), "galore": (50.5, 53.25, 51.0), "lora": (30.0, 31.0, 32.5)}
    made += [scored(m, s, value, **changes) for m, own in luck.items() for s, value in enumerate(own)]
    return made


def test_at_80_columns_the_best_is_first_and_what_has_no_room_is_named():
    records = bench()
    head, rows, notes = shown(records, 80)
    assert max(map(len, [*head, *rows])) <= 80
    assert [row.split()[0] for row in rows] == ["Base", "GaLore", "QLoRA", "LoRA"]
    for row, method in zip(rows[1:], ("galore", "qlora", "lora"), strict=True):
        own = [r for r in records if r.spec.method == method]
        values = [r.scores["bleu4"] for r in own]
        peak = fmean(r.phases["train"].peak_allocated for r in own) / GIB
        hours = fmean(r.train_seconds for r in own) / 3600
        assert f" {fmean(values):.2f} ± {stdev(values):.2f} " in row
        assert list(map(float, row.split()[-2:])) == pytest.approx([peak, hours], rel=0.005)
    assert "(GiB)" in head[-1] and "(h)" in head[-1]
    assert "No room here, but in the report: ± of memory and time." in notes


def test_a_wider_terminal_has_all_and_a_narrow_one_drops_scores_from_the_last():
    head, rows, notes = shown(bench(), 140)
    assert head[-1].count("before") == head[-1].count("after") == 3 and rows[1].count("±") == 5
    assert "No room" not in notes
    head, rows, notes = shown(bench(), 50)
    assert max(map(len, [*head, *rows])) <= 50 and "±" not in "".join(rows)
    assert "BLEU-4" in head[-1] and "ROUGE-L" not in head[-1]
    assert "in the report: ±, ROUGE-L and Perplexity." in notes


@pytest.mark.parametrize("width", range(53, 150, 8))
def test_at_no_width_is_a_number_wrapped_or_a_name_lost(width):
    long = "Low-rank adapters with a name that no table was made for (tuned, learning rate 0.0005)"
    records = [r for r in bench() if r.spec.method != "lora"]
    for record in records[-3:]:
        record.card["title"] = long
    records.append(fabricate.record("full", 0, status="oom_gpu", error="CUDA out of memory"))
    head, rows, _ = shown(records, width)
    assert max(map(len, [*head, *rows])) <= width
    cells = [re.split(r" {3,}", row) for row in rows]
    assert {len(own) for own in cells} == {1, max(map(len, cells))}
    names = " ".join(own[0] for own in cells)
    assert long in names and "Full fine-tuning – out of GPU memory" in names
    amount = re.compile(r"–|[\d.,]+( ± [\d.]+)?")
    assert all(amount.fullmatch(cell) for own in cells for cell in own[1:])


def test_what_is_known_of_nobody_has_no_column():
    head, rows, notes = shown([fabricate.record("qlora", status="failed", error="x")], 80)
    assert (head, [row.strip() for row in rows], notes) == (["Technique"], ["QLoRA – failed"], "")


def test_strangers_names_are_text_there():
    records = [scored("qlora", s, 40 + s) for s in range(3)]
    for record in records:
        record.card["title"] = "\x1b[31m[bold]x[/]"
    _, rows, _ = shown(records, 80)
    assert "\x1b" not in rows[0] and "⟨U+001B⟩[31m[bold]x[/]" in rows[0]


def test_small_costs_have_small_units_and_a_disturbed_time_its_mark():
    records = bench()
    for record in records[1:]:
        record.phases["attach"].peak_allocated = record.phases["train"].peak_allocated = 50 * 2**20
        record.phases["train"].seconds, record.phases["attach"].seconds = 20.0, 1.5
    records[-1].disturbed = ["another program"]
    head, rows, notes = shown(records, 80)
    assert "(MiB)" in head[-1] and "(s)" in head[-1]
    assert rows[1].split()[-2:] == ["50.0", "21.5"] and rows[-1].split()[-1] == "*21.5"
    assert "* With a run that was disturbed" in notes


# The time that is left


class Clock:
    """Runs take the time that they are told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def watched(*methods: str, seeds=(0, 1, 2), tunings=(), trials=0):
    records = [fabricate.record("base"), *(fabricate.record(m, s) for s in seeds for m in methods)]
    clock = Clock()
    plan = Plan([r.spec for r in records], list(seeds), tunings, trials)
    return records, clock, Remaining(plan, clock)


def run(remaining: Remaining, clock: Clock, record, minutes: float, total: int) -> str:
    remaining.start(record.spec, total)
    clock.now += 60 * minutes
    remaining.end(record, False)
    return str(remaining)


def test_what_is_left_is_told_from_what_has_ended_and_else_not_at_all():
    (base, lora, dora, *rest), clock, remaining = watched("lora", "dora")
    assert str(remaining) == "0 of 7 runs done"
    assert run(remaining, clock, base, 1, 7) == "1 of 7 runs done", "it tells nothing of a training"
    assert run(remaining, clock, lora, 10, 7) == "2 of 7 runs done, at least 20 min left", "and dora's 3 runs"
    assert run(remaining, clock, dora, 30, 7) == "3 of 7 runs done, 80 min left"
    assert run(remaining, clock, rest[0], 16, 7) == "4 of 7 runs done, 70 to 76 min left"
    remaining.start(rest[1].spec, 7)
    clock.now += 60 * 20
    assert str(remaining) == "4 of 7 runs done, 50 to 56 min left", "what is under way is less by now"
    clock.now += 60 * 500
    late = "4 of 7 runs done, 0.67 to 13 h left"  # at the most each takes 520 / 30 times as long
    assert str(remaining) == late, "it is never owed time, and says that the machine is busy"


def test_two_side_by_side_take_half_and_the_last_may_be_alone():
    (base, *trained), clock, remaining = watched("lora", seeds=(0, 1, 2, 3, 4))
    run(remaining, clock, base, 1, 6)
    for record in trained[:2]:
        remaining.start(record.spec, 6)
    clock.now += 3600
    for record in trained[:2]:
        remaining.end(record, False)
    assert str(remaining) == "3 of 6 runs done, 1.5 to 2 h left", "three runs of an hour in two places: 2 h"


def test_what_a_run_takes_beside_its_phases_is_added_to_cached_ones():
    (base, lora, dora, *_), clock, remaining = watched("lora", "dora", seeds=(0, 1))
    lora.phases = {"train": Phase(600.0)}
    dora.phases = {"train": Phase(1800.0)}
    for record in (base, dora):
        remaining.end(record, True)
    assert run(remaining, clock, lora, 20, 5) == "3 of 5 runs done, 80 min left", "20, and 30 twice"


def test_a_run_that_went_on_after_a_stop_takes_as_long_as_all_of_it_did():
    (base, lora, dora, *rest), clock, remaining = watched("lora", "dora", seeds=(0, 1))
    lines = Lines(StringIO(), remaining)
    run(remaining, clock, base, 1, 5)
    for record, minutes in ((lora, 10), (dora, 30)):
        lines.start(record.spec, 1, 5)
        lines.event(record.spec, {"earlier": 60.0 * (minutes - 4)})
        clock.now += 60 * 4
        lines.end(record, False)
    assert str(remaining) == "3 of 5 runs done, 40 min left", "10 and 30"
    lines.start(rest[0].spec, 4, 5)
    lines.event(rest[0].spec, {"earlier": 60.0 * 8})
    assert str(remaining) == "3 of 5 runs done, 32 min left", "it needs but 2 more"


def test_cached_runs_tell_of_a_device_of_the_same_name_alone():
    for device, left in (("NVIDIA H200", "50 min left"), ("Tesla T4", "at least 20 min left")):
        (base, lora, dora, *_), clock, remaining = watched("lora", "dora", seeds=(0, 1))
        dora.provenance.device, dora.phases = device, {"train": Phase(1700.0), "save": Phase(100.0)}
        for record in (base, dora):
            remaining.end(record, True)
        assert str(remaining) == "2 of 5 runs done"
        assert run(remaining, clock, lora, 20, 5) == f"3 of 5 runs done, {left}"


def test_a_search_is_counted_as_it_may_become():
    trial = fabricate.record("lora").spec
    trial = replace(trial, seed=10**6, search={})
    tuning = Tuning(trial, (1e-5, 1e-3))
    (base, lora, *_), clock, remaining = watched("lora", seeds=(0, 1), tunings=[tuning], trials=3)
    assert str(remaining) == "0 of 8 runs done", "3 trials and 2 of what they find, besides those of the plan"
    tried = fabricate.record("lora")
    tried.spec = trial
    run(remaining, clock, base, 1, 8)
    assert run(remaining, clock, tried, 5, 8) == "2 of 8 runs done, at least 10 min left"
    for rate in (1e-4, 1e-3):
        tried = fabricate.record("lora")
        tried.spec = replace(trial, changes={"learning_rate": rate})
        run(remaining, clock, tried, 5, 8)
    assert run(remaining, clock, lora, 20, 6) == "5 of 6 runs done, 20 min left", (
        "the best was that of the plan"
    )


# Lists


def test_each_run_of_a_store_is_told_within_80_columns(tmp_path, monkeypatch, capsys):
    trial = fabricate.record("lora", 10**6)
    trial.spec = replace(trial.spec, search={}, changes={"learning_rate": 3e-4})
    made = [
        fabricate.record("base"), fabricate.record("galore"), trial,
        fabricate.record("dora", model="another"),
        *(fabricate.record("lora", seed, options={"rank": rank}) for seed in (0, 1) for rank in (8, 64)),
        fabricate.record("full", status="failed", error="no \x1b[31mspace [bold]left[/]"),
    ]  # fmt: skip
    for record in made:
        fabricate.keep(tmp_path, record)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list", "results", "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for record in made:
        (line,) = (line for line in text.splitlines() if line.endswith(record.spec.folder[-12:]))
        assert record.spec.method in line and record.started[:10] in line and record.status in line
        value = "loss" if record.spec.trial else f"{record.scores['bleu4']:.2f}" if record.ok else ""
        assert value in line and ("trial" if record.spec.trial else f" {record.spec.seed} ") in line
    assert text.count("lora (rank 64, learning") == 2 and "another on Alpaca + Tulu v2" in text
    assert f"{made[-1].spec.folder}: failed: no ⟨U+001B⟩[31mspace [bold]left[/]" in " ".join(text.split())
    assert main(["list", "results", "--results", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert found[trial.spec.folder]["trial"] and found[made[0].spec.folder]["scores"]["bleu4"] > 0


def test_the_adapters_of_peft_are_listed_without_importing_it(capsys):
    code = (
        "import sys; from harness.cli import main; main(['list', 'methods'])\n"
        "assert not {'torch', 'peft'} & set(sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, check=True)
    assert "peft.adalora, " in told.stdout and "peft.vera, " in told.stdout and "ptuning" not in told.stdout
    assert max(map(len, told.stdout.splitlines())) <= 80
