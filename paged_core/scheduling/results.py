"""Takes in the selected tokens: appends one to each row, and ends the rows that are complete."""

from __future__ import annotations

from collections.abc import Sequence

from paged_core.scheduling.departures import Departures
from paged_core.scheduling.request import FinishReason, Request, RequestOutput, Selection


def take_in(rows: Sequence[Request], selection: Selection, departures: Departures) -> list[RequestOutput]:
    """Append each row's token, or hold the row until its selector's owner brings one. End the rows that are
    complete."""
    outputs: list[RequestOutput] = []
    errors, verdicts, logprobs = selection.errors or {}, selection.finished or {}, selection.logprobs
    for i, request in enumerate(rows):
        if request.finish_reason is not None:  # another row of its lockstep group has failed, and ended this one
            continue
        if i in errors:
            outputs.extend(departures.fail(request, errors[i]))
            continue
        token = selection.token_ids[i]
        if token is None:
            request.held = True
            continue
        request.tokens.append(token)
        reason = None
        if token in request.stop_token_ids:
            reason = FinishReason.STOP
        elif i in verdicts:
            reason = verdicts[i]
        elif len(request.tokens) >= request.max_total:
            reason = FinishReason.LENGTH
        if reason is not None:
            departures.end(request, reason)
        chosen = logprobs[i] if logprobs is not None else None
        outputs.append(RequestOutput(request, (token,), (chosen,) if chosen is not None else None, reason))
    return outputs
