"""Vision towers: where their attention is, and which patches make which visual token."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Tower:
    """What a tap must know about the vision tower of one model.

    Attributes:
        module: Name of the tower in the base model.
        attended: Class that computes features from the input of an attention module.
        layer: Index of the attention layer whose output the language model gets.
        prefix: Leading tokens that are no patches; with 1 it is a [CLS] token.
        keep_prefix: Whether they are visual tokens of the language model too.
        merge: Patches on a side of the square that makes one visual token.
        window: Visual tokens on a side of an attention window, if the tower reorders patches by window; else 0.
    """

    module: str
    attended: Callable[..., Attended | PackedAttended]
    layer: int = -1
    prefix: int = 0
    keep_prefix: bool = False
    merge: int = 1
    window: int = 0


def attention_received(query: Tensor, key: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention that each key gets, averaged over heads and queries.

    Args:
        query: [B, Q, H, C] queries.
        key: [B, S, H, C] keys.
        scale: Factor of their products.
        mask: [B, S] bool, True at real keys; where Q = S also the real queries.

    Returns:
        [B, S] float32.
    """
    query, key = query.float().transpose(1, 2), key.float().transpose(1, 2)
    asks = query.new_ones(len(query), query.shape[2])
    if mask is not None and query.shape[2] == key.shape[2]:
        asks = mask.to(asks)
    total = query.new_zeros(len(key), key.shape[2])
    for start in range(0, query.shape[2], CHUNK):
        logits = query[:, :, start : start + CHUNK] @ key.transpose(2, 3) * scale
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
        total += (logits.softmax(-1) * asks[:, None, start : start + CHUNK, None]).sum(dim=(1, 2))
    return total / (query.shape[1] * asks.sum(1, keepdim=True))


