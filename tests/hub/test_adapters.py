"""Adapters of a patched model carry the GRIP part beside their own files."""

import copy
import json
import warnings

import peft
import pytest
import torch
from adapting import LORA, adapted, asked, files, put_around, saved, scorer
from huggingface_hub import HfApi
from loopback_hub import Repo
from tiny import IMAGE, build, make_inputs
from transformers import Trainer, TrainingArguments

from grip_hf import apply_grip, remove_grip
from grip_hf.errors import ConfigError, GripError, ScorerError


def test_adapters_come_back_with_their_scorer(tmp_path):
    model = adapted(scorer=scorer(), num_tokens=5)
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "grip/grip_config.json", "grip/model.safetensors"} <= files(tmp_path)
    loaded = peft.PeftModel.from_pretrained(build("llava"), tmp_path).eval()
    apply_grip(loaded, scorer=tmp_path)
    (logits, kept), (wanted, tokens) = asked(loaded), asked(model)
    assert kept == tokens and len(kept) == 5
    torch.testing.assert_close(logits, wanted)


def test_two_adapters_and_a_process_that_does_not_write(tmp_path):
    model = adapted(num_tokens=5, selector="grid")
    model.add_adapter("second", peft.LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "silent", is_main_process=False)
    assert not (tmp_path / "silent" / "grip").exists()
    model.save_pretrained(tmp_path / "both")
    assert {"grip/grip_config.json", "second/grip/grip_config.json"} <= files(tmp_path / "both")
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert (tmp_path / "one" / "second" / "grip").is_dir() and not (tmp_path / "one" / "grip").exists()


def test_a_trainer_saves_it(tmp_path):
    model = adapted(num_tokens=5, selector="grid")
    inputs = make_inputs("llava", [[3, IMAGE, 4]])
    row = {**{name: value[0] for name, value in inputs.items()}, "labels": inputs["input_ids"][0]}
    args = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, use_cpu=True, report_to="none")
    trainer = Trainer(model, args, train_dataset=[row])
    trainer.train()
    trainer.save_model(tmp_path / "end")
    for folder in ("checkpoint-1", "end"):
        assert {"adapter_config.json", "grip/grip_config.json"} <= files(tmp_path / folder)


def test_nothing_is_left_and_nothing_else_is_written(tmp_path):
    model = adapted(num_tokens=5, selector="grid")
    model.state_dict()
    peft.get_peft_model_state_dict(model)
    assert not files(tmp_path)
    copied = copy.deepcopy(model)
    remove_grip(model)
    model.save_pretrained(tmp_path / "removed")
    assert not (tmp_path / "removed" / "grip").exists()
    assert not any(module._state_dict_pre_hooks for module in model.get_base_model().modules())
    copied.save_pretrained(tmp_path / "copied")
    assert (tmp_path / "copied" / "grip" / "grip_config.json").is_file()


# Modules that PEFT trains beside the adapters


