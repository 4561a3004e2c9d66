"""What a request may run into besides a slip: a stranger's code, odd paths, a silent hub, broken packages.

Each is told in a line that names what is wrong; none is a traceback, an endless wait, or another plan.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest

from harness import cli, doctor, method, packages, trial
from harness.cli.arguments import parser
from harness.cli.commands import command_line
from harness.data import cache
from harness.errors import BadRequest, Problems, unwritable
from harness.plan import Request, find_dataset, find_plugins, find_sources, load_preset, plan
from harness.plan.model import find_model
from harness.shape import misfits

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BITFIT = next(code.split("```")[0] for code in README.split("```python\n") if "class BitFit" in code)
AXIS = '    axis = "parameterisation"\n'
LONG = "a" * 5000


def told(capsys, *arguments) -> str:
    """What a bad request is told, which must not be anything else."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as ended:  # argparse's own
        status = ended.code
    out, said = capsys.readouterr()
    assert status == cli.BAD_REQUEST and not out, out
    assert "Traceback" not in said
    return said


def declared(line: str) -> str:
    return BITFIT.replace(AXIS, AXIS + f"    {line}\n")


# A stranger's class


WRONG = {  # its source -> what is told of it
    "name in overrides": (declared('overrides = {"epoch": (1.0, "why")}'), "did you mean epochs?"),
    "overrides without a reason": (declared('overrides = {"epochs": 1.0}'), 'must be (value, "reason")'),
    "value in overrides": (declared('overrides = {"epochs": (-1.0, "why")}'), "must be at least 0, not -1.0"),
    "overrides as a list": (declared('overrides = ["learning_rate"]'), "overrides: must be a table"),
    "limit": (declared('cannot = {"mergin": "x"}'), "did you mean merging?"),
    "limits as a tuple": (declared('cannot = ("merging",)'), "cannot: must be a table"),
    "limit without a reason": (declared('cannot = {"packing": " "}'), "cannot.packing: has no reason"),
    "axis": (BITFIT.replace('"parameterisation"', '"parametrisation"'), "did you mean parameterisation?"),
    "aim": (declared('aim = "bleu"'), "did you mean bleu4?"),
    "objective": (declared("objective = 3"), "objective: must be a text"),
    "mean_over": (declared('mean_over = "token"'), "did you mean tokens?"),
    "needs as a text": (declared('needs = "scipy"'), "needs: must be a list, not 'scipy'"),
    "hybrid": (declared('hybrid = ("lora", "galor")'), "did you mean galore?"),
    "unknown baseline": (declared('baseline = "bse"'), "did you mean base?"),
    "baseline that trains": (declared('baseline = "lora"'), "lora trains; it must be an untouched row"),
    "its own baseline": (declared('baseline = "stranger"'), "stranger trains; it must be an untouched row"),
    "option without a default": (BITFIT.replace("bool = False", "bool"), "option final_only: has no default"),
    "type of an option": (BITFIT.replace("bool = False", "Bool = False"), "name 'Bool' is not defined"),
    "default of an option": (BITFIT.replace("bool = False", 'int = "8"'), "must be a whole number, not '8'"),
    "default that no record holds": (BITFIT.replace("bool = False", "object = set"), "that JSON holds"),
    "option that is a declaration": (BITFIT.replace("final_only: bool = False", 'aim: str = "bleu4"'),
                                     "aim is no option"),
    "arguments of a hook": (BITFIT.replace("(self, model, run)", "(self, model)"),
                            "attach is called as attach(self, model, run)"),
    "choice in overrides": (declared('overrides = {"schedule": ("cosin", "why")}'), "did you mean cosine?"),
    "overrides with an empty reason": (declared('overrides = {"epochs": (1.0, " ")}'), "(value, "),
    "limit whose reason is a number": (declared('cannot = {"packing": 1}'), "cannot.packing: must be a text"),
    "needs of a number": (declared("needs = (1,)"), "needs[0]: must be a text, not 1"),
    "hybrid as a text": (declared('hybrid = "lora"'), "hybrid: must be a list"),
    "axis as a list": (declared('axis = ["none"]').replace(AXIS, ""), "axis: must be one of none"),
    "aim that is no text": (declared("aim = 3"), "aim: must be one of"),
    "a truth value": (declared('starts_at_base = "no"'), "starts_at_base: must be true or false"),
    "title": (declared("title = None"), "title: must be a text"),
    "default out of its range": (
        BITFIT.replace("bool = False", "Natural = 0").replace("import Method", "import Method, Natural"),
        "the default of option final_only: must be at least 1, not 0"),
    "hook with one more": (declared("def merge(self, model, more): pass"), "merge is called as merge("),
    "hook that is a number": (declared("prepare = 3"), "prepare is called as prepare("),
    "hook that is none": (declared("load = None"), "load is called as load(self, load_base)"),
    "misspelt hook": (BITFIT.replace("def attach", "def atach"), "atach is no hook or declaration"),
    "misspelt declaration": (declared("overides = {}"), "did you mean overrides?"),
    "syntax": ("def x(:\n" + BITFIT, "SyntaxError"),
    "not Python": ("x = 1\0\n", "null bytes"),
    "missing import": ("import nothing_here\n" + BITFIT, "line 1): ModuleNotFoundError"),
    "no method": ("x = 1\n", "defines 0 subclasses of Method"),
    "error in __post_init__": (declared("def __post_init__(self):\n        1 / 0"), "ZeroDivisionError"),
    "arguments of __post_init__": (declared("def __post_init__(self, x): pass"), "__post_init__() missing"),
    "error in own": (declared("own = classmethod(lambda cls, hp: hp.nothing)"), "no attribute 'nothing'"),
}  # fmt: skip


