"""What ends a run or a bench: faults, interrupts, kills; and a method from an installed package."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_cli import BITFIT, ROOT, SMALL, bench, records

FAULTS = {  # a method's own code, as it breaks -> the status that must stand in its record
    "no_memory": ("import torch; raise torch.OutOfMemoryError('CUDA out of memory')", "oom_gpu"),
    "no_host_memory": ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "oom_host"),
    "needs_more": (
        "from harness.method import Unsupported; raise Unsupported('needs a better card')",
        "unsupported",
    ),
    "broken": ("raise KeyError('oops')", "failed"),
    "leaves": ("import os; os._exit(7)", "failed"),
}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """One bench of methods that each break in their own way, then the next goes on."""
    folder = tmp_path_factory.mktemp("faulty")
    for name, (code, _) in FAULTS.items():
        (folder / f"{name}.py").write_text(BITFIT.replace("model.requires_grad_(False)", code))
    plugins = [f"{name}.py" for name in FAULTS]
    run = bench("--methods", *FAULTS, "--seeds", 0, "--plugins", *plugins, *SMALL, "--json", cwd=folder)
    return folder, run


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_a_status_in_the_record_and_a_row_in_the_report(name, faulty):
    folder, run = faulty
    assert run.returncode == 1, run.stderr
    outcomes = {r["run"].partition("-")[0]: r["status"] for r in json.loads(run.stdout)["runs"]}
    assert outcomes[name] == FAULTS[name][1]
    record = records(folder)[f"{name}-0"]
    assert record["error"] and record["scores"] == {}
    assert all(phase["peak_allocated"] != 0 for phase in record["phases"].values())
    assert name in (folder / "reports/report.md").read_text().replace("\\_", "_")


def test_an_interrupt_stops_the_child_and_keeps_a_record(tmp_path):
    (tmp_path / "slow.py").write_text(
        BITFIT.replace("model.requires_grad_(False)", "import time; time.sleep(60)")
    )
    arguments = ["--methods", "slow", "--seeds", "0", "--plugins", "slow.py", *SMALL]
    process = subprocess.Popen([sys.executable, str(ROOT / "run_bench.py"), *arguments], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip
    until(lambda: '"attach"' in "".join(p.read_text() for p in tmp_path.glob("results/.slow*/events.jsonl")))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command continues" in errors and "Traceback" not in errors
    assert records(tmp_path)["slow-0"]["status"] == "interrupted"
    assert records(tmp_path)["base-0"]["status"] == "ok"


def test_no_child_outlives_a_killed_bench_and_two_benches_do_not_mix(tmp_path):
    pid = 'open("pid", "w").write(str(__import__("os").getpid())); import time; time.sleep(60)'
    (tmp_path / "slow.py").write_text(BITFIT.replace("model.requires_grad_(False)", pid))
    arguments = ["--methods", "slow", "--seeds", "0", "--plugins", "slow.py", *SMALL]
    process = subprocess.Popen([sys.executable, str(ROOT / "run_bench.py"), *arguments], cwd=tmp_path,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    second = bench(*arguments, cwd=tmp_path)
    assert second.returncode == 2 and f"process {process.pid}" in second.stderr
    process.kill()
    process.wait()
    child = int((tmp_path / "pid").read_text())
    until(
        lambda: not Path(f"/proc/{child}").exists() or "zombie" in Path(f"/proc/{child}/status").read_text()
    )


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_an_installed_package_adds_a_method_by_an_entry_point(tmp_path):
    site = tmp_path / "site"
    (site / "stranger-1.dist-info").mkdir(parents=True)
    (site / "stranger-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1\n")
    (site / "stranger-1.dist-info/entry_points.txt").write_text("[tuneoff.methods]\nstrange = stranger\n")
    (site / "stranger.py").write_text(BITFIT)
    env = {**os.environ, "PYTHONPATH": str(site)}
    arguments = ["--methods", "strange", "--seeds", 0, *SMALL]
    listed = json.loads(bench("list", "methods", "--json", cwd=tmp_path, env=env).stdout)
    assert "strange" in listed["methods"]
    run = bench(*arguments, cwd=tmp_path, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    assert records(tmp_path)["strange-0"]["sizes"]["trainable"] > 0
