"""Selectors on a real (tiny) model, through `apply_grip`."""

import copy
import io

import pytest
import tiny
import torch
from asking import assert_beams_start_alike
from matrix import lacking
from transformers import SiglipVisionConfig
from transformers.vision_utils import get_vision_window_index

from grip_hf import GripScorer, apply_grip, remove_grip
from grip_hf.errors import ScorerError, UnsupportedModelError
from grip_hf.families.towers import window_order
from grip_hf.scorer.model import GripScorerConfig
from grip_hf.selectors import SELECTORS, get_selector

PROMPTS = [[3, tiny.IMAGE, 4], [tiny.IMAGE, 2, tiny.IMAGE, 3, 5]]


def scorer(width=tiny.HIDDEN):
    torch.manual_seed(1)
    return GripScorer(GripScorerConfig(hidden_size=width, width=16, attention_width=8))


def apply(model, name, **settings):
    return apply_grip(model, scorer=scorer() if name == "grip" else None, selector=name, **settings)


def kept(model, inputs):
    with torch.no_grad():
        return [tokens.tolist() for tokens in model.grip.kept_tokens(model(**inputs, use_cache=True))]


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - {"fastv", "pyramiddrop", "sparsevlm"}))
def test_batch_and_generate_keep_what_a_single_call_keeps(name):
    model = tiny.build("llava")
    model(**tiny.make_inputs("llava", PROMPTS))
    before = hooks(model)  # transformers registers some of its own at the first call
    apply(model, name, num_tokens=6)
    single = [kept(model, tiny.make_inputs("llava", [prompt]))[0] for prompt in PROMPTS]
    assert [len(tokens) for tokens in single] == [6, 6]
    batch = tiny.make_inputs("llava", PROMPTS)
    assert kept(model, batch) == single
    if not lacking("beam search", "llava", lambda: assert_beams_start_alike(tiny.build("llava"), batch)):
        output = model.generate(**batch, max_new_tokens=2, num_beams=2, return_dict_in_generate=True)
        beams = [tokens.tolist() for tokens in model.grip.kept_tokens(output)]
        assert beams == [single[0], single[0], single[1], single[1]]
    remove_grip(model)
    assert hooks(model) == before


@pytest.mark.parametrize("scope", ["sample", "image"])
def test_scope(scope):
    model = apply(tiny.build("llava"), "grid", num_tokens=4, scope=scope)
    tokens = kept(model, tiny.make_inputs("llava", PROMPTS))
    assert [len(t) for t in tokens] == ([4, 4] if scope == "sample" else [4, 8])
    assert tokens[0] == ([1, 3, 9, 11] if scope == "sample" else tokens[1][:4])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("layer", [-1, -2])
def test_cls_attention_is_the_towers_own(attention, layer):
    """The tap equals the attention map that the tower returns in eager mode, in the layer that feeds the projector."""
    model = tiny.build("llava", attention)
    model.model.config.vision_feature_layer = layer
    inputs = tiny.make_inputs("llava", PROMPTS)
    seen = {}

    class Spy(SELECTORS["cls_attention"]):
        name = "cls_attention"

        def __call__(self, batch):
            seen["tap"] = batch.taps["vision.salience"][batch.mask]
            return super().__call__(batch)

    apply_grip(model, selector=Spy(), num_tokens=6)
    chosen = kept(model, inputs)
    reference = tiny.build("llava", "eager").model.vision_tower
    maps = reference(inputs["pixel_values"], output_attentions=True).attentions[layer]
    expected = maps[:, :, 0, 1:].mean(1)
    torch.testing.assert_close(seen["tap"].reshape(3, 16), expected, atol=1e-5, rtol=1e-4)
    assert chosen[0] == sorted(expected[0].topk(6).indices.tolist())
    assert chosen[1] == sorted(expected[1:].flatten().topk(6).indices.tolist())
    assert model.model.vision_tower.config._attn_implementation == attention


def test_a_tower_without_cls_gives_the_mean_over_all_queries():
    config = tiny.TINY["llava"].config()
    config.vision_config = SiglipVisionConfig(**{k: v for k, v in tiny.VISION.items() if k != "projection_dim"})
    config.vision_feature_select_strategy = "full"
    torch.manual_seed(0)
    model = tiny.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    inputs = tiny.make_inputs("llava", PROMPTS[:1])
    maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-1]
    expected = sorted(maps.mean(dim=(0, 1, 2)).topk(6).indices.tolist())
    apply(model, "cls_attention", num_tokens=6)
    assert kept(model, inputs) == [expected]


def maps_of(tower, monkeypatch, run):
    """Attention maps of every softmax that the eager tower computes, in order."""
    maps, plain = [], torch.nn.functional.softmax

    def spy(logits, *args, **kwargs):
        maps.append(plain(logits, *args, **kwargs))
        return maps[-1]

    with monkeypatch.context() as patch, torch.no_grad():
        handles = [
            tower.register_forward_pre_hook(lambda *_: patch.setattr(torch.nn.functional, "softmax", spy)),
            tower.register_forward_hook(lambda *_: patch.undo()),
        ]
        run()
        for handle in handles:
            handle.remove()
    return maps


