"""What turns images into logits."""
