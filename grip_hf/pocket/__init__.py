"""The pocket testbed: composed scenes, questions with known evidence, and a small LLaVA trained on them."""

from grip_hf.pocket.model import load_pocket, load_pocket_llava
from grip_hf.pocket.scenes import Scene, make_scene

__all__ = ["Scene", "load_pocket", "load_pocket_llava", "make_scene"]
