"""The GRIP part of a Hub repository, brought into the cache: JSON and safetensors, nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..config import CONFIG_FILE
from ..errors import HubError, ScorerError

SUBFOLDER = "grip"
SCORER_TYPE = "grip_scorer"
LOADED = (".json", ".safetensors")
SHOWN = (".md", ".png", ".jpg", ".jpeg", ".webp", ".svg")  # for people: never read by this library
ALLOWED_NAMES = (".gitattributes", ".gitignore", "LICENSE", "NOTICE")


@contextmanager
def hub_errors(action: str) -> Iterator[None]:
    """Turn what the Hub client raises within a `with` block into a `HubError` that says what to do.

    Args:
        action: what was tried, such as "read 'user/repo'".
    """
    try:
        yield
    except GatedRepoError as error:
        raise HubError(f"cannot {action}: access to it must be asked for on its page first ({error})") from error
    except RevisionNotFoundError as error:
        raise HubError(f"cannot {action}: there is no such revision ({error})") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"cannot {action}: no such repository at {constants.ENDPOINT}, or it is private and the token is missing, "
            f"wrong or may not see it (log in with `hf auth login`, or give token=...)"
        ) from error
    except HfHubHTTPError as error:
        hints = {401: "the token is missing or wrong", 403: "the token may not do this"}
        hint = hints.get(error.response.status_code)
        raise HubError(f"cannot {action}: {hint or error}") from error
    except HFValidationError as error:
        raise HubError(f"cannot {action}: this is neither a folder nor the id of a repository ({error})") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise HubError(f"cannot {action}: the Hub is not reached, and it is not in the cache ({error})") from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise HubError(f"cannot {action}: {type(error).__name__}: {error}") from error


def is_repo_id(name: str) -> bool:
    """Whether `name` can be the id of a repository, and is not the path of a folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def foreign_files(names: Iterable[str]) -> list[str]:
    """Those of a scorer's files that do not belong to one: anything but JSON, safetensors, texts and pictures."""
    paths = map(PurePosixPath, names)
    belongs = (*LOADED, *SHOWN)
    return sorted(str(path) for path in paths if path.suffix.lower() not in belongs and path.name not in ALLOWED_NAMES)


def fetch(
    repo_id: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Path | None:
    """Download the GRIP part of a repository, or find it in the cache when the Hub is not reached.

    Its files are listed first, and its settings are read before its weights are downloaded.

    Args:
        repo_id: the repository.
        subfolder: where the part lies; None looks at the top and then in `grip/`.
        revision: branch, tag or commit; None is the default branch.
        token: as huggingface_hub takes it.
        cache_dir: another cache than the usual one.
        local_files_only: do not ask the Hub.
        check: given the folder with the settings, raises if the weights are not wanted; they are downloaded after it.

    Returns:
        The folder that holds the part, or None if the repository has none.

    Raises:
        HubError: The repository cannot be read, or holds files that are not loaded from scorers.
        ScorerError: It holds another kind of model.
    """
    place: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    with hub_errors(f"read {_name(repo_id, revision)}"):
        names = None if local_files_only else _listing(repo_id, revision, token)
        if names is None:
            found = snapshot_download(repo_id, local_files_only=True, allow_patterns=_patterns(subfolder), **place)
            return _part(Path(found), subfolder)
    if subfolder is None:
        top = CONFIG_FILE in names or f"{SUBFOLDER}/{CONFIG_FILE}" not in names
        subfolder = "" if top else SUBFOLDER
    inside = [name for name in names if name.startswith(f"{subfolder}/" if subfolder else "")]
    if not {f"{subfolder}/{name}".lstrip("/") for name in (CONFIG_FILE, "config.json")} & set(inside):
        return None
    if foreign := foreign_files(inside):
        raise HubError(
            f"{_name(repo_id, revision)} holds {foreign}: a scorer is loaded from a repository with JSON and "
            "safetensors files only; nothing was downloaded"
        )
    with hub_errors(f"download {_name(repo_id, revision)}"):
        settings = [pattern for pattern in _patterns(subfolder) if pattern.endswith(".json")]
        folder = Path(snapshot_download(repo_id, allow_patterns=settings, **place))
        check_kind(folder / subfolder, repo_id)
        if check is not None:
            check(folder / subfolder)
        folder = Path(snapshot_download(repo_id, allow_patterns=_patterns(subfolder), **place))
    return folder / subfolder


def check_kind(folder: Path, name: str) -> None:
    """Raise `ScorerError` if `folder` has a `config.json` of anything but a scorer."""
    found = read_settings(folder, name)
    if found and found.get("model_type") != SCORER_TYPE:
        raise ScorerError(f"{name!r} holds a model of type {found.get('model_type')!r}, not a grip scorer")


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """What `config.json` in `folder` says; nothing if there is none. Raises `ScorerError` if it is damaged."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ScorerError(f"config.json of {name!r} is damaged: {error}") from error


def _listing(repo_id: str, revision: str | None, token: str | bool | None) -> list[str] | None:
    """The names of all files of a repository, or None if the Hub is not reached."""
    try:
        info = HfApi().model_info(repo_id, revision=revision, token=token)
    except HfHubHTTPError as error:
        if error.response.status_code < 500:
            raise
        return None
    except (HTTPError, OfflineModeIsEnabled):
        return None
    return [file.rfilename for file in info.siblings or []]


def _part(folder: Path, subfolder: str | None) -> Path | None:
    """The GRIP part within a downloaded repository."""
    places = [folder, folder / SUBFOLDER] if subfolder is None else [folder / subfolder]
    complete = [place for place in places if (place / CONFIG_FILE).is_file()]
    scorers = [place for place in places if (place / "config.json").is_file()]
    return next(iter(complete + scorers), None)


def _patterns(subfolder: str | None) -> list[str]:
    return [f"{subfolder}/*{suffix}" if subfolder else f"*{suffix}" for suffix in LOADED]


def _name(repo_id: str, revision: str | None) -> str:
    return f"{repo_id!r}" if revision is None else f"{repo_id!r} at revision {revision!r}"
