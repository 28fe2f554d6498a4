import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from classroom import build_vlm, rows
from datasets import Dataset
from first_testbed import FIRST
from typer.testing import CliRunner
from versions import TRAINING

from grip_hf.cli.app import app
from grip_hf.evaluation.tasks import shipped_scorer
from grip_hf.patch import apply_grip
from grip_hf.scorer.model import GripScorer

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_grpo.py"
SMALL = ["--warmup-steps", "2", "--steps", "2", "--batch-size", "16", "--num-generations", "4"]
SMALL += ["--warmup-batch-size", "8", "--device", "cpu"]
SCORER = ["--width", "16", "--save-steps", "1"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vlm")
    for part in build_vlm():
        part.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "set"
    Dataset.from_list([{name: row[name] for name in ("image", "prompt")} for row in rows(12)]).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def command():
    return lambda *args: CliRunner().invoke(app, ["train", *map(str, args)])


@TRAINING
def test_a_model_and_dataset_of_ones_own_without_answers(command, model_folder, data_folder, tmp_path):
    own = ["--model", model_folder, "--dataset", data_folder, "--eval-examples", "3"]
    done = command("--output", tmp_path, *own, *SMALL, *SCORER)
    assert done.exit_code == 0, done.output
    table = json.loads((tmp_path / "eval_table.json").read_text())
    assert {"warmup", "grpo", "unpruned", "random"} <= {row["selector"] for row in table["rows"]}
    model, processor = build_vlm()
    apply_grip(model, scorer=tmp_path)  # with the budget that it was saved with
    inputs = processor(images=rows(1)[0]["image"], text="<image>is there any cat", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    assert len(model.grip.kept_tokens(out)[0]) == 4
    # A second run finds everything done, trains nothing and measures nothing.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("scorer/*")} | {
        tmp_path / "eval_table.json": (tmp_path / "eval_table.json").stat().st_mtime_ns
    }
    done = command("--output", tmp_path, *own, *SMALL, *SCORER)
    assert done.exit_code == 0 and "finished, nothing to do" in done.output and "the table is in" in done.output
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # Other settings are refused: the scorer there was not trained with them.
    for words, said in (
        (["--method", "relaxed"], "method is 'grpo' there, 'relaxed' here"),
        (["--width", "32"], "scorer.width is 16 there, 32 here"),
    ):
        done = command("--output", tmp_path, *own, *SMALL, *SCORER, *words)
        assert done.exit_code == 2 and said in " ".join(done.output.replace("│", " ").split())
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # The table and the card tell the settings that the scorer was trained with, and that answers were compared.
    assert table["meta"]["plan"]["scorer"]["width"] == 16 and table["meta"]["metric"].startswith("agreement")
    card = (tmp_path / "README.md").read_text()
    assert "| scorer.width | `16` |" in card and "Agreement with the full model in %" in card
    assert 'apply_grip(model, scorer="path/to/this/folder")' in card and "right answers" not in card.lower()
    assert [path.parent for path in tmp_path.rglob("README.md")] == [tmp_path], "a card of TRL's is left"


@TRAINING
def test_a_bad_row_is_named_before_training_and_can_be_left_out(command, model_folder, tmp_path):
    data = [{"image": f"{i}.png", "question": "is there any cat", "answer": "yes"} for i in range(12)]
    (tmp_path / "data").mkdir()
    for i in range(12):
        rows(24)[2 * i]["image"].save(tmp_path / "data" / f"{i}.png")
    (tmp_path / "data" / "9.png").write_bytes(b"no picture")
    (tmp_path / "data" / "rows.json").write_text(json.dumps(data))
    words = ["--output", tmp_path / "run", "--model", model_folder, "--dataset", tmp_path / "data" / "rows.json"]
    words += [*SMALL, *SCORER, "--eval-examples", "2"]
    done = command(*words)
    said = " ".join(done.output.replace("│", " ").split())
    assert done.exit_code == 2 and "1 of 12 rows cannot be used: row 9" in said and "--on-bad-row skip" in said
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
    done = command(*words, "--on-bad-row", "skip")
    assert done.exit_code == 0, done.output
    assert (
        "1 of 12 rows are left out: row 9" in done.output and "questions: 'question'; answers: 'answer'" in done.output
    )
    assert list(json.loads((tmp_path / "run" / "bad_rows.json").read_text())) == ["9"]
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["plan"]["questions"] == 9


@TRAINING
@pytest.mark.slow
def test_rows_that_stream_and_pictures_that_stay(command, model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    made = Dataset.from_list([{name: row[name] for name in ("image", "prompt", "answer")} for row in rows(60)])
    made.to_parquet(str(tmp_path / "rows.parquet"))
    words = ["--model", model_folder, "--dataset", tmp_path / "rows.parquet", "--examples", "16", "--streaming"]
    words += [*SMALL, *SCORER, "--eval-examples", "4", "--pictures", tmp_path / "pictures"]
    done = command("--output", tmp_path / "run", *words)
    assert done.exit_code == 0 and "20 questions" in done.output, done.output
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1
    assert len(list((tmp_path / "pictures").rglob("*.safetensors"))) > 1
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["plan"]
    assert plan["data"]["streaming"] is True and plan["questions"] <= 16
    done = command("--output", tmp_path / "run", *(word for word in words if word != "--streaming"))
    assert done.exit_code == 2 and "streaming" in done.output


def on_the_pocket_scenes(folder):
    """The options that train for another model of the first testbed."""
    return ["--pocket", *FIRST, "--pocket-model", folder, "--rows", "18", "--eval-examples", "0"]


@TRAINING
def test_options_of_trl_reach_it(command, model_folder, tmp_path):
    words = [*on_the_pocket_scenes(model_folder), *SMALL, *SCORER]
    done = command("--output", tmp_path, *words, "--gradient_accumulation_steps", "2", "--top-entropy-quantile", "0.5")
    assert done.exit_code == 0, done.output
    plan = json.loads((tmp_path / "plan.json").read_text())["plan"]
    assert plan["args"]["gradient_accumulation_steps"] == 2 and plan["args"]["top_entropy_quantile"] == 0.5
    saved = torch.load(tmp_path / "grpo" / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert saved.gradient_accumulation_steps == 2


@TRAINING
def test_a_dry_run_measures_and_leaves_nothing(command, model_folder, tmp_path):
    words = [*on_the_pocket_scenes(model_folder), *SMALL, *SCORER]
    done = command("--output", tmp_path / "run", *words, "--warmup-steps", "3000", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "18 questions to train on, 0 held out" in done.output and not (tmp_path / "run").exists()
    each = float(re.search(r"warmup: 3000 steps of ([\d.]+) s \(the mean of 3", done.output)[1])
    total, unit = re.search(r"about ([\d.]+) (hours|minutes) in all", done.output).groups()
    seconds = float(total) * {"hours": 3600, "minutes": 60}[unit]
    assert 3000 * (each - 0.01) - 360 <= seconds <= 3000 * (each + 0.01) + 400


@TRAINING
def test_the_relaxation_on_the_pocket_scenes(command, model_folder, tmp_path):
    pocket = on_the_pocket_scenes(model_folder)
    done = command("--output", tmp_path, *pocket, *SMALL, *SCORER, "--method", "relaxed")
    assert done.exit_code == 0, done.output
    scorers = [GripScorer.from_pretrained(tmp_path / name / "scorer") for name in ("warmup", "relaxed")]
    pairs = zip(*(scorer.parameters() for scorer in scorers), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    # And on from there, by GRPO and with a memory.
    more = ["--scorer", tmp_path / "relaxed" / "scorer", "--memory-width", "4", "--steps", "2", "--device", "cpu"]
    sizes = ["--batch-size", "8", "--num-generations", "4"]
    done = command("--output", tmp_path / "more", *pocket, *more, *sizes)
    assert done.exit_code == 0, done.output
    assert GripScorer.from_pretrained(tmp_path / "more").config.memory_width == 4
    assert not (tmp_path / "more" / "warmup").exists()


@TRAINING
def test_a_run_that_goes_on_from_the_models_own_scorer(command, tmp_path):
    words = ["--pocket", *FIRST, "--scorer", "grip", "--steps", "0", "--rows", "18", "--eval-examples", "0", "--cpu"]
    done = command("--output", tmp_path, *words)
    assert done.exit_code == 0, done.output
    found, shipped = GripScorer.from_pretrained(tmp_path).state_dict(), shipped_scorer("grip").state_dict()
    assert found.keys() == shipped.keys() and all(torch.equal(found[name], shipped[name]) for name in found)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "either --pocket"),
        (["--model", "x"], "either --pocket"),
        (["--pocket", "--budgets", "0,0.5"], "0 < low <= high <= 1"),
        (["--pocket", "--budgets", "0.5"], "2 numbers"),
        (["--pocket", "--reward-weights", "1"], "needs 2 numbers"),
        (["--pocket", "--method", "magic"], "method must be one of"),
        (["--pocket", "--pocket-model", "/nowhere"], "cannot load the model"),
        (["--model", "{model}", "--dataset", "/nowhere"], "cannot load the dataset"),
        (["--model", "{model}", "--dataset", "{data}", "--eval-examples", "12"], "too few to hold out 12"),
        (["--pocket", "--generations", "1"], "2"),
        (["--pocket", "--quantize", "4bit"], "go with --model"),
        (["--pocket", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["--pocket", "--max_steps", "3"], "--max_steps: this command sets it"),
        (["--pocket", "--metric", "bleu"], "metric must be one of"),
        (["--pocket", "--keep-ratio", "0"], "keep_ratio must be a number in (0, 1]"),
        (["--model", "{model}", "--dataset", "{data}", "--split", "test", "--cpu"], "too few to hold out 450"),
        (
            ["--model", "{model}", "--dataset", "{data}", "--quantize", "3bit", "--eval-examples", "0"],
            "must be 4bit or 8bit, got '3bit'",
        ),
        (["--pocket", "--rate", "-1"], "learning_rate must be a positive number, got -1.0"),
        (["--pocket", "--warmup-rate", "nan"], "learning_rate must be a positive number, got nan"),
        (["--pocket", "--temperature", "0"], "temperature must be a positive number, got 0.0"),
        (["--pocket", "--method", "relaxed", "--temperature", "-1"], "temperature must be a positive number"),
        (["--pocket", "--beta", "-0.1"], "beta must be a number >= 0, got -0.1"),
        (["--pocket", "--entropy", "inf"], "entropy_coef must be a number >= 0, got inf"),
        (["--pocket", "--reward-weights", "1,nan"], "reward_weights must be finite"),
        (["--pocket", "--rewards", "magic", "--reward-weights", "1"], "rewards must be functions or among"),
        (["--pocket", "--target", "magic"], "target must be one of"),
        (["--pocket", "--batch", "10"], "divisible by num_generations"),
        (["--pocket", "--report-to", "nowhere"], "nowhere is not supported"),
        ([*on_the_pocket_scenes("{model}"), "--scorer", "grip"], "no scorer came with"),
        (["--pocket", "--pocket-model", "{model}"], "is one of testbed 'pocket', not of 'pocket2'"),
    ],
)
@TRAINING
def test_bad_arguments(command, model_folder, data_folder, tmp_path, args, message):
    args = [arg.format(model=model_folder, data=data_folder) for arg in args]
    done = command("--output", tmp_path, "--cpu", *args)
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split()), done.output
    assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("checkpoint-*"))


@TRAINING
def test_an_output_that_is_no_folder(command, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = command("--output", tmp_path / "file", "--pocket", "--cpu", "--eval-examples", "0")
    assert done.exit_code == 1 and f"the folder {tmp_path / 'file'} cannot be made" in done.output
    assert (tmp_path / "file").read_text() == "mine"


def run_script(args, processes=1, **env):
    several = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    launch = [sys.executable, *(several if processes > 1 else [])]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1", **env}
    env["PYTHONPATH"] = str(EXAMPLE.parents[1])
    done = subprocess.run([*launch, *args], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@TRAINING
def test_the_example_script(model_folder, data_folder, tmp_path):
    run_script([
        EXAMPLE, "--model_name_or_path", model_folder, "--dataset_name", data_folder, "--output_dir", tmp_path,
        "--max_steps", "2", "--num_generations", "4", "--per_device_train_batch_size", "8", "--use_cpu",
        "--warmup_steps_supervised", "1",
    ])  # fmt: skip
    assert GripScorer.from_pretrained(tmp_path).config.hidden_size == 16


@pytest.mark.slow
@TRAINING
def test_two_processes_agree(tmp_path):
    """One budget per group even where a group spans both processes, and equal weights on both at the end."""
    script = tmp_path / "two.py"
    script.write_text(
        f"""
import sys, json, torch
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
from classroom import make_scorer, make_store
from grip_hf.training.grpo import grpo_config, make_grpo_trainer
seen = []
def watch(completion_ids, budget, keep_ratio, **columns):
    seen.append([list(budget), list(keep_ratio)])
    return [float(len(set(picks) & {{1, 2, 3}})) for picks in completion_ids]
scorer = make_scorer()
# Two processes of 6 rows each: 3 groups of 4, the second of which spans both.
args = grpo_config({str(tmp_path / "run")!r}, use_cpu=True, max_steps=3, per_device_train_batch_size=6,
                   num_generations=4, save_strategy="no", warmup_steps=0, learning_rate=1e-2, disable_tqdm=True)
trainer = make_grpo_trainer(scorer, make_store(), args, [watch], (0.1, 0.9))
trainer.train()
torch.save({{"weights": scorer.state_dict(), "seen": seen}}, {str(tmp_path)!r} + f"/rank{{args.process_index}}.pt")
"""
    )
    run_script([script], processes=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for name, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][name]), name
    for (_, first), (_, second) in zip(ranks[0]["seen"], ranks[1]["seen"], strict=True):
        ratios = first + second
        assert [len(set(ratios[i : i + 4])) for i in (0, 4, 8)] == [1, 1, 1] and len(set(ratios)) == 3
    from classroom import make_scorer

    start = make_scorer().state_dict()
    assert any(not torch.equal(start[name], value) for name, value in ranks[0]["weights"].items())
