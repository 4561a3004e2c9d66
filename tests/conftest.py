import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails at once
os.environ["TUNEOFF_CACHE"] = tempfile.mkdtemp(prefix="tuneoff-tests-")  # never the user's own
os.environ["TUNEOFF_FORECASTS"] = "0"  # a plan's: seconds each; tests/test_forecast.py asks for them
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of the runs that tests start: two at a time have a core each
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the oracles are fp32 on the CPU

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give, and sums keep their order
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")

SLOW = {  # whole files and single tests: whole runs, trainings, mutated inputs, what else takes seconds
    "test_bench", "test_check", "test_cli", "test_contract", "test_demo", "test_devices", "test_dora",
    "test_fuzz_records",
    "test_fuzz_requests", "test_fuzz_rows", "test_ggpo", "test_keeping", "test_kernels", "test_lisa",
    "test_loop", "test_lora_family", "test_methods", "test_new_metric", "test_objectives", "test_optimizers",
    "test_page",
    "test_peft", "test_qlora_galore", "test_reft", "test_requests", "test_run", "test_smt", "test_tensors",
    "test_tuning",
    "test_a_busy_neighbour_marks_a_training_and_only_a_training",
    "test_a_plugin_that_draws_from_everybodys_generator_disturbs_nobody",
    "test_a_run_without_progress_is_ended_and_says_where_it_was",
    "test_a_kill_at_any_call_loses_neither_the_earlier_run_nor_the_new_one",
    "test_a_run_without_the_untouched_models_answers_is_run_again_once_they_are_there",
    "test_any_row_is_a_conversation_or_refused",
    "test_from_the_first_grade_to_the_report",
    "test_many_near_duplicates_are_no_form",
    "test_no_verdict_disagrees_in_lead_tables_and_fronts",
    "test_rendered_twice_is_the_same_bytes_but_for_the_time",
    "test_they_are_listed_and_reported",
    "test_what_many_rows_share_does_not_make_them_near",
}  # fmt: skip

# Each file goes to a worker whole: those of half a minute and more first, so that none of them is the last.
LONGEST = ("test_cli", "test_bench", "test_contract", "test_loop", "test_objectives", "test_lora_family",
           "test_peft", "test_run", "test_check", "test_ggpo", "test_methods", "test_report")  # fmt: skip


@pytest.fixture
def undrawn(request, monkeypatch):
    """Plots take most of a report's time: where a test reads words alone, none is drawn."""
    from harness.report import plots

    nothing = {"png": b"", "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'}
    if not request.node.get_closest_marker("drawn"):
        for name in (
            "scores_by_cost",
            "scores_on_paper",
            "cost_alone",
            "memory_by_part",
            "by_learning_rate",
            "loss_curves",
        ):
            monkeypatch.setattr(plots, name, lambda *arguments: nothing)


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    for item in items:
        if {item.path.stem, item.originalname} & SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What imports and earlier files have made stays: no collection of garbage, and each phase of a run asks
    for one, goes through it again. Whoever thaws it makes all later files two to eight times slower."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip(f"none of {', '.join(names)} is here")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
