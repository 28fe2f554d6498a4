"""On a transformers release that is newer than the newest tested, `apply_grip` checks itself."""

import copy
import logging
import random
import threading
import warnings

import numpy as np
import pytest
import torch
import transformers
from first_testbed import load_pocket_llava
from tiny import TEXT, TINY, build
from transformers import LlamaForCausalLM

from grip_hf import GripConfig, apply_grip, patch
from grip_hf.doctor import guard
from grip_hf.doctor.isolation import Drawing, undisturbed
from grip_hf.doctor.tiny import make
from grip_hf.engine.upstream import TESTED, is_untested, names
from grip_hf.errors import UnsupportedModelError

NEWER = "5.999.0"
CHOICE = {"keep_ratio": 0.5, "selector": "grid"}


@pytest.fixture
def checks(monkeypatch):
    """A newer release, nothing checked yet; counts the checks that are made."""
    made, real = [], guard.examine_own

    def examine(config, *args, **kwargs):
        made.append(config.model_type)
        return real(config, *args, **kwargs)

    monkeypatch.setattr(names.transformers, "__version__", NEWER)
    monkeypatch.setattr(guard, "_reports", {})
    monkeypatch.setattr(guard, "examine_own", examine)
    return made


@pytest.fixture
def fault(monkeypatch):
    """The self-check finds the positions changed."""

    def compacted(model, selector, ratio):
        config = GripConfig(keep_ratio=ratio, position_ids="compact")
        return patch._attach(patch.find_parts(model), config, selector, None)

    monkeypatch.setattr(patch, "prune", compacted)


def test_what_counts_as_newer(monkeypatch):
    newest = [int(part) for part in TESTED[-1].split(".")]
    for version, untested in (
        (TESTED[0], False),
        (TESTED[-1], False),
        (f"{newest[0]}.{newest[1]}.{newest[2] + 1}", True),
        (f"{newest[0]}.{newest[1] + 1}.0.dev0", True),
        (f"{newest[0]}.9.0", newest[1] < 9),
    ):
        monkeypatch.setattr(names.transformers, "__version__", version)
        assert is_untested() == untested, version


def test_nothing_is_checked_on_a_tested_release(checks, monkeypatch):
    monkeypatch.setattr(names.transformers, "__version__", TESTED[-1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_grip(build("llava"), **CHOICE)
    assert checks == []


def test_it_runs_once_per_family_and_warns_once(checks):
    for family in ("llava", "llava", "qwen2_vl", "llava"):
        new = family not in checks
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = apply_grip(build(family), **CHOICE)
        assert model.grip.config.selector == "grid"
        told = [str(one.message) for one in caught if one.filename == __file__]
        assert len(told) == new
        assert all(NEWER in text and TESTED[-1] in text and family in text for text in told)
    assert checks == ["llava", "qwen2_vl"]


def test_another_backbone_or_attention_is_another_check(checks):
    with pytest.warns(UserWarning, match="llava with a llama"):
        apply_grip(load_pocket_llava()[0], **CHOICE)
    config = TINY["llava"].config()
    config.text_config = transformers.MistralConfig(**TEXT, sliding_window=8)
    with pytest.warns(UserWarning, match="llava with a mistral"):
        apply_grip(make("llava", config=config), **CHOICE)
    with pytest.warns(UserWarning, match="llava with a llama"):
        apply_grip(build("llava", "eager"), **CHOICE)
    assert checks == ["llava"] * 3


def test_a_fault_raises_before_anything_is_patched(checks, fault):
    model = build("llava")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    for _ in range(2):
        with pytest.raises(UnsupportedModelError) as raised:
            apply_grip(model, **CHOICE)
        for part in (NEWER, TESTED[-1], "llava with a llama", "logits differ", "grip-hf doctor"):
            assert part in str(raised.value)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert not hasattr(model, "grip") and after.keys() == before.keys()
    assert all(list(after[name]) == list(before[name]) for name in before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert checks == ["llava"]


def test_a_fault_leaves_an_earlier_patch(checks, fault, monkeypatch):
    model = build("llava")
    with monkeypatch.context() as earlier:
        earlier.setattr(names.transformers, "__version__", TESTED[-1])
        handle = apply_grip(model, **CHOICE).grip
    with pytest.raises(UnsupportedModelError):
        apply_grip(model, keep_ratio=0.25, selector="grid")
    assert model.grip is handle and any(module._forward_pre_hooks for module in model.modules())


def state():
    """What a caller may have set."""
    handlers = logging.getLogger("transformers").handlers
    return {
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "torch": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": str(torch.get_default_device()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "onednn": [torch.backends.mkldnn.enabled, torch.backends.mkldnn.fp32_precision],
        "warnings": copy.copy(warnings.filters),
        "filters": [list(handler.filters) for handler in handlers],
        "level": logging.getLogger("transformers").level,
    }


@pytest.mark.parametrize("family", ["llava", "qwen3_5_moe", "gemma3n"])
def test_the_caller_is_not_disturbed(checks, family):
    model = build(family)
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            before = state()
            apply_grip(model, **CHOICE)
            assert state() == before
            assert torch.empty(1).is_meta
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        torch.set_num_threads(1)
    with torch.no_grad():
        before = state()
        apply_grip(build(family, "eager"), **CHOICE)
        assert {**state(), "torch": 0} == {**before, "torch": 0}  # `build` seeds
    assert checks == [family] * 2


def test_strict_warnings_do_not_fail_the_check(checks):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="passed its self-check"):
            apply_grip(build("janus"), **CHOICE)
        apply_grip(build("janus"), **CHOICE)


def test_threads_wait_for_one_check_and_draw_undisturbed(checks):
    models = [build("llava") for _ in range(4)]
    torch.manual_seed(3)
    expected = torch.randn(2000).tolist()
    torch.manual_seed(3)
    threads = [threading.Thread(target=apply_grip, args=(model,), kwargs=CHOICE) for model in models]
    for thread in threads:
        thread.start()
    drawn = []
    while any(thread.is_alive() for thread in threads) and len(drawn) < 1984:
        drawn += torch.randn(16).tolist()
    for thread in threads:
        thread.join()
    assert checks == ["llava"] and all(hasattr(model, "grip") for model in models)
    torch.manual_seed(3)
    assert drawn == [one for _ in range(len(drawn) // 16) for one in torch.randn(16).tolist()] and expected


@pytest.mark.parametrize("family", sorted(TINY))
def test_building_draws_from_no_global_generator(family):
    torch.manual_seed(0)
    seeded = make(family)
    before = torch.get_rng_state()
    with undisturbed(), Drawing(0):
        model = make(family)
    assert torch.equal(torch.get_rng_state(), before)
    pairs = zip(model.state_dict().values(), seeded.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_models_in_four_bits(checks, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = TINY["llava"].config()
    for part in (config.text_config, config.vision_config):  # widths that the kernels can cut into blocks
        part.hidden_size, part.intermediate_size = 64, 128
    config.text_config.num_key_value_heads, config.text_config.head_dim = 4, 16
    make("llava", config=config).save_pretrained(tmp_path)
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=settings, device_map="cpu"
    )
    with pytest.warns(UserWarning, match="passed its self-check"):
        apply_grip(model, **CHOICE)
    assert checks == ["llava"]


def test_unsupported_models_are_refused_first(checks):
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(UnsupportedModelError, match="supported model types"):
        apply_grip(LlamaForCausalLM(config), **CHOICE)
    assert checks == []
