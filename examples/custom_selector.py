"""Choose visual tokens your own way: a plain function, or a class with a name that settings can be saved with.

python examples/custom_selector.py --seed 3
"""

import argparse

import torch

from grip_hf import GripConfig, Selector, VisualBatch, apply_grip, register
from grip_hf.cli.options import words
from grip_hf.evaluation.budgets import as_setting, parse_budget
from grip_hf.pocket import load_pocket_llava, make_scene


def centre_first(batch: VisualBatch) -> torch.Tensor:
    """Prefer the middle of the picture. Scores [groups, tokens]: higher means keep."""
    return -(batch.positions - 0.5).square().sum(-1)


@register("unusual")
class Unusual(Selector):
    """Prefers tokens that are unlike the average token of the picture.

    Args:
        power: How much the length of a token counts.
    """

    def __init__(self, power: float = 0.0) -> None:
        self.power = power

    def __call__(self, batch: VisualBatch) -> torch.Tensor:
        tokens = batch.tokens.float() * batch.mask[..., None]
        mean = tokens.sum(1, keepdim=True) / batch.mask.sum(1).clamp(min=1)[:, None, None]
        unlike = 1 - torch.cosine_similarity(tokens, mean, dim=-1)
        return unlike * tokens.norm(dim=-1) ** self.power


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=3, help="which scene")
    parser.add_argument("--budgets", "--keep-ratio", type=parse_budget, default=0.25, help="a ratio, or a number")
    args = parser.parse_args(words())
    model, processor = load_pocket_llava()
    scene = make_scene(args.seed)
    choices = {
        "centre_first": {**as_setting(args.budgets), "selector": centre_first},
        "unusual": {"config": GripConfig(**as_setting(args.budgets), selector="unusual")},
    }
    for name, arguments in choices.items():
        apply_grip(model, **arguments)
        for question in scene.questions[:3]:
            inputs = processor(images=scene.image, text=f"<image>{question.text}", return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
            answer = processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            kept = len(model.grip.kept_tokens(out)[0])
            print(f"{name} keeps {kept}: {question.text}? {answer.strip()} (truth: {question.answer})")


if __name__ == "__main__":
    main()