class Attended:
    """Features of one attention layer over a batch of pictures of equal size.

    Args:
        tower: Facts of the tower.
        module: The attention module.
        hidden: [B, S, D] its input.
        kwargs: Its keyword arguments.
    """

    def __init__(self, tower: Tower, module: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        self.tower, self.module, self.hidden = tower, module, hidden
        self.mask = real_keys(kwargs.get("attention_mask"))

    def _projected(self, which: str, hidden: Tensor) -> Tensor:
        """[B, S, H, C] queries ("q") or keys ("k")."""
        values = getattr(self.module, f"{which}_proj")(hidden)
        norm = getattr(self.module, f"{which}_norm", None)
        return (values if norm is None else norm(values)).unflatten(-1, (self.module.num_heads, -1))

    def _received(self, asking: Tensor) -> Tensor:
        query, key = self._projected("q", asking), self._projected("k", self.hidden)
        return attention_received(query, key, self.module.scale, self.mask)

    def mean_keys(self) -> Tensor:
        """[B, S, C] keys, averaged over heads."""
        return self._projected("k", self.hidden).mean(-2)

    def keys(self) -> Tensor:
        """[B, S, D] keys of all heads."""
        return self._projected("k", self.hidden).flatten(-2)

    def joint_salience(self) -> Tensor:
        """[B, S] attention as in `salience`, but as if all heads were one."""
        asking = self.hidden[:, :1] if self.tower.prefix else self.hidden
        query, key = self._projected("q", asking).flatten(-2)[:, :, None], self.keys()[:, :, None]
        return attention_received(query, key, key.shape[-1] ** -0.5, self.mask)

    def salience(self) -> Tensor:
        """[B, S] attention that each token gets: from [CLS] if there is one, else from all tokens on average."""
        return self._received(self.hidden[:, :1] if self.tower.prefix else self.hidden)

    def attention(self) -> Tensor:
        """[B, S] attention that each token gets from all tokens on average."""
        return self._received(self.hidden)

    def per_token(self, values: Tensor) -> Tensor:
        """Values [B, S, ...] of patches to [visual tokens, ...], in the order in which the language model gets them.

        A visual token that is made of several patches gets their mean.
        """
        if not self.tower.keep_prefix:
            values = values[:, self.tower.prefix :]
        merge = self.tower.merge
        if merge > 1:
            side = math.isqrt(values.shape[1]) // merge
            values = values.unflatten(1, (side, merge, side, merge)).mean((2, 4)).flatten(1, 2)
        return values.flatten(0, 1)


class PackedAttended:
    """Features of one attention layer over pictures of any size, one after the other (Qwen2-VL and its relatives).

    Attention is counted in multiples of the average in its picture, so that pictures of different size compare.

    Args:
        tower: Facts of the tower.
        module: The attention module.
        hidden: [S, D] its input.
        kwargs: Its keyword arguments.
    """

    def __init__(self, tower: Tower, module: Any, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        self.tower, self.module, self.grid = tower, module, getattr(_grids, "last", None)
        self.lengths = kwargs["cu_seqlens"].diff().tolist()
        query, key, _ = module.qkv(hidden).unflatten(-1, (3, module.num_heads, -1)).float().unbind(1)
        cos, sin = (angle.float()[:, None] for angle in kwargs["position_embeddings"])
        self.query, self.key = query * cos + _turned(query) * sin, key * cos + _turned(key) * sin

    def mean_keys(self) -> Tensor:
        """[S, C] keys, averaged over heads."""
        return self.key.mean(-2)

    def attention(self) -> Tensor:
        """[S] attention that each patch gets from all patches of its picture."""
        pairs = zip(self.query.split(self.lengths), self.key.split(self.lengths), strict=True)
        found = [len(k) * attention_received(q[None], k[None], self.module.scaling)[0] for q, k in pairs]
        return torch.cat(found)

    salience = attention

    def per_token(self, values: Tensor) -> Tensor:
        """Values [S, ...] of patches to [visual tokens, ...]: those of one token lie next to each other."""
        values = values.unflatten(0, (-1, self.tower.merge**2)).mean(1)
        if not self.tower.window:
            return values
        assert self.grid is not None
        order = window_order(self.grid, self.tower.merge, self.tower.window)
        return torch.empty_like(values).index_copy(0, order.to(values.device), values)


def _turned(values: Tensor) -> Tensor:
    """Each pair (first half, second half) turned by a right angle, as rotary positions need it."""
    first, second = values.chunk(2, -1)
    return torch.cat([-second, first], -1)


def real_keys(mask: Tensor | None) -> Tensor | None:
    """[B, S] bool, the keys that a bidirectional attention mask allows: 2-D, or 4-D of bools or of numbers to add."""
    if mask is None:
        return None
    mask = mask if mask.ndim == 2 else mask[:, 0, 0]
    return mask == 0 if mask.is_floating_point() else mask.bool()


_grids = threading.local()


def remember_grid(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Hook of a tower with windows: remember the pictures' grids for its attention modules, in this thread."""
    _grids.last = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]


def window_order(grid: Tensor, merge: int, window: int) -> Tensor:
    """[visual tokens] long: where each token, in the order of windows, lies in the order of rows.

    Args:
        grid: [pictures, 3] frames, rows and columns of patches.
        merge: Patches on a side of a token.
        window: Tokens on a side of a window.
    """
    orders, start = [], 0
    for frames, rows, columns in grid.tolist():
        rows, columns = rows // merge, columns // merge
        t, y, x = (
            axis.flatten() for axis in torch.meshgrid(*map(torch.arange, (frames, rows, columns)), indexing="ij")
        )
        key = ((t * rows + y // window) * columns + x // window) * window**2 + (y % window) * window + x % window
        orders.append(key.argsort(stable=True) + start)
        start += len(key)
    return torch.cat(orders)


def feature_layer(config: Any) -> int:
    """Index of the last attention layer whose output enters the projector.

    The config counts the hidden states between layers, of which the first is the input of the first layer.
    """
    chosen = config.vision_feature_layer
    chosen, depth = [chosen] if isinstance(chosen, int) else chosen, config.vision_config.num_hidden_layers
    return max(index - 1 if index >= 0 else depth + index for index in chosen)


def _llava(config: Any) -> Tower:
    prefix, full = PREFIX[config.vision_config.model_type], config.vision_feature_select_strategy == "full"
    return Tower("vision_tower", Attended, feature_layer(config), prefix, keep_prefix=full)


def _internvl(config: Any) -> Tower:
    return Tower("vision_tower", Attended, feature_layer(config), 1, merge=round(1 / config.downsample_ratio))


def _idefics(config: Any) -> Tower:
    return Tower("vision_model", Attended, merge=config.scale_factor)


def _qwen2(config: Any) -> Tower:
    return Tower("visual", PackedAttended, merge=config.vision_config.spatial_merge_size)


def _qwen2_5(config: Any) -> Tower:
    vision = config.vision_config
    window = vision.window_size // vision.spatial_merge_size // vision.patch_size
    # The other layers attend within windows only.
    layer = max(vision.fullatt_block_indexes)
    return Tower("visual", PackedAttended, layer, merge=vision.spatial_merge_size, window=window)


# Leading tokens by `model_type` of the vision config, and facts by `model_type` of the model.
PREFIX = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "internvl_vision": 1,
    "idefics3_vision": 0,
    "smolvlm_vision": 0,
    "qwen2_vl_vision": 0,
    "qwen2_5_vl_vision": 0,
}
TOWERS: dict[str, Callable[[Any], Tower]] = {
    "llava": _llava,
    "internvl": _internvl,
    "idefics3": _idefics,
    "smolvlm": _idefics,
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
}
