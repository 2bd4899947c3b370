"""The results of bench_serving.py: the numbers of a run, two systems compared, and all of them as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median
from typing import Any

from paged_bench.results import percentile
from serving_clients import TimedAnswer

Row = dict[str, Any]


def summarise(answers: Sequence[TimedAnswer], duration_s: float, slo_ttft: float, slo_itl: float) -> Row:
    """The numbers of one run, with times in seconds; failed requests are only counted."""
    good = [answer for answer in answers if answer.error is None and answer.times_s]
    waits = [answer.times_s[0] - answer.arrival_s for answer in good]
    gaps = [[late - early for early, late in zip(a.times_s, a.times_s[1:], strict=False)] for a in good]
    means = [sum(each) / len(each) if each else 0.0 for each in gaps]
    met = sum(wait <= slo_ttft and mean <= slo_itl for wait, mean in zip(waits, means, strict=True))
    every_gap = [gap for each in gaps for gap in each]
    return {
        "num_requests": len(answers),
        "num_errors": len(answers) - len(good),
        "errors": dict(Counter((answer.error or "no text came")[:200] for answer in answers if answer not in good)),
        "duration_s": duration_s,
        "requests_per_s": len(good) / duration_s,
        "tokens_per_s": sum(answer.num_tokens for answer in good) / duration_s,
        "ttft_p50_s": percentile(waits, 50) if waits else None,
        "ttft_p99_s": percentile(waits, 99) if waits else None,
        "itl_p50_s": percentile(every_gap, 50) if every_gap else None,
        "itl_p99_s": percentile(every_gap, 99) if every_gap else None,
        "goodput_per_s": met / duration_s,
        "max_open": _max_open(good),
    }


def agreement(some: Sequence[TimedAnswer], others: Sequence[TimedAnswer]) -> Row:
    """Requests for which both gave the same whole text."""
    pairs = [(a, b) for a, b in zip(some, others, strict=True) if a.error is None and b.error is None]
    differing = [a.index for a, b in pairs if a.text != b.text]
    return {"num_compared": len(pairs), "num_identical": len(pairs) - len(differing), "differing": differing}


def compared(rows: dict[str, list[Row]], answers: dict[str, list[TimedAnswer]]) -> Row:
    """The second system and the first, round by round: a shared machine is never the same for long."""
    if len(rows) < 2:
        return {}
    first, second = rows
    speeds = [[row["tokens_per_s"] for row in rows[name]] for name in (first, second)]
    rounds = [later / earlier for earlier, later in zip(*speeds, strict=True) if earlier]
    return {
        "throughput_of_second": median(rounds) if rounds else None,
        "throughput_of_second_by_round": rounds,
        "agreement": agreement(answers[first], answers[second]),
    }


def show(result: Row) -> None:
    heads = ("tokens/s", "requests/s", "first p50", "p99 s", "next p50", "p99 s", "goodput/s", "open", "errors")
    print(f"{'':24}" + "".join(f"{head:>11}" for head in heads))
    keys = ("tokens_per_s", "requests_per_s", "ttft_p50_s", "ttft_p99_s", "itl_p50_s", "itl_p99_s", "goodput_per_s",
            "max_open", "num_errors")  # fmt: skip
    for name, rows in result["systems"].items():
        for row in rows:
            print(f"{name[-24:]:24}" + "".join(f"{_number(row[key]):>11}" for key in keys))
            told = ", ".join(f"{who} {taken:.0f}" for who, taken in row["cpu_us_per_token"].items())
            print(f"    µs of processor time a token: {told}")
            for error, count in row["errors"].items():
                print(f"    {count} x {error}")
    if "agreement" in result:
        same, rounds = result["agreement"], ", ".join(map(_number, result["throughput_of_second_by_round"]))
        print(f"second to first: {_number(result['throughput_of_second'])} of the tokens/s (by round: {rounds}); "
              f"{same['num_identical']} of {same['num_compared']} texts are the same")  # fmt: skip


def _max_open(answers: Sequence[TimedAnswer]) -> int:
    """The most streams that were open at one moment."""
    changes = sorted([(a.arrival_s, 1) for a in answers] + [(a.times_s[-1], -1) for a in answers])
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)
