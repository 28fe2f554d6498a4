"""`accelerate launch` with the configs of examples/accelerate, and a killed run of two processes going on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from classroom import build_vlm, rows
from datasets import Dataset
from safetensors.torch import load_file

from grip_hf.pocket.model import WEIGHTS

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGS = EXAMPLES / "accelerate"
KILLED, AS_GPUS = (Path(__file__).parents[1] / "support" / f"{name}.py" for name in ("killed", "as_gpus"))


def parse(name):
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "script.py"])
    args, defaults, _ = _validate_launch_command(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # as `launch_command` does
    return args


def test_the_config_for_copies():
    args = parse("ddp")
    assert args.multi_gpu and not args.use_fsdp and not args.use_deepspeed and args.num_processes == 2
    assert prepare_multi_gpu_env(args)["ACCELERATE_MIXED_PRECISION"] == "no"


def test_the_config_for_shards(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin

    args = parse("fsdp")
    assert args.use_fsdp and not args.multi_gpu
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.transformer_cls_names_to_wrap == ["LlamaDecoderLayer"]
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and plugin.cpu_ram_efficient_loading


def test_the_config_for_deepspeed():
    args = parse("deepspeed")
    assert args.use_deepspeed and args.zero_stage == 2
    env = prepare_deepspeed_cmd_env(args)[1]
    assert env["ACCELERATE_USE_DEEPSPEED"] == "true" and env["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A tiny model and dataset on disk."""
    folder = tmp_path_factory.mktemp("launch")
    model, processor = build_vlm()
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    Dataset.from_list(rows(12)).save_to_disk(folder / "data")
    return folder


def launch(config, *script, env=()):
    """Run in two processes; on a machine without GPUs accelerate takes gloo. Gives the exit code and the log."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml"]
    command += ["--main_process_port", "0", *script, "--bf16", "False"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", **dict(env)}
    env |= {"PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def copies(*script):
    return launch("ddp", *script, "--use_cpu", env={"ACCELERATE_USE_CPU": "true"})


def shards(config, *script):
    return launch(config, AS_GPUS, *script, env={"ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"})


def training(work, output):
    """The script that trains a scorer, and its arguments."""
    script = [EXAMPLES / "train_grpo.py", "--model_name_or_path", work / "model", "--output_dir", output]
    script += ["--dataset_name", work / "data", "--num_generations", "4", "--per_device_train_batch_size", "4"]
    script += ["--learning_rate", "1e-2", "--warmup_steps", "0", "--save_steps", "2", "--max_steps", "5"]
    return [*script, "--warmup_steps_supervised", "1", "--layers", "1"]  # rounding grows with each layer


def fine_tuning(output):
    """The script that fine-tunes a pruned model, and its arguments."""
    script = [EXAMPLES / "sft_pruned.py", "--selector", "grip", "--keep_ratio", "0.11", "--merge", "--rows", "16"]
    script += ["--max_steps", "2", "--per_device_train_batch_size", "4", "--learning_rate", "1e-2"]
    script += ["--gradient_checkpointing", "False", "--lora_dropout", "0", "--save_strategy", "no"]
    return [*script, "--output_dir", output]


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on(work):
    """Killed without a chance to tidy up and started again by the same command, it ends like a run left alone.

    Both processes kill themselves one step after a checkpoint: to kill the launcher from outside would leave them
    running, as each has a session of its own. All steps are of one epoch: after a resume in a later one, TRL's
    sampler repeats the order of the first.
    """
    whole, cut = work / "whole", work / "cut"
    code, log = copies(*training(work, whole))
    assert code == 0, log
    code, log = copies(KILLED, "3", *training(work, cut))
    assert code != 0 and "SIGKILL" in log, log
    assert [path.name for path in cut.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (cut / "model.safetensors").exists()
    code, log = copies(*training(work, cut))
    assert code == 0, log
    start, end, again = (load_file(f / "model.safetensors") for f in (whole / "warmup" / "scorer", whole, cut))
    assert again.keys() == end.keys()
    end.pop("head.2.bias")  # it shifts all scores alike: its gradient is rounding, of which Adam makes whole steps
    for name, value in end.items():
        torch.testing.assert_close(again[name], value, atol=1e-6, rtol=1e-5)
    assert any((start[name] - value).abs().max() > 1e-2 for name, value in end.items())


@pytest.fixture(scope="module")
def tuned_by_copies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copies")
    code, log = copies(*fine_tuning(folder))
    assert code == 0, log
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "prepared"),
    [("fsdp", "FSDPPeftModelForCausalLM with DTensor"), ("deepspeed", "DeepSpeedEngine with Tensor")],
)
def test_shards_learn_what_copies_learn(tmp_path, tuned_by_copies, config, prepared):
    """FSDP and DeepSpeed, as accelerate sets them up, fine-tune a pruned model as DDP does, and write it whole."""
    if config == "deepspeed":
        pytest.importorskip("deepspeed")
    code, log = shards(config, *fine_tuning(tmp_path))
    assert code == 0 and log.count(f"prepared {prepared}\n") == 2, log
    for name in ("adapter_model.safetensors", "merged/model.safetensors"):
        expected, found = load_file(tuned_by_copies / name), load_file(tmp_path / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4)
    before = load_file(WEIGHTS / "model.safetensors")
    moved = [name for name in found if (found[name].float() - before[name].float()).abs().max() > 1e-3]
    assert moved and all("language_model" in name for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["fsdp", "deepspeed"])
def test_a_scorer_is_trained_in_copies(work, tmp_path, config):
    if config == "deepspeed":
        pytest.importorskip("deepspeed")
    code, log = shards(config, *training(work, tmp_path))
    assert code != 0 and "is trained as a whole copy in each process" in log, log
    assert not list(tmp_path.rglob("*.safetensors"))
