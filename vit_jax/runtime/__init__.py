"""Cluster discovery, preemption, watchdog, crash log, run lock and small files."""
