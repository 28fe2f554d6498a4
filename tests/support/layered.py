"""The independent reference for selectors that drop between layers, on any family.

It is the *unpatched* eager model. From each layer on, hooks add to its 4-D mask, so that nobody sees the dropped
tokens; what drops is told by the model's own attention maps and plain loops.
"""

import copy

import torch
from reference import LOOSE, lengthen_types, original_positions
from tiny import EAGER_ONLY, IMAGE, IMAGE_ID, PAD, TINY
from transformers import AutoModelForImageTextToText

from grip_hf import apply_grip

DEPTH, BUDGET = 5, 2
# name -> (arguments, {depth of the model: [(layer that ranks, first layer without the dropped tokens)]})
METHODS = {
    "fastv": ({"layers": 2}, {5: [(1, 2)], 8: [(1, 2)]}),
    "pyramiddrop": ({"depths": [0.4, 0.8]}, {5: [(2, 2), (4, 4)], 8: [(3, 3), (6, 6)]}),
    "sparsevlm": ({"depths": [0.2, 0.4]}, {5: [(1, 2), (2, 3)], 8: [(1, 2), (3, 4)]}),
}


def build_deep(family, attention="sdpa", depth=DEPTH, shared=0):
    """A tiny model in eval mode with more layers; where the family can, the last `shared` read the keys of others."""
    config = copy.deepcopy(TINY[family].config())  # some families' configs share their parts
    inner = config.get_text_config()
    for name in ("layer_types", "mlp_layer_types", "intermediate_size", "activation_sparsity_pattern"):
        kinds = getattr(inner, name, None)
        if isinstance(kinds, list):
            setattr(inner, name, (kinds * depth)[:depth])
    inner.num_hidden_layers = depth
    if getattr(inner, "num_kv_shared_layers", 0):
        inner.num_kv_shared_layers = shared
    attention = "eager" if family in EAGER_ONLY else attention
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        model.lm_head.weight[89:] = 0  # such a model never says a placeholder or marker token
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def left_after(name, total, budget):
    """How many tokens of a group each drop leaves, in order."""
    stages = len(METHODS[name][1][DEPTH])
    if name == "fastv":
        return [budget]
    return [max(round(total * (budget / total) ** ((stage + 1) / stages)), budget) for stage in range(stages)]


def groups_of(family, inputs, prompts, seed=0, scope="sample"):
    """[(row, its visual places)]: the visual tokens that share a budget."""
    found = []
    for row, (ids, prompt) in enumerate(zip(inputs["input_ids"].tolist(), prompts, strict=True)):
        places = [place for place, token in enumerate(ids) if token == IMAGE_ID]
        count = prompt.count(IMAGE)
        if scope == "sample" or count < 2:
            found += [(row, places)] if places else []
            continue
        for picture in TINY[family].pictures(count, seed + 7 * len(prompt))[1]:
            own, places = places[: picture.count(IMAGE_ID)], places[picture.count(IMAGE_ID) :]
            found.append((row, own))
        assert not places
    return found


def masked_run(model, inputs, gone, positions=None, grad=False, **options):
    """Run the unpatched eager model; from each layer on, hide the columns that `gone` gives for it ([B, L] bool)."""

    def hide(hidden):
        def hook(layer, args, kwargs):
            mask = kwargs["attention_mask"]
            assert mask.ndim == 4 and mask.is_floating_point() and mask.shape[-1] == hidden.shape[1]
            masked = mask.masked_fill(hidden[:, None, None], torch.finfo(mask.dtype).min)
            return args, {**kwargs, "attention_mask": masked}

        return hook

    handles = []
    for index, layer in enumerate(model.get_decoder().layers):
        handles += [
            layer.register_forward_pre_hook(hide(gone[first]), with_kwargs=True) for first in gone if index >= first
        ]
    if positions is None:
        positions = original_positions(model, inputs)
    with torch.set_grad_enabled(grad):
        output = model(**inputs, position_ids=positions, use_cache=False, **options)
    for handle in handles:
        handle.remove()
    return output


def dropped(model, inputs, name, groups, asking, already=None):
    """{first layer: [B, L] bool} who is gone.

    Args:
        model: The unpatched eager model.
        inputs: The prompt.
        name: The method.
        groups: As from `groups_of`.
        asking: Per group the places whose attention ranks.
        already: Who went in an earlier turn, in the same form; they are gone while others are ranked.
    """
    gone, alive = dict(already or {}), [list(places) for _, places in groups]
    for stage, (rank, drop) in enumerate(METHODS[name][1][len(model.get_decoder().layers)]):
        maps = masked_run(model, inputs, gone, output_attentions=True).attentions[rank]
        earlier = (already or {}).get(drop)
        gone[drop] = torch.zeros_like(inputs["input_ids"], dtype=torch.bool) if earlier is None else earlier.clone()
        for number, (row, places) in enumerate(groups):
            keep = left_after(name, len(places), min(BUDGET, len(places)))[stage]
            seen = maps[row][:, asking[number]].mean((0, 1))
            order = sorted(sorted(alive[number]), key=lambda place: -float(seen[place]))
            alive[number] = order[:keep]
            gone[drop][row, [place for place in places if place not in alive[number]]] = True
    return gone


def patched(family, name, attention="sdpa", depth=DEPTH, shared=0, **settings):
    """A deep tiny model that drops between its layers until `BUDGET` tokens of each group are left."""
    model = build_deep(family, attention, depth, shared)
    return apply_grip(model, selector=name, selector_kwargs=METHODS[name][0], **{"num_tokens": BUDGET, **settings})


def watched(plain, model, family, prompts, inputs, call, scope="sample"):
    """What `call` gives on a patched model, and who should be gone from which layer on, as from `dropped`.

    Whose attention ranks is noted from the selector, or is the last token of the prompt: the raters themselves are
    checked in test_inside.py, here only what the engine makes of them.
    """
    seen, selector = [], model.grip.selector

    def asking(batch):
        named = type(selector).asking(selector, batch)
        named = torch.zeros_like(batch.text_mask) if named is None else named & batch.text_mask
        seen[:] = [batch.text_index[group, one].tolist() for group, one in enumerate(named)]
        return named

    selector.asking = asking
    try:
        result = call()
    finally:
        del selector.asking
    groups, last = groups_of(family, inputs, prompts, scope=scope), inputs["input_ids"].shape[1] - 1
    return result, dropped(plain, inputs, selector.name, groups, [places or [last] for places in seen])


def lengthen(family, inputs, tokens):
    """Inputs with text tokens [B, T] after the prompt."""
    more = {**inputs, "input_ids": torch.cat([inputs["input_ids"], tokens], 1)}
    more["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, tokens.shape[1]), value=1)
    lengthen_types(family, more, tokens.shape[1])
    return more


def stays(inputs, gone):
    """[B, L] bool: what no layer lacks."""
    held = inputs["attention_mask"].bool()
    for one in gone.values():
        held = held & ~one
    return held


def go_on(gone, steps):
    """The same for a sequence that has gone on for a few tokens, none of which is gone."""
    return {first: torch.nn.functional.pad(one, (0, steps)) for first, one in gone.items()}


def assert_close(family, ours, theirs):
    """Equal up to rounding, which deeper models magnify more; a wrong token shows at 1e-2."""
    torch.testing.assert_close(ours, theirs, atol=max(2e-4, 2 * LOOSE.get(family, 0)), rtol=1e-3)
