"""Evaluations by the metric that fits, and what they are called."""

import json

import pytest
import torch
from classroom import build_vlm, make_scorer, rows
from datasets import Dataset
from typer.testing import CliRunner
from versions import TRAINING

from grip_hf.cli.app import app
from grip_hf.errors import ScorerError
from grip_hf.evaluation.answers import AGREEMENT
from grip_hf.evaluation.runner import evaluate
from grip_hf.families.table import find_parts
from grip_hf.frozen.data import DatasetExamples
from grip_hf.hub.resolve import check_scorer
from grip_hf.selectors import get_selector

pytestmark = TRAINING


def said_by(row, model, processor, length):
    inputs = processor(images=row["image"], text="<image>" + row["prompt"], return_tensors="pt")
    words = {"max_new_tokens": length, "suppress_tokens": [model.config.image_token_id]}
    ids = model.generate(**inputs, **words, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_scores_follow_the_metric_on_what_the_model_writes():
    """Every other question accepts a word of what the model writes, beside one that it does not."""
    model, processor = build_vlm()
    data = rows(6)
    texts = [said_by(row, model, processor, 4) for row in data]
    for i, row in enumerate(data):
        del row["answer"]
        row["answers"] = ["apple", texts[i].split()[0] if i % 2 else "banana"]
    found = evaluate(
        *build_vlm(), DatasetExamples(data), {"grid": get_selector("grid")}, [0.5, 4], batch_size=4, progress=False,
        metric="contains", max_new_tokens=4,
    )  # fmt: skip
    full = [one for one in found.samples() if one["selector"] == "unpruned"]
    assert [one["said"] for one in full] == texts and [one["row"] for one in full] == list(range(6))
    assert [one["score"] for one in full] == [0, 1] * 3 and found.metric == "contains" and found.unpruned == 0.5
    assert full[1]["answers"] == data[1]["answers"] and data[1]["prompt"] in full[1]["question"]
    assert {(row["selector"], row["budget"]) for row in found.rows} == {("unpruned", 1.0), ("grid", 0.5), ("grid", 4)}
    # A count and the ratio of it keep the same tokens.
    again = evaluate(
        *build_vlm(), DatasetExamples(data), {"grid": get_selector("grid")}, [0.25], progress=False, metric="contains",
        max_new_tokens=4,
    )  # fmt: skip
    counted = [one.said for one in found.marks if one.budget == 4]
    assert sorted(counted) == sorted(one.said for one in again.marks if one.budget == 0.25)


def test_any_accepted_answer_is_exact():
    """The second of three answers is what the model writes, token by token, and ends."""
    model, processor = build_vlm()
    row = {name: rows(1)[0][name] for name in ("image", "prompt")}
    said = said_by(row, model, processor, 3)
    last = processor.tokenizer(said, add_special_tokens=False).input_ids
    vlm_end = processor.tokenizer.eos_token_id
    row["answers"] = ["apple", said, "banana"]

    class Ends(torch.nn.Module):
        """Says the end after three words."""

        def forward(self, ids, scores):
            if ids[0, -len(last) :].tolist() == last:
                scores = torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([vlm_end]), 0.0)
            return scores

    plain = model.generate
    model.generate = lambda **inputs: plain(**inputs, logits_processor=[Ends()])
    grid = {"grid": get_selector("grid")}
    assert evaluate(model, processor, DatasetExamples([row]), grid, [0.5], progress=False).unpruned == 1
    row["answers"] = ["apple", "banana"]
    assert evaluate(model, processor, DatasetExamples([row]), grid, [0.5], progress=False).unpruned == 0


