"""`generate` with a promise: a first glance at few visual tokens, and a second look where the answer is in doubt."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from torch import Tensor

from ..engine import generation
from ..engine.budget import Budget
from ..engine.call import LastCall
from ..engine.context import asked_of, last_of, override, remember_last
from ..engine.methods import InstanceMethod
from ..engine.once import Memory, remembering
from ..engine.upstream import ENCODERS, has_pictures, parameters_of
from ..errors import ConfigError
from .doubt import ANSWER, FIRST, Doubt, Enough, lengths
from .looks import Look, join, join_last
from .promise import COMMAND, Calibration, Promise, budget, check_made_for
from .rows import CannotPickError, Rows

KEPT = "grip_kept"  # attribute of an output: which visual tokens stayed, per sample


class LookAgain(InstanceMethod):
    """`generate`, which keeps a promise where a quality is asked for, and is the model's own where none is.

    Args:
        handle: The `GripHandle` of the model.
    """

    def __init__(self, handle: Any) -> None:
        super().__init__(handle.owner, "generate")
        self.handle = handle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the model itself does, at the budgets that a promise says."""
        asked = asked_of(self.handle._boundary)
        if asked.quality is None:
            return self.own(*args, **kwargs)
        given = {**dict(zip(self.__signature__.parameters, args, strict=False)), **kwargs}
        rule = asked.rule or (FIRST if given.get("streamer") is not None else None)
        promise = self.handle.promise(asked.quality, rule)
        return Ladder(self, given, promise, asked).answer()


class Ladder:
    """One call of `generate` with a promise.

    Args:
        method: The method that stands in for `generate`.
        given: Its arguments, by name.
        promise: The promise.
        asked: What was asked for.

    Raises:
        ConfigError: The call is another one than the promise was made for: see `check_call`.
    """

    def __init__(self, method: LookAgain, given: dict[str, Any], promise: Promise, asked: Budget) -> None:
        self.asked = asked
        self.handle, self.own, self.model, self.promise = method.handle, method.own, method.module, promise
        self.given = {name: value for name, value in given.items() if value is not None}
        self.ids_name = "inputs" if "input_ids" not in self.given and "inputs" in self.given else "input_ids"
        if not isinstance(self.given.get(self.ids_name), Tensor):
            raise ConfigError("generate with a quality needs input_ids")
        check_call(self.model, self.given, promise, self.handle.calibration)
        self.prompt = self.given[self.ids_name].shape[1]
        # The rows whose pictures are encoded as the memory has them, and their arguments.
        self.rows, self.shown = list(range(len(self.given[self.ids_name]))), self.given

    def answer(self) -> Any:
        """What `generate` gives."""
        if not has_pictures(self.given):
            with override(self.handle, Budget(everything=True), told=False):
                return self.own(**self.given)
        looks: list[Look] = []
        pending = list(range(len(self.given[self.ids_name])))
        with remembering() as memory:
            for number, rung in enumerate(self.promise.ladder):
                threshold = self.promise.thresholds[number] if number < len(self.promise.thresholds) else None
                look = self._look(rung, threshold, pending, memory if number else None)
                looks.append(look)
                pending = [row for row, sure in zip(look.rows, look.sure, strict=True) if not sure]
                if not pending:
                    break
                look.drop_cache()
        output = join(looks, self.prompt, generation.padding(self.model, self.given))
        remember_last(self.handle._boundary, join_last(looks, self.prompt))
        if not generation.setting(self.model, self.given, "return_dict_in_generate"):
            return output.sequences
        setattr(output, KEPT, self.handle.last.kept)  # the cache cannot say it of all rows
        return output

    def _look(self, rung: float | int, threshold: float | None, rows: list[int], memory: Memory | None) -> Look:
        """Answer some rows at a budget; the memory, if there is one, gives back what is encoded of their pictures."""
        allowed = self._budget(rung)
        arguments, answered = self._arguments(rows, memory, allowed)
        doubt = Doubt(self.promise.rule, threshold, self._whole)
        arguments["logits_processor"] = [*arguments.get("logits_processor", ()), doubt]
        if threshold is not None:
            arguments["stopping_criteria"] = [*arguments.get("stopping_criteria", ()), Enough(doubt)]
        if "streamer" in arguments:
            arguments["streamer"] = Held(arguments["streamer"], doubt, first=memory is None)
        arguments = generation.with_dict(arguments)
        with override(self.handle, allowed, told=False):
            output = self.own(**arguments)
        last = self.handle.last
        ends, pad = generation.ends(self.model, self.given), generation.padding(self.model, self.given)
        own = lengths(output.sequences[:, self.prompt :], ends, pad)
        logs = doubt.log_probs(own)
        unsure = doubt.unsure().tolist()
        if doubt.rule == ANSWER and threshold is not None:  # what stands behind an answer does not count
            limit = doubt.limit if doubt.limit is not None else -math.inf
            unsure = [log < limit and not whole for log, whole in zip(logs, self._whole(), strict=True)]
        wanted = set(rows)
        sure = [row in wanted and not one for row, one in zip(answered, unsure, strict=True)]
        return Look(answered, sure, output, own, [math.exp(log) for log in logs], last)

    def _budget(self, rung: float | int) -> Budget:
        """That of a look; as many rows of the vision tower stay as its ratio says of that budget."""
        return dataclasses.replace(budget(rung), tower_keep_ratio=self.asked.tower_keep_ratio)

    def _whole(self) -> list[bool]:
        """Per row of the look that runs, whether it keeps all of its visual tokens, as the full model does."""
        last: LastCall | None = last_of(self.handle._boundary)
        assert last is not None
        return [len(kept) == total for kept, total in zip(last.kept, last.total, strict=True)]

    def _arguments(self, rows: list[int], memory: Memory | None, allowed: Budget) -> tuple[dict[str, Any], list[int]]:
        """The arguments of a look, and the rows that they are of: all, where they cannot be told apart.

        Pictures are encoded once for looks at which the same rows stay in the vision tower, which are all looks where
        none leave it; a look at which others stay, such as the last one at all tokens, encodes them anew.
        """
        if memory is None:
            return dict(self.shown), self.rows
        anew, arguments = not memory.fits(allowed), self.shown
        try:
            if len(rows) < len(self.rows):
                arguments, cut = self._pick(rows, memory, anew)
                memory.replay(cut)
            else:
                memory.replay()
        except CannotPickError:
            rows, arguments = self.rows, self.shown
            memory.replay()
        if anew:
            memory.forget()
            self.rows, self.shown = rows, arguments
        return dict(arguments), rows

    def _pick(self, rows: list[int], memory: Memory, anew: bool) -> tuple[dict[str, Any], Any]:
        parts = self.handle._boundary.parts
        encoders = {name for encoder in ENCODERS for name in parameters_of(parts.base, encoder)}
        picker = Rows(self.shown, self.ids_name, parts.token_ids, encoders)
        return picker.pick([self.rows.index(row) for row in rows], memory.kept, anew)


