"""A subscriber written against vLLM's published format (its kv_events_subscriber example) follows our engine."""

from __future__ import annotations

import socket
from typing import Any

import msgspec
import pytest
import zmq

from free_ports import free_ports
from paged_core import ConfigError, Engine, EngineConfig, SamplingParams
from paged_serving import KVEvents
from tiny_model import TinyModel

LIMIT_MS = 30_000
KINDS = {"array": {"array_like": True}, "map": {}}


class Client:
    """Knows the format only: frames, structs, the replay socket."""

    def __init__(self, form: str, events: str, replay: str) -> None:
        kind: dict[str, Any] = {"omit_defaults": True, **KINDS[form]}
        stored = msgspec.defstruct(
            "BlockStored",
            [("block_hashes", list[int]), ("parent_block_hash", int | None), ("token_ids", list[int]),
             ("block_size", int), ("lora_id", int | None), ("medium", str | None)],
            tag=True, **kind,
        )  # fmt: skip
        removed = msgspec.defstruct(
            "BlockRemoved", [("block_hashes", list[int]), ("medium", str | None)], tag=True, **kind
        )
        cleared = msgspec.defstruct("AllBlocksCleared", [], tag=True, **kind)
        batch = msgspec.defstruct("KVEventBatch", [("ts", float), ("events", list[stored | removed | cleared])], **kind)
        self._decode = msgspec.msgpack.Decoder(batch).decode
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.connect(events)
        self._sub.setsockopt_string(zmq.SUBSCRIBE, "kv@")
        self._replay = self._context.socket(zmq.DEALER)  # a REQ socket would take the first of the answers only
        self._replay.connect(replay)
        self.sizes: dict[int, list[int]] = {}  # block -> its tokens
        self.parents: dict[int, int | None] = {}

    def close(self) -> None:
        self._context.destroy(linger=0)

    def receive(self) -> int:
        """The next batch, taken in. Returns its number."""
        assert self._sub.poll(LIMIT_MS), "nothing was published"
        _, number, payload = self._sub.recv_multipart()
        self.take_in(payload)
        return int.from_bytes(number, "big")

    def repeat(self, first: int) -> list[int]:
        """All batches from ``first`` on, taken in. Returns their numbers."""
        self._replay.send_multipart((b"", first.to_bytes(8, "big")))
        numbers = []
        while True:
            assert self._replay.poll(LIMIT_MS), "nothing was repeated"
            _, told, payload = self._replay.recv_multipart()
            number = int.from_bytes(told, "big", signed=True)
            if number == -1:
                return numbers
            self.take_in(payload)
            numbers.append(number)

    def take_in(self, payload: bytes) -> None:
        for event in self._decode(payload).events:
            kind = type(event).__name__
            if kind == "BlockStored":
                parent, size = event.parent_block_hash, event.block_size
                for i, block in enumerate(event.block_hashes):
                    self.sizes[block] = event.token_ids[i * size : (i + 1) * size]
                    self.parents[block], parent = parent, block
            elif kind == "BlockRemoved":
                for block in event.block_hashes:
                    del self.sizes[block]
            else:
                self.sizes.clear()

    def text_of(self, block: int) -> list[int]:
        """The tokens that a block stands for: its own after its parents'."""
        parent = self.parents[block]
        return ([] if parent is None else self.text_of(parent)) + self.sizes[block]


def answer(engine: Engine, name: str, prompt: list[int]) -> None:
    engine.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    while engine.has_work:
        engine.step()


@pytest.mark.parametrize("form", ["array", "map"])
def test_a_published_client_follows_the_prefix_cache_and_has_repeated_what_it_missed(tmp_path, form):
    addresses = f"ipc://{tmp_path}/events", f"ipc://{tmp_path}/replay"
    events = KVEvents(*addresses, topic="kv@here", form=form)
    engine = Engine(
        TinyModel(), EngineConfig(num_blocks=8, block_size=4, attention_backend="reference"), plugins=[events]
    )
    client = Client(form, *addresses)
    try:
        prompt = list(range(1, 14))
        answer(engine, "first", prompt)  # who subscribes late asks for what came before
        assert client.repeat(0)[0] == 0
        assert sorted(map(tuple, client.sizes.values())) == [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12)]
        assert client.text_of(next(b for b, t in client.sizes.items() if t == [9, 10, 11, 12])) == prompt[:12]
        for number in range(3):  # more than the cache holds: blocks are evicted, and told so
            answer(engine, f"more {number}", [20 + number] * 13)
        numbers = [client.receive()]
        while len(client.sizes) != engine.memory.num_blocks_cached or numbers[-1] < 3:
            numbers.append(client.receive())
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert engine.release_memory()
        client.receive()
        assert client.sizes == {}
    finally:
        client.close()
        events.close()


def test_an_address_in_use_and_a_form_that_is_none_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match="array or map"):
        KVEvents(f"ipc://{tmp_path}/a", form="xml")
    port = free_ports(1)[0]
    with socket.create_server(("0.0.0.0", port)), pytest.raises(ConfigError, match=f"{port}.*choose another address"):
        KVEvents(f"tcp://*:{port}")
