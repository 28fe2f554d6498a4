"""Fine-tune a model that runs on a fraction of its visual tokens, with TRL's SFTTrainer and LoRA.

python examples/sft_pruned.py --keep_ratio 0.11 --selector random --max_steps 600 --output_dir runs/sft

accelerate launch examples/sft_pruned.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name you/questions \\
    --load_in_4bit --bf16 True --dtype bfloat16 --keep_ratio 0.25 --learning_rate 2e-4 \\
    --scorer you/grip-llava-1.5-7b --output_dir runs/sft

The dataset has TRL's columns `images`, `prompt` and `completion`. A stopped run goes on with the same command.
To run it: `model = PeftModel.from_pretrained(model, "runs/sft")`, then `apply_grip(model, scorer="runs/sft/grip")`.
"""

import dataclasses
from pathlib import Path

import trl
from datasets import Dataset, load_dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from grip_hf import apply_grip
from grip_hf.pocket.examples import PocketExamples
from grip_hf.pocket.testbeds import DEFAULT, get_testbed

LANGUAGE_MODEL_ONLY = r".*(language_model|text_model)\.layers.*(q|k|v|o|gate|up|down)_proj"
POCKET = {"model_name_or_path": "pocket", "dataset_name": "pocket", "use_peft": True, "bf16": False}
POCKET |= {"per_device_train_batch_size": 32, "learning_rate": 1e-3, "report_to": "none"}


@dataclasses.dataclass
class GripArguments:
    keep_ratio: float = dataclasses.field(default=0.25, metadata={"help": "Share of the visual tokens to keep."})
    selector: str = dataclasses.field(default="grip", metadata={"help": "Who chooses; 'grip' needs a scorer."})
    scorer: str | None = dataclasses.field(default=None, metadata={"help": "Folder or Hub id of a scorer."})
    examples: int = dataclasses.field(default=20_000, metadata={"help": "Pocket questions.", "aliases": ["--rows"]})
    testbed: str = dataclasses.field(default=DEFAULT.name, metadata={"help": "Which pocket model and dataset."})
    merge: bool = dataclasses.field(default=False, metadata={"help": "Also write the model with its adapters merged."})


def pocket_rows(rows, seed, testbed=DEFAULT.name):
    for scene, question in map(PocketExamples(rows, seed, testbed=testbed).look, range(rows)):
        prompt, completion = f"<s><image>{question.text}", f" {question.answer} </s>"
        yield {"images": [scene.image], "prompt": prompt, "completion": completion}


def main(script_args, training_args, model_args, grip_args):
    name = model_args.model_name_or_path
    name = get_testbed(grip_args.testbed).weights if name == "pocket" else name
    model = AutoModelForImageTextToText.from_pretrained(
        name,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=trl.get_quantization_config(model_args),
    )
    apply_grip(model, scorer=grip_args.scorer, keep_ratio=grip_args.keep_ratio, selector=grip_args.selector)
    if script_args.dataset_name == "pocket":
        which = {"rows": grip_args.examples, "seed": training_args.seed, "testbed": grip_args.testbed}
        data = Dataset.from_generator(pocket_rows, gen_kwargs=which)
    else:
        data = load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)
    training_args.max_length = None  # cutting could take visual tokens away from their picture
    model_args.lora_target_modules = model_args.lora_target_modules or LANGUAGE_MODEL_ONLY
    processor, lora = AutoProcessor.from_pretrained(name), trl.get_peft_config(model_args)
    trainer = trl.SFTTrainer(model, training_args, train_dataset=data, processing_class=processor, peft_config=lora)
    folder = training_args.output_dir
    trainer.train(resume_from_checkpoint=any(Path(folder).glob("checkpoint-*")) or None)
    trainer.save_model(folder)
    if trainer.accelerator.is_main_process:
        model.grip.save_pretrained(f"{folder}/grip")
        if grip_args.merge and lora:
            whole = AutoModelForImageTextToText.from_pretrained(name, dtype=model_args.dtype)
            whole = PeftModel.from_pretrained(whole, folder).merge_and_unload()
            for part in (apply_grip(whole, scorer=f"{folder}/grip"), processor):
                part.save_pretrained(f"{folder}/merged")


if __name__ == "__main__":
    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, GripArguments))
    parser.set_defaults(**POCKET)
    main(*parser.parse_args_and_config())
