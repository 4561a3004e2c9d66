"""The model that is kept: merged as the sum says, told by its card, uploaded as it is, and trackers."""

import json
import re
import shutil
import sys
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fabricate
import pytest
import tiny
import torch
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness import tracking
from harness.child import chosen_method
from harness.cli import BAD_REQUEST, OK, main
from harness.cli.arguments import TRACKERS
from harness.keeping import beside, kept_run
from harness.plan import Request, plan
from harness.record import RunRecord
from harness.report import model_cards
from harness.report.comparison import comparisons
from harness.report.export import as_json
from harness.report.modelcard import placeless
from harness.report.verdicts import judged
from harness.store import MODEL, RECORD, Store
from harness.training import execute, merging
from methods.lora import LoRA

ROWS = [{"prompt": f"the {a} {b}", "completion": f"{b} {a}"} for a in ("cat", "dog", "mat")
        for b in ("red", "house", "sat", "ran", "on", "to", "user", "model")]  # fmt: skip
SETTINGS = (
    "data.train=12", "data.validation=2", "data.test=6", "hp.max_steps=4", "hp.max_new_tokens=8",
    "hp.validations=1", "hp.learning_rate=2e-2", "hp.precision=fp32", "lora.rank=4", "lora.alpha=8.0",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base in bf16, and a finished run of LoRA and one of full fine-tuning in `results`."""
    home = tmp_path_factory.mktemp("secret-place")
    tiny.model(seed=3).to(torch.bfloat16).save_pretrained(home / "base")
    tiny.tokenizer().save_pretrained(home / "base")
    (home / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    request = Request(
        ["lora", "full"], model=str(home / "base"), dataset=str(home / "rows.jsonl"), seeds=[0],
        settings=SETTINGS,
    )  # fmt: skip
    with tiny.computing("no"):
        for spec in plan(request):
            record, folder = RunRecord(spec, "failed"), home / "results" / spec.folder
            folder.mkdir(parents=True)
            record.command = f"run_bench.py --model {home}/base --dataset {home}/rows.jsonl"
            execute(spec, chosen_method(spec, record), record, folder)
            record.status = "ok"
            (folder / RECORD).write_text(record.to_json())
    return home


@pytest.fixture
def home(made, tmp_path, capsys):
    """A copy for one test, and a command in it: `-> its exit status, output and errors`."""
    shutil.copytree(made / "results", tmp_path / "results")

    def command(name, *arguments):
        given = [name, *map(str, arguments), "--results", str(tmp_path / "results")]
        with tiny.computing("no"):
            status = main(given)
        return status, *capsys.readouterr()

    return tmp_path, command


def run_of(home: Path, method: str) -> Path:
    [folder] = (home / "results").glob(f"{method}-*")
    return folder


def texts(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.suffix in (".json", ".jinja", ".md", ".txt")]
    return {str(file.relative_to(folder)): file.read_text("utf-8") for file in files}


def answers(model, tokenizer) -> list[list[int]]:
    asked = [tokenizer("the cat red").input_ids, tokenizer("the mat on").input_ids]
    return [
        model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0].tolist() for ids in asked
    ]


def asked_by_its_card(folder: Path, base: Path, capsys) -> str:
    """What the Python of a card prints."""
    code = (folder / "README.md").read_text().split("## Use it")[1].split("##")[0]
    code = "\n".join(line[4:] for line in code.splitlines() if line.startswith("    "))
    exec(code.replace("FOLDER", str(folder)).replace("BASE", str(base)), {})
    return capsys.readouterr().out


# What a run saves, and what is merged


def test_what_a_run_saves_names_no_place_of_the_machine_and_is_restored(made, home):
    saved = run_of(made, "lora") / MODEL
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    for name, text in texts(made / "results").items():
        assert "secret-place" not in text.replace(str(made) + "/base --dataset", "").replace(
            str(made) + "/rows.jsonl", ""
        ), name  # but for the command, which a record keeps as it was typed
    assert "secret-place" not in str(texts(saved))
    base = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
    PeftModel.from_pretrained(base, saved)


def test_a_merged_adapter_is_the_sum_in_the_bases_type_and_speaks_as_before(made, home, capsys):
    folder, command = home
    status, out, _ = command("merge", "lora", "--model", made / "base", "--json")
    told, merged = json.loads(out), run_of(folder, "lora") / "merged"
    assert status == OK and told["folder"] == str(merged) and told["dtype"] == "bfloat16"
    assert told["texts"] == 4 and told["apart"] < 0.5
    base, sums = load_file(made / "base" / "model.safetensors"), load_file(merged / "model.safetensors")
    adapter = load_file(run_of(made, "lora") / MODEL / "adapter_model.safetensors")
    assert sums.keys() == base.keys()
    for name, value in sums.items():
        a, b = (adapter.get(f"base_model.model.{name[:-7]}.lora_{side}.weight") for side in "AB")
        change = 8.0 / 4 * (b @ a) if a is not None else torch.zeros(())
        assert torch.equal(value, (base[name].float() + change).bfloat16()), name
    assert sum("lora_A" in name for name in adapter) == 14, "all linear layers were adapted"
    assert not torch.equal(
        sums["model.layers.0.mlp.up_proj.weight"], base["model.layers.0.mlp.up_proj.weight"]
    )
    tokenizer = AutoTokenizer.from_pretrained(merged)
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert plain.dtype == torch.bfloat16 and not hasattr(plain, "peft_config")
    kept = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32), run_of(made, "lora") / MODEL
    )
    same = [a == b for a, b in zip(answers(plain.float(), tokenizer), answers(kept, tokenizer), strict=True)]
    assert all(same) or told["parted"], "it says where rounding turned a near tie"
    assert "secret-place" not in str(texts(merged))
    assert asked_by_its_card(merged, made / "base", capsys)


def test_whole_weights_are_merged_too_and_nothing_is_overwritten(made, home, tmp_path):
    folder, command = home
    to = tmp_path / "kept" / "model"
    status, out, _ = command("merge", run_of(folder, "full").name, "--model", made / "base", "--to", to)
    assert status == OK and "4 of 4 the same" in out
    saved = load_file(run_of(made, "full") / MODEL / "model.safetensors")
    for name, value in load_file(to / "model.safetensors").items():
        assert torch.equal(value, saved[name].bfloat16())
    before = (to / "model.safetensors").stat().st_mtime_ns
    status, _, err = command("merge", "full", "--model", made / "base", "--to", to)
    assert status == BAD_REQUEST and "is there already" in err
    assert (to / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in to.parent.iterdir()] == ["model"], "nothing is left at the side"


def test_a_merge_that_is_not_exact_is_refused_and_leaves_nothing(made, home, monkeypatch):
    folder, command = home
    monkeypatch.setattr(LoRA, "merge", lambda self, model: model.unload())  # the base, without its change
    status, _, err = command("merge", "lora", "--model", made / "base")
    assert status == BAD_REQUEST and "not exact" in err
    assert sorted(path.name for path in run_of(folder, "lora").iterdir() if path.is_dir()) == [MODEL]


def test_a_merged_model_stands_whole_or_not_at_all(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), beside(tmp_path / "model", 1) as part:
        (part / "half").touch()
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="GiB free"), beside(tmp_path / "model", 2**60):
        pass
    assert not list(tmp_path.iterdir())


def test_a_weight_that_was_not_written_is_missed_and_not_drawn(made, tmp_path):
    shutil.copytree(made / "base", tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no plain one.*model.layers.1.mlp.up_proj.weight$"):
        merging.read_back(tmp_path / "model", torch.float32)


def test_of_two_texts_it_is_said_where_they_part():
    assert merging.first_difference([1, 2, 3], [1, 5, 3]) == 2
    assert merging.first_difference([1, 2], [1, 2, 3]) == 3


def test_who_is_not_meant_or_cannot_be_merged_is_told_why(made, home):
    folder, command = home

    def refused(*arguments) -> str:
        status, out, err = command("merge", *arguments)
        assert status == BAD_REQUEST and not out
        return err

    assert "did you mean lora?" in refused("lroa")
    assert "was not trained" in refused("base")
    assert "--model DIR" in refused("lora"), "a folder elsewhere"
    other = shutil.copytree(made / "base", folder / "other")
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert "not those that lora-s0-" in refused("lora", "--model", other)
    found = fabricate.record("qlora")
    found.card["cannot"] = {}
    place = folder / "results" / fabricate.keep(folder / "results", found).spec.folder / MODEL
    assert "not whole" in refused("qlora"), "its weights are not there"
    place.mkdir()
    found.sizes = replace(found.sizes, saved_bytes=4)
    (place.parent / RECORD).write_text(found.to_json())
    (place / "adapter_model.safetensors").write_bytes(b"0000")
    said = refused("qlora")
    assert "rounded to 4 bits again" in said and "push uploads it" in said
    for seed in (0, 1):
        fabricate.keep(folder / "results", fabricate.record("galore", seed))
    with pytest.raises(ValueError, match=r"is 2 runs.*galore-s0-.*galore-s1-"):
        kept_run(Store(folder / "results"), "galore")


# The card

HOSTILE = "</td><script>x</script> [a](b) `c` \x1b[2J\n---\nlicense: mit\n# Big"


def card_of(store: Store, record: RunRecord, **known) -> str:
    folder = store.folder / record.spec.folder / MODEL
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").touch()
    return model_cards(store, {record.spec.folder: folder}, **known)[record.spec.folder]


def test_a_card_says_what_the_report_says(tmp_path):
    dataset = fabricate.DATASET | {"language": "en"}
    dataset["parts"] = [part | {"hub": f"owner/{part['name']}"} for part in dataset["parts"]]
    for method in ("base", "lora", "dora"):
        for seed in range(3 if method != "base" else 1):
            record = fabricate.keep(tmp_path, fabricate.record(method, seed, dataset=dataset))
    store = Store(tmp_path)
    text = card_of(store, record, licence="mit", address="ann/kept")
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("google/gemma-3-1b-it", "adapter")
    assert data.datasets == ["owner/alpaca", "owner/tulu", "owner/ultrachat"]
    assert (data.language, data.license, data.library_name) == ("en", "mit", "peft")
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    wanted = {"bleu": "bleu4", "rouge": "rouge_l", "perplexity": "perplexity", "accuracy": "token_accuracy"}
    assert values == {of: pytest.approx(record.scores[name], abs=1e-6) for of, name in wanted.items()}
    [comparison] = comparisons(store.load()[0])
    verdicts = as_json(comparison, judged(comparison, store), store, None)["verdicts"]
    [bleu] = [v for v in verdicts if (v["quantity"], v["a"], v["b"]) == ("bleu4", "DoRA", "Base")]
    ends = [f"{bleu[name]:+.2f}".replace("-", "−") for name in ("difference", "low", "high")]
    assert "{} ({} to {})".format(*ends) in text and bleu["verdict"] in text
    assert 'PeftModel.from_pretrained(base, "ann/kept")' in text
    assert "3 seeds" in text and "NVIDIA H200" in text and "learning rate | 0.0002" in text
    no_licence = ModelCard(card_of(store, record, licence="gemma")).data
    assert no_licence.license is None, "where base and data differ, words say it"


def test_what_strangers_wrote_is_text_in_a_card_and_places_are_none(tmp_path):
    dataset = fabricate.DATASET | {"title": HOSTILE, "notice": HOSTILE, "language": "en"}
    dataset["parts"] = [part | {"licence": HOSTILE, "title": HOSTILE} for part in dataset["parts"]]
    found = fabricate.record("lora", dataset=dataset)
    found.card |= {"title": HOSTILE, "summary": HOSTILE, "paper": HOSTILE}
    found.warnings = [f"no such file: '/home/ann/x/y.txt' {HOSTILE}"]
    found.command = "run_bench.py --model /home/ann/base --source a=~/b/c.jsonl --set x='``` <b>'"
    fabricate.keep(tmp_path, found)
    text = card_of(Store(tmp_path), found)
    data, body = ModelCard(text).data, text.split("\n---\n", 2)[1]
    prose = re.sub("(?m)^    .*|<br>", "", body)  # what is indented is code
    assert "license: mit" not in text.split("\n---\n")[0].split("\n") and data.license != "mit"
    assert data.model_name == found.spec.folder and not re.search(r"(?m)(?<!\\)<|\x1b|^# Big|^---$", prose)
    assert "/home" not in text and "--model base --source a=c.jsonl" in text


def test_a_command_keeps_ids_and_loses_places():
    said = "tuneoff --model owner/name --dataset /a/b/rows.jsonl --source x=../y.csv --set hp.epochs=1"
    assert (
        placeless(said)
        == "tuneoff --model owner/name --dataset rows.jsonl --source x=y.csv --set hp.epochs=1"
    )
    assert placeless("t --model random:/a/b/m --results ~/r") == "t --model random:m --results r"


# The hub

TOKEN = "hf_" + "Ab1" * 11


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for: repositories, large files, commits."""

    repos: dict[str, bool]  # name -> whether it is private
    files: dict[str, bytes]

    def answer(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if "chunked" not in self.headers.get("Transfer-Encoding", "") else b""
        place, here = self.path.split("?")[0], f"http://127.0.0.1:{self.server.server_port}"
        status, value = 200, {}
        said = json.loads(body) if self.command == "POST" and "/commit/" not in place and body else {}
        if self.command == "PUT":
            self.files[place] = body
        elif place == "/api/repos/create":
            self.repos[f"{said['organization']}/{said['name']}"] = said["visibility"] == "private"
            value = {"url": f"{here}/{said['organization']}/{said['name']}"}
        elif place.endswith("/preupload/main"):
            value = {"files": [{"path": f["path"], "shouldIgnore": False,
                                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                               for f in said["files"]]}  # fmt: skip
        elif place.endswith("/objects/batch"):
            places = {o["oid"]: {"upload": {"href": f"{here}/large/{o['oid']}"}} for o in said["objects"]}
            value = {"transfer": "basic",
                     "objects": [{**o, "actions": places[o["oid"]]} for o in said["objects"]]}  # fmt: skip
        elif "/commit/" in place:
            self.files["commit"] = body
            value = {"commitUrl": f"{here}/ann/kept/commit/1", "commitOid": "1", "success": True}
        elif self.command == "GET" and place.startswith("/api/models/"):
            name = place.removeprefix("/api/models/").removesuffix("/revision/main")
            status = 200 if name in self.repos else 404
            value = {"id": name, "sha": "1", "private": self.repos.get(name), "siblings": []}
            status = {"ann/forbidden": 403, "ann/base/auth-check": 200}.get(name, status)
        sent = json.dumps(value).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent * (self.command != "HEAD"))

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def log_message(self, *said):
        pass


@pytest.fixture
def hub(monkeypatch):
    Hub.repos, Hub.files = {"ann/open": False, "ann/closed": True}, {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}"
    files = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, here)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(constants, "ENDPOINT", here)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield Hub
    server.shutdown()
    server.server_close()


def test_an_adapter_is_pushed_with_its_card_to_a_private_repository(made, home, hub):
    folder, command = home
    saved = run_of(folder, "lora") / MODEL
    (saved / "diary.pdf").write_text("nobody's model")
    (saved / ".secret.json").write_text("{}")
    status, out, err = command("push", "lora", "ann/kept")
    assert status == OK, err
    assert out.index("private") < out.index("adapter_model.safetensors") < out.index("uploaded: ")
    assert hub.repos["ann/kept"] is True
    [large] = [body for place, body in hub.files.items() if place.startswith("/large/")]
    assert large == (saved / "adapter_model.safetensors").read_bytes()
    files = [json.loads(line)["value"] for line in hub.files["commit"].splitlines()]
    names = {file.get("path") for file in files[1:]}
    assert names == {path.name for path in saved.iterdir()} - {"diary.pdf", ".secret.json"}
    assert "README.md" in names and "ann/kept" in (saved / "README.md").read_text()
    assert TOKEN not in out + err and "secret-place" not in str(texts(saved))
    status, _, err = command("push", "lora", "ann/kept", "--model", "ann/base")
    assert status == OK, err  # who knows the base's id says it
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == "ann/base"
    assert ModelCard.load(saved / "README.md").data.base_model == "ann/base"


def test_nothing_private_becomes_public_and_a_refusal_is_told_without_the_token(made, home, hub, monkeypatch):
    _, command = home
    status, _, err = command("push", "lora", "ann/open")
    assert status == BAD_REQUEST and "--public" in err
    status, out, err = command("push", "lora", "ann/forbidden")
    assert status == BAD_REQUEST and "403" in err and "hf auth login" in err and TOKEN not in out + err
    assert command("push", "lora", "no owner")[0] == command("push", "lora", "kept")[0] == BAD_REQUEST
    assert not hub.files and "ann/kept" not in hub.repos
    status, _, err = command("push", "lora", "ann/closed", "--public")
    assert status == OK and hub.repos["ann/closed"], "one that is there stays as it is"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", "/nowhere")
    assert "hf auth login" in command("push", "lora", "ann/kept")[2]


# Trackers


def test_tensorboard_has_what_the_record_has(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record = fabricate.record("qlora")
    record.folder, record.scores = record.spec.folder, {"bleu4": 12.5, "perplexity": None}
    monkeypatch.chdir(tmp_path)
    with tiny.computing("no"):
        tracking.log("tensorboard", record, tmp_path)
    read = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard" / record.folder)).Reload()
    curve = [(event.step, event.value) for event in read.Scalars("train/loss")]
    assert curve == [(p["step"], pytest.approx(p["loss"], rel=1e-6)) for p in record.training]
    assert [e.step for e in read.Scalars("validation/loss")] == [p["step"] for p in record.validation]
    assert [e.value for e in read.Scalars("train/learning_rate")] == pytest.approx([2e-4] * 60)
    assert read.Scalars("phase/train/peak_allocated")[0].value == pytest.approx(
        record.phases["train"].peak_allocated
    )
    assert [(e.step, e.value) for e in read.Scalars("score/bleu4")] == [(60, 12.5)]
    assert "score/perplexity" not in read.Tags()["scalars"], "what is not known is not 0"


ACCELERATE = """
import time
class Accelerator:
    def __init__(self, cpu, log_with, project_dir): self.name = log_with
    def init_trackers(self, project, config, keywords):
        print("chatter")
        if self.name == "wandb": raise RuntimeError("no login\\n\\x1b[2J")
        if self.name == "comet_ml": input("your key? ")
        if self.name == "aim": time.sleep(60)
    def log(self, values, step): open("told", "a").write(f"{step}\\n")
    def end_training(self): pass
"""


def test_a_tracker_that_raises_asks_or_hangs_is_a_note(tmp_path, monkeypatch):
    (tmp_path / "accelerate.py").write_text(ACCELERATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = fabricate.keep(tmp_path / "results", fabricate.record("qlora"))
    told = tracking.Tracking(["wandb", "comet_ml", "mlflow"], tmp_path / "results", tmp_path / "tracking")
    hung = tracking.Tracking(["aim"], tmp_path / "results", tmp_path / "tracking")
    told.tell(record.spec.folder)
    hung.tell(record.spec.folder)
    one, two = told.close()
    assert "wandb: RuntimeError: no login" in one and "comet_ml: EOFError" in two
    assert len((tmp_path / "tracking" / "mlflow" / "told").read_text().splitlines()) == 61
    monkeypatch.setattr(tracking, "SECONDS", 0.1)
    assert "no end within" in hung.close()[0] and hung.telling[record.spec.folder].wait(5)


def test_trackers_are_accelerates_and_one_that_is_missing_is_refused_at_once(capsys):
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert sorted(LOGGER_TYPE_TO_CLASS) == list(TRACKERS)
    absent = next(name for name in TRACKERS if list(tracking.missing([name])))
    assert main(["run", "--track-with", absent, "--results", "/nowhere/at/all"]) == BAD_REQUEST
    assert f"pip install {absent}" in capsys.readouterr().err
    assert "torch" in sys.modules
