"""The GRIP part of a checkpoint: settings and scorer in a subfolder `grip` beside the model's own files."""

from __future__ import annotations

import os
from typing import Any

SUBFOLDER = "grip"
CONFIG_FILE = "grip_config.json"


def attached_folder(model: Any) -> str | None:
    """The folder with the GRIP part of the checkpoint that a model was loaded from, or None if it has none.

    Args:
        model: A transformers model.
    """
    path = getattr(getattr(model, "config", None), "_name_or_path", None)
    folder = os.path.join(path, SUBFOLDER) if path else ""
    return folder if os.path.isfile(os.path.join(folder, CONFIG_FILE)) else None
