"""Sharing scorers and pruned checkpoints: the real huggingface_hub client against a Hub on loopback."""

import io
import json
import os
import socket
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from loopback_hub import READER, Repo
from packaging.version import Version
from PIL import Image
from safetensors.torch import load
from tiny import HIDDEN, TEXT, TINY, AutoModelForImageTextToText, build, make_inputs, select_by_content
from transformers import LlavaForConditionalGeneration, Qwen2Config

from grip_hf import GripConfig, GripScorer, apply_grip, remove_grip
from grip_hf.errors import ConfigError, HubError, ScorerError
from grip_hf.hub.card import PICTURE
from grip_hf.scorer.model import GripScorerConfig

REPO = "user/grip-tiny"
FILES = {"README.md", "config.json", "grip_config.json", "model.safetensors"}
ROWS = [
    {"selector": "unpruned", "budget": 1.0, "task": "mean", "accuracy": 0.9},
    {"selector": "grip", "budget": 0.25, "task": "mean", "accuracy": 0.875},
    {"selector": "grip", "budget": 0.25, "task": "count", "accuracy": 0.75},
    {"selector": "random", "budget": 0.25, "task": "mean", "accuracy": 0.5},
]


@pytest.fixture
def model():
    return build("llava")


@pytest.fixture
def inputs():
    return make_inputs("llava", [[3, "image", 4]])


def tiny_scorer(hidden=HIDDEN):
    torch.manual_seed(1)
    return GripScorer(GripScorerConfig(hidden_size=hidden, width=16, attention_width=8, num_heads=2)).eval()


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def downloads(hub):
    return [path.rsplit("/", 1)[-1] for method, path in hub.requests if method == "GET" and "/resolve/" in path]


def test_push_and_apply(hub, model, inputs):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    pruned = logits_of(model, inputs)
    url = model.grip.push_to_hub(REPO, results=ROWS, training="`grip-hf train`", license="mit")
    files = hub.repos[REPO].files()
    assert set(files) == FILES and url == f"{hub.url}/{REPO}/commit/{hub.repos[REPO].branches['main']}"
    assert set(load(files["model.safetensors"])) == set(tiny_scorer().state_dict())
    again = apply_grip(build("llava"), scorer=REPO)
    assert torch.equal(logits_of(again, inputs), pruned) and again.grip.config == GripConfig(
        num_tokens=3, selector="grip"
    )

    card = ModelCard(files["README.md"].decode())
    assert {"grip", "visual-token-pruning", "trl"} <= set(card.data.tags) and card.data.license == "mit"
    values = {(r.dataset_config, r.metric_config): r.metric_value for r in card.data.eval_results}
    assert values == {("mean", "0.25"): 87.5, ("count", "0.25"): 75.0}
    for said in (
        f'apply_grip(model, scorer="{REPO}")',
        "| grip | 87.5 |",
        "| random | 50.0 |",
        "`grip-hf train`",
        "3 visual tokens",
    ):
        assert said in card.text


def test_the_card_is_what_the_hub_reads(hub, model, tmp_path):
    """Metadata by the Hub's own client and by a YAML reader; every figure of the table is there."""
    table, picture = tmp_path / "eval_table.json", tmp_path / "shot.png"
    table.write_text(json.dumps({"meta": {}, "rows": ROWS}))
    Image.new("RGB", (8, 8), (9, 90, 200)).save(picture)
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    command = "`grip-hf train --pocket`"
    model.grip.push_to_hub(REPO, results=table, picture=picture, training=command, dataset="Pocket scenes, held out")
    files = hub.repos[REPO].files()
    assert set(files) == {*FILES, PICTURE}
    assert Image.open(io.BytesIO(files[PICTURE])).getpixel((3, 3)) == (9, 90, 200)
    content = files["README.md"].decode()
    card = ModelCard(content)
    assert f"]({PICTURE})" in card.text and command in card.text and "## Limits" in card.text
    if Version(huggingface_hub.__version__) >= Version("2"):  # older clients ask a fixed address
        card.validate()  # the Hub's own check, here that the client can ask for it
        assert ("POST", "/api/validate-yaml") in hub.requests

    metadata = yaml.safe_load(content.split("---\n")[1])
    (entry,) = metadata["model-index"]
    assert entry["name"] == "grip-tiny"
    found = {}
    for result in entry["results"]:
        assert result["task"]["type"] == "visual-question-answering"
        assert result["dataset"]["type"] == "pocket-scenes-held-out"
        for metric in result["metrics"]:
            assert metric["type"] == "accuracy"
            found[result["dataset"]["config"], metric["name"]] = metric["value"]
    assert found == {
        ("mean", "accuracy (mean) keeping 25% of the visual tokens"): 87.5,
        ("count", "accuracy (count) keeping 25% of the visual tokens"): 75.0,
    }
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict() and again.text == card.text

    # A later upload without a picture keeps the one that is there.
    model.grip.push_to_hub(REPO)
    assert hub.repos[REPO].files()[PICTURE] == files[PICTURE]
    assert f"]({PICTURE})" in hub.repos[REPO].files()["README.md"].decode()


