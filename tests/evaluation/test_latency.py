"""The bench: its clockwork and its arithmetic, on tiny shapes."""

import dataclasses
import json
import time

import pytest
import torch
import typer
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner
from versions import TRAINING

from grip_hf import apply_grip
from grip_hf.cli.bench import WIDE, bench
from grip_hf.errors import ConfigError
from grip_hf.evaluation import latency
from grip_hf.evaluation.flops import prefill_flops
from grip_hf.evaluation.latency import run_bench
from grip_hf.evaluation.memory import peak_memory
from grip_hf.evaluation.paired import Bench, Timing, Variant
from grip_hf.evaluation.shapes import SHAPES, build_inputs, build_shape, get_shape
from grip_hf.evaluation.stopwatch import SPANS, watched
from grip_hf.families.table import find_parts
from grip_hf.pocket.model import build_model as build_pocket
from grip_hf.pocket.testbeds import TESTBEDS
from grip_hf.selectors import get_selector

SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64}
SMALL_TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 4}


def shrunk(name):
    """The shape `name` with a tiny language model and tower, and as many tokens as ever."""
    shape = SHAPES[name]
    text = {**shape.text, **SMALL_TEXT}
    vision = {**shape.vision, "hidden_size": 32, "intermediate_size": 32}
    if shape.family == "qwen2_5_vl":
        text["rope_parameters"] = {**shape.text["rope_parameters"], "mrope_section": [2, 3, 3]}
        vision |= {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [0]}
    else:
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    return dataclasses.replace(shape, text=text, vision=vision)


def tiny_bench(selectors=("grip",), name="tiny", batch=1):
    model = build_shape(get_shape(name), "cpu", torch.float32)
    return Bench(model, build_inputs(get_shape(name), model, batch), selectors, decode_tokens=3)


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next", "qwen2.5-vl-7b"])
def test_every_shape_runs_pruned_and_unpruned(name):
    shape = shrunk(name)
    model = build_shape(shape, "cpu", torch.float32)
    one = Bench(model, build_inputs(shape, model), ("grid",), decode_tokens=1)
    layers = model.config.get_text_config().num_hidden_layers
    text = one.inputs["input_ids"].shape[1] - shape.tokens
    for variant, kept in ((Variant(), shape.tokens), (Variant(None, 64), 64), (Variant("grid", 64), 64)):
        assert one.run(variant).cache_bytes == 2 * layers * (text + kept) * 64 * 4


def test_real_shapes_have_the_sizes_of_the_real_models():
    counts = {"llava-1.5-7b": 7.06, "llava-next": 7.06, "qwen2.5-vl-7b": 8.29}
    for name, billions in counts.items():
        model = build_shape(get_shape(name), "meta", torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_floor_is_the_language_model_alone_on_what_was_kept():
    one = tiny_bench(("grid",), batch=2)
    pruned, floor = one.run(Variant("grid", 4)), one.run(Variant(None, 4))
    inputs = one.kept[4]
    assert inputs["inputs_embeds"].shape[1] == one.inputs["input_ids"].shape[1] - 12
    assert pruned.cache_bytes == floor.cache_bytes
    with torch.no_grad():
        one.model(**one.inputs)
        token, _ = one._floor(4)
        apply_grip(one.model, selector="grid", num_tokens=4)
        assert torch.equal(token, one._call()[0])


@pytest.mark.parametrize("testbed", TESTBEDS.values(), ids=list(TESTBEDS))
def test_the_pocket_shapes_are_those_of_the_pocket_models(testbed):
    shape = get_shape(testbed.name)
    model, pocket = build_shape(shape, "meta", torch.float32), build_pocket(testbed=testbed)
    assert shape.tokens == testbed.tokens
    assert {n: p.shape for n, p in model.model.named_parameters()} == {
        n: p.shape for n, p in pocket.model.named_parameters()
    }


@TRAINING
def test_downsampling_gives_the_tower_smaller_pictures():
    one = tiny_bench(("downsampling",))
    seen = []
    one.model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple((args or tuple(kwargs.values()))[0].shape)), with_kwargs=True
    )
    sample = one.run(Variant("downsampling", 5))
    assert seen == [(1, 3, 28, 28)] and sample.layer_tokens == (44, 44)
    assert sample.ms["vision"] > 0 and sample.ms["selector"] == 0


