"""The independent reference for rows that leave the vision tower: the unpatched tower with those rows masked out.

Its attention is one of its own, in plain torch, that hides keys; the rows that are gone hold NaN from the layer on
that lacks them, so that whatever is made of one of them shows it.
"""

import contextlib
import copy

import tiny
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grip_hf.engine.upstream import attention_module
from grip_hf.families.table import find_parts
from grip_hf.tower import drop
from grip_hf.tower.facts import find_tower

NAME = "tower_reference"


class Masked:
    """The attention function: hides the keys of the rows that are gone.

    Attributes:
        gone: [P, S] or [S] bool, or None.
        start: The first of the packed rows that have not been attended to yet.
    """

    gone = None
    start = 0

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        count = query.shape[2]
        scores = query @ key.transpose(2, 3) * scaling
        if attention_mask is not None:
            real = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            scores = scores.masked_fill(~real, -torch.inf)
        if self.gone is not None:
            gone = self.gone if self.gone.ndim == 2 else self.gone[None, self.start : self.start + count]
            self.start += count
            scores = scores.masked_fill(gone[:, None, None], -torch.inf)
            value = value.masked_fill(gone[:, None, :, None], 0)
        weights = scores.softmax(-1).nan_to_num(0)
        return (weights @ value).transpose(1, 2).contiguous(), weights


@contextlib.contextmanager
def watched():
    """Within the block, the plans of a patched model's tower are collected: [(plan, encoder), ...]."""
    seen, own = [], drop.choose

    def choose(*args):
        seen.append(own(*args))
        return seen[-1]

    drop.choose = choose
    try:
        yield seen
    finally:
        drop.choose = own


def rows_gone(plan):
    """[P, S] or [S] bool."""
    gone = torch.ones(*plan.index.shape[:-1], plan.length, dtype=torch.bool)
    return gone.scatter(-1, plan.index, False)


@contextlib.contextmanager
def masked_tower(model, plans, depth=None):
    """Within the block, the tower of an unpatched model lacks the rows that each plan says, in the order of its calls.

    Gives a list that gets, per call of the language model, [B, L] bool: the embeddings made of rows that are gone.
    """
    parts = find_parts(model)
    tower = find_tower(parts, depth)
    queue, masked, dead = [rows_gone(plan) for plan in plans], Masked(), []
    ALL_ATTENTION_FUNCTIONS.register(NAME, masked)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)
    modules = [attention_module(layer) for layer in tower.layers]
    kernels = [(one.config, one.config._attn_implementation) for one in modules]
    for config, _ in kernels:
        config._attn_implementation = NAME
    current = []

    def enter(module, args, kwargs):
        current[:] = [queue.pop(0)]

    def whole(module, args, kwargs):
        masked.gone = None

    def lacking(module, args, kwargs):
        masked.gone, masked.start = current[0], 0

    def lose(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = hidden.masked_fill(current[0][..., None], torch.nan)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def read(module, args, kwargs):
        dead.append(kwargs["inputs_embeds"].isnan().any(-1))
        deep = kwargs.get("deepstack_visual_embeds")
        fixed = {"inputs_embeds": kwargs["inputs_embeds"].nan_to_num(0)}
        if deep is not None:
            fixed["deepstack_visual_embeds"] = [one.nan_to_num(0) for one in deep]
        return args, {**kwargs, **fixed}

    hooks = [
        tower.module.register_forward_pre_hook(enter, with_kwargs=True),
        tower.layers[tower.first].register_forward_pre_hook(lose, with_kwargs=True),
        parts.language_model.register_forward_pre_hook(read, with_kwargs=True),
    ]
    hooks += [
        one.register_forward_pre_hook(whole if number < tower.first else lacking, with_kwargs=True)
        for number, one in enumerate(modules)
    ]
    try:
        yield dead
    finally:
        for hook in hooks:
            hook.remove()
        for config, kernel in kernels:
            config._attn_implementation = kernel
        ALL_ATTENTION_FUNCTIONS._global_mapping.pop(NAME)
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping.pop(NAME)


def build_deep(family, depth=3, attention="sdpa"):
    """A tiny model whose vision tower has more layers."""
    config = copy.deepcopy(tiny.TINY[family].config())
    vision = config.vision_config
    setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", depth)
    if getattr(vision, "fullatt_block_indexes", None):
        vision.fullatt_block_indexes = [0, 2]  # rows leave before a layer that attends within windows
    torch.manual_seed(0)
    return tiny.make(family, attention, torch.float32, config)


def by_content(batch):
    """A tower selector: scores depend on each row alone, without ties."""
    return (batch.tokens * torch.linspace(-1, 1, batch.tokens.shape[-1])).sum(-1)
