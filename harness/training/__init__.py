"""The training path: one loop, one LM head, one decoder and one evaluation for every method."""

from harness.training import dry
from harness.training.attending import attention_maps
from harness.training.checkpoint import packed, resume, snapshot, unpacked
from harness.training.ensemble import Ensemble, outputs_of
from harness.training.evaluation import likelihoods
from harness.training.loop import Loop, prepare_model
from harness.training.merging import PROMPTS, Trial, merge
from harness.training.model import limit_hub, load_base, resolve_precision, stop_tokens
from harness.training.probing import probe, tried
from harness.training.reading import Reading
from harness.training.run import Run
from harness.training.stages import execute, read_data, seed_everything
from harness.training.tasks import Asked, Tasks, ask
from harness.training.weights import loaded_types, master_weights, one_arithmetic, put_back

__all__ = [
    "PROMPTS", "Asked", "Ensemble", "Loop", "Reading", "Run", "Tasks", "Trial", "ask", "attention_maps",
    "dry", "execute", "likelihoods", "limit_hub", "load_base", "loaded_types", "master_weights", "merge",
    "one_arithmetic", "outputs_of", "packed", "prepare_model", "probe", "put_back", "read_data",
    "resolve_precision", "resume", "seed_everything", "snapshot", "stop_tokens", "tried", "unpacked",
]  # fmt: skip
