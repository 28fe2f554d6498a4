"""Fewer visual tokens for Hugging Face vision-language models.

Names are loaded when they are first used, so that `import grip_hf` and `grip-hf --help` do not wait for torch. With
the first name that needs transformers, `AutoConfig` and `AutoModel` learn the model type `grip_scorer`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from . import errors
    from .config import GripConfig
    from .engine.keepsets import VisualBatch
    from .handle import GripHandle
    from .patch import apply_grip, remove_grip
    from .scorer.model import GripScorer
    from .selectors import register
    from .selectors.base import Selector


_HOMES = {
    "GripConfig": "config",
    "GripHandle": "handle",
    "GripScorer": "scorer.model",
    "Selector": "selectors.base",
    "VisualBatch": "engine.keepsets",
    "apply_grip": "patch",
    "register": "selectors",
    "remove_grip": "patch",
}
__all__ = [
    "GripConfig",
    "GripHandle",
    "GripScorer",
    "Selector",
    "VisualBatch",
    "__version__",
    "apply_grip",
    "errors",
    "register",
    "remove_grip",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        return import_module(".errors", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name != "GripConfig":
        import_module(".scorer", __name__)  # registers the scorer's model type
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
