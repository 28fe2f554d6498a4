"""Fewer visual tokens for Hugging Face vision-language models."""

from .config import GripConfig

__all__ = ["GripConfig"]
