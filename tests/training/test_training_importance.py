import pytest
import torch
from classroom import TOKENS, build_vlm, make_store, rows
from versions import TRAINING

from grip_hf.errors import UnsupportedModelError
from grip_hf.training.importance import attention_importance, combined_importance, gradient_importance, spread_out

pytestmark = TRAINING


@pytest.fixture(scope="module")
def store():
    return make_store()


def told(model, embeds, ids, count):
    """Log-likelihood of the last `count` tokens, by the plain language model."""
    logs = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state).log_softmax(-1)
    return sum(float(logs[0, -1 - count + i, ids[0, -count + i]]) for i in range(count))


def plain_inputs(row):
    model, processor = build_vlm()
    model.double()
    inputs = processor(images=row["image"], text=f"<image>{row['prompt']} {row['answer']} </s>", return_tensors="pt")
    with torch.no_grad():
        features = model.model.get_image_features(inputs["pixel_values"].double()).pooler_output[0]
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        visual = inputs["input_ids"][0] == model.config.image_token_id
        embeds[0, visual] = features
    return model, inputs["input_ids"], embeds, visual.nonzero().flatten().tolist()


def test_gradient_importance_equals_finite_differences(store):
    """Gradient x input is how the log-likelihood changes as a token is scaled."""
    found = gradient_importance(store.vlm, store.samples([3, 0]))  # answers of different lengths: padding
    assert found.shape == (2, TOKENS)
    model, ids, embeds, places = plain_inputs(rows(4)[3])
    count, step = 3, 1e-3  # norms run in float32
    with torch.no_grad():
        for token in (0, 5, 15):
            sides = []
            for sign in (1, -1):
                moved = embeds.clone()
                moved[0, places[token]] *= 1 + sign * step
                sides.append(told(model, moved, ids, count))
            assert found[0, token] == pytest.approx(abs(sides[0] - sides[1]) / (2 * step), rel=0.02, abs=2e-3)


def test_attention_importance_equals_attention_maps(store):
    found = attention_importance(store.vlm, store.samples([3, 0]))
    assert store.vlm.parts.language_model.config._attn_implementation == "sdpa"
    model, ids, embeds, places = plain_inputs(rows(4)[3])
    model.model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model.model.language_model(inputs_embeds=embeds, output_attentions=True).attentions
    length = ids.shape[1]
    for token in range(TOKENS):
        total = sum(
            float(layer[0, head, length - 4 + i, places[token]]) / 2
            for layer in maps
            for head in range(2)
            for i in range(3)
        )
        assert found[0, token] == pytest.approx(total, abs=1e-4)


def test_a_model_that_passes_no_gradient_on_is_refused():
    store = make_store(2)
    layer = store.vlm.parts.language_model.layers[0]
    layer.register_forward_hook(lambda module, args, out: out * 0)
    with pytest.raises(UnsupportedModelError, match="use target='attention'"):
        gradient_importance(store.vlm, store.samples([0, 1]))
    with pytest.warns(UserWarning, match="attention alone"):
        left = combined_importance(store.vlm, store.samples([0, 1]))
    expected = attention_importance(store.vlm, store.samples([0, 1]))
    assert torch.allclose(left, expected / expected.sum(1, keepdim=True))


def test_combined_importance_is_the_mean_of_both_shares(store):
    samples = store.samples([3, 0, 1])
    both = [f(store.vlm, samples).double() for f in (attention_importance, gradient_importance)]
    expected = sum(value / value.sum(1, keepdim=True) for value in both) / 2
    found = combined_importance(store.vlm, samples)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    assert not torch.allclose(found.argsort(1), both[0].argsort(1))


def test_spreading_out_adds_the_greatest_determinant():
    torch.manual_seed(0)
    tokens, importance = torch.randn(2, 7, 5), torch.rand(2, 7)
    mask = torch.ones(2, 7).bool()
    mask[1, 5:] = False
    importance[1, 5:] = 0
    tokens[0, 1] = tokens[0, 0]  # a twin of a token that matters just as much
    importance[0, :2] = 2.0
    kept = spread_out(tokens, mask, importance, torch.tensor([4, 3]))
    assert kept.sum(1).tolist() == [4, 3] and not kept[0, :2].all()
    for g, count in ((0, 4), (1, 3)):
        unit = tokens[g].double() / tokens[g].double().norm(dim=-1, keepdim=True)
        weighed = unit * (importance[g].double() / importance[g].max()).pow(0.25)[:, None]
        chosen = []
        for _ in range(count):
            left = [t for t in range(7) if mask[g, t] and t not in chosen]
            volumes = {t: float(torch.linalg.det(weighed[[*chosen, t]] @ weighed[[*chosen, t]].T)) for t in left}
            chosen.append(max(left, key=volumes.__getitem__))
        assert sorted(chosen) == kept[g].nonzero().flatten().tolist()
