"""The GRIP part of a checkpoint: settings and scorer in a subfolder `grip` beside the model's own files."""

from __future__ import annotations

import os
from typing import Any

from ..engine.methods import InstanceMethod
from ..engine.upstream import saves_adapters_alone
from .adapter_part import ADAPTER_FILE, facts_of
from .adapters import tell
from .download import CONFIG_FILE, SUBFOLDER, fetch, is_repo_id

__all__ = ["CONFIG_FILE", "SUBFOLDER", "SaveWithGrip", "attached_folder", "came_from"]


def came_from(model: Any) -> str:
    """The folder or repository id that a model was loaded from, or "" if it was built in code."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")


def attached_folder(model: Any, **hub: Any) -> str | None:
    """The folder with the GRIP part of the checkpoint that a model was loaded from, or None if it has none.

    Args:
        model: A transformers model.
        **hub: `revision`, `token`, ... of that checkpoint, if it is on the Hub (see `fetch`).

    Raises:
        HubError: The checkpoint is on the Hub, and cannot be looked into.
    """
    path = came_from(model)
    if path and is_repo_id(path):
        found = fetch(path, subfolder=SUBFOLDER, **hub)
        return None if found is None else str(found)
    folder = os.path.join(path, SUBFOLDER) if path else ""
    return folder if os.path.isfile(os.path.join(folder, CONFIG_FILE)) else None


class SaveWithGrip(InstanceMethod):
    """`save_pretrained` of a patched model: the model's own, and then the GRIP part beside it.

    `model.push_to_hub` saves through it, and so uploads the part too.

    Args:
        handle: The `GripHandle` of the model.
    """

    def __init__(self, handle: Any) -> None:
        super().__init__(handle.owner, "save_pretrained")
        self.handle = handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model, then its GRIP part; `push_to_hub=True` uploads both."""
        given = self.__signature__.bind(*args, **kwargs).arguments
        adapters_alone = saves_adapters_alone(self.module)  # raises before anything is written
        result = self.own(*args, **kwargs)
        if given.get("is_main_process", True):
            folder = given["save_directory"]
            extra = given.get("kwargs", {})
            if self.handle.save_part(os.path.join(folder, SUBFOLDER)):
                if adapters_alone:
                    tell(folder, type(self.module), facts_of(self.handle))
                if given.get("push_to_hub"):
                    self._upload(folder, {"token": given.get("token"), **extra})
        return result

    def _upload(self, folder: Any, options: dict[str, Any]) -> None:
        """Upload the part after the rest, which `save_pretrained(push_to_hub=True)` has uploaded by itself."""
        from huggingface_hub import HfApi

        from .download import hub_errors

        name = options.get("repo_id") or os.path.basename(os.path.normpath(folder))
        with hub_errors(f"upload the GRIP part to {name!r}"):
            api = HfApi(token=options.get("token"))
            api.upload_folder(
                repo_id=api.create_repo(name, exist_ok=True).repo_id,
                folder_path=folder,
                allow_patterns=[f"{SUBFOLDER}/*", ADAPTER_FILE],
                revision=options.get("revision"),
                create_pr=options.get("create_pr", False),
                commit_message="Upload the GRIP part",
            )
