"""The models that runs leave: which one is meant, what lies in its folder, and how it gets to the hub."""

from harness.keeping.folder import CARD, beside, licence_of, listed, nameless, taken
from harness.keeping.hub import Place, place, upload
from harness.keeping.runs import MERGED, kept_run, kept_runs

__all__ = [
    "CARD", "MERGED", "Place", "beside", "kept_run", "kept_runs", "licence_of", "listed", "nameless", "place",
    "taken", "upload",
]  # fmt: skip
