"""The training path: one loop, one LM head, one decoder and one evaluation for every method."""

from harness.training.stages import execute as execute