def test_the_parts_of_a_call_add_up():
    one = tiny_bench(("grip", "cls_attention"))
    for variant in (Variant(), Variant("grip", 4), Variant("cls_attention", 4)):
        ms = one.run(variant).ms
        parts = sum(ms[name] for name in SPANS if name != "total") + ms["selector"]
        assert parts == pytest.approx(ms["total"], rel=1e-6)
        assert (ms["selector"] > 0) == (variant.selector is not None)


def test_the_stopwatch_sees_what_is_slow():
    one = tiny_bench()
    slow = one.selectors["grip"]

    class Slow(type(slow)):
        def __call__(self, batch):
            time.sleep(0.05)
            return super().__call__(batch)

    one.selectors["grip"] = Slow(slow.scorer)
    sample = one.run(Variant("grip", 4))
    assert sample.ms["selector"] > 50
    assert sample.ms["prune"] + sample.ms["selector"] < sample.ms["total"]
    tower = one.model.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda module, args: time.sleep(0.05))
    assert one.run(Variant()).ms["vision"] > 50
    handle.remove()
    language_model = find_parts(one.model).language_model
    handle = language_model.layers[0].register_forward_pre_hook(lambda module, args: time.sleep(0.05))
    sample = one.run(Variant(None, 4))
    assert sample.ms["prefill"] > 50 and sample.ms["decode"] > 50
    handle.remove()
    handle = language_model.register_forward_pre_hook(lambda module, args: time.sleep(0.01))
    assert one.run(Variant()).hook_us > 10_000
    handle.remove()


def test_the_model_is_left_as_it_was():
    one = tiny_bench()
    with torch.no_grad():
        one.model(**one.inputs)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in one.model.modules())

    before = hooks()
    one.run(Variant("grip", 4))
    assert hooks() == before and not hasattr(one.model, "grip")
    with pytest.raises(ZeroDivisionError), watched(one.model, one.watch):
        _ = 1 / 0
    assert hooks() == before


def test_flops_equal_a_sum_over_layers_and_positions():
    text = SHAPES["small"].text
    model = build_shape(get_shape("small"), "meta", torch.float32)
    hidden, tokens, flops = text["hidden_size"], 33, 0
    for _ in range(text["num_hidden_layers"]):
        for position in range(tokens):
            flops += 2 * (4 * hidden * hidden + 3 * hidden * text["intermediate_size"])
            flops += 2 * 2 * hidden * (position + 1)
    assert prefill_flops(find_parts(model).language_model, [tokens] * 12) == pytest.approx(flops, rel=1e-12)


def test_flops_equal_those_that_torch_counts():
    """In eager attention, which computes the whole map: the upper half and the output head are not ours."""
    model = build_shape(get_shape("pocket"), "cpu", torch.float32, "eager")
    language_model, count = find_parts(model).language_model, 33
    config = language_model.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        language_model(inputs_embeds=torch.zeros(1, count, config.hidden_size), use_cache=False)
    upper = 2 * config.hidden_size * count * (count - 1) * config.num_hidden_layers
    mine = prefill_flops(language_model, [count] * config.num_hidden_layers)
    assert mine + upper == pytest.approx(counter.get_total_flops(), rel=1e-3)  # its rotary embedding multiplies too


