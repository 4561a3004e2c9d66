"""Ensembles: against both models' own full logits, the weights by hand, and what a report makes of them."""

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path

import fabricate
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_decoder import KINDS, until
from test_run import SETTINGS, WORDS
from transformers import AutoModelForCausalLM

from harness.bench.loop import cached, located
from harness.child import chosen_method, diagnose
from harness.cli.progress import describe
from harness.errors import BadRequest
from harness.method import Unsupported
from harness.plan import Request, plan
from harness.record import RunRecord, Tokens
from harness.report import render
from harness.report.comparison import comparisons, seconds
from harness.report.ensembles import undefined
from harness.report.terminal import results as terminal
from harness.report.verdicts import judged
from harness.spec import ENSEMBLE, RunSpec
from harness.store import MODEL, RECORD, Store
from harness.training import execute
from harness.training.ensemble import Together, averaged
from harness.training.head import arithmetic

ROWS = tiny.rows(7, prompt=(1, 30))
TOKENS = 8


def direct(models, ids: list[int]) -> torch.Tensor:
    """(T, V): log-probabilities of what follows each token, from each model's own logits, without a cache."""
    with torch.inference_mode():
        each = [m(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1) for m in models]
    return torch.stack(each).mean(0).log_softmax(-1)


def greedy(models, row) -> list[int]:
    ids = list(row.prompt_ids)
    for _ in range(TOKENS):
        ids.append(int(direct(models, ids)[-1].argmax()))
    return ids[len(row.prompt_ids) :]


def pair(kind: str = "gemma 3") -> list:
    return [tiny.model(KINDS[kind], seed=seed) for seed in (0, 1)]


def decoded(model, stops, count: int = 4):
    made = tiny.decoder(tiny.hyperparams())
    made.stops = stops
    return made, [ids for [ids] in made.continuations(model, ROWS, count, TOKENS)]


# The model


@pytest.mark.parametrize("kind", ["gemma 3", "gemma 2"])
def test_its_answers_and_likelihoods_are_those_of_both_models_full_logits(kind):
    models = pair(kind)
    free = [greedy(models, row) for row in ROWS]
    stops = sorted({ids[i % TOKENS] for i, ids in enumerate(free)})[::3]
    expected = [until(stops, ids) for ids in free]
    assert len(set(map(len, expected))) > 2 and expected not in [decoded(m, stops)[1] for m in models]
    together = Together(models)
    made, found = decoded(together, stops)
    assert (found, made.kernels, made.refused) == (expected, "eager", [])
    made.unfit = lambda *_: "so that generate does it"
    assert [ids for [ids] in made.continuations(together, ROWS, 4, TOKENS)] == expected
    for row, score in zip(ROWS, tiny.likelihoods(together, ROWS), strict=True):
        ids = [*row.prompt_ids, *row.response_ids]
        place = torch.arange(len(row.prompt_ids), len(ids))
        logps, right = direct(models, ids)[place - 1], torch.tensor(ids)[place]
        assert score["nll"] == pytest.approx(-logps.gather(1, right[:, None]).sum().item(), rel=1e-5)
        assert score["correct"] == (logps.argmax(1) == right).sum()


