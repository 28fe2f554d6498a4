"""What is verified for which family: tests draw their families from here, and so does `families/README.md` its table.

A check runs for every family. Where a family lacks what is checked, a limit says so, and its cell asserts that limit:
in `UPSTREAM` ones the unpatched model fails too, in `REFUSED` ones an error is raised. Both are those of the newest
release; what older ones get wrong besides is in `versions`, and asserted in the same way.
"""

import pytest
from tiny import EAGER_ONLY, EVERY, TINY, VARIANTS
from versions import faults, not_yet

FAMILIES = sorted(TINY)
# One family of each kind: plain, M-RoPE, deepstack, masks made outside, windows made inside, shared layers, recurrent.
# And a few of them, for the less usual calls.
FEW = ("llava", "qwen2_vl", "cohere2_vision", "gemma3", "qwen3_5")
KINDS = ("llava", "qwen2_vl", "qwen3_vl", "gemma3", "cohere2_vision", "mistral3", "gemma4", "lfm2_vl", "qwen3_5")
VIDEO = ("ernie4_5_vl_moe", "exaone4_5", "gemma4", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "llava_next_video")
VIDEO += ("llava_onevision", "molmo2", "perception_lm", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl")
VIDEO += ("qwen3_vl_moe", "video_llama_3", "video_llava")

PREFIX = "its prompt is one block in which all tokens see each other"
MIXED = "with several pictures in a prompt, transformers gives its beams each other's pictures"
TYPES = "transformers does not lengthen its token types"
STATES = "its recurrent layers carry a state from token to token: raises"
KEYS = "no token goes after the first layer whose keys later ones read: a selector that would raises"
STATE = "transformers cannot take back the state of its linear attention"
BLOCKS = "tokens of a picture see each other, which flash attention cannot do"
EMBEDS = "transformers does not generate from embeddings"
MROPE = "transformers cannot tell its positions without token ids"
MERGED = "transformers gets the mask of a packed row wrong: raises"
RECURRENT = "the state of its recurrent layers would run on into the next sequence: raises"
WINDOW = "beyond its sliding window: raises"
ROWS = "the rows of its vision tower are not known, or it looks at all of them behind it: raises"


def same(reason, *families):
    return dict.fromkeys(families, reason)


UPSTREAM = {
    "static cache": {"paligemma2": "transformers passes its model masks that it does not take"},
    "beam search": same(MIXED, "glm46v", "glm4v", "glm4v_moe", "glm_ocr"),
    "no cache": same(TYPES, "ernie4_5_vl_moe"),
    "prompt lookup": {**same(STATE, "qwen3_5", "qwen3_5_moe"), **same(TYPES, "ernie4_5_vl_moe")},
    "chunked prefill": {
        "ovis2": "transformers fails on a chunk without pictures",
        **same(PREFIX, "paligemma", "paligemma2"),
    },
    "later turns": same(PREFIX, "paligemma", "paligemma2"),
    "embeddings": {
        **same(EMBEDS, "ernie4_5_vl_moe", "exaone4_5", "gemma3", "gemma4", "paligemma", "paligemma2"),
        **same(MROPE, "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "qwen2_5_vl", "qwen2_vl"),
        **same(MROPE, "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
    },
    "packed rows": {
        **same(MERGED, "gemma3", "gemma4"),
        **same(RECURRENT, "lfm2_vl", "qwen3_5", "qwen3_5_moe"),
    },
    "logits_to_keep": {"video_llama_3": "transformers ignores it"},
    "flash": {
        "got_ocr2": "transformers has eager attention only",
        **same(BLOCKS, "gemma3", "gemma4", "molmo2", "paligemma", "paligemma2"),
    },
}
REFUSED = {
    "packed rows": same(MERGED, "gemma4"),  # also in releases that get it right: its layers see different blocks
    "drops between layers": {
        **same(STATES, "lfm2_vl", "qwen3_5", "qwen3_5_moe"),
        **same(KEYS, "gemma3n", "gemma4"),
    },
    "flash": same(WINDOW, "aya_vision", "cohere2_vision", "exaone4_5", "gemma3n", "mistral3"),
    "drops in the tower": same(
        ROWS,
        *(
            "aria",
            "ernie4_5_vl_moe",
            "fast_vlm",
            "gemma3n",
            "gemma4",
            "got_ocr2",
            "idefics2",
            "lighton_ocr",
            "mistral3",
        ),
        *("molmo2", "perception_lm", "video_llama_3", "video_llava"),
    ),
}
COLUMNS = ("no cache", "static cache", "beam search", "prompt lookup", "chunked prefill", "later turns", "embeddings")
COLUMNS += ("packed rows", "flash", "drops between layers", "drops in the tower")


def every_family(fast=FEW, without=()):
    """Parametrize a test by `family`; those that are not `fast` are slow."""
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(name, marks=() if name in fast else pytest.mark.slow)
            for name in FAMILIES
            if name not in without
        ],
    )


def lacking(check, family, control):
    """Whether the family lacks what is checked; then `control`, which checks the unpatched model, must fail too."""
    known = family in UPSTREAM.get(check, {}) and not not_yet(check, family)
    if not known and not faults(check, family):
        return False
    with pytest.raises((AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError)):
        control()
    return True


def refused(check, family):
    """Whether the library raises an error instead."""
    return family in REFUSED.get(check, {})


def limits(check):
    """Why families lack a check, by family."""
    return {**UPSTREAM.get(check, {}), **REFUSED.get(check, {})}


def table():
    """The table of families as Markdown, with its notes."""
    notes = list(dict.fromkeys(limits(check)[name] for name in EVERY for check in COLUMNS if name in limits(check)))
    lines = [
        "| family | pictures | video | attention | " + " | ".join(COLUMNS) + " |",
        "|---|" + ":-:|" * (len(COLUMNS) + 3),
    ]
    for name in EVERY:
        cells = [str(notes.index(limits(check)[name]) + 1) if name in limits(check) else "✓" for check in COLUMNS]
        attention = "eager" if name in EAGER_ONLY else "eager, SDPA"
        shown = f"`{VARIANTS[name]}` ({name})" if name in VARIANTS else f"`{name}`"
        lines.append(f"| {shown} | ✓ | {'✓' if name in VIDEO else '–'} | {attention} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201
