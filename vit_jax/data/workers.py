"""Worker processes of the loader: how they start, and how they end with their parent."""

import multiprocessing
import os
import signal
import threading
from multiprocessing import resource_tracker


def start_resource_tracker():
  """Start Python's tracker of shared memory without changing the signal mask.

  Starting it unblocks signals in this thread. Workers must inherit the mask as it was.
  """
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
  resource_tracker.ensure_running()
  signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def init_worker(worker: int, workers: int):
  """Leave signals to the parent process and end when it ends.

  Ctrl-C and preemption reach all processes, but only the parent handles them.
  """
  del worker, workers
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
  """End this worker when its parent has ended.

  Otherwise a worker of a killed process would wait forever and keep its memory.
  """
  multiprocessing.parent_process().join()
  os._exit(0)