def test_two_copies_of_one_model_answer_as_it_does_and_their_average_is_it():
    one = tiny.model(KINDS["gemma 3"])
    twins = Together([one, copy.deepcopy(one)])
    assert decoded(twins, [7])[1] == decoded(one, [7])[1]
    for a, b in zip(tiny.likelihoods(twins, ROWS), tiny.likelihoods(one, ROWS), strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    before = tiny.copy_of(one)
    assert all(w.equal(before[name]) for name, w in averaged([one, copy.deepcopy(one)]).state_dict().items())


def test_in_bf16_it_is_decoded_by_the_engine_too_and_its_arithmetic_is_its_members():
    """Its mean in fp32 is none of the model's products, and no other arithmetic than that of the others."""
    models = [model.to(torch.bfloat16) for model in pair()]
    found = []
    for model in (*models, Together(models)):
        with arithmetic(model) as types:
            tiny.likelihoods(model, ROWS[:2])
        found.append(types)
        made, _ = decoded(model, [7])
        assert (made.kernels, made.refused) == ("eager", [])
    assert found[0] == found[1] == found[2] and found[0]["products"] == "bfloat16"


def test_the_average_of_two_merged_adapters_is_the_mean_of_the_merged_matrices():
    base, merged, expected = tiny.copy_of(tiny.model()), [], []
    for seed, rank in ((0, 2), (1, 5)):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=3, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(tiny.model(), config)
        parts = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
        places = [n for n in parts if "lora_A" in n]
        expected.append({n: 3 / rank * parts[n.replace("lora_A", "lora_B")] @ parts[n] for n in places})
        merged.append(model.merge_and_unload())
    found = tiny.copy_of(averaged(merged))
    changed = {n.removeprefix("base_model.model.").replace("lora_A.default.", ""): n for n in expected[0]}
    for name, weight in base.items():
        changes = [each[changed[name]] for each in expected] if name in changed else [torch.zeros(1)]
        torch.testing.assert_close(found[name], weight + sum(changes) / len(changes), atol=1e-6, rtol=0)
    assert len(changed) == 14  # seven matrices in each of two layers


def test_tied_weights_are_averaged_once_and_others_shapes_not_at_all():
    one, other = tiny.model(seed=0), tiny.model(seed=1)
    a, b = (m.get_input_embeddings().weight.detach().clone() for m in (one, other))
    made = averaged([one, other])
    assert made.get_input_embeddings().weight is made.get_output_embeddings().weight
    torch.testing.assert_close(made.get_input_embeddings().weight, (a + b) / 2)
    with pytest.raises(Unsupported, match="names and shapes"):
        averaged([one, tiny.model(KINDS["llama"])])


# The plan


def asked(*ensembles, methods=("lora", "galore"), **more) -> Request:
    small = ["data.train=8", "data.validation=4", "data.test=4"]
    return Request(list(methods), seeds=[0, 1], settings=small, ensembles=ensembles, **more)


def test_it_is_planned_behind_its_members_for_each_seed_and_by_weights_where_these_merge():
    found = plan(asked("lora+galore", "qlora+galore", methods=["qlora", "lora", "galore"]))
    assert [describe(spec) for spec in found.ensembles] == [
        f"{names} averaged), seed {seed}"
        for names in ("lora+galore (outputs", "lora+galore (weights", "qlora+galore (outputs")
        for seed in (0, 1)
    ]
    for spec in found.ensembles:
        assert {m.digest for m in spec.members} <= {
            s.digest for s in found if s.trains and s.seed == spec.seed
        }
    stages, done = [], {}
    while stage := found.upcoming(done):
        stages.append(stage)
        done |= {spec.digest: None for spec in stage}
        assert len(done) <= found.total(done, stage)
    assert [{(s.untouched, bool(s.members)) for s in stage} for stage in stages] == [
        {(True, False)}, {(True, False), (False, False)}, {(False, True)}
    ]  # fmt: skip
    others = plan(replace(asked("lora+galore"), settings=[*asked().settings, "lora.rank=3"])).ensembles
    assert not {s.digest for s in others} & {s.digest for s in found}
    spec = RunSpec.from_json(json.loads(json.dumps(found.ensembles[0].asked())))
    assert (spec.digest, spec.members[0].method) == (found.ensembles[0].digest, "lora")
    with pytest.raises(ValueError, match=r"spec\.options\.average must be"):
        RunSpec.from_json({**spec.asked(), "options": {**spec.options, "average": "tokens"}})


@pytest.mark.parametrize("texts, more, told", [
    (["lora"], {}, "--ensemble lora: write it as METHOD+METHOD"),
    (["lora+"], {}, "--ensemble lora+: write it as METHOD+METHOD"),
    (["lora+lora"], {}, "--ensemble lora+lora: has a member twice"),
    (["lora+galore", "galore+lora"], {}, "--ensemble galore+lora: is the same as lora+galore"),
    (["lora+glore"], {}, "unknown member 'glore': did you mean galore? Available: galore, lora: name it"),
    (["lora+base"], {}, "base is not trained: name methods that are"),
    (["lora+galore"], {"sweeps": ["lora.rank=2,4"]}, "lora is swept, and has 2 rows: leave it out"),
    (["lora+galore"], {"tracks": ["tuned"]}, "--ensemble: its members are of the identical track: add"),
])  # fmt: skip
def test_what_cannot_be_together_is_refused_with_the_remedy(texts, more, told):
    with pytest.raises(BadRequest) as refused:
        plan(asked(*texts, **more))
    assert told in str(refused.value)


# The run


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A bench of two methods and their ensemble, in this process. -> its plan, its store"""
    folder = tmp_path_factory.mktemp("together")
    tiny.model(tiny.gemma(), seed=3).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    texts = [f"{a} {b} {c}" for a in WORDS for b in WORDS[:6] for c in WORDS[:3]]
    rows = [{"prompt": text, "completion": " ".join(text.split()[::2])} for text in texts]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = plan(Request(
        ["lora", "galore"], model=str(folder / "model"), dataset=str(folder / "rows.jsonl"), seeds=[0],
        settings=tiny.settings(SETTINGS, ["galore.rank=4"]), ensembles=["lora+galore"],
    ))  # fmt: skip
    store, done = Store(folder / "results"), {}
    with tiny.computing("no"):
        while stage := found.upcoming(done):
            for spec in stage:
                done[spec.digest] = run(located(spec, found, store), store)
    return found, store


def run(spec: RunSpec, store: Store) -> RunRecord:
    record, folder = RunRecord(spec, "failed", started=f"2025-11-2{len(spec.members)}"), store.attempt(spec)
    try:
        execute(spec, chosen_method(spec, record), record, folder)
        record.status = "ok"
    except Exception as error:
        record.status, record.error = diagnose(error)
    store.keep(spec, record)
    return record


def test_its_record_is_a_whole_run_without_a_training(bench):
    found, store = bench
    members = [store.find(spec) for spec in found.ensembles[0].members]
    for spec in found.ensembles:
        record = store.find(spec)
        assert record.ok and cached(spec, found, store), record.error
        saved = ["save"] if spec.options["average"] == "weights" else []
        assert [*record.phases] == ["load", "evaluate", "generate", *saved]
        assert all(
            record.phases[name].seconds > 0 and record.phases[name].peak_host for name in record.phases
        )
        assert (record.train_seconds, record.training, record.kernels.decoding) == (0, [], "eager")
        assert record.scores.keys() == members[0].scores.keys()
        assert all(
            record.scores[name] is not None for name in ("bleu4", "rouge_l", "perplexity", "token_accuracy")
        )
        assert record.hashes["members"] == [member.hashes["outputs"] for member in members]
        assert record.hashes["test"] == members[0].hashes["test"]
    sizes = [store.find(spec).sizes.weight_bytes for spec in (*found.ensembles, *found.ensembles[0].members)]
    assert sizes[0] == sizes[2] + sizes[3] and sizes[1] == sizes[3]


def test_no_row_is_less_likely_than_in_the_mean_of_its_members(bench):
    """As the restored members are those that were scored: by Hoelder's inequality."""
    found, store = bench
    together, *apart = (
        store.outputs(store.find(s)) for s in (found.ensembles[0], *found.ensembles[0].members)
    )
    for row, *each in zip(together, *apart, strict=True):
        assert row["nll"] <= sum(one["nll"] for one in each) / 2 + 1e-5
    assert all(together != one for one in apart)


def test_the_averaged_weights_are_saved_and_are_the_mean_of_what_the_members_saved(bench):
    found, store = bench
    lora, galore = (store.path(spec) / MODEL for spec in found.ensembles[0].members)
    base = load_file(Path(found[0].locations["model"]) / "model.safetensors")
    parts = load_file(lora / "adapter_model.safetensors")
    config = json.loads((lora / "adapter_config.json").read_text())
    trained = load_file(galore / "model.safetensors")
    made = AutoModelForCausalLM.from_pretrained(store.path(found.ensembles[1]) / MODEL).state_dict()
    for name, weight in base.items():
        a = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        change = (
            config["lora_alpha"] / config["r"] * parts[a.replace("_A", "_B")] @ parts[a] if a in parts else 0
        )
        torch.testing.assert_close(made[name], (weight + change + trained[name]) / 2, atol=1e-6, rtol=0)


def test_a_member_without_a_result_makes_it_unsupported_and_a_new_one_makes_it_run_again(bench, tmp_path):
    found, store = bench
    spec, elsewhere = found.ensembles[0], Store(tmp_path)
    assert run(located(spec, found, elsewhere), elsewhere).error == "its member lora has no record"
    for member, status in zip(spec.members, ("ok", "diverged"), strict=True):
        elsewhere.attempt(member)
        elsewhere.keep(member, replace(store.find(member), status=status))
        (elsewhere.path(member) / MODEL).mkdir()
    record = run(located(spec, found, elsewhere), elsewhere)
    assert (record.status, record.error) == (
        "unsupported", "its member galore has no result: diverged"
    )  # fmt: skip
    assert not cached(spec, found, elsewhere)
    again = store.path(spec.members[0]) / RECORD
    kept = again.read_text()
    again.write_text(
        json.dumps({**json.loads(kept), "hashes": {**json.loads(kept)["hashes"], "outputs": None}})
    )
    assert not cached(spec, found, store)
    again.write_text(kept)
    assert cached(spec, found, store)


# The report


def fabricated(folder: Path, cannot=None) -> Path:
    """Three seeds of two methods and of their ensemble, whose words are oftener right."""
    fabricate.results(folder, methods=["qlora", "galore"])
    for seed in range(3):
        members = [fabricate.record(name, seed).spec for name in ("qlora", "galore")]
        named = [{"method": m.method, "options": m.options, "changes": m.changes} for m in members]
        record = fabricate.record(ENSEMBLE, seed, options={"members": named, "average": "outputs"})
        record = replace(record, step_seconds=[], training=[], validation=[], tokens=Tokens())
        record.phases = {
            name: p for name, p in record.phases.items() if name in ("load", "evaluate", "generate")
        }
        fabricate.keep(folder, record, fabricate.outputs("full", seed))
        if cannot:
            qlora = fabricate.record("qlora", seed)
            fabricate.keep(folder, replace(qlora, card={**qlora.card, "cannot": {"merging": cannot}}))
    return folder


LABEL = "QLoRA + GaLore (outputs averaged)"


def test_it_stands_beside_its_members_with_what_they_cost_and_is_ranked_with_nothing(tmp_path):
    store = Store(fabricated(tmp_path / "results", "would be rounded"))
    [comparison] = comparisons(store.load()[0])
    assert [t.label for t in comparison.techniques] == ["Base", "Base, 4 bits", "QLoRA", "GaLore", LABEL]
    *_, qlora, galore, ensemble = comparison.techniques
    assert comparison.members(ensemble) == [qlora, galore]
    apart = [list(map(seconds, t.done)) for t in (qlora, galore)]
    assert comparison.spent(ensemble, seconds) == pytest.approx(
        [sum(both) for both in zip(*apart, strict=True)]
    )
    assert comparison.spent(ensemble, comparison.peak_memory, max) == galore.values(comparison.peak_memory)
    verdicts = judged(comparison, store)
    for standing in verdicts.standings.values():
        assert LABEL not in standing.ranked("")
    for standing in verdicts.metrics:
        words = {label: standing.verdict(LABEL, label).word for label in ("Base", "QLoRA", "GaLore")}
        assert words["Base"] in ("higher", "lower") and all(words.values())
    shown = terminal(comparison, 200)
    lines = {name: shown[shown.index(f"\n{name} ") :].split("\n")[1].split() for name in ("GaLore", LABEL)}
    assert lines[LABEL][-6:-3] == lines["GaLore"][-6:-3] != ["–"] * 3 and "–" not in lines[LABEL][-3:]
    assert "An ensemble's training time is the sum" in " ".join(shown.split())
    assert list(undefined(comparison)) == [
        "QLoRA + GaLore, weights averaged: unsupported, as QLoRA has no plain weights (would be rounded)."
    ]


@pytest.mark.usefixtures("undrawn")
def test_every_format_has_it(tmp_path):
    results = fabricated(tmp_path / "results", "<b>rounded")
    files = {
        f.suffix: f.read_text()
        for f in render(Store(results), tmp_path, ("md", "html", "csv", "json", "tex"))
    }
    assert files[".md"].count(f"| {LABEL} |") >= 5 and f"| {LABEL} − GaLore |" in files[".md"]
    assert "&lt;b&gt;rounded" in files[".html"] and "<b>rounded" not in files[".html"]
    said = {(row["technique"], row["quantity"]): row for row in csv.DictReader(files[".csv"].splitlines())}
    times = [float(said[name, "seconds"]["mean"]) for name in ("QLoRA", "GaLore", LABEL)]
    assert times[2] == pytest.approx(times[0] + times[1]) and said[LABEL, "bleu4"]["n"] == "3"
    assert (LABEL, "trainable") not in said and (LABEL, "step_seconds") not in said
    [technique] = [
        t for t in json.loads(files[".json"])["comparisons"][0]["techniques"] if t["method"] == ENSEMBLE
    ]
    assert technique["technique"] == LABEL and technique["groups"] == []
    assert LABEL in files[".tex"] and "Ensembles against their members in BLEU-4" in files[".md"]


def test_without_a_members_record_its_costs_are_unknown(tmp_path):
    results = fabricated(tmp_path)
    for folder in [*results.glob("galore-*")]:
        for file in sorted(folder.rglob("*"), reverse=True):
            file.unlink()
        folder.rmdir()
    [comparison] = comparisons(Store(results).load()[0])
    ensemble = comparison.ensembles[0]
    assert ensemble.label == "QLoRA + galore (outputs averaged)"
    assert comparison.spent(ensemble, seconds) == [] and len(ensemble.done) == 3
