"""The data pipeline: from the name of a source to batches on the host."""
