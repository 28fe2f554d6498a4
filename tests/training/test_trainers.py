"""Whatever trainer calls a patched model, the prompt alone chooses: against it alone and a masked model."""

import sys
import types

import peft
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from first_testbed import load_pocket_llava
from lessons import OFFLINE, Watch, kept_of_prompts, masked_logits, pruned, rows
from transformers import Trainer, TrainingArguments
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from versions import SFT_OUTSIDE, TRAINING

pytestmark = TRAINING
ROWS = list(rows())
PROMPTS = [(row["images"][0], f"<s><image>{row['question']}") for row in ROWS]
LORA = {"r": 2, "target_modules": r".*language_model\.layers.*(q|v)_proj"}


@pytest.fixture(scope="module")
def expected():
    """The kept sets of the prompts; those of prompt and answer together are others, so that a leak shows."""
    alone = kept_of_prompts(PROMPTS)
    for answer in ("right", "wrong"):
        leaked = [(image, f"{text} {row[answer]}") for (image, text), row in zip(PROMPTS, ROWS, strict=True)]
        assert all(one != other for one, other in zip(kept_of_prompts(leaked), alone, strict=True))
    return alone


def batch(processor, answers=("right",), padding_side="right"):
    """Prompts with their answers, by hand; labels at the answers alone."""
    whole = [f"{text} {row[name]} </s>" for name in answers for (_, text), row in zip(PROMPTS, ROWS, strict=True)]
    images = [image for image, _ in PROMPTS] * len(answers)
    options = {"return_tensors": "pt", "padding": True, "padding_side": padding_side, "add_special_tokens": False}
    made = processor(images=images, text=whole, **options)
    made["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
    for row, (_, text) in enumerate(PROMPTS * len(answers)):
        length = processor(images=images[row], text=text, add_special_tokens=False)["input_ids"]
        start = int(made["attention_mask"][row].argmax())
        made["labels"][row, : start + len(length[0])] = -100
    return made


def by_hand(expected, smoothing=0.0, ahead=1):
    """The mean loss over the answers' tokens, predicted so many positions ahead, of the masked, unpatched model."""
    model, processor = load_pocket_llava()
    inputs = batch(processor)
    labels = inputs.pop("labels")[:, ahead:]
    with torch.no_grad():
        logps = masked_logits(model, inputs, expected)[:, : labels.shape[1]].log_softmax(-1)
    counts = labels != -100
    own = -logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0][counts].mean()
    return float((1 - smoothing) * own + smoothing * -logps.mean(-1)[counts].mean())


def outside(outputs, labels, num_items_in_batch=None):
    """A loss outside the model."""
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


