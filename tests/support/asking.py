"""Prompts, and ways to ask a tiny model, that several tests share."""

from tiny import IMAGE, select_by_content

from grip_hf import apply_grip

ONE = [[3, IMAGE, 4]]
RAGGED = [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3], [5]]  # unequal counts and a row without pictures


def prune(model, **settings):
    return apply_grip(model, selector=select_by_content, **(settings or {"keep_ratio": 0.5}))


def generate(model, inputs, **kwargs):
    fixed = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **{**fixed, **kwargs})
