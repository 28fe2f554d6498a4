import json
import os
import subprocess
import sys

import pytest
import torch
import typer
from classroom import TOKENS, build_vlm, make_scorer, rows
from first_testbed import FIRST, WEIGHTS, PocketExamples, load_pocket_llava
from typer.testing import CliRunner
from versions import TRAINING

from grip_hf.cli.eval import eval_command
from grip_hf.config import ConfigError
from grip_hf.evaluation.downsampling import downsample
from grip_hf.evaluation.methods import Oracle, Prompts
from grip_hf.evaluation.runner import evaluate
from grip_hf.evaluation.shrinking import Shrunk
from grip_hf.evaluation.tasks import SHIPPED, SHIPPED_FOLDER, named_selectors, pocket_examples, shipped_scorer
from grip_hf.frozen.data import DatasetExamples
from grip_hf.patch import apply_grip, remove_grip
from grip_hf.scorer.model import ScorerError
from grip_hf.selectors import SELECTORS, get_selector

pytestmark = TRAINING

RATIOS = (0.5, 0.2)


def own_answers(count):
    """Rows whose answers are what the model says, but for every third, so that some are right."""
    model, processor = build_vlm()
    found = rows(count)
    for i, row in enumerate(found):
        inputs = processor(images=row["image"], text="<image>" + row["prompt"], return_tensors="pt")
        said = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1]
        row["answer"] = processor.tokenizer.decode(said) if i % 3 else "apple"
        row["task"] = "even" if i % 2 == 0 else "odd"
        row["evidence"] = [i % TOKENS, 3, 9]
    return found


def test_accuracy_equals_greedy_generation_through_the_patch(monkeypatch):
    """For each selector and budget: patch, generate, compare texts."""
    data = own_answers(12)
    monkeypatch.setattr(
        "grip_hf.frozen.vlm.FrozenVLM.answer_tokens",
        lambda self, answer: torch.tensor(self.processor.tokenizer(answer, add_special_tokens=False).input_ids),
    )
    names = ("cls_attention", "similarity", "grid")
    selectors = {name: get_selector(name) for name in names}
    found = evaluate(*build_vlm(), DatasetExamples(data), selectors, RATIOS, batch_size=5, progress=False).rows
    table = {(row["selector"], row["budget"], row["task"]): row for row in found}
    assert table["unpruned", 1.0, "even"]["n"] == 6
    assert 0 < table["unpruned", 1.0, "mean"]["accuracy"] < 1
    for name in names:
        for ratio in RATIOS:
            model, processor = build_vlm()
            apply_grip(model, keep_ratio=ratio, selector=name)
            right = {"even": 0, "odd": 0}
            for row in data:
                inputs = processor(images=row["image"], text="<image>" + row["prompt"], return_tensors="pt")
                said = model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1:]
                right[row["task"]] += processor.tokenizer.decode(said) == row["answer"]
            for task, count in right.items():
                assert table[name, ratio, task]["accuracy"] == pytest.approx(count / 6)


def test_the_oracle_keeps_the_evidence():
    data = own_answers(3)
    seen = []

    class Watched(Oracle):
        def scores(self, batch, samples):
            seen.append(super().scores(batch, samples).topk(3).indices.tolist())
            return super().scores(batch, samples)

    evaluate(*build_vlm(), DatasetExamples(data), {"oracle": Watched()}, [0.2], progress=False)
    assert seen == [[[0, 3, 9], [1, 3, 9], [2, 3, 9]]]
    data[1]["evidence"] = [TOKENS]
    with pytest.raises(ConfigError, match="evidence must name visual tokens 0 to 15"):
        evaluate(*build_vlm(), DatasetExamples(data), {"oracle": Oracle()}, [0.2], progress=False)
    for row in data:
        del row["evidence"]
    with pytest.raises(ConfigError, match="needs examples with a column 'evidence'"):
        evaluate(*build_vlm(), DatasetExamples(data), {"oracle": Oracle()}, [0.2], progress=False)


def test_the_model_is_left_as_it_was_also_after_an_error():
    model, processor = build_vlm()

    def broken(batch):
        raise RuntimeError("broken selector")

    with pytest.raises(RuntimeError, match="broken selector"):
        selectors = {"tap": get_selector("cls_attention"), "broken": broken}
        evaluate(model, processor, DatasetExamples(rows(2)), selectors, [0.5], progress=False)
    assert not hasattr(model, "grip")
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if hook.__module__.startswith("grip_hf")]


@pytest.mark.parametrize("budgets", [[], [0.0], [1.5], [float("nan")]])
def test_bad_budgets(budgets):
    with pytest.raises(ConfigError):
        evaluate(*build_vlm(), DatasetExamples(rows(1)), {"grid": get_selector("grid")}, budgets)


