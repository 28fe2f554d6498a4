"""The examples, run as a reader runs them: on the pocket model, or on a tiny model in a folder."""

import importlib.util
import math
import pathlib
import re
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import HIDDEN, VIDEO_ID, build
from transformers import AutoProcessor, BatchFeature, LlavaForConditionalGeneration
from versions import TRAINING

from grip_hf import GripScorer, apply_grip
from grip_hf.errors import GripError
from grip_hf.pocket import make_scene
from grip_hf.scorer.model import GripScorerConfig

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))


def load(name):
    if name == "app":  # CI has the page's extra beside newer versions than the lowest
        pytest.importorskip("gradio")
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch, capsys):
    """Run an example with arguments; returns what it printed."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        load(name).main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "app"])
def test_examples_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 80


def test_batch_inference(run):
    out = run("batch_inference", "--examples", 3, "--batch_size", 2, "--budgets", 0.25, 0.5, 1)
    for kept, scene in zip((64, 128, 256), map(make_scene, range(3)), strict=True):
        assert f"{scene.questions[0].text}  [{kept} visual tokens]" in out
    assert run("batch_inference", "--samples", 2, "--budgets", 16, 8).count("[8 visual tokens]") == 1
    with pytest.raises(SystemExit):
        run("batch_inference", "--examples", 3, "--budgets", 0.25, 0.5)
    with pytest.raises(SystemExit):
        run("batch_inference", "--budgets", 1.5)


def test_quickstart(run, tmp_path):
    from grip_hf.pocket.model import WEIGHTS

    scene = make_scene(4)
    scene.image.save(tmp_path / "scene.png")
    question = scene.questions[0]
    out = run(
        "quickstart", question.text, "--model", "pocket", "--image", tmp_path / "scene.png", "--selector", "grip"
    )
    assert out.splitlines() == [f"all visual tokens: {question.answer}", f"64 visual tokens: {question.answer}"]
    out = run("quickstart", "--model", "pocket", "--keep-ratio", 0.5)
    assert "\n128 visual tokens: " in out
    out = run("quickstart", question.text, "--model", WEIGHTS, "--image", tmp_path / "scene.png", "--keep-ratio", 0.5)
    assert "\n128 visual tokens: " in out  # by the processor's own chat template


def test_custom_selector(run):
    out = run("custom_selector", "--keep-ratio", 0.125)
    assert out.count("centre_first keeps 32: ") == out.count("unusual keeps 32: ") == 3


@TRAINING
def test_train_warmup_and_push(run, tmp_path, hub):
    out = run("train_warmup", "--output", tmp_path, "--steps", 1, "--rows", 8, "--batch-size", 2, "--width", 16)
    assert f"scorer={str(tmp_path)!r}" in out
    again = run("train_warmup", "--output", tmp_path, "--steps", 1, "--examples", 8, "--batch_size=2", "--width", 16)
    assert "finished, nothing to do" in again
    out = run("push_to_hub", "--scorer", tmp_path, "--model", "pocket", "--repo", "user/grip")
    assert f"{hub.url}/user/grip/commit/" in out
    card = hub.repos["user/grip"].files()["README.md"].decode()
    assert "| warmup_steps | `1` |" in card and "license: apache-2.0" in card
    run("push_to_hub", "--scorer", tmp_path, "--model", "pocket", "--repo", "user/grip", "--training", "by hand")
    assert "by hand" in hub.repos["user/grip"].files()["README.md"].decode()
    out = run("push_to_hub", "--scorer", tmp_path, "--model", "pocket", "--repo", "user/whole", "--whole-model")
    assert 'from_pretrained("user/whole")' in out
    files = set(hub.repos["user/whole"].files())
    assert {"model.safetensors", "config.json", "processor_config.json", "grip/model.safetensors"} <= files
    model = LlavaForConditionalGeneration.from_pretrained("user/whole")
    apply_grip(model)
    assert model.grip.config.keep_ratio == 0.25


@pytest.mark.parametrize("scope", ["sample", "image"])
def test_video(run, tmp_path, monkeypatch, scope):
    """A tiny model in a folder; the processor is stood in for, because the video processors need torchvision."""
    build("llava_onevision").save_pretrained(tmp_path)
    for name in "abc":
        make_scene(ord(name)).image.save(tmp_path / f"{name}.png")

    class Processor:
        def apply_chat_template(self, messages, **kwargs):
            frames = messages[0]["content"][0]["video"]
            pixels = [torch.tensor(np.array(one.resize((16, 16)))).permute(2, 0, 1) / 255 for one in frames]
            ids = torch.tensor([[5, *[VIDEO_ID] * (4 * len(frames) + 1), 6, 7]])  # 4 a frame, and one that ends them
            mask = torch.ones_like(ids)
            pixels = torch.stack(pixels)[None]
            return BatchFeature({"input_ids": ids, "attention_mask": mask, "pixel_values_videos": pixels})

        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids.tolist()))

    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda name: Processor())
    frames = [tmp_path / f"{name}.png" for name in "abc"]
    out = run(
        "video", "--model", tmp_path, "--frames", *frames, "--keep-ratio", 0.5, "--scope", scope, "--max-new-tokens", 3
    )
    kept, answer = out.split(" visual tokens kept: ")
    assert 6 <= int(kept) <= 7 and len(answer.split()) == 3
    with pytest.raises(SystemExit):
        run("video", "--model", tmp_path)


def test_sft_of_a_pruned_model_trains_adapters_only(tmp_path):
    from safetensors.torch import load_file
    from trl import ModelConfig, ScriptArguments, SFTConfig

    example = load("sft_pruned")
    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    example.main(
        ScriptArguments(dataset_name="pocket"),
        settings,
        ModelConfig(model_name_or_path="pocket", use_peft=True, lora_r=2),
        example.GripArguments(keep_ratio=0.11, selector="similarity", examples=4),
    )
    adapters = load_file(tmp_path / "adapter_model.safetensors")
    assert adapters and all("language_model" in name and "lora_" in name for name in adapters)
    assert any(weight.any() for name, weight in adapters.items() if "lora_B" in name)
    assert (tmp_path / "grip" / "grip_config.json").is_file()


def run_pruned(name, config, folder, **model):
    """The first step of an example that tunes a pruned pocket model; what it logged, and the warnings of it."""
    from trl import ModelConfig, ScriptArguments

    example, logs = load(name), []
    trainers = {"DPOConfig": "DPOTrainer", "GRPOConfig": "GRPOTrainer"}
    trainer = getattr(example.trl, trainers[config])

    class Logged(trainer):
        def log(self, entries, *args, **kwargs):
            super().log(entries, *args, **kwargs)
            logs.append(self.state.log_history[-1])

    fixed = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none"}
    own = {"beta": 0.04, "num_generations": 4, "max_completion_length": 4, "temperature": 3.0, "num_iterations": 2}
    settings = {**fixed, **(own if config == "GRPOConfig" else {})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.trl, trainers[config], Logged)
        example.main(
            ScriptArguments(dataset_name="pocket"),
            getattr(example.trl, config)(str(folder), per_device_train_batch_size=4, **settings),
            ModelConfig(model_name_or_path="pocket", lora_r=2, **model),
            example.GripArguments(keep_ratio=0.11, selector="similarity", rows=12),
        )
    return logs[0]


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_dpo_of_a_pruned_model_starts_at_its_reference(tmp_path, recwarn, adapted):
    """At equal models DPO's loss is ln 2."""
    log = run_pruned("dpo_pruned", "DPOConfig", tmp_path, use_peft=adapted)
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log["logps/chosen"] != pytest.approx(log["logps/rejected"], rel=0.1)
    assert not [one for one in recwarn if "reference model" in str(one.message)]
    assert (tmp_path / "grip" / "grip_config.json").is_file()


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_grpo_of_a_pruned_model_starts_at_its_reference(tmp_path, recwarn, adapted):
    """At equal models the divergence is 0 and no ratio is clipped: the loss is minus the mean advantage, 0."""
    log = run_pruned("grpo_pruned", "GRPOConfig", tmp_path, use_peft=adapted)
    assert log["kl"] == pytest.approx(0, abs=1e-7) and log["clip_ratio/region_mean"] == 0
    assert not [one for one in recwarn if "reference model" in str(one.message)]
    assert (tmp_path / "grip" / "grip_config.json").is_file()


