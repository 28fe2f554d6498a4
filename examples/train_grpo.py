"""Train a GRIP scorer for any supported vision-language model, in the style of TRL's own scripts.

accelerate launch --config_file examples/accelerate/ddp.yaml examples/train_grpo.py \\
    --model_name_or_path llava-hf/llava-1.5-7b-hf --load_in_4bit --dataset_name you/questions --max_steps 2000 \\
    --num_generations 8 --per_device_train_batch_size 16 --learning_rate 1e-4 --output_dir runs/grip-llava-1.5-7b

Columns of the dataset: `image` or `images`, `prompt`, and perhaps `answer`. Beside the scorer, the folder gets that of
the supervised warm-up, in `warmup`. `--pocket` trains on the pocket testbed. On CPUs:

ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/train_grpo.py --pocket --use_cpu --output_dir runs/grip
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from grip_hf import training
from grip_hf.frozen.screening import screen
from grip_hf.pocket.examples import PocketExamples, load_pocket_model


@dataclass
class GripArguments(ScriptArguments):
    """What these scripts add to TRL's arguments."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset id or folder."})
    pocket: bool = field(default=False, metadata={"help": "Train for the pocket model on its scenes."})
    examples: int = field(default=30_000, metadata={"help": "Questions to train on, at most.", "aliases": ["--rows"]})
    budgets: list[float] = field(default_factory=lambda: [0.03, 0.6], metadata={"help": "Keep ratios, low and high."})
    rewards: list[str] = field(default_factory=lambda: ["closeness", "correctness"], metadata={"help": "Rewards."})
    warmup_steps_supervised: int = field(default=400, metadata={"help": "Steps of the supervised warm-up."})
    layers: int = field(default=2, metadata={"help": "Layers of the scorer."})
    device_map: str | None = field(default=None, metadata={"help": "Device map of the model."})


def main(script: GripArguments, args: GRPOConfig, model: ModelConfig) -> None:
    if script.pocket:
        pocket, processor = load_pocket_model(model.model_name_or_path)
        vlm, examples = (
            training.FrozenVLM(pocket.to(args.device), processor),
            PocketExamples(script.examples, args.seed),
        )
    else:
        quantize = "4bit" if model.load_in_4bit else "8bit" if model.load_in_8bit else None
        loaded = training.load_model(model.model_name_or_path, quantize, script.device_map, device=args.device)
        rows = training.load_rows(script.dataset_name, script.dataset_train_split, script.examples, args.seed)
        vlm, examples = training.FrozenVLM(*loaded), screen(rows).examples  # reads every row before the first step
    store, budgets = training.SampleStore(vlm, examples), tuple(script.budgets)

    set_seed(args.seed)  # the trainers set it too, but after the scorer got its weights
    sizes = training.GripScorerConfig(hidden_size=vlm.hidden_size, num_layers=script.layers)
    scorer = training.GripScorer(sizes).to(vlm.device)
    warmup = Path(args.output_dir) / "warmup"
    if (warmup / "scorer" / "model.safetensors").is_file():
        scorer = training.GripScorer.from_pretrained(warmup / "scorer").to(vlm.device)
    elif script.warmup_steps_supervised:
        settings = {name: getattr(args, name) for name in ("seed", "use_cpu", "report_to")}
        settings["max_steps"] = script.warmup_steps_supervised
        trainer = training.WarmupTrainer(scorer, store, training.training_arguments(str(warmup), **settings), budgets)
        trainer.train(resume_from_checkpoint=training.last_checkpoint(warmup, vlm.hidden_size))
        if trainer.is_world_process_zero():
            training.save_scorer(scorer, warmup / "scorer")

    trainer = training.make_grpo_trainer(scorer, store, args, script.rewards, budgets)
    trainer.train(resume_from_checkpoint=training.last_checkpoint(args.output_dir, vlm.hidden_size))
    if trainer.is_world_process_zero():
        training.save_scorer(scorer, args.output_dir)


if __name__ == "__main__":
    parser = TrlParser((GripArguments, GRPOConfig, ModelConfig))
    parser.set_defaults(**training.GRPO_DEFAULTS, **training.GRPO_FIXED)
    main(*parser.parse_args_and_config())