def test_flops_follow_tokens_dropped_inside_the_model():
    """FastV: the tokens of the first layer are all there, those of the second are the kept ones."""
    one = tiny_bench(("fastv",))
    one.selectors["fastv"] = get_selector("fastv", layers=1)
    whole, dropped = one.run(Variant()).layer_tokens, one.run(Variant("fastv", 4)).layer_tokens
    assert whole == (56, 56) and dropped == (56, 44)
    language_model = find_parts(one.model).language_model
    halves = [prefill_flops(language_model, (n, n)) / 2 for n in (56, 44)]
    assert prefill_flops(language_model, dropped) == pytest.approx(sum(halves))


@TRAINING
def test_rows_tell_where_tokens_are_dropped_and_how_many_are_computed():
    """Where another model has FastV's 2 of 4 layers, a model of 2 has 1 of 2."""
    found = run_bench("tiny", ["fastv", "grid", "pooled"], [4], rounds=1, decode_tokens=1, depth_of=4)
    rows = {row["selector"]: row for row in found["rows"]}
    assert rows["fastv"]["drops"] == [1] and all(row["layers"] == 2 for row in rows.values())
    assert rows["grid"]["drops"] is None and rows["pooled"]["drops"] is None
    text = found["setting"]["text_tokens"]
    whole = text + found["setting"]["visual_tokens"]
    assert rows["grid"]["token_layers"] == pytest.approx((text + 4) / whole) == rows["pooled"]["token_layers"]
    assert rows["fastv"]["token_layers"] == pytest.approx((whole + text + 4) / (2 * whole))
    assert rows["pooled"]["kept"] == 4
    with pytest.raises(ConfigError, match="depth_of must be an integer >= 1, got 0"):
        run_bench("tiny", ["fastv"], [4], depth_of=0)


def test_peak_memory_sees_an_allocation():
    with peak_memory(torch.device("cpu")) as peak:
        before = peak()
        torch.ones(64 * 2**20, dtype=torch.uint8)
        after = peak()
    if before is None:
        assert after is None
    else:
        assert 60 * 2**20 < after - before < 200 * 2**20


def test_ratios_are_medians_over_rounds():
    def sample(total, hook):
        parts = dict.fromkeys(("vision", "prune", "prefill", "restore", "head", "selector", "decode"), 1.0)
        return Timing({**parts, "total": total}, hook, 8, None)

    mine, floor = Variant("grip", 4), Variant(None, 4)
    rounds = [
        {Variant(): sample(full, 2.0), floor: sample(5.0, 2.0), mine: sample(pruned, 12.0)}
        for full, pruned in ((100.0, 50.0), (10.0, 9.0), (20.0, 4.0))
    ]
    row = latency._row(rounds, mine)
    assert row["ttft_ms"] == 9.0 and row["ttft_ratio"] == 0.5 and row["selector_share"] == 0.05
    assert row["prefill_over_floor"] == 3.0 and row["ttft_over_floor"] == 9 / 7 and row["hook_us"] == 10.0
    assert row["decode_ratio"] == row["decode_over_floor"] == 1.0 and row["peak_bytes"] is None


