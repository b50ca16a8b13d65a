"""Runs a user's Python file as a module."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def run_once(file: Path, name: str) -> ModuleType:
    """The module `name`, which the file becomes when it first runs in this process. file: its name ends in .py.

    Raises whatever the file raises, SystemExit included; it may then be run again.
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader  # as its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
