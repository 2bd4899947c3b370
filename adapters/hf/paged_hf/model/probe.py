"""The probe examines a model: the facts of each attention call, and whether packing requests together changes the
answer. It runs a few tokens in three ways: as stock does, once recording every argument of every attention call, and
once as the engine will (two prompts in one row, in two chunks, K/V kept outside the model). It refuses a model that it
can't verify, with a reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paged_core import LayerSpec, UnsupportedModel
from paged_hf.model.attention import PAGED, PROBE, PROBE_WITH_MASKS, CountedAttend
from paged_hf.model.dense import DenseAttend
from paged_hf.model.masks import FAR, WIDEST, causal_until, window_of
from paged_hf.model.rounding import Widened, difference, narrow_dtype, tolerance, usual_difference
from paged_hf.model.shadow import Shadow

ForwardPass = Callable[..., Tensor]
"""``call(token_ids [T], positions [T], step | None) -> logits [T, vocab]``: one forward pass of the twin."""

AsStock = Callable[[Tensor, Tensor], Tensor]
"""``as_stock(token_ids [B,T], positions [T]) -> logits [B,T,vocab]``: the same, over a cache of the model's own."""

_LENGTHS, _SPLITS = (13, 21), (6, 12)  # lengths of the two prompts, and where their second chunk begins
_SHORT_LENGTHS, _SHORT_SPLITS = (5, 9), (2, 5)  # the same for models whose tokens take long
_LARGE = 1 << 25  # parameters. Smaller models (tests) have windows that short prompts would not exceed
_KEPT_BYTES = 1 << 27  # of weights kept as float32 for the second reading; more would raise the process's peak
_NOISIEST = 0.2  # mean error / deviation of the logits, for models that are noisy by themselves: at most
_KNOWN = frozenset(  # arguments of an attention call that are honoured, or have no effect here
    {"dropout", "scaling", "sliding_window", "softcap", "s_aux", "key_bias", "is_causal", "position_ids", "use_cache"}
    | {"output_attentions", "output_hidden_states", "return_dict", "cache_position", "logits_to_keep"}
)


@dataclass(frozen=True)
class Findings:
    layers: tuple[LayerSpec, ...]
    vocab_size: int
    dtype: torch.dtype  # of K/V
    max_length: int  # up to which its masks agree with the layers' facts


def probe(shadow: Shadow, call: ForwardPass, as_stock: AsStock, vocab_size: int, device: torch.device) -> Findings:
    """Examine the model behind ``call`` and ``as_stock``, and leave it switched to paged attention.

    Raises:
        UnsupportedModel: with the reason.
    """
    generator = torch.Generator().manual_seed(0)
    is_large = sum(parameter.numel() for parameter in shadow.root.parameters()) >= _LARGE
    lengths, splits = (_SHORT_LENGTHS, _SHORT_SPLITS) if is_large else (_LENGTHS, _SPLITS)
    prompts = [torch.randint(vocab_size, (n,), generator=generator).to(device) for n in lengths]
    expected, exactly = _by_itself(shadow, as_stock, prompts)
    recorder = _record(shadow, call, prompts[1])
    layers = tuple(recorder.layers)
    shadow.use_attention(PAGED)
    with exactly:
        together = _in_chunks(call, layers, prompts, splits)
        error = max(difference(got, want) for got, want in zip(together, expected, strict=True))
        if not error <= tolerance(expected[0].dtype):
            _explain(shadow, call, layers, prompts[1], expected[1], error)
    return Findings(layers, expected[0].shape[-1], recorder.dtype, recorder.max_length)


def _by_itself(
    shadow: Shadow, as_stock: AsStock, prompts: Sequence[Tensor]
) -> tuple[list[Tensor], contextlib.AbstractContextManager[Any]]:
    """Logits of each prompt by the model's own attention, in float32 if possible, because there any difference is an
    error. Also returns the context for computing so."""
    shadow.use_attention(None)
    ways: list[contextlib.AbstractContextManager[Any]] = [contextlib.nullcontext()]
    if narrow_dtype(shadow.root) is not None:
        ways.insert(0, Widened(_KEPT_BYTES))
    for way in ways:
        try:
            with way:
                return _in_a_batch(as_stock, prompts), way
        except UnsupportedModel:
            raise
        except Exception as error:
            failure = error
    raise UnsupportedModel(f"its own forward fails on a plain prompt: {failure!r}") from failure


