"""SplitLinear: one rank's part of a linear layer, with the ranks' communication before and after it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class SplitLinear(nn.Linear):
    """Computes ``after(before(x) @ weight.T + bias)``.

    If the layer's inputs are split over ranks, their products are added up afterwards, and only one rank has the bias.
    If its outputs are split, they may be gathered. Code that replaces linear layers may replace the product, if it
    still calls ``before`` and ``after``.

    Args:
        linear: holds this rank's weights, which this layer takes over.
        after: ``[..., out] -> [..., *]``
        before: ``[..., *] -> [..., in]``; None: x is already this rank's part.
    """

    def __init__(
        self,
        linear: nn.Linear,
        after: Callable[[Tensor], Tensor],
        before: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = linear.weight, linear.bias
        self.out_features, self.in_features = linear.weight.shape
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.before is None else self.before(x)
        return self.after(nn.functional.linear(x, self.weight, self.bias))
