"""What a terminal shows: the table at any width, the time that is left, lists, what is said after Ctrl-C."""

import re
from statistics import fmean, stdev

import fabricate
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from harness.report.comparison import comparisons
from harness.report.terminal import results

GIB = 2**30


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