def test_updating_keeps_what_people_wrote(hub, model):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.grip.push_to_hub(REPO, results=ROWS, training="for a day")
    card = hub.repos[REPO].files()["README.md"].decode()
    card = card.replace("# grip-tiny", "# My scorer").replace("tags:\n", "language: de\ntags:\n- mine\n")
    card = card.replace("## Limits", "## Thanks\n\nTo all of you.\n\n## Limits")
    hub.repos[REPO].put({"README.md": card.encode(), "picture.png": b"png"})
    apply_grip(model, keep_ratio=0.5, selector="grid")
    model.grip.push_to_hub(REPO, results=[{**row, "accuracy": 0.625} for row in ROWS if row["task"] == "mean"])
    files = hub.repos[REPO].files()
    assert set(files) == {"README.md", "grip_config.json", "picture.png"}  # a selector without weights replaced it
    after = ModelCard(files["README.md"].decode())
    for said in (
        "# My scorer",
        "To all of you.",
        "for a day",
        "50% of the visual tokens",
        "`grid`",
        "| grip | 62.5 |",
    ):
        assert said in after.text
    assert "3 visual tokens" not in after.text and "87.5" not in after.text
    assert after.data.language == "de" and {"mine", "grip"} <= set(after.data.tags)
    values = {r.dataset_config: r.metric_value for r in after.data.eval_results}
    assert values == {"mean": 62.5, "count": 75.0}


def test_a_saved_folder_has_a_card_too(model, tmp_path):
    apply_grip(model, scorer=tiny_scorer(), keep_ratio=0.25)
    model.grip.save_pretrained(tmp_path)
    card = tmp_path / "README.md"
    assert "25% of the visual tokens" in card.read_text() and "`llava` model" in card.read_text()
    card.write_text(card.read_text() + "\nMy own words.\n")
    apply_grip(model, scorer=tmp_path, num_tokens=7)
    model.grip.save_pretrained(tmp_path)
    assert "7 visual tokens" in card.read_text() and card.read_text().endswith("\nMy own words.\n")


def test_bad_facts_and_selectors_are_refused_before_anything_is_written(hub, model, tmp_path):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    table = tmp_path / "table.json"
    table.write_text("{")
    for facts, said in (
        ({"results": table}, "table.json"),
        ({"results": []}, "rows"),
        ({"results": [{"selector": "grip"}]}, "accuracy"),
        ({"results": ROWS, "measured": "oracle"}, "oracle"),
        ({"colour": "red"}, "colour"),
        ({"picture": table}, "picture=.*table.json"),
        ({"picture": 3}, "picture=3"),
    ):
        for write in (model.grip.save_pretrained, model.grip.push_to_hub):
            with pytest.raises(ConfigError, match=said):
                write(tmp_path / "new" if write == model.grip.save_pretrained else REPO, **facts)
    apply_grip(model, num_tokens=3, selector=select_by_content)
    with pytest.raises(ConfigError, match="callable"):
        model.grip.push_to_hub(REPO)
    assert not (tmp_path / "new").exists() and not hub.repos and not hub.requests


def test_revisions(hub, model):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.grip.push_to_hub(REPO)
    first = hub.repos[REPO].branches["main"]
    apply_grip(model, scorer=tiny_scorer(), num_tokens=5)
    model.grip.push_to_hub(REPO, revision="wide")
    assert apply_grip(model, scorer=REPO).grip.config.num_tokens == 3
    assert apply_grip(model, scorer=REPO, revision="wide").grip.config.num_tokens == 5
    model.grip.push_to_hub(REPO)
    assert apply_grip(model, scorer=REPO).grip.config.num_tokens == 5
    assert apply_grip(model, scorer=REPO, revision=first).grip.config.num_tokens == 3
    with pytest.raises(HubError, match=r"'narrow'.*no such revision"):
        apply_grip(model, scorer=REPO, revision="narrow")


