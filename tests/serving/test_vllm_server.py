"""A real `vllm serve` on loopback and the real `openai` client: what users of the plug-in have."""

import asyncio
import json
import random

import pytest
from first_testbed import WEIGHTS, load_pocket_llava, make_scene
from vllm_engines import Ask, reference
from vllm_server import message, refused, serve

from grip_hf import GripConfig

pytestmark = pytest.mark.vllm
TOKENS = 4
BUDGETS = [None, {"keep_ratio": 0.5}, {"keep_ratio": 0.25}, {"num_tokens": 7}, {"keep_ratio": 1.0}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The checkpoint carries its GRIP part, so the command names none."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serve(WEIGHTS, log, "--trust-request-mm-kwargs") as server:
        yield server


@pytest.fixture(scope="module")
def requests():
    """64 requests: eight pictures, all their kinds of questions, all budgets, in no order."""
    scenes = [make_scene(seed) for seed in range(7000, 7008)]
    pairs = [(scene, question) for scene in scenes for question in scene.questions]
    chosen = random.Random(0).choices(pairs, k=64)
    return [
        Ask(scene.image, question.text, BUDGETS[number % len(BUDGETS)])
        for number, (scene, question) in enumerate(chosen)
    ]


@pytest.fixture(scope="module")
def want(requests):
    """The answers of the patched transformers model."""
    model, processor = load_pocket_llava()
    asks = [Ask(one.pictures, f"<image>{one.prompt}", one.budget) for one in requests]
    ids = reference(model, processor, asks, tokens=TOKENS, keep_ratio=0.11)
    ends = processor.tokenizer.eos_token_id
    return [processor.decode(one[: one.index(ends)] if ends in one else one).strip() for one in ids]


def arguments(server, one, body=None, **more):
    """A request; the pocket's chat template leaves it to the tokenizer to begin a prompt, which vLLM must be told."""
    extra = {"add_special_tokens": True, **(body or {})}
    if one.budget is not None:
        extra["mm_processor_kwargs"] = {"grip": one.budget}
    messages = [message(one.pictures, one.prompt)]
    usual = {"model": server.model, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    return {**usual, "extra_body": extra, **more}


def test_64_requests_at_once_are_answered_as_one_by_one(server, requests, want):
    client = server.client()
    alone = [client.chat.completions.create(**arguments(server, one)) for one in requests]
    texts = [one.choices[0].message.content.strip() for one in alone]
    assert texts == want and len(set(texts)) > 8

    async def together():
        async with server.client("AsyncOpenAI") as client:
            return await asyncio.gather(
                *(client.chat.completions.create(**arguments(server, one)) for one in requests)
            )

    found = asyncio.run(together())
    assert [one.choices[0].message.content.strip() for one in found] == want
    for one, answer in zip(requests, alone, strict=True):
        visual = GripConfig(**(one.budget or {"keep_ratio": 0.11})).num_kept(144)
        assert answer.usage.prompt_tokens == visual + len(one.prompt.split()) + 1


def test_streams_give_the_same_answers_and_may_be_broken_off(server, requests, want):
    client = server.client()
    for one, text in list(zip(requests, want, strict=True))[:8]:
        parts = client.chat.completions.create(**arguments(server, one, stream=True))
        assert "".join(part.choices[0].delta.content or "" for part in parts).strip() == text
    for one in requests[:8]:
        long = arguments(server, one, {"ignore_eos": True}, stream=True, max_tokens=200)
        stream = client.chat.completions.create(**long)
        next(iter(stream))
        stream.close()
    answer = client.chat.completions.create(**arguments(server, requests[0]))
    assert answer.choices[0].message.content.strip() == want[0]
    assert server.metrics()["vllm:num_requests_running"] == 0


BAD = [
    ({"keep_ratio": 0}, "keep_ratio must be a number in (0, 1], got 0"),
    ({"keep_ratio": "much"}, "keep_ratio must be a number in (0, 1], got 'much'"),
    ({"num_tokens": 0}, "num_tokens must be an integer >= 1, got 0"),
    ({"keep_ratio": 0.5, "num_tokens": 3}, "exactly one of keep_ratio and num_tokens"),
    ({"scope": "image"}, "a request may set grip to one of ['keep_ratio', 'num_tokens']"),
]


def test_bad_requests_get_a_400_that_names_the_reason_and_the_server_lives_on(server, requests, want):
    import openai

    client = server.client()
    for budget, reason in BAD:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(**arguments(server, Ask(requests[0].pictures, "is there any cat", budget)))
        assert caught.value.status_code == 400 and reason in caught.value.message
    two = arguments(server, requests[0])
    two["messages"] = [{"role": "user", "content": 2 * two["messages"][0]["content"]}]
    with pytest.raises(openai.BadRequestError, match="2 pictures cannot share one budget"):
        client.chat.completions.create(**two)
    video = arguments(server, requests[0])
    video["messages"][0]["content"][0] = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError, match="video"):
        client.chat.completions.create(**video)
    answer = client.chat.completions.create(**arguments(server, requests[0]))
    assert answer.choices[0].message.content.strip() == want[0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"keep_ratio": 3}, "keep_ratio must be a number in (0, 1], got 3"),
        ({"selector": "fastv", "keep_ratio": 0.5}, "selector 'fastv' is not served by vLLM"),
    ],
)
def test_a_server_that_cannot_do_what_it_is_asked_to_does_not_start(settings, reason, tmp_path):
    assert reason in refused(WEIGHTS, tmp_path / "log.txt", "--hf-overrides", json.dumps({"grip": settings}))


def test_compiled_and_with_other_settings_the_answers_are_those_of_transformers(requests, tmp_path):
    """The settings of the command line win over those of the checkpoint; without --enforce-eager."""
    model, processor = load_pocket_llava()
    asks = [Ask(one.pictures, f"<image>{one.prompt}") for one in requests[:16]]
    ids = reference(model, processor, asks, tokens=TOKENS, keep_ratio=0.25, selector="similarity")
    settings = json.dumps({"grip": {"selector": "similarity", "keep_ratio": 0.25}})
    options = ["--hf-overrides", settings, "--no-enforce-eager"]
    with serve(WEIGHTS, tmp_path / "log.txt", *options, seconds=400) as server:
        client = server.client()
        for one, want in zip(requests, ids, strict=False):
            plain = arguments(server, Ask(one.pictures, one.prompt), {"return_token_ids": True})
            found = client.chat.completions.create(**plain).choices[0].token_ids
            assert found == want[: len(found)]
