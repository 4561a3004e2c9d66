"""The command `data`, the table of the README, and the presets: each plans offline from local copies."""

import json
import re
from io import StringIO
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from rich.console import Console

from harness import cli
from harness.cli import preview
from harness.errors import Problems
from harness.plain import UNSEEN
from harness.plan import Request, load_preset, plan, preset_names

ROOT = Path(__file__).parents[1]
COUNTS = ["data.train=12", "data.validation=2", "data.test=6"]


def instructions(count=60):
    return [{"instruction": f"Say {i} in words, please.", "input": "", "output": f"word {i} " * (i % 9 + 1)}
            for i in range(count)]  # fmt: skip


def chats(count=60):
    return [{"messages": [{"role": role, "content": f"{role} says {i}, {turn}"}
                          for turn in range(i % 3 + 1) for role in ("user", "assistant")]}
            for i in range(count)]  # fmt: skip


SOURCES = {  # part -> rows of its schema
    "alpaca": instructions(),
    "tulu": [{"dataset": "x", "id": str(i), **row} for i, row in enumerate(chats())],
    "ultrachat": [{"prompt": "", "prompt_id": str(i), **row} for i, row in enumerate(chats(90)[30:])],
    "wikitext": [
        {"text": f" Article {i} tells of the year {1900 + i} , and what it brought . \n"} for i in range(90)
    ],
    "smol-smoltalk": [{**row, "source": "x"} for row in chats()],
}


@pytest.fixture
def sources(tmp_path):
    for name, rows in SOURCES.items():
        (tmp_path / name).mkdir()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name / "train.parquet")
    return {name: f"{name}={tmp_path / name}" for name in SOURCES}


