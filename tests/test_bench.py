"""What ends a run or a bench: faults, interrupts, kills; and a method from an installed package."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import fabricate
import pytest
import tiny
from huggingface_hub import HfApi, constants
from safetensors import SafetensorError
from test_cli import BITFIT, ROOT, SMALL, bench, records

from harness import packages
from harness.bench import attempt as running
from harness.bench.loop import held, lock
from harness.cli import progress
from harness.errors import BadRequest
from harness.forks import children, in_a_copy
from harness.method import Method
from harness.nursery import Fresh, Nursery, environment
from harness.plain import redacted
from harness.plan import Plan, Request, plan
from harness.record import RunRecord, Sizes
from harness.spec import Hyperparams, RunSpec
from harness.store import Store
from harness.training import model
from harness.training.stages import save_model

FAULTS = {  # a method's own code, as it breaks -> the status that must stand in its record
    "no_memory": ("import torch; raise torch.OutOfMemoryError('CUDA out of memory')", "oom_gpu"),
    "killed": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "interrupted"),
    "needs_more": (
        "from harness.method import Unsupported; raise Unsupported('needs a better card')",
        "unsupported",
    ),
    "broken": ("raise KeyError('oops')", "failed"),
    "leaves": ("import os; os._exit(7)", "failed"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """One bench of methods that each break in their own way, then the next goes on: the last is sound, of an
    installed package. -> its folder, how it ended, and the environment with the package."""
    folder = tmp_path_factory.mktemp("faulty")
    for name, (code, _) in FAULTS.items():
        (folder / f"{name}.py").write_text(BITFIT.replace("model.requires_grad_(False)", code))
    about = folder / "site/stranger-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[tuneoff.methods]\nstrange = stranger\n")
    (folder / "site/stranger.py").write_text(BITFIT)
    env = {**os.environ, "PYTHONPATH": str(folder / "site")}
    plugins = ["--plugins", *(f"{name}.py" for name in FAULTS)]
    run = bench(
        "--methods", *FAULTS, "strange", "--seeds", 0, *plugins, *SMALL, "--json", cwd=folder, env=env
    )
    return folder, run, env


@pytest.mark.fault(4)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_a_status_in_the_record_and_a_row_in_the_report(name, faulty):
    folder, run, _ = faulty
    assert run.returncode == 1, run.stderr
    outcomes = {r["run"].partition("-")[0]: r["status"] for r in json.loads(run.stdout)["runs"]}
    assert outcomes[name] == FAULTS[name][1]
    record = records(folder)[f"{name}-0"]
    assert record["error"] and "outputs" not in record["hashes"]
    assert all(phase["peak_allocated"] != 0 for phase in record["phases"].values())
    assert name in (folder / "reports/report.md").read_text().replace("\\_", "_")


def test_an_installed_package_adds_a_method_by_an_entry_point(faulty, tmp_path):
    folder, _, env = faulty
    assert (
        "strange" in json.loads(bench("list", "methods", "--json", cwd=tmp_path, env=env).stdout)["methods"]
    )
    record = records(folder)["strange-0"]
    assert record["status"] == "ok" and record["sizes"]["trainable"] > 0


# One child each, which breaks before it has imported anything heavy


class Shown:
    """A progress that is as broken as a terminal that is gone."""

    def event(self, spec, values):
        raise OSError(5, "Input/output error")


SPEC = RunSpec("plugin", 0, "none", {}, Hyperparams())


def child(folder: Path, code: str, limit: float | None = None, begin=Fresh, signals=(), **more):
    """A run whose method does this when its child imports it. -> record, its folder."""
    lines = ["import os, signal, subprocess, sys, time", "if 'TUNEOFF_BENCH' in os.environ:"]
    lines += [f"    {line}" for line in [*code.splitlines(), "raise KeyError('the end')"]]
    (folder / "plugin.py").write_text("\n".join([BITFIT, *lines, ""]))
    spec = replace(SPEC, locations={"plugins": [str(folder / "plugin.py")]})
    store = Store(folder / "results")
    record = running.run(spec, running.Terms(store, "", Shown(), limit, **more), running.Slot(begin), signals)
    assert RunRecord.from_json((store.path(spec) / "record.json").read_text()) == record
    left = {file.name for file in store.path(spec).iterdir()}
    assert "spec.json" not in left and ("result.json" not in left or not record.ok)
    return record, store.path(spec)


EPITAPHS = {  # how a child ends -> its status, and what its error says
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "interrupted", "killed from outside"),
    "real-time signal": ("os.kill(os.getpid(), signal.SIGRTMIN + 1)", "failed", "ended with signal 35"),
    "signal": ("os.kill(os.getpid(), signal.SIGSEGV)", "failed", "ended with signal SIGSEGV"),
    "exit": ("print('bye'); os._exit(7)", "failed", "ended with exit status 7: bye"),
    "C++": ("print(\"of 'std::bad_alloc'\"); os.abort()", "oom_host", "hp.micro_batch_size"),
    "driver": ("raise RuntimeError('CUDA error: out of memory')", "oom_gpu", "hp.micro_batch_size"),
    "cuBLAS": ("raise RuntimeError('CUBLAS_STATUS_ALLOC_FAILED when')", "oom_gpu", "CUBLAS"),
    "runtime": ("raise RuntimeError('cudaErrorMemoryAllocation')", "oom_gpu", "hp.micro_batch_size"),
    "fork": ("raise OSError(12, 'Cannot allocate memory')", "oom_host", "hp.micro_batch_size"),
    "numpy": ("import numpy; numpy.ones(2**50)", "oom_host", "hp.micro_batch_size"),
    "half a result": (
        "open(sys.argv[1] + '/result.json', 'w').write('{\"schema\": 1, ')\nos._exit(0)",
        "failed",
        "it ended without a whole record",
    ),
    "another's result": (
        "open(sys.argv[1] + '/result.json', 'w').write('[]')\nos._exit(3)", "failed", "exit status 3"
    ),
    "no output": ("os.close(1); os.close(2); raise KeyError('silent')", "failed", "KeyError: 'silent'"),
    "wrong events": (
        "open(sys.argv[1] + '/events.jsonl', 'wb').write(b'{\"st\\n\\xff\\n[]\\n{\"step\": 1}\\n')\n"
        "raise KeyError('after')",
        "failed",
        "KeyError: 'after'",
    ),
    "pipes": (
        "for name in ('events.jsonl', 'result.json'): os.mkfifo(sys.argv[1] + '/' + name)\n"
        "time.sleep(1); os._exit(0)",
        "failed",
        "result.json is not a file",
    ),
    "a pipe for a log": (
        "log = sys.argv[1] + '/log.txt'; os.remove(log); os.mkfifo(log); os._exit(3)", "failed", "no output"
    ),
    "a thread stays": (
        "import threading; threading.Thread(target=time.sleep, args=[99]).start(); raise KeyError('main')",
        "failed",
        "KeyError: 'main'",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """One with nothing in it: what is heavy is a stub."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(stub(tmp_path_factory.mktemp("nursery"))))
        own = Nursery({})
    with own:
        assert not own.fresh or sys.platform != "linux"
        yield own


