"""A small decoder-only transformer that predicts the next character of Shakespeare, and how it is trained."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from conjugo.errors import DataUnavailable
from conjugo.optim.schedules import WarmupCosine
from conjugo.studies.records import Outcome, Task
from conjugo.studies.reproduce.frontier_plan import Setting

__all__ = ["CharTransformer", "Text", "load_text", "train_text"]

CONTEXT = 16
"""Characters of a sequence, each of which is to predict the next one."""

WARMUP = 0.1
"""Fraction of the steps."""


class CharTransformer(nn.Module):
    """Pre-norm blocks of causal attention and a perceptron four times as wide, with learnt positions.

    vocabulary: number of characters. width: of the residual stream, a multiple of *heads*. Logits [B, T, vocabulary] of
    characters int64 [B, T], T <= *context*.
    """

    def __init__(
        self, vocabulary: int, *, width: int = 64, heads: int = 4, blocks: int = 2, context: int = CONTEXT
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits."""
        positions = torch.arange(characters.shape[1], device=characters.device)
        x = self.blocks(self.embedding(characters) + self.positions(positions))
        logits: Tensor = self.head(self.norm(x))
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        parts = self.query_key_value(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, t, width))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


@dataclass(frozen=True, eq=False)
class Text:
    """Characters as int64 numbers below *vocabulary*: the first nine tenths to train, the rest to test."""

    train: Tensor
    test: Tensor
    vocabulary: int


@lru_cache(maxsize=1)
def load_text() -> Text:
    """``text/tinyshakespeare.txt`` in the folder that CONJUGO_DATA names; raises DataUnavailable."""
    folder = os.environ.get("CONJUGO_DATA")
    path = None if folder is None else Path(folder) / "text" / "tinyshakespeare.txt"
    if path is None or not path.exists():
        raise DataUnavailable("text/tinyshakespeare.txt is not in the folder that CONJUGO_DATA names")
    characters = path.read_text(encoding="utf-8")
    known = {character: i for i, character in enumerate(sorted(set(characters)))}
    numbers = torch.tensor([known[character] for character in characters])
    count = 9 * len(numbers) // 10
    return Text(numbers[:count], numbers[count:], len(known))


def split(text: Text, setting: Setting, *, tune: bool) -> tuple[Tensor, Tensor]:
    """What to train on, and sequences [n, CONTEXT + 1] to evaluate: of the end of the training text, or of the test text."""
    held_out = round(setting.validation * len(text.train)) if tune else 0
    train = text.train[: len(text.train) - held_out]
    rest = text.train[len(train) :] if tune else text.test
    count = min(setting.test_size, len(rest) // (CONTEXT + 1))
    starts = torch.linspace(0, len(rest) - CONTEXT - 1, count).long()
    return train, rest[starts[:, None] + torch.arange(CONTEXT + 1)]


def loss_of(model: nn.Module, sequences: Tensor) -> Tensor:
    """Mean cross-entropy (0-d) of all but the first character of each of *sequences* [n, CONTEXT + 1]."""
    return F.cross_entropy(model(sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten())


def draw(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """*count* sequences [count, CONTEXT + 1] from anywhere in *text*."""
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)]


@torch.no_grad()
def evaluate(model: nn.Module, sequences: Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and the fraction of next characters that are predicted."""
    logits = model(sequences[:, :-1]).flatten(0, 1)
    targets = sequences[:, 1:].flatten()
    return F.cross_entropy(logits, targets).item(), (logits.argmax(1) == targets).float().mean().item()


def train_text(
    model: CharTransformer, optimizer: Optimizer, text: Text, setting: Setting, task: Task, *, steps: int
) -> Outcome:
    """Train *model* on random sequences; the batches are drawn by the seed of *task*, the same for all contenders.

    The rate warms up in a tenth of the steps and follows half a cosine to 0. A loss that is not finite ends the run.
    """
    tune = task.phase == "tune"
    train, sequences = split(text, setting, tune=tune)
    generator = torch.Generator().manual_seed(task.seed)
    schedule = WarmupCosine(optimizer, int(WARMUP * steps), steps)
    count = 1 if tune else setting.evaluations
    marks = {round(steps * k / count) for k in range(1, count + 1)}
    seconds, step, diverged = 0.0, 0, False
    curve: list[tuple[int, float]] = []
    result = evaluate(model, sequences)
    while step < steps and not diverged:
        started = time.perf_counter()
        loss = loss_of(model, draw(train, setting.batch_size, generator))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        diverged = not math.isfinite(loss.item())
        if not diverged:
            optimizer.step()
        schedule.step()
        step += 1
        seconds += time.perf_counter() - started
        if step in marks or diverged:
            result = evaluate(model, sequences)
            curve.append((step, result[1]))
    return Outcome(
        steps=step,
        samples=step * setting.batch_size,
        accuracy=result[1],
        loss=result[0] if math.isfinite(result[0]) else None,
        diverged=diverged,
        seconds=seconds,
        curve=tuple(curve),
    )
