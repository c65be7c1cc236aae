"""Records of a run: step log, metrics.jsonl, TensorBoard, the progress line."""