@pytest.fixture(params=["fresh", "copied"])
def begin(request):
    """Both ways to begin a run's process."""
    return Fresh if request.param == "fresh" else request.getfixturevalue("nursery").child


@pytest.mark.fault(5, 41)
@pytest.mark.parametrize("case", EPITAPHS)
def test_every_end_of_a_child_has_its_status(case, begin, tmp_path):
    code, status, error = EPITAPHS[case]
    record, _ = child(tmp_path, code, 60, begin)
    assert record.status == status and error in record.error, (record.status, record.error)


def test_the_kernel_says_whether_memory_ran_out(tmp_path, monkeypatch):
    counter = tmp_path / "memory.events"
    counter.write_text("oom 3\noom_kill 2\n")
    monkeypatch.setattr(running, "COUNTERS", (str(counter), str(tmp_path / "none")))
    killed = "os.kill(os.getpid(), signal.SIGKILL)"
    assert child(tmp_path, killed)[0].status == "interrupted"
    grows = f"open({str(counter)!r}, 'w').write('oom 4\\noom_kill 3\\n')\n"
    assert child(tmp_path, grows + killed)[0].status == "oom_host"


@pytest.mark.fault(43)
def test_what_a_run_has_started_ends_with_it(begin, tmp_path):
    own = [f"{seconds}.{os.getpid()}" for seconds in (7771, 7772)]
    left = "\n".join(
        f"subprocess.Popen(['sleep', '{seconds}'], start_new_session={apart})"
        for seconds, apart in zip(own, (False, True), strict=True)
    )
    started = time.monotonic()
    child(tmp_path, left, None, begin)
    assert time.monotonic() - started < 30, "their hold on the log does not hold up the bench"
    until(lambda: not running_commands() & {f"sleep {seconds}" for seconds in own}, 5)


