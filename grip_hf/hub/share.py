"""Share what the patch of a model chooses with: a folder or Hub repository with settings, scorer and model card."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..errors import ConfigError, HubError, ScorerError
from ..files import write_whole
from .card import PICTURE, Facts, make_card
from .download import check_kind, foreign_files, hub_errors, read_settings
from .resolve import describe_base

CARD = "README.md"
OWN_FILES = [
    "grip_config.json",
    "quality.json",
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tower/*",
]


def save(handle: Any, directory: str | os.PathLike[str], **card: Any) -> None:
    """Write settings, scorer and model card to a folder.

    Args:
        handle: The `GripHandle` of a model.
        directory: Where to.
        **card: See `Facts`.

    Raises:
        ConfigError: The selector is a callable, which cannot be saved, or a fact of the card is not allowed.
        ScorerError: The folder holds a model, whose weights would be overwritten, or the scorer of another model.
    """
    facts = _facts(handle, card)
    _check_target(handle, Path(directory), os.fspath(directory))
    handle.save_part(directory)
    _write_card(handle, Path(directory), facts)


def write_card(handle: Any, directory: str | os.PathLike[str], **card: Any) -> None:
    """Write the card alone, beside settings and scorer that are there already.

    Args:
        handle: The `GripHandle` of a model that uses them.
        directory: Where they are.
        **card: See `Facts`.

    Raises:
        ConfigError: See `save`.
    """
    _write_card(handle, Path(directory), _facts(handle, card))


def _write_card(handle: Any, folder: Path, facts: Facts) -> None:
    path = folder / CARD
    old = path.read_text(encoding="utf-8") if path.is_file() else None
    write_whole(path, make_card(handle, facts, old=old).save)
    if facts.picture is not None:
        write_whole(folder / PICTURE, facts.picture.save)


def push(
    handle: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload GRIP scorer",
    **card: Any,
) -> str:
    """Upload settings, scorer and model card to a Hub repository, in one commit: all of it arrives, or nothing.

    Args:
        handle: The `GripHandle` of a model.
        repo_id: The repository, made if it is missing.
        private: Whether a new repository is private; None is the default of its owner.
        token: Access token; None takes the stored one.
        revision: Branch to upload to, made if it is missing.
        create_pr: Open a pull request instead of changing the branch.
        commit_message: First line of the commit.
        **card: See `Facts`. A card that is there keeps what people wrote in it.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: The selector is a callable, which cannot be saved, or a fact of the card is not allowed.
        ScorerError: The repository holds a model, or the scorer of another model.
        HubError: The repository holds something else than a scorer, or was changed at the same time, or the Hub did
            not take the upload. Nothing that was there is lost.
    """
    facts = _facts(handle, card)
    api = HfApi(token=token)
    with hub_errors(f"upload to {repo_id!r}"), tempfile.TemporaryDirectory() as folder:
        parent, old = _what_is_there(handle, api, repo_id, revision, Path(folder) / "old")
        fresh = Path(folder) / "new"
        handle.save_part(fresh)
        make_card(handle, facts, repo_id, old).save(fresh / CARD)
        if facts.picture is not None:
            facts.picture.save(fresh / PICTURE)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and parent is None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=fresh,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
            commit_message=commit_message,
            delete_patterns=OWN_FILES,
        )
    return str(commit.pr_url or commit.commit_url)


def _facts(handle: Any, card: dict[str, Any]) -> Facts:
    """The facts of a card, once it is sure that the handle can be saved."""
    if not handle.can_be_saved:
        raise ConfigError(
            f"a selector that is a callable cannot be saved, got {handle.selector!r}; register it under a name "
            "(grip_hf.selectors.register) and choose it by that"
        )
    unknown = sorted(set(card) - set(Facts.__dataclass_fields__))
    if unknown:
        raise ConfigError(f"unknown arguments {unknown}; a card takes {sorted(Facts.__dataclass_fields__)}")
    return Facts(**card)


def _check_target(handle: Any, folder: Path, name: str) -> None:
    """Raise `ScorerError` if what `folder` holds is not to be overwritten: a model, or the scorer of another model."""
    check_kind(folder, name)
    made_for = read_settings(folder, name).get("base_model") or {}
    mine = describe_base(handle.owner)
    for key in ("model_type", "text_model_type"):
        if made_for.get(key, mine[key]) != mine[key]:
            raise ScorerError(
                f"{name!r} holds the scorer of another model ({key} {made_for[key]!r}, this one has {mine[key]!r}); "
                "give it a place of its own"
            )


def _what_is_there(
    handle: Any, api: HfApi, repo_id: str, revision: str | None, folder: Path
) -> tuple[str | None, str | None]:
    """The commit that a branch of a repository is at and the text of its card; None where there is none.

    Raises:
        ScorerError, HubError: The repository holds something that is not to be overwritten.
    """
    try:
        info = api.model_info(repo_id, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None, None
    names = [file.rfilename for file in info.siblings or []]
    foreign = foreign_files(names)
    if foreign:
        raise HubError(f"{repo_id!r} holds {foreign}, which no scorer's repository does; nothing was uploaded to it")
    place: dict[str, Any] = {"revision": info.sha, "local_dir": folder, "token": api.token}
    if "config.json" in names:
        hf_hub_download(repo_id, "config.json", **place)
        _check_target(handle, folder, repo_id)
    if CARD not in names:
        return info.sha, None
    return info.sha, Path(hf_hub_download(repo_id, CARD, **place)).read_text(encoding="utf-8")
