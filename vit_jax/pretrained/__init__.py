"""Load, adapt and export pre-trained models."""
