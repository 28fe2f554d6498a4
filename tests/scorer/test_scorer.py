"""The learned scorer and its input features."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from grip_hf.errors import ScorerError
from grip_hf.scorer.hints import hints, position_features, standardize
from grip_hf.scorer.layers import Attention
from grip_hf.scorer.model import GripScorer, GripScorerConfig

TINY = {"hidden_size": 12, "width": 16, "attention_width": 8, "num_heads": 2}


def tiny_scorer(**sizes):
    torch.manual_seed(0)
    return GripScorer(GripScorerConfig(**TINY | sizes)).eval()


def random_inputs(lengths, words, seed=0, width=12):
    """Inputs of one group per length, padded right (tokens) and on both sides (text), with garbage at the padding."""
    rng = torch.Generator().manual_seed(seed)
    groups, most, longest = len(lengths), max(lengths), max(words)
    tokens = torch.randn(groups, most, width, generator=rng)
    text = torch.randn(groups, longest, width, generator=rng)
    mask = torch.arange(most) < torch.tensor(lengths)[:, None]
    text_mask = torch.stack([torch.arange(longest).roll(i) < w for i, w in enumerate(words)])
    ratio = torch.rand(groups, generator=rng) * 0.9 + 0.05
    return tokens, mask, text, text_mask, ratio, torch.rand(groups, most, 2, generator=rng)


def cosine(a, b):
    return float(a @ b) / (float(a @ a) ** 0.5 * float(b @ b) ** 0.5)


def zscore(values):
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / deviation for v in values]


def test_hints_equal_plain_loops():
    tokens, mask, text, text_mask, _, _ = random_inputs([7, 4], [3, 2])
    norms = tokens.norm(dim=-1, keepdim=True)
    found = hints(tokens, norms, mask, text, text_mask)
    for g in range(2):
        real, words = tokens[g][mask[g]], text[g][text_mask[g]]
        centre = [cosine(t, real.mean(0)) for t in real]
        similar = [[cosine(t, w) for w in words] for t in real]
        best, mean = [max(row) for row in similar], [sum(row) / len(row) for row in similar]
        by_word = [zscore(column) for column in zip(*similar, strict=True)]
        standout = [max(column[n] for column in by_word) for n in range(len(real))]
        norm = zscore([math.log(float(t.norm())) for t in real])
        expected = [norm, zscore(centre), zscore(best), zscore(mean), centre, best, mean, standout]
        torch.testing.assert_close(found[g][mask[g]].T, torch.tensor(expected), atol=1e-3, rtol=1e-3)
        blind = hints(tokens, norms, mask, None, None)[g][mask[g]]
        torch.testing.assert_close(blind.T, torch.tensor([norm, zscore(centre), centre]), atol=1e-3, rtol=1e-3)


def test_standardize_is_zero_at_padding_and_for_equal_tokens():
    x, mask = torch.full((1, 4, 1), 3.0), torch.tensor([[True, True, True, False]])
    assert standardize(x, mask).abs().max() < 1e-3
    assert standardize(torch.randn(1, 4, 2), mask)[0, 3].eq(0).all()


def test_position_features_tell_positions_apart():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 24), torch.linspace(0, 1, 24), indexing="ij")
    features = position_features(torch.stack([rows, columns], -1).reshape(1, -1, 2))[0]
    distance = torch.cdist(features, features) + 10 * torch.eye(len(features))
    assert distance.min() > 0.1


@pytest.mark.parametrize("query_aware", [True, False])
def test_scores_do_not_depend_on_padding_or_batch(query_aware):
    scorer = tiny_scorer(query_aware=query_aware, num_layers=2)
    tokens, mask, text, text_mask, ratio, positions = random_inputs([9, 5, 1], [4, 6, 1])
    together = scorer(tokens, mask, text, text_mask, ratio, positions)
    assert together.dtype == torch.float32 and together.masked_select(~mask).eq(0).all()
    for g in range(3):
        n = int(mask[g].sum())
        row = slice(g, g + 1)
        words = text[row][:, text_mask[g]]
        alone = scorer(
            tokens[row, :n], mask[row, :n], words, text_mask[row][:, text_mask[g]], ratio[row], positions[row, :n]
        )
        torch.testing.assert_close(alone[0], together[g, :n], atol=1e-5, rtol=1e-4)


def test_scores_follow_a_permutation_of_the_tokens():
    scorer = tiny_scorer()
    tokens, mask, text, text_mask, ratio, positions = random_inputs([8], [3])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    scores = scorer(tokens, mask, text, text_mask, ratio, positions)
    moved = scorer(tokens[:, order], mask, text, text_mask, ratio, positions[:, order])
    torch.testing.assert_close(moved, scores[:, order], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("change", ["text", "word order", "budget", "positions", "other token"])
def test_every_input_matters(change):
    scorer = tiny_scorer()
    tokens, mask, text, text_mask, ratio, positions = random_inputs([6], [3])
    before = scorer(tokens, mask, text, text_mask, ratio, positions)
    if change == "text":
        text = -text
    elif change == "word order":
        text = text.flip(1)
    elif change == "budget":
        ratio = ratio / 10
    elif change == "positions":
        positions = positions.flip(1)
    else:
        tokens = torch.cat([tokens[:, :5], -tokens[:, 5:]], 1)
    after = scorer(tokens, mask, text, text_mask, ratio, positions)
    assert (after - before)[:, :5].abs().max() > 1e-3


def test_scores_start_moderate_whatever_the_scale_and_width():
    for width, scale in ((12, 1.0), (512, 0.01), (512, 300.0)):
        torch.manual_seed(0)
        scorer = GripScorer(GripScorerConfig(hidden_size=width))
        tokens, mask, text, text_mask, ratio, positions = random_inputs([64], [7], width=width)
        scores = scorer(scale * tokens, mask, text * scale, text_mask, ratio, positions)
        assert 0.02 < scores.std() < 2 and scores.abs().max() < 5
    same = scorer(tokens, mask, text, text_mask, ratio, positions)
    torch.testing.assert_close(same, scores, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_and_weights(dtype):
    scorer = tiny_scorer()
    tokens, mask, text, text_mask, ratio, positions = random_inputs([30, 11], [5, 3])
    exact = scorer(tokens, mask, text, text_mask, ratio, positions)
    low_inputs = scorer(tokens.to(dtype), mask, text.to(dtype), text_mask, ratio, positions)
    low_weights = copy.deepcopy(scorer).to(dtype)(tokens.to(dtype), mask, text.to(dtype), text_mask, ratio, positions)
    for scores, tolerance in ((low_inputs, 0.05), (low_weights, 0.1)):
        assert scores.dtype == torch.float32
        assert (scores - exact).abs().max() < tolerance


def test_no_words_no_tokens():
    scorer = tiny_scorer()
    tokens, mask, text, text_mask, ratio, positions = random_inputs([5, 3], [4, 2])
    text_mask[1] = False
    scores = scorer(tokens, mask, text, text_mask, ratio, positions)
    assert scores.isfinite().all()
    empty = scorer(tokens[1:], mask[1:], text[1:, :0], text_mask[1:, :0], ratio[1:], positions[1:])
    torch.testing.assert_close(empty, scores[1:], atol=1e-5, rtol=1e-4)
    mask[1] = False
    assert scorer(tokens, mask, text, text_mask, ratio, positions).isfinite().all()
    none = scorer(tokens[:, :0], mask[:, :0], text, text_mask, ratio, positions[:, :0])
    assert none.shape == (2, 0)


def test_gradients_are_finite_and_reach_every_weight():
    scorer = tiny_scorer(num_layers=2)
    inputs = random_inputs([6, 1], [3, 1])
    inputs[3][1] = False
    scorer(*inputs).square().sum().backward()
    for name, weight in scorer.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().sum() > 0, name


def test_it_learns_what_to_keep_from_question_and_budget():
    """Small budgets want the token that the first word names, large ones the token that the last word names."""
    scorer = tiny_scorer(width=64, attention_width=32).train()
    optimizer = torch.optim.Adam(scorer.parameters(), lr=3e-3)
    rng = torch.Generator().manual_seed(0)
    words = torch.randn(10, 12, generator=rng)

    def draw(groups):
        kinds = torch.stack([torch.randperm(10, generator=rng)[:6] for _ in range(groups)])
        named = torch.stack([torch.randperm(6, generator=rng)[:2] for _ in range(groups)])
        small = torch.rand(groups, generator=rng) < 0.5
        tokens = words[kinds] + 0.2 * torch.randn(groups, 6, 12, generator=rng)
        text = words[kinds.gather(1, named)]
        ones = torch.ones(groups, 6, dtype=torch.bool)
        target = torch.where(small, named[:, 0], named[:, 1])
        positions = torch.rand(groups, 6, 2, generator=rng)
        return (tokens, ones, text, ones[:, :2], torch.where(small, 0.1, 0.5), positions), target

    for _ in range(120):
        inputs, target = draw(64)
        loss = nn.functional.cross_entropy(scorer(*inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs, target = draw(256)
    assert (scorer(*inputs).argmax(-1) == target).float().mean() > 0.95


def test_blind_scorer_needs_no_text():
    scorer = tiny_scorer(query_aware=False)
    tokens, mask, text, text_mask, ratio, positions = random_inputs([6], [3])
    blind = scorer(tokens, mask, None, None, ratio, positions)
    assert torch.equal(blind, scorer(tokens, mask, text, text_mask, ratio, positions))
    assert not any("word" in name or "text" in name for name in scorer.state_dict())


def test_bad_calls_are_refused():
    tokens, mask, text, text_mask, ratio, positions = random_inputs([6], [3])
    with pytest.raises(ScorerError, match="needs text"):
        tiny_scorer()(tokens, mask, None, None, ratio, positions)
    with pytest.raises(ScorerError, match="hidden_size 12, got 10"):
        tiny_scorer()(tokens[..., :10], mask, text, text_mask, ratio, positions)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer >= 1, got 0"),
        ({"width": True}, "width must be an integer >= 1, got True"),
        ({"num_layers": "2"}, "num_layers must be an integer >= 1, got '2'"),
        ({"num_heads": 3}, "num_heads must divide attention_width 8, got 3"),
        ({"query_aware": 1}, "query_aware must be True or False, got 1"),
    ],
)
def test_bad_sizes_are_refused(sizes, message):
    with pytest.raises(ScorerError, match=message):
        GripScorerConfig(**TINY | sizes)


def test_save_and_load(tmp_path):
    scorer = tiny_scorer(num_layers=2, query_aware=False)
    scorer.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = GripScorer.from_pretrained(tmp_path)
    assert not loaded.training and loaded.config.to_diff_dict() == scorer.config.to_diff_dict()
    inputs = random_inputs([6], [3])
    assert torch.equal(loaded(*inputs), scorer(*inputs))
    again, info = GripScorer.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.bfloat16)
    assert again.dtype == torch.bfloat16 and not info["missing_keys"]
    again.save_pretrained(tmp_path / "small")
    assert all(value.dtype == torch.bfloat16 for value in load_file(tmp_path / "small" / "model.safetensors").values())
    assert GripScorer.from_pretrained(tmp_path / "small").dtype == torch.float32


def damage(folder, how):
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "pickle only":
        torch.save(tensors, folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "other model":
        (folder / "config.json").write_text('{"model_type": "llama"}')
    else:
        if how == "missing key":
            del tensors["visual.weight"]
        elif how == "unexpected key":
            tensors["model.vision_tower.weight"] = torch.zeros(2)
        elif how == "wrong shape":
            tensors["visual.weight"] = torch.zeros(16, 13)
        elif how == "nan":
            tensors["visual.weight"][0, 0] = torch.nan
        save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "cannot load"),
        ("pickle only", "no file named model.safetensors"),
        ("no config", "config.json"),
        ("broken config", "config.json"),
        ("other model", "type 'llama', not a grip scorer"),
        ("missing key", "missing_keys.*visual.weight"),
        ("unexpected key", "unexpected_keys.*vision_tower"),
        ("wrong shape", "cannot load"),
        ("nan", r"NaN or infinity in \['visual.weight'\]"),
    ],
)
def test_damaged_files_are_refused(tmp_path, how, message):
    tiny_scorer().save_pretrained(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ScorerError, match=message):
        GripScorer.from_pretrained(tmp_path, local_files_only=True)


def test_missing_folder_and_loose_loading_are_refused(tmp_path):
    with pytest.raises(ScorerError, match="no folder"):
        GripScorer.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ScorerError, match="cannot load a grip scorer from 'nobody/nothing'"):
        GripScorer.from_pretrained("nobody/nothing", local_files_only=True)
    tiny_scorer().save_pretrained(tmp_path)
    for loose in ({"ignore_mismatched_sizes": True}, {"trust_remote_code": True}, {"use_safetensors": False}):
        with pytest.raises(ScorerError, match="safetensors only"):
            GripScorer.from_pretrained(tmp_path, **loose)


def test_every_weight_is_loaded_as_it_was_saved(tmp_path):
    """Bit by bit; nothing is drawn again, and no random number is used up."""
    scorer = tiny_scorer(num_layers=2)
    with torch.no_grad():
        for weight in scorer.parameters():  # no bias, norm or null key is as it starts
            weight.add_(torch.rand_like(weight))
    scorer.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = GripScorer.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert loaded.state_dict().keys() == scorer.state_dict().keys()
    for name, weight in scorer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_first_weights():
    """As the docstring of `draw_weights` says; the same for the same seed."""
    torch.manual_seed(5)
    scorer = GripScorer(GripScorerConfig(hidden_size=512))
    torch.manual_seed(5)
    again = GripScorer(GripScorerConfig(hidden_size=512))
    attentions = {f"{name}.output.weight" for name, part in scorer.named_modules() if isinstance(part, Attention)}
    assert attentions and all(torch.equal(a, b) for a, b in zip(scorer.parameters(), again.parameters(), strict=True))
    for name, weight in scorer.named_parameters():
        if weight.ndim == 2 and not name.endswith("null"):
            expected = weight.shape[1] ** -0.5 * (0.5 if name in attentions else 1)
            assert float(weight.std()) == pytest.approx(expected, rel=0.2 if weight.numel() < 1000 else 0.05), name
        else:
            assert bool((weight == (1 if "norm" in name and name.endswith("weight") else 0)).all()), name
    assert torch.equal(scorer.words.weight, scorer.visual.weight)
    block = scorer.blocks[0]
    assert torch.equal(block.to_text.key.weight, block.to_text.query.weight)
    assert not torch.equal(block.to_visual.key.weight, block.to_visual.query.weight)
