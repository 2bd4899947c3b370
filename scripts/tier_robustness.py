"""Damage to K/V on disk, on purpose: real kills of a process that writes, and changes of its files.

``python scripts/tier_robustness.py --kills 1000 --damages 100000``

After each kill, and whenever each file has been changed in a way of its own, a tier opens the folder and fetches every
block that it finds there. A block comes back as it was written, or not at all; the folder stays below its limit;
nothing raises.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from paged_core.scheduling.block_pool import BlockContent
from paged_core.tiers.disk import DiskTier
from paged_core.tiers.folder import SlabFolder
from paged_core.tiers.slab import Shape

SMALL, LARGE = Shape("ab" * 16, 2048, 4), Shape("ab" * 16, 4 << 20, 4)  # a kill tears blocks of the second kind
MAX_BYTES = {SMALL: 400_000, LARGE: 96 << 20}
_NUMBERS = {SMALL: 400, LARGE: 12}  # of different blocks
_HEAD = 44  # bytes of a slab's head that say something
_DAMAGED = 60  # blocks of the folder whose files are changed


@cache
def content(number: int) -> BlockContent:
    tokens = tuple(number * 10 + i for i in range(SMALL.block_size))
    return BlockContent(1, blake2b(str(number).encode(), digest_size=16).digest(), tokens)


@cache
def truth(number: int, shape: Shape) -> torch.Tensor:
    return torch.randint(256, (shape.block_bytes,), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)


def opened(folder: Path, shape: Shape) -> DiskTier:
    return DiskTier(SlabFolder(str(folder), MAX_BYTES[shape]), shape)


def write_for_ever(folder: Path, shape: Shape, first: int, begun: int) -> None:
    """What the process does that is killed."""
    tier, number = opened(folder, shape), first
    os.write(begun, b"x")
    while True:
        at = number % _NUMBERS[shape]
        tier.store([content(at)], truth(at, shape)[None])
        tier.flush(60)
        number += 1


def check(folder: Path, shape: Shape, num_blocks: int) -> tuple[int, int]:
    """(blocks that came back, blocks that did not), of those that the index names."""
    tier, arrived = opened(folder, shape), threading.Event()
    contents = [content(number) for number in range(num_blocks)]
    held = [number for number, each in enumerate(contents) if tier.holds(each.digest)]
    fetch = tier.fetch([contents[number] for number in held], arrived)
    num_good = num_lost = 0
    done = False
    while not done:
        assert arrived.wait(60), "a load hangs"
        arrived.clear()
        done = fetch.done
        for piece in fetch.take():
            for row, place in enumerate(piece.places):
                if piece.good[row]:
                    assert torch.equal(piece.data[row], truth(held[place], shape)), "a wrong block"
                num_good, num_lost = num_good + piece.good[row], num_lost + (not piece.good[row])
            tier.give_back(piece)
    tier.close(5)
    taken = sum(path.stat().st_size for path in folder.glob("*.kv"))
    assert taken <= MAX_BYTES[shape], f"the folder takes {taken} bytes"
    return num_good, num_lost


def kill(folder: Path, times: int, rnd: random.Random) -> dict[str, int]:
    """A process that writes is killed at some moment, again and again."""
    num_good = num_torn = 0
    for shape in (SMALL, LARGE):
        for number in range(_NUMBERS[shape]):
            truth(number, shape)  # so that writers write most of the time
    for round_ in range(times):
        shape = LARGE if round_ % 4 == 0 else SMALL
        own = folder / str(shape.block_bytes)
        _kill_a_writer(own, shape, round_ * 37, rnd.random() * 0.03)
        num_torn += _is_torn(own, shape)
        num_good += check(own, shape, _NUMBERS[shape])[0]
    return {"kills": times, "kills_that_tore_a_block": num_torn, "blocks_back": num_good}


def _kill_a_writer(folder: Path, shape: Shape, first: int, after_s: float) -> None:
    reads, writes = os.pipe()
    process = os.fork()  # a new interpreter would take seconds to begin, each time
    if process == 0:
        try:
            write_for_ever(folder, shape, first, writes)
        finally:
            os._exit(1)
    os.close(writes)
    assert os.read(reads, 1) == b"x"
    os.close(reads)
    time.sleep(after_s)
    os.kill(process, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL, "it ended by itself"


def _is_torn(folder: Path, shape: Shape) -> bool:
    """Whether the file written last ends within a block."""
    last = max(folder.glob("*.kv"), key=lambda path: path.stat().st_mtime_ns, default=None)
    if last is None:
        return False
    return (last.stat().st_size - shape.offset(0)) % shape.record_bytes != 0


def damage(folder: Path, times: int, rnd: random.Random) -> dict[str, int]:
    """Files of a sound folder are cut, or have some bits turned: all of them, each in its own way, before each look."""
    tier = opened(folder, SMALL)
    for number in range(_DAMAGED):
        tier.store([content(number)], truth(number, SMALL)[None])
    tier.flush(60)
    tier.close(5)
    whole = {path: path.read_bytes() for path in sorted(folder.glob("*.kv"))}
    assert check(folder, SMALL, _DAMAGED) == (_DAMAGED, 0)
    done = good = lost = 0
    while done < times:
        for path, data in whole.items():
            path.write_bytes(_damaged(data, rnd))
        back, gone = check(folder, SMALL, _DAMAGED)
        done, good, lost = done + len(whole), good + back, lost + gone
        if done // 10_000 > (done - len(whole)) // 10_000:
            print(f"{done} damages so far", flush=True)
    return {"damages": done, "blocks_back": good, "blocks_found_damaged": lost}


def _damaged(whole: bytes, rnd: random.Random) -> bytes:
    data = bytearray(whole)
    if rnd.random() < 0.3:
        del data[rnd.randrange(len(data)) :]
        return bytes(data)
    num_blocks = (len(data) - SMALL.offset(0)) // SMALL.record_bytes
    for _ in range(rnd.choice((1, 1, 2, 8))):
        entry = SMALL.offset(rnd.randrange(num_blocks)) + rnd.randrange(SMALL.entry_bytes)
        anywhere = rnd.randrange(len(data))
        data[rnd.choice((entry, entry, anywhere, anywhere, rnd.randrange(_HEAD)))] ^= 1 << rnd.randrange(8)
    return bytes(data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rnd = random.Random(args.seed)
    found: dict[str, Any] = {}
    for name, work, times in (("kills", kill, args.kills), ("damages", damage, args.damages)):
        folder = Path(tempfile.mkdtemp(prefix="paged-tier-"))
        try:
            found[name] = work(folder, times, rnd)
        finally:
            shutil.rmtree(folder)
        print(f"{json.dumps(found[name])}: no wrong block, no error", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
