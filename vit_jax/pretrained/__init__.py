"""Parameters that somebody trained before, read and fitted to the model at hand."""
