"""A prefill walks through the engine once, in one direction: counted by a profiler, on the pocket model."""

import collections
import pathlib
import sys

import pytest
import torch
from first_testbed import load_pocket_llava, make_scene
from versions import NO_TRAINING

import grip_hf
from grip_hf import apply_grip

ROOT = pathlib.Path(grip_hf.__file__).parent
# What a selector computes is its own affair; the pass ends at its door.
SELECTORS = ("selectors", "scorer")
# Before 5.18 `generate` encodes pictures within the call, and gives it a mask where nothing is padded.
OLDER = {f"engine/{name}.py" for name in ("methods", "once", "taps", "masks")} if NO_TRAINING else set()
# The steps of a pass, in their order, and where each stands.
STEPS = (
    ("engine/hooks.py", "before_owner"),
    ("engine/hooks.py", "before_base"),
    ("engine/hooks.py", "before_language_model"),
    ("engine/reading.py", "read"),
    ("engine/arguments.py", "check"),
    ("engine/choice.py", "choose"),
    ("engine/reading.py", "read_question"),
    ("families/layouts.py", "fixed_grid"),
    ("engine/choice.py", "_ask"),
    ("engine/keepsets.py", "topk_mask"),
    ("engine/choice.py", "make_step"),
    ("engine/plan.py", "make_plan"),
    ("engine/arguments.py", "prune_arguments"),
    ("engine/arguments.py", "attention_masks"),
    ("engine/hooks.py", "after_language_model"),
    ("engine/plan.py", "grow_output"),
    ("engine/reading.py", "states_after"),
    ("engine/cache.py", "set_states"),
    ("engine/hooks.py", "after_base"),
    ("engine/hooks.py", "after_owner"),
)


@pytest.fixture(scope="module")
def asked():
    model, processor = load_pocket_llava()
    scene = make_scene(7)
    return model, processor(images=scene.image, text=f"<image>{scene.questions[0].text}", return_tensors="pt")


def walk(call):
    """The functions of the package that a call enters, in their order: [(file, name)]."""
    entered = []

    def look(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)) and not code.co_name.startswith("<"):
            entered.append((pathlib.Path(code.co_filename).relative_to(ROOT).as_posix(), code.co_name))

    sys.setprofile(look)
    try:
        with torch.no_grad():
            call()
    finally:
        sys.setprofile(None)
    return entered


@pytest.mark.parametrize(
    "choice", [{}, {"selector": "cdpruner"}, {"selector": "grid"}], ids=["grip", "cdpruner", "grid"]
)
def test_a_prefill_is_one_pass(asked, choice):
    model, inputs = asked
    apply_grip(model, keep_ratio=0.11, **choice)
    model(**inputs)  # classes of caches are made once
    entered = walk(lambda: model.generate(**inputs, max_new_tokens=1))
    first, last = (entered.index(step) for step in (STEPS[0], STEPS[-1]))
    entered = entered[first : last + 1]  # `generate` around it is a context, not a part of the pass
    files = collections.Counter(file for file, _ in entered if not file.startswith(SELECTORS))
    assert len(set(files) - OLDER) <= 10, files
    times = collections.Counter(entered)
    assert {step: times[step] for step in STEPS} == dict.fromkeys(STEPS, 1)
    assert [one for one in entered if one in STEPS] == list(STEPS)


def test_decoding_is_shorter(asked):
    """A decoding step reads nothing, asks nobody and plans nothing."""
    model, inputs = asked
    apply_grip(model, keep_ratio=0.11)
    cache = model(**inputs, use_cache=True).past_key_values
    token = inputs["input_ids"][:, -1:]
    entered = walk(lambda: model(input_ids=token, past_key_values=cache))
    files = {file for file, _ in entered}
    assert files <= {f"engine/{name}.py" for name in ("hooks", "context", "cache", "decoding", "upstream/calls")}
    assert len(entered) < 60
