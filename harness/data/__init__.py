"""The data path: a dataset's spec becomes rows of token ids, and these become batches."""
