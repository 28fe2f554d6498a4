"""The tower scorer: what it sees, where it is kept, and how it learns."""

import json

import pytest
import torch
from classroom import HIDDEN, TOKENS, build_vlm, make_scorer, rows
from first_testbed import FIRST
from safetensors.torch import load_file, save_file
from tiny import IMAGE, build, make_inputs, select_by_content
from tower_reference import build_deep, watched
from typer.testing import CliRunner
from versions import TRAINING

from grip_hf import GripScorer, apply_grip
from grip_hf.cli.app import app
from grip_hf.engine.keepsets import topk_mask
from grip_hf.errors import ConfigError, GripError, ScorerError, UnsupportedModelError
from grip_hf.evaluation.towers import TowerChoice
from grip_hf.frozen.data import DatasetExamples
from grip_hf.frozen.vlm import FrozenVLM
from grip_hf.scorer.model import GripScorerConfig
from grip_hf.tower.layout import TAP, RowsTap
from grip_hf.tower.scorer import TowerGripSelector, TowerScorer, TowerScorerConfig
from grip_hf.tower.selectors import distance_from_mean

PROMPTS = [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3]]


def make_tower_scorer(width=16, text=32, depth=1, seed=0, **more):
    """One whose scores hang on all that it sees."""
    torch.manual_seed(seed)
    scorer = TowerScorer(TowerScorerConfig(hidden_size=width, text_size=text, depth=depth, width=8, **more)).eval()
    with torch.no_grad():
        scorer.head.weight.normal_(std=3)
    return scorer


def arguments(pictures=2, groups=12, words=3, width=16, text=32):
    generator = torch.Generator().manual_seed(1)
    return {
        "tokens": torch.randn(pictures, groups, width, generator=generator),
        "mask": torch.ones(pictures, groups, dtype=torch.bool),
        "text": torch.randn(pictures, words, text, generator=generator),
        "text_mask": torch.ones(pictures, words, dtype=torch.bool),
        "keep_ratio": torch.full((pictures,), 0.5),
        "positions": torch.rand(pictures, groups, 2, generator=generator),
    }


@pytest.mark.usefixtures("no_grad")
def test_untrained_it_is_the_distance_from_the_mean_row():
    scorer, given = TowerScorer(TowerScorerConfig(hidden_size=16, text_size=32, depth=1)), arguments()
    order = distance_from_mean(given["tokens"], given["mask"]).argsort(1)
    assert torch.equal(scorer(**given).argsort(1), order)


@pytest.mark.usefixtures("no_grad")
def test_it_reads_the_question_the_budget_and_the_place_but_no_padding():
    scorer, given = make_tower_scorer(), arguments()
    scores = scorer(**given)
    for name, other in (
        ("text", -given["text"]),
        ("keep_ratio", given["keep_ratio"] / 4),
        ("positions", given["positions"].flip(1)),
    ):
        assert not torch.allclose(scores, scorer(**{**given, name: other}))
    longer = {
        "tokens": torch.nn.functional.pad(given["tokens"], (0, 0, 0, 4), value=7),
        "mask": torch.nn.functional.pad(given["mask"], (0, 4)),
        "text": torch.nn.functional.pad(given["text"], (0, 0, 0, 2), value=7),
        "text_mask": torch.nn.functional.pad(given["text_mask"], (0, 2)),
        "positions": torch.nn.functional.pad(given["positions"], (0, 0, 0, 4), value=0.5),
    }
    torch.testing.assert_close(scorer(**{**given, **longer})[:, :12], scores, atol=1e-5, rtol=1e-4)
    none = scorer(**{**given, "text": given["text"][:, :0], "text_mask": given["text_mask"][:, :0]})
    assert torch.isfinite(none).all()
    with pytest.raises(ScorerError, match="needs text and text_mask"):
        scorer(**{**given, "text": None})


@pytest.mark.parametrize(("setting", "value"), [("width", 0), ("depth", True), ("num_heads", 3), ("text_size", 1.5)])
def test_bad_sizes(setting, value):
    with pytest.raises(ScorerError, match=setting):
        TowerScorerConfig(**{setting: value})


def spied():
    """A tower selector that notes which words it is given."""
    seen = []

    class Spy:
        reads_question = True

        def __call__(self, batch):
            seen.append((batch.text, batch.text_mask))
            return (batch.tokens * torch.linspace(-1, 1, batch.tokens.shape[-1])).sum(-1)

    return Spy(), seen


