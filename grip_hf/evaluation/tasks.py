"""What is evaluated on what: selectors by name, and the pocket testbed's held-out questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..errors import ConfigError, UnsupportedModelError
from ..families.table import find_parts
from ..hub.checkpoint import SUBFOLDER, attached_folder
from ..hub.resolve import check_scorer
from ..pocket.examples import PocketExamples
from ..pocket.testbeds import DEFAULT, POCKET
from ..scorer.model import GripScorer
from ..selectors import SELECTORS, get_selector
from ..selectors.grip import GripSelector
from .downsampling import DOWNSAMPLING, ENLARGED, POOLED
from .methods import Oracle, Pruned
from .runner import Judged
from .shrinking import Enlarged, Pooled, Shrunk

SHIPPED_FOLDER = POCKET.weights.parent / "scorers"  # but for "grip", which is the GRIP part of the pocket checkpoint
SHIPPED = ("grip", "warmup", "relaxed")
ORACLE = "oracle"
SHRINKING = {DOWNSAMPLING: Shrunk, POOLED: Pooled, ENLARGED: Enlarged}
BASELINES = ("random", "grid", "cls_attention", "similarity", "diversity")


def pocket_examples(examples: int, seed: int = 0, testbed: str = DEFAULT.name) -> PocketExamples:
    """Held-out questions about pocket scenes that nothing was trained on, every kind equally often.

    Args:
        examples: Number of questions.
        seed: Which scenes; any integer >= 0.
        testbed: "pocket" or "pocket2".
    """
    return PocketExamples(examples, seed, "test", testbed)


def named_selectors(
    specs: Iterable[str],
    seed: int = 0,
    pocket: bool = True,
    testbed: str = DEFAULT.name,
    own: str | None = None,
) -> dict[str, Judged | list[Judged]]:
    """Selectors from what a user writes.

    Args:
        specs: Each the name of a selector or of `SHRINKING`, `label=folder` for a scorer of your own or
            `label=folder+folder+...` for several trainings of one, for a pocket model also "oracle", and for that of
            the first testbed "grip", "warmup" and "relaxed" (the scorers shipped with it).
        seed: For selectors that draw at random.
        pocket: Whether a pocket model is evaluated.
        testbed: Which one.
        own: Folder of the scorer that came with the model, which is "grip".

    Raises:
        ConfigError: A name is unknown, given twice, or none is given.
        ScorerError: A scorer cannot be loaded.
    """
    found: dict[str, Judged | list[Judged]] = {}
    shipped = SHIPPED if pocket and testbed == POCKET.name else ()
    for spec in specs:
        name, _, folders = spec.partition("=")
        if name in found:
            raise ConfigError(f"selector {name!r} is given twice")
        if folders:
            found[name] = [get_selector("grip", scorer=folder) for folder in folders.split("+")]
        elif name in SHRINKING:
            found[name] = SHRINKING[name]()
        elif pocket and name == ORACLE:
            found[name] = Oracle()
        elif name in shipped:
            found[name] = get_selector("grip", scorer=shipped_scorer(name))
        elif name == "grip" and own is not None:
            found[name] = get_selector("grip", scorer=own)
        elif name in SELECTORS and name != "grip":
            found[name] = get_selector(name, seed=seed)
        else:
            more = [*shipped, ORACLE] if pocket else []
            known = sorted({*SELECTORS, *SHRINKING, *more} - (set() if shipped or own else {"grip"}))
            raise ConfigError(f"selector must be label=folder of a scorer or one of {known}, got {spec!r}")
    if not found:
        raise ConfigError("give at least one selector")
    return found


def choose_selectors(
    model: Any,
    specs: Sequence[str] | None,
    seed: int = 0,
    pocket: bool = True,
    force: bool = False,
    testbed: str = DEFAULT.name,
) -> tuple[dict[str, Judged | list[Judged]], list[str]]:
    """Selectors for a model: those asked for, or its own scorer and baselines.

    Args:
        model: The model, without a patch.
        specs: What a user writes (see `named_selectors`); None takes the scorer that came with the model, if any, and
            those of `BASELINES` that can work with it.
        seed: For selectors that draw at random.
        pocket: Whether it is the pocket model.
        force: Take scorers that were trained for another model.
        testbed: Which pocket model.

    Returns:
        The selectors by name, and the names of baselines that are left out.

    Raises:
        ConfigError, ScorerError: See `named_selectors`; or a scorer was trained for another model.
    """
    first = pocket and testbed == POCKET.name  # it brings its scorers in the package
    own = None if first else attached_folder(model)
    if specs is not None:
        chosen, left_out = named_selectors(specs, seed, pocket, testbed, own), []
    else:
        chosen = named_selectors([*(["grip"] if first or own else []), *BASELINES], seed, pocket, testbed, own)
        left_out = [name for name in BASELINES if not _works(model, chosen[name])]
        chosen = {name: one for name, one in chosen.items() if name not in left_out}
    parts = find_parts(model)
    for found in chosen.values():
        for one in found if isinstance(found, Sequence) else [found]:
            if isinstance(one, GripSelector):
                check_scorer(parts, one.scorer, force)
    return chosen, left_out


def _works(model: Any, one: Any) -> bool:
    try:
        Pruned(one).check(model)
    except UnsupportedModelError:
        return False
    return True


def is_scorer(one: Judged | Sequence[Judged]) -> bool:
    """Whether this is a trained scorer, or several trainings of one."""
    return isinstance(one[0] if isinstance(one, Sequence) else one, GripSelector)


def shipped_scorer(name: str) -> GripScorer:
    """A scorer for the pocket model that comes with the package."""
    return GripScorer.from_pretrained(POCKET.weights / SUBFOLDER if name == "grip" else SHIPPED_FOLDER / name)
