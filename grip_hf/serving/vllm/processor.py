"""The front end's part: how many tokens a request's pictures keep, and what makes two keep-sets the same.

Budget and question join the processor's arguments, which vLLM makes the keys of its processor, encoder and prefix
caches of. The question joins them only if the selector reads it, so that others share one keep-set per picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.multimodal.parse import EmbeddingItems
from vllm.multimodal.processing import PromptUpdateDetails

from ...config import count_kept
from ...errors import ConfigError
from .families import SERVED, Served
from .positions import embedded_span
from .settings import NAME, Settings, asked, placeholder_ids

BUDGET, QUESTION, DIGEST, DUMMY = "grip_budget", "grip_question", "grip_settings", "grip_dummy"
CONTENT, KEPT, TEXT, PICTURE = FIELDS = ("grip_content", "grip_kept", "grip_text", "grip_picture")
ADDED = (NAME, BUDGET, QUESTION, DIGEST, DUMMY)
EVERYTHING = {"keep_ratio": 1.0}
PICTURES = "image"


@dataclasses.dataclass
class Pruned(PromptUpdateDetails):
    """What stands for a pruned picture in a prompt.

    Attributes:
        dropped: how many tokens are missing.
    """

    dropped: int = 0


class GripInfo:
    """Mixin of a processing info: pictures only."""

    @property
    def allowed_mm_limits(self) -> Mapping[str, int]:
        """The stock limit of pictures, and none of anything else, so that nothing else is profiled."""
        allowed = super().allowed_mm_limits  # type: ignore[misc]
        return {modality: limit if modality == PICTURES else 0 for modality, limit in allowed.items()}

    def validate_num_items(self, modality: str, num_items: int) -> None:
        """Refuse whatever is no picture."""
        if modality != PICTURES and num_items:
            raise ConfigError(f"grip_hf prunes pictures only; this server does not take {modality} input")
        super().validate_num_items(modality, num_items)  # type: ignore[misc]


class GripProcessor:
    """Mixin of a multi-modal processor: replaces a placeholder by as many tokens as the picture keeps."""

    grip: Settings
    served: Served
    info: Any

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Inputs for profiling: a request may ask for all tokens of a picture."""
        inputs = super().get_dummy_inputs(*args, **kwargs)  # type: ignore[misc]
        return dataclasses.replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, NAME: EVERYTHING})

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Process a request.

        Raises:
            ConfigError: Its budget is not allowed, it shares a budget over several pictures, holds something else
                than pictures, or is longer than the model's positions. vLLM answers with status 400.
        """
        given, kwargs = inputs.hf_processor_mm_kwargs.get(NAME), _stock(inputs.hf_processor_mm_kwargs)
        ratio, number = self.grip.budget(given)
        pictures = self._pictures(inputs.mm_data_items)
        if pictures > 1 and self.grip.config.scope != "image" and ratio != 1:
            raise ConfigError(
                f"{pictures} pictures cannot share one budget, since vLLM encodes them one by one: serve with "
                f"{{{NAME!r}: {{'scope': 'image'}}}}, or ask for keep_ratio 1"
            )
        kwargs |= {BUDGET: [ratio or 0.0, number or 0], DIGEST: self.grip.digest, DUMMY: given is EVERYTHING}
        if self.grip.reads_question and ratio != 1:
            kwargs[QUESTION] = np.array(self._question(inputs), dtype=np.int64).tobytes()
        return super().apply(  # type: ignore[misc]
            dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx
        )

    def _pictures(self, items: Any) -> int:
        for modality, group in items.items():
            if not len(group):
                continue
            if modality != PICTURES or isinstance(group, EmbeddingItems):
                raise ConfigError(f"grip_hf prunes pictures only, not {modality} input of {type(group).__name__}")
        return items.get_all_counts().get(PICTURES, 0)

    def _question(self, inputs: Any) -> list[int]:
        """The ids of all tokens of the unpruned prompt but the visual ones."""
        ids = inputs.prompt
        if self.served.markers:
            stock = _stock(inputs.hf_processor_mm_kwargs)
            pictures = _OnePatchEach(self._pictures(inputs.mm_data_items))
            updates = super()._get_mm_prompt_updates(inputs.mm_data_items, stock, pictures)  # type: ignore[misc]
            ids, _ = super()._apply_prompt_updates(super()._postprocess_prompt(ids), updates)  # type: ignore[misc]
        visual = placeholder_ids(self.info.get_hf_config())
        return [token for token in ids if token not in visual]

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        return super()._apply_hf_processor_main(mm_items, _stock(hf_kwargs))  # type: ignore[misc]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Any:
        return super()._get_mm_fields_config(hf_inputs, _stock(hf_processor_mm_kwargs))  # type: ignore[misc]

    def _get_mm_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Any:
        """The stock updates with fewer visual tokens; each picture's item gets what its encoder needs to choose."""
        stock = _stock(hf_processor_mm_kwargs)
        updates = super()._get_mm_prompt_updates(mm_items, stock, out_mm_kwargs)  # type: ignore[misc]
        ratio, number = hf_processor_mm_kwargs[BUDGET]
        text = np.frombuffer(hf_processor_mm_kwargs.get(QUESTION, b""), dtype=np.int64)
        question = torch.tensor([0, *text.tolist()])  # vLLM cannot send a tensor of nothing
        ids = torch.tensor(placeholder_ids(self.info.get_hf_config()))

        def prune(item: Any, picture: torch.Tensor, update: Any) -> Any:
            content = torch.tensor(update.content.full)
            visual = torch.isin(content, ids)
            total = int(visual.sum())
            kept = count_kept(total, ratio or None, number or None)
            for name, value in zip(FIELDS, (content, torch.tensor(kept), question, picture), strict=True):
                item[name] = MultiModalFieldElem(data=value, field=MultiModalBatchedField(keep_on_cpu=True))
            return dataclasses.replace(update, content=shorten(content, visual, total - kept))

        items, groups = out_mm_kwargs.get(PICTURES, []), updates.get(PICTURES, [])
        pruned = [
            [prune(item, picture, one) for one in group]
            for item, picture, group in zip(items, self._prints(mm_items, hf_processor_mm_kwargs), groups, strict=True)
        ]
        return {**updates, PICTURES: pruned} if PICTURES in updates else updates

    def _prints(self, mm_items: Any, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """For each picture [4] long, a fingerprint of what its encoder sees, whatever is asked about it.

        Those of profiling have none, so that each is encoded, although they are all the same.
        """
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        pictures = mm_items[PICTURES].get_all_items_for_hash() if PICTURES in mm_items else []
        if kwargs[DUMMY]:
            return [torch.zeros(4, dtype=torch.long)] * len(pictures)
        stock = _stock(kwargs)
        prints = [MultiModalHasher.hash_kwargs(algorithm, image=picture, kwargs=stock) for picture in pictures]
        return [torch.frombuffer(bytearray.fromhex(one)[:32], dtype=torch.int64) for one in prints]

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        """Refuse prompts whose original positions lie beyond those that the model knows."""
        prompt, placeholders = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        limit = known_positions(self.info.ctx.model_config)
        full = len(prompt) + sum(group[0].content.dropped for group in mm_res.prompt_updates.get(PICTURES, []))
        if limit is not None and full > limit:
            raise ConfigError(
                f"this prompt is {full} tokens long before its pictures are pruned; its tokens keep their positions, "
                f"of which this model knows {limit}"
            )
        return prompt, placeholders


class _OnePatchEach:
    """Stands in for processed pictures where only the tokens around them are asked for."""

    def __init__(self, pictures: int) -> None:
        self.pictures = pictures

    def get_data(self) -> dict[str, torch.Tensor]:
        """As `MultiModalKwargsItems.get_data`."""
        return {"image_num_patches": torch.ones(self.pictures, dtype=torch.long)}


def known_positions(model_config: Any) -> int | None:
    """How many positions a model knows; None for M-RoPE, where pictures use up few of them."""
    text = model_config.hf_text_config
    return text.max_position_embeddings if getattr(model_config.hf_config, "mrope_section", None) == [1] else None


def shorten(content: torch.Tensor, visual: torch.Tensor, dropped: int) -> Pruned:
    """A picture's content [R] with fewer tokens between its first and its last visual one.

    All that is left between them is embedded by the picture, other tokens too: where these stand among the kept ones
    is not known yet.
    """
    start, stop = embedded_span(content, visual)
    token = int(content[start])
    full = [*content[:start].tolist(), *[token] * (stop - start - dropped), *content[stop:].tolist()]
    mask = torch.zeros(len(full), dtype=torch.bool)
    mask[start : len(full) - (len(content) - stop)] = True
    whole = bool(mask.all())
    return Pruned(full=full, is_embed=None if whole else _Mask(mask), dropped=dropped)


@dataclasses.dataclass(frozen=True)
class _Mask:
    """A fixed `is_embed`; unlike a closure it can be pickled."""

    mask: torch.Tensor

    def __call__(self, full: Sequence[int]) -> torch.Tensor:
        return self.mask


def _stock(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments without those that are ours."""
    return {name: value for name, value in kwargs.items() if name not in ADDED}


@cache
def _mixed(mixin: type, stock: type) -> type:
    return type(f"Grip{stock.__name__}", (mixin, stock), {})


def factories(stock: Any, architecture: str) -> dict[str, Callable[..., Any]]:
    """What to register for a class in place of its stock factories, whose work it is if nothing is pruned."""

    def info(ctx: Any) -> Any:
        made = stock.info(ctx)
        hf_config = ctx.model_config.hf_config  # vLLM asks for the limits before settings are settled
        pruned = asked(hf_config) or Settings.of(hf_config) is not None
        stock_class: type = type(made)
        return _mixed(GripInfo, stock_class)(ctx) if pruned else made

    def processor(info: Any, dummy_inputs: Any) -> Any:
        made = stock.processor(info, dummy_inputs)
        settings = Settings.of(info.ctx.model_config.hf_config)
        if settings is None:
            return made
        stock_class: type = type(made)
        pruning = _mixed(GripProcessor, stock_class)(info, dummy_inputs)
        pruning.grip, pruning.served = settings, SERVED[architecture]
        return pruning

    return {"info": info, "processor": processor, "dummy_inputs": stock.dummy_inputs}
