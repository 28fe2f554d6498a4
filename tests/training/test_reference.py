"""A trainer's reference model keeps what the policy keeps: the first step is that of equal models."""

import math

import peft
import pytest
import torch
import trl
from accelerate import Accelerator
from datasets import Dataset
from first_testbed import load_pocket_llava
from lessons import OFFLINE, Watch, kept, kept_of_prompts, masked_logits, pruned, rows
from transformers import TrainerCallback
from versions import TRAINING

from grip_hf import apply_grip, remove_grip
from grip_hf.errors import ConfigError
from grip_hf.training import PruneReference, prune_like

pytestmark = TRAINING
ROWS = list(rows())
PROMPTS = [(row["images"][0], f"<s><image>{row['question']}") for row in ROWS]
LORA = {"r": 2, "target_modules": r".*language_model\.layers.*(q|v)_proj"}
WARNING = "reference model that sees all visual tokens"


@pytest.fixture(scope="module")
def expected():
    return kept_of_prompts(PROMPTS)


def preferences():
    for (image, text), row in zip(PROMPTS, ROWS, strict=True):
        yield {
            "images": [image],
            "prompt": text,
            "chosen": f" {row['right']} </s>",
            "rejected": f" {row['wrong']} </s>",
        }


def judged():
    for number, row in enumerate(preferences()):
        good = bool(number % 2)
        chosen = row["chosen" if good else "rejected"]
        yield {"images": row["images"], "prompt": row["prompt"], "completion": chosen, "label": good}


def asked():
    for row in ROWS:
        yield {"images": row["images"], "prompt": [{"role": "user", "content": row["question"]}]}


def lengths(completions, **_):
    return [float(len(one[0]["content"])) for one in completions]


MAKERS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, preferences, {"max_length": None}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, judged, {"max_length": None}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, asked, {"beta": 0.1, "num_generations": 4, "num_iterations": 2}),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, asked, {"beta": 0.1, "num_generations": 4}),
}


def make(kind, folder, model=None, adapted=False, **settings):
    """A trainer of four rows, or of four answers to one question, at a step."""
    kinds, config, data, own = MAKERS[kind]
    patched, processor = pruned()
    options = {} if data is not asked else {"reward_funcs": lengths}
    if data is asked:
        own = {**own, "max_completion_length": 6, "temperature": 5.0}
    reference = settings.pop("ref_model", None)
    return kinds(
        model or patched,
        args=config(str(folder), per_device_train_batch_size=4, **{**OFFLINE, **own, **settings}),
        train_dataset=Dataset.from_list(list(data())),
        processing_class=processor,
        peft_config=peft.LoraConfig(**LORA) if adapted else None,
        **({} if reference is None else {"ref_model": reference}),
        **options,
    )


def first(trainer):
    trainer.train()
    return trainer.state.log_history[0]


RIGHT = {
    "dpo": ("loss", math.log(2)),
    "kto": ("loss", 0.5),
    "grpo": ("kl", 0.0),
    "rloo": ("kl", 0.0),
}


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_first_step(tmp_path, recwarn, kind, adapted):
    trainer = make(kind, tmp_path, adapted=adapted)
    trainer.add_callback(PruneReference(trainer))
    name, value = RIGHT[kind]
    assert first(trainer)[name] == pytest.approx(value, abs=1e-6)
    assert (trainer.ref_model is None) == adapted
    assert not [one for one in recwarn if WARNING in str(one.message)]


@pytest.mark.parametrize("kind", MAKERS)
def test_without_it_a_warning_says_so(tmp_path, kind):
    trainer = make(kind, tmp_path)
    with pytest.warns(UserWarning, match=WARNING) as caught:
        log = first(trainer)
    name, value = RIGHT[kind]
    assert log[name] != pytest.approx(value, abs=1e-4)
    assert len([one for one in caught if WARNING in str(one.message)]) == 1
    assert "grip" not in vars(trainer.ref_model)


