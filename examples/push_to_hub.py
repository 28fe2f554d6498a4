"""Share a scorer, and a whole model with its scorer, on the Hub (log in first: `hf auth login`).

python examples/push_to_hub.py --scorer runs/warmup --model llava-hf/llava-1.5-7b-hf --repo you/grip-llava-1.5-7b
python examples/push_to_hub.py --scorer runs/warmup --model pocket --repo you/pocket-grip --whole-model
"""

import argparse

from transformers import AutoModelForImageTextToText, AutoProcessor

from grip_hf import apply_grip
from grip_hf.cli.options import words
from grip_hf.pocket import load_pocket_llava


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorer", required=True, help="folder of a trained scorer")
    parser.add_argument("--model", required=True, help="the model that it was trained for, or 'pocket'")
    parser.add_argument("--repo", required=True, help="where to upload to: user/name")
    parser.add_argument("--keep-ratio", type=float, default=0.25, help="budget of those who ask for none")
    parser.add_argument("--results", help="table that `grip-hf eval --json` wrote, for the card")
    parser.add_argument("--measured", help="name of this scorer in that table")
    parser.add_argument("--training", help="how it was trained, for the card")
    parser.add_argument("--picture", help="a picture for the card, such as `grip-hf demo` draws")
    parser.add_argument("--license", default="apache-2.0")
    parser.add_argument("--private", action="store_true")
    parser.add_argument(
        "--whole-model", action="store_true", help="upload the model too, the scorer in its folder grip/"
    )
    args = parser.parse_args(words())

    if args.model == "pocket":
        model, processor = load_pocket_llava()
    else:
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype="auto")
        processor = AutoProcessor.from_pretrained(args.model)
    apply_grip(model, scorer=args.scorer, keep_ratio=args.keep_ratio)
    if args.whole_model:
        model.push_to_hub(args.repo, private=args.private, tags=["grip", "visual-token-pruning"])
        processor.push_to_hub(args.repo)
        print(f'from_pretrained("{args.repo}") loads the model as ever; apply_grip(model) then prunes it')
        return
    facts = {"training": args.training, "license": args.license, "picture": args.picture}
    facts |= {"results": args.results, "measured": args.measured}  # None: what `grip-hf train` left beside the scorer
    print(model.grip.push_to_hub(args.repo, private=args.private, **facts))


if __name__ == "__main__":
    main()
