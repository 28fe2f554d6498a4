"""`apply_grip` and `remove_grip`: prune the visual tokens of a transformers model in place, and undo it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from .config import GripConfig
from .engine.cache import returned, state_of
from .engine.call import LastCall
from .engine.choice import Score
from .engine.context import Budget, last_of, override, told
from .engine.hooks import Boundary, patch_of
from .engine.layers import check_layers
from .engine.upstream import check_language_model, is_untested
from .errors import CacheError, ConfigError, ScorerError, UnsupportedModelError
from .families.table import Parts, find_parts, unwrap
from .hub.adapter_part import AdapterPart, part_of, warn_if_it_differs
from .hub.adapters import AdapterFiles
from .hub.checkpoint import CONFIG_FILE, SaveWithGrip
from .hub.resolve import describe_base, resolve
from .quality.again import KEPT, LookAgain
from .quality.identity import identity
from .quality.promise import COMMAND, Calibration, Promise, check_made_for, find
from .tower.part import TowerPart

if TYPE_CHECKING:
    from .scorer.model import GripScorer

__all__ = ["GripHandle", "apply_grip", "remove_grip"]
M = TypeVar("M", bound=nn.Module)
logger = logging.getLogger(__name__)


class GripHandle:
    """The patch of one model, found at `model.grip`.

    Attributes:
        config: the settings.
        selector: scores visual tokens.
        scorer: the learned scorer behind the selector, or None.
        note: what `apply_grip` decided because nothing was said, or "".
        calibration: what is promised of its answers (see `grip_hf.quality`), or None.
    """

    note = ""

    def __init__(
        self,
        parts: Parts,
        config: GripConfig,
        selector: Score,
        scorer: nn.Module | None,
        calibration: Calibration | None = None,
    ) -> None:
        self.config = config
        self.selector = selector
        self.scorer = scorer
        self.calibration = calibration
        self._parts = parts
        compact, promised = config.position_ids == "compact", calibration is not None
        usual = Budget(
            config.keep_ratio, config.num_tokens, tower_keep_ratio=config.tower_keep_ratio, quality=config.quality
        )
        self._boundary = Boundary(
            parts, selector, config.scope == "image", compact, usual, key=self, encodes_once=promised
        )
        self._savers = (SaveWithGrip(self), AdapterFiles(self))
        self._looks = (LookAgain(self),) if promised and hasattr(type(parts.owner), "generate") else ()
        self.adapters: dict[str, AdapterPart] = {}
        self.tower = TowerPart(self._boundary, config)

    def __repr__(self) -> str:
        note = f", {self.note}" if self.note else ""
        return f"GripHandle({type(self._parts.owner).__name__}, {self.config}{note})"

    def promise(self, quality: float, rule: str | None = None) -> Promise:
        """The ladder of budgets by which `generate` keeps a promise.

        Args:
            quality: The share of answers that are to be as with all visual tokens, in (0, 1).
            rule: What an answer is judged by: "answer", all of it (the default); "first", its first token, for
                streams.

        Raises:
            ConfigError: There is no calibration, or it is that of something else, or does not promise so much.
        """
        if self.calibration is None:
            raise ConfigError(
                f"quality={quality} needs a calibration, and none came with what chooses the tokens: run `{COMMAND} "
                f"--quality {quality}` with --output FOLDER, then apply_grip(model, scorer=FOLDER, quality={quality})"
            )
        check_made_for(self.calibration, self._identity)
        return self.calibration.promise(quality, rule)

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return identity(self.owner, describe_base(self.owner), self.config, self.scorer)

    def budget(
        self,
        keep_ratio: float | Sequence[float] | None = None,
        num_tokens: int | Sequence[int] | None = None,
        tower_keep_ratio: float | str | None = None,
        quality: float | None = None,
        rule: str | None = None,
    ) -> AbstractContextManager[None]:
        """Use another budget within a `with` block, in this thread only.

        A thread that is started inside the block does not see it, unless it is given the context along:
        `Thread(target=contextvars.copy_context().run, args=(model.generate,), kwargs=inputs)`.

        Args:
            keep_ratio: share of the visual tokens to keep, in (0, 1], or one per sample.
            num_tokens: number of visual tokens to keep, >= 1, or one per sample.
            tower_keep_ratio: share of the vision tower's rows that stay, in (0, 1], or "auto"; None as it was. More
                stay where the other budget needs more. Given alone, the other budget is as it was.
            quality: in place of the first two, for `generate`: the share of answers that are to be as with all visual
                tokens.
            rule: with a quality, what an answer is judged by; see `promise`.

        Raises:
            ConfigError: Not exactly one of the first two and `quality` is given and not the third alone, or it is not
                allowed, or not promised.
            UnsupportedModelError: No rows can be dropped in this vision tower.
        """
        asked = self.tower.budget(keep_ratio, num_tokens, tower_keep_ratio, quality, rule)
        if asked.quality is not None:
            self.promise(asked.quality, asked.rule)
        return override(self, asked)

    def prompt(self, prompt: Tensor | Sequence[int]) -> AbstractContextManager[None]:
        """Say which tokens are the prompt within a `with` block, in this thread only: what is kept hangs on it alone.

        Labels say so by themselves; this is for losses that are computed elsewhere.

        Args:
            prompt: [B, L] of bools or integers, true at the prompt's tokens (pictures may be either); or, per row, the
                number of tokens from the first one on, padding not counted.

        Raises:
            ConfigError: It is neither; or, in the call, it has another shape than the call.
        """
        return told(self, prompt)

    def follow(self, leader: GripHandle) -> None:
        """From now on, what is said of another model's patch, its budget and its prompts, counts for this one too.

        Args:
            leader: The handle of that model, such as the policy of which this is the reference.
        """
        self._boundary.leader = leader._boundary

    @property
    def last(self) -> LastCall | None:
        """What the last call with pictures in this thread kept; None before the first one."""
        return last_of(self._boundary)

    def disabled(self) -> AbstractContextManager[None]:
        """Keep all visual tokens within a `with` block, in this thread only."""
        return override(self, Budget(everything=True))

    def kept_tokens(self, cache_or_output: Any) -> list[Tensor]:
        """Which visual tokens a call kept: per sample, their indices among the sample's visual tokens, rising.

        Args:
            cache_or_output: the KV cache of the call, or an output that holds it.

        Raises:
            CacheError: There is no cache, or it took part in no call with visual tokens.
        """
        return kept_tokens(cache_or_output)

    @property
    def owner(self) -> nn.Module:
        """The patched model, without adapters around it."""
        return self._parts.owner

    def save_pretrained(self, directory: str | os.PathLike[str], **card: Any) -> None:
        """Write the settings, the scorer if there is one, and a model card; no weight of the model is written.

        Args:
            directory: Where to. A card that lies there keeps what people wrote in it.
            **card: What the card tells: `results`, `training`, `license` (see `grip_hf.hub.card.Facts`).

        Raises:
            ConfigError: The selector is a callable, which cannot be saved.
        """
        from .hub.share import save  # imported late: it builds on this module's level

        save(self, directory, **card)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes, in one commit; returns its address. See `grip_hf.hub.share.push`.

        Args:
            repo_id: The repository, made if it is missing.
            **options: `private`, `token`, `revision`, `create_pr`, `commit_message`, and those of `save_pretrained`.

        Raises:
            HubError: The repository holds something else than a scorer, or the Hub did not take the upload, in which
                case nothing in it was changed.
        """
        from .hub.share import push

        return push(self, repo_id, **options)

    def save_part(self, folder: str | os.PathLike[str]) -> bool:
        """Write settings, scorer and calibration, without a card; False, with a warning, if they cannot be saved."""
        if not self.can_be_saved:
            warnings.warn("a selector that is a callable is not saved with the model", UserWarning, stacklevel=2)
            return False
        os.makedirs(folder, exist_ok=True)
        if self.scorer is not None:
            scorer: Any = self.scorer
            if scorer.config.base_model is None:
                scorer.config.base_model = describe_base(self.owner)
            scorer.save_pretrained(folder)
        self.tower.save(folder)
        self.config.to_json(os.path.join(folder, CONFIG_FILE))
        if self.calibration is not None:
            self.calibration.save(folder)
        return True

    @property
    def can_be_saved(self) -> bool:
        """Whether the settings tell who chooses."""
        named = self.config.selector is not None and getattr(self.selector, "name", None) == self.config.selector
        return named and self.tower.selector is None

    def remove(self) -> None:
        """Remove the patch; the model is exactly as before. Doing so twice is harmless."""
        for method in (*self._looks, *self._savers):
            method.remove()
        self._boundary.remove()
        if self._parts.owner.__dict__.get("grip") is self:
            del self._parts.owner.grip