def running_commands() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.add(path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip())
        except OSError:
            pass
    return found


STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"


@pytest.mark.fault(30)
@pytest.mark.parametrize("code", ["time.sleep(99)", STUBBORN, "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_run_beyond_its_time_limit_is_ended(code, begin, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "GRACE_SECONDS", 30 if code != STUBBORN else 1)
    started = time.monotonic()
    record, folder = child(tmp_path, code, 4, begin)
    assert record.status == "timeout" and "--time-limit" in record.error and "raise it" in record.error
    assert time.monotonic() - started < 20
    if code != STUBBORN:
        assert "KeyboardInterrupt" in (folder / "log.txt").read_text(), "it left its own record"


def test_a_log_is_bounded_and_keeps_both_ends(tmp_path):
    _, folder = child(tmp_path, "print('first'); print('x' * 3_000_000)\n"
                                "for i in range(50_000): print('y' * 80)\nprint('last')")  # fmt: skip
    text = (folder / "log.txt").read_text()
    assert text.startswith("first") and "last\n" in text and "bytes are left out" in text
    assert len(text) < 2.2 * running.LOG_BYTES


TOKEN = "hf_" + "Ab1" * 11


@pytest.mark.fault(24)
def test_no_secret_reaches_the_record_or_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("OF_MINE_API_KEY", "0123456789-unmarked")
    code = f"token = '{TOKEN}'; print(token, '0123456789-unmarked')\n"
    code += "raise OSError(f'401 for Bearer {token}, ' + 'x' * 470 + token)"
    record, folder = child(tmp_path, code)
    assert "401 for Bearer" in record.error
    for file in folder.iterdir():
        assert not re.search(b"Ab1Ab1|unmarked", file.read_bytes()), file


def test_a_key_that_is_printed_line_by_line_reaches_no_log(tmp_path):
    lines = ["-----BEGIN RSA PRIVATE KEY-----", *["Ab1Ab1" * 10] * 9, "-----END RSA PRIVATE KEY-----", "then"]
    _, folder = child(tmp_path, f"for line in {lines}: print(line, flush=True); time.sleep(0.02)")
    text = (folder / "log.txt").read_text()
    assert "Ab1" not in text.partition("Traceback")[0] and "-----END RSA PRIVATE KEY-----\nthen" in text


def test_a_silent_hub_ends_a_run():
    def asked() -> bytes:
        model.HUB_SECONDS, constants.HF_HUB_OFFLINE = 1, False
        model.limit_hub()
        try:
            HfApi(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}").model_info("some/model")
        except Exception as error:
            return type(error).__name__.encode()
        return b"answered"

    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert in_a_copy(asked, 60) == b"ReadTimeout"


LETTERS = "aB3dE5gH7jK9mN1pQ2sT"  # what the secret part of each of these is
SECRETS = (
    f"hf_{LETTERS}", f"api_org_{LETTERS}", f"sk-{LETTERS}", f"sk-proj-{LETTERS}", f"ghp_{LETTERS}",
    f"github_pat_{LETTERS}",
    f"AKIA{LETTERS.upper()}", f"Bearer {LETTERS}", f"{{'authorization': 'Basic {LETTERS}'}}",
    f"key={LETTERS}", f"https://x.org/f?token={LETTERS}&page=1", f"api_key: '{LETTERS}'",
    f"password={LETTERS}", f"https://user:{LETTERS}@x.org/f", f"https://{LETTERS}@x.org",
    f"eyJ{LETTERS}.{LETTERS}.{LETTERS}",
    f"-----BEGIN PRIVATE KEY----- {LETTERS} {LETTERS} -----END PRIVATE KEY-----",
)  # fmt: skip
HARMLESS = (
    "tokenizer.pad_token = tokenizer.eos_token", "eos_token_id=128001, pad_token='<pad>'", "KeyError: 'key'",
    "write it as hp.NAME=VALUE, data.NAME=VALUE or METHOD.OPTION=VALUE", "hf_hub_download_of_everything()",
    "ask me@x.org about https://x.org/@me", "size mismatch for key: model.layers.0.self_attn.q_proj",
)  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_what_looks_like_a_secret_is_hidden(text):
    for around in ("{}", "401 for {}: see above", "url='{}'"):
        assert LETTERS.upper() not in redacted(around.format(text)).upper()
        assert "[hidden]" in redacted(around.format(text))


@pytest.mark.parametrize(
    "name", ["OPENAI_API_KEY_2", "GITHUB_PAT", "HF_TOKEN_WRITE", "PGPASSWORD", "MY_PASSPHRASE"]
)
def test_what_an_environment_keeps_secret_is_hidden(name, monkeypatch):
    monkeypatch.setenv(name, "0123456789-unmarked")
    monkeypatch.setenv("TOKENIZERS_DIRECTORY", "/a/long/directory")
    assert (
        redacted("401 for 0123456789-unmarked in /a/long/directory")
        == "401 for [hidden] in /a/long/directory"
    )


def test_a_fault_of_our_own_is_told_without_secrets(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from harness import cli\n"
    code += f"cli.COMMANDS['doctor'] = lambda *_: int('{TOKEN}')\ncli.main(['doctor'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "hf_[hidden]" in done.stderr and "Traceback" in done.stderr
    assert "Ab1Ab1" not in done.stderr


@pytest.mark.parametrize("name", [".lock", ".holder"])
def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_stays(name, tmp_path):
    (tmp_path / "mine").write_text("of value")
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / name).symlink_to(tmp_path / "mine")
    with pytest.raises(BadRequest, match="is a link: remove it"), lock(tmp_path / "results"):
        pass
    assert (tmp_path / "mine").read_text() == "of value"


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text):
    assert redacted(text) == text


def test_a_child_is_told_what_the_user_has_set_and_nothing_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= int(environment()["OMP_NUM_THREADS"]) <= max(1, os.cpu_count() - 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment()["OMP_NUM_THREADS"] == "7"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "/elsewhere", str(tmp_path), "src"]))
    assert environment()["PYTHONPATH"].split(os.pathsep) == [
        str(ROOT), "/elsewhere", str(tmp_path / "src")
    ]  # fmt: skip


