"""es_lite trains every parameter of a language model without gradients, by evolution strategies."""

import sys
import tempfile

__version__ = "0.1.0"

try:
    tempfile.gettempdir()
except FileNotFoundError as error:  # torch and what it imports would fail with a traceback
    print(f"es_lite: {error.strerror}; set TMPDIR to a folder that can be written", file=sys.stderr)
    sys.exit(2)
