"""SplitLinear: one rank's part of a linear layer, with what the ranks do together before and after it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class SplitLinear(nn.Linear):
    """``after(before(x) @ weight.T + bias)``.

    A layer whose inputs are split over ranks adds up their products afterwards; its bias is one rank's alone. A layer
    whose outputs are split may gather them. What knows linear layers may take the product for its own, if it does the
    rest too.

    Args:
        linear: has this rank's weights; they become this layer's, as they are.
        after: ``[..., out] -> [..., *]``
        before: ``[..., *] -> [..., in]``; None: x is this rank's own already.
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
