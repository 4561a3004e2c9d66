"""Base: the untouched model, the "before" of every method.

    W' = W

No training at all: the same test rows, decoder and scores as every other row.

Performance: whatever pre-training and earlier tuning gave the model.
Efficiency: costs nothing to train.
Generalisation: the reference that a fine-tuned model may gain on, or fall behind.
"""

from harness.method import Method


class Base(Method):
    trains = False
