"""Attention pictures: what is drawn is what the library says, and nothing but maps is drawn."""

import json
from dataclasses import replace

import fabricate
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from harness.data import Template
from harness.method import build
from harness.plan import Request, plan
from harness.record import Data, Provenance, RunRecord
from harness.report.attention import attended
from harness.report.comparison import comparisons
from harness.store import ATTENTION, Store
from harness.training import attention_maps
from methods.full import Full

TALK = [("the cat sat on the mat", "the dog ran"), ("a cat", "a dog")]


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    """Of a model of six layers, and of one that was trained: all its weights are larger by a tenth."""
    folder = tmp_path_factory.mktemp("attention")
    config = tiny.gemma(num_hidden_layers=6, layer_types=["full_attention"] * 6)
    model = tiny.model(config, seed=3)
    model.save_pretrained(folder / "base")
    tiny.tokenizer().save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.save_pretrained(folder / "trained")
    spec = replace(plan(Request(["full"], "demo", seeds=[0]))[-1], locations={"model": str(folder / "base")})
    record = RunRecord(spec, "ok", data=Data(template="instruction"), provenance=Provenance(precision="fp32"))
    found = attention_maps(spec, record, build(Full, {}), folder / "trained", TALK)
    return folder, record, json.loads(json.dumps(found))


@pytest.mark.parametrize("name", ["before", "after"])
def test_the_maps_are_means_of_the_librarys(name, maps):
    folder, _, found = maps
    assert (
        found["layers"] == [[1, 2], [3, 3], [4, 5], [6, 6]] or sum(b - a + 1 for a, b in found["layers"]) == 6
    )
    place = folder / {"before": "base", "after": "trained"}[name]
    model = AutoModelForCausalLM.from_pretrained(place, attn_implementation="eager")
    template = Template(tiny.tokenizer(), "instruction")
    prompt, answer = TALK[0]
    ids = [*template.encode_prompts([prompt])[0][0], *template.response_ids(prompt, answer)]
    assert len(found["tokens"]) == len(ids) and 0 < found["answer"] < len(ids)
    own = model(torch.tensor([ids]), output_attentions=True).attentions
    for (first, last), group in zip(found["layers"], found[name], strict=True):
        expected = torch.stack(own[first - 1 : last]).mean((0, 2))[0]
        torch.testing.assert_close(torch.tensor(group), expected, atol=1e-4, rtol=0)
        assert not torch.tensor(group).triu(1).any()
    assert found["before"] != found["after"]


def test_a_report_shows_maps_and_nothing_else(maps, tmp_path):
    _, _, found = maps
    kept = [fabricate.keep(tmp_path, fabricate.record("lora", seed)) for seed in (0, 1, 2, 3)]
    hostile = {**found, "tokens": ["<script>$x$\x1b"] * len(found["tokens"])}
    for record, value in zip(kept, (found, hostile, {**found, "after": [[1.0]]}, "[]"), strict=True):
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / record.spec.folder / ATTENTION).write_text(text)
    store = Store(tmp_path)
    plots = [b for b in attended(comparisons(store.load()[0])[0], store, "") if b.kind == "plot"]
    assert len(plots) == 2
    assert b"<script" not in plots[1].images["svg"] and b"\x1b" not in plots[1].images["svg"]
    assert attended(comparisons([kept[2]])[0], store, "") == []
