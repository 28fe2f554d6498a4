"""What the last tokens of a call pay attention to, against the maps that the eager model gives."""

import pytest
import torch
from tiny import IMAGE, TINY, build, make_inputs

from grip_hf.engine.received import received
from grip_hf.errors import UnsupportedModelError
from grip_hf.families.table import find_parts

ASKING = 3


@pytest.mark.parametrize("family", sorted(TINY))
def test_attention_is_that_of_the_eager_maps(family):
    inputs = make_inputs(family, [[2, IMAGE, 4], [1, IMAGE, 5]])
    model = build(family)
    with torch.no_grad(), received(find_parts(model).language_model, ASKING) as found:
        model(**inputs, use_cache=False)
    with torch.no_grad():
        maps = build(family, "eager")(**inputs, use_cache=False, output_attentions=True).attentions
    maps = [one for one in maps if one is not None]
    assert maps
    expected = sum(one[:, :, -ASKING - 1 : -1].mean(1) for one in maps)
    torch.testing.assert_close(found.weights, expected, atol=2e-5, rtol=0)
    language_model = find_parts(model).language_model
    assert not any(module._forward_pre_hooks for module in language_model.modules())


def test_a_layer_without_a_known_attention_is_refused():
    language_model = find_parts(build("llava")).language_model
    layer = language_model.layers[1]
    layer.other = layer.self_attn
    del layer.self_attn
    with pytest.raises(UnsupportedModelError, match="without an attention"), received(language_model, 1):
        pass
    assert not any(module._forward_pre_hooks for module in language_model.modules())


def test_each_call_starts_anew():
    model, inputs = build("llava"), make_inputs("llava", [[2, IMAGE, 4]])
    with torch.no_grad(), received(find_parts(model).language_model, ASKING) as found:
        model(**inputs, use_cache=False)
        first = found.weights
        model(**inputs, use_cache=False)
    assert torch.equal(found.weights, first)
