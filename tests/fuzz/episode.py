"""One engine and what befalls it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import torch
from fuzz.alone import Alone
from fuzz.asks import draw_ask
from fuzz.held import Patient
from fuzz.model import FuzzModel
from fuzz.parts import Parts, spoil
from fuzz.rows import MOMENT, NAN, Judge, Row
from fuzz.settings import draw_setting

from paged_core import Engine, EngineDeadError, FinishReason, InvalidRequestError, SamplingParams
from paged_core.scheduling.block_pool import NULL_BLOCK
from paged_core.scheduling.request import Request

_CROWD = 12  # requests under way; who comes then waits outside
_PATIENCE = 3000  # steps in which everything must have ended


class Episode:
    """Episode ``number`` of ``seed``. ``counts``: how often what has happened."""

    def __init__(self, seed: int, number: int, alone: Alone, counts: Counter[str]) -> None:
        self._seed, self._name = seed, f"{seed}.{number}"
        self._alone, self._counts = alone, counts
        setting = draw_setting(random.Random(self._name))
        self._kind, self._config = setting.kind, setting.config
        self._model, self._parts = FuzzModel(setting.kind), Parts()
        self._engine = Engine(self._model, setting.config, plugins=[self._parts])
        self._judge = Judge(alone, setting.kind)
        self._rows: dict[object, Row] = {}  # that have not ended
        self._owners: dict[str, list[Request]] = {}  # all rows, by salt
        self._beam_steps: dict[str, list[list[int]]] = {}  # what rows were that now go on from others
        self._looked_at: set[tuple[object, int]] = set()
        self._told: list[list[int]] = []
        self._num_asked = 0
        self.place: int | None = None  # of the operation under way; None: it comes to its end

    def __str__(self) -> str:
        return f"episode {self._name}: {self._kind}, {self._config}"

    # ---- operations ----------------------------------------------------------------------------------------------

    def run(self, places: Iterable[int]) -> None:
        """Operations ``places``, then on to the end of all requests."""
        for place in places:
            rnd = random.Random(f"{self._name}.{place}")
            (operation,) = rnd.choices(_OPERATIONS = {  # and how often they come
    Episode._step: 45,
    Episode._arrive: 30,
    Episode._answer: 5,
    Episode._cancel: 4,
    Episode._stop: 3,
    Episode._look: 2,
    Episode._spoil: 3,
    Episode._arrive_as_group: 3,
    Episode._preempt_held: 1,
    Episode._raise_for_a_moment: 1,
    Episode._nan_for_a_moment: 1,
    Episode._lack_memory: 2,
    Episode._lack_memory_to_choose: 2,
    Episode._change_weights: 3,
    Episode._release_memory: 2,
    Episode._let_all_end: 1,
}