# The page


@pytest.fixture(scope="module")
def page():
    return load("app").Page()


def read(answers):
    """What the two cards say: (answer, tokens, all tokens, KiB of the cache) of each."""
    pattern = r'<div class="said">(.*?)</div>.*?(\d+) of (\d+) visual tokens · \d+ ms · ([\d,]+) KiB'
    found = re.findall(pattern, answers)
    assert len(found) == 2
    return [(said, int(kept), int(total), int(size.replace(",", ""))) for said, kept, total, size in found]


def test_the_page_shows_both_answers(page):
    scene = make_scene(3)
    answers, kept, scores = page.ask(scene.image, scene.questions[0].text, "similarity", 25)
    (full, *tokens, most), (pruned, *fewer, least) = read(answers)
    assert tokens == [256, 256] and fewer == [64, 256] and full and pruned and least < most / 2
    assert kept.size == scores.size == (480, 480) and kept.tobytes() != scores.tobytes()
    everything, alike = read(page.ask(scene.image, scene.questions[0].text, "grid", 100)[0])
    assert everything == alike and everything[0] == full
    assert read(page.ask(scene.image, scene.questions[0].text, "grid", 1)[0])[1][1] == 3


def test_the_page_brings_the_scorer_of_the_pocket_model(page):
    """Its answers and its tokens are those of the library without the page."""
    assert next(iter(page.selectors)) == "grip"
    scene = make_scene(3)
    model, processor = load("app").load_pocket_llava()
    apply_grip(model, keep_ratio=0.11)
    for question in scene.questions:
        inputs = processor(images=scene.image, text=f"<image>{question.text}", return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=64, do_sample=False, return_dict_in_generate=True)
        said = processor.decode(out.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        _, (pruned, kept, *_) = read(page.ask(scene.image, question.text, "grip", 11)[0])
        assert (pruned, kept) == (said, len(model.grip.kept_tokens(out)[0]))


def test_the_page_says_what_is_wrong(page):
    gradio = pytest.importorskip("gradio")
    image = make_scene(3).image
    for arguments in ((None, "what", "grid", 25), (image, "  ", "grid", 25), (image, None, "grid", 25)):
        with pytest.raises(gradio.Error):
            page.ask(*arguments)
    for arguments in ((image, "what", "telepathy", 25), (image, "what", "grid", 0), (image, "what", "grid", None)):
        with pytest.raises(gradio.Error, match="No such choice"):
            page.ask(*arguments)
    odd = Image.fromarray(np.zeros((1, 3), dtype=np.uint8))  # tiny, grey, not square
    assert read(page.ask(odd, "is there any key", "grid", 25)[0])[1][1:3] == (64, 256)


@pytest.mark.parametrize("harm", ["text", "cut", "empty"])
def test_a_file_that_is_no_picture_is_refused_on_the_page(tmp_path, harm):
    gradio = pytest.importorskip("gradio")
    from gradio.data_classes import ImageData

    path = tmp_path / "picture.png"
    make_scene(3).image.save(path)
    whole = path.read_bytes()
    field = load("app").readable(gradio.Image(type="pil"))
    assert field.preprocess(ImageData(path=str(path), orig_name="picture.png")).size == make_scene(3).image.size
    path.write_bytes({"text": b"no picture", "cut": whole[: len(whole) // 2], "empty": b""}[harm])
    with pytest.raises(gradio.Error, match="cannot be read as a picture"):
        field.preprocess(ImageData(path=str(path), orig_name="picture.png"))


def test_what_the_model_says_is_shown_as_text():
    assert "<b>" not in load("app").card("<b>", 1, 2, "<b>said", 3, 4)


def test_two_users_at_once(page):
    scene, seen = make_scene(4), {}
    choices = {"similarity": 25, "grid": 50, "random": 10}
    alone = {name: page.ask(scene.image, scene.questions[0].text, name, percent) for name, percent in choices.items()}

    def user(selector, percent):
        for _ in range(3):
            seen.setdefault(selector, []).append(page.ask(scene.image, scene.questions[0].text, selector, percent))

    users = [threading.Thread(target=user, args=each) for each in choices.items()]
    for one in users:
        one.start()
    for one in users:
        one.join()
    for name, results in seen.items():
        answers, *pictures = alone[name]
        assert [read(found) for found, *_ in results] == [read(answers)] * 3
        for _, *drawn in results:
            assert [one.tobytes() for one in drawn] == [one.tobytes() for one in pictures]


def test_a_scorer_on_the_page(tmp_path, page):
    model = load("app").load_pocket_llava()[0]
    torch.manual_seed(0)
    width = model.config.text_config.hidden_size
    scorer = GripScorer(GripScorerConfig(hidden_size=width, width=16, attention_width=8, num_heads=2))
    apply_grip(model, scorer=scorer, keep_ratio=0.5).grip.save_pretrained(tmp_path)
    own = load("app").Page(scorer=tmp_path)
    assert next(iter(own.selectors)) == "grip" and width != HIDDEN and "grip" not in vars(build("llava"))
    scene = make_scene(3)
    assert read(own.ask(scene.image, scene.questions[0].text, "grip", 25)[0])[1][1:3] == (64, 256)
    with pytest.raises(GripError):
        load("app").Page(scorer=tmp_path / "nowhere")