def test_without_answers_it_is_agreement():
    data = [{name: row[name] for name in ("image", "prompt")} for row in rows(4)]
    grid = {"grid": get_selector("grid")}
    found = evaluate(*build_vlm(), DatasetExamples(data), grid, [0.5], progress=False)
    assert found.metric == AGREEMENT and found.unpruned == 1
    for row in data[:1]:
        row["answer"] = "yes"
    mixed = DatasetExamples([{"answer": None, **row} for row in data])
    found = evaluate(*build_vlm(), mixed, grid, [0.5], progress=False, metric="normalized")
    assert found.metric == f"normalized ({AGREEMENT} for 3 of 4 without answer)"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders of a model and of data sets with answers that it never gives, and without any."""
    folder = tmp_path_factory.mktemp("own")
    for part in build_vlm():
        part.save_pretrained(folder / "model")
    wrong = [{**row, "answer": "apple"} for row in rows(9)]
    Dataset.from_list(wrong).save_to_disk(folder / "wrong")
    Dataset.from_list([{name: row[name] for name in ("image", "prompt")} for row in wrong]).save_to_disk(
        folder / "none"
    )
    return folder


def run(*words):
    done = CliRunner().invoke(app, ["eval", *map(str, words)])
    return done, " ".join(done.output.replace("│", " ").split())


def test_the_command_says_what_it_measured(places, tmp_path):
    own = ("--model", places / "model", "--device", "cpu", "--selectors", "grid", "--budgets", "0.5,25%,4")
    files = ("--json", tmp_path / "table.json", "--log-samples", tmp_path / "samples.jsonl")
    done, said = run(*own, "--dataset", places / "wrong", *files)
    assert done.exit_code == 0, done.output
    assert "Warning: with all visual tokens the model scores 0.0 %" in said and "two-sided 95 % interval" in said
    assert "answers: 'answer'; not used: 'kind'" in said and "4 tokens" in said
    assert max(map(len, done.output.split("exact; all visual")[1].splitlines()[1:-3])) <= 80
    meta = json.loads((tmp_path / "table.json").read_text())["meta"]
    assert meta["metric"] == "exact" and meta["dataset"] == str(places / "wrong") and meta["budgets"] == [0.5, 0.25, 4]
    assert {"python", "grip-hf", "torch", "transformers"} == set(meta["versions"])
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 9 * (1 + 3) and {"question", "answers", "said", "score", "row"} <= set(lines[0])
    done, said = run(*own, "--dataset", places / "none", *files)
    assert (
        done.exit_code == 0 and "agreement with the full model; all visual tokens, in %: all 100.0, mean 100.0" in said
    )
    assert "Warning" not in said and "right answers" not in said
    assert json.loads((tmp_path / "table.json").read_text())["meta"]["metric"] == AGREEMENT


def test_dashes_underscores_and_old_names(places, tmp_path):
    for words in (("--batch_size", "3", "--max_new_tokens=2"), ("--batch", "3", "--rows", "9")):
        own = ("--model", places / "model", "--dataset", places / "wrong", "--selectors", "grid", "--budgets", "0.5")
        done, _ = run(*own, *words, "--device", "cpu", "--json", tmp_path / "a.json")
        assert done.exit_code == 0, done.output


def test_the_scorer_that_came_with_the_model_is_judged(places, tmp_path):
    import shutil

    from grip_hf import apply_grip

    model, processor = build_vlm()
    apply_grip(model, scorer=make_scorer(), keep_ratio=0.5).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    words = ("--dataset", places / "none", "--device", "cpu", "--budgets", "0.5", "--json", tmp_path / "a.json")
    done, _ = run("--model", tmp_path / "model", *words)
    assert done.exit_code == 0, done.output
    meta = json.loads((tmp_path / "a.json").read_text())["meta"]
    assert meta["selectors"][0] == "grip" and meta["scorers"] == ["grip"] and "cls_attention" in meta["selectors"]
    shutil.rmtree(tmp_path / "model" / "grip")
    done, said = run("--model", tmp_path / "model", *words, "--selectors", "grip")
    assert done.exit_code == 2 and "got 'grip'" in said


def test_the_scorer_of_another_model_is_refused_or_forced():
    model, _ = build_vlm()
    model.config._name_or_path = "someone/llava-b"
    scorer = make_scorer()
    scorer.config.base_model = {"id": "someone/llava-a", "model_type": "llava", "text_model_type": "llama"}
    from grip_hf import apply_grip, remove_grip

    with pytest.raises(ScorerError, match=r"trained for 'someone/llava-a', and this model is 'someone/llava-b'"):
        apply_grip(model, scorer=scorer, keep_ratio=0.5)
    assert not hasattr(model, "grip")
    with pytest.warns(UserWarning, match="taken since force was given"):
        apply_grip(model, scorer=scorer, keep_ratio=0.5, force=True)
    remove_grip(model)
    with pytest.raises(ScorerError):
        check_scorer(find_parts(model), scorer)
    scorer.config.base_model["id"] = "someone/llava-b"
    apply_grip(model, scorer=scorer, keep_ratio=0.5)


def test_a_foreign_scorer_is_not_evaluated_in_silence(places, tmp_path, monkeypatch):
    """The model's id is set where it is loaded: the Hub is out of reach."""
    scorer = make_scorer()
    scorer.config.base_model = {"id": "someone/llava-a", "model_type": "llava", "text_model_type": "llama"}
    scorer.save_pretrained(tmp_path / "scorer")
    monkeypatch.setattr("grip_hf.hub.resolve.came_from", lambda model: "someone/llava-b")
    own = ("--model", places / "model", "--dataset", places / "none", "--device", "cpu", "--budgets", "0.5")
    done, said = run(*own, "--selectors", f"mine={tmp_path / 'scorer'}")
    assert done.exit_code == 2 and "trained for 'someone/llava-a'" in said
    with pytest.warns(UserWarning, match="force was given"):
        done, said = run(*own, "--selectors", f"mine={tmp_path / 'scorer'}", "--force")
    assert done.exit_code == 0, done.output


def test_what_was_trained_in_four_bits_is_judged_in_four_bits(tmp_path, monkeypatch):
    """The options reach the loader; the model that is asked has quantized layers."""
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    import grip_hf.evaluation.runner as runner

    for part in build_vlm(width=64):
        part.save_pretrained(tmp_path / "model")
    Dataset.from_list(rows(4)).save_to_disk(tmp_path / "data")
    seen = []
    plain = runner.FrozenVLM
    monkeypatch.setattr(
        runner, "FrozenVLM", lambda model, *args, **kwargs: (seen.append(model), plain(model, *args, **kwargs))[1]
    )
    words = ("--model", tmp_path / "model", "--dataset", tmp_path / "data", "--device", "cpu", "--selectors", "grid")
    done, said = run(*words, "--budgets", "0.5", "--quantize", "4bit")
    assert done.exit_code == 0, done.output
    assert any(isinstance(module, Linear4bit) for module in seen[0].modules())
    done, said = run(*words, "--quantize", "3bit")
    assert done.exit_code == 2 and "must be 4bit or 8bit, got '3bit'" in said
