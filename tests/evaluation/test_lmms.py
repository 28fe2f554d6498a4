"""The lmms-eval plug-in, driven by an installed lmms-eval on a local task; a user's own loop is the judge."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from first_testbed import WEIGHTS, load_pocket_llava, make_scene

from grip_hf import apply_grip
from grip_hf.errors import ConfigError, GripError, NonFiniteScoreError, UnsupportedModelError
from grip_hf.evaluation.lmms.settings import Pruning, generation_arguments, split_arguments

ROOT = pathlib.Path(__file__).parents[2]
SCENES = 3
TASK = """
task: pocket_scenes
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
UTILS = """
from PIL import Image
def visual(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a task in lmms-eval's format: questions about scenes, one without a picture, one with two."""
    folder, rows = tmp_path_factory.mktemp("tasks"), []
    for seed in range(SCENES):
        scene = make_scene(seed)
        scene.image.save(folder / f"{seed}.png")
        asked = scene.questions[:: max(1, len(scene.questions) // 4)]
        rows += [{"question": q.text, "answer": q.answer, "images": [f"{folder}/{seed}.png"]} for q in asked]
    rows.insert(2, {"question": "is there any key", "answer": "no", "images": []})
    rows.insert(5, {"question": "is there any key", "answer": "no", "images": [f"{folder}/0.png", f"{folder}/1.png"]})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "pocket.yaml").write_text(TASK.format(folder=folder))
    (folder / "utils.py").write_text(UTILS)
    return folder


@pytest.fixture
def lmms(monkeypatch, tmp_path):
    """The evaluator, with the plug-in registered as its entry point does."""
    pytest.importorskip("lmms_eval.evaluator")
    import datasets
    from lmms_eval import evaluator
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.tasks import TaskManager

    from grip_hf.evaluation.lmms import manifest

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)

    def evaluate(task, arguments="", batch_size=4, model="grip"):
        manager = TaskManager("ERROR", include_path=str(task), model_name="grip")
        arguments = f"pretrained={WEIGHTS},dtype=float32,{arguments}"
        return evaluator.simple_evaluate(
            model, arguments, tasks=["pocket_scenes"], task_manager=manager, batch_size=batch_size, device="cpu"
        )

    return evaluate


