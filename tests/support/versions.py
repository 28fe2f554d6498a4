"""What differs between the releases that the tests run on: the one place of versions in the tests."""

import pytest
import transformers
import trl
from packaging.version import Version

RELEASE = Version(transformers.__version__)


def before(release):
    """Whether the installed transformers is older than a release."""
    return Version(release) > RELEASE


# Families that came later than the lowest release that is supported, with the release that brought them.
SINCE = {"molmo2": "5.20"}
ABSENT = {family for family, release in SINCE.items() if before(release)}

# What ViP-LLaVA's config calls the layers of the vision tower that it reads.
VIPLLAVA_LAYERS = "vision_feature_layers" if before("5.23") else "vision_feature_layer"

# Training and `grip-hf eval` give the model pictures that were encoded before, which transformers takes since then.
TRAINING_SINCE = "5.18"
NO_TRAINING = before(TRAINING_SINCE)
TRAINING = pytest.mark.skipif(NO_TRAINING, reason=f"training needs transformers >= {TRAINING_SINCE}")

# TRL asks the policy for logits before, and multiplies hidden states with the head itself since then.
FUSED_SINCE = "1.15"
FUSED = pytest.mark.skipif(Version(trl.__version__) < Version(FUSED_SINCE), reason=f"TRL >= {FUSED_SINCE} does that")
