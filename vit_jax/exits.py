"""How a process says what became of a run: its exit code, which the README's contract names and launchers go by."""

DONE = 0
BUG = 1  # An error with a traceback.
MISTAKE = 2  # One line that says what the person can mend.
STORAGE = 74  # A file system that can not be written or read, after trying again. sysexits.h: an input/output error.
RESTART = 75  # Start me again: told to stop and saved, or another host was lost or not there. sysexits.h: a temporary failure.
STUCK = 76  # No sign of life for too long; every thread's stack was shown.
LOOPING = 77  # The last starts all ended in an error, without a new checkpoint.
DIVERGED = 78  # Losses or gradients that are not finite, too many in a row.
INTERRUPTED = 130  # Ctrl-C, as shells say it; the run was saved unless it was pressed twice.
ABORTED = 134  # JAX itself ends a process that has lost another host so.

AGAIN = (RESTART, STUCK, ABORTED)  # With these, starting the same command again helps.
