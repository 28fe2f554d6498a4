"""Rows of the pocket world for trainers, which tokens a prompt alone keeps, and what the masked model says of them."""

import torch
from first_testbed import load_pocket_llava, make_scene

from grip_hf import apply_grip

RATIO = 0.11
SCENES = (0, 1, 2, 3)
OFFLINE = {
    "max_steps": 1,
    "learning_rate": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
}


def rows():
    """Per scene: its picture, a question with its answer, and a wrong answer of other words."""
    for number in SCENES:
        scene = make_scene(number)
        question = scene.questions[number % 3]
        wrong = "no snail on the red plate" if question.answer != "no" else "yes tiger under the blue"
        yield {"images": [scene.image], "question": question.text, "right": question.answer, "wrong": wrong}


def pruned(selector="similarity"):
    """The pocket model with its patch, and its processor."""
    model, processor = load_pocket_llava()
    return apply_grip(model, keep_ratio=RATIO, selector=selector), processor


class Watch:
    """Which visual tokens each row of each call of a patched model keeps."""

    def __init__(self, model):
        self.calls = []
        model.model.language_model.register_forward_hook(lambda *_: self.calls.append(kept(model)))

    @property
    def seen(self):
        return {one for call in self.calls for one in call}


def kept(model):
    return [tuple(one.tolist()) for one in model.grip.last.kept]


@torch.no_grad()
def kept_of_prompts(prompts, selector="similarity"):
    """The kept set of each prompt (picture, text), asked alone."""
    model, processor = pruned(selector)
    found = []
    for image, text in prompts:
        model(**processor(images=image, text=text, return_tensors="pt", add_special_tokens=False))
        found += kept(model)
    return found


def masked_logits(model, inputs, kept):
    """Logits of an unpatched model, float32, in which the dropped visual tokens are masked at their places.

    Args:
        model: The unpatched model.
        inputs: Its inputs, a padded batch with one picture a row.
        kept: Per row, the visual tokens that are not masked.
    """
    visual = inputs["input_ids"] == model.config.image_token_id
    mask = inputs["attention_mask"].clone()
    for row, keep in enumerate(kept):
        places = visual[row].nonzero().flatten()
        mask[row, places] = 0
        mask[row, places[list(keep)]] = 1
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return model(**{**inputs, "attention_mask": mask, "position_ids": positions}).logits.float()
