"""Hand-written TPU kernels, each tested against an XLA implementation."""
