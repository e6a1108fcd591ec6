"""Decoding by contrasting logits."""
