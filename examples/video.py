"""Ask about a video: one budget shared over all frames, or the same for each frame.

python examples/video.py --video clip.mp4 "What happens?"                    # needs torchvision and torchcodec
python examples/video.py --frames 1.jpg 2.jpg 3.jpg "What happens?"          # pictures are frames; needs torchvision
"""

import argparse

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from grip_hf import GripConfig, apply_grip
from grip_hf.cli.options import words
from grip_hf.evaluation.budgets import as_setting, parse_budget


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What happens in this video?")
    parser.add_argument("--model", default="llava-hf/llava-onevision-qwen2-0.5b-ov-hf")
    parser.add_argument("--video", help="a video file")
    parser.add_argument("--frames", nargs="+", help="or pictures, in order")
    parser.add_argument("--budgets", "--keep-ratio", type=parse_budget, default=0.1, help="a ratio, or a number")
    parser.add_argument("--scope", choices=["sample", "image"], default="sample", help="share the budget over frames")
    parser.add_argument("--selector", help="without it, the scorer that comes with the model, or cdpruner")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(words())
    if (args.video is None) == (args.frames is None):
        parser.error("give either --video or --frames")

    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto", device_map="auto")
    processor = AutoProcessor.from_pretrained(args.model)
    frames = [Image.open(path).convert("RGB") for path in args.frames or []]
    video = {"type": "video", "video": frames} if frames else {"type": "video", "path": args.video}
    messages = [{"role": "user", "content": [video, {"type": "text", "text": args.question}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, model.dtype)

    apply_grip(model, GripConfig(**as_setting(args.budgets), scope=args.scope, selector=args.selector))
    with torch.inference_mode():
        out = model.generate(
            **inputs, max_new_tokens=args.max_new_tokens, do_sample=False, return_dict_in_generate=True
        )
    answer = processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{len(model.grip.kept_tokens(out)[0])} visual tokens kept: {answer.strip()}")


if __name__ == "__main__":
    main()
