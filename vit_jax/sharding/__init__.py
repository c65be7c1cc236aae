"""The device mesh, FSDP collectives and per-row random numbers."""
