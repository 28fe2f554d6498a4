"""Names of arguments, outputs and kinds of layers in transformers, and since when each holds."""

from __future__ import annotations

from operator import attrgetter

import transformers
from packaging.version import Version
from transformers.masking_utils import find_packed_sequence_indices

from ...errors import UnsupportedModelError

# The releases that CI runs the fast suite on.
TESTED = ("5.16.1", "5.19.0", "5.24.0")

# The KV cache among arguments and outputs: `cache` since 5.24, `past_key_values` before (an alias until 5.40).
CACHE_NAMES = ("cache", "past_key_values")
# The cache of continuous batching, which is none of transformers' other caches.
PAGED = "PagedAttentionCache"
# Pictures that were encoded before the call, and the release that brought them.
ENCODED, ENCODED_SINCE = "mm_encoder_outputs", "5.18"
# What language models read of them: one row per visual token, and the same of earlier layers of the tower.
FEATURES, DEEPSTACK = "pooler_output", "deepstack_features"
# Arguments with which pictures or videos come, and the methods that encode them.
PICTURES = ("pixel_values", "image_hidden_states")
ENCODERS = ("get_image_features", "get_video_features")
# Of vision towers: the pictures' frames, rows and columns of patches, where they are packed and where they are padded;
# cumulative lengths of packed sequences (the longest of them, `max_seqlen`, is a bound that may stay); attention masks
# that have no rows to cut.
GRID, SHAPES, LENGTHS = "grid_thw", "spatial_shapes", ("cu_seqlens",)
OPAQUE_MASKS = ("BlockMask",)
# What a call of the language model must be able to take; all else is passed on or refused.
NEEDED = ("inputs_embeds", "attention_mask", "position_ids")
# Kinds of tokens [B, L]: 0 is text.
TOKEN_TYPES = "mm_token_type_ids"
# Arguments of the language model with one entry per token, [B, L, ...].
PER_TOKEN = ("per_layer_inputs", "token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
# Those that are passed on as they are, and those that have code of their own.
UNTOUCHED = ("labels", "shift_labels", "input_ids", "logits_to_keep")
HANDLED = (*NEEDED, "visual_pos_masks", "deepstack_visual_embeds")
# Layers that carry a state from token to token; their mask is that of the call's own tokens, [B, L], or None.
RECURRENT = ("linear_attention", "conv")
# Kinds of layers, as masks by kind name them.
FULL, SLIDING = "full_attention", "sliding_attention"
# What the router of each layer's experts said of each token, in outputs [B * L, experts].
ROUTER_LOGITS = "router_logits"
# Where a decoder layer has its attention.
ATTENTION = ("self_attn", "attention", "attn")

# What says of a transformers model that its own `load_adapter` or `add_adapter` gave it some.
ADAPTERS_LOADED = "_hf_peft_config_loaded"

# Name of the attention implementation of a config.
KERNEL = "_attn_implementation"
attention_kernel = attrgetter(KERNEL)
# Sequence numbers [B, L] of positions that jump, as transformers tells packed sequences apart; None if there is one.
packed_segments = find_packed_sequence_indices


def versions() -> str:
    """The installed and the tested releases of transformers, for messages."""
    return f"transformers {transformers.__version__} is installed, {TESTED[0]} to {TESTED[-1]} are tested"


def is_untested() -> bool:
    """Whether the installed transformers is newer than the newest tested."""
    return Version(transformers.__version__) > Version(TESTED[-1])


def unknown(what: str) -> UnsupportedModelError:
    """The error for something upstream that is not as grip_hf knows it."""
    return UnsupportedModelError(f"{what} ({versions()})")
