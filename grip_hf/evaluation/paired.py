"""One timed run of a model: unpruned, pruned, or the floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..engine.cache import returned
from ..engine.upstream import cache_name
from ..families.table import find_parts
from ..hub.checkpoint import attached_folder
from ..patch import apply_grip, remove_grip
from ..scorer.model import GripScorer, GripScorerConfig
from ..selectors import get_selector
from ..selectors.inside import AtDepth, InsideSelector
from .downsampling import DOWNSAMPLING, POOLED, check_square, downsample, pool
from .memory import cache_bytes, peak_memory
from .stopwatch import Stopwatch, TimedSelector, watched
from .towers import TowerChoice, tower_label

SHRINKERS = {DOWNSAMPLING: downsample, POOLED: pool}


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is run: no budget is the unpruned model, a budget without a selector is the floor."""

    selector: str | None = None
    num_tokens: int | None = None
    tower: float | str | None = None

    @property
    def name(self) -> str:
        """The selector, and the share of the vision tower's rows."""
        return tower_label(self.selector or "floor", self.tower)

    def __str__(self) -> str:
        return "unpruned" if self.num_tokens is None else f"{self.name} {self.num_tokens}"


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one run gave.

    Attributes:
        ms: Milliseconds of each part of the call that gives the first token (see `stopwatch.SPANS`), of the
            `selector`, and of one `decode` step.
        hook_us: Host microseconds around the modules in one decode step.
        cache_bytes: Size of the KV cache after the first token.
        peak_bytes: Peak memory, if it can be told.
        layer_tokens: Tokens in each layer's part of the cache after the first token.
    """

    ms: dict[str, float]
    hook_us: float
    cache_bytes: int
    peak_bytes: int | None
    layer_tokens: tuple[int, ...] = ()


class Bench:
    """A model and its inputs, ready to be run in every variant.

    Args:
        model: The model, not patched.
        inputs: Inputs of its forward call.
        selectors: Names of selectors, "downsampling", "pooled", or `label=folder` of a scorer.
        decode_tokens: Steps to time after the first token.
        seed: Seed of the scorer's random weights.
        depth_of: Selectors inside the language model drop at the shares of layers where they do in a model of so many.
        tower: What chooses rows of the vision tower; None takes none.
        cpu_time: Whether CPU time counts instead of the clock's.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        selectors: Sequence[str],
        decode_tokens: int,
        seed: int = 0,
        depth_of: int | None = None,
        tower: TowerChoice | None = None,
        cpu_time: bool = False,
    ) -> None:
        self.tower = None if tower is None else tower.settings(model, seed)
        self.model, self.inputs, self.decode_tokens, self.depth_of = model, inputs, decode_tokens, depth_of
        self.cache_name = cache_name(find_parts(model).language_model)
        self.watch = Stopwatch(model.device, cpu_time)
        self.selectors = {name.partition("=")[0]: self._selector(name, seed) for name in selectors}
        self.kept: dict[int, dict[str, Any]] = {}

    def _selector(self, spec: str, seed: int) -> Any:
        name, _, folder = spec.partition("=")
        if folder or (name == "grip" and (folder := attached_folder(self.model) or "")):
            return get_selector("grip", scorer=folder)
        if name in SHRINKERS:
            return check_square(self.model)  # nothing to apply
        if name != "grip":
            found = get_selector(name, seed=seed)
            return AtDepth(found, self.depth_of) if self.depth_of and isinstance(found, InsideSelector) else found
        torch.manual_seed(seed)
        config = GripScorerConfig(hidden_size=self.model.config.get_text_config().hidden_size)
        return get_selector(name, scorer=GripScorer(config).to(self.model.device, self.model.dtype).eval())

    @torch.no_grad()
    def run(self, variant: Variant) -> Timing:
        """Run one variant; the model is left unpatched."""
        floor = variant.selector is None and variant.num_tokens
        if floor and floor not in self.kept:
            self.kept[floor] = self._kept_inputs(floor)
        shrink = SHRINKERS.get(variant.selector or "")
        if variant.selector is not None and shrink is None:
            selector = TimedSelector(self.selectors[variant.selector], self.watch)
            more: dict[str, Any] = {}
            if variant.tower is not None and self.tower is not None:
                own = TimedSelector(self.tower["tower_selector"], self.watch, "tower_selector")
                more = {**self.tower, "tower_selector": own, "tower_keep_ratio": variant.tower}
            apply_grip(self.model, selector=selector, num_tokens=variant.num_tokens, **more)
        try:
            with watched(self.model, self.watch), peak_memory(self.model.device) as peak:
                token, cache = self._floor(floor) if floor else self._call(shrink, variant.num_tokens)
                ms, size = self.watch.spans(), cache_bytes(cache)
                lengths = tuple(layer.keys.shape[-2] for layer in cache.layers)
                ms["decode"], hook_us = self._decode(token, cache)
                return Timing(ms, hook_us, size, peak(), lengths)
        finally:
            remove_grip(self.model)

    def drops(self, name: str) -> list[int] | None:
        """Per drop the first layer without the dropped tokens; None for what drops before the language model."""
        found = self.selectors[name]
        if not isinstance(found, InsideSelector):
            return None
        depth: Any = find_parts(self.model).language_model.config.num_hidden_layers  # type: ignore[union-attr]
        return [drop for _, drop in found.stages(depth)]

    def _call(self, shrink: Any = None, tokens: int | None = None) -> tuple[Tensor, Any]:
        """The first token, as `generate` computes it; from pictures made to `tokens` by `shrink`, if given."""
        self.watch.reset()
        self.watch.mark("start")
        inputs = self.inputs if shrink is None else shrink(self.model, self.inputs, tokens)
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1].argmax(-1, keepdim=True)
        self.watch.mark("end")
        return token, returned(output)

    def _floor(self, num_tokens: int) -> tuple[Tensor, Any]:
        """The first token from the embeddings that pruning left, without the patch and the vision tower."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        inputs = {**self.kept[num_tokens], self.cache_name: cache}
        self.watch.reset()
        self.watch.mark("start")
        output = find_parts(self.model).language_model(**inputs)
        token = self.model.get_output_embeddings()(output.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
        self.watch.mark("end")
        return token, cache

    def _decode(self, token: Tensor, cache: Any) -> tuple[float, float]:
        """Median milliseconds, and microseconds in hooks, of one further token, called as `generate` calls the model.

        `generate` leaves out a mask that hides nothing, as here, where no sample is padded.
        """
        milliseconds, microseconds = [], []
        for _ in range(self.decode_tokens):
            length = int(cache.get_seq_length())
            position = torch.full_like(token, length)
            self.watch.reset()
            self.watch.mark("start")
            output = self.model(input_ids=token, position_ids=position, use_cache=True, **{self.cache_name: cache})
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            self.watch.mark("end")
            milliseconds.append(self.watch.ms("start", "end"))
            microseconds.append(self.watch.hook_us())
        return median(milliseconds), median(microseconds)

    def _kept_inputs(self, num_tokens: int) -> dict[str, Any]:
        """What the language model gets when `num_tokens` are kept."""
        apply_grip(self.model, selector="grid", num_tokens=num_tokens)
        seen: list[dict[str, Any]] = []
        try:
            with watched(self.model, self.watch, seen):
                self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        finally:
            remove_grip(self.model)
        return seen[0]
