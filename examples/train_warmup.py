"""Warm up a scorer from what a frozen model's own answers depend on, for the pocket model or for your own.

python examples/train_warmup.py --output runs/warmup                         # the pocket model, offline
python examples/train_warmup.py --model llava-hf/llava-1.5-7b-hf --dataset you/questions --output runs/warmup
"""

import argparse
from pathlib import Path

from grip_hf import apply_grip
from grip_hf.pocket.examples import PocketExamples, load_pocket
from grip_hf.training import FrozenVLM, SampleStore, TrainingPlan, load_model, load_rows, train_scorer


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; an unfinished one goes on")
    parser.add_argument("--model", help="a model on the Hub or a folder; without it, the pocket model")
    parser.add_argument("--dataset", help="with --model: a dataset with image(s), prompt and perhaps answer")
    parser.add_argument("--rows", type=int, default=10_000, help="questions to learn from")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--target", choices=["combined", "gradient", "attention"], default="combined")
    parser.add_argument("--width", type=int, default=256, help="width of the scorer")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="default budget to save with the scorer")
    args = parser.parse_args()
    if (args.model is None) != (args.dataset is None):
        parser.error("--model and --dataset go together")

    model, processor = load_pocket() if args.model is None else load_model(args.model)
    rows = PocketExamples(args.rows) if args.model is None else load_rows(args.dataset, "train", args.rows)
    plan = TrainingPlan(
        output=args.output,
        method="warmup",
        warmup_steps=args.steps,
        target=args.target,
        scorer={"width": args.width},
        warmup_args={"per_device_train_batch_size": args.batch_size, "learning_rate": args.learning_rate},
    )
    vlm = FrozenVLM(model, processor)
    scorer = train_scorer(plan, SampleStore(vlm, rows))
    vlm.close()

    apply_grip(model, scorer=scorer, keep_ratio=args.keep_ratio)
    model.grip.save_pretrained(args.output / "share", training=f"Warm-up of {args.steps} steps, target {args.target}.")
    print(f"apply_grip(model, scorer={str(args.output / 'share')!r}) uses it")


if __name__ == "__main__":
    main()
