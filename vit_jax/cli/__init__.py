"""The commands of `python -m vit_jax`, one in each file.

`add` defines the arguments of a command. jax is imported only after they are parsed.
"""
