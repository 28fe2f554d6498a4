"""The loss that balances experts counts the tokens that stay: against the unpatched, masked model."""

import pytest
import torch
from reference import assert_close, held_positions, is_recurrent, original_positions
from tiny import IMAGE, TINY, build, make_inputs, select_by_content

from grip_hf import apply_grip, remove_grip
from grip_hf.errors import GripError

ROUTED = sorted({"ernie4_5_vl_moe", "glm4v_moe", "qwen3_vl_moe", "qwen3_5_moe"} & set(TINY))
OTHERWISE = [("qwen3_vl_moe", "by position"), ("qwen3_vl_moe", "with the config's own setting")]
RAGGED = [[3, IMAGE, 4, 5], [2, IMAGE, 2, IMAGE, 3], [1, IMAGE, 9]]


def with_labels(inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-2] = -100
    return {**inputs, "labels": labels, "output_router_logits": True}


def loss_of(model, call, positional=0):
    """The two losses, router logits and gradients of the routers of one call."""
    model.zero_grad()
    names = list(call)
    out = model(
        *(call[name] for name in names[:positional]), **{n: call[n] for n in names[positional:]}, use_cache=False
    )
    out.loss.backward()
    routers = [p.grad for n, p in model.named_parameters() if n.endswith("gate.weight") and p.grad is not None]
    return out.loss, out.aux_loss, out.router_logits, routers


@torch.no_grad()
def routed_alone(model, inputs, held):
    """Row by row, the router logits of the unpatched language model on the embeddings that stay."""
    seen, decoder = {}, model.get_decoder()
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**inputs, use_cache=False)
    hook.remove()
    for row, places in enumerate(held):
        call = {"inputs_embeds": seen["inputs_embeds"][row : row + 1, places], "use_cache": False}
        call["position_ids"] = seen["position_ids"][..., row : row + 1, :][..., places]
        call["attention_mask"] = torch.ones(1, int(places.sum()), dtype=torch.long)
        yield decoder(**call, output_router_logits=True).router_logits


def by_hand(layers, config):
    """Equations 4 to 6 of the Switch Transformer, over the tokens of all layers."""
    probabilities = torch.cat(layers).double().softmax(-1)
    chosen = torch.zeros_like(probabilities)
    for token, one in enumerate(probabilities):
        for expert in one.topk(config.num_experts_per_tok).indices:
            chosen[token, expert] = 1
    return (config.num_experts * (chosen.mean(0) * probabilities.mean(0)).sum()).float()


@pytest.mark.parametrize(("family", "way"), [*((family, "by name") for family in ROUTED), *OTHERWISE])
def test_it_is_that_of_the_masked_model(family, way):
    model, inputs = build(family), make_inputs(family, RAGGED)
    call = with_labels(inputs)
    everything = loss_of(model, call)[1].detach()
    apply_grip(model, num_tokens=3, selector=select_by_content)
    mine, given = call["attention_mask"].clone(), dict(call)
    if way == "by position":
        given = {"input_ids": given.pop("input_ids"), "attention_mask": given.pop("attention_mask"), **given}
    elif way == "with the config's own setting":
        model.config.get_text_config().output_router_logits = True
        del given["output_router_logits"]
        with model.grip.disabled():
            if loss_of(model, given)[1] is None:
                pytest.skip("this release asks the argument alone, without a patch too")
    found = loss_of(model, given, positional=2 * (way == "by position"))
    assert torch.equal(call["attention_mask"], mine)  # the caller's own stays as it was
    held = held_positions(inputs, model.grip.last.kept)
    remove_grip(model)
    assert abs(float(everything - found[1].detach())) > 1e-4
    if is_recurrent(model):  # no mask makes the unpatched model's recurrent layers skip a token
        layers = [torch.cat(one) for one in zip(*routed_alone(model, inputs, held), strict=True)]
        for ours, theirs in zip(found[2], layers, strict=True):
            assert_close(family, ours[held.flatten()], theirs)
        assert_close(family, found[1], by_hand(layers, model.config.get_text_config()))
        return
    masked = {**call, "attention_mask": held.long(), "position_ids": original_positions(model, inputs)}
    expected = loss_of(model, masked)
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert_close(family, ours, theirs)
    assert len(found[2]) == len(expected[2]) > 0
    for ours, theirs in zip(found[2], expected[2], strict=True):
        assert_close(family, ours[held.flatten()], theirs[held.flatten()])
    assert len(found[3]) == len(expected[3]) > 0
    for ours, theirs in zip(found[3], expected[3], strict=True):
        assert_close(family, ours, theirs)


def test_a_call_without_padding_needs_no_mask():
    model, inputs = build("qwen3_vl_moe"), make_inputs("qwen3_vl_moe", [[3, IMAGE, 4]])
    apply_grip(model, num_tokens=3, selector=select_by_content)
    call = with_labels(inputs)
    expected = loss_of(model, call)
    del call["attention_mask"]
    for ours, theirs in zip(loss_of(model, call)[:2], expected[:2], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_cannot_be_counted_is_refused():
    inputs = make_inputs("qwen3_vl_moe", RAGGED)
    model = apply_grip(build("qwen3_vl_moe"), num_tokens=3, selector=select_by_content)
    positions = original_positions(model, inputs)
    call = {**inputs, "output_router_logits": True}
    for given in (None, inputs["attention_mask"][:, None, None].bool()):
        with pytest.raises(GripError, match=r"without an attention_mask of shape \[batch, length\]"):
            model(**{**call, "attention_mask": given, "position_ids": positions})
    for directly in (model.model, model.forward):
        with pytest.raises(GripError, match="would count dropped tokens"):
            directly(**call)
    with model.grip.disabled():
        assert model.forward(**call).aux_loss is not None
    apply_grip(model, num_tokens=3, selector="fastv", selector_kwargs={"layers": 1})
    with pytest.raises(GripError, match="between the layers"):
        model(**call)
    assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_models_without_experts_take_the_argument(family, no_grad):
    model, inputs = build(family), make_inputs(family, RAGGED)
    apply_grip(model, num_tokens=3, selector=select_by_content)
    expected = model(**inputs).logits
    assert torch.equal(model(**inputs, output_router_logits=True).logits, expected)
