"""The pocket LLaVA with the scorer that comes with it, inside a vLLM engine: equality, caches, chunks, budgets."""

import pytest
from first_testbed import WEIGHTS, load_pocket_llava, make_scene
from vllm_engines import Ask, ask, engine, outputs, reference

pytestmark = pytest.mark.vllm
TOTAL, TOKENS = 144, 4


@pytest.fixture(scope="module")
def scenes():
    return [make_scene(seed) for seed in range(6000, 6006)]


@pytest.fixture(scope="module")
def asks(scenes):
    return [Ask(scene.image, f"<image>{question.text}") for scene in scenes for question in scene.questions]


@pytest.fixture(scope="module")
def pocket():
    return load_pocket_llava()


@pytest.fixture(scope="module")
def want(pocket, asks):
    """The answers of the patched transformers model; the checkpoint carries its settings and its scorer."""
    return reference(*pocket, asks, tokens=TOKENS)


@pytest.fixture
def llm(request):
    """An engine with the options of the test's parameter, whose GRIP part it finds by itself."""
    options = {"max_model_len": 512, **getattr(request, "param", {})}
    with engine(WEIGHTS, options.pop("grip", None), **options) as llm:
        yield llm


def with_options(**options):
    return pytest.mark.parametrize("llm", [options], indirect=True)


def encodings(llm):
    """Counts the pictures that pass the tower from now on."""
    tower = model_of(llm).vision_tower
    seen = []
    tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def model_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.get_model()


def test_answers_are_those_of_transformers_and_the_prompt_holds_what_is_kept(llm, asks, want, pocket):
    found = outputs(llm, asks, TOKENS)
    assert [list(one.outputs[0].token_ids) for one in found] == want
    processor = pocket[1]
    for one, answer in zip(asks, found, strict=True):
        text = processor(images=one.pictures, text=one.prompt)["input_ids"][0]
        assert len(answer.prompt_token_ids) == len(text) - TOTAL + 16


@with_options(max_num_batched_tokens=192, max_num_seqs=3, long_prefill_token_threshold=7, enable_chunked_prefill=True)
def test_chunked_prefill_cuts_through_pictures(llm, asks, want):
    assert ask(llm, asks, TOKENS) == want


@with_options(enable_prefix_caching=True, block_size=32, grip={"keep_ratio": 0.5})
def test_two_questions_about_one_picture_share_no_keep_set(llm, asks, pocket):
    """Back to back and in turns, with the prefix cache on, and then again from its entries."""
    want = reference(*pocket, asks[:3], tokens=TOKENS, keep_ratio=0.5)
    order = [0, 1, 0, 1, 2, 0, 2, 1]
    cached = []
    for number in order:
        (found,) = outputs(llm, [asks[number]], TOKENS)
        assert list(found.outputs[0].token_ids) == want[number], number
        cached.append(found.num_cached_tokens)
    # The first time that a question comes, nothing of its picture is in the cache.
    assert cached == [0, 0, 64, 64, 0, 64, 64, 64]
    assert ask(llm, [asks[number] for number in order], TOKENS) == [want[number] for number in order]


@with_options(enable_prefix_caching=True, block_size=32, grip={"selector": "grid", "keep_ratio": 0.5})
def test_a_selector_that_reads_no_question_shares_one_keep_set_among_all(llm, asks, pocket):
    want = reference(*pocket, asks[:3], tokens=TOKENS, selector="grid", keep_ratio=0.5)
    found = [outputs(llm, [one], TOKENS)[0] for one in asks[:3]]
    assert [list(one.outputs[0].token_ids) for one in found] == want
    assert [one.num_cached_tokens for one in found] == [0, 64, 64]


def test_two_budgets_of_one_picture_share_no_keep_set(llm, pocket, asks):
    budgets = [None, {"keep_ratio": 0.5}, {"num_tokens": 3}, {"keep_ratio": 1.0}, {"num_tokens": 40}, None]
    mixed = [Ask(one.pictures, one.prompt, budget) for one in asks[:5] for budget in budgets]
    want = reference(*pocket, mixed, tokens=TOKENS, keep_ratio=0.11)
    assert [answer for one in mixed for answer in ask(llm, [one], TOKENS)] == want
    assert ask(llm, mixed, TOKENS) == want
    lengths = [len(one.prompt_token_ids) for one in outputs(llm, mixed[: len(budgets)], TOKENS)]
    assert [length - lengths[0] for length in lengths] == [0, 72 - 16, 3 - 16, 144 - 16, 40 - 16, 0]


