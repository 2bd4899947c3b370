"""Digester: computes the digests by which the prefix cache, tiers and other processes find blocks."""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Sequence
from hashlib import blake2b

_DIGEST_BYTES = 16


class Digester:
    """Keyed blake2b of (parent digest, token ids): a digest covers its block's token ids and all before them.

    Args:
        block_size: tokens of a full block.
        key: 32 secret bytes that digests are made with. Pass one if other processes must find the same digests. None:
            random bytes.
        vocab_size: token ids from here on mean something in this process only, and so do digests of blocks that hold
            them. None: there are no such ids.
    """

    def __init__(self, block_size: int, key: bytes | None = None, vocab_size: int | None = None) -> None:
        self._block_size = block_size
        self._own_key = secrets.token_bytes(32)  # random, so that nobody can choose prompts whose digests collide
        self._key = key or self._own_key
        self._vocab_size = vocab_size

    def extend(self, digests: list[bytes], tokens: Sequence[int], salt: str | None) -> None:
        """Append the digests of the full blocks of ``tokens`` that ``digests`` lacks. Requests with different salts
        have no digest in common."""
        size = self._block_size
        for start in range(len(digests) * size, len(tokens) - size + 1, size):
            digests.append(self._digest(_parent(digests, salt), tokens[start : start + size]))

    def private(self, digests: Sequence[bytes], tokens: Sequence[int], salt: str | None, owner: str) -> bytes:
        """Return a digest of ``tokens`` after the blocks of ``digests`` that only ``owner``, in this process, can
        make."""
        parent = _parent(digests, salt)
        return self._digest(blake2b(parent + owner.encode(), key=self._own_key).digest(), tokens)

    def _digest(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        content = array("q", tokens).tobytes()
        if self._vocab_size is not None and max(tokens) >= self._vocab_size:
            content += self._own_key
        return blake2b(parent + content, digest_size=_DIGEST_BYTES, key=self._key).digest()


def _parent(digests: Sequence[bytes], salt: str | None) -> bytes:
    return digests[-1] if digests else (salt or "").encode()
