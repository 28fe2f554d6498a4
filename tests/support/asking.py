"""Prompts, and ways to ask a tiny model, that several tests share."""

import torch
from tiny import IMAGE, select_by_content

from grip_hf import apply_grip

ONE = [[3, IMAGE, 4]]
RAGGED = [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3], [5]]  # unequal counts and a row without pictures


def prune(model, **settings):
    return apply_grip(model, selector=select_by_content, **(settings or {"keep_ratio": 0.5}))


def generate(model, inputs, **kwargs):
    fixed = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **{**fixed, **kwargs})


def assert_beams_start_alike(model, inputs):
    """The beams of one prompt start from the same embeddings in this model."""
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        generate(model, inputs, num_beams=2, max_new_tokens=2)
    finally:
        hook.remove()
    if len(seen[0]) > len(inputs["input_ids"]):  # newer releases repeat the prompt after its first call
        assert torch.equal(seen[0][::2], seen[0][1::2])
