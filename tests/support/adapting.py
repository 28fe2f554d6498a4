"""Adapters around tiny patched models, and what is said of them."""

import warnings

import peft
import torch
from tiny import HIDDEN, IMAGE, build, make_inputs

from grip_hf import GripScorer, apply_grip
from grip_hf.scorer.model import GripScorerConfig

LORA = {"r": 2, "target_modules": r".*language_model\.layers.*(q|v)_proj"}


def scorer(seed=0):
    torch.manual_seed(seed)
    return GripScorer(GripScorerConfig(hidden_size=HIDDEN, width=16, attention_width=8, num_heads=2))


def adapted(**settings):
    """A patched model with adapters around it that do something."""
    model = apply_grip(build("llava"), **settings)
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    return model.eval()


@torch.no_grad()
def asked(model):
    """What a model says of a prompt, and what it keeps."""
    out = model(**make_inputs("llava", [[3, IMAGE, 4]]))
    return out.logits[0, -1], peft.PeftModel.get_base_model(model).grip.last.kept[0].tolist()


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def saved(folder, **settings):
    """A folder with an adapter that was trained around a patched model, and the model."""
    model = adapted(**settings)
    model.save_pretrained(folder)
    return model


def put_around(model, folder, **how):
    """A model with the adapter from a folder around it, and what was said of it."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(model, folder, **how).eval()
    return model, [str(one.message) for one in said]
