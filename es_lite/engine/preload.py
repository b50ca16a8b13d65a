"""What the process that workers are forked from imports once: its pages are shared by all of them.

A worker's own imports would take a quarter of a gigabyte and three seconds each. Nothing here starts a thread, which a
fork would lose. Signals that reach the whole process group are left to the coordinator, from a worker's first moment.
"""

import gc
import signal

import transformers.modeling_utils  # noqa: F401 (lazily imported by transformers, and by every model)

from es_lite.engine import worker  # noqa: F401

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
gc.collect()
gc.freeze()  # or the collector's marks would unshare the pages
