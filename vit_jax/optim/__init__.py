"""Optimizers, learning-rate schedules, losses and the guard against loss spikes."""
