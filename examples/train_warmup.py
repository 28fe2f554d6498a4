"""Warm up a scorer from what a frozen model's own answers depend on, for the pocket model or for your own.

python examples/train_warmup.py --output runs/warmup                         # the pocket model, offline
python examples/train_warmup.py --model llava-hf/llava-1.5-7b-hf --dataset you/questions --output runs/warmup
"""

import argparse
from pathlib import Path

from grip_hf.cli.options import words
from grip_hf.frozen.screening import screen
from grip_hf.pocket.examples import PocketExamples, load_pocket_model
from grip_hf.training import FrozenVLM, SampleStore, TrainingPlan, load_model, load_rows, train_scorer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; an unfinished one goes on")
    parser.add_argument("--model", help="a model on the Hub or a folder; without it, the pocket model")
    parser.add_argument("--dataset", help="with --model: a dataset with image(s), prompt and perhaps answer")
    parser.add_argument("--split", help="split of it; without it, the one for training")
    parser.add_argument("--examples", type=int, default=30_000, help="questions to learn from")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--target", choices=["combined", "gradient", "attention"], default="combined")
    parser.add_argument("--width", type=int, default=256, help="width of the scorer")
    parser.add_argument("--layers", type=int, default=2, help="layers of the scorer")
    parser.add_argument("--quantize", choices=["4bit", "8bit"])
    parser.add_argument("--device-map", help="for a model that needs several devices")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="default budget to save with the scorer")
    args = parser.parse_args(words())
    if (args.model is None) != (args.dataset is None):
        parser.error("--model and --dataset go together")

    if args.model is None:
        model, processor = load_pocket_model()
        model, rows = model.to(args.device), PocketExamples(args.examples)
    else:
        model, processor = load_model(args.model, args.quantize, args.device_map, device=args.device)
        rows = screen(load_rows(args.dataset, args.split, args.examples, seed=0)).examples
    plan = TrainingPlan(
        output=args.output,
        method="warmup",
        warmup_steps=args.steps,
        target=args.target,
        scorer={"width": args.width, "num_layers": args.layers},
        warmup_args={
            "per_device_train_batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "use_cpu": args.device == "cpu",
        },
        keep_ratio=args.keep_ratio,
    )
    vlm = FrozenVLM(model, processor)
    train_scorer(plan, SampleStore(vlm, rows), say=print)
    vlm.close()
    print(f"apply_grip(model, scorer={str(args.output)!r}) uses it")


if __name__ == "__main__":
    main()
