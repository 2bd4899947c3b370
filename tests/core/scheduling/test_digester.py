"""Digests name the content of blocks: equal for those who may share a block, different for all others."""

from paged_core.scheduling.digester import Digester

KEY = b"k" * 32


def digests_of(digester: Digester, tokens: list[int], salt: str | None = None) -> list[bytes]:
    found: list[bytes] = []
    digester.extend(found, tokens, salt)
    return found


def test_a_digest_covers_all_tokens_up_to_its_blocks_end_and_the_salt():
    digester = Digester(2)
    first, second = digests_of(digester, [1, 2, 3, 4, 5])
    assert digests_of(digester, [1, 2, 3, 9])[0] == first
    others = [*digests_of(digester, [9, 2, 3, 4]), *digests_of(digester, [1, 2, 3, 4], "salt")]
    assert len({first, second, *others}) == 6
    grown = [first]
    digester.extend(grown, [1, 2, 3, 4], None)
    assert grown == [first, second], "what is known is not computed again"


def test_processes_that_have_a_key_in_common_find_the_same_digests_and_others_dont():
    (mine,), (theirs,) = (digests_of(Digester(2, KEY), [1, 2]) for _ in range(2))
    assert mine == theirs != digests_of(Digester(2), [1, 2])[0]


def test_nobody_but_its_owner_makes_a_private_digest():
    here, elsewhere = Digester(2, KEY), Digester(2, KEY)
    mine = here.private([], [1, 2], None, "7.0")
    assert here.private([], [1, 2], None, "7.0") == mine
    others = [here.private([], [1, 2], None, "7.1"), elsewhere.private([], [1, 2], None, "7.0")]
    assert mine not in [*others, *digests_of(here, [1, 2])]
