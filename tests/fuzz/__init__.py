"""A fuzzer of the whole engine. ``python -m fuzz --help``, with tests/ on the path; ``make fuzz`` does that.

An episode is one engine with random sizes, and some hundred operations on it: requests are added, cancelled and
stopped, faults are injected, the engine steps. After every operation all invariants must hold. When a row ends, it must
have got exactly what it gets when it runs alone.

Every operation draws from its own random numbers: (seed, episode, place). So a failing episode still fails with fewer
operations, and leaving one out changes nothing about the others.
"""
