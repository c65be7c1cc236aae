"""Models that map images to logits."""
