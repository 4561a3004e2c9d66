"""What a plan can know before a run begins: room on the disk, a model that opens, a card that holds it."""

import json
import shutil
from types import SimpleNamespace

import fabricate
import pytest
import tiny
import torch
from test_bench import stub
from test_cli import ROOT
from transformers import T5Config

from harness import cli, machine, preflight
from harness.nursery import Missing, Nursery
from harness.plan import Request, plan
from harness.preflight import GIB, crowded, saves_all, unfit, weight_bytes


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny.gemma(dtype="float32").save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(4 * GIB)  # of which nothing is on the disk
    return folder


def specs(model, *methods, seeds=(0, 1, 2)) -> list:
    found = [fabricate.record(name, seed).spec for name in methods for seed in seeds]
    return [preflight.RunSpec(**{**vars(spec), "locations": {"model": str(model)}}) for spec in found]


def disk(monkeypatch, free: float):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free * GIB)))


# Three runs of 2 GiB each, in 16 bits; a checkpoint of all weights takes six times as much, thrice.
@pytest.mark.parametrize(
    ("free", "methods", "said", "noted"),
    [
        (
            5.9,
            ("full", "lora"),
            "the models of 3 runs will take 6.0 GiB or more, and 5.9 GiB are free",
            "",
        ),
        (6.1, ("full", "lora"), "", "may take 36.0 GiB while all weights are trained, and 102 MiB are left"),
        (42.1, ("full", "lora"), "", ""),
        (0.1, ("lora", "qlora", "smt", "reft"), "", ""),
        (11.9, ("full", "galore"), "the models of 6 runs", ""),
    ],
)
def test_what_a_plan_keeps_has_room_or_is_refused(free, methods, said, noted, model, tmp_path, monkeypatch):
    disk(monkeypatch, free)
    problem, note = crowded(specs(model, *methods), tmp_path / "results" / "that are not there")
    assert (said in str(problem)) if said else problem is None
    assert (noted in note) if noted else note == ""


@pytest.mark.parametrize(
    "name", ["full", "full_8bit", "lisa", "apollo", "lora", "loftq", "orpo", "smt", "reft"]
)
def test_which_methods_save_all_weights(name):
    assert saves_all(preflight.RunSpec(name, 0, "m", {}, tiny.hyperparams())) == (
        name in ("full", "full_8bit", "lisa", "apollo")
    )


def test_a_model_in_16_bits_is_counted_as_it_lies_and_an_unknown_one_not_at_all(model):
    [spec] = specs(model, "full", seeds=[0])
    assert weight_bytes(spec) == 2 * GIB
    tiny.gemma(dtype="bfloat16").save_pretrained(model)
    assert weight_bytes(spec) == 4 * GIB
    assert weight_bytes(fabricate.record("full", model="some/where").spec) == 0


def test_a_run_that_has_no_room_is_refused_before_it_starts_and_one_that_is_there_needs_none(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    asked = ["--methods", "full", "lora", "--seeds", "0", "1"]
    disk(monkeypatch, 0.001)
    for command in ([], ["plan"]):
        assert cli.main([*command, *asked]) == cli.BAD_REQUEST
        said = capsys.readouterr().err
        assert "--results: the models of 2 runs will take" in said and "another disk" in said
    assert not list(tmp_path.iterdir())
    for spec in plan(Request(["full", "lora"], seeds=[0, 1])):
        found = fabricate.record("full", spec.seed)
        found.spec, found.sizes.saved_bytes = spec, 0
        fabricate.keep(tmp_path / "results", found)
    assert cli.main(["plan", *asked]) == cli.OK


# The model and the card


def first(folder, **hp) -> dict:
    spec = preflight.RunSpec("lora", 0, "mine", {}, tiny.hyperparams(**hp), locations={"model": str(folder)})
    return spec.asked() | {"locations": spec.locations}


def test_a_model_that_opens_is_fit(model):
    assert unfit(first(model)) == unfit(first(ROOT / "demo/model")) == []


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("tokenizer.json", "{}", "model mine: its tokenizer: "),
        ("config.json", '{"model_type": "strange"}', "model mine: its config: "),
        ("config.json", "[", "model mine: its config: "),
        ("config.json", json.dumps(T5Config().to_dict()), "model mine: t5 is no causal language model"),
    ],
)
def test_a_model_that_no_run_could_open_is_told_once_for_all(file, text, said, model):
    (model / file).write_text(text)
    assert any(said in line for line in unfit(first(model))), unfit(first(model))


def test_a_card_that_others_have_filled_or_that_lacks_bf16_is_told(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "computes_bf16", lambda: False)
    monkeypatch.setattr(machine, "card_properties", lambda: SimpleNamespace(name="a T4"))
    for free, total, full in ((1, 16, True), (3, 16, False), (1, 1.5, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda f=free, t=total: (f * GIB, int(t * GIB)))
        said = unfit(first(model, precision="bf16"))
        assert any("no bf16 arithmetic: use --set hp.precision=fp32" in line for line in said)
        told = "its weights take 2 GiB, and 1 of 16 GiB of a T4 are free: end other programs"
        assert any(told in line for line in said) == full, "too large a model is a result, of each run"


CARD = """
class Number:
    add = lambda self, _: self
    item = lambda self: 0
is_available = lambda: True
device_count = lambda: 1
get_device_capability = lambda device=None: (9, 0)
ones = lambda *_, **__: Number()
"""


def test_a_bench_on_a_card_begins_no_run_of_a_model_that_is_unfit(tmp_path, monkeypatch):
    stubs = stub(tmp_path)
    with (stubs / "torch.py").open("a") as file:
        file.write(CARD)
    (stubs / "sitecustomize.py").write_text(
        "import os, harness.preflight as p\n"
        "p.unfit = lambda first: [f'{first[\"model\"]} on ' + os.environ['CUDA_VISIBLE_DEVICES']]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(stubs))
    with pytest.raises(Missing, match="every run: mine on GPU-b"):  # not on one that others may have filled
        Nursery({}, first(tmp_path), ["GPU-b"])
