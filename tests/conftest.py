import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would download fails at once
os.environ["TUNEOFF_CACHE"] = tempfile.mkdtemp(prefix="tuneoff-tests-")  # never the user's own
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # of the runs that tests start: two at a time have a core each
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the oracles are fp32 on the CPU

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give, and sums keep their order
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")

SLOW = {  # whole files and single tests: whole runs, trainings, mutated inputs
    "test_bench", "test_cli", "test_contract", "test_demo", "test_fuzz_records",
    "test_fuzz_requests", "test_fuzz_rows", "test_ggpo", "test_lisa", "test_loop", "test_lora_family",
    "test_methods", "test_objectives", "test_optimizers", "test_peft", "test_qlora_galore", "test_reft",
    "test_requests", "test_run", "test_smt", "test_tensors",
    "test_a_run_without_the_untouched_models_answers_is_run_again_once_they_are_there",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        if {item.path.stem, item.originalname} & SLOW:
            item.add_marker(pytest.mark.slow)
