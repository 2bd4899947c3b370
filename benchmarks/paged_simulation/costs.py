"""The cost of a step: seconds from a few integers. Fitted to real steps, or calculated from a card's data sheet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from paged_core import ConfigError


class StepSize(NamedTuple):
    """A step, as far as its time depends on it."""

    num_tokens: int  # computed
    num_rows: int  # that sample
    num_context: int  # tokens whose K/V are read, those of the step included


class CostModel(Protocol):
    """A cost model."""

    def step_s(self, step: StepSize) -> float:
        """Seconds of a step."""
        ...


@dataclass(frozen=True)
class LinearCosts:
    """A step has a fixed cost, and a cost per token, per row and per token of context. Tokens up to ``knee`` have
    another cost than those beyond, because reading the weights dominates small steps."""

    fixed_s: float
    token_s: float
    row_s: float
    context_s: float
    early_token_s: float = 0.0  # beside ``token_s``, of the first ``knee`` tokens
    knee: int = 64
    source: str = ""

    def step_s(self, step: StepSize) -> float:
        early = self.early_token_s * min(step.num_tokens, self.knee)
        return (self.fixed_s + early + self.token_s * step.num_tokens + self.row_s * step.num_rows
                + self.context_s * step.num_context)  # fmt: skip


@dataclass(frozen=True)
class CardCosts:
    """A step on one accelerator: the slower of reading the weights and of multiplying by them, then reading K/V."""

    weight_bytes: float
    kv_bytes: float  # of a token
    bytes_s: float  # achieved memory bandwidth, per second
    flops_s: float  # achieved
    parameters: float
    fixed_s: float = 0.0  # for launches, the scheduler and sampling
    source: str = ""

    def step_s(self, step: StepSize) -> float:
        weights = max(self.weight_bytes / self.bytes_s, 2 * self.parameters * step.num_tokens / self.flops_s)
        return self.fixed_s + weights + self.kv_bytes * step.num_context / self.bytes_s


# An 8B model in bfloat16 (K/V of 8 heads of 128 in 32 layers) on an H200: 4.8 TB/s and 989 TFLOPS by its data sheet, of
# which 80 % and 60 % are assumed to be achieved. Nothing of this was measured.
H200_8B = CardCosts(
    weight_bytes=16e9, kv_bytes=131072, bytes_s=0.8 * 4.8e12, flops_s=0.6 * 989e12, parameters=8e9, fixed_s=1.0e-3,
    source="H200, 8B in bfloat16: from data sheets, not measured",
)  # fmt: skip


def fit(steps: Sequence[tuple[StepSize, float]], source: str = "", knee: int = 64) -> LinearCosts:
    """The LinearCosts that come nearest to steps and their seconds, none of them negative. Relative errors are
    minimised, so that short steps fit as well as long ones; steps that took more than three times the fitted time are
    left out once.

    Raises:
        ConfigError: there are too few steps.
    """
    if len(steps) < 20:
        raise ConfigError(f"{len(steps)} steps are too few to fit costs to; run more requests")
    sizes = np.array([[1.0, s.num_tokens, s.num_rows, s.num_context, min(s.num_tokens, knee)] for s, _ in steps])
    seconds = np.array([took for _, took in steps])
    kept = np.ones(len(steps), dtype=bool)
    for _ in range(2):
        weights = _nonnegative(sizes[kept] / seconds[kept, None], np.ones(int(kept.sum())))
        kept = seconds < 3 * np.maximum(sizes @ weights, 1e-9)
    fixed, token, row, context, early = map(float, weights)
    return LinearCosts(fixed, token, row, context, early, knee, source)


def read(path: Path) -> CostModel:
    """A cost model from a JSON file that ``write`` has written, or that has the same fields.

    Raises:
        ConfigError: it holds no such costs.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = CardCosts if "weight_bytes" in fields else LinearCosts
        return kind(**fields)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} holds no costs: {error}; simulate.py fit writes such a file") from error


def write(costs: LinearCosts | CardCosts, path: Path) -> None:
    path.write_text(json.dumps(asdict(costs), indent=2) + "\n", encoding="utf-8")


def _nonnegative(sizes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative factors: negative ones are set to 0, the worst first."""
    factors = np.zeros(sizes.shape[1])
    used = list(range(sizes.shape[1]))
    while used:
        found, *_ = np.linalg.lstsq(sizes[:, used], wanted, rcond=None)
        if (found >= 0).all():
            factors[used] = found
            break
        used.pop(int(found.argmin()))
    return factors
