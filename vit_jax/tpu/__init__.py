"""TPU programs compiled without a TPU: memory, cycles, collectives, slice topologies."""
