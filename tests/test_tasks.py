"""lm-evaluation-harness on saved runs: its scores are the run's own model's, and the report has them."""

import csv
import json
import random
from importlib.util import find_spec
from math import sqrt
from statistics import fmean, stdev

import fabricate
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from harness.cli import BAD_REQUEST, OK, main, tasks
from harness.plan import Request, plan
from harness.record import Data, Provenance
from harness.report import render
from harness.report.comparison import comparisons
from harness.report.tasks import tasks as reported
from harness.store import LM_EVAL, MODEL, Store

needed = pytest.mark.skipif(not find_spec("lm_eval"), reason="lm_eval is not installed")
WORDS = ["cat", "dog", "mat", "red", "ran", "sat", "on", "to"]
PLACES = [(i, j) for i in range(4) for j in range(4)]
ROWS = [{"question": f"the {WORDS[i]} {WORDS[4 + j]}",
         "choices": random.Random(4 * i + j).sample([*WORDS, "a dog"], 3 + i % 2), "answer": (i + j) % 3}
        for i, j in PLACES]  # fmt: skip
YAML = """task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {0}/rows.jsonl}}, cache_dir: {0}/cache}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}} is"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A task, a base, and in `results` its row and the finished run of an adapter that changes much."""
    home = tmp_path_factory.mktemp("tasks")
    (home / "own").mkdir()
    (home / "own" / "colours.yaml").write_text(YAML.format(home))
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    talk = [{"prompt": f"{i} the cat", "completion": f"a dog {i}"} for i in range(40)]
    (home / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    model = tiny.model(seed=3)
    model.save_pretrained(home / "base")
    tiny.tokenizer().save_pretrained(home / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    request = Request(["lora"], model=str(home / "base"), dataset=str(home / "talk.jsonl"), seeds=[0],
                      settings=["data.train=20", "data.validation=2", "data.test=6"])  # fmt: skip
    for spec in plan(request):
        like = fabricate.record(spec.method)
        like.spec, like.data, like.provenance = spec, Data(), Provenance(precision="fp32")
        place = home / "results" / spec.folder / MODEL
        if spec.trains:
            adapted.save_pretrained(place)
            files = place.glob("*.safetensors")
            like.sizes.saved_bytes = sum(file.stat().st_size for file in files)
        fabricate.keep(home / "results", like)
    return home


@pytest.fixture
def command(home, capsys):
    def command(*arguments):
        given = ["lm-eval", *arguments, "--include-path", home / "own", "--model", home / "base"]
        given += ["--results", home / "results"]
        with tiny.computing("no"):
            status = main([*map(str, given)])
        return status, *capsys.readouterr()

    return command


def scores(home, method: str) -> dict[str, dict]:
    [file] = (home / "results").glob(f"{method}-*/{LM_EVAL}")
    return {score["metric"]: score for score in json.loads(file.read_text())}


@torch.no_grad()
def by_hand(model, tokenizer) -> dict[str, float]:
    """The shares of rows whose answer has the highest log-probability, in all and per character."""
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for row in ROWS:
        summed = []
        for choice in row["choices"]:
            start = len(tokenizer(f"{row['question']} is").input_ids)
            ids = torch.tensor([tokenizer(f"{row['question']} is {choice}").input_ids])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            summed.append(float(logps[start - 1 :].sum()))
        mean = [value / len(choice) for value, choice in zip(summed, row["choices"], strict=True)]
        for name, values in (("acc", summed), ("acc_norm", mean)):
            right[name].append(values.index(max(values)) == row["answer"])
    return {name: fmean(hits) for name, hits in right.items()}


@needed
def test_the_scores_are_those_of_the_untouched_model_and_of_the_runs_own(home, command, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip, for a second
    status, out, _ = command("colours", "--runs", "lora")
    assert status == OK and "colours acc " in out and "kept" not in out
    base = AutoModelForCausalLM.from_pretrained(home / "base").eval()
    expected = {"base": by_hand(base, tiny.tokenizer())}
    [saved] = (home / "results").glob(f"lora-*/{MODEL}")
    expected["lora"] = by_hand(PeftModel.from_pretrained(base, saved).eval(), tiny.tokenizer())
    assert len({tuple(values.values()) for values in expected.values()}) == 2, "they cannot be mixed up"
    for method, values in expected.items():
        for name, share in values.items():
            found = scores(home, method)[name]
            assert found["value"] == pytest.approx(share)
            assert found["stderr"] == pytest.approx(sqrt(share * (1 - share) / (len(ROWS) - 1)))
            assert (found["samples"], found["shots"], found["version"]) == (len(ROWS), 0, "2.0")
            assert found["higher_is_better"] is True
    written = {file: file.stat().st_mtime_ns for file in (home / "results").glob(f"*/{LM_EVAL}")}
    status, out, _ = command("colours")
    assert status == OK and out.count("  kept\n") == 4
    assert written == {file: file.stat().st_mtime_ns for file in written}
    status, out, _ = command("colours", "--limit", "5", "--num-fewshot", "1", "--json")
    asked = [json.loads(file.read_text())[-1] for file in written]
    assert status == OK and set(json.loads(out)["files"]) == set(map(str, written))
    assert {(s["samples"], s["shots"], s["limit"], s["num_fewshot"]) for s in asked} == {(5, 1, 5, 1)}
    status, out, _ = command("colours", "--force")
    assert status == OK and "kept" not in out
    assert [len(json.loads(file.read_text())) for file in written] == [4, 4], (
        "in the place of the earlier ones"
    )


@needed
def test_what_cannot_be_asked_is_told_before_any_model_is_loaded(home, command, monkeypatch):
    from lm_eval.tasks import TaskManager

    from harness.training import tasks as training

    (home / "own" / "broken.yaml").write_text(YAML.format(home / "nowhere").replace("colours", "broken"))
    own = TaskManager(include_path=str(home / "own"), include_defaults=False)
    monkeypatch.setattr(training, "manager_of", lambda names, include: own)  # not all of lm_eval's, for time
    status, _, err = command("colour", "broken")
    assert status == BAD_REQUEST and "did you mean colours?" in err and "task broken: cannot be loaded" in err
    (home / "own" / "broken.yaml").unlink()


def test_a_missing_package_a_missing_folder_and_a_run_that_is_none_are_told(
    home, command, monkeypatch, capsys
):
    monkeypatch.setattr(tasks, "installed", lambda package: None)
    status, _, err = command("colours")
    assert status == BAD_REQUEST and 'pip install "lm_eval>=' in err
    monkeypatch.setattr(tasks, "installed", lambda package: "1")
    assert command("colours", "--runs", "lorra")[0] == BAD_REQUEST
    assert main(["lm-eval", "x", "--results", str(home / "nowhere")]) == BAD_REQUEST
    assert "there is no folder" in capsys.readouterr().err


def told(store: Store) -> list:
    return reported(comparisons(store.load()[0])[0], store)


SCORE = {
    "asked": "t", "num_fewshot": None, "limit": None, "content": "c", "lm_eval": "0.4", "task": "t",
    "metric": "acc", "filter": "none", "value": 0.5, "stderr": 0.25, "higher_is_better": True, "samples": 4,
    "shots": 0, "version": "1",
}  # fmt: skip


def test_the_table_has_means_over_seeds_and_of_one_seed_the_standard_error(tmp_path):
    fabricate.results(tmp_path, methods=("lora", "galore"), bases=("base",))
    store, values = Store(tmp_path), {0: 0.25, 1: 0.5, 2: 0.625}
    assert told(store) == []
    for record in store.load()[0]:
        seed = record.spec.seed
        own = [
            SCORE | {"value": values[seed]},
            SCORE | {"value": values[seed], "num_fewshot": 0},
        ]  # one and the same
        if record.spec.method == "galore":
            own = [
                SCORE | {"limit": 2, "samples": 2, "value": 12.5, "metric": "ppl", "higher_is_better": False}
            ]
        if record.spec.method != "galore" or seed == 1:
            (tmp_path / record.folder / LM_EVAL).write_text(json.dumps(own))
    [table] = [block for block in told(store) if block.kind == "table"]
    assert table.columns == ["Technique", "t, 0-shot, first 2 rows: ppl ↓", "t, 0-shot: acc ↑"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert next(iter(rows)) == "Base" and rows["Base"] == ["–", "0.2500 (SE 0.2500)"]
    mean, sd = fmean(values.values()), stdev(values.values())
    assert rows["LoRA"] == ["–", f"{mean:.4f} ± {sd:.4f}"]
    assert rows["GaLore"] == ["12.50 (SE 0.25), 1 of 3 seeds", "–"]
    render(store, tmp_path / "reports", ("csv", "json"))
    lines = csv.DictReader((tmp_path / "reports" / "report.csv").open(newline=""))
    asked = {(line["technique"], line["label"]): line for line in lines if "lm_eval" in line["quantity"]}
    lora = asked["LoRA", "t, 0-shot: acc"]
    assert [float(lora["mean"]), float(lora["sd"])] == pytest.approx([mean, sd]) and lora["n"] == "3"
    assert (lora["better"], lora["before_mean"]) == ("higher", "0.25") and len(asked) == 3
    [comparison] = json.loads((tmp_path / "reports" / "report.json").read_text())["comparisons"]
    galore = next(t for t in comparison["techniques"] if t["technique"] == "GaLore")["quantities"][-1]
    assert (galore["mean"], galore["better"], galore["before"]) == (12.5, "lower", None)


@pytest.mark.parametrize(
    "text",
    ["{}", "[{}]", '["x"]', json.dumps([SCORE | {"value": None}]), json.dumps([SCORE | {"stderr": -1}])],
)
def test_what_are_no_scores_is_named_and_not_shown(text, tmp_path):
    record = fabricate.keep(tmp_path, fabricate.record("lora"))
    (tmp_path / record.spec.folder / LM_EVAL).write_text(text)
    [_, _, notice] = told(Store(tmp_path))
    assert notice.kind == "notice" and record.spec.folder in notice.text
