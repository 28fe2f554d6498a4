"""By whatever way an adapter is loaded: its settings and scorer are found, or what is to be done is said."""

import copy
import json
import warnings

import peft
import pytest
import torch
from adapting import LORA, adapted, asked, files, put_around, saved, scorer
from huggingface_hub import HfApi
from loopback_hub import Repo
from peft.utils.hotswap import hotswap_adapter
from tiny import IMAGE, build, make_inputs
from transformers import AutoModelForImageTextToText
from versions import SAVES_ADAPTERS

from grip_hf import apply_grip, remove_grip
from grip_hf.errors import ScorerError

NAMED = r"'default' was trained with a scorer.*apply_grip\(model, scorer=\.\.\.\) with the adapter's folder or Hub id"
OTHERWISE = "was trained with other settings or another scorer"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, and adapters around it that were trained with two scorers, with another selector, and unpruned."""
    top = tmp_path_factory.mktemp("adapters")
    base = build("llava")
    base.save_pretrained(top / "base")
    made = {"first": {"scorer": scorer()}, "second": {"scorer": scorer(seed=1)}, "grid": {"selector": "grid"}}
    for name, settings in made.items():
        saved(top / name, **settings, num_tokens=5)
        tell_the_base(top / name, top / "base")
    remove_grip(adapted(selector="grid", num_tokens=5)).save_pretrained(top / "plain")
    return top


def tell_the_base(folder, base):
    """What PEFT writes of a model that came from a checkpoint, as these did not."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))


def by_transformers(model, folder, **how):
    model.load_adapter(str(folder), **how)
    return model.eval()


def by_peft(model, folder):
    return peft.PeftModel.from_pretrained(model, folder).eval()


def by_name(model, folder):
    """A second adapter, made the active one."""
    model = peft.get_peft_model(model, peft.LoraConfig(**LORA), adapter_name="mine")
    model.load_adapter(folder, "default")
    model.set_adapter("default")
    return model.eval()


def by_mixed(model, folder):
    return peft.PeftMixedModel.from_pretrained(model, folder).eval()


AROUND = {"peft": by_peft, "second": by_name, "mixed": by_mixed, "transformers": by_transformers}


