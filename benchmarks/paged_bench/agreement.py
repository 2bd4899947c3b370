"""Whether two systems chose the same tokens, and where they first differ. Knows token ids, not models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from paged_bench.results import Sample
from paged_bench.workloads import BenchRequest

Samples = Mapping[int, Sequence[Sample]]


@dataclass(frozen=True)
class Difference:
    """The first token at which one request's output leaves the reference."""

    index: int  # of the request
    position: int  # of the output token, from 0
    token_id: int | None  # None: the output ended here
    reference_id: int | None
    margin: float | None = None  # stock logits at that prefix: the likeliest token's minus the second's
    gap: float | None = None  # stock logits at that prefix: the reference's token minus ours


@dataclass(frozen=True)
class Agreement:
    """One system against the reference."""

    system: str
    num_compared: int  # requests that both ran
    differences: tuple[Difference, ...]

    @property
    def num_identical(self) -> int:
        return self.num_compared - len(self.differences)

    @property
    def fraction(self) -> float | None:
        return self.num_identical / self.num_compared if self.num_compared else None


Margins = Callable[[list[tuple[tuple[int, ...], int, int]]], list[tuple[float, float]]]
"""For (prefix, reference token, other token) each: (margin, gap) of the stock model's logits after the prefix."""


def reference_of(systems: Mapping[str, Samples]) -> tuple[dict[int, tuple[str, Sequence[Sample]]], str]:
    """The reference and its tokens for each request, and a description of the references: stock one at a time if it ran
    the request, else stock in static batches."""
    ranked = [name for name in systems if name == "hf-sequential"]
    ranked += [name for name in systems if name.startswith("hf-static")]
    reference: dict[int, tuple[str, Sequence[Sample]]] = {}
    parts = []
    for name in ranked:
        new = {index: (name, samples) for index, samples in systems[name].items() if index not in reference}
        reference |= new
        if new:
            parts.append(f"{name} ({len(new)} requests)")
    return reference, ", else ".join(parts)


def compare(
    system: str,
    samples: Samples,
    reference: Mapping[int, tuple[str, Sequence[Sample]]],
    requests: Sequence[BenchRequest],
    margins: Margins,
) -> Agreement:
    """Compares a system with the reference; requests for which it is the reference itself aren't counted."""
    prompts = {request.index: request.prompt for request in requests}
    compared = [index for index in samples if index in reference and reference[index][0] != system]
    found = []
    for index in compared:
        ours, theirs = samples[index][0].token_ids, reference[index][1][0].token_ids
        difference = first_difference(index, ours, theirs)
        if difference is not None:
            found.append((difference, prompts[index] + theirs[: difference.position]))
    measurable = [
        (prefix, d.reference_id, d.token_id)
        for d, prefix in found
        if d.reference_id is not None and d.token_id is not None
    ]
    measured = iter(margins(measurable) if measurable else ())
    differences = []
    for difference, _ in found:
        if difference.reference_id is not None and difference.token_id is not None:
            margin, gap = next(measured)
            difference = replace(difference, margin=margin, gap=gap)
        differences.append(difference)
    return Agreement(system, len(compared), tuple(differences))


def first_difference(index: int, ours: Sequence[int], theirs: Sequence[int]) -> Difference | None:
    """None if the two are the same to the end."""
    for position, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if our != their:
            return Difference(index, position, our, their)
    if len(ours) == len(theirs):
        return None
    end = min(len(ours), len(theirs))
    return Difference(index, end, ours[end] if end < len(ours) else None, theirs[end] if end < len(theirs) else None)
