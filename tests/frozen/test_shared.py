"""Encoded pictures in a folder: each is computed once in all, and is what it would be without the folder."""

import datetime
import shutil
from collections import namedtuple

import pytest
import torch
import torch.distributed as dist
from classroom import ANSWERS, build_vlm, picture
from spawned import spawn
from tiny import HIDDEN, build
from versions import TRAINING

from grip_hf.families.table import find_parts
from grip_hf.frozen.data import DatasetExamples
from grip_hf.frozen.samples import Encoded
from grip_hf.frozen.shared import SharedPictures, fingerprint
from grip_hf.frozen.store import SampleStore
from grip_hf.frozen.vlm import FrozenVLM

pytestmark = TRAINING
CPU = torch.device("cpu")
PICTURES = 6
GIB = 1 << 30
Usage = namedtuple("Usage", "total used free")  # as shutil.disk_usage answers


@pytest.fixture(autouse=True)
def disk(monkeypatch):
    """Sets how large a disk is and how much of it is free, which tests must not learn from the machine they run on."""

    def resize(total, free):
        monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(total, total - free, free))

    resize(100 * GIB, 50 * GIB)
    return resize


def watch(model):
    """Counts the pictures that a model's tower encodes."""
    seen = []
    model.model.vision_tower.register_forward_hook(lambda module, args, kwargs, out: seen.append(1), with_kwargs=True)
    return seen


def examples(rank=0, world=1):
    """Three questions about each picture; a process starts at a place of its own and asks all of them."""
    rows = [
        {"image": picture(i % PICTURES), "prompt": "is there any cat", "answer": ANSWERS[i // PICTURES]}
        for i in range(3 * PICTURES)
    ]
    start = rank * len(rows) // (2 * world)
    return DatasetExamples(rows[start:] + rows[:start])


def work(rank, folder):
    torch.set_num_threads(1)
    shutil.disk_usage = lambda path: Usage(
        100 * GIB, 50 * GIB, 50 * GIB
    )  # a process of its own, out of the fixture's reach
    limit = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", f"file://{folder}/meet", world_size=2, rank=rank, timeout=limit)
    model, processor = build_vlm()
    seen = watch(model)
    # Memory for one picture alone, so that all others come from the folder again.
    store = SampleStore(FrozenVLM(model, processor, cache_bytes=1, share=folder / "pictures"), examples(rank, 2), 1)
    dist.barrier()
    for _ in range(2):
        found = [store.samples([row])[0].visual.tokens for row in range(3 * PICTURES)]
    count = torch.tensor(len(seen))
    dist.all_reduce(count)
    torch.save({"in all": int(count), "mine": len(seen), "found": found}, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_encode_each_picture_once_in_all(tmp_path):
    spawn(__file__, "work", (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    assert [rank["in all"] for rank in ranks] == [PICTURES] * 2
    assert sum(rank["mine"] for rank in ranks) == PICTURES
    for rank, one in enumerate(ranks):
        alone = SampleStore(FrozenVLM(*build_vlm()), examples(rank, 2))
        for row, tokens in enumerate(one["found"]):
            assert torch.equal(tokens, alone.samples([row])[0].visual.tokens)
    model, processor = build_vlm()  # a later run has them already
    seen = watch(model)
    SampleStore(FrozenVLM(model, processor, share=tmp_path / "pictures"), examples()).samples([0, 1, 2])
    assert not seen


@pytest.mark.parametrize("several", [False, True])
def test_what_is_read_is_what_was_written(tmp_path, several):
    one = torch.randn(1, 4, HIDDEN).bfloat16()
    features = tuple(torch.randn(12, HIDDEN).split([2] * 6)) if several else one
    encoded = Encoded(features, {"vision.keys.-1": torch.rand(4, 3), "vision.salience": torch.rand(4)})
    store = SharedPictures(tmp_path, "mark")
    calls = []
    for _ in range(2):
        found = store.get("ab12", lambda: calls.append(1) or encoded, CPU)
        assert isinstance(found.features, torch.Tensor) != several
        for ours, theirs in zip(found.features, features, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        assert found.taps.keys() == encoded.taps.keys()
        assert all(torch.equal(found.taps[name], tap) for name, tap in encoded.taps.items())
    assert len(calls) == 1


def test_damaged_files_and_full_disks(tmp_path, disk):
    encoded, calls = Encoded(torch.randn(1, 4, HIDDEN), {}), []
    store = SharedPictures(tmp_path, "mark")

    def encode():
        calls.append(1)
        return encoded

    store.get("ab12", encode, CPU)
    (tmp_path / "mark" / "ab12.safetensors").write_bytes(b"cut")
    assert torch.equal(store.get("ab12", encode, CPU).features, encoded.features) and len(calls) == 2
    assert torch.equal(store.get("ab12", encode, CPU).features, encoded.features) and len(calls) == 2
    disk(1000 * GIB, GIB)
    for number in (3, 4):
        assert torch.equal(store.get("ff00", encode, CPU).features, encoded.features) and len(calls) == number
    assert store.full and torch.equal(store.get("ab12", encode, CPU).features, encoded.features) and len(calls) == 4
    assert not (tmp_path / "mark" / "ff00.safetensors").exists()


@pytest.mark.parametrize(
    ("total", "free", "taken"),
    [
        (4000 * GIB, 2 * GIB, True),  # a shared disk is hardly ever a tenth free
        (4000 * GIB, GIB // 2, False),
        (GIB, GIB // 5, True),  # and one in memory never has a spare gigabyte
        (GIB, GIB // 11, False),
    ],
)
def test_a_large_disk_keeps_a_gigabyte_free_and_a_small_one_a_tenth(tmp_path, disk, total, free, taken):
    disk(total, free)
    store = SharedPictures(tmp_path, "mark")
    store.get("ab12", lambda: Encoded(torch.randn(1, 4, HIDDEN), {}), CPU)
    assert (tmp_path / "mark" / "ab12.safetensors").exists() == taken != store.full


def test_other_models_have_other_marks():
    marks = {fingerprint(find_parts(build("llava", seed=seed))) for seed in (0, 0, 1)}
    model = build("llava")
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.zero_()  # which encodes no picture
        assert fingerprint(find_parts(model)) in marks
        model.model.multi_modal_projector.linear_2.weight.zero_()
    assert len({*marks, fingerprint(find_parts(model))}) == 3
