"""The calls that the self-check makes, and their comparison with the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..config import count_kept
from .pictures import Arguments
from .reference import LOOSE, held_positions, lengthen_types, positions_and_next, reference_logits, visual_mask

STEPS = 4
STATIC = {"cache_implementation": "static", "disable_compile": True}


class WrongError(Exception):
    """A comparison that failed, and its figures."""

    def __init__(self, message: str, error: float | None = None, allowed: float | None = None) -> None:
        super().__init__(message)
        self.error, self.allowed = error, allowed


@dataclasses.dataclass(frozen=True)
class Run:
    """One call of a pruned model.

    Attributes:
        logits: [B, L, V] after each token of the prompt, or [B, STEPS, V] that generated tokens were chosen from.
        kept: The kept visual tokens of each row.
        tokens: [B, L + STEPS] the prompt and what was generated, or None.
    """

    logits: Tensor
    kept: list[Tensor]
    tokens: Tensor | None = None


def forward(model: Any, inputs: Arguments, handle: Any) -> Run:
    """Call the pruned model once."""
    out = model(**inputs, use_cache=True)
    return Run(out.logits, handle.kept_tokens(out))


def generate(model: Any, inputs: Arguments, handle: Any = None, **settings: Any) -> Run:
    """Let the model choose a few tokens greedily."""
    fixed = {"do_sample": False, "max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**inputs, **fixed, **settings)
    kept = [] if handle is None else handle.kept_tokens(out)
    return Run(torch.stack(out.logits, 1), kept, out.sequences)


@dataclasses.dataclass(frozen=True)
class Case:
    """One batch, and the unpatched model to compare with.

    Attributes:
        family: The family.
        model: The model, unpatched.
        inputs: The batch.
        call: The same as the model is called directly, perhaps with positions.
        plain: [B, L, V] what the model says with all tokens.
    """

    family: str
    model: Any
    inputs: Arguments
    call: Arguments
    plain: Tensor

    def compare(self, run: Run, ratio: float) -> tuple[float, float]:
        """Largest difference of a logit from the reference, and how large it may be.

        Raises:
            WrongError: It is larger; or as many tokens as the budget says were not kept; or nothing changed.
        """
        totals = visual_mask(self.inputs).sum(1).tolist()
        wanted = [count_kept(total, ratio) if total else 0 for total in totals]
        counts = [len(one) for one in run.kept]
        if counts != wanted:
            raise WrongError(f"{counts} of {totals} visual tokens were kept, the budget says {wanted}")
        prompt = held_positions(self.inputs, run.kept)
        inputs, held, steps = self.inputs, prompt, 0
        if run.tokens is not None:
            steps = run.logits.shape[1]
            inputs, held = self._longer(run.tokens[:, :-1], held, steps - 1)
        positions = positions_and_next(self.model, self.inputs, max(steps - 1, 0))
        expected = reference_logits(self.model, inputs, held, positions)
        effect = distance(self.plain[prompt], expected[:, : prompt.shape[1]][prompt])
        allowed = self._rounding(expected[held], effect)
        if effect <= allowed:
            raise WrongError("the reference does not tell the pruned model from the whole one")
        if run.tokens is None:
            error = distance(run.logits[held], expected[held])
        else:
            expected = expected[:, -steps:]
            error = distance(run.logits, expected)
            chosen = expected.gather(-1, run.tokens[:, -steps:, None])[..., 0]
            if bool((chosen < expected.amax(-1) - 2 * allowed).any()):
                raise WrongError("other tokens are generated than the reference says", error, allowed)
        if not error <= allowed:  # NaN is not
            raise WrongError(f"logits differ from the reference by up to {error:.2g}", error, allowed)
        return error, allowed

    def _longer(self, tokens: Tensor, held: Tensor, steps: int) -> tuple[Arguments, Tensor]:
        """The batch with generated tokens behind it, and what exists of it."""
        mask = torch.nn.functional.pad(self.inputs["attention_mask"], (0, steps), value=1)
        longer = {**self.inputs, "input_ids": tokens, "attention_mask": mask}
        lengthen_types(self.family, longer, steps)
        return longer, torch.nn.functional.pad(held, (0, steps), value=True)

    def _rounding(self, logits: Tensor, effect: float) -> float:
        """How much logits may differ by rounding; `effect` is what pruning changes.

        In half precision experts are chosen by rounded numbers and some families magnify rounding, so that no bound is
        small; but a fault changes as much as pruning does.
        """
        exact = LOOSE.get(self.family, 5e-5) + 1e-4 * float(logits.abs().max())
        return exact if torch.finfo(logits.dtype).eps <= 1e-6 else max(exact, effect / 4)

    def lacks_static_cache(self) -> str | None:
        """Why the unpatched model cannot use a static cache; None if it can, or cannot use a dynamic one either."""
        dynamic = attempt(lambda: generate(self.model, self.inputs))
        static = attempt(lambda: generate(self.model, self.inputs, **STATIC))
        if isinstance(dynamic, Exception):
            return None
        if isinstance(static, Exception):
            return f"transformers raises {type(static).__name__} without pruning too"
        allowed = self._rounding(dynamic.logits, float(dynamic.logits.abs().max()))
        same = distance(static.logits, dynamic.logits) <= allowed
        return None if same else "in transformers it gives other logits than a dynamic one without pruning too"


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in single precision."""
    return float((ours.float() - theirs.float()).abs().max())


def attempt(action: Callable[[], Any]) -> Any:
    """What an action gives, or the exception that it raises."""
    try:
        return action()
    except Exception as error:
        return error
