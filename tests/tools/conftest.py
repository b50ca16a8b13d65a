"""Lets tests import the tools as the tools import each other: by plain name."""

import sys

from support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
