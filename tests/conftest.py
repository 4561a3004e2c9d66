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

import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors: threads cost more than they give, and sums keep their order
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.load_profile("tests")
