"""`accelerate launch` with the configs of examples/accelerate, and a killed run of two processes going on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from classroom import build_vlm, rows
from datasets import Dataset
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = EXAMPLES / "accelerate"
SCRIPT = EXAMPLES / "train_grpo.py"


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
    """DeepSpeed itself needs a GPU to run; what accelerate hands to it is checked."""
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


def launch(work, output, config, *extra):
    """Start two processes; on a machine without GPUs accelerate takes gloo, and copies instead of shards."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml"]
    command += ["--main_process_port", "0", SCRIPT, "--model_name_or_path", work / "model"]
    command += ["--dataset_name", work / "data", "--output_dir", output, "--use_cpu", "--bf16", "False"]
    command += ["--num_generations", "4", "--per_device_train_batch_size", "4", "--warmup_steps_supervised", "1"]
    command += ["--learning_rate", "1e-2", "--warmup_steps", "0", "--save_steps", "2", *extra]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    env |= {"PYTHONPATH": str(EXAMPLES.parent), "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_MIXED_PRECISION": "no"}
    log = open(f"{output}.log", "a")  # noqa: SIM115
    return subprocess.Popen(
        list(map(str, command)), env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process, output):
    assert process.wait(timeout=900) == 0, Path(f"{output}.log").read_text()[-3000:]
    return load_file(output / "model.safetensors")


@pytest.mark.slow
def test_a_killed_run_of_two_processes_goes_on(work):
    """Killed at once, without a chance to tidy up, and started again by the same command: it comes to its end.

    The configs ask for different precisions, so weights are not compared; one process going on is, elsewhere.
    """
    whole = finish(launch(work, work / "whole", "ddp", "--max_steps", "4"), work / "whole")
    process = launch(work, work / "cut", "fsdp", "--max_steps", "4")
    # The state is written last by the first process; each process writes the state of its own generator.
    names = ("trainer_state.json", "rng_state_0.pth", "rng_state_1.pth")
    saved = [work / "cut" / "checkpoint-2" / name for name in names]
    while not all(path.exists() for path in saved) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert all(path.exists() for path in saved), Path(f"{work / 'cut'}.log").read_text()[-3000:]
    assert not (work / "cut" / "model.safetensors").exists()
    again = finish(launch(work, work / "cut", "fsdp", "--max_steps", "4"), work / "cut")
    assert again.keys() == whole.keys()
    assert all(value.isfinite().all() for value in again.values())