class Held:
    """A streamer that shows an answer once it is not in doubt; needs the first-token rule.

    Args:
        streamer: The user's.
        doubt: Knows by the first token.
        first: Whether this is the first look, which shows the prompt.
    """

    def __init__(self, streamer: Any, doubt: Doubt, first: bool) -> None:
        self.streamer, self.doubt, self.prompt, self.first = streamer, doubt, True, first

    def put(self, value: Any) -> None:
        """Pass tokens on, unless the answer is in doubt."""
        if self.prompt:
            self.prompt = False
            if self.first:
                self.streamer.put(value)
        elif not bool(self.doubt.unsure().any()):
            self.streamer.put(value)

    def end(self) -> None:
        """Pass on that the answer has ended, if it was shown."""
        if not bool(self.doubt.unsure().any()):
            self.streamer.end()


def check_call(model: Any, given: dict[str, Any], promise: Promise, calibration: Calibration) -> None:
    """Refuse a call of `generate` for which nothing is promised.

    Args:
        model: The model.
        given: The arguments, by name.
        promise: What is asked for.
        calibration: Where it comes from.

    Raises:
        ConfigError: It is not greedy decoding of one answer per prompt; a streamer would show what is taken back; it
            writes by other settings than the calibration's, or longer answers than that has seen.
    """
    others = generation.other_ways(model, given)
    if others:
        told = ", ".join(f"{name}={value!r}" if _short(value) else name for name, value in others.items())
        raise ConfigError(
            f"a quality is promised for greedy decoding of one answer per prompt, not with {told}: say "
            "do_sample=False, num_beams=1, or choose a budget by keep_ratio or num_tokens"
        )
    if given.get("streamer") is not None and promise.rule != FIRST:
        raise ConfigError(
            f"a streamer cannot take tokens back, as the rule {promise.rule!r} may have to: use the rule {FIRST!r} "
            f'(budget(quality={promise.quality}, rule="{FIRST}")), or no streamer'
        )
    check_made_for(calibration, {"writing": generation.writing(model, given)})
    most = generation.new_tokens(model, given, given["input_ids" if "input_ids" in given else "inputs"].shape[1])
    seen = calibration.max_new_tokens
    if most != seen and (calibration.cut or most < calibration.longest):
        why = "some of whose answers were cut off" if calibration.cut else f"the longest took {calibration.longest}"
        raise ConfigError(
            f"max_new_tokens={most} is not what was calibrated: {seen}, {why}. Use that, or run `{COMMAND} "
            f"--max-new-tokens {most}`"
        )


def _short(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str))
