"""From lines of finished samples to scores.json and to what a person reads."""

from __future__ import annotations

from typing import Any

from ilvr_ds.evaluation.ablation import CONDITIONS
from ilvr_ds.evaluation.benchmarks import Benchmark
from ilvr_ds.evaluation.intervals import effect
from ilvr_ds.evaluation.results import Line
from ilvr_ds.evaluation.scoring import macro_mean, score_by_type
from ilvr_ds.generation.settings import Speed
from ilvr_ds.tracking.names import metric_name

_WAYS = {
    "latents": "with latents",
    "pixels": "with its helper images given and read as pixels",
    "drawn": "with its helper images drawn token by token (computed)",
}
"""Of pixels.py, as a person reads them"""


def summarize(
    lines: list[Line], benchmark: Benchmark, compares_pixels: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """The content of scores.json, and its tables as lines of text; compares_pixels: the cost was asked for."""
    scores: dict[str, Any] = {"rules": {}}
    text: list[str] = []
    for rule, version in benchmark.versions().items():
        part, table = _by_type(lines, rule)
        scores["rules"][rule] = {"version": version, **part}
        text += table
    text.append("judged by " + ", ".join(f"{rule} version {version}" for rule, version in benchmark.versions().items()))
    if benchmark.name == "vsp":
        outcomes = [line["verdicts"]["outcome"] for line in lines]
        scores["outcomes"] = {name: outcomes.count(name) for name in ("success", "hole", "not_reached")}
        text.append("outcomes: " + ", ".join(f"{name} {count}" for name, count in scores["outcomes"].items()))
    if reported := benchmark.reported(lines):
        scores["reported"] = reported
        for rule, figures in reported.items():
            text.append(f"{rule}: " + ", ".join(f"{name} {figure:.3f}" for name, figure in figures.items()))
    speed = sum((_speed(line["speed"]) for line in lines if line["speed"]), Speed())
    scores["speed"] = speed.to_dict() | {
        "seconds_per_answer": (speed.prefill_s + speed.decode_s) / len(lines),
        "tokens_per_answer": sum(line["new_tokens"] for line in lines) / len(lines),
    }
    scores["latents"] = {
        "segments_per_answer": sum(len(line["steps"]) for line in lines) / len(lines),
        "answers_with_segments": sum(bool(line["steps"]) for line in lines),
        "answers_at_the_limit": sum(line["hit_limit"] for line in lines),
    }
    text.append(
        "{seconds_per_answer:.3f} s and {tokens_per_answer:.1f} tokens an answer; prefill {prefill_tokens_per_s:.0f}, "
        "decode {decode_tokens_per_s:.0f} tokens a second".format(**scores["speed"])
    )
    text.append(
        "{segments_per_answer:.2f} latent segments an answer; {answers_with_segments} answers with segments, "
        "{answers_at_the_limit} at the token limit".format(**scores["latents"])
    )
    if "ablation" in lines[0]:
        scores["ablation"] = {rule: _ablation(lines, rule) for rule in benchmark.rules}
        scores["without_donor"] = sum(not line["ablation"]["other_sample"]["has_donor"] for line in lines)
        has_latents = scores["latents"]["answers_with_segments"] > 0
        for rule, effects in scores["ablation"].items():
            text += _ablation_table(rule, scores["rules"][rule]["accuracy"], effects) if has_latents else []
        if not has_latents:
            text.append("latents: no answer has a segment, so that there was nothing to put in their place")
        elif scores["without_donor"]:
            text.append(f"{scores['without_donor']} samples had no other sample's latents and kept their own")
    if costs := [line["cost"] for line in lines if "cost" in line]:
        scores["cost"] = _mean_cost(costs)
        for way, words in _WAYS.items():
            mean = scores["cost"][way]
            text.append(
                f"the same answer {words}: alone {mean['seconds']:.3f} s, each of {scores['cost']['rows']:.0f} "
                f"{mean['seconds_in_batch']:.4f} s, {mean['tokens']:.1f} tokens"
            )
    elif compares_pixels:
        text.append("cost against pixels: no answer has a latent segment and a helper image to stand for it")
    return scores, text


def left_out_lines(reasons: dict[int, str]) -> list[str]:
    """What a person reads of samples that were not evaluated; [] where all were."""
    if not reasons:
        return []
    samples = "sample" if len(reasons) == 1 else "samples"
    return [f"left out: {len(reasons)} {samples}; the first: {next(iter(reasons.values()))}"]


def metrics_of(scores: dict[str, Any]) -> dict[str, float]:
    """The numbers of scores.json that MLflow gets, by name."""
    metrics = {f"speed/{name}": value for name, value in scores["speed"].items()}
    for rule, part in scores["rules"].items():
        metrics[f"{rule}/accuracy"] = part["accuracy"]
        metrics[f"{rule}/macro_mean"] = part["macro_mean"]
        types = {name: score for name, score in part["types"].items() if name or len(part["types"]) > 1}
        metrics |= {metric_name(f"{rule}/accuracy", name): score["accuracy"] for name, score in types.items()}
    for rule, figures in scores.get("reported", {}).items():
        metrics |= {metric_name(f"{rule}/reported", name): figure for name, figure in figures.items()}
    for rule, effects in scores.get("ablation", {}).items():
        metrics |= {f"{rule}/ablation/{name}": part["difference"] for name, part in effects.items()}
    return metrics


def _by_type(lines: list[Line], rule: str) -> tuple[dict[str, Any], list[str]]:
    verdicts = [line["verdicts"][rule] for line in lines]
    types = score_by_type(verdicts, [line["type"] for line in lines], [line["options"] for line in lines])
    macro, accuracy = macro_mean(types), sum(verdicts) / len(verdicts)
    table = [f"{rule:<16} samples   accuracy   chance"]
    for name, score in types.items():
        chance = "unknown" if score.chance is None else f"{score.chance:.3f}"
        table.append(f"  {name or '(no type)':<14} {score.samples:>7}   {score.accuracy:>8.3f}   {chance:>6}")
    table.append(f"  {'macro mean':<14} {len(lines):>7}   {macro:>8.3f}")
    parts = {
        name: {"samples": s.samples, "right": s.right, "accuracy": s.accuracy, "chance": s.chance}
        for name, s in types.items()
    }
    return {"accuracy": accuracy, "macro_mean": macro, "types": parts}, table


def _ablation(lines: list[Line], rule: str) -> dict[str, Any]:
    own = [line["verdicts"][rule] for line in lines]
    return {
        name: effect(own, [line["ablation"][name]["verdicts"][rule] for line in lines]).to_dict() for name in CONDITIONS
    }


def _ablation_table(rule: str, own: float, effects: dict[str, Any]) -> list[str]:
    table = [f"latents ({rule})  accuracy   difference [95 % interval]", f"  {'generated':<14} {own:>8.3f}"]
    for name, part in effects.items():
        low, high = part["interval_95"]
        table.append(f"  {name:<14} {part['accuracy']:>8.3f}   {part['difference']:>+10.3f} [{low:+.3f}, {high:+.3f}]")
    return table


def _mean_cost(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each way and unit; `rows` of a batch, and how many answers were compared."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    units = ("tokens", "seconds", "seconds_in_batch")
    ways = {way: {unit: mean([cost[way][unit] for cost in costs]) for unit in units} for way in _WAYS}
    return {**ways, "rows": mean([cost["rows"] for cost in costs]), "answers": len(costs)}


def _speed(numbers: dict[str, float]) -> Speed:
    return Speed(*(numbers[name] for name in Speed.__dataclass_fields__))  # type: ignore[arg-type]
