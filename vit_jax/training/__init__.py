"""What the training loop is built from."""
