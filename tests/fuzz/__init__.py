"""A fuzzer of the whole engine. ``python -m fuzz --help``, with tests/ on the path; ``make fuzz`` does that.

An episode is one engine with drawn sizes, and some hundred operations on it: requests come, are cancelled and stopped,
faults are set off, the engine steps. After every operation all invariants must hold, and when a row ends it must have
been told exactly what it is told when it runs alone.

Every operation draws from its own numbers: (seed, episode, place). So an episode that fails also fails with fewer
operations, and what is left out changes nothing about the rest.
"""
