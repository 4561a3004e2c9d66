"""The harness of Tuneoff: one loop, one clock, one evaluation for every fine-tuning method."""

from pathlib import Path

__version__ = "0.1.0"
ROOT = Path(__file__).resolve().parents[1]  # where methods/, datasets_spec/, presets/ and demo/ lie
