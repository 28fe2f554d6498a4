"""A reward model that is pruned: rewards are those of the masked model, with the tokens that the prompt keeps."""

import pytest
import torch
import trl
from datasets import Dataset
from first_testbed import load_pocket_llava
from lessons import OFFLINE
from reference import held_positions, original_positions
from tiny import IMAGE, PAD, TINY, make_inputs
from transformers import Gemma3ForSequenceClassification
from versions import TRAINING

from grip_hf import apply_grip, remove_grip

pytestmark = TRAINING
ASKED = [[3, IMAGE, 4], [2, IMAGE, 5]]
ANSWERS = {"chosen": [41, 42, 43], "rejected": [51, 52, 53]}


def by_words(batch):
    """A choice that hangs on every word of the question."""
    words = (batch.text * batch.text_mask[..., None]).sum((1, 2))
    return torch.cos(torch.arange(batch.mask.shape[1]) * 1.7 + words[:, None])


def judge():
    """A tiny reward model, which has a head for one number in place of the words."""
    torch.manual_seed(0)
    config = TINY["gemma3"].config()
    config.num_labels, config.text_config.pad_token_id = 1, PAD
    return Gemma3ForSequenceClassification(config).eval()


def answered():
    """The prompts, and both answers to each: chosen ones first, as `trl.RewardTrainer` stacks them."""
    inputs = make_inputs("gemma3", ASKED)
    calls = []
    for answer in ANSWERS.values():
        said = torch.tensor(answer).expand(len(ASKED), -1)
        parts = {"input_ids": said, "attention_mask": torch.ones_like(said), "token_type_ids": torch.zeros_like(said)}
        calls.append({name: torch.cat([inputs[name], part], 1) for name, part in parts.items()})
    both = {name: torch.cat([call[name] for call in calls]) for name in calls[0]}
    return inputs, {**both, "pixel_values": torch.cat([inputs["pixel_values"]] * 2)}


class Judge(trl.RewardTrainer):
    """As the documentation has it: TRL's own trainer, told where the prompt ends."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with self.accelerator.unwrap_model(model).grip.prompt(inputs.pop("prompt_lengths")):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


@pytest.mark.parametrize("told", [True, False])
def test_rewards(tmp_path, told):
    inputs, both = answered()
    model = apply_grip(judge(), num_tokens=2, selector=by_words)
    with torch.no_grad():
        model(**inputs)
        alone = [one.tolist() for one in model.grip.last.kept] * 2
        model(**both)
    assert [one.tolist() for one in model.grip.last.kept] != alone  # where nobody tells, the answer chooses too

    def collate(rows):
        return {**both, **({"prompt_lengths": inputs["attention_mask"].sum(1).tolist() * 2} if told else {})}

    args = trl.RewardConfig(str(tmp_path), per_device_train_batch_size=2, remove_unused_columns=False, **OFFLINE)
    rows = [{f"{name}_{kind}": ids for name, ids in ANSWERS.items() for kind in ("ids", "input_ids")}] * 2
    trainer = (Judge if told else trl.RewardTrainer)(
        model,
        args,
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        processing_class=load_pocket_llava()[1].tokenizer,
    )
    if not told:
        with pytest.warns(UserWarning, match="tells neither labels nor prompt"):
            trainer.train()
        return
    trainer.train()
    assert [one.tolist() for one in model.grip.last.kept] == alone
    held = held_positions(both, model.grip.last.kept)
    masked = {**both, "attention_mask": held.long(), "position_ids": original_positions(model, both)}
    with torch.no_grad():
        chosen, rejected = remove_grip(model).eval()(**masked).logits.squeeze(-1).chunk(2)
    expected = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(expected), rel=1e-4)