def apply_grip(
    model: M,
    config: GripConfig | None = None,
    *,
    scorer: GripScorer | str | os.PathLike[str] | None = None,
    selector: Score | str | None = None,
    tower_selector: Score | str | None = None,
    calibration: Calibration | str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force: bool = False,
    **overrides: Any,
) -> M:
    """Prune the visual tokens of `model` in place: from now on, each call keeps as many as its budget allows.

    Only hooks on this model object are added; its class, weights and signature stay as they are. Applying again
    replaces the patch.

    Who chooses the tokens: the `selector`, where one is named; else the `scorer`, or what the active adapter was
    trained with, or the scorer that came with the checkpoint of the model; else `cdpruner`, which is logged and told
    by `repr(model.grip)`. It is the method with the best mean over the budgets in the table of
    `grip_hf/evaluation/README.md` of the published ones that need no training, prune before the language model, and
    need nothing of the vision tower, so that it works with every family. It is never taken in place of a scorer that
    was asked for.

    Args:
        model: A transformers vision-language model for conditional generation, also one wrapped by PEFT.
        config: The settings. None takes those saved with the scorer, or makes them of the overrides. A scorer, its
            folder or its Hub id in this place is deprecated.
        scorer: A `GripScorer`, or the folder or Hub id of what `model.grip.save_pretrained` wrote.
        selector: A selector's name, or any callable from `VisualBatch` to scores [G, N]. Overrides the config's.
        tower_selector: The same for the rows of the vision tower, where `tower_keep_ratio` drops some (see
            `grip_hf.tower.selectors`).
        calibration: What is promised of the answers, or the folder of its `quality.json`; None takes the one beside
            the scorer, if there is one. It is needed for `quality=...`.
        revision: Branch, tag or commit of the Hub repository to read.
        token: Access token for the Hub; None takes the stored one.
        cache_dir: Another cache for downloads than the usual one.
        local_files_only: Take what is in the cache; do not ask the Hub.
        force: Take a scorer that was trained for another model of the same kind and width, with a warning.
        **overrides: Settings of `GripConfig` to change, such as `keep_ratio=0.25`.

    Returns:
        The same model; its handle is `model.grip`.

    Raises:
        UnsupportedModelError: The model's family is not supported, or cannot give what the selector needs; or the
            installed transformers is newer than the newest tested, and a self-check of this family fails.
        ConfigError: A setting is not allowed, or a scorer is given beside another selector.
        ScorerError: The scorer is missing, damaged, or made for another model.
        HubError: The Hub repository cannot be read, or holds something else than JSON and safetensors.
    """
    parts = _whole(find_parts(model))
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    adapter = part_of(model)
    if isinstance(tower_selector, str):
        overrides["tower_selector"] = tower_selector
    asked = resolve(parts, config, scorer, selector, overrides, hub, adapter, force)
    settings = asked.config
    if settings.position_ids == "compact" and parts.family.mrope:
        raise UnsupportedModelError(
            f"position_ids='compact' is not defined for {type(parts.owner).__name__}, whose positions have several "
            "axes; use position_ids='original'"
        )
    chosen = selector if callable(selector) else _named_selector(settings, asked.scorer)
    promised = find(calibration, asked.folder, settings.quality is not None)
    if settings.quality is not None:
        GripHandle(parts, settings, chosen, asked.scorer, promised).promise(settings.quality)
    if promised is not None and getattr(chosen, "inside", False):
        if settings.quality is not None:
            raise UnsupportedModelError(
                f"quality is not defined for selectors that drop tokens within the language model, got {chosen!r}"
            )
        promised = None
    check_language_model(parts.language_model)
    if getattr(chosen, "inside", False):
        check_layers(parts.language_model, chosen)  # type: ignore[arg-type]
    if is_untested():
        from .doctor.guard import vouch  # imported late: only then are tiny models needed

        vouch(parts.owner.config, prune)
    rows = (tower_selector if callable(tower_selector) else None, asked.tower_scorer)
    handle = _attach(parts, settings, chosen, asked.scorer, asked.note, rows, promised)
    if adapter is not None:
        warn_if_it_differs(adapter, handle)
    return model


