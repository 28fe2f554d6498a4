"""What a table must say of how it was made."""

from __future__ import annotations

import platform
from importlib.metadata import version

from ..version import __version__

LIBRARIES = ("torch", "transformers")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that figures depend on."""
    return {"python": platform.python_version(), "grip-hf": __version__, **{name: version(name) for name in LIBRARIES}}
