"""Full, 8-bit AdamW: full fine-tuning of every parameter with the optimizer's moments in 8 bits.

    W' = W - lr * (m / (sqrt(v) + eps) + wd * W)        m, v: 8-bit codes, one scale for 256 values

Dettmers et al. 2021, 8-bit Optimizers via Block-wise Quantization, arXiv:2110.02861.

Performance: that of full fine-tuning with 32-bit AdamW in the authors' comparisons.
Efficiency: 2.03 bytes of moments a parameter in place of 8; weights and gradients stay in fp32, so 10 bytes
a parameter in place of 16.
Generalisation: as full fine-tuning's: fits the most and forgets the most.
"""

from unittest.mock import patch

from harness.method import Method, adam


class Full8bit(Method):
    """The paper keeps the embeddings' moments in 32 bits; here they are in 8 as all others, as the largest
    part of a small model is its embeddings. bitsandbytes leaves tensors below 4096 values in 32 bits."""

    axis = "optimizer"
    needs = ("bitsandbytes",)
    cannot = {"sharding": "bitsandbytes' optimizer takes whole tensors (0.50)"}

    def optimizer(self, model, run):
        from bitsandbytes.optim import AdamW8bit, optimizer

        class Queued(AdamW8bit):
            def step(self, closure=None):
                # It would wait for the card after each weight, for moments that are paged, as these are not.
                with patch.object(optimizer, "sync_gpu", lambda weight: None, create=True):
                    return super().step(closure)

        return Queued(self.parameter_groups(model, run), **adam(run.hp))
