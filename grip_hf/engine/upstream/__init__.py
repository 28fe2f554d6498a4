"""What grip_hf knows of transformers: names of arguments, outputs and cache methods, and since when each holds.

No other folder holds such a name. Names are resolved from the modules at hand when a model is patched; one that cannot
be resolved raises, so that a rename upstream never reads as "there is none".
"""

from .calls import (
    check_mask_sizes,
    check_new_cache,
    encoded_outputs,
    first_layer,
    has_adapters,
    has_pictures,
    hidden_states_wanted,
    is_paged,
    is_recurrent,
    mask_sizes,
    only_read,
    per_token_names,
    removed_by_crop,
    router_loss,
    sliding_window,
    static_length,
    uses_cache,
    without_slicing,
)
from .models import (
    attention_module,
    cache_name,
    check_cache_class,
    check_language_model,
    check_takes_encoded,
    key_layers,
    layers_that_cannot_drop,
    parameters,
    parameters_of,
    saves_adapters_alone,
)
from .names import (
    ATTENTION,
    CACHE_NAMES,
    DEEPSTACK,
    ENCODED,
    ENCODERS,
    FEATURES,
    FULL,
    GRID,
    KERNEL,
    LENGTHS,
    NEEDED,
    OPAQUE_MASKS,
    PER_TOKEN,
    RECURRENT,
    ROUTER_LOGITS,
    SHAPES,
    SLIDING,
    TESTED,
    TOKEN_TYPES,
    attention_kernel,
    is_untested,
    packed_segments,
    unknown,
    versions,
)
