"""The data path: a dataset's spec becomes examples of token ids, and these become batches."""

from harness.data.batches import Batches, batches_of, collate, height, learned_tokens, order, pack
from harness.data.cache import folder as cache_folder
from harness.data.cache import splits_of, token_rows
from harness.data.formats import FORMATS, required
from harness.data.leaks import LEAKS, answered
from harness.data.shapes import Shapes
from harness.data.spec import dataset_names, load_spec, own_rows
from harness.data.splits import SPLITS, describe, rows_of_part
from harness.data.study import marked, pieces, study, tokens_of
from harness.data.template import COUNTED, OPENING, Example, Template, examples_hash

__all__ = [
    "COUNTED", "FORMATS", "LEAKS", "OPENING", "SPLITS", "Batches", "Example", "Shapes", "Template",
    "answered", "batches_of", "cache_folder", "collate", "dataset_names", "describe", "examples_hash",
    "height", "learned_tokens", "load_spec", "marked", "order", "own_rows", "pack", "pieces",
    "required", "rows_of_part", "splits_of", "study", "token_rows", "tokens_of",
]  # fmt: skip