def test_private_repositories_and_tokens(hub, model, monkeypatch):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.grip.push_to_hub(REPO, private=True)
    assert hub.repos[REPO].private
    commit = hub.repos[REPO].branches["main"]
    monkeypatch.delenv("HF_TOKEN")
    handle = model.grip
    for token, said in ((False, "private"), ("hf_wrong", "token is missing or wrong")):
        with pytest.raises(HubError, match=said):
            apply_grip(model, scorer=REPO, token=token)
        with pytest.raises(HubError, match="token"):
            model.grip.push_to_hub(REPO, token=token)
    with pytest.raises(HubError, match="may not"):
        model.grip.push_to_hub(REPO, token=READER)
    assert model.grip is handle and hub.repos[REPO].branches["main"] == commit
    assert apply_grip(model, scorer=REPO, token=READER).grip is not handle


def test_without_connection_the_cache_is_used(hub, model, inputs, monkeypatch):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    pruned = logits_of(model, inputs)
    model.grip.push_to_hub(REPO)
    apply_grip(model, scorer=REPO)
    asked = len(hub.requests)
    assert torch.equal(logits_of(apply_grip(model, scorer=REPO, local_files_only=True), inputs), pruned)
    assert len(hub.requests) == asked
    hub.faults["GET /api"] = 503
    assert torch.equal(logits_of(apply_grip(model, scorer=REPO), inputs), pruned)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits_of(apply_grip(model, scorer=REPO), inputs), pruned)
    with pytest.raises(HubError, match=r"'user/other'.*not in the cache"):
        apply_grip(model, scorer="user/other")


@pytest.mark.parametrize("fault", ["PUT /lfs", "POST /api/models/.*/commit", "POST .*/batch"])
def test_a_failed_upload_changes_nothing(hub, model, fault):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.grip.push_to_hub(REPO)
    commit = hub.repos[REPO].branches["main"]
    scorer = tiny_scorer()
    torch.nn.init.zeros_(scorer.visual.weight)
    apply_grip(model, scorer=scorer, num_tokens=4)
    hub.faults[fault] = 400
    with pytest.raises(HubError, match=f"upload to '{REPO}'"):
        model.grip.push_to_hub(REPO)
    assert hub.repos[REPO].branches["main"] == commit
    hub.faults.clear()
    model.grip.push_to_hub(REPO)
    assert apply_grip(model, scorer=REPO).grip.config.num_tokens == 4


def test_a_download_that_breaks_off_patches_nothing(hub, model, inputs):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    pruned = logits_of(model, inputs)
    model.grip.push_to_hub(REPO)
    fresh = build("llava")
    hub.cut.add("model.safetensors")
    with pytest.raises(HubError, match=f"download '{REPO}'"):
        apply_grip(fresh, scorer=REPO)
    assert "grip" not in vars(fresh)
    hub.cut.clear()
    assert torch.equal(logits_of(apply_grip(fresh, scorer=REPO), inputs), pruned)


def test_a_repository_that_was_renamed(hub, model):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.grip.push_to_hub("user/new")
    hub.moved["user/old"] = "user/new"
    assert apply_grip(build("llava"), scorer="user/old").grip.config == GripConfig(num_tokens=3, selector="grip")


def test_a_gated_repository(hub, model):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.grip.push_to_hub(REPO)
    hub.repos[REPO].gated = True
    with pytest.raises(HubError, match="must be asked for on its page"):
        apply_grip(build("llava"), scorer=REPO)


def test_nobody_at_the_endpoint(hub, model, inputs, monkeypatch):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    pruned = logits_of(model, inputs)
    model.grip.push_to_hub(REPO)
    apply_grip(model, scorer=REPO)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    assert torch.equal(logits_of(apply_grip(model, scorer=REPO), inputs), pruned)  # from the cache
    with pytest.raises(HubError, match=r"'user/other'.*not in the cache"):
        apply_grip(model, scorer="user/other")
    with pytest.raises(HubError, match=f"upload to '{REPO}'"):
        model.grip.push_to_hub(REPO)


def test_a_card_edited_during_an_upload_is_not_lost(hub, model, monkeypatch):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.grip.push_to_hub(REPO)
    save = model.grip.save_part

    def edit_meanwhile(folder):
        hub.repos[REPO].put({"README.md": b"mine"})
        return save(folder)

    monkeypatch.setattr(model.grip, "save_part", edit_meanwhile)
    with pytest.raises(HubError, match="moved"):
        model.grip.push_to_hub(REPO)
    assert hub.repos[REPO].files()["README.md"] == b"mine"