def lengths(model, inputs):
    """How many positions each copy of the first layer sees in one call."""
    seen, handles = [], []
    for name, module in model.named_modules():
        if name.endswith("layers.0") and "language_model" in name:
            handles.append(module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("patched", ["before", "after"])
def test_modules_to_save(patched):
    model, inputs = build("llava"), make_inputs("llava", [[3, IMAGE, 4]])
    config = peft.LoraConfig(target_modules=["fc1"], modules_to_save=["language_model"])
    try:
        lengths(peft.get_peft_model(build("llava"), config), inputs)
    except TypeError:
        pytest.skip("this PEFT cannot call such a module by keywords alone, without a patch either")
    if patched == "before":
        apply_grip(model, num_tokens=4, selector="grid")
    model = peft.get_peft_model(model, config)
    if patched == "after":
        apply_grip(model, num_tokens=4, selector="grid")
    short = inputs["input_ids"].shape[1] - 12  # 4 of 16 visual tokens
    assert lengths(model, inputs) == [short]
    with model.disable_adapter():
        assert lengths(model, inputs) == [short]
    model.add_adapter("second", config)
    model.set_adapter("second")
    assert lengths(model, inputs) == [short]
    merged = model.merge_and_unload()
    if patched == "after":  # the copy that was hooked went with its adapter
        with pytest.raises(GripError, match="apply it again"):
            lengths(merged, inputs)
        apply_grip(merged, num_tokens=4, selector="grid")
    assert lengths(merged, inputs) == [short]
    remove_grip(merged)
    assert lengths(merged, inputs) == [short + 12]


# What an adapter says of the patch that it was trained with


def test_peft_warns_of_an_adapter_that_was_trained_pruned(tmp_path):
    saved(tmp_path / "pruned", num_tokens=5, selector="grid")
    remove_grip(adapted(num_tokens=5, selector="grid")).save_pretrained(tmp_path / "plain")
    plain, said = put_around(build("llava"), tmp_path / "pruned")
    assert any("so_call_grip_hf_apply_grip" in one for one in said)
    assert "grip" not in vars(plain.get_base_model())
    assert not any("grip" in one for one in put_around(build("llava"), tmp_path / "plain")[1])


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_the_settings_come_back_by_themselves(tmp_path, task_type):
    model = apply_grip(build("llava"), num_tokens=5, selector="diversity")
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA, task_type=task_type)).eval()
    model.save_pretrained(tmp_path)
    assert "save_pretrained" not in vars(model.peft_config["default"])
    loaded, _ = put_around(build("llava"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_grip(loaded)
    assert loaded.get_base_model().grip.config == model.get_base_model().grip.config
    assert asked(loaded)[1] == asked(model)[1]
    apply_grip(loaded, num_tokens=3)  # another budget, the same chooser
    assert loaded.get_base_model().grip.config.selector == "diversity" and len(asked(loaded)[1]) == 3
    with pytest.warns(UserWarning, match=r"'default' was trained with other settings .*'diversity'.*'grid'"):
        apply_grip(loaded, num_tokens=3, selector="grid")


def test_a_scorer_is_found_where_the_patch_saw_the_folder_and_asked_for_elsewhere(tmp_path):
    model = saved(tmp_path, scorer=scorer(), num_tokens=5)
    loaded, _ = put_around(build("llava"), tmp_path)
    with pytest.raises(ScorerError, match=r"'default' was trained with a scorer.*apply_grip"):
        apply_grip(loaded)
    assert "grip" not in vars(loaded.get_base_model())
    seen, said = put_around(apply_grip(build("llava"), num_tokens=5, selector="grid"), tmp_path)
    assert any("another scorer" in one for one in said)
    apply_grip(seen)
    (logits, kept), (wanted, tokens) = asked(seen), asked(model)
    assert kept == tokens
    torch.testing.assert_close(logits, wanted)
    for one in (seen, apply_grip(loaded, scorer=tmp_path)):  # and a copy keeps what was seen
        assert torch.equal(asked(copy.deepcopy(one))[0], logits)


def test_the_scorer_of_the_checkpoint_serves_if_it_is_the_same(tmp_path):
    base = apply_grip(build("llava"), scorer=scorer(), num_tokens=5)
    base.save_pretrained(tmp_path / "base")
    saved(tmp_path / "same", scorer=scorer(), num_tokens=5)
    saved(tmp_path / "other", scorer=scorer(seed=1), num_tokens=5)
    again = type(base).from_pretrained(tmp_path / "base")
    loaded, _ = put_around(again, tmp_path / "same")
    assert len(asked(apply_grip(loaded))[1]) == 5
    loaded, _ = put_around(type(base).from_pretrained(tmp_path / "base"), tmp_path / "other")
    with pytest.raises(ScorerError, match="was trained with a scorer"):
        apply_grip(loaded)


def test_a_patched_model_warns_of_what_was_trained_otherwise(tmp_path):
    saved(tmp_path / "grid", num_tokens=5, selector="grid")
    remove_grip(adapted(num_tokens=5, selector="grid")).save_pretrained(tmp_path / "plain")
    for selector, folder, words in (
        ("grid", "grid", None),
        ("random", "grid", "trained with other settings"),
        ("grid", "plain", "trained without pruning"),
    ):
        model = apply_grip(build("llava"), num_tokens=3, selector=selector)
        _, said = put_around(model, tmp_path / folder)
        ours = [one for one in said if one.startswith("the adapter")]
        assert [words in one for one in ours] == ([] if words is None else [True]), (selector, folder, ours)
    saved(tmp_path / "learnt", scorer=scorer(), num_tokens=5)
    for seed, warned in ((0, 0), (1, 1)):  # the same settings; then another scorer
        _, said = put_around(apply_grip(build("llava"), scorer=scorer(seed), num_tokens=3), tmp_path / "learnt")
        assert sum(one.startswith("the adapter 'default' was trained with other settings") for one in said) == warned


def test_a_damaged_part_is_refused(tmp_path):
    saved(tmp_path, num_tokens=5, selector="grid")
    path = tmp_path / "adapter_config.json"
    told = json.loads(path.read_text())
    told["auto_mapping"]["grip_hf"] = "grid"
    path.write_text(json.dumps(told))
    loaded, _ = put_around(build("llava"), tmp_path)
    with pytest.raises(ConfigError, match="must be a dict, got 'grid'"):
        apply_grip(loaded, num_tokens=3)


def test_an_adapter_on_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(peft.utils.save_and_load, "file_exists", HfApi(endpoint=hub.url).file_exists)  # made on import
    model = saved(tmp_path, scorer=scorer(), num_tokens=5)
    hub.repos["user/adapter"] = Repo()
    hub.repos["user/adapter"].put({name: (tmp_path / name).read_bytes() for name in files(tmp_path)})
    loaded, said = put_around(apply_grip(build("llava"), num_tokens=5, selector="grid"), "user/adapter")
    assert any("another scorer" in one for one in said)
    assert torch.equal(asked(apply_grip(loaded))[0], asked(model)[0])
