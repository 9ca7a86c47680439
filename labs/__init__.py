"""Studies of papers far from post-training, as plain torch experiments with a claim."""
