"""A trainer's reference model keeps what the policy keeps: losses and divergences at step 1 are those of equal models."""

import math

import peft
import pytest
import torch
import trl
from accelerate import Accelerator
from datasets import Dataset
from lessons import OFFLINE, Watch, kept_of_prompts, masked_logits, pruned, rows
from transformers import TrainerCallback
from versions import TRAINING

from grip_hf import apply_grip, remove_grip
from grip_hf.errors import ConfigError
from grip_hf.pocket import load_pocket_llava
from grip_hf.training import PruneReference, prune_like

pytestmark = TRAINING
ROWS = list(rows())
PROMPTS = [(row["images"][0], f"<s><image>{row['question']}") for row in ROWS]
CHATS = [(image, f"<image>{row['question']} ") for (image, _), row in zip(PROMPTS, ROWS, strict=True)]
LORA = {"r": 2, "target_modules": r".*language_model\.layers.*(q|v)_proj"}
WARNING = "reference model that sees all visual tokens"


@pytest.fixture(scope="module")
def expected():
    return kept_of_prompts(PROMPTS)


def preferences():
    for (image, text), row in zip(PROMPTS, ROWS, strict=True):
        yield {
            "images": [image],
            "prompt": text,
            "chosen": f" {row['right']} </s>",
            "rejected": f" {row['wrong']} </s>",
        }


def judged():
    for number, row in enumerate(preferences()):
        good = bool(number % 2)
        chosen = row["chosen" if good else "rejected"]
        yield {"images": row["images"], "prompt": row["prompt"], "completion": chosen, "label": good}


def asked():
    for row in ROWS:
        yield {"images": row["images"], "prompt": [{"role": "user", "content": row["question"]}]}


def lengths(completions, **_):
    return [float(len(one[0]["content"])) for one in completions]


MAKERS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, preferences, {"max_length": None}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, judged, {"max_length": None}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, asked, {"beta": 0.1, "num_generations": 4, "num_iterations": 2}),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, asked, {"beta": 0.1, "num_generations": 4}),
}


def make(kind, folder, model=None, adapted=False, **settings):
    """A trainer of four rows, or of four answers to one question, at a step."""
    kinds, config, data, own = MAKERS[kind]
    patched, processor = pruned()
    options = {} if data is not asked else {"reward_funcs": lengths}
    if data is asked:
        own = {**own, "max_completion_length": 6, "temperature": 2.0, "seed": 3}
    reference = settings.pop("ref_model", None)
    return kinds(
        model or patched,
        args=config(str(folder), per_device_train_batch_size=4, **{**OFFLINE, **own, **settings}),
        train_dataset=Dataset.from_list(list(data())),
        processing_class=processor,
        peft_config=peft.LoraConfig(**LORA) if adapted else None,
        **({} if reference is None else {"ref_model": reference}),
        **options,
    )


def first(trainer):
    trainer.train()
    return trainer.state.log_history[0]


RIGHT = {
    "dpo": ("loss", math.log(2)),
    "kto": ("loss", 0.5),
    "grpo": ("kl", 0.0),
    "rloo": ("kl", 0.0),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_first_step(tmp_path, recwarn, kind, adapted):
    trainer = make(kind, tmp_path, adapted=adapted)
    trainer.add_callback(PruneReference(trainer))
    name, value = RIGHT[kind]
    assert first(trainer)[name] == pytest.approx(value, abs=1e-6)
    assert (trainer.ref_model is None) == adapted
    assert not [one for one in recwarn if WARNING in str(one.message)]


@pytest.mark.parametrize("kind", MAKERS)
def test_without_it_a_warning_says_so(tmp_path, kind):
    trainer = make(kind, tmp_path)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        log = first(trainer)
    name, value = RIGHT[kind]
    assert log[name] != pytest.approx(value, abs=1e-4)
    assert len([one for one in caught if WARNING in str(one.message)]) == 1
    assert "grip" not in vars(trainer.ref_model)
