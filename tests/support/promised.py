"""Calibrations that are made up, so that a ladder goes the way that a test wants."""

import torch
from asking import generate
from tiny import select_by_content

from grip_hf import apply_grip
from grip_hf.engine.generation import writing
from grip_hf.quality.promise import Calibration, Promise

ALWAYS, NEVER = 1.0, 0.0  # thresholds that doubt every answer, and none


def promise(ladder=(0.25, 0.5, 1.0), thresholds=None, rule="answer", quality=0.9):
    thresholds = thresholds if thresholds is not None else (ALWAYS,) * (len(ladder) - 1)
    return Promise(quality, 0.95, rule, tuple(ladder), tuple(thresholds), 100, 0.01, 0.95, 10.0, 0.1)


def calibration(model, *promises, most=6, tower=None, **changes):
    """A calibration of a tiny model that `select_by_content` prunes, and whose tower is pruned as settings say."""
    facts = {"writing": writing(model, {}), **changes.pop("made_for", {})}
    usual = {"unit": "answer", "longest": most, "max_new_tokens": most, "cut": True, "data": {}, "versions": {}}
    found = Calibration(facts, promises=promises or (promise(),), curve=(), **{**usual, **changes})
    mine = apply_grip(model, num_tokens=1, selector=select_by_content, **(tower or {})).grip.identity()
    return Calibration(**{**vars(found), "made_for": {**mine, **found.made_for}})


def promised(model, *promises, quality=0.9, **changes):
    """Patch a tiny model so that `generate` keeps promises."""
    found = calibration(model, *promises, **changes)
    return apply_grip(model, quality=quality, selector=select_by_content, calibration=found)


def at(model, inputs, budget, **kwargs):
    """What a budget alone gives."""
    with model.grip.disabled() if budget == 1 else model.grip.budget(keep_ratio=budget):
        return generate(model, inputs, **kwargs)


def one_row(inputs, row):
    """The row of a batch whose other arguments have one entry per row."""
    return {name: value[row : row + 1] for name, value in inputs.items() if torch.is_tensor(value)}