@pytest.fixture(scope="module")
def pocket():
    """The pocket model, its processor, and one question of each kind."""
    drawn = pocket_examples(9, 5, "pocket")
    return *load_pocket_llava(), [drawn[row] for row in range(9)]


@pytest.mark.parametrize("name", [*sorted({*SELECTORS} - {"grip"}), "warmup", "unpruned"])
def test_every_selector_answers_as_the_patched_model_does(name, pocket, monkeypatch):
    """Encoded pictures, batches and padding change nothing: not a token that is written."""
    model, processor, examples = pocket
    heard = []

    class Watched(Prompts):
        def said(self, inputs):
            found = super().said(inputs)
            heard.extend(found[0])
            return found

    def until_end(ids):
        ids = ids.tolist()
        return ids[: ids.index(model.generation_config.eos_token_id) + 1] if 2 in ids else ids

    monkeypatch.setattr("grip_hf.evaluation.runner.Prompts", Watched)
    selectors = {} if name == "unpruned" else named_selectors([name], testbed="pocket")
    evaluate(model, processor, examples, selectors, [0.06], batch_size=9, progress=False)
    heard = heard[0 if name == "unpruned" else 9 :]
    assert len(heard) == 9 and len(heard[0]) > 3
    if selectors:
        apply_grip(model, keep_ratio=0.06, selector=selectors[name])
    for example, mine in zip(examples, heard, strict=True):
        inputs = processor.apply_chat_template(
            [example.messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        theirs = model.generate(**inputs, max_new_tokens=len(mine), do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert until_end(mine) == until_end(theirs)
    remove_grip(model)


def test_downsampling_answers_as_the_model_does_with_smaller_pictures(pocket):
    """Per question: the picture shrunk by hand, one forward pass per token."""
    model, processor, examples = pocket
    found = evaluate(model, processor, examples, {"small": Shrunk()}, [0.5, 0.05], batch_size=4, progress=False).rows
    rows = {(row["budget"], row["task"]): row["accuracy"] for row in found if row["selector"] == "small"}
    for ratio, side in ((0.5, 8), (0.05, 2)):  # 72 and 7 of 144 tokens
        right = {}
        for example in examples:
            inputs = processor.apply_chat_template(
                [example.messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            answer = [*processor.tokenizer(example.answer, add_special_tokens=False).input_ids, 2]
            small, said = downsample(model, dict(inputs), side**2), []
            assert small["input_ids"].shape[1] == inputs["input_ids"].shape[1] - 144 + side**2
            while len(said) < len(answer):
                said.append(int(model(**small).logits[0, -1].argmax()))
                for name, value in (("input_ids", said[-1]), ("attention_mask", 1)):
                    small[name] = torch.cat([small[name], torch.tensor([[value]])], 1)
                place = small["position_ids"]
                small["position_ids"] = torch.cat([place, place[:, -1:] + 1], 1)
            right.setdefault(example.columns["task"], []).append(said == answer)
        for task, hits in right.items():
            assert rows[ratio, task] == pytest.approx(sum(hits) / len(hits))


def test_several_trainings_are_averaged():
    data, ratios = DatasetExamples(own_answers(12)), [0.5, 0.2]
    trainings = [get_selector("random", seed=seed) for seed in range(3)]
    apart = {str(seed): one for seed, one in enumerate(trainings)}
    single = evaluate(*build_vlm(), data, apart, ratios, progress=False).rows
    found = evaluate(
        *build_vlm(), data, {"random": trainings, "grid": get_selector("grid")}, ratios, progress=False
    ).rows
    rows = {(row["selector"], row["budget"], row["task"]): row for row in found}
    for task in ("even", "odd", "mean"):
        for ratio in ratios:
            row = rows["random", ratio, task]
            of = {one["selector"]: one for one in single if (one["budget"], one["task"]) == (ratio, task)}
            assert row["seeds"] == [of[str(seed)]["accuracy"] for seed in range(3)]
            assert row["accuracy"] == pytest.approx(sum(row["seeds"]) / 3)
            assert "seeds" not in rows["grid", ratio, task]


def test_selectors_by_name(tmp_path):
    make_scorer().save_pretrained(tmp_path)
    found = named_selectors(["random", f"mine={tmp_path}", "oracle"], seed=7)
    assert list(found) == ["random", "mine", "oracle"] and found["random"].seed == 7
    both = named_selectors([f"mine={tmp_path}+{tmp_path}", "downsampling"], pocket=False)
    assert len(both["mine"]) == 2 and isinstance(both["downsampling"], Shrunk)
    for specs, message in ([["nonsense"], "got 'nonsense'"], [["grid", "grid"], "given twice"], [[], "at least one"]):
        with pytest.raises(ConfigError, match=message):
            named_selectors(specs)
    with pytest.raises(ConfigError, match="'oracle'"):
        named_selectors(["oracle"], pocket=False)
    with pytest.raises(ScorerError):
        named_selectors([f"mine={tmp_path / 'none'}"])


@pytest.mark.parametrize("name", SHIPPED)
def test_scorers_that_come_with_the_package(name):
    """Each rates the same tokens in its own way, and is small."""
    folder = WEIGHTS / "grip" if name == "grip" else SHIPPED_FOLDER / name
    assert (folder / "model.safetensors").stat().st_size < 3e6 and (folder / "grip_config.json").is_file()
    scorer, (other, *_) = shipped_scorer(name), [shipped_scorer(one) for one in SHIPPED if one != name]
    assert any(not torch.equal(a, b) for a, b in zip(scorer.parameters(), other.parameters(), strict=True))
    model, _ = load_pocket_llava()
    apply_grip(model, scorer=None if name == "grip" else str(folder))  # "grip" is found beside the pocket model
    used = model.grip.selector.scorer
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(used.parameters(), scorer.parameters(), strict=True))


def test_pocket_examples_ask_every_kind_about_unseen_scenes():
    held_out, train = pocket_examples(27, 3, "pocket"), PocketExamples(27, seed=3)
    tasks = [held_out[row].columns["task"] for row in range(27)]
    assert len(set(tasks)) == 9 and all(2 <= tasks.count(task) <= 5 for task in set(tasks))
    assert held_out[4].messages[0]["content"][1] == held_out[4].messages[0]["content"][1]
    assert held_out[0].messages != train[0].messages
    for row in range(27):
        example = held_out[row]
        scene, question = held_out.look(row)
        evidence = list(dict.fromkeys(question.evidence))
        assert example.columns["evidence"][: len(evidence)] == evidence
        assert example.answer == question.answer and question in scene.questions
    with pytest.raises(ConfigError, match="rows must be"):
        pocket_examples(0)
    with pytest.raises(ConfigError, match="seed must be"):
        pocket_examples(5, seed=-1)


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(eval_command)
    return lambda *args: CliRunner().invoke(app, list(args))


def test_the_command_writes_a_table(command, tmp_path):
    model, processor = build_vlm()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    selectors = "random,grid"
    done = command(
        "--pocket", *FIRST, "--pocket-model", str(tmp_path / "model"), "--selectors", selectors,
        "--budgets", "0.5,0.1", "--examples", "18", "--seed", "11", "--json", str(tmp_path / "table.json"),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    data = json.loads((tmp_path / "table.json").read_text())
    assert data["meta"]["examples"] == 18 and data["meta"]["seed"] == 11
    assert {row["selector"] for row in data["rows"]} == {"unpruned", "random", "grid"}
    plain = {"selector", "budget", "task", "accuracy", "n", "ci95"}
    assert all(set(row) == plain | ({"compute"} if row["task"] == "mean" else set()) for row in data["rows"])
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["table.json"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "either --pocket"),
        (["--pocket", "--model", "x"], "either --pocket"),
        (["--pocket", "--budgets", "a"], "numbers of tokens, separated by commas"),
        (["--pocket", "--selectors", "nonsense"], "nonsense"),
        (["--pocket", "--pocket-model", "/nowhere"], "cannot load the model"),
    ],
)
def test_the_command_refuses(command, args, message):
    done = command(*args)
    assert done.exit_code == 2 and message in " ".join(done.output.replace("│", " ").split())


@pytest.mark.slow
def test_two_processes_make_the_table_of_one(tmp_path):
    """Under torchrun on gloo, with a last batch that is not full and a number of batches that is odd."""
    arguments = ["eval", "--pocket", *FIRST, "--examples", "33", "--seed", "4"]
    arguments += ["--selectors", "random,cls_attention,visionzip,downsampling,oracle", "--budgets", "0.4,0.1"]
    arguments += ["--batch-size", "7", "--json"]
    script = tmp_path / "run.py"
    script.write_text("from grip_hf.cli.app import app\napp()\n")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    for launch, name in (([], "one"), (["-m", "torch.distributed.run", "--nproc_per_node", "2"], "two")):
        command = [sys.executable, *launch, str(script), *arguments, str(tmp_path / f"{name}.json")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written to") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two
    tasks = [row["task"] for row in one["rows"]]
    # Group A holds what the unpruned model answers right, so it has no row of it.
    assert tasks.count("group A") == 2 * 5 and len(tasks) - 2 * 5 == (1 + 2 * 5) * (len(set(tasks)) - 1)
    assert len({row["accuracy"] for row in one["rows"]}) > 5
