"""The learned scorer."""

from .model import GripScorer, GripScorerConfig

__all__ = ["GripScorer", "GripScorerConfig"]
