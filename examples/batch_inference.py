"""Answer many questions in left-padded batches with a fraction of the visual tokens, each sample with its own budget.

python examples/batch_inference.py                                           # the pocket model, offline
python examples/batch_inference.py --model llava-hf/llava-1.5-7b-hf --images a.jpg b.jpg --question "What is this?"
"""

import argparse
import time

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from grip_hf import apply_grip
from grip_hf.cli.options import words
from grip_hf.evaluation.budgets import as_setting, parse_budget
from grip_hf.pocket import load_pocket_llava, make_scene


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket", help="a model on the Hub, a folder, or 'pocket'")
    parser.add_argument("--images", nargs="*", default=[], help="pictures; the pocket model has scenes of its own")
    parser.add_argument("--question", default="What is in this picture?")
    parser.add_argument("--budgets", "--keep-ratio", type=parse_budget, nargs="+", default=[0.25], help="one, or many")
    parser.add_argument("--selector", help="without it, the scorer that comes with the model, or cdpruner")
    parser.add_argument("--examples", type=int, default=8, help="questions about pocket scenes")
    parser.add_argument("--batch-size", type=int, default=4)
    args = parser.parse_args(words())

    if args.model == "pocket":
        model, processor = load_pocket_llava()
        scenes = [make_scene(seed) for seed in range(args.examples)]
        asked = [(scene.image, f"<image>{scene.questions[0].text}") for scene in scenes]
    else:
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto", device_map="auto")
        processor = AutoProcessor.from_pretrained(args.model, padding_side="left")
        content = [{"type": "image"}, {"type": "text", "text": args.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        asked = [(Image.open(path).convert("RGB"), prompt) for path in args.images]
    budgets = args.budgets * len(asked) if len(args.budgets) == 1 else args.budgets
    if len(budgets) != len(asked):
        parser.error(f"{len(args.budgets)} keep ratios for {len(asked)} samples")

    kind = next(iter(as_setting(budgets[0])))  # a ratio for each sample, or a number
    apply_grip(model, **as_setting(budgets[0]), selector=args.selector)
    start = time.perf_counter()
    for first in range(0, len(asked), args.batch_size):
        pictures, prompts = zip(*asked[first : first + args.batch_size], strict=True)
        inputs = processor(images=list(pictures), text=list(prompts), padding=True, return_tensors="pt")
        inputs = inputs.to(model.device, model.dtype)
        with torch.inference_mode(), model.grip.budget(**{kind: budgets[first : first + len(prompts)]}):
            out = model.generate(**inputs, max_new_tokens=32, do_sample=False, return_dict_in_generate=True)
        answers = processor.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for prompt, kept, answer in zip(prompts, model.grip.kept_tokens(out), answers, strict=True):
            print(f"{prompt.replace('<image>', '').strip()}  [{len(kept)} visual tokens]  {answer.strip()}")
    print(f"{len(asked)} answers in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
