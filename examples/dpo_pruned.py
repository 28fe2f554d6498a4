"""Teach preferences to a model that runs on a fraction of its visual tokens, with TRL's DPOTrainer.

python examples/dpo_pruned.py --keep_ratio 0.11 --selector similarity --max_steps 200 --output_dir runs/dpo

accelerate launch examples/dpo_pruned.py --model_name_or_path llava-hf/llava-1.5-7b-hf \\
    --dataset_name you/preferences --use_peft --bf16 True --dtype bfloat16 --keep_ratio 0.25 \\
    --scorer you/grip-llava-1.5-7b --output_dir runs/dpo

The dataset has TRL's columns `images`, `prompt`, `chosen` and `rejected`. Without `--use_peft` a second model is the
reference, which has to see the tokens that the policy sees: that is what `PruneReference` is for.
"""

from dataclasses import dataclass, field

import trl
from datasets import Dataset, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from grip_hf import apply_grip
from grip_hf.pocket.examples import PocketExamples
from grip_hf.pocket.model import WEIGHTS
from grip_hf.training import PruneReference

LANGUAGE_MODEL_ONLY = r".*(language_model|text_model)\.layers.*(q|k|v|o|gate|up|down)_proj"
POCKET = {"model_name_or_path": "pocket", "dataset_name": "pocket", "bf16": False, "report_to": "none"}
POCKET |= {"per_device_train_batch_size": 16, "learning_rate": 1e-5}


@dataclass
class GripArguments:
    keep_ratio: float = field(default=0.25, metadata={"help": "Share of the visual tokens to keep."})
    selector: str = field(default="grip", metadata={"help": "Who chooses; 'grip' needs a scorer."})
    scorer: str | None = field(default=None, metadata={"help": "Folder or Hub id of a scorer."})
    rows: int = field(default=4_000, metadata={"help": "Questions of the pocket dataset."})


def pocket_rows(rows, seed):
    """The right answer is preferred to that of the question before."""
    before = "no"
    for scene, question in map(PocketExamples(rows, seed).look, range(rows)):
        answers = {"chosen": f" {question.answer} </s>", "rejected": f" {before} </s>"}
        if question.answer != before:
            yield {"images": [scene.image], "prompt": f"<s><image>{question.text}", **answers}
        before = question.answer


def main(script_args, training_args, model_args, grip_args):
    name = WEIGHTS if model_args.model_name_or_path == "pocket" else model_args.model_name_or_path
    model = AutoModelForImageTextToText.from_pretrained(
        name,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=trl.get_quantization_config(model_args),
    )
    apply_grip(model, scorer=grip_args.scorer, keep_ratio=grip_args.keep_ratio, selector=grip_args.selector)
    if script_args.dataset_name == "pocket":
        data = Dataset.from_generator(pocket_rows, gen_kwargs={"rows": grip_args.rows, "seed": training_args.seed})
    else:
        data = load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)
    training_args.max_length = None  # cutting could take visual tokens away from their picture
    model_args.lora_target_modules = model_args.lora_target_modules or LANGUAGE_MODEL_ONLY
    processor, peft_config = AutoProcessor.from_pretrained(name), trl.get_peft_config(model_args)
    trainer = trl.DPOTrainer(
        model, args=training_args, train_dataset=data, processing_class=processor, peft_config=peft_config
    )
    trainer.add_callback(PruneReference(trainer))
    trainer.train()
    trainer.save_model(training_args.output_dir)  # with the GRIP part, in `grip`


if __name__ == "__main__":
    parser = trl.TrlParser((trl.ScriptArguments, trl.DPOConfig, trl.ModelConfig, GripArguments))
    parser.set_defaults(**POCKET)
    main(*parser.parse_args_and_config())
