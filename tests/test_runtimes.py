"""Models that other libraries run: offloaded by accelerate or quantised by bitsandbytes."""

import pytest
import torch
from tiny import IMAGE, TINY, build, make_inputs, select_by_content
from transformers import AutoModelForImageTextToText

from grip_hf import apply_grip, remove_grip

RAGGED = [[3, IMAGE, 4], [2, IMAGE, 2, IMAGE, 3], [5]]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def prune(model):
    return apply_grip(model, keep_ratio=0.5, selector=select_by_content)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "smolvlm"])
@pytest.mark.parametrize("first", ["patch", "offload"])
def test_cpu_offload(family, first):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = build(family), make_inputs(family, RAGGED)
    expected = prune(model)(**inputs).logits
    plain = remove_grip(model)(**inputs).logits
    if first == "patch":
        prune(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    if first == "offload":
        prune(model)
    out = model(**inputs)
    torch.testing.assert_close(out.logits, expected, **CLOSE)
    if family != "llava_next":  # whose newline is not loaded when upstream's generate encodes pictures
        out = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
    assert [len(kept) for kept in model.grip.kept_tokens(out)][2] == 0
    remove_grip(model)
    torch.testing.assert_close(model(**inputs).logits, plain, **CLOSE)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = TINY["llava"].config()
    for part in (config.text_config, config.vision_config):  # widths that the 4-bit kernels can cut into blocks
        part.hidden_size, part.intermediate_size = 64, 128
    config.text_config.num_key_value_heads, config.text_config.head_dim = 4, 16
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config=settings, device_map="cpu"
    ).eval()
    model.generation_config.eos_token_id = None
    inputs = make_inputs("llava", [[3, IMAGE, 4]])
    plain = model(**inputs).logits
    out = prune(model)(**inputs)
    kept = model.grip.kept_tokens(out)[0]
    assert len(kept) == 8 and torch.isfinite(out.logits).all() and not torch.equal(out.logits, plain)
    with model.grip.disabled():
        assert torch.equal(model(**inputs).logits, plain)
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 3