class Pops(Trainer):
    """A subclass that takes the labels out of the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = outside(outputs, labels)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("how", ["labels", "smoothing", "loss_func", "pops"])
def test_trainer(tmp_path, expected, how, adapted):
    model, processor = pruned()
    watch = Watch(model)
    args = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=len(ROWS),
        per_device_eval_batch_size=len(ROWS),
        remove_unused_columns=False,
        label_names=["labels"],
        label_smoothing_factor=0.1 if how == "smoothing" else 0.0,
        **OFFLINE,
    )
    whole = batch(processor)
    data = [{name: value[row] for name, value in whole.items()} for row in range(len(ROWS))]
    trainer = (Pops if how == "pops" else Trainer)(
        peft.get_peft_model(model, peft.LoraConfig(**LORA)) if adapted else model,
        args,
        train_dataset=data,
        eval_dataset=data,
        compute_loss_func=outside if how == "loss_func" else None,
    )
    trainer.train()
    # `Trainer` smooths labels where they stand unless the model's name is one of a language model.
    wanted = by_hand(expected, args.label_smoothing_factor, ahead=0 if how == "smoothing" else 1)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-4)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, rel=1e-4)
    assert watch.seen == set(expected) and len(watch.calls) == 2


def trl_arguments(config, folder, **settings):
    return config(str(folder), per_device_train_batch_size=len(ROWS), max_length=None, **{**OFFLINE, **settings})


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("how", ["completion", "smoothing", "loss_func"])
def test_sft(tmp_path, expected, how, adapted):
    old = not SFT_OUTSIDE and how in ("smoothing", "loss_func")
    model, processor = load_pocket_llava() if old else pruned()
    data = [
        {"images": row["images"], "prompt": text, "completion": f" {row['right']} </s>"}
        for (_, text), row in zip(PROMPTS, ROWS, strict=True)
    ]
    settings = {"label_smoothing_factor": 0.1} if how == "smoothing" else {}
    trainer = trl.SFTTrainer(
        model,
        trl_arguments(trl.SFTConfig, tmp_path, **settings),
        train_dataset=Dataset.from_list(data),
        processing_class=processor,
        compute_loss_func=outside if how == "loss_func" else None,
        peft_config=peft.LoraConfig(**LORA) if adapted else None,
    )
    if old:  # not with the unpatched model either
        with pytest.raises(AttributeError, match="num_valid_tokens"):
            trainer.train()
        return
    watch = Watch(model)
    trainer.train()
    wanted = by_hand(expected, settings.get("label_smoothing_factor", 0.0))
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted, rel=1e-4)
    assert watch.seen == set(expected)


SPOKEN = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% elif message['role'] == 'assistant' %}{% generation %}{{ part['text'] + ' </s>' }}{% endgeneration %}"
    "{% else %}{{ ' ' + part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
)


def talk(row):
    """Two questions about one picture, with their answers."""
    said = [("user", row["question"]), ("assistant", row["right"]), ("user", "how many red"), ("assistant", "no")]
    return {"images": row["images"], "messages": [{"role": role, "content": text} for role, text in said]}


@pytest.mark.parametrize("loss", ["assistant_only", "all"])
def test_several_turns(tmp_path, expected, loss):
    """The turn of the picture chooses it, and no later one; labels that cover all text do not tell, which is said."""
    model, processor = pruned()
    processor.chat_template = SPOKEN
    watch = Watch(model)

    def make():
        return trl.SFTTrainer(
            model,
            trl_arguments(trl.SFTConfig, tmp_path, assistant_only_loss=loss == "assistant_only"),
            train_dataset=Dataset.from_list([talk(row) for row in ROWS]),
            processing_class=processor,
        )

    if not SFT_OUTSIDE and loss == "assistant_only":
        with pytest.raises(ValueError, match="not yet supported for vision"):
            make()
        return
    trainer = make()
    if loss == "all":
        with pytest.warns(UserWarning, match=r"cover all text .* assistant_only_loss=True"):
            trainer.train()
    else:
        trainer.train()
        first = kept_of_prompts([(row["images"][0], f"<image> {row['question']}") for row in ROWS])
        assert watch.seen == set(first)


def test_packing_is_refused(tmp_path):
    model, processor = pruned()
    data = Dataset.from_list([talk(row) for row in ROWS])
    with pytest.raises(ValueError, match=r"[Pp]acking"):
        trl.SFTTrainer(
            model,
            trl_arguments(trl.SFTConfig, tmp_path, packing=True),
            train_dataset=data,
            processing_class=processor,
        )


def fused_forward(self, labels=None, skip_logits=None, return_token_accuracy=None, use_token_scaling=None, **inputs):
    """A `forward` as Liger puts it in place of LLaVA's: in training a loss from hidden states, and no logits."""
    hidden = self.model(**inputs)[0]
    skip_logits = (self.training and labels is not None) if skip_logits is None else skip_logits
    logits = self.lm_head(hidden)  # where Liger's kernel makes them piece by piece
    count = inputs.get("num_items_in_batch")
    loss = outside({"logits": logits}, labels)
    if count is not None:
        loss = loss * labels[:, 1:].ne(-100).sum() / count
    return LlavaCausalLMOutputWithPast(loss=loss, logits=None if skip_logits else logits)


@pytest.fixture
def liger(monkeypatch):
    """Stands in for liger-kernel, whose own kernels need Triton; gives what it was put on."""
    applied = []

    def apply(model, fused_linear_cross_entropy=True, **_):
        applied.append(model)
        if fused_linear_cross_entropy:
            model.forward = types.MethodType(fused_forward, model)

    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["liger_kernel.transformers"]._apply_liger_kernel_to_instance = apply
    monkeypatch.setattr(transformers.integrations.liger, "is_liger_kernel_available", lambda: True)
    return applied


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_liger(tmp_path, expected, liger, kind, adapted):
    model, processor = pruned()
    watch = Watch(model)
    lora = peft.LoraConfig(**LORA) if adapted else None
    settings = {"use_liger_kernel": True, "per_device_train_batch_size": len(ROWS), **OFFLINE}
    if kind == "trainer":
        whole = batch(processor)
        data = [{name: value[row] for name, value in whole.items()} for row in range(len(ROWS))]
        args = TrainingArguments(str(tmp_path), remove_unused_columns=False, **settings)
        trainer = Trainer(peft.get_peft_model(model, lora) if adapted else model, args, train_dataset=data)
    else:
        data = Dataset.from_list(
            [
                {"images": row["images"], "prompt": text, "completion": f" {row['right']} </s>"}
                for (_, text), row in zip(PROMPTS, ROWS, strict=True)
            ]
        )
        args = trl.SFTConfig(str(tmp_path), max_length=None, **settings)
        trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=processor, peft_config=lora)
    trainer.train()
    assert liger and liger[0] is model
    assert trainer.state.log_history[0]["loss"] == pytest.approx(by_hand(expected), rel=1e-4)
    assert watch.seen == set(expected)


def test_labels_that_are_shifted_already(expected):
    """As those of sequence parallel training are: each position has the label of the next one."""
    model, processor = pruned()
    inputs = batch(processor)
    shifted = torch.nn.functional.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:]
    model.train()
    model(**inputs, shift_labels=shifted)
    assert [tuple(one.tolist()) for one in model.grip.last.kept] == expected
