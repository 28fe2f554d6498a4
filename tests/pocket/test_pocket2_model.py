"""The shipped model of the second testbed: stock classes, keys that every loader knows, and what its README states."""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from versions import TRAINING

import grip_hf.pocket
from grip_hf import apply_grip, remove_grip
from grip_hf.evaluation.downsampling import downsample
from grip_hf.evaluation.metrics import MEAN
from grip_hf.evaluation.runner import evaluate
from grip_hf.evaluation.tasks import choose_selectors, pocket_examples
from grip_hf.hub.checkpoint import SUBFOLDER
from grip_hf.pocket import load_pocket, make_scene
from grip_hf.pocket.batches import to_lesson
from grip_hf.pocket.demo import ask_all
from grip_hf.pocket.examples import PocketExamples
from grip_hf.pocket.lessons import count_right
from grip_hf.pocket.lessons2 import make_trainer
from grip_hf.pocket.report import accuracies
from grip_hf.pocket.testbeds import POCKET2
from grip_hf.selectors.grip import GripSelector

README = Path(grip_hf.pocket.__file__).with_name("README.md")
SCENES = [make_scene(seed, testbed="pocket2") for seed in range(2000, 2004)]


@pytest.fixture(scope="module")
def pocket2():
    return load_pocket("pocket2")


def test_it_is_a_stock_llava_with_256_visual_tokens(pocket2):
    model, processor = pocket2
    assert type(model) is LlavaForConditionalGeneration and type(processor) is LlavaProcessor and not model.training
    inputs = processor(images=SCENES[0].image, text="<image>is there any cat", return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 256
    pixels = to_lesson(SCENES[:1], POCKET2).to(torch.device("cpu")).pixels
    torch.testing.assert_close(pixels, inputs["pixel_values"], atol=1e-6, rtol=0)


def test_the_file_is_small_and_has_the_keys_of_old(pocket2):
    file = POCKET2.weights / "model.safetensors"
    assert file.stat().st_size <= 24 * 10**6
    with safe_open(file, "pt") as weights:
        names = set(weights.keys())
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}
    tower = {name for name in names if "vision_tower" in name}
    assert tower and all(name.startswith("vision_tower.vision_model.") for name in tower)
    assert len(names) == len(pocket2[0].state_dict())


def test_its_scorer_comes_with_it(pocket2):
    """`apply_grip(model)` finds it, with its budget; it is small and made for this model."""
    model, _ = pocket2
    file = POCKET2.weights / SUBFOLDER / "model.safetensors"
    assert file.stat().st_size < 3e6
    chosen, left_out = choose_selectors(model, None, testbed="pocket2")
    assert isinstance(chosen["grip"], GripSelector) and not left_out
    apply_grip(model)
    try:
        assert (model.grip.config.selector, model.grip.config.keep_ratio) == ("grip", 0.11)
        assert model.grip.scorer.config.hidden_size == 256
    finally:
        remove_grip(model)


@TRAINING
def test_its_scorer_answers_more_than_the_rules_that_need_none_of_its_inside(pocket2):
    """At 11 %, on 66 held-out questions, against the selector that would choose without it."""
    chosen, _ = choose_selectors(pocket2[0], ["grip", "cdpruner"], testbed="pocket2")
    examples = pocket_examples(66, seed=4, testbed="pocket2")
    found = evaluate(*pocket2, examples, chosen, [0.11], batch_size=33, progress=False).rows
    means = {row["selector"]: row["accuracy"] for row in found if row["task"] == MEAN}
    assert means["grip"] > means["cdpruner"] + 0.05


def test_scoring_with_the_answer_fed_in_counts_what_generate_gets_right(pocket2):
    model, processor = pocket2
    answers = ask_all(model, processor, SCENES)
    questions = [question for scene in SCENES for question in scene.questions]
    right = [a == q.answer for q, a in zip(questions, answers, strict=True)]
    counts = count_right(make_trainer(model, "pocket2"), SCENES)
    assert sum(hits for hits, _ in counts.values()) == sum(right) >= 0.9 * len(right)
    assert sum(asked for _, asked in counts.values()) == len(right)


@TRAINING
def test_smaller_pictures_are_trained_as_they_are_evaluated(pocket2):
    """Training's logits on a smaller picture are those of down-sampling in evaluation."""
    model, processor = pocket2
    trainer, scene, side = make_trainer(model, "pocket2"), SCENES[0], 8
    question = scene.questions[0]
    lesson = to_lesson([scene], POCKET2).to(torch.device("cpu"))
    text = f"<image>{question.text} {question.answer}"
    inputs = processor(images=scene.image, text=text, return_tensors="pt")
    with torch.no_grad():
        states = trainer.states(lesson.pixels, side)
        tokens = model.model.multi_modal_projector(states[:, 1:])
        places = torch.tensor([[(2 * r + 1) * 16 + 2 * c + 1 for r in range(side) for c in range(side)]])
        found, _ = trainer.speak(tokens, lesson.packed, places=places)
        expected = model(**downsample(model, inputs, side * side)).logits[0]
    length = len(text.split())  # the question comes first in the packed sequence
    torch.testing.assert_close(found[0, :length], expected[-length:], atol=1e-3, rtol=1e-3)


def test_examples_of_either_testbed():
    rows = PocketExamples(22, seed=3, split="test", testbed="pocket2")
    assert {rows[row].columns["task"] for row in range(22)} == set(POCKET2.kinds)
    assert rows.look(0)[0].image.size == (256, 256)
    assert max(max(rows[row].columns["evidence"]) for row in range(22)) < 256


def stated():
    """Accuracy in % per kind from the README's table of the second testbed."""
    lines = README.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"\| kind +\| presence", line))
    names, figures = ([cell.strip() for cell in lines[i].strip("|").split("|")] for i in (start, start + 2))
    return {name: float(figure) for name, figure in zip(names[1:], figures[1:], strict=True)}


def test_the_readme_states_every_kind():
    assert set(stated()) == set(POCKET2.kinds)


@pytest.mark.slow
def test_it_reaches_what_the_readme_states(pocket2):
    """On 200 other scenes, within four standard errors and one wrong answer."""
    rows = accuracies(make_trainer(pocket2[0], "pocket2"), 200, seed=50_000)
    for kind, percent in stated().items():
        share, n = percent / 100, rows[kind]["n"]
        slack = 4 * (share * (1 - share) / n) ** 0.5 + 1 / n
        assert rows[kind]["accuracy"] >= share - slack, (kind, rows[kind])
