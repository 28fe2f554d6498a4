"""What differs between the releases that the tests run on: the one place of versions in the tests.

`faults` says what the *unpatched* model gets wrong in the installed release of transformers, though not in the newest.
Nothing is skipped for it: `matrix.lacking` runs the unpatched model as a control, which must fail there.
"""

import peft
import pytest
import transformers
import trl
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

RELEASE = Version(transformers.__version__)


def before(release):
    """Whether the installed transformers is older than a release."""
    return Version(release) > RELEASE


# Families that came later than the lowest release that is supported, with the release that brought them.
SINCE = {"molmo2": "5.20"}
ABSENT = {family for family, release in SINCE.items() if before(release)}

# The KV cache among the arguments of a model; 5.24 takes the old name too, and warns.
CACHE = "past_key_values" if before("5.24") else "cache"
# What ViP-LLaVA's config calls the layers of the vision tower that it reads.
VIPLLAVA_LAYERS = "vision_feature_layers" if before("5.23") else "vision_feature_layer"
# Gemma 4 takes the frames of all videos in a row, not per video.
FLAT_FRAMES = not before("5.19")
# `reset` empties a dynamic cache; before, it fills it with zeros and leaves its length.
RESET_EMPTIES = not before("5.18")

# Training and `grip-hf eval` give the model pictures that were encoded before, which transformers takes since then.
# `generate` encodes pictures before its first call since the same release.
TRAINING_SINCE = "5.18"
NO_TRAINING = before(TRAINING_SINCE)
TRAINING = pytest.mark.skipif(NO_TRAINING, reason=f"training needs transformers >= {TRAINING_SINCE}")

# TRL asks the policy for logits before, and multiplies hidden states with the head itself since then.
FUSED_SINCE = "1.15"
FUSED = pytest.mark.skipif(Version(FUSED_SINCE) > Version(trl.__version__), reason=f"TRL >= {FUSED_SINCE} does that")

# Before, TRL's SFTTrainer fails on pictures, patched or not, with a loss outside the model and with assistant-only
# loss: 1.12 does so, 1.16 does not.
SFT_OUTSIDE = Version(trl.__version__) >= Version("1.16")

# Whether transformers itself saves adapters with the PEFT that is installed; 5.24 asks for one that is not out.
SAVES_ADAPTERS = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)

EVERY = "every family"
# Beams get each other's pictures if a prompt has several, or prompts have unequal numbers of them.
_UNSPLIT = (
    *("aria", "aya_vision", "cohere2_vision", "deepseek_vl", "exaone4_5", "fast_vlm", "gemma3n", "gemma4", "got_ocr2"),
    *("internvl", "janus", "lfm2_vl", "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision"),
    *("mistral3", "ovis2", "paligemma", "paligemma2", "perception_lm", "qianfan_ocr", "video_llava", "vipllava"),
)
_UNSPLIT_518 = (
    *("ernie4_5_vl_moe", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "idefics2", "idefics3", "qwen2_5_vl", "qwen2_vl"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "smolvlm", "video_llama_3"),
)
# check -> (since, before, families): what the unpatched model gets wrong in these releases.
_FAULTS = {
    "chunked prefill": [("5", "5.23", EVERY)],
    "beam search": [
        ("5", "5.18", _UNSPLIT),
        ("5.18", "5.19", (*_UNSPLIT, *_UNSPLIT_518)),
        ("5.19", "5.21", ("aria", "exaone4_5", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "qwen3_5", "qwen3_5_moe")),
    ],
    "beams of one picture": [
        ("5", "5.18", ("exaone4_5",)),
        ("5.18", "5.19", ("exaone4_5", "idefics3", "qwen3_5", "qwen3_5_moe", "smolvlm")),
        ("5.19", "5.21", ("exaone4_5", "qwen3_5", "qwen3_5_moe")),
    ],
    "no cache": [("5", "5.18", ("paligemma", "paligemma2"))],
    "static cache": [("5", "5.17", ("gemma3",)), ("5", "5.23", ("gemma4", "molmo2"))],
    "packed rows": [("5", "5.24", ("molmo2", "paligemma", "paligemma2"))],
    "video": [("5.19", "5.23", ("gemma4",))],  # the number of frames does not reach the tower
}
# Faults of the newest release that older ones have not: (before, families).
_LATER = {
    "packed rows": [("5.23", ("gemma3", "gemma4"))],
    "beam search": [("5.18", ("glm46v", "glm4v", "glm4v_moe", "glm_ocr"))],
}


def faults(check, family):
    """Whether the unpatched model gets this wrong in the installed release, though not in the newest."""
    return any(
        not before(since) and before(until) and (families == EVERY or family in families)
        for since, until, families in _FAULTS.get(check, ())
    )


def not_yet(check, family):
    """Whether the newest release has a fault here that the installed one has not."""
    return any(before(since) and family in families for since, families in _LATER.get(check, ()))