def replies(results):
    """What the model said, in the order of the documents, and the metric."""
    samples = sorted(results["samples"]["pocket_scenes"], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"][0].strip() for sample in samples], results["results"]["pocket_scenes"]


def ask(model, processor, folder):
    """What a user's own loop says, one row at a time, and how many visual tokens stay per row with pictures."""
    from PIL import Image

    texts, kept = [], []
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        images = [Image.open(path).convert("RGB") for path in row["images"]] or None
        text = "<image>" * len(row["images"]) + row["question"] + " "
        inputs = processor(images=images, text=text, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        texts.append(processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        if images and hasattr(model, "grip"):
            kept.append(len(model.grip.kept_tokens(out)[0]))
    return [text.strip() for text in texts], kept


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_task_gets_the_answers_of_a_users_own_loop(lmms, task, batch_size):
    model, processor = load_pocket_llava()
    apply_grip(model, keep_ratio=0.11, selector="random", seed=3)
    expected, kept = ask(model, processor, task)
    results = lmms(task, "keep_ratio=0.11,selector=random,seed=3", batch_size)
    said, metrics = replies(results)
    truth = [json.loads(line)["answer"] for line in (task / "rows.jsonl").read_text().splitlines()]
    right = sum(a == b for a, b in zip(expected, truth, strict=True)) / len(truth)
    assert said == expected and metrics["exact_match,none"] == pytest.approx(right)
    assert set(kept) == {16, 32}
    assert results["throughput"]["avg_visual_tokens_kept"] == pytest.approx(sum(kept) / len(kept))


def test_everything_kept_is_the_unpatched_model(lmms, task):
    model, processor = load_pocket_llava()
    expected, _ = ask(model, processor, task)
    assert replies(lmms(task, "keep_ratio=1"))[0] == expected
    pruned = replies(lmms(task, "num_tokens=1,selector=grid"))[0]
    assert pruned != expected


def test_lmms_evals_own_class_can_be_pruned_and_has_the_same_prompts(lmms, task, monkeypatch):
    pytest.importorskip("decord")  # its llava_hf cannot be imported without
    from transformers import GenerationMixin

    prompts, generate = [], GenerationMixin.generate

    def record(self, *args, **kwargs):
        prompts.append(kwargs["input_ids"][0].tolist())
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", record)
    settings = "keep_ratio=0.11,selector=similarity"
    others = (",device_map=cpu", ",device_map=cpu,backend=llava_hf")
    said = [replies(lmms(task, settings + other, batch_size=1))[0] for other in others]
    half = len(prompts) // 2
    assert sorted(prompts[:half]) == sorted(prompts[half:])
    pictures = [row for row, line in enumerate((task / "rows.jsonl").read_text().splitlines()) if ".png" in line]
    assert [said[0][row] for row in pictures] == [said[1][row] for row in pictures]  # llava_hf gives "" for the other


def test_an_error_is_raised_and_not_taken_for_an_empty_answer(lmms, task):
    from lmms_eval.models import get_model

    asked = get_model("grip")(pretrained=str(WEIGHTS), keep_ratio=0.5, selector="grid", device="cpu")
    apply_grip(asked.model, keep_ratio=0.5, selector=lambda batch: batch.mask * float("nan"))
    with pytest.raises(NonFiniteScoreError):
        lmms(task, model=asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("keep_ratio=1.5", r"keep_ratio must be a number in \(0, 1\], got 1.5"),
        ("num_tokens=0", "num_tokens must be an integer >= 1, got 0"),
        ("keep_ratio=0.5,num_tokens=3", "exactly one of keep_ratio and num_tokens"),
        ("selector=grid", "selector='grid' needs a budget"),
        ("keep_ratio=0.5,selector=telepathy", "unknown selector 'telepathy'"),
        ("keep_ratio=0.5,selector=grid,scorer=here", "give a selector or a scorer"),
        ("keep_ratio=0.5,scope=world", "scope must be one of"),
        ("keep_ratio=0.5,seed=-1", "seed must be an integer"),
        ("keep_ratio=0.5,temperature=1", r"unknown model_args \['temperature'\]"),
        ("keep_ratio=0.5,quantize=3bit", "quantize must be 4bit or 8bit, got '3bit'"),
        ("keep_ratio=0.5,batch_size=auto", "batch_size must be an integer >= 1, got 'auto'"),
        ("keep_ratio=0.5,selector=grid", "cannot load pretrained='/nowhere'"),
        ("keep_ratio=0.5,selector=grid,backend=dummy", "backend='dummy' of lmms-eval holds no transformers model"),
    ],
)
def test_bad_arguments(lmms, arguments, message):
    from lmms_eval.models import get_model

    given = "" if "backend" in arguments else "pretrained=/nowhere,"
    with pytest.raises(GripError, match=message):
        get_model("grip").create_from_arg_string(given + arguments)


def test_other_kinds_of_tasks_are_refused(lmms, tmp_path):
    from lmms_eval.models import get_model

    made = get_model("grip")(pretrained=str(WEIGHTS), num_tokens=4, selector="grid", device="cpu")
    for kind in (made.loglikelihood, made.generate_until_multi_round):
        with pytest.raises(UnsupportedModelError, match="generate_until"):
            kind([])
    model, processor = load_pocket_llava()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UnsupportedModelError, match="no chat template"):
        get_model("grip")(pretrained=str(tmp_path), num_tokens=4, selector="grid", device="cpu")


@pytest.mark.slow
def test_the_command_line_finds_the_plug_in_by_its_entry_point(lmms, task, tmp_path):
    """A real process; the entry point is the one that pyproject.toml declares, as an installer would write it."""
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lmms_eval.models"]
    info = tmp_path / "site" / "plug_in-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-in\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in declared.items()]
    (info / "entry_points.txt").write_text("\n".join(["[lmms_eval.models]", *lines]))
    command = [sys.executable, "-m", "lmms_eval", "--model", "grip", "--tasks", "pocket_scenes", "--device", "cpu"]
    command += ["--include_path", str(task), "--batch_size", "4", "--output_path", str(tmp_path / "out")]
    command += ["--model_args", f"pretrained={WEIGHTS},dtype=float32,keep_ratio=0.11"]  # the scorer in the checkpoint
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path / "site")]),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = (tmp_path / "out").rglob("*_results.json")
    found = json.loads(file.read_text())["results"]["pocket_scenes"]["exact_match,none"]
    model, processor = load_pocket_llava()
    apply_grip(model, keep_ratio=0.11)
    truth = [json.loads(line)["answer"] for line in (task / "rows.jsonl").read_text().splitlines()]
    said, _ = ask(model, processor, task)
    assert found == pytest.approx(sum(a == b for a, b in zip(said, truth, strict=True)) / len(truth))


def test_the_budget_is_checked_without_lmms_eval():
    assert Pruning(scorer="you/scorer").overrides() == {}  # with the budget saved there
    assert Pruning(num_tokens=64, selector="cdpruner", seed=1).overrides() == {
        "num_tokens": 64,
        "selector": "cdpruner",
        "seed": 1,
    }
    pruning, rest = split_arguments({"keep_ratio": 1, "pretrained": "x"})
    assert pruning == Pruning(keep_ratio=1) and rest == {"pretrained": "x"}
    with pytest.raises(ConfigError):
        split_arguments({"keep_ratio": "half"})


def test_what_tasks_say_about_generation():
    greedy, unknown = generation_arguments({"until": ["\n\n"], "image_aspect_ratio": "original", "do_sample": True})
    assert unknown == ["image_aspect_ratio"]
    assert greedy.pop("max_new_tokens") == 1024 and greedy.pop("num_beams") == 1 and greedy.pop("do_sample") is False
    assert set(greedy.values()) == {None}
    sampled, unknown = generation_arguments({"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 8})
    assert not unknown and sampled == {
        "max_new_tokens": 8,
        "num_beams": 1,
        "top_p": 0.9,
        "temperature": 0.5,
        "do_sample": True,
    }