def pooled(values, side):
    """Means over 2 x 2 patches of a side x side grid, in raster order."""
    return [
        sum(float(values[(2 * r + i) * side + 2 * c + j]) for i in (0, 1) for j in (0, 1)) / 4
        for r in range(side // 2)
        for c in range(side // 2)
    ]


def expected_salience(family, model, inputs, monkeypatch):
    """Attention that each visual token gets in the last layer, from the maps of the eager tower."""
    tower = getattr(model.model, {"smolvlm": "vision_model", "idefics3": "vision_model"}.get(family, "visual"), None)
    tower = model.model.vision_tower if tower is None else tower
    maps = maps_of(tower, monkeypatch, lambda: model(**inputs))
    if family == "internvl":
        return [value for one in maps[-1] for value in pooled(one[:, 0, 1:].mean(0), 4)]
    if family in ("smolvlm", "idefics3"):
        return [value for one in maps[-1] for value in pooled(one.mean((0, 1)), 4)]
    pictures = len(inputs["image_grid_thw"])
    patches = torch.cat([one.shape[-1] * one[0].mean((0, 1)) for one in maps[-pictures:]])
    tokens = patches.reshape(-1, 4).mean(1)
    if family == "qwen2_5_vl":
        order, _ = get_vision_window_index(inputs["image_grid_thw"], 2, tower.window_size, tower.patch_size)
        tokens = tokens[order.argsort()]
    return tokens.tolist()


@pytest.mark.parametrize("family", ["internvl", "smolvlm", "idefics3", "qwen2_vl", "qwen2_5_vl"])
def test_cls_attention_of_other_families(family, monkeypatch):
    inputs = tiny.make_inputs(family, PROMPTS)
    expected = expected_salience(family, tiny.build(family, "eager"), inputs, monkeypatch)
    model, seen = tiny.build(family), []

    class Spy(SELECTORS["cls_attention"]):
        name = "cls_attention"

        def __call__(self, batch):
            seen.append(batch.taps["vision.salience"][batch.mask])
            return super().__call__(batch)

    apply_grip(model, selector=Spy(), keep_ratio=0.5)
    together = kept(model, inputs)
    torch.testing.assert_close(seen[0], torch.tensor(expected), atol=1e-5, rtol=1e-3)
    assert together == [kept(model, tiny.make_inputs(family, [prompt]))[0] for prompt in PROMPTS]


def test_windows_are_undone_as_upstream_makes_them():
    grid = torch.tensor([[1, 12, 20], [2, 6, 4], [1, 16, 16]])
    for window in (2, 3, 4):
        upstream, _ = get_vision_window_index(grid, 2, window * 2 * 14, 14)
        assert torch.equal(window_order(grid, 2, window), upstream)


def test_cls_attention_refuses_what_it_cannot_tap():
    model = tiny.build("llava_next")
    with pytest.raises(UnsupportedModelError, match=r"'cls_attention' needs .* this 'llava_next' model"):
        apply(model, "cls_attention", num_tokens=6)
    llava = tiny.build("llava")
    with pytest.raises(UnsupportedModelError, match=r"layer must be in \[-2, 2\) for this tower, got 7"):
        apply(llava, "cls_attention", num_tokens=6, selector_kwargs={"layer": 7})
    for refused in (model, llava):
        assert hooks(refused) == 0 and not hasattr(refused, "grip")


def test_a_scorer_of_another_width_is_refused():
    model = tiny.build("llava")
    with pytest.raises(ScorerError, match=r"hidden_size 40, but .* has 32"):
        apply_grip(model, scorer=scorer(40), num_tokens=6)
    with pytest.raises(ScorerError, match=r"hidden_size 40, LlavaForConditionalGeneration has 32"):
        apply_grip(model, selector=get_selector("grip", scorer=scorer(40)), num_tokens=6)
    assert hooks(model) == 0 and not hasattr(model, "grip")


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "internvl", "smolvlm"])
@pytest.mark.parametrize("name", ["grip", "random", "grid", "similarity", "diversity"])
def test_other_families(family, name):
    model = apply(tiny.build(family), name, keep_ratio=0.5)
    single = [kept(model, tiny.make_inputs(family, [prompt]))[0] for prompt in PROMPTS]
    assert kept(model, tiny.make_inputs(family, PROMPTS)) == single
    assert all(0 < len(tokens) == len(set(tokens)) for tokens in single)


def test_a_tapped_model_can_be_copied_and_pickled():
    model = apply(tiny.build("llava"), "cls_attention", num_tokens=6)
    inputs = tiny.make_inputs("llava", PROMPTS)
    file = io.BytesIO()
    torch.save(model, file)  # before the first call, which leaves hooks of transformers that cannot be pickled
    file.seek(0)
    before = kept(model, inputs)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert kept(twin, inputs) == before
        attention = [module for module in twin.model.vision_tower.modules() if hasattr(module, "q_proj")][-1]
        attention.k_proj.weight.data.neg_()
        assert kept(twin, inputs) != before and kept(model, inputs) == before


def test_selectors_that_share_a_tap_do_not_disturb_each_other():
    model = tiny.build("llava")
    inputs = tiny.make_inputs("llava", PROMPTS)
    apply(model, "vispruner", num_tokens=6)
    alone = kept(model, inputs)
    handles = get_selector("cls_attention").prepare(model) + get_selector("hiprune").prepare(model)
    assert kept(model, inputs) == alone
    remove_grip(model)
    apply(model, "vispruner", num_tokens=6)
    assert kept(model, inputs) == alone
    for handle in handles:
        handle.remove()
    assert kept(model, inputs) == alone
