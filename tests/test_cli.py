"""The command line as a person uses it: a whole run in real processes, mistakes, faults, the cache."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_requests import told

from harness.cli import BAD_REQUEST

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--set",
    "data.train=16",
    "data.test=4",
    "data.validation=2",
    "hp.max_new_tokens=4",
    "hp.validations=1",
]
README = (ROOT / "README.md").read_text()
BITFIT = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "class BitFit" in code)


def bench(*arguments, cwd, timeout=300, **more):
    return subprocess.run(
        [sys.executable, str(ROOT / "run_bench.py"), *map(str, arguments)],
        cwd=cwd, capture_output=True, text=True, timeout=timeout, **more,
    )  # fmt: skip


def records(folder: Path) -> dict[str, dict]:
    found = [json.loads(p.read_text()) for p in folder.glob("results/[!.]*/record.json")]
    return {f"{r['spec']['method']}-{r['spec']['seed']}": r for r in found}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with one finished bench: a plugin that works, two seeds, and one method that diverges."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "bitfit.py").write_text(BITFIT)
    diverging = (
        BITFIT
        + "\n    def loss(self, model, batch, run):\n"
        + "        return super().loss(model, batch, run) * float('nan')\n"
    )
    (folder / "diverging.py").write_text(diverging)
    (folder / "harness" / "data").mkdir(parents=True)
    for name in (
        "methods",
        "random",
        "torch",
        "datasets",
        "harness/spec",
    ):  # no run is made of what lies here
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the current folder')")
    plugins = ["--plugins", "bitfit.py", "diverging.py"]
    run = bench("--methods", "bitfit", "diverging", "--seeds", 0, 1, *plugins, *SMALL, cwd=folder)
    return folder, run


def test_a_bench_runs_and_some_of_it_fails(home):
    folder, run = home
    assert run.returncode == 1, run.stderr
    found = records(folder)
    assert {name: r["status"] for name, r in found.items()} == {
        "base-0": "ok", "bitfit-0": "ok", "bitfit-1": "ok",
        "diverging-0": "diverged", "diverging-1": "diverged",
    }  # fmt: skip
    assert "at step 1" in found["diverging-0"]["error"]
    assert "outputs" not in found["diverging-0"]["hashes"]
    assert found["diverging-0"]["training"][0]["loss"] is None, "its curve is kept up to where it broke"
    report = (folder / "reports/report.md").read_text()
    assert "BitFit" in report and "diverged" in report
    assert "shows the tool, not the methods" in report


def test_the_method_in_the_readme_is_short():
    assert len(BITFIT.splitlines()) < 60


def test_every_method_of_a_seed_read_the_same_batches(home):
    found = records(home[0])
    assert found["bitfit-0"]["hashes"]["batches"] == found["diverging-0"]["hashes"]["batches"]
    assert found["bitfit-0"]["hashes"]["batches"] != found["bitfit-1"]["hashes"]["batches"]
    assert found["bitfit-0"]["hashes"]["test"] == found["base-0"]["hashes"]["test"]


def test_no_path_of_this_machine_is_kept(home):
    folder, _ = home
    kept = [*folder.glob("results/*/*.json*"), *folder.glob("results/*/model/*.[jm]*")]
    assert sum(path.name == "README.md" for path in kept) == 2, "a card for each model that was kept"
    for path in [*kept, *folder.glob("reports/*.*")]:
        assert str(ROOT) not in path.read_text() and str(folder) not in path.read_text(), path


def test_again_reuses_what_is_ok_and_tries_the_rest_again(home):
    folder, _ = home
    before = (folder / "results").stat().st_mtime_ns
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("results/bitfit*/record.json")}
    plan = bench("plan", "--methods", "bitfit", "diverging", "--seeds", 0, 1, 3, "--plugins", "bitfit.py",
                 "diverging.py", *SMALL, "--json", cwd=folder)  # fmt: skip
    states = {f"{r['method']}-{r['seed']}": r["state"] for r in json.loads(plan.stdout)}
    assert states == {
        "base-0": "cached", "bitfit-0": "cached", "bitfit-1": "cached", "bitfit-3": "will run",
        "diverging-0": "will run again (diverged)", "diverging-1": "will run again (diverged)",
        "diverging-3": "will run",
    }  # fmt: skip
    assert (folder / "results").stat().st_mtime_ns == before, "a plan creates nothing"
    ascii_alone = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    arguments = ["--methods", "bitfit", "--seeds", 0, 1, "--plugins", "bitfit.py", *SMALL]
    again = bench(*arguments, cwd=folder, env=ascii_alone)  # the table has letters that this locale lacks
    assert again.returncode == 0 and "3 of 3 cached" in again.stdout, again.stderr
    assert kept == {p: p.stat().st_mtime_ns for p in folder.glob("results/bitfit*/record.json")}


def test_a_changed_method_is_neither_reused_nor_run_again_in_silence(home):
    folder, _ = home
    arguments = ["--methods", "bitfit", "--seeds", 0, "--plugins", "bitfit.py", *SMALL]
    (folder / "bitfit.py").write_text(BITFIT + "\n# changed\n")
    told = "its method's code has changed; --force runs it again"
    assert told in bench("plan", *arguments, cwd=folder).stdout
    again = bench(*arguments, "--format", "json", cwd=folder)
    (folder / "bitfit.py").write_text(BITFIT)
    assert again.returncode == 0 and told in again.stdout
    assert told not in bench("plan", *arguments, cwd=folder).stdout


@pytest.mark.fault(34)
def test_a_report_needs_no_torch_and_is_the_same_but_for_the_time(home):
    folder, _ = home
    hidden = ("torch", "transformers", "scipy", "peft", "accelerate", "sacrebleu", "rouge_score")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nfrom harness.cli import main\n"
        "raise SystemExit(main(['report', '--reports', 'again']))"
    )
    subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, check=True)
    files = sorted(p.relative_to(folder / "again") for p in (folder / "again").rglob("*") if p.is_file())
    assert any(p.suffix == ".html" for p in files) and any(p.suffix == ".svg" for p in files)
    stamp = re.compile(rb"20\d\d-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(\+00:00|Z| UTC)?")
    for file in files:
        of_the_run, again = (folder / name / file for name in ("reports", "again"))
        assert stamp.sub(b"", again.read_bytes()) == stamp.sub(b"", of_the_run.read_bytes()), file


BAD_REQUESTS = {
    "method": (["--methods", "qlor"], ["unknown method 'qlor': did you mean qlora?", "galore"]),
    "dataset": (["--dataset", "alpacca", "--model", "demo/model"], ["did you mean alpaca?"]),
    "preset": (["--preset", "dem"], ["unknown preset 'dem': did you mean demo?"]),
    "hyperparameter": (["--set", "hp.learning_rat=1"], ["did you mean learning_rate?"]),
    "option": (["--set", "qlora.rnk=1"], ["did you mean rank?"]),
    "group": (["--set", "qlor.rank=1"], ["did you mean qlora?"]),
    "other method": (["--set", "lora.rank=1"], ["lora is not among --methods"]),
    "text for number": (
        ["--set", "hp.learning_rate=fast"],
        ["hp.learning_rate: must be a number, not 'fast'"],
    ),
    "negative": (["--set", "hp.epochs=-1"], ["hp.epochs: must be at least 0, not -1"]),
    "endless": (["--set", "hp.epochs=1e300"], ["hp.epochs=1e+300 of 320 rows is more steps"]),
    "endless steps": (["--set", "hp.max_steps=10000000"], ["more steps than could ever run"]),
    "time limit": (["--time-limit", "30"], ["write it as 90s, 30m or 2h, not '30'"]),
    "no time": (["--time-limit", "0h"], ["write it as 90s, 30m or 2h, not '0h'"]),
    "secret": (["--preset", "hf_" + "a1" * 17], ["unknown preset 'hf_[hidden]'"]),
    "rank 0": (["--set", "qlora.rank=0"], ["qlora.rank: must be at least 1, not 0"]),
    "no =": (["--set", "hp.epochs"], ["write it as"]),
    "source": (["--source", "alpaca=nowhere.json"], ["there is no file or folder nowhere.json"]),
    "source name": (["--source", "alpacca=."], ["did you mean alpaca?"]),
    "corrupt source": (["--source", "alpaca=broken.jsonl"], ["broken.jsonl, line 2"]),
    "empty source": (["--source", "alpaca=empty.jsonl"], ["empty.jsonl holds no rows"]),
    "model": (["--model", "no/such/folder", "--dataset", "demo"], ["neither a folder nor a hub id"]),
    "model without weights": (["--model", ".", "--dataset", "demo"], ["has no config.json"]),
    "model without data": (["--model", str(ROOT / "demo/model")], ["no dataset: name one with --dataset"]),
    "results": (["--results", "file"], ["file is a file, not a folder"]),
    "seeds": (["--seeds", "1", "1"], ["--seeds: must be some different whole numbers"]),
    "plugin": (["--plugins", "none.py"], ["there is no file none.py"]),
    "variants": (
        [
            "--methods",
            "peft.vear",
            "peft",
            "peft.prefixtuning",
            "peft.PREFIX_TUNING",
            "peft.vera",
            "--set",
            "peft.vera.rr=1",
        ],
        [
            "unknown PEFT type 'vear': did you mean vera?",
            "name a type, as in peft.vera. Available: ada",
            "method peft.prefixtuning: peft.prefixtuning prepends trained tokens",
            "method peft.PREFIX_TUNING: peft.prefixtuning prepends trained tokens",
            "unknown option of peft.vera 'rr': did you mean r?",
        ],
    ),
    "variant of what has none": (["--methods", "lora.x"], ["lora has no variants: write lora alone"]),
    "limit": (
        ["--methods", "galore_layerwise", "--set", "hp.micro_batch_size=2"],
        ["galore_layerwise cannot do accumulation: ", "--set hp.micro_batch_size=4"],
    ),
    "reward": (["--set", "data.reward=exat"], ["data.reward: must be one of", "did you mean exact?"]),
    "name taken": (["--plugins", "lora.py"], ["method lora is defined twice"]),
}


@pytest.mark.fault(19, 20)
@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_a_bad_request_is_told_whole_and_starts_nothing(case, tmp_path, monkeypatch, capsys):
    arguments, texts = BAD_REQUESTS[case]
    (tmp_path / "broken.jsonl").write_text('{"instruction": "a", "output": "b"}\n{"instr')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "lora.py").write_text(BITFIT)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    said = told(capsys, *arguments)
    for text in texts:
        assert text in said
    assert sorted(tmp_path.rglob("*")) == before


def files(folder: Path) -> dict[Path, tuple]:
    """Every file and folder, with what changes when it is written, or used by the cache."""
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in [folder, *folder.rglob("*")]}


def test_a_plan_writes_nothing_anywhere(tmp_path):
    home, here = tmp_path / "home", tmp_path / "here"
    (home / "temporary").mkdir(parents=True)
    here.mkdir()
    (here / "bitfit.py").write_text(BITFIT)
    rows = [{"instruction": f"say {i}", "output": f"the number {i}"} for i in range(40)]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = {
        "HOME": home,
        "XDG_CACHE_HOME": home,
        "TMPDIR": home / "temporary",
        "TUNEOFF_CACHE": home / "rows",
    }
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"  # Python's own
    environment.pop("HF_HOME", None)
    asked = ["--methods", "bitfit", "lora", "--plugins", "bitfit.py", "--model", ROOT / "demo/model"]
    asked += ["--dataset", "rows.jsonl", "--set", "data.train=9", "data.validation=2", "data.test=4"]
    before = files(tmp_path)
    run = bench("plan", *asked, cwd=here, env=environment)
    assert run.returncode == 0 and "runs to do, 0 cached" in run.stdout, run.stderr
    changed = {path for path, state in files(tmp_path).items() if before.get(path) != state}
    assert changed <= {home / "temporary"}, "what its plugin's trial writes there is gone again"


def test_all_errors_are_told_at_once(tmp_path):
    run = bench("--methods", "qlor", "--set", "hp.epochs=-1", "--source", "x=y", cwd=tmp_path)
    assert run.returncode == BAD_REQUEST and run.stderr.count("error: ") == 3
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(("script", "name"), [("run_bench.py", "run_bench.py"), ("tuneoff", "tuneoff")])
def test_it_calls_itself_as_it_was_called(script, name, tmp_path):
    file = tmp_path / script
    file.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + (ROOT / "run_bench.py").read_text())
    (tmp_path / "harness").mkdir()
    (tmp_path / "random.py").write_text("raise SystemExit('random.py of the current folder')")
    for arguments, said in ((["plan", "--help"], f"usage: {name} plan"), (["--version"], "tuneoff 0")):
        command = [sys.executable, "-P", str(file), *arguments]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert run.stdout.startswith(said)


def test_the_module_runs_where_others_of_its_imports_names_lie(tmp_path):
    for name in ("harness", "methods", "torch"):
        (tmp_path / name).mkdir()
    (tmp_path / "random.py").write_text("raise SystemExit('random.py of the current folder')")
    command = [sys.executable, "-m", "harness.cli", "list", "methods"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert run.returncode == 0 and "lora" in run.stdout, run.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from harness.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.endswith("[]\n")


def test_lists_name_what_there_is(tmp_path):
    run = bench("list", "--json", cwd=tmp_path)
    found = json.loads(run.stdout)
    assert {"base", "full", "lora", "qlora", "dora", "galore"} <= set(found["methods"])
    assert {"demo", "alpaca", "tulu", "ultrachat", "mixture"} <= set(found["datasets"])
    assert "demo" in found["presets"] and found["results"] == {}
    assert not os.listdir(tmp_path)


def test_doctor_says_what_is_there():
    run = bench("doctor", "--json", cwd=ROOT)
    assert any("torch" in finding["what"] for finding in json.loads(run.stdout))
