"""Imported once by the process that workers are forked from, so they share its memory and start quickly.

It must not start threads, which a fork would lose. Signals to the whole process group are ignored, even before a worker's first
line: the coordinator handles them.
"""

import gc
import os
import signal

# oneDNN keeps a compiled product, of 0.65 MB in bf16, for each shape that it has seen: 1,024 of them, if this is not set before
# its first use.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

import transformers.modeling_utils  # noqa: F401 (lazily imported by transformers, and by every model)

from es_lite.engine import worker  # noqa: F401

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
gc.collect()
gc.freeze()  # else garbage collection would write to shared pages
