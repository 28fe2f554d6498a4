"""Fewer visual tokens for Hugging Face vision-language models."""

from .config import GripConfig
from .patch import apply_grip, remove_grip
from .scorer.model import GripScorer

__all__ = ["GripConfig", "GripScorer", "apply_grip", "remove_grip"]
