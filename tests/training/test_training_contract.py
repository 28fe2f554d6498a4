"""What the mapping of keep-sets to completions relies on in TRL; holds for the range named in pyproject.toml."""

import inspect
import re
from pathlib import Path

import trl
from packaging.specifiers import SpecifierSet
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head


def test_the_installed_trl_is_in_the_range_that_the_package_names():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (wanted,) = re.findall(r'"trl([^"]+)"', project)
    specifiers = SpecifierSet(wanted)
    assert specifiers.contains(trl.__version__) and len(specifiers) == 2


def test_the_trainer_takes_a_rollout_function():
    assert "rollout_func" in inspect.signature(GRPOTrainer.__init__).parameters
    source = inspect.getsource(GRPOTrainer._generate)
    assert "self.rollout_func(prompts, self)" in source
    assert 'required_keys = {"prompt_ids", "completion_ids", "logprobs"}' in source
    assert 'extra_fields.pop("env_mask", None)' in source


def test_log_probs_come_from_the_backbone_and_the_output_embeddings():
    source = inspect.getsource(add_fused_lm_head)
    assert 'backbone_attr = "base_model"' in source and "self.get_output_embeddings()" in source
    assert "backbone_outputs.last_hidden_state[:, :-1]" in source
    source = inspect.getsource(GRPOTrainer._get_per_token_logps_and_entropies)
    assert 'model_inputs = {"input_ids": input_ids_batch, "attention_mask": attention_mask_batch}' in source


def test_rewards_get_the_rollouts_extras_as_columns():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert "inp[key] = values[i]" in source
    assert "rewards.view(-1, num_generations)" in source  # groups are neighbours in the global order
    assert "log_metric" in inspect.getsource(GRPOTrainer._calculate_rewards)


def test_settings_that_are_relied_on_exist():
    names = set(inspect.signature(GRPOConfig).parameters)
    from grip_hf.training.grpo import GRPO_DEFAULTS, GRPO_FIXED

    assert set(GRPO_DEFAULTS) | set(GRPO_FIXED) | {"beta", "reward_weights", "max_completion_length"} <= names
