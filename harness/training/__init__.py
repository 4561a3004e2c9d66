"""The training path: one loop, one LM head, one decoder and one evaluation for every method."""

from harness.training.ensemble import Ensemble, outputs_of
from harness.training.evaluation import likelihoods
from harness.training.loop import Loop, prepare_model
from harness.training.model import load_base, stop_tokens
from harness.training.reading import Reading
from harness.training.run import Run
from harness.training.stages import execute, read_data, seed_everything
from harness.training.weights import loaded_types, master_weights, one_arithmetic, put_back

__all__ = [
    "Ensemble", "Loop", "Reading", "Run", "execute", "likelihoods", "load_base", "loaded_types",
    "master_weights", "one_arithmetic", "outputs_of", "prepare_model", "put_back", "read_data",
    "seed_everything", "stop_tokens",
]  # fmt: skip