def test_a_picture_is_encoded_once_for_all_questions_and_budgets(llm, asks, scenes):
    seen = encodings(llm)
    mine = [one for one in asks if one.pictures is scenes[0].image]
    ask(llm, [*mine, *(Ask(one.pictures, one.prompt, {"num_tokens": 9}) for one in mine)], TOKENS)
    assert len(mine) > 2 and sum(seen) == 1
    ask(llm, [one for one in asks if one.pictures is scenes[1].image], TOKENS)
    assert sum(seen) == 2


def test_memory_is_profiled_for_what_is_encoded_and_held_for_what_is_kept(llm, asks):
    """Profiling and the encoder's budget see 144 tokens a picture, the encoder cache holds 16."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    budget = runner.mm_budget
    assert budget.mm_max_toks_per_item == {"image": TOTAL}
    seen = encodings(llm)
    runner.profile_run()
    assert sum(seen) == budget.mm_max_items_per_batch["image"] == 768 // TOTAL
    ask(llm, asks[:1], TOKENS)
    (held,) = runner.encoder_cache.values()
    assert len(held) == 16
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    cache = scheduler.encoder_cache_manager
    assert cache.cache_size - cache.num_freeable_slots in (0, 16)


@with_options(max_num_batched_tokens=512)
def test_no_more_pictures_are_encoded_at_once_than_were_profiled(llm, scenes):
    """So many kept tokens fit in one step that the unpruned ones of their pictures would not."""
    model_of(llm).grip.encoded.clear()
    seen = encodings(llm)
    ask(llm, [Ask(scene.image, "<image>is there any cat") for scene in scenes], TOKENS)
    assert sum(seen) == len(scenes) and max(seen) <= 512 // TOTAL


def test_preempted_requests_are_answered_the_same(asks, want, monkeypatch):
    """The KV cache holds so few blocks that requests must give way to each other."""
    few = {"num_gpu_blocks_override": 6, "block_size": 32, "max_model_len": 96, "max_num_seqs": 8}
    with engine(WEIGHTS, **few) as llm:
        scheduler, preempted = llm.llm_engine.engine_core.engine_core.scheduler, []
        give_way = scheduler._preempt_request
        monkeypatch.setattr(
            scheduler, "_preempt_request", lambda *args, **kw: (preempted.append(1), give_way(*args, **kw))
        )
        answers = ask(llm, asks[:12], TOKENS + 36)
    assert preempted
    assert [one[:TOKENS] for one in answers] == want[:12]


def test_several_answers_to_one_prompt(llm, asks, want):
    (found,) = outputs(llm, asks[:1], TOKENS, n=3, temperature=0.7, seed=1)
    assert len(found.outputs) == 3
    (found,) = outputs(llm, asks[:1], TOKENS, n=3, temperature=1e-4, seed=1)
    assert [list(one.token_ids) for one in found.outputs] == [want[0]] * 3


def test_several_pictures_have_a_budget_each(pocket, scenes):
    pair = [
        Ask([scenes[0].image, scenes[1].image], "<image><image>is there any cat"),
        Ask(scenes[2].image, "<image>is"),
    ]
    settings = {"keep_ratio": 0.2, "scope": "image"}
    want = reference(*pocket, pair, tokens=TOKENS, **settings)
    with engine(WEIGHTS, settings, max_model_len=512) as llm:
        assert ask(llm, pair, TOKENS) == want


def test_text_alone_is_served_as_ever():
    answers = []
    for settings in ({}, {"hf_overrides": {"grip": False}}):
        with engine(WEIGHTS, max_model_len=512, **settings) as llm:
            assert (model_of(llm).grip is None) == bool(settings)
            answers.append(llm.generate(["is there any cat"], use_tqdm=False)[0].outputs[0].token_ids)
    assert answers[0] == answers[1]


REFUSED = [
    ({"keep_ratio": 2}, {}, "keep_ratio must be a number in"),
    ({"keep_ratio": 0.5, "num_tokens": 3}, {}, "exactly one of keep_ratio and num_tokens"),
    ({"keep_ratio": 0.5, "nonsense": 1}, {}, "unknown settings"),
    ({"keep_ratio": 0.5, "selector": "fastv"}, {}, "'fastv' is not served by vLLM"),
    ({"keep_ratio": 0.5, "position_ids": "compact"}, {}, "position_ids='compact' is not served"),
    ({"scorer": "/nowhere/at/all"}, {}, "no folder '/nowhere/at/all'"),
    ([1], {}, "must be an object"),
    ({"keep_ratio": 0.5}, {"mm_processor_kwargs": {"grip": {"keep_ratio": 0.2}}}, "belong in --hf-overrides"),
    ({"keep_ratio": 0.5}, {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, "pipeline parallelism"),
    ({"keep_ratio": 0.5}, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative"),
]


@pytest.mark.parametrize(("settings", "options", "message"), REFUSED, ids=[message[:30] for *_, message in REFUSED])
def test_what_cannot_be_served_is_refused_at_the_start(settings, options, message):
    with pytest.raises(Exception, match=message), engine(WEIGHTS, settings, max_model_len=512, **options):
        pass


def test_registering_keeps_the_hooks_of_vllm_and_can_be_done_twice():
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, Gemma4Config

    from grip_hf.serving.vllm.plugin import register

    register()
    first = dict(MODELS_CONFIG_MAP)
    register()
    assert dict(MODELS_CONFIG_MAP) == first
    assert first["Gemma4ForConditionalGeneration"].stock is Gemma4Config


def test_a_scorer_of_another_model_is_refused_at_the_start(tmp_path):
    from vllm_engines import write_scorer

    scorer = write_scorer(tmp_path, 64)
    with (
        pytest.raises(Exception, match=r"hidden_size 64, but the language model of LlavaForCond.* has 192"),
        engine(WEIGHTS, {"scorer": scorer, "keep_ratio": 0.5}),
    ):
        pass


def test_another_version_of_vllm_is_refused_only_if_it_is_to_prune(monkeypatch):
    from grip_hf.serving.vllm import startup

    monkeypatch.setattr(startup, "BEFORE", "0.32.0")
    with pytest.raises(Exception, match=r"tested with vllm >= 0.32.0, < 0.32.0; this is vllm 0.32"):
        engine(WEIGHTS, {"keep_ratio": 0.5}, max_model_len=512).__enter__()
    with engine(WEIGHTS, max_model_len=512) as llm:
        assert model_of(llm).grip is None


BAD = [
    ({"keep_ratio": 0}, "keep_ratio must be a number in"),
    ({"num_tokens": 1.5}, "num_tokens must be an integer"),
    ({"selector": "grid"}, "a request may set grip to one of"),
    ({}, "a request may set grip to one of"),
    (0.5, "a request may set grip to one of"),
]


def test_bad_requests_are_refused_and_the_engine_lives_on(llm, asks, want, scenes):
    for budget, message in BAD:
        with pytest.raises(ValueError, match=message):
            ask(llm, [Ask(asks[0].pictures, asks[0].prompt, budget)])
    with pytest.raises(ValueError, match="2 pictures cannot share one budget"):
        ask(llm, [Ask([scenes[0].image, scenes[1].image], "<image><image>is")])
    with pytest.raises(ValueError, match="does not take video input"):
        llm.generate({"prompt": "<image>", "multi_modal_data": {"video": [scenes[0].image]}}, use_tqdm=False)
    assert ask(llm, asks[:3], TOKENS) == want[:3]


def test_prompts_beyond_the_positions_that_the_model_knows_are_refused(scenes):
    """Eight pictures keep 128 tokens, but their prompt's positions would be beyond 1024."""
    limits = {"limit_mm_per_prompt": {"image": 9}, "max_model_len": 512, "max_num_batched_tokens": 2048}
    with engine(WEIGHTS, {"keep_ratio": 0.11, "scope": "image"}, **limits) as llm:
        for pictures in (7, 8):
            one = Ask([scenes[0].image] * pictures, "<image>" * pictures + "is there any cat")
            if pictures == 7:
                assert len(ask(llm, [one], TOKENS)[0]) == TOKENS
            else:
                with pytest.raises(ValueError, match=r"1157 tokens long before its pictures are pruned.* knows 1024"):
                    ask(llm, [one], TOKENS)
