"""Damage to K/V on disk, on purpose: real kills of a process that writes, and changes of its files.

``python scripts/tier_robustness.py --kills 1000 --damages 100000``

After each kill, and each change, a tier opens the folder and fetches every block that it finds there. A block comes
back as it was written, or not at all; the folder stays below its limit; nothing raises.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from hashlib import blake2b
from pathlib import Path

import torch

from paged_core.scheduling.block_pool import BlockContent
from paged_core.tiers.disk import DiskTier
from paged_core.tiers.folder import SlabFolder
from paged_core.tiers.slab import Shape

SHAPE = Shape("ab" * 16, 2048, 4)
MAX_BYTES = 400_000
_NUMBERS = 2000


def content(number: int) -> BlockContent:
    tokens = tuple(number * 10 + i for i in range(SHAPE.block_size))
    return BlockContent(1, blake2b(str(number).encode(), digest_size=16).digest(), tokens)


def truth(number: int) -> torch.Tensor:
    return torch.randint(256, (SHAPE.block_bytes,), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)


def opened(folder: Path) -> DiskTier:
    return DiskTier(SlabFolder(str(folder), MAX_BYTES), SHAPE)


def write_for_ever(folder: Path, first: int) -> None:
    """What the process does that is killed."""
    tier, number = opened(folder), first
    print("begun", flush=True)
    while True:
        tier.store([content(number % _NUMBERS)], truth(number % _NUMBERS)[None])
        tier.flush(60)
        number += 1


def check(folder: Path) -> tuple[int, int]:
    """(blocks that came back, blocks that did not), of those that the index names."""
    tier, arrived = opened(folder), threading.Event()
    contents = [content(number) for number in range(_NUMBERS)]
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
                    assert torch.equal(piece.data[row], truth(held[place])), "a wrong block"
                num_good, num_lost = num_good + piece.good[row], num_lost + (not piece.good[row])
            tier.give_back(piece)
    tier.close(5)
    taken = sum(path.stat().st_size for path in folder.glob("*.kv"))
    assert taken <= MAX_BYTES, f"the folder takes {taken} bytes"
    return num_good, num_lost


def kill(folder: Path, times: int, rnd: random.Random) -> int:
    """Returns how many blocks came back in all."""
    num_good = 0
    for round_ in range(times):
        arguments = [sys.executable, __file__, "--write", str(folder), "--first", str(round_ * 37)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            time.sleep(rnd.random() * 0.05)
            process.kill()
        num_good += check(folder)[0]
    return num_good


def damage(folder: Path, times: int, rnd: random.Random) -> tuple[int, int]:
    """Each time one file of a sound folder is cut, or has some bits turned. Returns (blocks back, blocks lost)."""
    tier = opened(folder)
    for number in range(60):
        tier.store([content(number)], truth(number)[None])
    tier.flush(60)
    tier.close(5)
    paths = sorted(folder.glob("*.kv"))
    whole = {path: path.read_bytes() for path in paths}
    good = lost = 0
    for _ in range(times):
        path = rnd.choice(paths)
        data = bytearray(whole[path])
        if rnd.random() < 0.3:
            del data[rnd.randrange(len(data)) :]
        else:
            for _ in range(rnd.choice((1, 1, 2, 8))):
                data[rnd.randrange(len(data))] ^= 1 << rnd.randrange(8)
        path.write_bytes(data)
        back, gone = check(folder)
        good, lost = good + back, lost + gone
        path.write_bytes(whole[path])
    return good, lost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.write is not None:
        write_for_ever(args.write, args.first)
    rnd = random.Random(args.seed)
    for name, work, times in (("kills", kill, args.kills), ("damages", damage, args.damages)):
        folder = Path(tempfile.mkdtemp(prefix="paged-tier-"))
        folder.chmod(0o700)
        try:
            print(f"{times} {name}: blocks back {work(folder, times, rnd)}; no wrong block, no error")
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
