"""A pytest hook: files that take long run first, so that no worker runs one alone at the end.

`--dist loadfile` hands out whole files in the order in which they were collected (with `--no-loadscope-reorder`;
otherwise files with many tests come first, and the few tests per file that install, start servers or run programs come
last).
"""

from __future__ import annotations

from collections import Counter

import pytest

# In turns: one that waits most of its time, one that computes.
_BEGIN_FIRST = (
    "test_install.py",
    "test_ray_serve.py",
    "test_oldest_transformers.py",
    "test_torchserve_server.py",
    "test_torchserve_bench.py",
    "test_torchserve_protocols.py",
    "test_torchserve_command.py",
    "test_docs.py",
    "test_reliability.py",
    "test_hf_compiled.py",
    "test_grammar_limits.py",
    "test_generate_models.py",
    "test_processes.py",
    "test_hf_coverage.py",
    "test_tensor_parallel.py",
    "test_integer_products.py",
    "test_http_ranks.py",
    "test_attention_bits.py",
    "test_generate_processes.py",
    "test_parallel.py",
    "test_http_connections.py",
    "test_generate_from_transformers.py",
    "test_http_process.py",
    "test_triton_compiles.py",
    "test_bench_ab.py",
    "test_gpu_benchmarks.py",
    "test_examples.py",
    "test_simulation.py",
    "test_fuzz.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those files, then the others, the larger ones first."""
    sizes = Counter(item.path for item in items)

    def rank(item: pytest.Item) -> tuple[int, int]:
        name = item.path.name
        return (_BEGIN_FIRST.index(name), 0) if name in _BEGIN_FIRST else (len(_BEGIN_FIRST), -sizes[item.path])

    files = dict.fromkeys(item.path for item in sorted(items, key=rank))  # sorted() leaves equals in their order
    places = {path: place for place, path in enumerate(files)}
    items.sort(key=lambda item: places[item.path])
