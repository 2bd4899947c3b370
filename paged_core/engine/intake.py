"""Intake: makes Requests of the arguments of ``add_request``: checked, seeded, and with all their logits processors."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace

from paged_core.engine.checks import check_prompt, check_token_ids
from paged_core.execution.model import PagedModel, TokenSelector
from paged_core.plugins import Plugins
from paged_core.scheduling.params import SamplingParams, for_row
from paged_core.scheduling.request import Group, Request


class Intake:
    """Makes the rows of requests for one model.

    Args:
        model: the model that will compute them.
        manager: the plugins, which may bring logits processors.
        seed: from which the seeds of requests without one are drawn.
    """

    def __init__(self, model: PagedModel, manager: Plugins, seed: int | None) -> None:
        self._model = model
        self._spec = model.spec
        self._manager = manager
        self._seeds = random.Random(seed)

    def rows(
        self,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        selector: TokenSelector | None,
        lockstep: bool,
        eos_token_ids: Collection[int],
    ) -> list[Request]:
        """Return a row for each of ``prompts``, which are all the same unless they advance in ``lockstep``.

        Raises:
            InvalidRequestError: a prompt is empty, or an id is outside the vocabulary.
        """
        for prompt in prompts if lockstep else prompts[:1]:
            check_prompt(prompt, self._spec.vocab_size, self._model.knows)
        check_token_ids(params, self._spec.vocab_size)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        stops = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stops = stops.union(self._spec.eos_token_ids, eos_token_ids)
        group = Group(lockstep)
        for index, prompt in enumerate(prompts):
            Request(
                request_id,
                prompt,
                params,
                index=index,
                group=group,
                seed=seed,
                stop_token_ids=stops,
                selector=selector,
            )
        for request in group.members:
            self._add_processors(request)
        return list(group.members)

    def _add_processors(self, request: Request) -> None:
        answers = [p for p in self._manager.hook.create_logits_processor(request=request) if p is not None]
        asked = request.params.logits_processors
        own = [for_row(each, request) for each in asked]
        if answers or own != list(asked):
            request.params = replace(request.params, logits_processors=(*own, *answers))
