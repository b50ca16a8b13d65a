"""Where numba keeps compiled code, if it can keep it nowhere else."""

import atexit
import os
import shutil
import tempfile

from numba.core import config

CACHE = "CACHE_DIR"
"""The setting of numba."""


def temporary_cache() -> bool:
    """Makes a folder for the code that this command and its workers compile; False if there can be none."""
    if getattr(config, CACHE):  # which cannot be written either
        return False
    try:
        folder = tempfile.mkdtemp(prefix="es_lite-numba-")
    except OSError:
        return False
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ[f"NUMBA_{CACHE}"] = folder  # for workers
    setattr(config, CACHE, folder)
    return True
