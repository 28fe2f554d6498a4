"""The independent reference of `grip_hf.doctor`, for tests."""

from grip_hf.doctor.reference import (
    LOOSE,
    assert_close,
    held_positions,
    is_recurrent,
    lengthen_types,
    logits_of_what_stays,
    original_positions,
    positions_and_next,
    reference_generate,
    reference_logits,
    visual_mask,
)

__all__ = ["LOOSE", "assert_close", "held_positions", "is_recurrent", "lengthen_types", "logits_of_what_stays"]
__all__ += ["original_positions", "positions_and_next", "reference_generate", "reference_logits", "visual_mask"]
