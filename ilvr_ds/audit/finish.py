"""What the main rank makes of the finished samples: numbers, verdict, page, pictures, MLflow, registry."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ilvr_ds.audit.passes import Plan
from ilvr_ds.audit.readings.similarity import similarity
from ilvr_ds.audit.readings.targets import TargetChooser, targets_alone
from ilvr_ds.audit.report import summary
from ilvr_ds.audit.report.page import write_report
from ilvr_ds.audit.report.verdict import judge
from ilvr_ds.audit.report.views import view_of
from ilvr_ds.audit.store import LatentStore
from ilvr_ds.evaluation.preparation import Prepared
from ilvr_ds.evaluation.results import Line, Results
from ilvr_ds.pictures.views import SampleView
from ilvr_ds.tracking.registry import attach, mlflow_place
from ilvr_ds.tracking.scores import log_scores

MOST_COMPARED = 512
"""Samples whose latents are compared with each other, evenly spread."""
PICTURES = 3
"""Samples whose latents are drawn."""


@dataclass(frozen=True)
class Finish:
    """Everything that both passes left."""

    ready: Prepared
    own_lines: dict[int, Line]
    store: LatentStore
    plan: Plan
    looks_inside: bool
    chooser: TargetChooser | None

    def __call__(self, results: Results, about: dict[str, Any]) -> list[str]:
        """Write it all; returns the page as lines. about: what audit.json says of the audit itself."""
        changed = {line["number"]: line for line in results.lines()}
        lines = [line | changed.get(number, {}) for number, line in sorted(self.own_lines.items())]
        report = self._report(lines, about)
        verdict = judge(report)
        page, pictures = write_report(report, verdict, self._views(lines), results.folder)
        _publish(self.ready, report, verdict.kind, pictures, results.folder)
        return [*page, "", f"the audit: {results.folder}"]

    def _report(self, lines: list[Line], about: dict[str, Any]) -> dict[str, Any]:
        settings = self.ready.settings
        report: dict[str, Any] = {
            "model": settings.model,
            "data": settings.shards,
            "samples": len(lines),
            "benchmark": self.ready.benchmark.name,
            "rule": (rule := self.ready.benchmark.rules[0]),
            "rule_version": self.ready.benchmark.versions()[rule],
            "latent_size": self.ready.reasoner.latent_size,
            "batch_size": settings.batch_size,
            **about,
            "latents": summary.latents_written(lines),
        }
        if self.plan.replacements:
            report["replacement"] = summary.replacement(lines, self.plan.replacements)
            report["power"] = summary.power(report["replacement"])
            missing = [name for name in self.plan.replacements if name not in report["replacement"]]
            report["left_out"] = report["left_out"] | dict.fromkeys(missing, "no sample has anything to put in")
        if self.plan.swaps is not None:
            report["donor"] = summary.donor(lines)
        if self.looks_inside:
            compared, filler = spread(self.ready.numbers, MOST_COMPARED), self.ready.reasoner.pad_embedding
            targets = [targets_alone(fed, filler) for fed in self.store.read("target", compared)]
            report["inside"] = {
                "retrieval": summary.retrieval(lines),
                "latents": similarity(self.store.read("own", compared)),
                "targets": similarity(targets),
                "attention": summary.attention(lines),
            }
        if self.plan.is_barred:
            report["barred"] = summary.barred(lines)
        return report

    def _views(self, lines: list[Line]) -> list[SampleView]:
        """The first samples with targets whose answers have segments."""
        if not self.looks_inside or self.chooser is None:
            return []
        numbers = [line["number"] for line in lines if line.get("retrieval")][:PICTURES]
        samples = [self.ready.reader.read(number) for number in numbers]
        own, chosen = self.store.read("own", numbers), self.chooser(samples)
        images = self.ready.reasoner.encoder.images
        return [view_of(*parts, images) for parts in zip(samples, own, chosen, strict=True)]


def spread(numbers: list[int], count: int) -> list[int]:
    """So many of them, evenly spread; all where there are no more."""
    count = min(count, len(numbers))
    return [numbers[place * len(numbers) // count] for place in range(count)]


def _publish(ready: Prepared, report: dict[str, Any], kind: str, pictures: list[Path], folder: Path) -> None:
    """To MLflow and to the registered model, where they were named."""
    settings = ready.settings
    metrics = metrics_of(report)
    if settings.tracking_uri:
        experiment, parent, run = mlflow_place(settings.model, settings.experiment)
        params = {key: report[key] for key in ("model", "data", "samples", "benchmark", "latent_size")}
        params |= {"rule": f"{report['rule']} {report['rule_version']}", "verdict": kind}
        log_scores(
            settings.tracking_uri, experiment, f"{run}-audit", params, metrics, [], pictures, parent,
            kind="audit", files=[folder / "audit.md", folder / "audit.json"],
        )  # fmt: skip
    if ready.reference:
        attach(ready.reference, settings.tracking_uri, "audit", metrics, {report["rule"]: report["rule_version"]})


def metrics_of(report: dict[str, Any]) -> dict[str, float]:
    """The numbers that MLflow gets, by name."""
    found: dict[str, float] = {}
    for name, part in report.get("replacement", {}).items():
        found |= {f"replacement/{name}/{key}": part[key] for key in ("accuracy", "difference") if key in part}
    for key in ("follows_donor", "unrelated", "strict_flips"):
        if (value := report.get("donor", {}).get(key)) is not None:
            found[f"donor/{key}"] = value
    for name in ("latents", "targets"):
        for key in ("cosine_across_samples", "effective_rank"):
            if (value := report.get("inside", {}).get(name, {}).get(key)) is not None:
                found[f"inside/{name}/{key}"] = value
    for name, part in report.get("barred", {}).items():
        if isinstance(part, dict) and "own" in part:
            found |= {f"barred/{name}/{which}/accuracy": part[which]["accuracy"] for which in ("own", "zeros")}
    return found