def words(model, ids):
    return model.get_input_embeddings()(torch.tensor(ids))


@pytest.mark.usefixtures("no_grad")
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
@pytest.mark.parametrize("how", ["forward", "generate"])
def test_each_picture_is_given_the_words_of_its_own_prompt(family, how):
    spy, seen = spied()
    model, inputs = build_deep(family), make_inputs(family, PROMPTS)
    apply_grip(model, keep_ratio=0.25, selector=select_by_content, tower_keep_ratio=0.5, tower_selector=spy)
    if how == "forward":
        model(**inputs)
    else:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    ((text, mask),) = seen
    visual = torch.isin(inputs["input_ids"], torch.tensor(model.grip._parts.token_ids))
    said = [
        ids[real & ~seen].tolist()
        for ids, real, seen in zip(inputs["input_ids"], inputs["attention_mask"].bool(), visual, strict=True)
    ]
    pictures = [0, 1, 1] if family != "internvl" else [0, 1, 1, 1]  # the second picture of a prompt has two tiles
    assert len(text) == len(pictures)
    for row, own, real in zip(pictures, text, mask, strict=True):
        assert torch.equal(own[real], words(model, said[row]))


@pytest.mark.usefixtures("no_grad")
def test_an_answer_does_not_choose_rows():
    spy, seen = spied()
    model, inputs = build("llava"), make_inputs("llava", [[3, IMAGE, 4]])
    apply_grip(model, keep_ratio=0.25, selector=select_by_content, tower_keep_ratio=0.5, tower_selector=spy)
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    model(**inputs, labels=labels)
    text, mask = seen[0]
    ids = inputs["input_ids"][0]
    assert torch.equal(text[0][mask[0]], words(model, [*ids[:3].tolist(), *ids[-4:-2].tolist()]))


@pytest.mark.usefixtures("no_grad")
def test_pictures_by_themselves_have_no_question_and_some_batches_are_refused():
    spy, seen = spied()
    model, inputs = build("llava"), make_inputs("llava", PROMPTS)
    apply_grip(model, keep_ratio=0.25, selector=select_by_content, tower_keep_ratio=0.5, tower_selector=spy)
    model.get_image_features(inputs["pixel_values"])
    assert seen[0][0].shape == (3, 0, 32)
    tiled, inputs = build("llava_next"), make_inputs("llava_next", PROMPTS)
    apply_grip(tiled, keep_ratio=0.25, selector=select_by_content, tower_keep_ratio=0.5, tower_selector=spy)
    with pytest.raises(GripError, match="cannot tell whose picture is whose"):
        tiled(**inputs)
    tiled(**make_inputs("llava_next", PROMPTS[:1]))
    assert len(seen[-1][0]) == 3 and int(seen[-1][1].sum()) == 3 * 7


@pytest.mark.usefixtures("no_grad")
def test_it_is_saved_with_the_scorer_and_chooses_again(tmp_path):
    model, inputs = build_deep("llava"), make_inputs("llava", PROMPTS)
    scorer = GripScorer(GripScorerConfig(hidden_size=32, width=8, attention_width=8)).eval()
    apply_grip(model, scorer=scorer, keep_ratio=0.25, tower_keep_ratio=0.5)
    assert model.grip._boundary.tower.selector.name == "distance"
    model.grip.tower.scorer = make_tower_scorer()
    model.grip.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tower" / "config.json").read_text())["model_type"] == "grip_tower_scorer"
    apply_grip(model, scorer=tmp_path)
    assert model.grip.config.tower_keep_ratio == 0.5 and model.grip._boundary.tower.selector.name == "grip"
    with watched() as plans:
        first = model(**inputs).logits
    apply_grip(model, scorer=tmp_path, tower_selector=lambda batch: batch.mask.float())
    assert not model.grip.can_be_saved
    apply_grip(model, scorer=tmp_path, tower_selector=TowerGripSelector(make_tower_scorer()))
    assert model.grip.can_be_saved and model.grip.config.tower_selector == "grip"
    with watched() as again:
        assert torch.equal(first, model(**inputs).logits)
    assert torch.equal(plans[0].alive, again[0].alive)
    apply_grip(model, scorer=tmp_path, tower_selector="grid")
    assert model.grip._boundary.tower.selector.name == "grid"


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("no weights", "cannot load a tower scorer"),
        ("nan", "NaN or infinity in"),
        ("lacking", "do not fit"),
        ("kind", "not a tower scorer"),
    ],
)
def test_a_damaged_one_is_refused(fault, match, tmp_path):
    make_tower_scorer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    if fault == "no weights":
        weights.unlink()
    elif fault == "kind":
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    else:
        tensors = load_file(weights)
        if fault == "nan":
            tensors["head.weight"][0] = torch.nan
        else:
            del tensors["head.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ScorerError, match=match):
        TowerScorer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("sizes", "settings", "match"),
    [
        ({"width": 8}, {}, "made for hidden_size 8, but LlavaForConditionalGeneration has hidden_size 16"),
        ({"text": 8}, {}, "text_size 8"),
        ({}, {"tower_depth": 2}, "made for depth 1, but .* has depth 2"),
    ],
)
def test_one_for_another_tower_is_refused(sizes, settings, match):
    model = build_deep("llava")
    with pytest.raises(ScorerError, match=match):
        apply_grip(
            model, keep_ratio=0.25, selector="grid", tower_keep_ratio=0.5,
            tower_selector=TowerGripSelector(make_tower_scorer(**sizes)), **settings,
        )  # fmt: skip
    assert not hasattr(model, "grip")