def test_command(tmp_path):
    app = typer.Typer()
    app.command()(bench)
    file = tmp_path / "bench.json"
    options = ["--model", "tiny", "--selectors", "grip,grid", "--budgets", "0.25,0.5", "--rounds", "2"]
    result = CliRunner().invoke(app, [*options, "--decode-tokens", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    data = json.loads(file.read_text())
    assert [(row["selector"], row["num_tokens"]) for row in data["rows"]] == [
        ("grip", 4), ("grid", 4), ("grip", 8), ("grid", 8)
    ]  # fmt: skip
    keys = {column.key for column in WIDE}
    assert all(keys <= row.keys() for row in data["rows"]) and data["setting"]["visual_tokens"] == 16
    assert [row["kept"] for row in data["rows"]] == [4, 4, 8, 8]
    assert data["rows"][0]["flop_ratio"] < data["rows"][2]["flop_ratio"] < 1
    wrong = CliRunner().invoke(app, ["--budgets", "many"])
    assert wrong.exit_code == 2 and "keep ratios or numbers of tokens" in " ".join(
        wrong.output.replace("│", " ").split()
    )
    wrong = CliRunner().invoke(app, ["--model", "tiny", "--budgets", "1.5"])
    assert wrong.exit_code == 2 and "1.5" in wrong.output
    wrong = CliRunner().invoke(app, ["--model", "tiny", "--json", str(tmp_path / "nowhere" / "bench.json")])
    assert wrong.exit_code == 2 and "there is no folder" in " ".join(wrong.output.replace("│", " ").split())


def test_a_model_of_ones_own(tmp_path):
    """Its processor, its picture, its prompt; its own scorer is "grip", and others have names."""
    from classroom import TOKENS, build_vlm, make_scorer, picture

    from grip_hf.cli.app import app

    model, processor = build_vlm()
    apply_grip(model, scorer=make_scorer(), keep_ratio=0.5).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    make_scorer(1).save_pretrained(tmp_path / "scorer")
    picture(0).save(tmp_path / "a.png")
    words = ["bench", "--model", tmp_path / "model", "--picture", tmp_path / "a.png", "--prompt", "is there any cat"]
    words += ["--selectors", f"grip,mine={tmp_path / 'scorer'},grid", "--budgets", "25%,8", "--batch-size", "2"]
    words += ["--rounds", "1", "--decode-tokens", "1", "--device", "cpu", "--json", tmp_path / "bench.json"]
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, done.output
    assert max(map(len, done.output.splitlines())) <= 80
    data = json.loads((tmp_path / "bench.json").read_text())
    setting, asked = data["setting"], processor.tokenizer("is there any cat", add_special_tokens=False).input_ids
    assert (setting["visual_tokens"], setting["batch"], setting["dtype"]) == (TOKENS, 2, "float32")
    assert len(asked) <= setting["text_tokens"] <= len(asked) + 4
    assert [(row["selector"], row["num_tokens"]) for row in data["rows"]] == [
        ("grip", 4), ("mine", 4), ("grid", 4), ("grip", 8), ("mine", 8), ("grid", 8)
    ]  # fmt: skip
    layers, heads = model.config.text_config.num_hidden_layers, model.config.text_config.hidden_size
    kept = setting["text_tokens"] + 4
    assert data["rows"][0]["cache_bytes"] == 2 * 2 * layers * kept * heads * 4
    one = Bench(build_vlm()[0], {}, ["grip"], 1)
    assert one.selectors["grip"].scorer.config.width == 256, "a scorer with random weights has the usual size"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "huge"}, "unknown model shape 'huge'; known ones are tiny, pocket, pocket2, small"),
        ({"selectors": ["nope"]}, "unknown selector 'nope'"),
        ({"budgets": [0]}, "keep_ratio must be a number in .0, 1., got 0"),
        ({"rounds": 0}, "rounds must be an integer >= 1, got 0"),
        ({"batch": True}, "batch must be an integer >= 1, got True"),
        ({"dtype": "float"}, None),
        ({"dtype": "tensor"}, "dtype must be the name of a floating-point torch dtype, got 'tensor'"),
        ({"dtype": "int8"}, "dtype must be the name of a floating-point torch dtype, got 'int8'"),
        ({"selectors": []}, "selectors must name at least one"),
        ({"device": "tpu"}, "device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"),
        ({"device": "meta"}, "device must be 'cpu', 'cuda' or 'cuda:N', got 'meta'"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available here"),
        ({"attention": "magic"}, "attention 'magic' cannot be used"),
        ({"attention": "flash_attention_3"}, "attention 'flash_attention_3' cannot be used"),
    ],
)
def test_bad_arguments(arguments, message):
    settings = {"model": "tiny", "rounds": 1, "decode_tokens": 1, "budgets": [4], **arguments}
    if message is None:
        assert run_bench(**settings)["setting"]["dtype"] == "float32"
        return
    with pytest.raises(ConfigError, match=message):
        run_bench(**settings)
