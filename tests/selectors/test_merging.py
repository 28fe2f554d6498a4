"""Selectors that merge: their folding in plain loops, and the model that gets what they folded."""

import numpy as np
import pytest
import tiny
import torch
from batches import join, one_group

from grip_hf import apply_grip, remove_grip
from grip_hf.engine.keepsets import topk_mask
from grip_hf.errors import ConfigError, UnsupportedModelError
from grip_hf.selectors import get_selector

FEATURES = "vision.features"
TAPS = {  # attention and keys that each method reads
    "visionzip": ("vision.salience", "vision.mean_keys"),
    "prumerge": ("vision.joint_salience.-1", "vision.keys.-1"),
}


def cosine(a, b):
    return float(a @ b) / float((a @ a) * (b @ b)) ** 0.5


def visionzip(salience, keys, features, budget):
    """Kept tokens and their features, in plain loops."""
    contextual = round(budget * 10 / 64)
    dominant = sorted(range(len(salience)), key=lambda i: -salience[i])[: budget - contextual]
    rest = [i for i in range(len(salience)) if i not in dominant]
    targets = rest[:: max(1, len(rest) // max(1, contextual))][:contextual]
    joined = {target: [] for target in targets}
    for i in rest:
        if i not in targets and targets:
            joined[max(targets, key=lambda t: cosine(keys[i], keys[t]))].append(features[i])
    merged = {i: features[i] for i in dominant}
    for target, others in joined.items():
        merged[target] = features[target] + (torch.stack(others).mean(0) if others else 0)
    return merged


def prumerge(salience, keys, features, budget):
    """Kept tokens and their features, in plain loops: each one with all the others, the official double loop."""
    low, high = np.percentile(salience, 25), np.percentile(salience, 75)
    by_salience = sorted(range(len(salience)), key=lambda i: -salience[i])
    kept = [i for i in by_salience if salience[i] > high + 1.5 * (high - low)][:budget]
    rest = [i for i in range(len(salience)) if i not in kept]
    number = budget - len(kept)
    kept += [rest[int(k * len(rest) / number)] for k in range(number)]
    merged = {}
    for i in kept:
        others = sorted((j for j in range(len(salience)) if j != i), key=lambda j: -cosine(keys[i], keys[j]))
        merged[i] = features[i] + sum(salience[j] * features[j] for j in others[:32])
    return merged


METHODS = {"visionzip": visionzip, "prumerge": prumerge}


def expected(name, batch, row):
    n = int(batch.mask[row].sum())
    salience, keys, features = (batch.taps[tap][row, :n] for tap in (*TAPS[name], FEATURES))
    return METHODS[name](salience.tolist(), keys, features, min(int(batch.budgets[row]), n))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("outliers", [0, 3, 9])
def test_merging_equals_plain_loops(name, outliers):
    groups = [one_group((64,), budget=budget, seed=budget) for budget in (1, 6, 20, 64)] + [one_group((9,), budget=4)]
    for group in groups:
        group.taps[TAPS[name][0]][0, 2 : 2 + outliers] += 5 + torch.arange(outliers)[: group.mask.shape[1] - 2]
    batch = join(groups)
    selector = get_selector(name)
    keep = topk_mask(selector(batch), batch.mask, batch.budgets)
    merged = selector.merge_features(batch, keep)
    for row in range(len(groups)):
        wanted = expected(name, batch, row)
        assert keep[row].nonzero().flatten().tolist() == sorted(wanted)
        for token, value in wanted.items():
            torch.testing.assert_close(merged[row, token], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_the_model_gets_the_merged_tokens(name):
    """The logits are those of the unpatched model given the merged embeddings, the dropped tokens masked out."""
    model = tiny.build("llava")
    inputs = tiny.make_inputs("llava", [[3, tiny.IMAGE, 4], [2, tiny.IMAGE, 5]])
    seen = {}
    selector = get_selector(name)
    original = selector.merge

    def spy(batch, keep):
        seen.update(batch=batch, keep=keep)
        return original(batch, keep)

    selector.merge = spy
    apply_grip(model, selector=selector, num_tokens=7)
    with torch.no_grad():
        pruned = model(**inputs, use_cache=False).logits
    remove_grip(model)
    visual = inputs["input_ids"] == tiny.IMAGE_ID
    with torch.no_grad():
        embeds = model.model.get_input_embeddings()(inputs["input_ids"])
        mask, places = inputs["attention_mask"].clone(), visual.nonzero().view(2, 16, 2)[..., 1]
        for row in range(2):
            merged = expected(name, seen["batch"], row)
            for token, place in enumerate(places[row].tolist()):
                if token in merged:
                    embeds[row, place] = model.model.multi_modal_projector(merged[token][None])[0]
                else:
                    mask[row, place] = 0
        positions = torch.arange(mask.shape[1])[None].expand(2, -1)
        reference = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
        logits = model.lm_head(reference.last_hidden_state)
    assert seen["keep"].sum(1).tolist() == [7, 7]
    torch.testing.assert_close(pruned[mask.bool()], logits[mask.bool()], atol=1e-4, rtol=1e-3)


def test_merging_reaches_generated_tokens_and_leaves_no_trace():
    model = tiny.build("llava")
    inputs = tiny.make_inputs("llava", [[3, tiny.IMAGE, 4]])
    plain = model.generate(**inputs, max_new_tokens=4)
    for name in METHODS:
        apply_grip(model, selector=name, num_tokens=7)
        cached = model.generate(**inputs, max_new_tokens=4)
        assert torch.equal(cached, model.generate(**inputs, max_new_tokens=4, use_cache=False))
        remove_grip(model)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), plain)


def test_gradients_pass_through_merging():
    model = tiny.build("llava")
    apply_grip(model, selector="visionzip", num_tokens=7)
    inputs = tiny.make_inputs("llava", [[3, tiny.IMAGE, 4]])
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradient = model.model.get_input_embeddings().weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_bad_arguments():
    with pytest.raises(ConfigError, match=r"contextual must be a number in \[0, 1\], got 2"):
        get_selector("visionzip", contextual=2)
    with pytest.raises(ConfigError, match="neighbours must be an integer >= 1, got 0"):
        get_selector("prumerge", neighbours=0)


def test_a_model_that_makes_one_token_of_several_patches_is_refused():
    model = tiny.build("internvl")
    with pytest.raises(UnsupportedModelError, match="'visionzip' merges what the projector gets"):
        apply_grip(model, selector="visionzip", num_tokens=3)
    assert not hasattr(model, "grip")


def test_prumerge_reads_the_last_layer_as_one_head():
    """The taps equal the official code's calculation on the projections of the last layer, in eager torch."""
    model = tiny.build("llava")
    model.model.config.vision_feature_layer = -2
    tower, inputs, caught = model.model.vision_tower, tiny.make_inputs("llava", [[3, tiny.IMAGE, 4]]), {}
    attention = [module for module in tower.modules() if hasattr(module, "q_proj")][-1]
    handles = [
        getattr(attention, name).register_forward_hook(
            lambda _, args, output, name=name: caught.update({name: output})
        )
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        tower(inputs["pixel_values"])
    for handle in handles:
        handle.remove()
    query, key = caught["q_proj"], caught["k_proj"]
    expected = (query @ key.transpose(1, 2) * key.shape[-1] ** -0.5).softmax(-1)[0, 0, 1:]
    seen = {}

    class Spy(type(get_selector("prumerge"))):
        name = "prumerge"

        def __call__(self, batch):
            seen.update(batch.taps)
            return super().__call__(batch)

    apply_grip(model, selector=Spy(), num_tokens=5)
    with torch.no_grad():
        model(**inputs)
    torch.testing.assert_close(seen["vision.joint_salience.-1"][0], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen["vision.keys.-1"][0], key[0, 1:], atol=1e-5, rtol=1e-4)
