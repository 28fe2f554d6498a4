"""`model.grip`: what one patch lets its user say and see."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from .config import GripConfig
from .engine.attaching import detach
from .engine.budget import Budget
from .engine.cache import returned, state_of
from .engine.call import LastCall
from .engine.choice import Score
from .engine.context import asked_of, last_of, override, told
from .engine.hooks import Boundary
from .errors import CacheError, ConfigError
from .families.table import Parts
from .hub.adapter_part import AdapterPart
from .hub.adapters import AdapterFiles
from .hub.checkpoint import CONFIG_FILE, SaveWithGrip
from .hub.resolve import describe_base
from .quality.again import KEPT, LookAgain
from .quality.identity import identity, of_tower
from .quality.promise import COMMAND, Calibration, Promise, check_made_for
from .tower.part import TowerPart


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
        self._adapter_files = AdapterFiles(self)
        self._savers = (SaveWithGrip(self), self._adapter_files)
        self._looks = (LookAgain(self),) if promised and hasattr(type(parts.owner), "generate") else ()
        self.adapters: dict[str, AdapterPart] = {}
        self.tower = TowerPart(self._boundary, config)
        self._of_tower: dict[float | str | None, dict[str, Any] | None] = {}

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
        return self._promise(quality, rule, asked_of(self._boundary))

    def _promise(self, quality: float, rule: str | None, asked: Budget) -> Promise:
        if self.calibration is None:
            raise ConfigError(
                f"quality={quality} needs a calibration, and none came with what chooses the tokens: run `{COMMAND} "
                f"--quality {quality}` with --output FOLDER, then apply_grip(model, scorer=FOLDER, quality={quality})"
            )
        check_made_for(self.calibration, self.identity(asked))
        return self.calibration.promise(quality, rule)

    def identity(self, asked: Budget | None = None) -> dict[str, Any]:
        """What a calibration of this patch is made for, as plain data (see `grip_hf.quality.identity`).

        Args:
            asked: The budget, which says how many rows of the vision tower stay; None takes that at hand.
        """
        share = (asked_of(self._boundary) if asked is None else asked).tower_keep_ratio
        if share not in self._of_tower:
            self._of_tower[share] = of_tower(share, self.tower.dropping(Budget(tower_keep_ratio=share)))
        return {**self._own_identity, "tower": self._of_tower[share]}

    @cached_property
    def _own_identity(self) -> dict[str, Any]:
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
            self._promise(asked.quality, asked.rule, asked)
        self.tower.ready(asked)
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
        detach(self._boundary)
        if self._parts.owner.__dict__.get("grip") is self:
            del self._parts.owner.grip


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
