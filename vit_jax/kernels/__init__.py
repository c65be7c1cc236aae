"""Hand-written TPU kernels, each with an XLA twin that tests hold it to."""
