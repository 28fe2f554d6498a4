"""Does a learnt sense of doubt beat the probability of the answer? A small head, trained on the verdicts themselves.

    python -m grip_hf.calibration.draws answer --features --examples 1500 --seed 900 --output a.npz
    python -m grip_hf.calibration.head a.npz b.npz --latency small.json

The head sees the budget, the scores, the distributions of the tokens that were written, and the means of question and
picture; it is trained on one part of the scenes, and both senses are calibrated and tested on the other, on the same
rows in each draw.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy.stats import t
from torch import Tensor, nn

from ..quality.doubt import FIRST
from ..tables import Column, Table
from .bound import rows_needed
from .calibrate import SHARE
from .draws import answered_of, joined, times_of
from .features import NAMES, Features
from .ladder import Answered, Policy, certify, draw_up, outcome
from .observe import Array, Observed

EARLY = tuple(
    number for number, name in enumerate(NAMES) if "first token" in name or "kept" in name or "score" in name
)


class DoubtHead(nn.Module):
    """From features to the logit of "this answer is not the full model's".

    Args:
        answer_features: Number of features of an answer, its budget among them.
        row_features: Number of features of question and picture.
        width: Of the hidden layers.
    """

    def __init__(self, answer_features: int, row_features: int, width: int = 32) -> None:
        super().__init__()
        self.row = nn.Linear(row_features, 8)
        self.plain = nn.Linear(answer_features, 1)
        self.layers = nn.Sequential(
            nn.Linear(answer_features + 8, width), nn.GELU(), nn.Dropout(0.1),
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1),
        )  # fmt: skip
        last: Any = self.layers[-1]
        nn.init.zeros_(last.weight)  # it starts as a logistic regression, and has to learn what that lacks
        nn.init.zeros_(last.bias)

    def forward(self, answers: Tensor, rows: Tensor) -> Tensor:
        """[n] logits from answers [n, features] and rows [n, features], both float32."""
        logits: Tensor = self.plain(answers) + self.layers(torch.cat([answers, self.row(rows)], -1))
        return logits[:, 0]


def inputs(features: Features, chosen: Array, rule: str) -> tuple[Array, Array]:
    """Features of answers [budgets - 1, rows, ...] and of rows [rows, ...], float32; those known by the rule."""
    mine = features.rows(chosen)
    answers = mine.answers[:-1].copy()
    for number, name in enumerate(NAMES):  # what differs near 0 is told apart by its order of magnitude
        if "log p" in name or "entropy" in name:
            answers[..., number] = np.log(np.abs(answers[..., number]) + 1e-6)
    return (answers[..., EARLY] if rule == FIRST else answers), mine.rows_.astype(np.float32)


def train(seen: Observed, chosen: Array, rule: str, seed: int, steps: int = 400) -> Any:
    """Train a head on some rows; returns a function from rows to confidences [budgets, rows]."""
    assert seen.features is not None
    answers, rows = inputs(seen.features, chosen, rule)
    wrong = torch.tensor(answered_of(seen.rows(chosen), rule).losses[:-1], dtype=torch.float32)
    middle, spread = answers.mean((0, 1)), answers.std((0, 1)) + 1e-6
    row_middle, row_spread = rows.mean(0), rows.std(0) + 1e-6

    def ready(answers: Array, rows: Array) -> tuple[Tensor, Tensor]:
        budgets, count = answers.shape[:2]
        own = torch.tensor((answers - middle) / spread).float().clamp(-8, 8).reshape(budgets * count, -1)
        return own, torch.tensor((rows - row_middle) / row_spread).float().clamp(-8, 8).repeat(budgets, 1)

    torch.manual_seed(seed)
    own, other = ready(answers, rows)
    head = DoubtHead(own.shape[1], other.shape[1])
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    target = wrong.reshape(-1)
    for _ in range(steps):
        batch = torch.randint(len(target), (1024,))
        loss = nn.functional.binary_cross_entropy_with_logits(head(own[batch], other[batch]), target[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    head.eval()

    @torch.no_grad()
    def confidences(chosen: Array) -> Array:
        assert seen.features is not None
        answers, rows = inputs(seen.features, chosen, rule)
        found = torch.sigmoid(-head(*ready(answers, rows))).reshape(answers.shape[:2]).double().numpy()
        return np.concatenate([found, np.ones((1, len(chosen)))])

    return confidences


def auroc(confidences: Array, losses: Array) -> float:
    """How well confidence tells agreement from disagreement: the chance that of two answers it picks the right one."""
    from scipy.stats import rankdata

    wrong = losses > 0
    ranks = rankdata(confidences)
    right, bad = int((~wrong).sum()), int(wrong.sum())
    return float((ranks[~wrong].sum() - right * (right + 1) / 2) / (right * bad)) if right and bad else float("nan")


def main(
    files: Annotated[list[Path], typer.Argument(help="What was answered, with --features.")],
    train_share: Annotated[float, typer.Option(help="Share of the scenes that train the head.")] = 0.5,
    draws: Annotated[int, typer.Option(min=2, help="How often.")] = 20,
    rows: Annotated[int, typer.Option(min=3, help="Scenes to calibrate on.")] = 1500,
    qualities: Annotated[str, typer.Option(help="What to promise.")] = "0.97,0.98,0.99",
    confidence: Annotated[float, typer.Option(help="How sure each promise is to be.")] = 0.95,
    rule: Annotated[str, typer.Option(help="What an answer is judged by.")] = "answer",
    seed: Annotated[int, typer.Option(min=0, help="Of everything.")] = 0,
    latency: Annotated[Path | None, typer.Option(help="File of `grip-hf bench --json`: what budgets cost.")] = None,
) -> None:
    """Compare the head with the plain probability, both calibrated alike."""
    seen = joined([Observed.load(file) for file in files])
    if seen.features is None:
        raise typer.BadParameter("the files have no features: answer with --features")
    if latency is not None:
        times = times_of(json.loads(latency.read_text(encoding="utf-8")), seen.budgets)
        seen = dataclasses.replace(seen, seconds=np.array(times.ttft) - times.vision)
    rng = np.random.default_rng(seed)
    learn, rest = np.split(rng.permutation(len(seen)), [round(train_share * len(seen))])
    doubt = train(seen, learn, rule, seed)
    plain = answered_of(seen.rows(rest), rule)
    learnt = dataclasses.replace(plain, confidences=doubt(rest))
    for number, one in enumerate(seen.budgets[:-1]):
        areas = [auroc(each.confidences[number], plain.losses[number]) for each in (plain, learnt)]
        typer.echo(f"AUROC at {one}: probability {areas[0]:.3f}, head {areas[1]:.3f}")
    found: list[dict[str, Any]] = []
    orders = [rng.permutation(len(rest)) for _ in range(draws)]
    for quality in map(float, qualities.split(",")):
        if rows - round(SHARE * rows) < rows_needed(1 - quality, confidence):
            raise typer.BadParameter(f"--rows {rows} cannot promise {quality}")
        made = [[_cost(each, order, rows, quality, confidence) for order in orders] for each in (plain, learnt)]
        gap = np.array([a["seconds"] - b["seconds"] for a, b in zip(*made, strict=True)])
        base = np.mean([one["seconds"] for one in made[0]])
        half = float(t.ppf(0.975, draws - 1) * gap.std(ddof=1) / np.sqrt(draws))
        line: dict[str, Any] = {"quality": quality, "saved": float(gap.mean() / base), "half": float(half / base)}
        for name, each in zip(("plain", "head"), made, strict=True):
            line |= {f"{name}_{key}": float(np.mean([one[key] for one in each])) for key in each[0]}
        found.append(line)
    columns = (
        Column("promised", "quality", "{:.1%}"),
        Column("probability: tokens", "plain_tokens", "{:.1f}"),
        Column("agreement", "plain_agreement", "{:.2%}"),
        Column("head: tokens", "head_tokens", "{:.1f}"),
        Column("agreement", "head_agreement", "{:.2%}"),
        Column("time saved", "saved", "{:.1%}"),
        Column("± 95 %, over draws", "half", "{:.1%}"),
    )
    title = f"{draws} draws of {rows} of {len(rest)} scenes; head trained on {len(learn)} others; rule: {rule}"
    typer.echo(Table(columns, found, title).markdown())


def _cost(seen: Answered, order: Array, rows: int, quality: float, confidence: float) -> dict[str, float]:
    known, fresh = seen.rows(order[:rows]), seen.rows(order[rows:])
    first = round(SHARE * rows)
    path = draw_up(known.rows(np.arange(first)))
    passed = certify(path, known.rows(np.arange(first, rows)), 1 - quality, confidence)
    made = outcome(passed[0] if passed else Policy((len(seen.losses) - 1,), ()), fresh)
    return {
        "tokens": float(made.tokens.mean()),
        "seconds": float(made.seconds.mean()),
        "agreement": 1 - float(made.losses.mean()),
    }


if __name__ == "__main__":
    typer.run(main)