@pytest.mark.parametrize("name", ["training_args.bin", "scorer.py", "pytorch_model.bin", "old/state.pt", "m.pkl"])
def test_strange_files_are_refused_before_any_download_or_upload(hub, model, name):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.grip.push_to_hub(REPO)
    hub.repos[REPO].put({name: b"code"})
    handle, commit = model.grip, hub.repos[REPO].branches["main"]
    hub.requests.clear()
    with pytest.raises(HubError, match=name.replace(".", r"\.")):
        apply_grip(model, scorer=REPO)
    with pytest.raises(HubError, match="nothing was uploaded"):
        model.grip.push_to_hub(REPO)
    assert not downloads(hub) and model.grip is handle and hub.repos[REPO].branches["main"] == commit


def test_other_models_are_refused_before_their_weights_are_downloaded(hub, model):
    config = json.dumps({"model_type": "llava"}).encode()
    hub.repos["user/vlm"] = Repo()
    hub.repos["user/vlm"].put({"config.json": config, "model.safetensors": b"15 GB"})
    hub.repos["user/data"] = Repo()
    with pytest.raises(ScorerError, match="'llava', not a grip scorer"):
        apply_grip(model, scorer="user/vlm")
    assert "model.safetensors" not in downloads(hub)
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    with pytest.raises(ScorerError, match="not a grip scorer"):
        model.grip.push_to_hub("user/vlm")
    assert hub.repos["user/vlm"].files()["model.safetensors"] == b"15 GB"
    with pytest.raises(HubError, match="holds no GRIP scorer"):
        apply_grip(model, scorer="user/data")
    with pytest.raises(HubError, match="no such repository"):
        apply_grip(model, scorer="user/nothing")


def test_scorers_of_other_families_are_refused(model, tmp_path):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3).grip.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["base_model"] == {
        "id": None,
        "model_type": "llava",
        "text_model_type": "llama",
    }
    other = build("qwen2_vl")
    with pytest.raises(ScorerError, match=r"made for a model \(model_type 'llava'.*has model_type 'qwen2_vl'"):
        apply_grip(other, scorer=tmp_path)
    assert "grip" not in vars(other)


def test_scorers_of_another_language_model_are_refused(model, tmp_path):
    """Of the same width, in a model of the same type."""
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3).grip.save_pretrained(tmp_path)
    config = TINY["llava"].config()
    config.text_config = Qwen2Config(**TEXT)
    other = AutoModelForImageTextToText.from_config(config)
    with pytest.raises(ScorerError, match=r"text_model_type 'llama'\), but .* has text_model_type 'qwen2'"):
        apply_grip(other, scorer=tmp_path)
    assert "grip" not in vars(other)


