"""What grip_hf knows of the settings of transformers' `generate`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .upstream import CACHE_NAMES

CONFIG = "generation_config"
# New tokens that are written if nothing says how many.
USUAL_LENGTH = 20
# Settings, and logits processors, that change what greedy decoding writes, with the values at which they do nothing.
WRITING: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "remove_invalid_values": (False,),
    "repetition_penalty": (1.0,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "watermarking_config": (),
}
# Other ways to decode than one greedy answer per prompt, and the values at which they are not that.
OTHER_WAYS: dict[str, tuple[Any, ...]] = {
    "do_sample": (False,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "assistant_model": (),
    "assistant_early_exit": (),
    "prompt_lookup_num_tokens": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "custom_generate": (),
    "prefill_chunk_size": (),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "synced_gpus": (False,),
    "inputs_embeds": (),
    **dict.fromkeys(CACHE_NAMES, ()),
}
# What is given as objects, and changes what is written too.
OBJECTS = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")


def setting(model: Any, given: Mapping[str, Any], name: str) -> Any:
    """A setting of a call of `generate`: as it is given, in its config, or in the model's; None if nowhere.

    Args:
        model: The model.
        given: The arguments of `generate`, by name.
        name: The setting.
    """
    if given.get(name) is not None:
        return given[name]
    for source in (given.get(CONFIG), model.generation_config):
        value = getattr(source, name, None)
        if value is not None:
            return value
    return None


def other_ways(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings by which a call of `generate` is more, or something else, than greedy decoding of whole prompts."""
    values = {name: setting(model, given, name) for name in OTHER_WAYS}
    return {
        name: value
        for name, value in values.items()
        if value is not None and not any(value is one or value == one for one in OTHER_WAYS[name])
    }


def writing(model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """What changes the words of a greedy answer, as plain data."""
    values = {name: setting(model, given, name) for name in WRITING}
    found = {name: value for name, value in values.items() if value is not None and value not in WRITING[name]}
    for name, value in found.items():
        found[name] = value.tolist() if hasattr(value, "tolist") else value if _plain(value) else repr(value)
    if isinstance(found.get("eos_token_id"), int):
        found["eos_token_id"] = [found["eos_token_id"]]
    for name in OBJECTS:
        value = given.get(name)
        kinds = [type(one).__name__ for one in value] if isinstance(value, list) else value and [type(value).__name__]
        if kinds:
            found[name] = kinds
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return isinstance(value, (bool, int, float, str))


def new_tokens(model: Any, given: Mapping[str, Any], prompt: int) -> int:
    """How many tokens a call of `generate` may write after a prompt of that length."""
    most = setting(model, given, "max_new_tokens")
    if most is not None:
        return int(most)
    length = setting(model, given, "max_length")
    return USUAL_LENGTH if length is None else int(length) - prompt


def ends(model: Any, given: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens that end an answer."""
    found = setting(model, given, "eos_token_id")
    found = found.tolist() if hasattr(found, "tolist") else found
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def padding(model: Any, given: Mapping[str, Any]) -> int | None:
    """Id of the token that stands behind an answer; None if nothing ends one."""
    found = setting(model, given, "pad_token_id")
    return int(found) if found is not None else next(iter(ends(model, given)), None)


def with_dict(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` that make it return all that it knows, the KV cache too."""
    found = {**given, "return_dict_in_generate": True}
    if CONFIG in found:  # both at once would be warned of
        found[CONFIG] = copy.deepcopy(found[CONFIG])
        found[CONFIG].return_dict_in_generate = found.pop("return_dict_in_generate")
    return found