def said_of(run):
    """What a call gave back, and what we warned of in it; PEFT's own warnings aside."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        done = run()
    return done, [str(one.message) for one in said if str(one.message).startswith("the adapter")]


def wrapped_in(model):
    """What `apply_grip` may be given of a model with adapters."""
    owner = owner_of(model)
    return [owner, model] if hasattr(model, "get_base_model") else [owner]


def owner_of(model):
    """The transformers model within adapters."""
    return next(module for module in model.modules() if type(module) is type(build("llava")))


def peft_itself(_, folder):
    return peft.AutoPeftModel.from_pretrained(folder).eval()


def transformers_itself(_, folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


@pytest.mark.parametrize("way", [*AROUND.values(), peft_itself, transformers_itself])
def test_around_an_unpatched_model(folders, way):
    """PEFT warns; settings come by themselves, and a scorer is asked for by name, whatever else is given."""
    with pytest.warns(UserWarning, match="so_call_grip_hf_apply_grip"):
        model = way(build("llava"), folders / "first")
    for part in wrapped_in(model):
        for given in ({}, {"keep_ratio": 0.25}, {"selector": "grip", "num_tokens": 5}):
            with pytest.raises(ScorerError, match=NAMED):
                apply_grip(part, **given)
        assert "grip" not in vars(owner_of(model))
        _, said = said_of(lambda part=part: apply_grip(part, scorer=folders / "first"))
        assert not said
        remove_grip(part)
    owner = owner_of(way(build("llava"), folders / "grid"))
    assert apply_grip(owner).grip.config.selector == "grid"


@pytest.mark.parametrize("way", AROUND.values())
def test_around_a_patched_model(folders, way):
    """The patch warns of what was trained otherwise, then finds the scorer where it saw the loading."""
    quiet = apply_grip(build("llava"), scorer=scorer(), num_tokens=3)
    model, said = said_of(lambda: way(quiet, folders / "first"))
    asked_of(model)
    assert not said
    for folder in ("first", "second"):

        def load(folder=folder):
            model = way(apply_grip(build("llava"), selector="grid", num_tokens=5), folders / folder)
            asked_of(model)
            asked_of(model)  # once is enough
            return model

        model, said = said_of(load)
        assert len(said) == 1 and said[0].startswith("the adapter 'default'") and OTHERWISE in said[0]
    if way is by_mixed:  # its own methods are not looked into
        with pytest.raises(ScorerError, match=NAMED):
            apply_grip(owner_of(model))
        return
    found = apply_grip(owner_of(model)).grip.scorer.state_dict()
    torch.testing.assert_close(found, scorer(seed=1).state_dict(), rtol=0, atol=0)


def asked_of(model):
    """Ask a model with whatever adapters around it."""
    with torch.no_grad():
        model(**make_inputs("llava", [[3, IMAGE, 4]]))


def test_what_was_loaded_before_and_is_switched_to(folders):
    """Two adapters, a patch for one of them, and then the other one: said once, also of copies."""
    model, _ = put_around(build("llava"), folders / "first")
    model.load_adapter(folders / "second", "other")
    _, said = said_of(lambda: asked(apply_grip(model, scorer=folders / "first")))
    assert not said
    model.set_adapter("other")
    twin = copy.deepcopy(model)
    for one in (model, twin):
        _, said = said_of(lambda one=one: [asked(one), asked(one)])
        assert len(said) == 1 and said[0].startswith("the adapter 'other'") and OTHERWISE in said[0]
    with model.disable_adapter():
        assert not said_of(lambda: asked(model))[1]
    with pytest.raises(ScorerError, match="'other' was trained with a scorer"):
        apply_grip(model)
    assert not said_of(lambda: asked(apply_grip(model, scorer=folders / "second")))[1]


def test_a_name_that_another_adapter_got(folders):
    """What was seen of an adapter is not taken for a new one of its name."""
    model, _ = put_around(apply_grip(build("llava"), selector="grid", num_tokens=5), folders / "first")
    model.add_adapter("mine", peft.LoraConfig(**LORA))
    model.delete_adapter("default")
    model.add_adapter("default", peft.LoraConfig(**LORA))
    model.set_adapter("default")
    assert apply_grip(model, keep_ratio=0.25).get_base_model().grip.config.selector == "cdpruner"


def test_without_pruning_by_transformers(folders):
    model = apply_grip(build("llava"), selector="grid", num_tokens=5)
    _, said = said_of(lambda: by_transformers(model, folders / "plain"))
    assert said == ["the adapter 'default' was trained without pruning, and this model is pruned"]
    remove_grip(model)
    assert "load_adapter" not in vars(model)


def test_weights_that_are_swapped(folders):
    """transformers' own swapping is seen; of PEFT's, PEFT warns."""
    model = by_transformers(apply_grip(build("llava"), selector="grid", num_tokens=5), folders / "grid")
    _, said = said_of(lambda: model.load_adapter(str(folders / "first"), adapter_name="default", hotswap=True))
    assert len(said) == 1 and OTHERWISE in said[0]
    assert apply_grip(model).grip.config.selector == "grip"
    model, _ = put_around(apply_grip(build("llava"), selector="grid", num_tokens=5), folders / "grid")
    with pytest.warns(UserWarning, match="so_call_grip_hf_apply_grip"):
        hotswap_adapter(model, folders / "first", "default")


@pytest.mark.parametrize("way", [by_peft, by_transformers])
def test_on_the_hub(folders, hub, monkeypatch, way):
    monkeypatch.setattr(peft.utils.save_and_load, "file_exists", HfApi(endpoint=hub.url).file_exists)  # made on import
    hub.repos["user/adapter"] = Repo()
    hub.repos["user/adapter"].put({name: (folders / "first" / name).read_bytes() for name in files(folders / "first")})
    with pytest.raises(ScorerError, match=NAMED):
        apply_grip(way(build("llava"), "user/adapter"))
    model, said = said_of(lambda: way(apply_grip(build("llava"), selector="grid", num_tokens=5), "user/adapter"))
    assert len(said) == 1 and OTHERWISE in said[0]
    found = apply_grip(owner_of(model)).grip.scorer.state_dict()
    torch.testing.assert_close(found, scorer().state_dict(), rtol=0, atol=0)


def test_saved_by_transformers(folders, tmp_path):
    """Adapters that a transformers model was given itself tell of the patch, too."""
    model = by_transformers(apply_grip(build("llava"), scorer=scorer(), num_tokens=5), folders / "first")
    if not SAVES_ADAPTERS:  # it raises then, patched or not, and nothing of the patch is left
        for one in (by_transformers(build("llava"), folders / "first"), model):
            with pytest.raises(ValueError, match="PEFT"):
                one.save_pretrained(tmp_path)
        assert files(tmp_path) <= {"generation_config.json"}  # upstream's
        return
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "grip/grip_config.json", "grip/model.safetensors"} <= files(tmp_path)
    with pytest.warns(UserWarning, match="so_call_grip_hf_apply_grip"):
        loaded = by_peft(build("llava"), tmp_path)
    with pytest.raises(ScorerError, match=NAMED):
        apply_grip(loaded)
    assert not said_of(lambda: asked(apply_grip(loaded, scorer=tmp_path)))[1]