@pytest.mark.fault(44)
def test_a_child_imports_its_plugins_neighbours_but_nothing_in_place_of_a_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harness").mkdir()
    for name in ("random", "json", "accelerate", "methods", "harness/__init__"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the working directory')")
    (tmp_path / "neighbour.py").write_text("here = 'found beside it'")
    record, _ = child(
        tmp_path,
        "import random, json, methods, neighbour; from importlib.util import find_spec\n"
        "raise KeyError(neighbour.here, find_spec('accelerate').origin)",
    )
    assert "found beside it" in record.error and str(tmp_path) not in record.error, record.error


def test_a_screen_that_is_gone_costs_no_run():
    read, write = os.pipe()
    os.close(read)
    ended = fabricate.record("lora", status="failed", scores={})
    shown = progress.make(os.fdopen(write, "w"), Plan([ended.spec], [0]))
    shown.start(ended.spec, 1, 1)
    shown.end(ended, False)


def test_a_signal_is_not_lost_where_the_record_cannot_be_kept():
    with pytest.raises(KeyboardInterrupt) as ended, held():
        os.kill(os.getpid(), signal.SIGTERM)
        raise OSError("no space left")
    assert ended.value.args == (signal.SIGTERM,)


# Whole benches


@pytest.fixture
def stubs(tmp_path):
    """The environment that finds modules that are nothing in place of the heavy ones."""
    return {**os.environ, "PYTHONPATH": str(stub(tmp_path))}


def stub(folder: Path) -> Path:
    """Modules that are nothing but what a nursery asks of torch. -> where they lie."""
    for name in {*packages.IMPORTED} - {"jinja2"}:  # a report is written after a signal too
        path = folder / "stubs" / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.touch()
    (folder / "stubs/torch.py").write_text(
        "import sys; cuda = sys.modules['torch.cuda'] = sys.modules[__name__]; __path__ = []\n"
        "is_available = _is_in_bad_fork = lambda: False\n"
        "device_count = get_device_capability = None\nget_num_threads = lambda: 1\n"
    )
    return folder / "stubs"


def slow(folder: Path, code: str = "time.sleep(99)") -> list[str]:
    """A method that hangs in its child, and says so. -> the arguments of a bench of it alone."""
    said = f"open({str(folder / 'pid')!r}, 'w').write(str(os.getpid()))"
    (folder / "slow.py").write_text(
        BITFIT + f"\nimport os, signal, time\nif 'TUNEOFF_BENCH' in os.environ:\n    {said}; {code}\n"
    )
    return ["--methods", "slow", "--seeds", "0", "--plugins", "slow.py", "--format", "json", *SMALL]


def heeding(*ignored):
    """Before a bench starts: signals as a terminal leaves them, whatever started the tests, less these."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)


@pytest.mark.fault(3, 37)
@pytest.mark.parametrize(
    ("number", "ignored", "status", "everybody"),
    [
        (signal.SIGINT, (), 130, False),
        (signal.SIGTERM, (signal.SIGINT,), 143, False),  # as a script's & starts it
        (signal.SIGTERM, (), 143, True),  # as Slurm, systemd and Colab send it: to every process there is
        (signal.SIGHUP, (), 129, False),
    ],
)
def test_a_signal_stops_the_child_and_keeps_a_record(number, ignored, status, everybody, tmp_path, stubs):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_bench.py"), *slow(tmp_path)], cwd=tmp_path, env=stubs, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: heeding(*ignored),
    )  # fmt: skip
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    for other in ignored:
        process.send_signal(other)
    for pid in family(process.pid) if everybody else [process.pid]:
        os.kill(pid, number)
    told, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "not ok: slow-s0-" in told and "No technique has a result" in told
    assert '"status": "interrupted"' in (tmp_path / "reports/report.json").read_text(), "what there is"
    assert "the same command continues" in errors and "Traceback" not in errors
    assert records(tmp_path)["slow-0"]["status"] == "interrupted"
    assert "KeyboardInterrupt" in next(tmp_path.glob("results/slow-*/log.txt")).read_text(), "its own record"
    assert ended(int((tmp_path / "pid").read_text()))


def test_a_second_ctrl_c_does_not_wait_for_a_stubborn_child(tmp_path, stubs):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_bench.py"), *slow(tmp_path, STUBBORN)], cwd=tmp_path, env=stubs,
        preexec_fn=heeding,
    )  # fmt: skip
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(60) == 130
    assert time.monotonic() - started < running.GRACE_SECONDS / 2
    assert records(tmp_path)["slow-0"]["status"] == "interrupted"


@pytest.mark.fault(2, 11)
def test_no_child_outlives_a_killed_bench_and_two_benches_do_not_mix(tmp_path, stubs):
    arguments = slow(tmp_path)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run_bench.py"), *arguments], cwd=tmp_path, env=stubs
    )
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    second = bench(*arguments, cwd=tmp_path, env=stubs)
    assert second.returncode == 2 and f"process {process.pid}" in second.stderr
    process.kill()
    process.wait()
    until(lambda: ended(int((tmp_path / "pid").read_text())))
    with lock(tmp_path / "results"):
        pass


def family(process: int) -> list[int]:
    """A process and all that come from it, the youngest first."""
    return [pid for child in children(process) for pid in family(child)] + [process]


def ended(process: int) -> bool:
    try:
        return "zombie" in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True


@pytest.mark.fault(17)
def test_what_cannot_be_imported_is_told_before_the_first_run(tmp_path, stubs):
    (tmp_path / "stubs/sacrebleu/metrics.py").write_text("import numbers_that_are_absent")
    arguments = slow(tmp_path, "pass")
    text = (tmp_path / "slow.py").read_text()
    (tmp_path / "slow.py").write_text(text.replace("axis =", 'needs = ("no-such-package",)\n    axis ='))
    run = bench(*arguments, cwd=tmp_path, env=stubs)
    assert run.returncode == 2 and not records(tmp_path) and not (tmp_path / "pid").exists()
    assert "every run: sacrebleu.metrics" in run.stderr
    assert "pip install numbers_that_are_absent" in run.stderr
    assert "slow: no-such-package" in run.stderr and "or leave it out" in run.stderr
    (tmp_path / "stubs/torch.py").write_text("import os; os.abort()")
    run = bench(*arguments, cwd=tmp_path, env=stubs)
    assert run.returncode == 2 and "signal SIGABRT on import" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("error", [ValueError, MemoryError, SafetensorError, KeyboardInterrupt, SystemExit])
def test_what_was_measured_is_safe_before_the_model_is_saved(error, tmp_path):
    record = fabricate.record("lora", status="failed", phases={}, signatures={"bleu4": "x"})

    class Breaks(Method):
        def save(self, model, folder):
            self.found = RunRecord.from_json((tmp_path / "result.json").read_text())
            (folder / "half.safetensors").write_text("half")
            raise error(f"for {TOKEN}")

    breaks = Breaks()
    run = tiny.run(method=breaks)
    run.record = record
    save_model(None, run, tmp_path)
    assert breaks.found.ok and breaks.found.signatures == record.signatures
    assert "save" not in breaks.found.phases
    assert "was not saved" in breaks.found.warnings[-1]
    assert record.ok and record.warnings[-1].endswith(f"runs it again: {error.__name__}: for hf_[hidden]")
    assert not (tmp_path / "model").exists(), "half a model is none"


@pytest.mark.parametrize(("name", "warnings"), [("weights.safetensors", 0), ("weights.bin", 1)])
def test_a_save_that_wrote_no_weights_is_told(name, warnings, tmp_path):
    class Saves(Method):
        def save(self, model, folder):
            (folder / name).write_text("1234")

    run = tiny.run(method=Saves())
    save_model(None, run, tmp_path)
    told = [warning.endswith("runs it again: it wrote no weights") for warning in run.record.warnings]
    assert told == [True] * warnings
    assert run.record.sizes == Sizes(saved_bytes=None if warnings else 4)


def test_a_models_own_checkpoints_make_room_for_it(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "000000004"

    class Large(Method):
        def save(self, model, folder):
            (folder / "half.safetensors").write_text("half")
            if checkpoint.exists():
                raise OSError(28, "No space left on device")
            (folder / "weights.safetensors").write_text("1234")

    run = tiny.run(method=Large())
    checkpoint.mkdir(parents=True)
    save_model(None, run, tmp_path)
    assert run.record.warnings == [] and run.record.sizes.saved_bytes == 8
    assert not checkpoint.parent.exists()


def test_a_save_that_fails_otherwise_costs_no_checkpoint(tmp_path):
    class Wrong(Method):
        def save(self, model, folder):
            raise ValueError("it has no name")

    run = tiny.run(method=Wrong())
    (tmp_path / "checkpoints").mkdir()
    save_model(None, run, tmp_path)
    assert "it has no name" in run.record.warnings[-1] and (tmp_path / "checkpoints").is_dir()


def test_a_child_that_dies_while_saving_keeps_what_it_measured(begin, tmp_path):
    measured = RunRecord(SPEC, "ok", signatures={"bleu4": "x"}, warnings=["was not saved"])
    code = f"open(sys.argv[1] + '/result.json', 'w').write({measured.to_json()!r})\n"
    record, _ = child(tmp_path, code + "os.kill(os.getpid(), signal.SIGKILL)", None, begin)
    assert record.ok and record.signatures == measured.signatures
    assert record.warnings == ["was not saved: signal SIGKILL"]


FULL_DISK = """
import sys, time
from pathlib import Path

def fill():
    for name in ("fill", "events.jsonl"):
        with open(Path(sys.argv[1]) / name, "ab", buffering=0) as file:
            try:
                while file.write(b"\\n" * 512):
                    pass
            except OSError:
                pass

class Full(Method):
    def attach(self, model, run):
        fill()
        self.steps = 0
        return super().attach(model, run)

    def loss(self, model, batch, run):
        self.steps += 1
        if self.steps == 3:
            (Path(sys.argv[1]) / "fill").unlink()
        return super().loss(model, batch, run)

"""


@pytest.mark.fault(36)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_costs_the_model_alone(tmp_path):
    disk = tmp_path / "results"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]).returncode:
        pytest.skip("no small disk can be mounted")
    try:
        plugin = tmp_path / "full_disk.py"
        plugin.write_text("from harness.method import Method\n" + FULL_DISK)
        asked = Request(["full_disk"], seeds=[0], settings=SMALL[1:], plugins=[str(plugin)])
        record = running.run(plan(asked)[-1], running.Terms(Store(disk), "", Shown()))
        assert record.ok, record.error
        assert record.scores["bleu4"] and len(record.training) == 12
        said = [w for w in record.warnings if "was not saved, so" in w and "disk is full" in w]
        assert said, record.warnings
        assert record.provenance.waiting and record.sizes.saved_bytes is None
        folder = next(disk.glob("full_disk*"))
        assert len((folder / "outputs.jsonl").read_text().splitlines()) == 12
        assert not (folder / "model").exists(), "half a model is none"
    finally:
        subprocess.run(["umount", "-l", str(disk)])


@pytest.mark.fault(44)
@pytest.mark.parametrize("way", [["-m", "harness.cli"], [str(ROOT / "run_bench.py")]])
def test_a_plan_does_not_import_from_the_working_directory(way, tmp_path):
    for name in ("random", "accelerate", "methods"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the working directory')")
    run = subprocess.run(
        [sys.executable, *way, "plan", "--methods", "lora"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