def test_where_there_is_none_it_cannot_be_chosen():
    with pytest.raises(ScorerError, match="none lies beside the scorer"):
        apply_grip(build("llava"), keep_ratio=0.25, selector="grid", tower_keep_ratio=0.5, tower_selector="grip")
    with pytest.raises(ConfigError, match="no tower scorer came with the model"):
        TowerChoice((0.5,)).settings(build("llava"), 0, fresh=False)


@TRAINING
def test_what_is_learnt_from_are_the_rows_of_the_tower():
    model, processor = build_vlm()
    vlm = FrozenVLM(model, processor, tap=RowsTap(1))
    sample = vlm.prepare([DatasetExamples(rows(1))[0]])[0]
    seen = []
    hook = model.model.vision_tower.encoder.layers[1].register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with torch.no_grad():
        model.get_image_features(
            processor(images=rows(1)[0]["image"], text="<image>", return_tensors="pt")["pixel_values"]
        )
    hook.remove()
    vlm.close()
    assert torch.equal(sample.visual.taps[TAP], seen[0][:, 1:])
    with pytest.raises(UnsupportedModelError, match="made of no rows"):
        RowsTap(1)(build("llava_next"))


@TRAINING
def test_a_verdict_is_that_of_the_model_with_these_rows():
    """Rows by rows what a patched model says that drops them and is pruned by the scorer."""
    from grip_hf.training.tower import TowerStore

    model, processor = build_vlm()
    vlm, scorer = FrozenVLM(model, processor, tap=RowsTap(1)), make_scorer()
    store = TowerStore(vlm, DatasetExamples(rows(3)), scorer, keep_ratio=0.25, depth=1)
    samples = store.samples([0, 1, 2])
    keep = topk_mask(torch.rand(3, TOKENS), torch.ones(3, TOKENS, dtype=torch.bool), torch.tensor([8, 5, 8]))
    verdict = store.judge(samples, list(keep))
    vlm.close()
    for row, (sample, kept) in enumerate(zip(samples, keep, strict=True)):
        given = processor(images=rows(3)[row]["image"], text="<image>" + rows(3)[row]["prompt"], return_tensors="pt")
        ids = torch.cat([given["input_ids"], sample.answer[None]], 1)
        share = float(kept.sum()) / TOKENS
        apply_grip(
            model, scorer=scorer, keep_ratio=0.25, tower_keep_ratio=share, tower_depth=1,
            tower_selector=lambda batch, kept=kept: kept[None].float(),
        )  # fmt: skip
        labels = torch.cat([torch.full_like(given["input_ids"], -100), sample.answer[None]], 1)
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=given["pixel_values"], labels=labels)
        assert model.grip.last.candidates == [int(kept.sum())] and len(model.grip.last.kept[0]) == 4
        told = out.logits[0, -len(sample.answer) - 1 : -1].log_softmax(-1).gather(1, sample.answer[:, None]).sum()
        torch.testing.assert_close(verdict.log_prob[row], told, atol=1e-4, rtol=1e-4)


