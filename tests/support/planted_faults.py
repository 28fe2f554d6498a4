"""The faults that `planted.py` plants: each once, each in one place, each such as a slip of the hand would make it."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A fault.

    Attributes:
        name: What goes wrong.
        file: Where, from the root of the tree.
        old: The text there, which stands in the file exactly once.
        new: What the fault makes of it.
        tests: The files, or single tests of them, that should notice.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "fillers of a batch are not masked while decoding",
        "grip_hf/engine/decoding.py",
        '        if not state.full:\n            new["attention_mask"]',
        '        if False:\n            new["attention_mask"]',
        ("tests/engine/test_cache.py",),
    ),
    Fault(
        "scorer is trained with a constant ratio",
        "grip_hf/training/policy.py",
        "ratio = (batch.budgets / batch.mask.sum(1)).float().clamp(max=1)",
        "ratio = (0.25 * torch.ones_like(batch.budgets)).float()",
        ("tests/training/test_training_policy.py",),
    ),
    Fault(
        "rollout ignores the temperature",
        "grip_hf/training/rollout.py",
        "temperature=temperature or 1.0)",
        "temperature=1.0)",
        ("tests/training/test_training_rollout.py",),
    ),
    Fault(
        "relaxed loss punishes the answer's probability",
        "grip_hf/training/relaxed.py",
        "return (verdict.kl - probability).mean()",
        "return (verdict.kl + probability).mean()",
        ("tests/training/test_training_relaxed.py",),
    ),
    Fault(
        "crop leaves the visual flags",
        "grip_hf/engine/cache.py",
        "visual=self.visual[:, :-cut]",
        "visual=self.visual",
        ("tests/engine/test_cache.py",),
    ),
    Fault(
        "window is one too long",
        "grip_hf/engine/masks.py",
        "keys.index[:, rows][:, :, None] - reach)",
        "keys.index[:, rows][:, :, None] - reach - 1)",
        ("tests/engine/test_plan.py",),
    ),
    Fault(
        "fillers are seen through a prepared mask",
        "grip_hf/engine/masks.py",
        "(slots < keys.index.shape[1]) & keys.valid[:, inside] & (columns >= 0)",
        "(slots < keys.index.shape[1]) & (columns >= 0)",
        ("tests/engine/test_plan.py",),
    ),
    Fault(
        "fillers are seen through a padding mask",
        "grip_hf/engine/masks.py",
        "return picked if keys.full else picked * keys.valid.to(picked.dtype)",
        "return picked",
        ("tests/engine/test_plan.py",),
    ),
    Fault(
        "fillers are seen in a static cache",
        "grip_hf/engine/masks.py",
        "return restrict(picked, columns.valid[:, None, None])",
        "return picked",
        ("tests/engine/test_cache.py",),
    ),
    Fault(
        "packed rows see each other",
        "grip_hf/engine/masks.py",
        "    if segments is not None:\n        seen = seen & (segments",
        "    if False:\n        seen = seen & (segments",
        ("tests/engine/test_plan.py",),
    ),
    Fault(
        "padding shifts compact positions",
        "grip_hf/engine/arguments.py",
        "gone = (real & ~keep).to(",
        "gone = (~keep).to(",
        ("tests/engine/test_plan.py",),
    ),
    Fault(
        "a later turn forgets the shift of compact positions",
        "grip_hf/engine/arguments.py",
        "        positions = positions - call.state.shift\n",
        "        positions = positions + 0\n",
        ("tests/engine/test_cache.py",),
    ),
    Fault(
        "decoding forgets the shift of compact positions",
        "grip_hf/engine/decoding.py",
        'new["position_ids"] = positions - state.shift',
        'new["position_ids"] = positions',
        ("tests/engine/test_cache.py",),
    ),
    Fault(
        "decoding counts from the physical length",
        "grip_hf/engine/decoding.py",
        "[None] + cache.get_seq_length()",
        "[None] + physical_length(cache)",
        ("tests/engine/test_cache.py",),
    ),
    Fault(
        "what comes before the first kept token is a filler's",
        "grip_hf/engine/plan.py",
        "return source.maximum(plan.valid.byte().argmax(1, keepdim=True))",
        "return source",
        ("tests/engine/test_plan.py",),
    ),
    Fault(
        "last rows are taken for others than they are",
        "grip_hf/engine/plan.py",
        "    if not bool((plan.index[:, -rows:] == last).all()):",
        "    if False:",
        ("tests/engine/test_plan.py",),
    ),
    Fault(
        "pictures of two turns share one budget",
        "grip_hf/engine/choice.py",
        "return question.turn if image is None",
        "return torch.zeros_like(question.turn) if image is None",
        ("tests/engine/test_silence.py",),
    ),
    Fault(
        "a picture is chosen by the words of another turn",
        "grip_hf/engine/choice.py",
        "own, mine = groups.key(question.turn), texts.key(question.turn)",
        "own, mine = groups.row, texts.row",
        ("tests/engine/test_question.py",),
    ),
    Fault(
        "a turn ends one token late",
        "grip_hf/engine/reading.py",
        "turn = torch.nn.functional.pad(ends.long().cumsum(1), (1, -1))",
        "turn = torch.nn.functional.pad(ends.long().cumsum(1), (2, -2))",
        ("tests/engine/test_question.py",),
    ),
    Fault(
        "a picture without words is chosen by none",
        "grip_hf/engine/reading.py",
        "return Question(asked | unasked, turn)",
        "return Question(asked, turn)",
        ("tests/engine/test_question.py",),
    ),
    Fault(
        "labels go before what the user says",
        "grip_hf/engine/reading.py",
        "    if prompt is not None:\n",
        "    if prompt is not None and context.labels is None:\n",
        ("tests/engine/test_question.py",),
    ),
    Fault(
        "a trainer's completion starts one token late",
        "grip_hf/engine/callers.py",
        "device=prompt.device) >= length)",
        "device=prompt.device) > length)",
        ("tests/engine/test_question.py",),
    ),
    Fault(
        "callers are looked for in a few frames only",
        "grip_hf/engine/callers.py",
        "DEPTH = 80",
        "DEPTH = 5",
        ("tests/engine/test_question.py",),
    ),
    Fault(
        "budgets per sample go to the wrong beams",
        "grip_hf/engine/choice.py",
        "return [one for one in value for _ in range(repeats)]",
        "return [one for _ in range(repeats) for one in value]",
        ("tests/engine/test_silence.py",),
    ),
    Fault(
        "a layer has the state of the layers before it",
        "grip_hf/engine/cache.py",
        "bisect.bisect_right(starts, layer_idx) - 1",
        "bisect.bisect_left(starts, layer_idx) - 1",
        ("tests/selectors/test_inside.py",),
    ),
    Fault(
        "later layers see fillers in later calls",
        "grip_hf/engine/layers.py",
        "        if mask is None and state.full:\n            return None",
        "        if mask is None:\n            return None",
        ("tests/selectors/test_inside.py",),
    ),
    Fault(
        "later turns forget what later layers lack",
        "grip_hf/engine/reading.py",
        "        if start:  # this",
        "        if False:  # this",
        ("tests/selectors/test_inside.py",),
    ),
    Fault(
        "picked rows keep the shifts of others",
        "grip_hf/engine/cache.py",
        "shift = None if self.shift is None else self.shift[rows]",
        "shift = None if self.shift is None else self.shift[: len(rows)]",
        ("tests/engine/test_cache.py",),
    ),
    Fault(
        "beams keep the state of others",
        "grip_hf/engine/cache.py",
        "        self._grip_rows(beam_idx)\n",
        "",
        ("tests/engine/test_cache.py",),
    ),
    Fault(
        "repeated rows come in the wrong order",
        "grip_hf/engine/cache.py",
        "torch.arange(batch).repeat_interleave(repeats)",
        "torch.arange(batch).repeat(repeats)",
        ("tests/test_patch.py",),
    ),
    Fault(
        "diversity compares with the last pick only",
        "grip_hf/selectors/diversity.py",
        "fresh if step == 0 else torch.minimum(gap, fresh)",
        "fresh",
        ("tests/selectors/test_selectors.py",),
    ),
    Fault(
        "cdpruner does not read the question",
        "grip_hf/selectors/cdpruner.py",
        "F.normalize(batch.tokens.float(), dim=-1) * relevance[..., None]",
        "F.normalize(batch.tokens.float(), dim=-1)",
        ("tests/selectors/test_peers.py",),
    ),
    Fault(
        "visionzip folds sums instead of means",
        "grip_hf/selectors/visionzip.py",
        "joined @ features / joined.sum(-1, keepdim=True).clamp(min=1)",
        "joined @ features",
        ("tests/selectors/test_merging.py",),
    ),
    Fault(
        "hiprune's buffers lie in another image",
        "grip_hf/selectors/hiprune.py",
        "target = torch.minimum(torch.maximum(place + step, low), high)",
        "target = (place + step).clamp(0, anchors.shape[1] - 1)",
        ("tests/selectors/test_peers.py",),
    ),
    Fault(
        "words are counted with their padding",
        "grip_hf/scorer/model.py",
        "sinusoid(mask.cumsum(1), self.config.width)",
        "sinusoid(torch.arange(mask.shape[1]).expand(mask.shape), self.config.width)",
        ("tests/scorer/test_scorer.py",),
    ),
    Fault(
        "a scorer is loaded in the type it was saved in",
        "grip_hf/scorer/model.py",
        'kwargs.setdefault("dtype", torch.float32)',
        'kwargs.setdefault("dtype", "auto")',
        ("tests/scorer/test_scorer.py",),
    ),
    Fault(
        "saved settings go before those given",
        "grip_hf/hub/resolve.py",
        "config = config or saved\n",
        "config = saved or config\n",
        ("tests/test_patch.py",),
    ),
    Fault(
        "a scorer of another text model is taken",
        "grip_hf/hub/resolve.py",
        'for name in ("model_type", "text_model_type") if',
        'for name in ("model_type",) if',
        ("tests/hub/test_hub.py::test_scorers_of_another_language_model_are_refused",),
    ),
    Fault(
        "files for code are downloaded",
        "grip_hf/hub/download.py",
        "if foreign := foreign_files(inside):",
        "if foreign := []:",
        ("tests/hub/test_hub.py::test_strange_files_are_refused_before_any_download_or_upload",),
    ),
    Fault(
        "budgets never change between steps",
        "grip_hf/training/supervised.py",
        'moment = f"{self.args.seed}/{self.state.global_step}"',
        'moment = f"{self.args.seed}"',
        ("tests/training/test_training_warmup.py",),
    ),
    Fault(
        "warm-up learns the worse of two targets",
        "grip_hf/training/warmup.py",
        "better = spread_kl < top_kl",
        "better = spread_kl > top_kl",
        ("tests/training/test_training_warmup.py",),
    ),
    Fault(
        "draws of the relaxation mix up rows",
        "grip_hf/training/relaxed.py",
        "value.repeat(self.draws, *[1] * (value.ndim - 1))",
        "value.repeat_interleave(self.draws, 0)",
        ("tests/training/test_training_relaxed.py",),
    ),
    Fault(
        "a group is scored under one budget",
        "grip_hf/training/policy.py",
        "distinct, group = asked.unique(dim=0, return_inverse=True)",
        "asked[:, 1] = asked[:, 1].max()\n        distinct, group = asked.unique(dim=0, return_inverse=True)",
        ("tests/training/test_training_policy.py",),
    ),
    Fault(
        "completions are cut at the smallest budget",
        "grip_hf/training/grpo.py",
        "count_kept(num_actions, budgets.high)",
        "count_kept(num_actions, budgets.low)",
        ("tests/training/test_training_grpo.py",),
    ),
    Fault(
        "KL is taken the other way round",
        "grip_hf/frozen/store.py",
        "kl = (full.exp() * (full - pruned))",
        "kl = (pruned.exp() * (pruned - full))",
        ("tests/frozen/test_vlm.py",),
    ),
    Fault(
        "trainings do not widen the interval",
        "grip_hf/evaluation/metrics.py",
        "math.hypot(examples, trainings)",
        "examples",
        ("tests/evaluation/test_evaluation_metrics.py",),
    ),
    Fault(
        "a slower point lies on the frontier",
        "grip_hf/evaluation/pareto.py",
        "point.accuracy > best[-1].accuracy",
        "point.accuracy >= best[-1].accuracy",
        ("tests/evaluation/test_pareto.py",),
    ),
    Fault(
        "a smaller picture's tokens lie at the corners of their cells",
        "grip_hf/evaluation/downsampling.py",
        "((2 * axis + 1) * full // (2 * side)",
        "(2 * axis * full // (2 * side)",
        ("tests/evaluation/test_downsampling.py",),
    ),
    Fault(
        "dropped tokens count in the loss of the experts",
        "grip_hf/engine/routing.py",
        "held = step.keep & step.call.real",
        "held = step.call.real",
        ("tests/engine/test_router_loss.py",),
    ),
    Fault(
        "shifted labels are read where they stand",
        "grip_hf/engine/reading.py",
        "return torch.nn.functional.pad(shifted[:, :-1], (1, 0), value=IGNORED)",
        "return shifted",
        ("tests/training/test_trainers.py::test_labels_that_are_shifted_already",),
    ),
    Fault(
        "packed rows with another window in sliding layers are taken",
        "grip_hf/engine/reading.py",
        "return not bool(((seen[upstream.FULL] != seen[upstream.SLIDING]) & near).any())",
        "return True",
        ("tests/engine/test_calls.py::test_packed_sequences_stay_apart[sdpa-gemma3]",),
    ),
    Fault(
        "packed rows that see each other in the given mask are taken",
        "grip_hf/engine/reading.py",
        "if any(bool((one & apart).any()) for one in seen.values()):",
        "if False:",
        ("tests/engine/test_plan.py",),
    ),
    Fault(
        "an adapter's scorer is not compared",
        "grip_hf/hub/adapter_part.py",
        'same = mine is not None and mine["scorer"] == part.scorer',
        "same = mine is not None",
        ("tests/hub/test_adapters.py",),
    ),
    Fault(
        "more rows of a stream are taken than are wanted",
        "grip_hf/frozen/streaming.py",
        "yield table.slice(0, left)",
        "yield table",
        ("tests/frozen/test_streaming.py",),
    ),
    Fault(
        "encoded pictures of another model are taken",
        "grip_hf/frozen/shared.py",
        "{some.float().tolist()}",
        "{len(some)}",
        ("tests/frozen/test_shared.py",),
    ),
)
