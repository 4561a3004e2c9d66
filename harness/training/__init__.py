"""The training path: the one loop, the one LM head, the one decoder, the one evaluation."""