@pytest.mark.fault(28)
@pytest.mark.parametrize("case", WRONG)
def test_what_a_class_declares_wrongly_is_named_with_its_file(case, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "tried", lambda *_: [])  # a process for each would take a second
    source, said = WRONG[case]
    (tmp_path / "stranger.py").write_text(source)
    with pytest.raises(BadRequest) as refused:
        plan(Request(methods=["stranger"], plugins=[str(tmp_path / "stranger.py")]))
    [line] = map(str, refused.value.problems)
    assert said in line and "stranger" in line
    assert "__post_init__" in case or "own" in case or str(tmp_path / "stranger.py") in line


def test_no_method_of_ours_is_wrong():
    sources = method.known_methods()
    for name in [*sources, "peft.vera", "peft.ia3"]:
        found = Problems()
        assert trial.examined(name, sources, found) and not found, found


IMPORTS = {  # what a file does when it is imported -> what is told
    "os._exit": ("import os\nos._exit(0)", "ended the process that imported it, with exit status 0"),
    "sys.exit": ("import sys\nsys.exit()", "SystemExit"),
    "crash": ("import ctypes\nctypes.string_at(0)", "signal SIGSEGV"),
    "question": ("input()", "EOFError"),
    "sleep": ("import subprocess, time\nsubprocess.Popen(['sleep', '99'])\ntime.sleep(99)", "still running"),
    "thread": ("import threading, time\nthreading.Thread(target=time.sleep, args=[99]).start()", "still"),
}  # fmt: skip


@pytest.mark.fault(42)
@pytest.mark.parametrize("case", IMPORTS)
def test_an_import_can_neither_end_nor_hang_a_plan(case, tmp_path, monkeypatch, capsys):
    code, said = IMPORTS[case]
    monkeypatch.setattr(trial, "SECONDS", 2 if "still" in said else 60)
    file = tmp_path / "stranger.py"
    file.write_text(code + "\n" + BITFIT)
    line = told(capsys, "plan", "--json", "--methods", "stranger", "--plugins", str(file))
    assert said in line and str(file) in line


@pytest.mark.fault(42)
def test_what_an_import_prints_spoils_no_json(tmp_path, capsys):
    file = tmp_path / "stranger.py"
    file.write_text("print('hello')\n" + declared("def __post_init__(self): print('there')"))
    arguments = ["--methods", "stranger", "--plugins", str(file), "--seeds", "0"]
    assert cli.main(["plan", "--json", *arguments]) == cli.OK
    assert [row["method"] for row in json.loads(capsys.readouterr().out)] == ["base", "stranger"]


STRAY = """
import os, sys
os.chdir("/")
os.system("echo by a shell")
sys.__stdout__.write("by the stream itself")
"""