def prune(model: nn.Module, selector: Score, keep_ratio: float) -> GripHandle:
    """`apply_grip` without the self-check, for the self-check."""
    return _attach(find_parts(model), GripConfig(keep_ratio=keep_ratio), selector, None)


def _attach(
    parts: Parts,
    config: GripConfig,
    selector: Score,
    scorer: nn.Module | None,
    note: str = "",
    rows: tuple[Score | None, nn.Module | None] = (None, None),
    calibration: Calibration | None = None,
) -> GripHandle:
    """Put the patch on the model, in the place of an earlier one; `rows` says what chooses those of the tower."""
    handle = GripHandle(parts, config, selector, scorer, calibration)
    handle.tower.selector, handle.tower.scorer = rows
    drops = handle.tower.make()
    handle.adapters.update(getattr(vars(parts.owner).get("grip"), "adapters", {}))
    hooks = list(_prepare(selector, parts))
    # From here on nothing raises, so that a model that cannot be patched keeps what patch it had.
    remove_grip(parts.owner)
    handle._boundary.attach(hooks)
    handle.tower.attach(drops)
    for method in (*handle._savers, *handle._looks):
        method.attach()
    if note:
        handle.note = note
        logger.warning("%s", note)
    parts.owner.grip = handle  # type: ignore[assignment]
    return handle


