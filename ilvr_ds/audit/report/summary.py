"""From lines of finished samples to the numbers of audit.json."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ilvr_ds.audit.readings.attention import COLUMNS
from ilvr_ds.audit.report.power import mean_interval, smallest_effect
from ilvr_ds.evaluation.intervals import effect, share_interval
from ilvr_ds.evaluation.results import Line


def latents_written(lines: Sequence[Line]) -> dict[str, Any]:
    """Whether the answers hold segments at all."""
    return {
        "answers_with_segments": sum(bool(line["steps"]) for line in lines),
        "segments_per_answer": sum(len(line["steps"]) for line in lines) / len(lines),
        "answers_at_the_limit": sum(line["hit_limit"] for line in lines),
    }


def replacement(lines: Sequence[Line], names: Sequence[str]) -> dict[str, Any]:
    """Accuracy with own latents, and what each replacement changes on the samples that have something to put in."""
    found: dict[str, Any] = {"own": _share([line["right"] for line in lines])}
    for name in names:
        mine = [line for line in lines if line["replacement"][name]["has_source"]]
        if not mine:
            continue
        parts = [line["replacement"][name] for line in mine]
        right, own = [part["right"] for part in parts], [line["right"] for line in mine]
        nats = mean_interval([p["logp"] - line["own_logp"] for p, line in zip(parts, mine, strict=True)])
        found[name] = effect(own, right).to_dict() | {
            "samples": len(mine),
            "answers_changed": sum(part["changed"] for part in parts) / len(mine),
            "answer_logp_change": nats[0],
            "answer_logp_interval_95": list(nats[1:]),
            "smallest_effect": smallest_effect(len(mine), sum(a != b for a, b in zip(own, right, strict=True))),
        }
    return found


def donor(lines: Sequence[Line]) -> dict[str, Any]:
    """How often the answer becomes the donor's; of pairs with the same words where there are any."""
    pairs = [line for line in lines if "donor" in line and line["donor"]["donor"]["has_source"]]
    with_words = [line for line in pairs if line["donor"]["same_words"]]
    mine = with_words or pairs
    if not mine:
        return {"members": 0}
    follows = [line["donor"]["donor"]["follows"] for line in mine]
    found = {
        "members": len(mine),
        "same_words": bool(with_words),
        "follows_donor": sum(follows) / len(mine),
        "interval_95": list(share_interval(sum(follows), len(mine))),
        "follows_donors_response": sum(line["donor"]["donor"]["follows_response"] for line in mine) / len(mine),
        "self": sum(line["donor"]["self"]["follows"] for line in mine) / len(mine),
        "self_changed": sum(line["donor"]["self"]["changed"] for line in mine) / len(mine),
    }
    return found | _control(mine) | _flips(mine)


def _control(mine: Sequence[Line]) -> dict[str, Any]:
    """The same with a third sample's latents, where there is a third sample with latents."""
    known = [line["donor"] for line in mine if line["donor"]["unrelated"]["has_source"]]
    if not known:
        return {"unrelated": None, "difference_to_unrelated": None, "difference_interval_95": None}
    change = effect([part["unrelated"]["follows"] for part in known], [part["donor"]["follows"] for part in known])
    return {
        "unrelated": change.accuracy - change.difference,
        "difference_to_unrelated": change.difference,
        "difference_interval_95": [change.low, change.high],
    }


def _flips(mine: Sequence[Line]) -> dict[str, Any]:
    """Of pairs both of whose members are in: how often both are right with their own latents."""
    by_number = {line["number"]: line for line in mine}
    partners = [(line, by_number.get(line["donor"]["partner"])) for line in mine]
    flips = [a["right"] and b["right"] for a, b in partners if b and a["number"] < b["number"]]
    if not flips:
        return {"pairs": 0, "strict_flips": None, "strict_flips_interval_95": None}
    ends = list(share_interval(sum(flips), len(flips)))
    return {"pairs": len(flips), "strict_flips": sum(flips) / len(flips), "strict_flips_interval_95": ends}


def retrieval(lines: Sequence[Line]) -> dict[str, Any]:
    """Hits beside those of chance, and the interval of the difference to chance over samples."""
    parts = [line["retrieval"] for line in lines if line.get("retrieval", {}).get("latents")]
    found: dict[str, Any] = {"latents": sum(part["latents"] for part in parts), "samples": len(parts)}
    for name in ("image", "others") if parts else ():
        sums = [sum(part[name][n] for part in parts) / found["latents"] for n in range(4)]
        keys = ("top_1", "top_5", "chance_1", "chance_5")
        above = mean_interval([(part[name][0] - part[name][2]) / part["latents"] for part in parts])
        found[name] = dict(zip(keys, sums, strict=True)) | {
            "top_1_above_chance": above[0],
            "interval_95": list(above[1:]),
        }
    return found


def attention(lines: Sequence[Line]) -> dict[str, Any] | None:
    """Mean share of each layer on latents, images and text; None where no answer was looked at."""
    shares = [line["attention"] for line in lines if line.get("attention")]
    if not shares:
        return None
    layers = range(len(shares[0]))
    means = {
        name: [sum(share[layer][column] for share in shares) / len(shares) for layer in layers]
        for column, name in enumerate(COLUMNS)
    }
    return {"samples": len(shares), **means}


def barred(lines: Sequence[Line]) -> dict[str, Any]:
    """Accuracy without sight, with own latents and with zeros in their place, on answers that hold a segment."""
    mine = [line for line in lines if line["steps"]]
    if not mine:
        return {"samples": 0}
    found: dict[str, Any] = {"samples": len(mine), "seeing": _share([line["right"] for line in mine])}
    for name in mine[0]["barred"]:
        own, zeros = ([line["barred"][name][which]["right"] for line in mine] for which in ("own", "zeros"))
        gain = effect(zeros, own)
        found[name] = {
            "own": _share(own),
            "zeros": _share(zeros),
            "difference": gain.difference,
            "interval_95": [gain.low, gain.high],
        }
    return found


def power(replaced: dict[str, Any]) -> dict[str, Any]:
    """The smallest effects that would have been seen, by replacement."""
    return {
        name: {"samples": part["samples"], "smallest_effect": part["smallest_effect"]}
        for name, part in replaced.items()
        if name != "own"
    }


def _share(right: Sequence[bool]) -> dict[str, Any]:
    return {
        "accuracy": sum(right) / len(right),
        "interval_95": list(share_interval(sum(right), len(right))),
        "samples": len(right),
    }
