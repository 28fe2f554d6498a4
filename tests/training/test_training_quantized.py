"""A quantized model is asked as it is; its scorer trains in float32."""

import pytest
import torch
from classroom import build_vlm, rows
from versions import TRAINING

from grip_hf.frozen.data import DatasetExamples
from grip_hf.frozen.sources import load_model
from grip_hf.frozen.store import SampleStore
from grip_hf.frozen.vlm import FrozenVLM
from grip_hf.scorer.model import GripScorer, GripScorerConfig
from grip_hf.training.grpo import grpo_config, make_grpo_trainer
from grip_hf.training.importance import attention_importance

pytestmark = TRAINING


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_training_on_a_quantized_model(tmp_path, quantize):
    for part in build_vlm(width=64):
        part.save_pretrained(tmp_path / "vlm")
    model, processor = load_model(str(tmp_path / "vlm"), quantize)
    assert "bitsandbytes" in type(model.model.language_model.layers[0].mlp.up_proj).__module__
    store = SampleStore(FrozenVLM(model, processor), DatasetExamples(rows(4)))
    found = attention_importance(store.vlm, store.samples(range(4)))
    assert torch.isfinite(found).all() and found.std() > 0
    scorer = GripScorer(GripScorerConfig(hidden_size=64, width=16, attention_width=16, num_heads=2))
    before = {name: value.clone() for name, value in scorer.state_dict().items()}
    args = grpo_config(
        str(tmp_path / "run"),
        use_cpu=True,
        per_device_train_batch_size=8,
        num_generations=4,
        max_steps=2,
        save_strategy="no",
        warmup_steps=0,
        disable_tqdm=True,
    )
    make_grpo_trainer(scorer, store, args, budgets=(0.1, 0.5)).train()
    assert {value.dtype for value in scorer.state_dict().values()} == {torch.float32}
    assert any(not torch.equal(before[name], value) for name, value in scorer.state_dict().items())
