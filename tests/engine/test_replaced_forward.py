"""A `forward` that somebody put on the model, its class or its modules, as liger-kernel does, bypasses no hook.

liger-kernel's own functions (0.8.5), with torch in place of its Triton kernels, once passed the same check for eleven
families on transformers 5.16 and for `llava` and three of Qwen's on 5.19; many of them do not run on 5.24.
"""

import types

import pytest
import torch
from tiny import IMAGE, build, make_inputs
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from versions import before

from grip_hf import apply_grip

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "gemma3", "paligemma2", "internvl", "smolvlm")
ASKED = [[3, IMAGE, 4, 5, 41, 42, 43], [2, IMAGE, 6, 7, 51, 52, 53]]
ANSWER = 3


def by_words(batch):
    """A choice that hangs on every word that it sees."""
    words = (batch.text * batch.text_mask[..., None]).sum((1, 2))
    return torch.cos(torch.arange(batch.mask.shape[1]) * 1.7 + words[:, None])


def fused(self, input_ids=None, pixel_values=None, attention_mask=None, labels=None, cache_position=None, **lm_kwargs):
    """As liger-kernel's: in training the loss comes from hidden states, and there are no logits."""
    given = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
    hidden = self.model(**given, cache_position=cache_position, return_dict=True, **lm_kwargs)[0]
    logits = self.lm_head(hidden).float()  # which its kernel makes piece by piece
    cap = getattr(self.config.get_text_config(), "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return LlavaCausalLMOutputWithPast(loss=loss)


def put_on_model(model, monkeypatch):
    """Of the model and of parts of its language model, on the instances."""
    model.forward = types.MethodType(fused, model)
    for module in (model.model.get_input_embeddings(), *model.modules()):
        if type(module).__name__.endswith("RMSNorm") or module is getattr(model.model, "language_model", None):
            vars(module)["forward"] = type(module).forward.__get__(module, type(module))


def put_on_class(model, monkeypatch):
    """Of the class, as for InternVL."""
    monkeypatch.setattr(type(model), "forward", fused)


def step(model, inputs, labels, bypassed):
    """Loss, gradient of the words' embeddings, and what was kept."""
    model.train()
    out = (model.forward if bypassed else model)(**inputs, labels=labels)
    out.loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient.abs().sum() > 0
    return out.loss.detach(), gradient, [one.tolist() for one in model.grip.last.kept]


@pytest.mark.parametrize("put", [put_on_model, put_on_class])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_without_it(family, put, monkeypatch):
    inputs = make_inputs(family, ASKED)
    labels = inputs["input_ids"].clone()
    labels[:, :-ANSWER] = -100
    if family == "paligemma2" and before("5.24"):  # there the mask hangs on labels, which such a forward keeps back
        losses = [build(family).train()(**inputs, labels=labels).loss.detach()]
        with monkeypatch.context() as patched:
            model = build(family)
            put(model, patched)
            losses.append(model.train()(**inputs, labels=labels).loss.detach())
        assert not torch.allclose(*losses), "the unpatched model does so no more"
        return
    plain = apply_grip(build(family), num_tokens=3, selector=by_words)
    loss, gradient, kept = step(plain, inputs, labels, bypassed=False)
    with torch.no_grad():
        plain(**inputs)
    assert [one.tolist() for one in plain.grip.last.kept] != kept  # so that a leak of the answer would show
    for order in ("before", "after"):
        for bypassed in (False, True):  # adapters call `forward` itself
            with monkeypatch.context() as patched:
                model = build(family)
                for one in ("grip", "liger") if order == "after" else ("liger", "grip"):
                    if one == "liger":
                        put(model, patched)
                    else:
                        apply_grip(model, num_tokens=3, selector=by_words)
                found = step(model, inputs, labels, bypassed)
            torch.testing.assert_close(found[:2], (loss, gradient), msg=f"{order}, {bypassed}")
            assert found[2] == kept
