"""The recipe of `examples/serving/ladder.py` against a real server: the looks and answers of transformers' ladder."""

import importlib.util
from pathlib import Path

import pytest
import torch
from first_testbed import WEIGHTS, load_pocket_llava, make_scene
from vllm_server import message, serve

from grip_hf import apply_grip
from grip_hf.engine.generation import writing
from grip_hf.hub.resolve import describe_base
from grip_hf.quality.identity import identity
from grip_hf.quality.promise import Calibration, Promise

pytestmark = pytest.mark.vllm
TOKENS = 6


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log.txt"
    with serve(WEIGHTS, log, "--trust-request-mm-kwargs") as server:
        yield server


@pytest.fixture(scope="module")
def recipe():
    path = Path(__file__).parents[2] / "examples" / "serving" / "ladder.py"
    spec = importlib.util.spec_from_file_location("ladder", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rule", ["answer", "first"])
def test_a_client_looks_again_where_generate_does(server, recipe, rule):
    model, processor = load_pocket_llava()
    handle = apply_grip(model, keep_ratio=0.5).grip
    facts = {**identity(model, describe_base(model), handle.config, handle.scorer), "writing": writing(model, {})}
    one = Promise(0.9, 0.95, rule, (4, 0.11, 1.0), (0.99, 0.99), 100, 0.01, 0.95, 10.0, 0.1)
    apply_grip(model, quality=0.9, calibration=Calibration(facts, "answer", TOKENS, TOKENS, True, {}, (one,), (), {}))
    looks = []
    for seed in range(8100, 8106):
        scene = make_scene(seed)
        for question in scene.questions[:6]:
            content = [{"type": "image", "image": scene.image}, {"type": "text", "text": question.text}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            with torch.no_grad():
                ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
            want = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
            text, number, sure = recipe.ask(
                server.client(),
                server.model,
                [message(scene.image, question.text)],
                one,
                max_tokens=TOKENS,
                extra_body={"add_special_tokens": True},
            )
            assert sure == pytest.approx(model.grip.last.confidence[0], abs=1e-3)
            assert (text, number) == (want, model.grip.last.looks[0])
            looks.append(number)
    assert set(looks) == {1, 2, 3}
