"""What `python -m vit_jax` can do, one command a file: `add` gives it its arguments. jax is imported once they are right."""
