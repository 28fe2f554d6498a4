"""What a table must say of how it was made."""

from __future__ import annotations

import platform
from importlib.metadata import version

LIBRARIES = ("grip-hf", "torch", "transformers")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that figures depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
