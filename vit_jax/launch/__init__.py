"""Launching on TPU pods and on several local processes.

Backends, scripts, the babysitter and `doctor`.
"""
