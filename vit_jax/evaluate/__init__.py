"""Evaluation of models: accuracy, probes, label sets, predictions and pseudo-labels."""