def _in_a_batch(as_stock: AsStock, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Logits [T, vocab] of each prompt, as stock's rows, the shorter ones padded on the right. Code that acts on one
    row, or on the last token of each, acts at other places here than when prompts are packed."""
    longest = max(prompts, key=len)
    batch = torch.stack([torch.cat([ids, longest[len(ids) :]]) for ids in prompts])  # [B,L]
    logits = as_stock(batch, _positions(longest))  # [B,L,vocab]
    return [own[: len(ids)] for own, ids in zip(logits, prompts, strict=True)]


def _explain(
    shadow: Shadow, call: ForwardPass, layers: Sequence[LayerSpec], ids: Tensor, expected: Tensor, error: float
) -> None:
    """Raise for an error above tolerance, unless the model is as inexact under stock: 8-bit activations, for example,
    are rounded depending on the rest of the batch."""
    half = ids.numel() // 2
    shadow.use_attention(None)
    noise = usual_difference(call(ids[:half], _positions(ids[:half]), None), expected[:half])
    shadow.use_attention(PAGED)
    allowed = max(tolerance(expected.dtype), min(4 * noise, _NOISIEST))
    if error <= allowed:
        return
    alone = difference(_in_chunks(call, layers, [ids], [ids.numel()])[0], expected)
    cause = "with attention taken over" if not alone <= allowed else (
        "packed in chunks with another prompt (is there state outside attention?)"
    )  # fmt: skip
    raise UnsupportedModel(
        f"{cause}, its logits differ from its own forward's by {error:.2g} of their deviation (allowed: {allowed:.2g})"
    )


def _record(shadow: Shadow, call: ForwardPass, ids: Tensor) -> _Recorder:
    """Every attention call of one forward pass."""
    recorder: _Recorder | None = None
    for implementation in (PROBE_WITH_MASKS, PROBE):  # some models compute with the mask and can't take a marked one
        latest = _Recorder(_positions(ids), makes_masks=implementation == PROBE)
        shadow.use_attention(implementation)
        try:
            call(ids, _positions(ids), latest, ids.new_zeros(1))  # one row of logits is computed
        except UnsupportedModel:
            raise
        except Exception as error:
            if implementation == PROBE:
                raise UnsupportedModel(f"it can't run without an attention mask of its own: {error}") from error
            continue
        recorder = recorder or latest
        if not latest.strange_masks:
            break
    assert recorder is not None
    if not recorder.layers:
        raise UnsupportedModel("its attention doesn't go through transformers' attention interface")
    return recorder


class _Recorder(CountedAttend):
    """A CountedAttend that records the arguments of each attention call, and refuses what the engine can't honour."""

    __slots__ = ("dtype", "layers", "makes_masks", "max_length", "num_tokens", "strange_masks", "windows")

    def __init__(self, positions: Tensor, makes_masks: bool) -> None:
        self.num_tokens = positions.numel()
        self.makes_masks = makes_masks  # whether masks come from the model itself
        self.strange_masks = False  # whether a mask came that the model computes with
        self.max_length = FAR
        self.layers: list[LayerSpec] = []
        self.windows: dict[int, tuple[Any, int | None]] = {}  # by id of a mask's rule
        self.dtype = torch.float32
        super().__init__(self._attend, positions)

    def record(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, facts: dict[str, Any]
    ) -> None:
        where = f"attention call {len(self.layers)} ({type(module).__name__})"
        unknown = [
            name for name, value in facts.items() if name not in _KNOWN and value is not None and value is not False
        ]
        if unknown:
            raise UnsupportedModel(f"{where} needs {', '.join(unknown)}, which paged attention doesn't know")
        if facts.get("is_causal", getattr(module, "is_causal", True)) is False:
            raise UnsupportedModel(f"{where} isn't causal")
        if not (q.ndim == k.ndim == v.ndim == 4 and q.shape[2] == k.shape[2] == v.shape[2] == self.num_tokens):
            raise UnsupportedModel(
                f"{where} has queries {list(q.shape)}, keys {list(k.shape)}, values {list(v.shape)} "
                f"for {self.num_tokens} tokens"
            )
        if mask is not None and not hasattr(mask, "rule"):
            self.strange_masks = True
            if self.makes_masks:
                raise UnsupportedModel(f"{where} has a mask that the model makes itself")
        window = self._window(where, mask, facts.get("sliding_window"))
        scale = facts.get("scaling")
        self.dtype = k.dtype
        self.layers.append(
            LayerSpec(
                num_heads=q.shape[1],
                num_kv_heads=k.shape[1],
                head_dim=q.shape[3],
                value_head_dim=v.shape[3],
                scale=q.shape[3] ** -0.5 if scale is None else float(scale),
                device=q.device,
                sliding_window=window,
                softcap=facts.get("softcap"),
                has_sinks=facts.get("s_aux") is not None,
                has_key_bias=facts.get("key_bias") is not None,
            )
        )

    def _window(self, where: str, mask: Tensor | None, told: int | None) -> int | None:
        """The layer's window, from its argument and from the mask that stock would have used."""
        rule = getattr(mask, "rule", None)
        if rule is None:
            return None if told is None else int(told)
        if id(rule) not in self.windows:
            try:
                self.windows[id(rule)] = rule, self._judge(rule, where)
            except UnsupportedModel:
                raise
            except Exception:  # a rule made for this batch only: the comparison of logits has to suffice
                return None if told is None else int(told)
        window = self.windows[id(rule)][1]
        if told is not None and told != window and min(told, window or told) < WIDEST:
            raise UnsupportedModel(f"{where} is told sliding_window={told}, and its mask has {window}")
        return window if told is None else int(told)

    def _judge(self, rule: Any, where: str) -> int | None:
        try:
            return window_of(rule)
        except ValueError as error:
            chunk = causal_until(rule)
            if chunk is None:
                raise UnsupportedModel(f"{where} has a mask that {error}") from error
            self.max_length = min(self.max_length, chunk)
            return None

    def _attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, key_bias: Tensor | None = None
    ) -> Tensor:
        return DenseAttend(self.layers).run([self.num_tokens], layer, q, k, v, sinks, key_bias)


