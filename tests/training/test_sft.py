"""Fine-tuning a pruned model: TRL's trainer against the plain one, adapters that come back, a 4-bit base."""

import importlib.util
import pathlib

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Trainer, TrainerCallback, TrainingArguments

from grip_hf import apply_grip
from grip_hf.pocket import load_pocket_llava
from grip_hf.pocket.examples import PocketExamples
from grip_hf.pocket.model import WEIGHTS

SPEC = importlib.util.spec_from_file_location(
    "sft_pruned", pathlib.Path(__file__).parents[2] / "examples/sft_pruned.py"
)
STEPS, BATCH = 4, 2
SETTINGS = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "remove_unused_columns": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def example():
    module = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(module)
    return module


def adapted(keep_ratio):
    """The pocket model with adapters that have a seed, pruned; and how long the sequences are that its layers see."""
    model, processor = load_pocket_llava()
    apply_grip(model, keep_ratio=keep_ratio, selector="random")
    torch.manual_seed(0)
    target = r".*language_model\.layers.*(q|v|up)_proj"
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_dropout=0.0, target_modules=target))
    lengths = []
    layer = model.get_base_model().model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    return model, processor, lengths


def plain_collate(processor):
    """Rows to a batch without TRL: one row at a time by the processor, padded on the right by hand."""

    def collate(rows):
        made = []
        for row in rows:
            prompt = processor(images=row["images"][0], text=row["prompt"].removeprefix("<s>"), return_tensors="pt")
            answer = processor.tokenizer.convert_tokens_to_ids(row["completion"].split())
            made.append((prompt["input_ids"][0].tolist(), answer, prompt["pixel_values"][0]))
        width = max(len(prompt) + len(answer) for prompt, answer, _ in made)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, answer, _ in made:
            gap = width - len(prompt) - len(answer)
            batch["input_ids"].append(prompt + answer + [processor.tokenizer.pad_token_id] * gap)
            batch["attention_mask"].append([1] * (width - gap) + [0] * gap)
            batch["labels"].append([-100] * len(prompt) + answer + [-100] * gap)
        return {
            **{name: torch.tensor(rows) for name, rows in batch.items()},
            "pixel_values": torch.stack([m[2] for m in made]),
        }

    return collate


def run(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: value for name, value in trainer.model.state_dict().items() if "lora_" in name}
    return losses, weights


@pytest.mark.slow
def test_trl_and_the_plain_trainer_agree_step_by_step(tmp_path, example):
    settings = {**SETTINGS, "optim": "sgd", "learning_rate": 0.1}  # Adam's steps hang on the signs of tiny gradients
    data = Dataset.from_list(list(example.pocket_rows(STEPS * BATCH, 5)))
    model, processor, lengths = adapted(0.11)
    args = trl.SFTConfig(str(tmp_path), max_length=None, gradient_checkpointing=False, **settings)
    losses, weights = run(trl.SFTTrainer(model, args, train_dataset=data, processing_class=processor))
    assert len(losses) == STEPS and max(lengths) < 50  # 28 visual tokens and the words

    model, processor, lengths = adapted(0.11)
    args = TrainingArguments(str(tmp_path), **settings)
    plain, expected = run(Trainer(model, args, train_dataset=data, data_collator=plain_collate(processor)))
    assert max(lengths) < 50 and losses == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert len(set(plain)) == STEPS and weights.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)

    model, processor, lengths = adapted(1.0)  # the control: all tokens give other losses
    full, _ = run(Trainer(model, args, train_dataset=data, data_collator=plain_collate(processor)))
    assert min(lengths) > 256 and full[0] != pytest.approx(plain[0], rel=1e-2)


def train(example, folder, rows=8, grip=(), settings=(), **model):
    args = trl.SFTConfig(str(folder), seed=7, **{**SETTINGS, **dict(settings)})
    chosen = example.GripArguments(keep_ratio=0.11, examples=rows, **{"selector": "random", **dict(grip)})
    pocket = trl.ModelConfig(model_name_or_path="pocket", use_peft=True, lora_r=4, **model)
    example.main(trl.ScriptArguments(dataset_name="pocket"), args, pocket, chosen)


@torch.no_grad()
def answer_logits(model):
    """Logits at the last position of one prompt, and the number of visual tokens kept."""
    scene, question = PocketExamples(9, split="test").look(3)
    processor = load_pocket_llava()[1]
    inputs = processor(images=scene.image, text=f"<image>{question.text} ", return_tensors="pt")
    out = model.eval()(**inputs)
    grip = peft.PeftModel.get_base_model(model).grip if isinstance(model, peft.PeftModel) else model.grip
    return out.logits[0, -1].float(), len(grip.kept_tokens(out)[0])


@pytest.mark.slow
def test_adapters_and_pruning_come_back(tmp_path, example):
    train(example, tmp_path, grip={"selector": "random", "merge": True})
    base = load_pocket_llava()[0]
    loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    before, kept = answer_logits(apply_grip(loaded, scorer=tmp_path / "grip"))
    assert kept == 28 and base.grip.config.selector == "random"
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    after, kept = answer_logits(apply_grip(merged))  # its settings lie beside its weights
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    assert kept == 28
    untrained, _ = answer_logits(apply_grip(load_pocket_llava()[0], scorer=tmp_path / "grip"))
    assert (untrained - before).abs().max() > 0.1


class Stop(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == STEPS - 1:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_command(tmp_path, example, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": STEPS // 2}
    train(example, tmp_path / "whole", settings=settings)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Stop])
        train(example, tmp_path / "cut", settings=settings)
    assert not (tmp_path / "cut" / "adapter_model.safetensors").exists()
    train(example, tmp_path / "cut", settings=settings)
    whole, cut = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    halfway = load_file(tmp_path / "cut" / f"checkpoint-{STEPS // 2}" / "adapter_model.safetensors")
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
    assert not all(torch.equal(halfway[name], value) for name, value in whole.items())


@pytest.mark.slow
def test_a_quantized_base_trains_on_the_cpu(tmp_path, example):
    pytest.importorskip("bitsandbytes")
    train(example, tmp_path, grip={"selector": "grip"}, load_in_4bit=True)  # the scorer that came with the model
    adapters = load_file(tmp_path / "adapter_model.safetensors")
    assert any(value.any() for name, value in adapters.items() if "lora_B" in name)
    assert (tmp_path / "grip" / "model.safetensors").is_file()
    loaded = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(WEIGHTS), tmp_path)
    logits, kept = answer_logits(apply_grip(loaded.float(), scorer=tmp_path / "grip"))
    assert kept == 28 and logits.isfinite().all()