def test_dpo_is_that_of_the_masked_model(tmp_path, expected):
    """Chosen and rejected answers are scored on the tokens that the prompt keeps, not those that an answer would."""
    trainer = make("dpo", tmp_path, adapted=True)
    watch = Watch(trainer.model.get_base_model())
    log = first(trainer)
    assert watch.seen == set(expected) and len(watch.calls) == 2  # the policy, and itself without adapters
    model, processor = load_pocket_llava()
    for name, answer in (("chosen", "right"), ("rejected", "wrong")):
        sums = []
        for (image, text), row, keep in zip(PROMPTS, ROWS, expected, strict=True):
            inputs = processor(
                images=image, text=f"{text} {row[answer]} </s>", return_tensors="pt", add_special_tokens=False
            )
            said = len(row[answer].split()) + 1
            ids = inputs["input_ids"][0, -said:]
            with torch.no_grad():
                logps = masked_logits(model, inputs, [keep])[0, -said - 1 : -1].log_softmax(-1)
            sums.append(float(logps.gather(-1, ids[:, None]).sum()))
        assert log[f"logps/{name}"] == pytest.approx(sum(sums) / len(sums), rel=1e-4)


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_rollouts_are_scored_as_they_were_sampled(tmp_path, kind):
    """Log-probs of a rollout, before and in the step, are the masked model's under the prompt's keep-set."""
    base = MAKERS[kind][0]
    seen = []

    class Seen(base):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(dict(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MAKERS, kind, (Seen, *MAKERS[kind][1:]))
        trainer = make(kind, tmp_path)
    trainer.add_callback(PruneReference(trainer))
    policy = trainer.model
    watch = Watch(policy)
    log = first(trainer)
    (keep,) = watch.seen
    inputs = seen[0]
    prompt, answer = inputs["prompt_ids"], inputs["completion_ids"]
    alone = pruned()[0]
    with torch.no_grad():
        alone(input_ids=prompt, attention_mask=inputs["prompt_mask"], pixel_values=inputs["pixel_values"])
    assert kept(alone) == [keep] * len(answer) and len(watch.calls) >= 3  # sampled, scored, trained
    assert len({tuple(row) for row in answer.tolist()}) > 1  # they were sampled
    whole = {
        "input_ids": torch.cat([prompt, answer], 1),
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        "pixel_values": inputs["pixel_values"],
    }
    with torch.no_grad():
        logits = masked_logits(load_pocket_llava()[0], whole, [keep] * len(answer))
    logps = (logits[:, prompt.shape[1] - 1 : -1] / trainer.temperature).log_softmax(-1)
    logps = logps.gather(-1, answer[..., None])[..., 0]
    spoken = inputs["completion_mask"].bool()
    if kind == "grpo":  # so that the importance ratios are 1
        torch.testing.assert_close(inputs["old_per_token_logps"][spoken], logps[spoken], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(inputs["ref_per_token_logps"][spoken], logps[spoken], rtol=1e-4, atol=1e-4)
        assert log["clip_ratio/region_mean"] == 0
    else:
        sums = (logps * spoken).sum(1)
        torch.testing.assert_close(inputs["old_logps"], sums, rtol=1e-4, atol=1e-4)


# What may stand around, in place of, or beside the reference


@torch.no_grad()
def same(model, reference):
    """Whether two models say the same of a prompt with its answer."""
    _, processor = load_pocket_llava()
    image, text = PROMPTS[0]
    inputs = processor(images=image, text=f"{text} {ROWS[0]['wrong']}", return_tensors="pt", add_special_tokens=False)
    labels = inputs["input_ids"].clone()
    labels[:, : -len(ROWS[0]["wrong"].split())] = -100
    one, other = (each.eval()(**inputs, labels=labels).loss for each in (model, reference))
    return torch.equal(one, other)


def test_budgets_and_prompts_of_the_policy_count_for_both():
    model, reference = pruned()[0], load_pocket_llava()[0]
    prune_like(reference, model)
    assert same(model, reference)
    for block in (model.grip.budget(num_tokens=3), model.grip.disabled()):
        with block:
            assert same(model, reference)
            wanted = len(model.grip.last.kept[0])
    with model.grip.budget(num_tokens=3):
        model(**one_prompt()), reference(**one_prompt())
        assert len(model.grip.last.kept[0]) == len(reference.grip.last.kept[0]) == 3 != wanted
    inputs = one_prompt()
    answer = {name: torch.cat([value, value[:, -2:]], 1) for name, value in inputs.items() if value.ndim == 2}
    with model.grip.prompt([inputs["input_ids"].shape[1]]):
        reference(**{**inputs, **answer})
    told = reference.grip.last.kept
    reference(**inputs)
    assert torch.equal(told[0], reference.grip.last.kept[0])


def one_prompt():
    image, text = PROMPTS[1]
    return load_pocket_llava()[1](images=image, text=text, return_tensors="pt", add_special_tokens=False)


@pytest.mark.parametrize("selector", ["visionzip", "prumerge", "fastv", "random", "grip"])
def test_every_kind_of_selector(selector):
    """Those that tap the tower, merge tokens, choose inside, choose by chance, or learned to."""
    model = apply_grip(load_pocket_llava()[0], keep_ratio=0.11, selector=selector)
    reference = load_pocket_llava()[0]
    assert not same(model, reference)
    prune_like(reference, model)
    assert same(model, reference)


def test_a_function_as_selector_and_another_patch_before():
    def last_ones(batch):
        return torch.arange(batch.tokens.shape[1]).expand(batch.mask.shape).float()

    model = apply_grip(load_pocket_llava()[0], keep_ratio=0.11, selector=last_ones)
    reference = pruned()[0]
    prune_like(reference, model)
    assert same(model, reference)


def test_a_model_without_a_patch_is_refused(tmp_path):
    plain, reference = load_pocket_llava()[0], load_pocket_llava()[0]
    with pytest.raises(ConfigError, match="model must be patched by apply_grip, got a LlavaForConditionalGeneration"):
        prune_like(reference, plain)
    trainer = make("dpo", tmp_path, model=plain)
    with pytest.raises(ConfigError, match="must be patched"):
        PruneReference(trainer)
    assert "grip" not in vars(reference) and "grip" not in vars(trainer.ref_model)


def test_no_reference_is_left_alone(tmp_path, recwarn):
    trainer = make("grpo", tmp_path, beta=0.0)
    trainer.add_callback(PruneReference(trainer))
    assert trainer.ref_model is None and "kl" not in first(trainer)
    assert not [one for one in recwarn if WARNING in str(one.message)]


def test_a_reference_that_is_given(tmp_path, recwarn):
    """Also beside adapters; and one that the user patched is no cause for a warning."""
    trainer = make("dpo", tmp_path, adapted=True, ref_model=load_pocket_llava()[0])
    trainer.add_callback(PruneReference(trainer))
    assert first(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer = make("dpo", tmp_path, ref_model=pruned()[0])
    assert first(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not [one for one in recwarn if WARNING in str(one.message)]


def test_a_synced_reference(tmp_path):
    """Its weights become the policy's, and it stays pruned."""
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = make("dpo", tmp_path, max_steps=2, learning_rate=1e-3, lr_scheduler_type="constant", **settings)
    trainer.add_callback(PruneReference(trainer))
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-6) and same(trainer.model, trainer.ref_model)
    assert not same(trainer.model, pruned()[0])


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_references_are_not_computed_ahead(tmp_path, kind):
    """TRL refuses it for pictures; if it does so no longer, they must be those of the patched policy."""
    with pytest.raises(ValueError, match="not supported for vision datasets"):
        make(kind, tmp_path, precompute_ref_log_probs=True)


def test_evaluation_before_training(tmp_path):
    trainer = make("dpo", tmp_path)
    trainer.add_callback(PruneReference(trainer))
    found = trainer.evaluate(Dataset.from_list(list(preferences())))
    assert found["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


class Curriculum(TrainerCallback):
    """Another budget at the second step, none at the third."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 1:
            apply_grip(model, keep_ratio=0.5, selector="grid")
        if state.global_step == 2:
            remove_grip(model)


def test_a_policy_that_is_patched_anew(tmp_path):
    trainer = make("dpo", tmp_path, max_steps=3)
    trainer.add_callback(Curriculum())
    trainer.add_callback(PruneReference(trainer))
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert "grip" not in vars(trainer.ref_model) and not any(
        module._forward_pre_hooks for module in trainer.ref_model.modules()
    )


def test_references_in_wrappers(tmp_path):
    trainer = make("dpo", tmp_path)
    bare = trainer.ref_model
    for wrap in (
        lambda model: Accelerator(cpu=True).prepare_model(model, evaluation_mode=True),
        lambda model: torch.compile(model),
        lambda model: torch.nn.DataParallel(model),
    ):
        trainer.ref_model = wrap(bare)
        PruneReference(trainer)
        assert same(trainer.model, bare)
        remove_grip(bare)