def _in_chunks(
    call: ForwardPass, layers: Sequence[LayerSpec], prompts: Sequence[Tensor], splits: Sequence[int]
) -> list[Tensor]:
    """Logits [T, vocab] of each prompt, all of them packed in one row, in two steps."""
    attend = DenseAttend(layers)
    logits: list[list[Tensor]] = [[] for _ in prompts]
    for first in (True, False):
        parts = [slice(0, at) if first else slice(at, None) for at in splits]
        lengths = [ids[part].numel() for ids, part in zip(prompts, parts, strict=True)]
        if not sum(lengths):
            continue
        positions = torch.cat([_positions(ids)[part] for ids, part in zip(prompts, parts, strict=True)])
        step = CountedAttend(attend.bind(lengths), positions)
        ids = torch.cat([ids[part] for ids, part in zip(prompts, parts, strict=True)])
        try:
            rows = call(ids, positions, step)
        except UnsupportedModel:
            raise
        except Exception as error:
            raise UnsupportedModel(f"its forward fails when two prompts stand in one row: {error!r}") from error
        if step.layer != len(layers):
            raise UnsupportedModel(
                f"it calls attention {len(layers)} times in one forward pass, {step.layer} in another"
            )
        for own, got in zip(logits, torch.split(rows, lengths), strict=True):
            own.append(got)
    return [torch.cat(own) for own in logits]


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.numel(), device=ids.device)
