"""Flash attention for machines without: models believe to run it, and plain torch computes what it would."""

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def install(monkeypatch):
    """Put plain torch in the place of flash attention."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", plain_flash)


def switch(model):
    """Let a model run it; returns the model."""
    model.get_decoder().config._attn_implementation = "flash_attention_2"
    return model


def looks_packed(cu_seq_lens_q=None, position_ids=None, **_):
    """Whether flash attention looks for packing: in jumps of positions, if it is not given lengths."""
    return cu_seq_lens_q is None and position_ids is not None


def plain_flash(module, query, key, value, attention_mask, **kwargs):
    """What flash attention computes, in plain torch: a 2-D mask of the keys, or sequences told apart by lengths."""
    assert attention_mask is None or attention_mask.ndim == 2
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attention_mask is not None:  # flash attention cuts the keys to the mask
        keys = attention_mask.shape[1]
        key, value = key[:, :, :keys], value[:, :, :keys]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries).expand(batch, 1, -1, -1)
    if attention_mask is not None:
        seen = seen & attention_mask.bool()[:, None, None]
    elif batch == 1 and queries == keys and looks_packed(**kwargs):
        jumps = (kwargs["position_ids"].diff(dim=-1, prepend=kwargs["position_ids"][:, :1] - 1) != 1).cumsum(-1)
        seen = seen & (jumps[:, :, None] == jumps[:, None])[:, None]
    scores = query @ key.transpose(2, 3) * kwargs["scaling"]
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None
