"""Tiny configs after a model's own."""

import pytest
import transformers
from tiny import TINY, VARIANTS
from transformers import AutoConfig

from grip_hf.doctor.check import examine_own
from grip_hf.doctor.shrink import family_of, make_tiny
from grip_hf.patch import prune


def llava(text):
    return AutoConfig.for_model("llava", text_config=text)


@pytest.mark.parametrize("family", sorted(TINY))
def test_the_usual_config_of_every_family_becomes_tiny(family):
    config = AutoConfig.for_model(VARIANTS.get(family, family))
    tiny = make_tiny(config)
    own, text = config.get_text_config(), tiny.get_text_config()
    assert (tiny.model_type, text.model_type) == (config.model_type, own.model_type)
    assert text.hidden_size == 32 and text.vocab_size == 99 and text.num_hidden_layers <= 4
    assert set(getattr(text, "layer_types", None) or ()) == set(getattr(own, "layer_types", None) or ())
    assert bool(getattr(text, "sliding_window", None)) == bool(getattr(own, "sliding_window", None))
    assert family_of(TINY[family].config()) == family


@pytest.mark.parametrize("family", ["llava", "gemma3", pytest.param("gemma4", marks=pytest.mark.slow)])
def test_the_usual_config_passes(family):
    report = examine_own(AutoConfig.for_model(family), prune)
    assert report.passed and report.family == family and not report.note


@pytest.mark.parametrize(
    "text",
    [
        transformers.MistralConfig(sliding_window=4096),
        transformers.MistralConfig(sliding_window=None),
        transformers.Qwen2Config(use_sliding_window=True, max_window_layers=2),
        transformers.Qwen3Config(tie_word_embeddings=True, use_cache=False),
        transformers.Gemma2Config(),  # in newer releases eager attention alone
        transformers.PhiConfig(),  # in no tiny model
        transformers.GPT2Config(),  # learned positions
    ],
    ids=lambda one: getattr(one, "model_type", one),
)
def test_other_text_backbones_pass(text):
    report = examine_own(llava(text), prune)
    assert report.passed, (report.failures, report.note)
    assert (report.family, report.text, report.note) == ("llava", text.model_type, "")


def test_kinds_of_layers_and_windows_are_taken_over():
    text = transformers.Qwen2Config(use_sliding_window=True, max_window_layers=2, sliding_window=4096)
    tiny = make_tiny(llava(text)).get_text_config()
    assert set(tiny.layer_types) == {"full_attention", "sliding_attention"} and tiny.sliding_window == 12
    plain = make_tiny(llava(transformers.Qwen2Config())).get_text_config()
    assert set(plain.layer_types) == {"full_attention"}


def test_a_backbone_that_cannot_be_made_tiny_is_told(monkeypatch):
    text = transformers.MistralConfig()
    monkeypatch.setattr(type(text), "__init__", lambda self, **settings: (_ for _ in ()).throw(TypeError("too small")))
    report = examine_own(llava(text), prune)
    assert report.passed and report.text == "llama"
    assert "mistral could not be made tiny: TypeError: too small" in report.note
