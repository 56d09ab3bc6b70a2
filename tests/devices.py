"""What tests that run on a device share."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.sanitize import moved

__all__ = ["moved"]
