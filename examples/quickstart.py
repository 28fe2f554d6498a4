"""Prune the visual tokens of a LLaVA from the Hub: python examples/quickstart.py --image picture.jpg "What is this?"

The same code path runs offline on the pocket model: python examples/quickstart.py --model pocket
"""

import argparse

from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from grip_hf import GripConfig, apply_grip
from grip_hf.cli.options import words
from grip_hf.evaluation.budgets import as_setting, parse_budget
from grip_hf.pocket import load_pocket_llava, make_scene


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is in this picture?")
    parser.add_argument(
        "--model", default="llava-hf/llava-1.5-7b-hf", help="a LLaVA on the Hub, a folder, or 'pocket'"
    )
    parser.add_argument("--image", help="a picture; without it, a held-out scene of the pocket testbed")
    parser.add_argument("--budgets", "--keep-ratio", type=parse_budget, default=0.25, help="a ratio, or a number")
    parser.add_argument("--selector", help="without it, the scorer that comes with the model, or cdpruner")
    args = parser.parse_args(words())

    image = Image.open(args.image).convert("RGB") if args.image else make_scene(0).image
    if args.model == "pocket":
        model, processor = load_pocket_llava()
        prompt = "<image>is there any tractor" if args.question.startswith("What") else f"<image>{args.question}"
    else:
        model = LlavaForConditionalGeneration.from_pretrained(args.model, dtype="auto", device_map="auto")
        processor = AutoProcessor.from_pretrained(args.model)
        content = [{"type": "image"}, {"type": "text", "text": args.question}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device, model.dtype)

    def answer():
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False, return_dict_in_generate=True)
        return out, processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    _, full = answer()
    apply_grip(model, GripConfig(**as_setting(args.budgets), selector=args.selector))
    out, pruned = answer()
    print(f"all visual tokens: {full.strip()}")
    print(f"{len(model.grip.kept_tokens(out)[0])} visual tokens: {pruned.strip()}")


if __name__ == "__main__":
    main()