def looked(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main(["data", *arguments])
    return (status, *capsys.readouterr())


def test_it_shows_what_a_model_will_see(sources, capsys):
    arguments = ["mixture", "--source", *list(sources.values())[:3], "--set", *COUNTS, "hp.max_length=48"]
    status, text, _ = looked(capsys, *arguments)
    assert status == 0
    assert "⟦" in text and "<end_of_turn>⟧" in text
    assert "CC BY-NC 4.0" in text and "chat template" in text
    status, out, _ = looked(capsys, *arguments, "--json")
    found = json.loads(out)
    train = found["splits"]["train"]
    assert train["rows"] == 36 - train["too_long"] - train["refused"]
    assert sum(count for *_, count in found["histogram"]) == train["rows"]
    assert train["max"] <= 48 and train["mean"] * train["rows"] == pytest.approx(train["tokens"])
    assert 0 <= found["padding"]["packed"] <= found["padding"]["apart"] < 1
    assert {row["id"].partition(":")[0] for row in found["rows"]} == {"alpaca", "tulu", "ultrachat"}
    for row in found["rows"]:
        assert row["learned"] < row["tokens"] <= 48
    assert list(found["study"]["forms"]) == ["raw text", "instruction form", "chat template"]


def test_loss_on_the_last_answer_alone_covers_less(sources, capsys):
    shares = []
    for loss in ("all", "last"):
        _, out, _ = looked(
            capsys, "tulu", "--source", sources["tulu"], "--set", *COUNTS, f"data.loss={loss}", "--json"
        )
        shares.append(json.loads(out)["splits"]["train"]["supervised"])
    assert shares[1] < shares[0]


def test_plain_text_is_learned_whole(sources, capsys):
    _, out, _ = looked(capsys, "wikitext", "--source", sources["wikitext"], "--set", *COUNTS, "--json")
    found = json.loads(out)
    assert [learned for _, learned, _ in found["rows"][0]["pieces"]] == [False, True]
    assert found["study"] == {}


def test_on_a_terminal_it_is_coloured_and_nothing_hidden_acts(sources, tmp_path):
    rows = [{**row, "output": row["output"] + "\x1b[31m\x07 red"} for row in instructions()]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = preview.preview(
        Request(dataset=str(tmp_path / "own.jsonl"), model="demo/model", settings=COUNTS), 1
    )
    drawn = {}
    for terminal in (True, False):
        console = Console(
            file=StringIO(),
            force_terminal=terminal,
            width=100,
            color_system="truecolor" if terminal else None,
        )
        preview.show(found, console)
        drawn[terminal] = console.file.getvalue()
    assert "\x1b[32m" in drawn[True] and "⟦" not in drawn[True]
    assert "⟦" in drawn[False]
    own = re.sub(r"\x1b\[[0-9;]*m", "", drawn[True])  # the colours of ours
    assert "⟨U+001B⟩[31m⟨U+0007⟩" in own
    assert not UNSEEN.search(own.replace("\r", "")) and not UNSEEN.search(drawn[False])


def own(folder, rows, name="own.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(folder / name)


def test_every_column_that_is_not_used_is_named(tmp_path, capsys):
    rows = [{**row, "topic": "numbers", "score": i} for i, row in enumerate(instructions())]
    path = own(tmp_path, rows)
    _, text, _ = looked(capsys, path, "--set", *COUNTS)
    assert "not used of own: score and topic" in text
    _, out, _ = looked(capsys, path, "--set", *COUNTS, "--json")
    assert json.loads(out)["unused"] == {"own": ["score", "topic"]}
    arguments = ["--dataset", path, "--model", "demo/model", "--methods", "lora", "--set", *COUNTS]
    assert cli.main(["plan", *arguments, "--results", str(tmp_path / "results")]) == 0
    assert "not used of own: score, topic" in capsys.readouterr().out


def test_a_pairs_worse_answer_is_shown(tmp_path, capsys):
    rows = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": f"no {i}, never"}
            for i, row in enumerate(instructions())]  # fmt: skip
    _, text, _ = looked(capsys, own(tmp_path, rows), "--set", *COUNTS)
    assert re.search(r"worse answer: no \d+, never<end_of_turn>", text)


def test_a_preset_brings_its_dataset_model_and_options(sources, capsys):
    status, out, _ = looked(capsys, "--preset", "demo", "--rows", "0", "--json")
    found = json.loads(out)
    assert (status, found["dataset"], found["max_length"], found["rows"]) == (0, "demo", 256, [])
    _, out, _ = looked(capsys, "tulu", "--preset", "demo", "--source", sources["tulu"],
                       "--set", *COUNTS, "hp.max_length=64", "--json")  # fmt: skip
    found = json.loads(out)
    assert (found["dataset"], found["max_length"]) == ("tulu", 64)


def test_where_no_row_is_left_it_says_so(capsys):
    status, text, _ = looked(capsys, "demo", "--set", "hp.max_length=8")
    assert status == 0
    assert "960 left out: the prompt fills max_length" in text and "No training row is left" in text
    assert "the model's chat template" in text


def test_fewer_rows_than_a_step_need_no_padding(tmp_path, capsys):
    counts = ["data.train=3", "data.validation=0", "data.test=1", "hp.batch_size=16"]
    status, _, _ = looked(capsys, own(tmp_path, instructions()), "--set", *counts)
    assert status == 0


def test_a_wrong_source_is_named_for_what_it_is(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "pictures" / name).write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("a")
    wrong = {"alpaca": "pictures", "tulu": str(ROOT / "demo/model"), "ultrachat": "notes.txt"}
    status, _, errors = looked(capsys, "demo", "--source", *(f"{n}={tmp_path / p}" for n, p in wrong.items()))
    assert status == 2
    for name, said in {"alpaca": "it has 2 .jpg", "tulu": "it is a model's folder",
                       "ultrachat": "cannot read a .txt file"}.items():  # fmt: skip
        assert re.search(rf"--source {name}: .*{said}", errors)
    _, _, errors = looked(capsys, "demo", "--source", f"alpaca={ROOT / 'demo/data/tulu.jsonl'}")
    assert "These are columns of format 'messages'" in errors


@pytest.mark.parametrize(("arguments", "said"), [
    (["alpacca"], "alpaca"),
    (["README.md"], "README.md is no dataset"),
    (["harness"], "harness is a folder"),
    (["demo", "--model", "./gone"], "neither a folder nor a hub id"),
    (["demo", "--preset", "dem"], "demo"),
    (["demo", "--set", "data.language=klingon"], "data.language: must be one of"),
    (["demo", "--set", "data.language=[1]"], "data.language"),
    (["demo", "--set", "data.reward=[1]"], "data.reward"),
    (["demo", "--set", "data.template={a=1}"], "data.template"),
    (["demo", "--model", "no/such"], "no/such"),
    (["demo", "--set", "hp.max_lenght=3"], "max_length"),
    (["demo", "--set", "lora.rank=3"], "lora"),
    (["demo", "--source", "tulu=gone.jsonl"], "gone.jsonl"),
    (["demo", "--set", "data.train=99999"], "data.train"),
])  # fmt: skip
def test_what_is_wrong_is_named(arguments, said, capsys):
    status, out, errors = looked(capsys, *arguments)
    assert status == 2 and not out
    assert said in errors and "Traceback" not in errors


def test_the_table_of_the_readme_is_the_one_of_the_specs(capsys):
    _, table, _ = looked(capsys)
    assert table.strip() in (ROOT / "README.md").read_text("utf-8")


# Presets


PRESETS = {  # of each document: what it says, as (where in the spec, value)
    "gemma-3-1b": ("google/gemma-3-1b-it", ["qlora", "galore"], ["alpaca", "tulu", "ultrachat"], {}, {}),
    "gpt-neo-1.3b": ("EleutherAI/gpt-neo-1.3B", ["qlora"], ["alpaca"],
                     {"epochs": 3.0, "batch_size": 8, "learning_rate": 2e-4, "max_length": 256},
                     {"rank": 8, "dropout": 0.05}),
    "llama-3.2-1b-wikitext": ("meta-llama/Llama-3.2-1B", ["qlora"], ["wikitext"],
                              {"epochs": 3.0, "batch_size": 4, "learning_rate": 2e-4,
                               "gradient_checkpointing": True},
                              {"rank": 8, "alpha": 32.0, "dropout": 0.05,
                               "targets": "q_proj,k_proj,v_proj,o_proj"}),
    "smol-chat": ("Qwen/Qwen2.5-0.5B", ["lora"], ["smol-smoltalk"], {}, {}),
    "t4-lora-4bit": ("EleutherAI/pythia-1b", ["qlora"], ["alpaca"], {}, {}),
}  # fmt: skip


def test_each_preset_but_the_demo_is_of_a_document():
    assert set(preset_names()) - {"demo"} == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_plans_offline_and_says_what_its_document_says(name, sources):
    model, methods, parts, hp, options = PRESETS[name]
    assert load_preset(name, Problems()).model == model
    request = Request(preset=name, model="demo/model", sources=[sources[p] for p in parts], settings=COUNTS)
    specs = plan(request)
    trained = [spec for spec in specs if spec.trains]
    assert {spec.method for spec in trained} == set(methods)
    assert [part["name"] for part in specs[0].dataset["parts"]] == parts
    for spec in trained:
        assert {key: getattr(spec.hp, key) for key in hp} == hp
        assert {key: spec.options[key] for key in options} == options


def test_the_mixture_is_of_the_size_the_document_asks_for():
    from harness.data import load_spec

    spec = load_spec("mixture", {})
    assert (len(spec["parts"]) * spec["train"], len(spec["parts"]) * spec["test"]) == (15_000, 6_000)


def test_the_llama_preset_trains_as_many_parameters_as_its_document_prints():
    """Llama 3.2 1B's shapes, without its weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from methods.lora import LoRA

    options = load_preset("llama-3.2-1b-wikitext", Problems()).options["qlora"]
    shapes = LlamaConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, intermediate_size=8192, vocab_size=128256,
                         tie_word_embeddings=True)  # fmt: skip
    with torch.device("meta"):
        model = LoRA(**options).attach(AutoModelForCausalLM.from_config(shapes), None)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 1_703_936
    assert sum(p.numel() for p in model.parameters()) == 1_237_518_336


@pytest.mark.parametrize("held_out", [True, False])
def test_it_says_which_split_of_the_source_the_test_rows_are_of(held_out, tmp_path, capsys):
    rows = instructions()
    (tmp_path / "own").mkdir()
    own(tmp_path / "own", rows[:40], "gsm_train.jsonl")
    own(tmp_path / "own", rows[40:], f"gsm_{'test' if held_out else 'train_2'}.jsonl")
    _, text, _ = looked(capsys, str(tmp_path / "own"), "--set", *COUNTS)
    said = "own, splits of its source: train from 'train', validation from 'train', test from 'test'"
    assert (said in " ".join(text.split())) == held_out
    _, out, _ = looked(capsys, str(tmp_path / "own"), "--set", *COUNTS, "--json")
    assert json.loads(out)["origins"]["own"]["test"] == ("test" if held_out else "train")
