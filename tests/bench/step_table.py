"""The tables of tests/bench/step.py, in Markdown, from what the runs measured."""

from __future__ import annotations

from statistics import median
from typing import Any

from tests.bench.syncs import unknown

MICRO_STEP = ("vision", "teacher", "selection", "forward", "backward")
"""Phases of a micro-step: all but optimizer, momentum update and waiting."""
SHARES = ("data", *MICRO_STEP, "optimizer", "momentum", "other")


def render(results: list[dict[str, Any]]) -> list[str]:
    """Where and with what; a line for each case; where its time goes; synchronisations."""
    return [*_heading(results[0]), "", *_speeds(results), "", *_shares(results), *_syncs(results)]


def _heading(result: dict[str, Any]) -> list[str]:
    found, case = result["environment"], result["case"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items()))
    train, dirty = case["settings"]["train"], " (changed)" if found["git_dirty"] else ""
    return [
        f"{case['geometry']} geometry, {found['ranks'][0]['device']}, CUDA {found['cuda']}, {versions}, "
        f"commit {found['git_commit'][:12]}{dirty}",
        f"micro-batch {train['micro_batch_size']} x {train['grad_accum_steps']}, {train['precision']}; medians of "
        f"{case['repeats']} intervals of {case['steps']} steps, in brackets from least to most",
    ]


def _speeds(results: list[dict[str, Any]]) -> list[str]:
    head = [
        "case", "ranks", "ms a sample", "of it micro-step", "tokens/s", "MFU", "MFU of products", "scaling", "padding",
        "waits for data", "loader alone", "GPU GiB", "planned", "host GiB",
    ]  # fmt: skip
    return _table(head, [_speed_row(result, results) for result in results])


def _speed_row(result: dict[str, Any], results: list[dict[str, Any]]) -> list[str]:
    rank_samples = result["samples_a_step"]
    intervals = result["intervals"]
    of_sample = [1000 * i["speed/s_per_step"] / rank_samples for i in intervals]
    micro = [
        time * sum(i[f"speed/share/{name}"] for name in MICRO_STEP)
        for time, i in zip(of_sample, intervals, strict=True)
    ]
    loader = result["loader_samples_per_s"]
    return [
        result["case"]["name"],
        str(result["ranks"]),
        _spread(of_sample, ".1f"),
        f"{median(micro):.1f}",
        f"{_median(result, 'speed/tokens_per_s'):,.0f}",
        *(_percent(result, name) for name in ("speed/mfu", "speed/mfu_matmul")),
        _scaling(result, results),
        f"{_median(result, 'data/padding'):.1%}",
        f"{_median(result, 'speed/share/data'):.2%}",
        f"{loader:.0f} samples/s, {loader * median(of_sample) / 1000:.1f}x",
        _gib(result, "memory/peak_device_gib"),
        _planned(result),
        _gib(result, "memory/peak_host_gib"),
    ]


def _planned(result: dict[str, Any]) -> str:
    """What `ilvr-ds plan` says, and how far it is from the peak."""
    planned = result["planned_gib"]
    if planned is None or "memory/peak_device_gib" not in result["intervals"][0]:
        return "-"
    return f"{planned:.1f} ({planned / _median(result, 'memory/peak_device_gib') - 1:+.1%})"


def _shares(results: list[dict[str, Any]]) -> list[str]:
    rows = [
        [result["case"]["name"], str(result["ranks"])]
        + [f"{_median(result, f'speed/share/{name}'):.1%}" for name in SHARES]
        for result in results
    ]
    return _table(["share of the time", "ranks", *SHARES], rows)


def _syncs(results: list[dict[str, Any]]) -> list[str]:
    lines = []
    for result in results:
        if result["case"]["check_syncs"]:
            ours = sum(unknown(result["syncs"]).values())
            lines += ["", f"{result['case']['name']}: {ours or 'no'} unexpected host synchronisations"]
            lines += [f"  {count / 2:.0f} a step in {place}" for place, count in result["syncs"].items()]
    return lines


def _scaling(result: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """Speed of a rank against the same case on fewer ranks, where that was measured before."""
    first = next(other for other in results if other["case"]["name"] == result["case"]["name"])
    if first is result:
        return ""
    speeds = [_median(one, "speed/samples_per_s") / one["ranks"] for one in (result, first)]
    return f"{speeds[0] / speeds[1]:.0%}"


def _median(result: dict[str, Any], name: str) -> float:
    return median(interval[name] for interval in result["intervals"])


def _percent(result: dict[str, Any], name: str) -> str:
    return f"{_median(result, name):.1%}" if name in result["intervals"][0] else "-"


def _gib(result: dict[str, Any], name: str) -> str:
    return f"{_median(result, name):.1f}" if name in result["intervals"][0] else "-"


def _spread(values: list[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
