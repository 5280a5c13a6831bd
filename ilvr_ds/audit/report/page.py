"""audit.json for programs, audit.md for people: one page that begins with the verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ilvr_ds.audit.report.charts import draw_audit
from ilvr_ds.audit.report.verdict import Verdict
from ilvr_ds.pictures.views import SampleView
from ilvr_ds.whole_files import write_whole


def write_report(
    report: dict[str, Any], verdict: Verdict, views: Sequence[SampleView], folder: Path
) -> tuple[list[str], list[Path]]:
    """Write both files and the pictures; returns the page as lines, and the pictures."""
    content = report | {"verdict": verdict.text, "verdict_kind": verdict.kind, "try_next": list(verdict.try_next)}
    pictures = draw_audit(report, views, folder)
    page = page_of(report, verdict, [picture.name for picture in pictures])
    write_whole(folder / "audit.md", "\n".join(page) + "\n")
    write_whole(folder / "audit.json", json.dumps(content, indent=1) + "\n")  # last: where it stands, all is whole
    return page, pictures


def page_of(report: dict[str, Any], verdict: Verdict, pictures: list[str]) -> list[str]:
    """audit.md, line by line."""
    lines = [f"**{verdict.text}**", ""]
    lines += [f"Try next: {text}" for text in verdict.try_next]
    lines += ["", _about(report)]
    lines += [f"Left out: {name} ({why})." for name, why in report["left_out"].items()]
    for title, part in (
        ("Replacement", _replacement(report.get("replacement"))),
        ("Donor swap", _donor(report.get("donor"))),
        ("Inside", _inside(report.get("inside"))),
        ("Barred", _barred(report.get("barred"))),
    ):
        if part:
            lines += ["", f"## {title}", *part]
    lines += ["", *(f"![{name}]({name})" for name in pictures)]
    return lines


def _about(report: dict[str, Any]) -> str:
    latents = report["latents"]
    return (
        f"`{report['model']}` on {report['samples']} samples of `{report['data']}`, judged by {report['rule']} version "
        f"{report['rule_version']}; "
        f"{latents['segments_per_answer']:.2f} segments an answer, {latents['answers_at_the_limit']} answers at the "
        f"token limit. Targets: {report['selection_from']}."
    )


def _replacement(part: dict[str, Any] | None) -> list[str]:
    if not part:
        return []
    rows = [
        "| in the latents' place | accuracy | difference [95 %] | answers changed | log-probability, nats | n |",
        "|---|---|---|---|---|---|",
        f"| own | {part['own']['accuracy']:.3f} | | | | {part['own']['samples']} |",
    ]
    for name, values in part.items():
        if name != "own":
            nats = f"{values['answer_logp_change']:+.2f} {_interval(values['answer_logp_interval_95'], '+.2f')}"
            rows.append(
                f"| {name.replace('_', ' ')} | {values['accuracy']:.3f} | {values['difference']:+.3f} "
                f"{_interval(values['interval_95'], '+.3f')} | {values['answers_changed']:.2f} | {nats} "
                f"| {values['samples']} |"
            )
    return rows


def _donor(part: dict[str, Any] | None) -> list[str]:
    if not part or not part["members"]:
        return []
    lines = [
        f"{part['members']} samples in pairs with {'the same words' if part['same_words'] else 'words of their own'} "
        f"and different answers. The answer becomes the donor's in {part['follows_donor']:.3f} "
        f"{_interval(part['interval_95'], '.3f')}; with its own latents given back in {part['self']:.3f} (changed: "
        f"{part['self_changed']:.3f}), with a third sample's in {_number(part['unrelated'])}.",
    ]
    if part["strict_flips"] is not None:
        lines.append(
            f"Strict flips, both of a pair right with own latents: {part['strict_flips']:.3f} "
            f"{_interval(part['strict_flips_interval_95'], '.3f')} of {part['pairs']} pairs."
        )
    return lines


def _inside(part: dict[str, Any] | None) -> list[str]:
    if not part:
        return []
    lines = []
    found = part.get("retrieval", {})
    for name, words in (("image", "its helper image"), ("others", "up to 64 other samples and itself")):
        if values := found.get(name):
            lines.append(
                f"- The target among the candidates of {words}: top 1 {values['top_1']:.3f} (chance "
                f"{values['chance_1']:.3f}), top 5 {values['top_5']:.3f} (chance {values['chance_5']:.3f})."
            )
    for name in ("latents", "targets"):
        values = part.get(name, {})
        if values.get("vectors"):
            across, slots = values["cosine_across_samples"], values["cosine_across_slots"]
            lines.append(
                f"- {name.capitalize()}: cosine across samples {_number(across)}, across slots {_number(slots)}; "
                f"effective rank {values['effective_rank']:.1f} of {values['vectors']} vectors."
            )
    if shares := part.get("attention"):
        count = len(shares["latents"])
        means = ", ".join(f"{name} {sum(shares[name]) / count:.3f}" for name in ("latents", "images", "text"))
        lines.append(f"- Attention of answer tokens, mean over layers ({shares['samples']} samples): {means}.")
    return lines


def _barred(part: dict[str, Any] | None) -> list[str]:
    if not part or not part["samples"]:
        return []
    rows = [
        f"{part['samples']} answers with a segment; accuracy with sight of all {part['seeing']['accuracy']:.3f}.",
        "",
        "| out of sight | own latents | zeros | difference [95 %] |",
        "|---|---|---|---|",
    ]
    words = {
        "image": "images, after the first segment",
        "prompt": "the whole prompt, after the first segment",
        "image_for_words": "images, for words after the first latent start",
    }
    for name, text in words.items():
        values = part[name]
        rows.append(
            f"| {text} | {values['own']['accuracy']:.3f} | {values['zeros']['accuracy']:.3f} "
            f"| {values['difference']:+.3f} {_interval(values['interval_95'], '+.3f')} |"
        )
    return rows


def _interval(ends: list[float | None], form: str) -> str:
    if None in ends:
        return "[unknown]"
    return f"[{ends[0]:{form}}, {ends[1]:{form}}]"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
