"""The notebook, executed cell by cell on the demo: a session that begins again where another was cut off."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from harness import report
from harness.bench import STOPPING
from harness.cli import main

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebook/tuneoff.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]


def test_it_holds_no_outputs_and_nothing_of_a_machine():
    assert json.loads(NOTEBOOK.read_text("utf-8"))["nbformat"] == 4
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    for cell in CELLS:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)
        text = "".join(cell["source"])
        assert not re.search(r"/(tmp|home|root|Users)/", text) and len(text.splitlines()) < 40
        assert cell["cell_type"] == "code" or len(text) < 700, "short"


@pytest.fixture
def session(tmp_path, monkeypatch):
    """-> what runs all cells with some parameters changed, its commands in this process, and gives what was
    displayed."""
    shown: list[str] = []
    IPython = ModuleType("IPython.display")
    IPython.HTML, IPython.display = str, shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", IPython)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuneoff").symlink_to(ROOT)  # as if it had been cloned

    def here(_, script, *arguments):
        assert script.resolve() == ROOT / "run_bench.py"
        assert main([str(argument) for argument in arguments]) == 0

    def go(**parameters):
        names: dict = {}
        for cell in CELLS:
            if cell["cell_type"] == "code":
                exec(compile(source(cell), cell["id"], "exec"), names)
            if cell["id"] == "parameters":
                assert parameters.keys() <= names.keys()
                names |= parameters
            if cell["id"] == "install":
                names["run"] = here
        return shown

    handlers = {number: signal.getsignal(number) for number in STOPPING}
    yield go
    for number, handler in handlers.items():
        signal.signal(number, handler)


def source(cell: dict) -> str:
    return "".join(cell["source"])


def cell(name: str) -> str:
    return next(source(cell) for cell in CELLS if cell["id"] == name)


def test_what_had_ended_is_not_run_again_and_the_report_is_shown(session, tmp_path, capsys, monkeypatch):
    for run in (ROOT / "results/reference/demo").glob("base-*"):
        shutil.copytree(run, tmp_path / "kept/results" / run.name)
    monkeypatch.setattr(report, "typeset_all", lambda both, _: [b"%PDF" for _ in both])
    shown = session(PRESET="demo", ARGUMENTS=["--methods", "base"], INSTALL=False, FOLDER="kept")
    told = capsys.readouterr().out
    assert "ok   torch" in told, "the doctor"
    assert "0 runs to do, 1 cached" in told and "1 of 1 cached" in told and "started" not in told
    assert shown[0].startswith("<iframe") and "&lt;h1" in shown[0] and "<h1" not in shown[0]
    assert (tmp_path / "kept/reports/report.pdf").is_file()


def test_on_colab_results_lie_in_the_drive(tmp_path, monkeypatch):
    colab, mounted = ModuleType("google.colab"), []
    colab.drive = SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    names = {"FOLDER": "runs"}
    exec(cell("folder").replace("/content", str(tmp_path)), names)
    assert mounted == [f"{tmp_path}/drive"] and names["home"] == tmp_path / "drive/MyDrive/runs"
    assert names["home"].is_dir()


def test_without_a_copy_or_an_address_it_says_what_is_missing(session, tmp_path):
    (tmp_path / "tuneoff").unlink()
    with pytest.raises(AssertionError, match="SOURCE above is empty"):
        session(INSTALL=False)


def test_the_stop_button_ends_a_command_and_shows_what_it_still_says(tmp_path):
    """The kernel is interrupted, its command is asked to end, and all that it says is waited for."""
    code = (
        "import time\ntry: print('begun', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt: time.sleep(0.3); print('its report'); raise SystemExit(130)"
    )
    kernel = (
        "import os, signal\nfrom pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored below a shell's &
        f"os.chdir({str(ROOT)!r})\n"
        f"SOURCE, INSTALL = '', False\n{cell('install')}\n"
        f"print('status', run(sys.executable, '-c', {code!r}), flush=True)"
    )
    with subprocess.Popen([sys.executable, "-u", "-c", kernel], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "its report\nstatus 130\n"
