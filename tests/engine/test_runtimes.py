"""Models that bitsandbytes has quantised."""

import pytest
import torch
from asking import prune
from tiny import IMAGE, TINY, make_inputs
from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.usefixtures("no_grad")


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
