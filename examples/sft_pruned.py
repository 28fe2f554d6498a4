"""Fine-tune a model that runs on a fraction of its visual tokens, with TRL's SFTTrainer and LoRA.

python examples/sft_pruned.py --model_name_or_path pocket --dataset_name pocket --use_peft --keep_ratio 0.11 \\
    --selector similarity --max_steps 200 --per_device_train_batch_size 16 --learning_rate 1e-3 --output_dir runs/sft

accelerate launch examples/sft_pruned.py --model_name_or_path llava-hf/llava-1.5-7b-hf --dataset_name you/questions \\
    --use_peft --load_in_4bit --keep_ratio 0.25 --scorer you/grip-llava-1.5-7b --output_dir runs/sft
"""

import dataclasses

from datasets import Dataset, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import (
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from grip_hf import apply_grip
from grip_hf.pocket import load_pocket_llava
from grip_hf.training.pocket_examples import PocketExamples

LANGUAGE_MODEL_ONLY = r".*(language_model|text_model)\.layers.*(q|k|v|o|gate|up|down)_proj"


@dataclasses.dataclass
class GripArguments:
    keep_ratio: float = 0.25
    selector: str = "grip"
    scorer: str | None = None
    rows: int = 4000


def pocket_dataset(rows):
    looked = map(PocketExamples(rows).look, range(rows))
    return Dataset.from_list(
        [{"images": [s.image], "prompt": f"<s><image>{q.text}", "completion": f" {q.answer} </s>"} for s, q in looked]
    )


def main(script_args, training_args, model_args, grip_args):
    training_args.max_length = None  # cutting could take visual tokens away from their picture
    if model_args.model_name_or_path == "pocket":
        model, processor = load_pocket_llava()
    else:
        model = AutoModelForImageTextToText.from_pretrained(
            model_args.model_name_or_path,
            dtype=model_args.dtype or "auto",
            quantization_config=get_quantization_config(model_args),
        )
        processor = AutoProcessor.from_pretrained(model_args.model_name_or_path)
    apply_grip(model, grip_args.scorer, keep_ratio=grip_args.keep_ratio, selector=grip_args.selector)

    if script_args.dataset_name == "pocket":
        data = pocket_dataset(grip_args.rows)
    else:
        data = load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)
    model_args.lora_target_modules = model_args.lora_target_modules or LANGUAGE_MODEL_ONLY
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=data,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    model.grip.save_pretrained(f"{training_args.output_dir}/grip")


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, GripArguments))
    main(*parser.parse_args_and_config())
