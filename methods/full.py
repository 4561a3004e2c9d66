"""Full: full fine-tuning of every parameter with AdamW.

    W' = W - lr * (m / (sqrt(v) + eps) + wd * W)

Loshchilov and Hutter 2019, Decoupled Weight Decay Regularization, arXiv:1711.05101.

Performance: every weight can move, so nothing limits what is learned but data and learning rate.
Efficiency: the most expensive in memory, 16 bytes a parameter: weight, gradient, two moments in fp32.
Generalisation: fits the most and forgets the most; small learning rates keep what the model knew.
"""

from harness.method import Method


class Full(Method):
    pass