def remove_grip(model: M) -> M:
    """Undo `apply_grip`; returns the model. A model without a patch is left alone."""
    owner = unwrap(model)
    for module in owner.modules() if isinstance(owner, nn.Module) else ():
        for handle in (module.__dict__.get("grip"), getattr(patch_of(module), "key", None)):
            if isinstance(handle, GripHandle):
                handle.remove()
    return model


def _whole(parts: Parts) -> Parts:
    """The parts of the model to patch: where a patched model's base model was given, those of the model around it."""
    patch = patch_of(parts.base)
    around = patch is not None and patch.parts.owner is not parts.owner and parts.owner is parts.base
    return patch.parts if patch is not None and around else parts


def kept_tokens(cache_or_output: Any) -> list[Tensor]:
    """See `GripHandle.kept_tokens`."""
    cache = cache_or_output
    if isinstance(kept := getattr(cache, KEPT, None), list):
        return list(kept)  # rows that were looked at at several budgets have no cache in common
    if not hasattr(cache, "get_seq_length"):
        cache = returned(cache) if isinstance(cache, Mapping) else None
    state = state_of(cache)
    if state is None:
        raise CacheError(
            f"no kept tokens in {type(cache_or_output).__name__}: give the KV cache of a call with visual tokens, or "
            "an output that holds it (model(..., use_cache=True) or generate(..., return_dict_in_generate=True))"
        )
    visual = state.visual
    held = visual.new_zeros(visual.shape).scatter(1, state.index, state.valid) & visual
    return [keep[seen].nonzero().flatten() for keep, seen in zip(held, visual, strict=True)]


def _named_selector(config: GripConfig, scorer: nn.Module | None) -> Score:
    """Build the selector that the settings name."""
    from .selectors import get_selector  # imported late: selectors build on this module's level

    assert config.selector is not None
    kwargs = dict(config.selector_kwargs)
    if config.selector == "grip" and "scorer" not in kwargs:
        if scorer is None:
            raise ScorerError(
                "the selector 'grip' needs a scorer: apply_grip(model, scorer=...) with one, its folder or Hub id; "
                "selectors that need none are named by selector=..., for example selector='grid'"
            )
        kwargs["scorer"] = scorer
    return get_selector(config.selector, seed=config.seed, **kwargs)


def _prepare(selector: Score, parts: Parts) -> Iterable[Any]:
    """Let a selector register its own hooks."""
    prepare = getattr(selector, "prepare", None)
    return prepare(parts.owner) if prepare is not None else ()
