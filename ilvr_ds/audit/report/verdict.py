"""What the numbers say in plain words, by rules that were written down before them.

The verdict rests on two comparisons, own latents against zeros and against another sample's; the first rule that fits
is taken. *Lost* is: the 95 % interval of the difference lies below 0.

no_latents       fewer than half of the answers hold a segment
used             another sample's latents lose accuracy: what they say matters
placeholder      they lose none, but zeros do: something has to stand there, whatever it says
unused           neither loses

Why, and what to try, is added where the numbers say it: targets or latents alike across samples (mean cosine above
ALIKE), right latents that would help (the interval of `true` lies above 0), an image that answers by itself. "No
effect" is never said without the smallest effect that would have been seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ALIKE = 0.8
"""Published latent models whose latents change nothing have 0.8 to 0.98 across samples (2605.18445, 2606.05753)."""
CEILING = 0.95
"""Accuracy with own latents above which nothing can gain."""
OTHER_TARGETS = {
    "all": "selection.pool changed or region, with selection.by change",
    "changed": "boxes in the data for selection.pool region, or other helper images; what changed looks the same",
    "region": "other boxes or other helper images; what these boxes hold looks the same",
}
"""What to try in place of each selection.pool."""
Kind = Literal["no_latents", "used", "placeholder", "unused", "not_tested"]


@dataclass(frozen=True)
class Verdict:
    """A kind, a sentence or a few, and what to try next."""

    kind: Kind
    text: str
    try_next: tuple[str, ...] = ()


def judge(report: dict[str, Any]) -> Verdict:
    """The verdict on the content of audit.json."""
    latents, samples = report["latents"], report["samples"]
    if 2 * latents["answers_with_segments"] < samples:
        return Verdict(
            "no_latents",
            f"The model hardly writes latents: {latents['answers_with_segments']} of {samples} answers hold a segment.",
            ("Train longer, or look at the weight of cross-entropy: the start of a segment is a supervised token.",),
        )
    replaced = report.get("replacement")
    if not replaced or "zeros" not in replaced:
        return Verdict("not_tested", "Latents were not replaced: nothing can be said of whether they are used.")
    zeros, other = replaced["zeros"], replaced.get("other_sample")
    if other and other["interval_95"][1] < 0:
        return Verdict("used", _used(report, zeros, other), _next_of_used(report))
    if zeros["interval_95"][1] < 0:
        return Verdict("placeholder", _placeholder(report, zeros, other), _next_of_unused(report))
    return Verdict("unused", _unused(report, zeros, other), _next_of_unused(report))


def _used(report: dict[str, Any], zeros: dict[str, Any], other: dict[str, Any]) -> str:
    if zeros["interval_95"][1] < 0:
        text = (
            f"The latents are used: without them {_lost(zeros)}, with another sample's in their place {_lost(other)}."
        )
    else:
        text = (
            f"The latents are used: with another sample's in their place {_lost(other)}. Zeros in their place lose "
            f"nothing that {zeros['samples']} samples would show ({_seen(zeros)})."
        )
    swap = report.get("donor", {})
    if swap.get("members"):
        low, high = (_points(x) for x in swap["interval_95"])
        text += (
            f" With the latents of a sample with {'the same words and ' if swap['same_words'] else ''}another answer, "
            f"{_points(swap['follows_donor'])} % of the answers become that sample's [{low}, {high}]"
        )
        if swap["unrelated"] is None:
            return f"{text}."
        text += f", with a third sample's {_points(swap['unrelated'])} %."
        if swap["difference_interval_95"][0] <= 0:
            text += (
                " That is no more than what any disturbance does: the answer needs its own latents, but does not read "
                "the donor's in them."
            )
    return text


def _placeholder(report: dict[str, Any], zeros: dict[str, Any], other: dict[str, Any] | None) -> str:
    text = f"Something has to stand in the latents' place, but what it says is not used: with zeros {_lost(zeros)}"
    if other is None:
        return f"{text}; another sample's latents were not tried. So it is open what they say."
    return f"{text}, but with another sample's latents no loss is seen ({_seen(other)}).{_reasons(report)}"


def _unused(report: dict[str, Any], zeros: dict[str, Any], other: dict[str, Any] | None) -> str:
    largest = max(part["smallest_effect"] for part in (zeros, other) if part)
    gains = [
        f"{words} raise accuracy by {_points(part['difference'])} points"
        for words, part in (("zeros", zeros), ("another sample's latents", other))
        if part and part["interval_95"][0] > 0
    ]
    text = (
        f"The latents are not seen to be used: at {zeros['samples']} samples a loss of {_points(largest)} points would "
        f"have been seen (95 %, power 80 %), and neither zeros nor another sample's latents lose it."
    )
    return f"{text}{' In their place ' + ' and '.join(gains) + '.' if gains else ''}{_reasons(report)}"


def _reasons(report: dict[str, Any]) -> str:
    """What else was found that may explain it."""
    reasons = []
    for name in ("targets", "latents"):
        cosine = report.get("inside", {}).get(name, {}).get("cosine_across_samples")
        if cosine is not None and cosine > ALIKE:
            reasons.append(f"the {name} are nearly equal across samples (cosine {cosine:.2f})")
    right = report["replacement"].get("true")
    if right and right["interval_95"][0] > 0:
        low, high = (_points(x) for x in right["interval_95"])
        reasons.append(
            f"the true features in their place would gain {_points(right['difference'])} points [{low}, {high}]"
        )
    elif right and report["replacement"]["own"]["accuracy"] <= CEILING:
        reasons.append(f"the true features in their place gain nothing that would be seen ({_seen(right)})")
    if _answers_from_image(report):
        reasons.append("answers fall when later words cannot see the image: they come from it, not from the latents")
    return f" {_capital('; '.join(reasons))}." if reasons else ""


def _next_of_used(report: dict[str, Any]) -> tuple[str, ...]:
    right = report["replacement"].get("true")
    if right and right["interval_95"][0] > 0:
        return ("The true features would do better still: train longer, or keep the targets in stage 2.",)
    return ()


def _next_of_unused(report: dict[str, Any]) -> tuple[str, ...]:
    found = []
    inside = report.get("inside", {})
    targets, latents = (inside.get(name, {}).get("cosine_across_samples") for name in ("targets", "latents"))
    right = report["replacement"].get("true")
    if targets is not None and targets > ALIKE:
        pool = report.get("selection", {}).get("pool", "all")
        found.append(f"Choose targets that differ: {OTHER_TARGETS[pool]}.")
    elif latents is not None and latents > ALIKE:
        found.append("Latents collapsed: raise loss.contrastive_weight, and keep the targets in stage 2.")
    if right and right["interval_95"][0] > 0:
        found.append("Right latents help, own ones are not right: train longer, and keep the targets in stage 2.")
    elif report["replacement"]["own"]["accuracy"] > CEILING:
        found.append("Nearly all answers are right whatever stands there: audit on harder data.")
    elif right:
        found.append("Even right latents help nothing: choose other targets, or a task that needs the picture.")
    if _answers_from_image(report):
        found.append("The image answers by itself: choose data on which the helper images hold what it does not show.")
    return tuple(found) or ("Audit more samples, or read the other replacements below.",)


def _answers_from_image(report: dict[str, Any]) -> bool:
    """Without sight of the image accuracy falls, and own latents are no better than zeros then."""
    part = report.get("barred", {}).get("image_for_words")
    if not part:
        return False
    seeing = report["barred"]["seeing"]
    return bool(part["own"]["interval_95"][1] < seeing["interval_95"][0] and part["interval_95"][0] <= 0)


def _lost(part: dict[str, Any]) -> str:
    low, high = part["interval_95"]
    return f"{_points(-part['difference'])} points are lost [{_points(-high)}, {_points(-low)}]"


def _seen(part: dict[str, Any]) -> str:
    return f"{_points(part['smallest_effect'])} points would have been at {part['samples']} samples"


def _points(share: float) -> str:
    """61, but 3.1: in per cent, with a digit behind the point where it says something."""
    value = 100 * share
    return f"{value:.0f}" if abs(value) >= 10 else f"{value + 0.0:.1f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
