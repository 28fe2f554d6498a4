"""The workers' part: drop tokens between encoder and language model, and give those that stay their positions.

embed_multimodal            encode pictures, choose, put each kept token's offset beside its embedding
get_mrope_input_positions   positions of a new request, as if nothing had been dropped
embed_input_ids             take the offsets off again, and remember them for this step
forward                     add them to the positions

No step asks what kind of runner it is called by: every one calls these four, in this order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from cachetools import LRUCache
from torch import Tensor
from vllm.multimodal.inputs import PlaceholderRange

from ...families.table import FAMILIES
from .choice import Picture, choose_rows, embed
from .families import SERVED, Served
from .passes import passes, pick_items
from .positions import embedded_range, embedded_span, grow, read_offsets, write_offsets
from .processor import CONTENT, FIELDS, KEPT, PICTURE, TEXT, known_positions
from .settings import Settings, placeholder_ids

SPARE = 1024  # rows of the buffer beyond a step's tokens: some runners pad


class Pruner:
    """What one loaded model prunes with. No module: a checkpoint has no weights for it.

    Attributes:
        axes: 3 for M-RoPE, 1 for plain positions.
        selector: scores visual tokens.
        family: the facts of the model's family.
        served: those of its class in vLLM.
        ids: of the placeholder tokens.
        width: of the language model.
        per_pass: how many visual tokens are encoded at once, as profiled.
        offsets: [axes, tokens of a step] long; lies still, so that CUDA graphs can read it.
        limit: the number of positions that the model knows, or None.
        encoded: unpruned pictures, by their fingerprints.
    """

    def __init__(self, settings: Settings, served: Served, vllm_config: Any) -> None:
        hf_config, device = vllm_config.model_config.hf_config, vllm_config.device_config.device
        scheduler = vllm_config.scheduler_config
        self.served, self.family = served, FAMILIES[served.model_type]
        self.axes = 3 if self.family.mrope else 1
        with torch.device("cpu"):
            self.selector: Any = settings.selector(hf_config)
        if hasattr(self.selector, "scorer"):
            self.selector.scorer.to(device)
        self.ids = torch.tensor(placeholder_ids(hf_config), device="cpu")
        self.width = hf_config.get_text_config().hidden_size
        self.per_pass = max(scheduler.max_num_encoder_input_tokens, scheduler.max_num_batched_tokens)
        size = scheduler.max_num_batched_tokens + SPARE
        self.offsets = torch.zeros(self.axes, size, dtype=torch.long, device=device)
        self.limit = known_positions(vllm_config.model_config)
        self.moved = False
        self.encoded: LRUCache[tuple[int, ...], Tensor] = LRUCache(self.per_pass, len)

    def keep(self, encoded: Mapping[tuple[int, ...], Tensor]) -> None:
        """Keep what was encoded last for other questions about the same pictures, as much as one pass encodes."""
        for one, features in encoded.items():
            if len(one) > 1 and one not in self.encoded and len(features) <= self.encoded.maxsize:
                self.encoded[one] = features.clone()  # not a view, which would hold on to the whole batch

    def span(self, content: Tensor) -> tuple[int, int]:
        """The embedded span of an unpruned content."""
        return embedded_span(content, torch.isin(content, self.ids))

    def remember(self, embeddings: Iterable[Tensor], where: Tensor) -> list[Tensor]:
        """Take the offsets off this step's embeddings; they belong to the tokens `where` [L] bool."""
        self.rest()
        parts = [read_offsets(rows, self.axes) for rows in embeddings]
        if parts:
            self.moved = True
            slots = where.to(self.offsets.device).nonzero().flatten()
            self.offsets[:, slots] = torch.cat([offsets for _, offsets in parts]).T
        return [rows for rows, _ in parts]

    def rest(self) -> None:
        """Forget a step's offsets: vLLM also runs the model on nothing, without embeddings before."""
        if self.moved:
            self.offsets.zero_()
            self.moved = False

    def move(self, positions: Tensor) -> Tensor:
        """Positions [axes, L] of a step's tokens, as the language model takes them."""
        offsets = self.offsets[:, : positions.shape[-1]]
        if self.axes > 1:
            return positions.add_(offsets)  # in place: torch.compile wants the strides of the runner's buffer
        return (positions[0] + offsets[0]).clamp(max=self.limit - 1 if self.limit else None)

    def places(self, span: int, kwargs: Mapping[str, Any], number: int, merge: int) -> Tensor:
        """[span, axes] long: how far each token of a picture lies behind its first."""
        if self.axes == 1:
            return torch.arange(span)[:, None]
        frames, rows, columns = (int(side) for side in kwargs["image_grid_thw"][number])
        steps = (torch.arange(frames), torch.arange(rows // merge), torch.arange(columns // merge))
        return torch.cartesian_prod(*steps)


class GripModel:
    """Mixin of a vLLM model class; a model that is not pruned runs as the stock class does."""

    supports_mrope = True
    architecture: str
    config: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        settings = Settings.of(vllm_config.model_config.hf_config)
        self.grip = None if settings is None else Pruner(settings, SERVED[self.architecture], vllm_config)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """One tensor [K, D + channels] for each picture."""
        if self.grip is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        wanted = {name: kwargs.pop(name) for name in FIELDS}
        prints = [tuple(one.tolist()) if one.any() else (number,) for number, one in enumerate(wanted[PICTURE])]
        totals = [int(torch.isin(content, self.grip.ids).sum()) for content in wanted[CONTENT]]
        encoded = {one: self.grip.encoded[one] for one in prints if one in self.grip.encoded}
        fresh = [number for number, one in enumerate(prints) if one not in encoded and prints.index(one) == number]
        for chosen in passes(fresh, totals, self.grip.per_pass):
            part = pick_items(kwargs, chosen, len(totals), self.grip.served.rows)
            features = super().embed_multimodal(**part)  # type: ignore[misc]
            encoded |= zip((prints[number] for number in chosen), features, strict=True)
        self.grip.keep(encoded)
        return self._prune([encoded[one] for one in prints], wanted, kwargs)

    def _prune(self, features: Iterable[Tensor], wanted: Mapping[str, Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        grip: Any = self.grip
        merge = getattr(self.config.vision_config, "spatial_merge_size", 1)
        pictures = []
        for number, rows in enumerate(features):
            content = wanted[CONTENT][number].cpu()
            start, stop = grip.span(content)
            places = grip.places(stop - start, kwargs, number, merge)
            visual, kept = torch.isin(content, grip.ids), int(wanted[KEPT][number])
            pictures.append(Picture(content, visual, wanted[TEXT][number][1:].cpu(), rows, places, kept))
        table = self.get_language_model().embed_input_ids  # type: ignore[attr-defined]
        embedded = [embed(one, table, grip.width) for one in pictures]
        stays = choose_rows(pictures, embedded, grip.selector, grip.family, self, grip.width)
        pruned = []
        for one, rows, keep in zip(pictures, embedded, stays, strict=True):
            start, stop = grip.span(one.content)
            index = keep[start:stop].nonzero().flatten()
            inside = rows[len(one.text) + start : len(one.text) + stop]
            pruned.append(write_offsets(inside[index], one.places.to(index.device)[index]))
        return pruned

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions [axes, L] of the unpruned prompt, and how far those of the answer lie behind their index."""
        if self.grip is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        spans, regions = [], []
        mm_features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        for feature in mm_features:
            content = feature.data[CONTENT].data
            start, stop = self.grip.span(content)
            regions.append(content[start:stop].tolist())
            spans.append(embedded_range(feature.mm_position))
        full, index = grow(input_tokens, spans, regions)
        positions = torch.arange(len(full))[None]
        if self.grip.axes > 1:
            firsts = [index[start] for start, _ in spans]
            grown = [
                dataclasses.replace(feature, mm_position=PlaceholderRange(offset=first, length=len(region)))
                for feature, first, region in zip(mm_features, firsts, regions, strict=True)
            ]
            positions, _ = super().get_mrope_input_positions(full, grown)  # type: ignore[misc]
        return positions[:, index].contiguous(), int(positions.max()) + 1 - len(input_tokens)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Embeddings [L, D] of a step's tokens."""
        if self.grip is not None and is_multimodal is not None:
            multimodal_embeddings = self.grip.remember(multimodal_embeddings or (), is_multimodal)
        return super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the language model."""
        if self.grip is None:
            return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]
        output = super().forward(input_ids, self.grip.move(positions), *args, **kwargs)  # type: ignore[misc]
        self.grip.rest()
        return output

    def load_weights(self, weights: Any) -> Any:
        """Load weights, perhaps in place of others."""
        if self.grip is not None:
            self.grip.encoded.clear()
        return super().load_weights(weights)  # type: ignore[misc]