def test_what_an_import_does_to_its_process_disturbs_no_plan(tmp_path):
    (tmp_path / "stranger.py").write_text(STRAY + BITFIT)
    (tmp_path / "other.py").write_text(BITFIT)
    command = [sys.executable, str(ROOT / "run_bench.py"), "plan", "--json", "--methods", "stranger", "other",
               "--plugins", "stranger.py", "other.py", "--seeds", "0"]  # fmt: skip
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == cli.OK, run.stderr
    assert [row["method"] for row in json.loads(run.stdout)] == ["base", "stranger", "other"]
    assert "by a shell" in run.stderr and "by the stream itself" in run.stderr


def test_one_bad_file_does_not_hide_the_others_of_a_list(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("def x(:")
    assert cli.main(["list", "methods", "--json", "--plugins", str(tmp_path / "broken.py")]) == cli.OK
    found = json.loads(capsys.readouterr().out)["methods"]
    assert "cannot be read" in found["broken"] and "LoRA" in found["lora"]


def test_a_variants_name_stays_in_the_results(tmp_path, monkeypatch):
    """Its family may make a class of any name; a folder is named after it."""
    monkeypatch.setattr(trial, "tried", lambda *_: [])
    file = tmp_path / "family.py"
    file.write_text(BITFIT + "\n    @classmethod\n    def variant(cls, name):\n        return cls\n")
    asked = Request(["family.one"], seeds=[0], plugins=[str(file)])
    assert plan(asked)[-1].method == "family.one"
    for name in ("family./../../ESCAPED/x", "family.a b", "family."):
        with pytest.raises(BadRequest, match="is no method's name"):
            plan(Request([name], seeds=[0], plugins=[str(file)]))


def test_a_strangers_dataset_is_shown_and_never_obeyed_by_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"instruction": f"sage é {i}", "output": f"{i}", "\x1b[2J": 1}) for i in range(20)]
    Path("rows.jsonl").write_text("\n".join(rows))
    Path("evil.toml").write_text('train = 4\nvalidation = 1\ntest = 2\n[part]\nname = "a\\u001b[31m"\n'
                                 'path = "rows.jsonl"\nformat = "instruction"\n')  # fmt: skip
    asked = ["plan", "--dataset", "evil.toml", "--model", str(ROOT / "demo/model"), "--methods", "lora"]
    assert cli.main(asked) == cli.OK, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.count("⟨U+001B⟩") == 3
    assert cli.main(["data", "evil.toml", "--model", str(ROOT / "demo/model"), "--json"]) == cli.OK
    out = capsys.readouterr().out
    assert out.isascii() and "sage é" in json.dumps(json.loads(out), ensure_ascii=False), "on any terminal"


# Arguments


