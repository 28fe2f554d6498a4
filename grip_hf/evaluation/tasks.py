"""What is evaluated on what: selectors by name, and the pocket testbed's held-out questions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import ConfigError
from ..hub.checkpoint import SUBFOLDER
from ..pocket.examples import PocketExamples
from ..pocket.model import WEIGHTS
from ..pocket.testbeds import POCKET
from ..scorer.model import GripScorer
from ..selectors import SELECTORS, get_selector
from ..selectors.grip import GripSelector
from .downsampling import DOWNSAMPLING
from .methods import Downsampling, Oracle
from .runner import Judged

SHIPPED_FOLDER = WEIGHTS.parent / "scorers"  # but for "grip", which is the GRIP part of the pocket checkpoint
SHIPPED = ("grip", "warmup", "relaxed")
ORACLE = "oracle"


def pocket_examples(examples: int, seed: int = 0, testbed: str = POCKET.name) -> PocketExamples:
    """Held-out questions about pocket scenes that nothing was trained on, every family equally often.

    Args:
        examples: Number of questions.
        seed: Which scenes; any integer >= 0.
        testbed: "pocket" or "pocket2".
    """
    return PocketExamples(examples, seed, "test", testbed)


def named_selectors(
    specs: Iterable[str], seed: int = 0, pocket: bool = True, testbed: str = POCKET.name
) -> dict[str, Judged | list[Judged]]:
    """Selectors from what a user writes.

    Args:
        specs: Each the name of a selector, "downsampling", `label=folder` for a scorer of your own or
            `label=folder+folder+...` for several trainings of one, for a pocket model also "oracle", and for that of
            the first testbed "grip", "warmup" and "relaxed" (the scorers shipped with it).
        seed: For selectors that draw at random.
        pocket: Whether a pocket model is evaluated.
        testbed: Which one.

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
        elif name == DOWNSAMPLING:
            found[name] = Downsampling()
        elif pocket and name == ORACLE:
            found[name] = Oracle()
        elif name in shipped:
            found[name] = get_selector("grip", scorer=shipped_scorer(name))
        elif name in SELECTORS and name != "grip":
            found[name] = get_selector(name, seed=seed)
        else:
            own = [*shipped, ORACLE] if pocket else []
            known = sorted({*SELECTORS, DOWNSAMPLING, *own} - (set() if shipped else {"grip"}))
            raise ConfigError(f"selector must be label=folder of a scorer or one of {known}, got {spec!r}")
    if not found:
        raise ConfigError("give at least one selector")
    return found


def is_scorer(one: Judged | Sequence[Judged]) -> bool:
    """Whether this is a trained scorer, or several trainings of one."""
    return isinstance(one[0] if isinstance(one, Sequence) else one, GripSelector)


def shipped_scorer(name: str) -> GripScorer:
    """A scorer for the pocket model that comes with the package."""
    return GripScorer.from_pretrained(WEIGHTS / SUBFOLDER if name == "grip" else SHIPPED_FOLDER / name)
