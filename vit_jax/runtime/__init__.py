"""A process that trains: cluster, signals, watchdog, crash log, run lock, small files."""
