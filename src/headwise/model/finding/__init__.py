"""What a model is made of, found by running it: sites, blocks, norms, kinds of tokens."""