def test_scorers_of_other_models_are_refused_before_their_weights_are_downloaded(hub, model, tmp_path):
    other = build("qwen2_vl")
    apply_grip(other, scorer=tiny_scorer(other.config.text_config.hidden_size), num_tokens=3).grip.push_to_hub(
        "user/qwen"
    )
    tiny_scorer(2 * HIDDEN).save_pretrained(tmp_path)
    hub.repos["user/wide"] = Repo()
    hub.repos["user/wide"].put({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    hub.requests.clear()
    for repo, said in (("user/qwen", "model_type 'qwen2_vl'"), ("user/wide", f"hidden_size {2 * HIDDEN}")):
        with pytest.raises(ScorerError, match=said):
            apply_grip(model, scorer=repo)
    assert downloads(hub) and "model.safetensors" not in downloads(hub) and "grip" not in vars(model)


def test_the_scorer_of_another_model_is_not_overwritten(hub, model, tmp_path):
    other = build("qwen2_vl")
    apply_grip(other, scorer=tiny_scorer(other.config.text_config.hidden_size), num_tokens=3)
    other.grip.push_to_hub(REPO)
    other.grip.save_pretrained(tmp_path / "there")
    commit, weights = hub.repos[REPO].branches["main"], (tmp_path / "there" / "model.safetensors").read_bytes()
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    with pytest.raises(ScorerError, match=r"another model \(model_type 'qwen2_vl'"):
        model.grip.push_to_hub(REPO)
    with pytest.raises(ScorerError, match=r"another model \(model_type 'qwen2_vl'"):
        model.grip.save_pretrained(tmp_path / "there")
    assert hub.repos[REPO].branches["main"] == commit
    assert (tmp_path / "there" / "model.safetensors").read_bytes() == weights


def test_a_folder_with_a_model_is_not_overwritten(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    with pytest.raises(ScorerError, match="'llava', not a grip scorer"):
        model.grip.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_config_is_named(hub, model):
    hub.repos[REPO] = Repo()
    hub.repos[REPO].put({"config.json": b"[1", "model.safetensors": b"weights"})
    with pytest.raises(ScorerError, match=f"config.json of '{REPO}' is damaged"):
        apply_grip(model, scorer=REPO)
    assert "model.safetensors" not in downloads(hub)


# Pruned checkpoints


def test_a_pruned_checkpoint_through_the_hub(hub, model, inputs):
    full = logits_of(model, inputs)
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    pruned = logits_of(model, inputs)
    model.push_to_hub("user/pruned")
    apply_grip(model, num_tokens=5, selector="grid")
    model.push_to_hub("user/pruned", revision="grid")
    files = hub.repos["user/pruned"].files()
    assert {"config.json", "model.safetensors", "grip/config.json", "grip/grip_config.json"} <= set(files)
    assert "grip/README.md" not in files

    again = LlavaForConditionalGeneration.from_pretrained("user/pruned")
    assert torch.equal(logits_of(again, inputs), full)
    assert torch.equal(logits_of(apply_grip(again), inputs), pruned)
    assert again.grip.config == GripConfig(num_tokens=3, selector="grip")
    assert torch.equal(logits_of(apply_grip(build("llava"), scorer="user/pruned"), inputs), pruned)  # by its name
    grid = LlavaForConditionalGeneration.from_pretrained("user/pruned", revision="grid")
    assert apply_grip(grid, revision="grid").grip.config == GripConfig(num_tokens=5, selector="grid")
    asked = len(hub.requests)
    assert apply_grip(again, num_tokens=4, local_files_only=True).grip.config == GripConfig(
        num_tokens=4, selector="grip"
    )
    assert len(hub.requests) == asked

    hub.repos["user/pruned"].put({"grip/extra.bin": b"code"})
    with pytest.raises(HubError, match=r"extra\.bin"):
        apply_grip(again)


def test_a_pruned_checkpoint_is_a_plain_one_to_those_without_this_library(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "plain")
    full = logits_of(model, inputs)
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.save_pretrained(tmp_path / "pruned")
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "pruned").iterdir()) == sorted([*names, "grip"])
    for name in names:
        assert (tmp_path / "pruned" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    again, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(report.values()) and torch.equal(logits_of(again, inputs), full)


def test_a_checkpoint_without_grip_part(hub, model):
    model.push_to_hub("user/plain")
    again = LlavaForConditionalGeneration.from_pretrained("user/plain")
    with pytest.raises(ConfigError, match=r"'user/plain'.*no GRIP part"):
        apply_grip(again)
    assert apply_grip(again, scorer=tiny_scorer(), num_tokens=3).grip.scorer is not None


def test_saving_with_push_uploads_the_part(hub, model, tmp_path):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.save_pretrained(tmp_path / "pruned", push_to_hub=True, repo_id="user/pruned")
    assert {"model.safetensors", "grip/model.safetensors"} <= set(hub.repos["user/pruned"].files())
    assert (tmp_path / "pruned" / "grip" / "grip_config.json").is_file()


def test_a_moved_endpoint(hub, model, tmp_path):
    """The endpoint comes from the environment, as for every tool of the Hub; nothing is asked elsewhere."""
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.grip.push_to_hub(REPO)
    hub.requests.clear()
    code = (
        f"import sys; from grip_hf.hub.download import fetch; print(sorted(p.name for p in fetch({REPO!r}).iterdir()))"
    )
    changes = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **changes}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(sorted(FILES - {"README.md"})) and hub.requests


def test_nothing_is_left_on_the_instance(model, tmp_path):
    before = set(vars(model))
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    apply_grip(model, scorer=tiny_scorer(), num_tokens=4)
    remove_grip(model)
    assert set(vars(model)) == before
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "grip").exists()


def test_a_save_of_ones_own_is_kept(model, tmp_path):
    calls = []
    model.save_pretrained = own = lambda save_directory, **kwargs: calls.append(save_directory)
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.save_pretrained(tmp_path)
    assert calls == [tmp_path] and (tmp_path / "grip" / "grip_config.json").is_file()
    remove_grip(model)
    assert model.save_pretrained is own


def test_only_the_main_process_saves(model, tmp_path):
    apply_grip(model, scorer=tiny_scorer(), num_tokens=3)
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "grip").exists()
