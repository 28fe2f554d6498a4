"""The learned scorer. Importing it tells transformers' auto classes of the model type `grip_scorer`."""

from transformers import AutoConfig, AutoModel

from .model import GripScorer, GripScorerConfig

__all__ = ["GripScorer", "GripScorerConfig"]

AutoConfig.register(GripScorerConfig.model_type, GripScorerConfig, exist_ok=True)
AutoModel.register(GripScorerConfig, GripScorer, exist_ok=True)