CASES = {  # arguments -> what is told
    "a relative path": (["--model", "./does-not-exist"], "there is no folder does-not-exist"),
    "a path upwards": (["--model", "../x"], "there is no folder ../x"),
    "an absolute path": (["--model", "/no/such"], "there is no folder /no/such"),
    "a path of Windows": (["--model", "C:\\models\\x"], "there is no folder C:\\models\\x"),
    "a long path": (["--model", "a/b/c"], "there is no folder a/b/c"),
    "a path that returns": (["--model", "a/.."], "there is no folder a/.."),
    "the home folder": (["--model=~/no-such"], "there is no folder " + os.path.expanduser("~/no-such")),
    "a near name": (["--model", "./modle"], "did you mean model?"),
    "a near name of ours": (["--model", "demo/modle"], f"did you mean the folder {ROOT}/demo/model?"),
    "a file": (["--model", "file.txt"], "file.txt is a file, not a folder"),
    "a path through a file": (["--source", "alpaca=file.txt/x"], "there is no file or folder file.txt/x"),
    "a loop of links": (["--model", "loop"], "Too many levels of symbolic links"),
    "a pipe": (["--source", "alpaca=pipe.jsonl"], "is a device or pipe"),
    "rows from a pipe": (["--dataset", "pipe.jsonl"], "is a device or pipe"),
    "no drawn model": (["--model", "random:"], "its name is empty"),
    "an empty model": (["--model", ""], "no model"),
    "an empty dataset": (["--dataset", ""], "no dataset"),
    "an empty preset": (["--preset", ""], "unknown preset ''"),
    "an empty method": (["--methods", ""], "unknown method ''"),
    "empty results": (["--results", ""], "the name of a folder is empty"),
    "an empty setting": (["--set", ""], "write it as hp.NAME=VALUE"),
    "a long model": (["--model", LONG], "File name too long"),
    "a long dataset": (["--dataset", LONG], "unknown dataset"),
    "a long file of rows": (["--dataset", LONG + ".jsonl"], "File name too long"),
    "a long preset": (["--preset", LONG + ".toml"], "File name too long"),
    "a long source": (["--source", "alpaca=" + LONG], "File name too long"),
    "a long plugin": (["--plugins", LONG + ".py"], "File name too long"),
    "long results": (["--results", LONG], "File name too long"),
    "results in a file": (["--results", "file.txt/x"], "file.txt is a file, not a folder"),
    "results in a loop": (["--results", "loop"], "Too many levels of symbolic links"),
    "a plugin that is none": (["--plugins", "file.txt"], "file.txt is no .py file"),
    "a plugin's name": (["--plugins", "data.py"], "but not hp or data"),
    "nan": (["--methods", "lora", "--set", "lora.alpha=nan"], "lora.alpha: must be finite, not nan"),
    "infinity": (["--methods", "lora", "--set", "lora.alpha=inf"], "lora.alpha: must be finite, not inf"),
    "more than any float": (["--set", "hp.epochs=1" + "0" * 400], "hp.epochs: must be"),
    "more than 64 bits": (["--set", "hp.batch_size=9223372036854775808"], "must be below 2^63"),
    "digits without end": (["--set", "hp.batch_size=" + "9" * 5000], "must be a whole number"),
    "brackets without end": (["--set", "hp.epochs=" + "[" * 5000], "must be a number"),
    "a list": (["--set", "data.reward=[1]"], "data.reward: must be one of"),
    "a second line": (["--set", "data.train=5\nx=1"], "data.train: must be a whole number"),
    "two values": (["--set", "hp.epochs=1", "hp.epochs=2"], "has two values, 1 and 2"),
    "true and 1": (["--set", "hp.max_steps=1", "hp.max_steps=true"], "has two values"),
    "two places": (["--source", "alpaca=file.txt", "alpaca=model"], "has two places"),
    "a method twice": (["--methods", "lora", "lora"], "lora is named twice"),
    "a method in two spellings": (["--methods", "peft.vera", "peft.VERA"], "peft.vera is named twice"),
    "a value that argparse drops": (["--methods", "lora", "--methods=--"], "-- is no value"),
    "a folder that argparse drops": (["--results=--"], "-- is no value"),
    "a model twice": (["--model", "demo/model", "--model", "x"], "--model is given twice"),
    "a token by accident": (["--hf_token=hf_" + "Ab1" * 11], "arguments: --hf_token=hf_[hidden]"),
    "an escape": (["--\x1b[31m"], "arguments: --⟨U+001B⟩[31m"),
    "a seed of 65 bits": (["--seeds", str(2**64)], "must be below 2^63"),
    "a seed of 33 bits": (["--seeds", str(2**32)], "from 0 to 4294967295"),
    "a negative seed": (["--seeds", "-1"], "from 0 to 4294967295"),
    "bytes that are no text": (["--methods", "lora", "--set", "lora.targets=\udcff"], "is not UTF-8 text"),
    "a folder whose name is no text": (["--results", "\udcff"], "is not UTF-8 text"),
    "a folder whose name cannot be": (["--results", "a\0b"], "is not UTF-8 text"),
    "options of no method": (["--preset", "options.toml"], "did you mean lora?"),
    "a wrong item": (["--preset", "items.toml"], "methods[1]: must be a text, not 1"),
    "a preset of another kind": (["--preset", "latin.toml"], "is not TOML"),
    "a 13th month": (["--preset", "month.toml"], "is not TOML"),
    "a mixture of itself": (["--dataset", "itself.toml"], "it is in its own mixture"),
    "two parts of a name": (["--dataset", "twice.toml"], "two parts are named alpaca"),
    "a part without a name": (["--dataset", "nameless.toml"], "dataset nameless.toml: it has no name"),
    "no part": (["--dataset", "partless.toml"], "it has no part"),
    "a field of another format": (["--dataset", "field.toml"], "unknown field of format question 'output'"),
    "a spec above the specs": (["--dataset", "../presets/demo"], "unknown dataset '../presets/demo'"),
    "a preset above the presets": (["--preset", "../datasets_spec/demo"], "unknown preset"),
}  # fmt: skip
FILES = {
    "options.toml": 'model = "demo/model"\ndataset = "demo"\nmethods = ["lora"]\n[options.lroa]\nrank = 2',
    "items.toml": 'methods = ["lora", 1]',
    "month.toml": "title = 2020-13-01",
    "itself.toml": 'mixture = ["itself.toml"]',
    "twice.toml": 'mixture = ["alpaca", "alpaca"]',
    "nameless.toml": '[part]\npath = "x.jsonl"',
    "partless.toml": 'title = "x"',
    "field.toml": '[part]\nname = "x"\nformat = "question"\nfields = {output = "a"}',
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_told(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("")
    Path("data.py").write_text(BITFIT)
    Path("latin.toml").write_bytes(b'title = "\xe9"')
    for name, text in FILES.items():
        Path(name).write_text(text)
    Path("model").mkdir()
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe.jsonl")
    arguments, said = CASES[case]
    found = told(capsys, "plan", *arguments)
    assert said in found
    assert LONG not in found, "a name of 5,000 letters is shortened"


def test_methods_and_seeds_may_be_named_in_several_places():
    typed = ["--methods", "lora", "--seeds", "1", "--methods", "full", "--seeds", "2"]
    options = parser("plan").parse_args(typed)
    assert options.methods == ["lora", "full"] and options.seeds == [1, 2]


@pytest.mark.parametrize("command", [["list", "results"], ["report"]])
def test_results_that_are_a_file_are_named(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert "file is a file, not a folder" in told(capsys, *command, "--results", "file")


def as_a_stranger(ask):
    """What a function gives in a process of a user who has no name, no home and no right to anything."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        if not os.geteuid():
            os.setuid(54321)
        os.environ.pop("HOME", None)
        try:
            answer = ask()
        except BaseException as error:
            answer = repr(error)
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(os.read(reading, 2**16))


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's rights")
def test_a_user_without_a_home_can_plan(monkeypatch):
    monkeypatch.delenv("TUNEOFF_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert as_a_stranger(lambda: [str(cache.folder()), command_line(["/a/b"])]) == [
        str(Path(tempfile.gettempdir(), ".cache", "tuneoff")), "run_bench.py /a/b"
    ]  # fmt: skip


def test_a_command_stays_as_typed_where_the_home_folder_is_the_root(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    assert command_line(["plan", "--model", "/a/b"]) == "run_bench.py plan --model /a/b"
    monkeypatch.setenv("HOME", "/a")
    assert command_line(["plan", "--model", "/a/b"]) == "run_bench.py plan --model ~/b"


@pytest.mark.fault(13)
def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "rows.jsonl").write_text('{"text": "a"}')
    (locked / "config.json").write_text("{}")
    locked.chmod(0)

    def ask() -> list[str]:
        said = Problems()
        find_model("./locked", said)
        find_sources([f"alpaca={path}" for path in ("locked", "locked/rows.jsonl")], "", None, said)
        load_preset("locked/x.toml", said)
        find_dataset("locked/rows.jsonl", {}, said)
        find_plugins(["locked/x.py"], said)
        said.add("--results", unwritable(Path("locked/results")))
        return list(map(str, said))

    said = as_a_stranger(ask)
    locked.chmod(0o755)
    assert len(said) == 7
    assert all(re.search("Permission denied|no right to read|cannot write", line) for line in said), said


@pytest.mark.fault(13)
@pytest.mark.skipif(os.geteuid() != 0, reason="others lack the rights, which is told as well")
@pytest.mark.parametrize("folder", ["/proc/x", "/proc", "/sys/x"])
def test_a_folder_that_takes_no_file_is_named_before_anything_is_done(folder, capsys):
    for command in (["--methods", "lora", "--results"], ["report", "--reports"], ["plan", "--reports"]):
        assert cli.main([*command, folder]) == cli.BAD_REQUEST
        said = capsys.readouterr().err
        assert f"{command[-1]}: cannot write in /" in said and "choose another folder" in said
        assert "Errno" not in said


def test_what_the_system_refuses_is_told_with_its_path_and_without_its_number(monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "/results/x")

    monkeypatch.setitem(cli.COMMANDS, "doctor", full)
    assert cli.main(["doctor"]) == cli.BAD_REQUEST
    assert capsys.readouterr().err == "error: /results/x: No space left on device\n"


def test_a_folder_that_is_gone_is_told(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    command = [sys.executable, "-c", code, str(ROOT / "run_bench.py"), "plan"]
    run = subprocess.run(command, cwd=gone, capture_output=True, text=True)
    assert run.returncode == cli.BAD_REQUEST and "Traceback" not in run.stderr
    assert run.stderr.startswith("error: ") and "No such file or directory" in run.stderr


@pytest.mark.parametrize(("value", "kind", "good"), [
    (1, float, True), (True, float, False), (float("nan"), float, False), (10**400, float, False),
    (1.0, int, False), (True, int, False), (2**63 - 1, int, True), (2**63, int, False), (0, bool, False),
    ("ü", str, True), (["a"], list[str], True),
    (["a", 1], list[str], False), ({"a": {"b": 1}}, dict[str, dict], True),
    ({"a": 1}, dict[str, dict], False), ({"a": [float("nan")]}, dict, False),
    (None, int | None, True), (1, int | None, True), ("1", int | None, False),
    ("a", Literal["a", "b"], True), (1, Literal[True], False), (None, Any, True), ({1}, Any, False),
    ((1, 2), Any, True), ([{"a": object()}], Any, False),
])  # fmt: skip
def test_a_value_is_of_its_kind_or_not(value, kind, good):
    assert (not list(misfits(value, kind))) == good


# The hub


@pytest.mark.parametrize("arguments", [["--model", "a/b", "--dataset", "demo"], ["--dataset", "alpaca"]])
def test_a_silent_hub_does_not_hold_a_plan(arguments, tmp_path):
    """It takes the connection and says nothing: its client alone waited for more than 400 s."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); from harness import cli\n"
            "from harness.plan import hub; hub.SECONDS = 2; raise SystemExit(cli.main(sys.argv[1:]))"
        )
        environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}",
                       "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}  # fmt: skip
        command = [sys.executable, "-c", code, "plan", "--methods", "lora", *arguments]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == cli.BAD_REQUEST and "Traceback" not in run.stderr
    assert "the hub cannot be reached (it was silent for 2 s)" in run.stderr


# The doctor


def test_the_doctor_examines_a_broken_installation(monkeypatch):
    for name in ("packaging", "packaging.version", "huggingface_hub", "torch"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it then fails as if it were missing
    found = {finding["what"]: finding for finding in doctor.examine()}
    wrong = " ".join(what for what, finding in found.items() if finding["state"] == "wrong")
    assert "torch cannot be imported" in wrong and "huggingface_hub" in wrong
    assert any("disk" in what for what in found), "the other probes are made"


def test_the_floors_are_pyprojects_in_a_clone_and_the_metadatas_where_it_is_installed(monkeypatch, tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["4bit"]
    assert packages.floors() == dict(line.split(">=") for line in needed)
    said = ["torch>=2.11", 'bitsandbytes>=0.50; extra == "4bit"', 'trl>=1.16; extra == "oracles"']
    monkeypatch.setattr(packages, "requires", lambda name: said)
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    for other in (None, "[project]\nname = 'another'\ndependencies = ['torch>=9']\n", "[tool.ruff]\n", "["):
        if other:
            (tmp_path / "pyproject.toml").write_text(other)
        assert packages.floors() == {"torch": "2.11", "bitsandbytes": "0.50"}, other


def test_the_pins_of_requirements_are_no_older_than_the_floors():
    pins = dict(
        line.split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line
    )
    assert packages.floors().keys() <= pins.keys()
    assert not [name for name, floor in packages.floors().items() if packages.older(pins[name], floor)]


@pytest.mark.parametrize(("found", "floor", "older"), [
    ("2.9.1", "2.11", True), ("2.11.0+cu130", "2.11", False), ("26.0.1", "16", False),
    ("5.17.0rc1", "5.17", False), ("0.1.1", "0.1.2", True), ("3", "3.1", True), ("2.4.6", "2", False),
])  # fmt: skip
def test_versions_are_compared_by_number(found, floor, older):
    assert packages.older(found, floor) == older