@TRAINING
def test_warm_up_learns_to_keep_what_the_scorer_keeps(tmp_path):
    from grip_hf.training.supervised import training_arguments
    from grip_hf.training.tower import TowerStore, TowerWarmupTrainer

    vlm = FrozenVLM(*build_vlm(), tap=RowsTap(1))
    store = TowerStore(vlm, DatasetExamples(rows(8)), make_scorer(), depth=1)
    learner = TowerScorer(TowerScorerConfig(hidden_size=HIDDEN, text_size=HIDDEN, depth=1, width=16))
    args = training_arguments(
        str(tmp_path),
        max_steps=80,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = TowerWarmupTrainer(learner, store, args, budgets=(0.25, 0.5))
    before = trainer.loss(learner, list(range(8))).item()
    trainer.train()
    vlm.close()
    assert trainer.loss(learner, list(range(8))).item() < 0.6 * before


@TRAINING
def test_the_command_trains_goes_on_and_leaves_what_apply_grip_takes(tmp_path):
    model, processor = build_vlm()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    make_scorer().save_pretrained(tmp_path / "scorer")
    words = ["train-tower", "--pocket", *FIRST, "--pocket-model", tmp_path / "model", "--scorer", tmp_path / "scorer"]
    words += ["--output", tmp_path / "run", "--tower-depth", "1", "--keep-ratio", "0.25", "--device", "cpu"]
    words += ["--warmup-steps", "2", "--steps", "2", "--batch-size", "4", "--num-generations", "2", "--examples", "8"]
    words += ["--warmup-batch-size", "2", "--width", "8", "--budgets", "0.3,0.6"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    trained = TowerScorer.from_folder(tmp_path / "run" / "tower")
    assert trained.config.depth == 1 and trained.config.base_model["model_type"] == "llava"
    assert not torch.equal(trained.head.weight, torch.zeros_like(trained.head.weight))
    apply_grip(model, scorer=tmp_path / "run")
    assert model.grip.config.tower_keep_ratio == 0.5 and model.grip._boundary.tower.selector.name == "grip"

    again = CliRunner().invoke(app, list(map(str, words)))
    assert again.exit_code == 0 and torch.equal(
        trained.head.weight, TowerScorer.from_folder(tmp_path / "run" / "tower").head.weight
    )
    other = CliRunner().invoke(app, [*map(str, words), "--seed", "1"])
    assert other.exit_code != 0 and "seed is 0 there, 1 here" in " ".join(other.output.split())


@TRAINING
def test_other_methods_are_refused(tmp_path):
    from grip_hf.training.plan import TrainingPlan
    from grip_hf.training.tower_pipeline import train_tower

    plan = TrainingPlan(tmp_path / "run", method="relaxed")
    with pytest.raises(ConfigError, match="by grpo or warmup alone"):
        train_tower(plan, *build_vlm(), DatasetExamples(rows(2)), make_scorer())
    assert not (tmp_path / "run").exists()


@TRAINING
def test_a_reference_model_drops_the_rows_of_its_policy(tmp_path):
    from grip_hf.training.reference import prune_like

    policy, reference, inputs = build_deep("llava"), build_deep("llava"), make_inputs("llava", PROMPTS)
    scorer = GripScorer(GripScorerConfig(hidden_size=32, width=8, attention_width=8)).eval()
    apply_grip(policy, scorer=scorer, keep_ratio=0.25, tower_keep_ratio=0.5)
    policy.grip.tower.scorer = make_tower_scorer()
    policy.grip.save_pretrained(tmp_path)
    apply_grip(policy, scorer=tmp_path)
    prune_like(reference, policy)
    with torch.no_grad(), watched() as plans:
        assert torch.equal(policy(**inputs).logits, reference(**inputs).logits)
    assert torch.equal(plans[0].alive, plans[1].alive)


def test_it_is_pushed_and_taken_from_the_hub_and_goes_with_the_next_upload(hub):
    model, inputs = build_deep("llava"), make_inputs("llava", PROMPTS)
    scorer = GripScorer(GripScorerConfig(hidden_size=32, width=8, attention_width=8)).eval()
    apply_grip(model, scorer=scorer, keep_ratio=0.25, tower_keep_ratio=0.5)
    model.grip.tower.scorer = make_tower_scorer()
    model.grip.push_to_hub("me/tower")
    apply_grip(model, scorer="me/tower")
    assert model.grip._boundary.tower.selector.name == "grip"
    trained = model.grip.tower.scorer.head.weight
    assert torch.equal(trained, make_tower_scorer().head.weight)
    with torch.no_grad():
        model(**inputs)
    apply_grip(model, scorer=scorer, keep_ratio=0.25)  # a later upload without one leaves none behind
    model.grip.push_to_hub("me/tower")
    apply_grip(model, scorer="me/tower")
    assert model.grip.tower.scorer is None
