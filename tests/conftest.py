"""One thread per test process: the models are tiny, and the processes share the cores."""

import pytest
import torch
import transformers.utils.hub
from huggingface_hub import constants
from loopback_hub import WRITER, LoopbackHub
from PIL import ImageFile

from grip_hf.engine.context import forget_all, innermost

torch.set_num_threads(1)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def no_call_is_left_open():
    """Whatever a test does to a model, and however its calls end: no call of a patched model stays open."""
    yield
    left = innermost()
    if left is not None:
        forget_all()
        pytest.fail(f"a call of a patched model was left open: {left}")


@pytest.fixture(autouse=True)
def half_a_picture_does_not_decode(monkeypatch):
    """Pillow's own default, which importing lmms-eval changes for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty Hub; the client's cache is empty and its stored token may write."""
    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        yield hub
