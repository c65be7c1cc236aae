"""Vision Transformers in JAX and Flax linen, after "An Image is Worth 16x16 Words" (arXiv 2010.11929)."""
