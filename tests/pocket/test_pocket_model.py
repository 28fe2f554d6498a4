"""The shipped pocket LLaVA: stock classes, small, offline, and good at what it is for."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from first_testbed import WEIGHTS, load_pocket_llava, make_scene
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from grip_hf.pocket.batches import to_lesson
from grip_hf.pocket.demo import ask_all
from grip_hf.pocket.lessons import PocketTrainer, count_right
from grip_hf.pocket.model import build_model
from grip_hf.pocket.names import LEVEL, TOWER, name_for_all_readers
from grip_hf.pocket.questions import QUESTION_KINDS
from grip_hf.pocket.testbeds import POCKET, TESTBEDS, get_testbed

SCENES = [make_scene(seed) for seed in range(1000, 1008)]


@pytest.fixture(scope="module")
def pocket():
    return load_pocket_llava()


def test_it_is_a_stock_llava_with_144_visual_tokens(pocket):
    model, processor = pocket
    assert type(model) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor and not model.training
    inputs = processor(images=SCENES[0].image, text="<image>is there any cat", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 144


def test_the_package_data_is_small():
    assets = WEIGHTS.parent
    assert sum(path.stat().st_size for path in assets.rglob("*") if path.is_file()) < 40 * 2**20


def test_the_weights_of_the_tower_have_the_names_that_vllm_reads():
    with safe_open(WEIGHTS / "model.safetensors", "pt") as file:
        tower = [name for name in file.keys() if name.startswith(TOWER)]  # noqa: SIM118 (it is no dict)
    assert len(tower) == 87 and all(name.startswith(TOWER + LEVEL) for name in tower)


def test_a_model_built_in_code_is_saved_with_the_names_that_all_readers_know(tmp_path):
    model = build_model(testbed=POCKET)
    model.save_pretrained(tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    assert name_for_all_readers(tmp_path / "model.safetensors") == 87
    assert name_for_all_readers(tmp_path / "model.safetensors") == 0
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weight, after[name.replace(TOWER, TOWER + LEVEL)]) for name, weight in before.items())
    again, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in again.state_dict().items())


def test_it_answers_most_questions(pocket):
    """Loose bounds on a few scenes; the README has the figures on 2,000."""
    model, processor = pocket
    answers = ask_all(model, processor, SCENES)
    questions = [question for scene in SCENES for question in scene.questions]
    right = {kind: [] for kind in QUESTION_KINDS}
    for question, answer in zip(questions, answers, strict=True):
        right[question.kind].append(answer == question.answer)
    rates = {kind: sum(hits) / len(hits) for kind, hits in right.items()}
    assert all(rate >= 0.5 for rate in rates.values()), rates
    assert sum(map(sum, right.values())) / len(questions) >= 0.85, rates


def test_scoring_with_the_answer_fed_in_counts_what_generate_gets_right(pocket):
    model, processor = pocket
    answers = ask_all(model, processor, SCENES)
    questions = [question for scene in SCENES for question in scene.questions]
    counts = count_right(PocketTrainer(model), SCENES)
    for kind in QUESTION_KINDS:
        mine = [a == q.answer for q, a in zip(questions, answers, strict=True) if q.kind == kind]
        assert counts[kind] == (sum(mine), len(mine)), kind


def test_training_pixels_are_what_the_processor_gives(pocket):
    pixels = pocket[1](images=SCENES[1].image, text="<image>", return_tensors="pt")["pixel_values"]
    lesson = to_lesson(SCENES[1:2], POCKET).to(torch.device("cpu"))
    torch.testing.assert_close(lesson.pixels, pixels, atol=1e-6, rtol=0)


def test_case_and_punctuation_do_not_matter(pocket):
    tokenizer = pocket[1].tokenizer
    assert tokenizer("Is there any CAT?")["input_ids"] == tokenizer("is there any cat")["input_ids"]
    assert tokenizer.unk_token_id in tokenizer("is there any zebra")["input_ids"]


def test_conversations_render(pocket):
    content = [{"type": "image"}, {"type": "text", "text": "is there any cat"}]
    text = pocket[1].apply_chat_template([{"role": "user", "content": content}])
    assert text.strip() == "<image>is there any cat"


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(TESTBEDS, POCKET.name, replace(POCKET, weights=tmp_path))
    with pytest.raises(FileNotFoundError, match="reinstall"):
        load_pocket_llava()


@pytest.mark.slow
@pytest.mark.parametrize(("testbed", "second"), [("pocket", 3), ("pocket2", 0)])
def test_training_goes_on_where_it_stopped_and_repeats_by_seed(testbed, second, tmp_path):
    def train(name, *steps):
        options = dict(zip(("--see-steps", "--speak-steps", "--both-steps"), steps, strict=True))
        command = [sys.executable, "-m", "grip_hf.pocket.train", "--output", str(tmp_path / name), "--batch", "2"]
        for option, value in {**options, "--eval-scenes": "2", "--save-every": "2", "--testbed": testbed}.items():
            command += [option, str(value)]
        subprocess.run(command, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, capture_output=True)
        return LlavaForConditionalGeneration.from_pretrained(tmp_path / name / "model").state_dict()

    whole = train("whole", 3, second, 3)
    train("parts", 3, 0, 0)
    assert json.loads((tmp_path / "parts" / "checkpoint" / "progress.json").read_text()) == {"steps": 3}
    parts = train("parts", 3, second, 3)
    assert whole.keys() == parts.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, msg=lambda text, name=name: f"{name}: {text}")
    kinds = get_testbed(testbed).kinds
    assert set(json.loads((tmp_path / "whole" / "accuracy_both.json").read_text())) == set(kinds)
