"""`ilvr-ds audit`: two passes over the samples on all ranks, and what the main rank makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ilvr_ds import dist
from ilvr_ds.audit import summary
from ilvr_ds.audit.attention import SAMPLES
from ilvr_ds.audit.donors import Member, find_swaps, next_members
from ilvr_ds.audit.passes import ChangedPass, OwnPass, Plan
from ilvr_ds.audit.report import write_report
from ilvr_ds.audit.retrieval import OTHERS, Retrieval
from ilvr_ds.audit.settings import REPLACEMENTS, AuditSettings, selection_of
from ilvr_ds.audit.similarity import similarity
from ilvr_ds.audit.store import LatentStore
from ilvr_ds.audit.targets import Chosen, TargetChooser
from ilvr_ds.audit.verdict import judge
from ilvr_ds.errors import UserError
from ilvr_ds.evaluation.preparation import Prepared, answer_batches, cut_batches, prepare
from ilvr_ds.evaluation.report import left_out_lines
from ilvr_ds.evaluation.results import Line, Results
from ilvr_ds.evaluation.scoring import clean
from ilvr_ds.tracking.origin import read_origin
from ilvr_ds.tracking.registry import attach
from ilvr_ds.tracking.scores import log_scores

MOST_COMPARED = 512
"""Samples whose latents are compared with each other, evenly spread."""


def audit(settings: AuditSettings) -> list[str]:
    """Audit on this rank (collective over the launcher's ranks); returns audit.md as lines.

    Raises UserError for everything that a person can mend, before anything is written.
    """
    if settings.evaluation.max_samples is not None and settings.evaluation.max_samples < 1:
        raise UserError(f"--samples {settings.evaluation.max_samples}: must be 1 or more")
    ready = prepare(settings.evaluation, f"audit-{settings.evaluation.benchmark}")
    selection, source = selection_of(str(ready.folder), ready.reasoner.latent_size, settings.overrides)
    members = dist.decided_by_main(lambda: _members(ready))
    tests, left_out = _possible(settings.tests, ready, members)
    output = ready.settings.output or Path()
    own_results, results = Results(output, "own"), Results(output)
    chooser = TargetChooser(ready.reasoner, selection) if "targets" in tests else None
    identity = ready.identity() | {
        "tests": list(tests),
        "selection": selection.__dict__ if chooser else None,
    }
    dist.decided_by_main(lambda: results.open(identity))
    dist.decided_by_main(lambda: own_results.open(identity))
    size, numbers = ready.settings.batch_size, ready.numbers
    store = LatentStore(output, [numbers[batch.start : batch.stop] for batch in cut_batches(len(numbers), size)])
    first = OwnPass(
        ready,
        store,
        chooser,
        Retrieval(_retrieval_pool(ready, chooser)) if chooser and "inside" in tests else None,
        frozenset(_spread(numbers, SAMPLES)) if "inside" in tests else frozenset(),
    )
    answer_batches(own_results, numbers, size, first.answer, f"{ready.reader.location}: own latents")
    own_lines = {line["number"]: line for line in dist.decided_by_main(own_results.lines)}
    plan = _plan(tests, members)
    if plan.replacements or plan.swaps is not None or plan.is_barred:
        second = ChangedPass(ready, store, own_lines, plan)
        answer_batches(results, numbers, size, second.answer, f"{ready.reader.location}: other latents")
    about = {"selection": selection.__dict__, "selection_from": source, "left_out": left_out}
    lines = dist.decided_by_main(lambda: _finish(ready, results, own_lines, store, plan, tests, about))
    dist.close()
    return lines


def _members(ready: Prepared) -> list[Member]:
    found = []
    for number in ready.numbers:
        sample = ready.reader.read(number)
        answer = clean(sample.answer).casefold()
        found.append(Member(number, sample.id, sample.question, sample.group, answer))
    return found


def _possible(
    wanted: tuple[str, ...], ready: Prepared, members: list[Member]
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Names of tests and replacements that can be done, "targets" where targets are needed; why the others cannot."""
    left_out: dict[str, str] = {}
    tests = list(wanted)
    has_helpers = dist.decided_by_main(lambda: any(ready.reader.read(n).helper_images for n in ready.numbers))
    swaps = find_swaps(members)
    if "donor" in tests and not swaps:
        tests.remove("donor")
        left_out["donor"] = "no two samples of a group have different answers"
    if "replacement" in tests:
        names = dict.fromkeys(REPLACEMENTS, "")
        if not has_helpers:
            names["true"] = "no sample has helper images"
        if len({member.group for member in members}) == 1:
            names["same_group"] = "all samples are of one group: other_sample is the same"
        if len(members) == 1:
            names["other_sample"] = names["same_group"] = "there is one sample"
        if ready.reasoner.latent_size == 1:
            names["half_slots"] = names["first_repeated"] = "a segment has one slot"
        left_out |= {name: why for name, why in names.items() if why}
        tests += [name for name, why in names.items() if not why]
    if "inside" in tests and not has_helpers:
        left_out["retrieval and targets"] = "no sample has helper images"
    if has_helpers and ("inside" in tests or "true" in tests):
        tests.append("targets")
    if ready.left_out:
        left_out["samples"] = "; ".join(left_out_lines(ready.left_out))
    return tuple(tests), left_out


def _plan(tests: tuple[str, ...], members: list[Member]) -> Plan:
    names = tuple(name for name in REPLACEMENTS if name in tests)
    return Plan(
        replacements=names,
        next_sample=next_members(members, within_group=False),
        next_of_group=next_members(members, within_group=True),
        swaps=find_swaps(members) if "donor" in tests else None,
        is_barred="barred" in tests,
    )


def _retrieval_pool(ready: Prepared, chooser: TargetChooser) -> dict[int, Chosen]:
    """Candidates of OTHERS samples and one more, evenly spread over the data, the same on every rank."""
    pool: dict[int, Chosen] = {}
    numbers = _spread(ready.numbers, OTHERS + 1)
    for start in range(0, len(numbers), ready.settings.batch_size):
        part = numbers[start : start + ready.settings.batch_size]
        pool |= dict(zip(part, chooser([ready.reader.read(number) for number in part]), strict=True))
    return pool


def _spread(numbers: list[int], count: int) -> list[int]:
    step = max(1, len(numbers) // count)
    return numbers[::step][:count]


def _finish(
    ready: Prepared,
    results: Results,
    own_lines: dict[int, Line],
    store: LatentStore,
    plan: Plan,
    tests: tuple[str, ...],
    about: dict[str, Any],
) -> list[str]:
    """Numbers, verdict, page, pictures; MLflow and the registry where they were asked for."""
    changed = {line["number"]: line for line in results.lines()}
    lines = [line | changed.get(number, {}) for number, line in own_lines.items()]
    settings = ready.settings
    report: dict[str, Any] = {
        "model": settings.model,
        "data": settings.shards,
        "samples": len(lines),
        "benchmark": ready.benchmark.name,
        "rule": ready.benchmark.rules[0],
        "latent_size": ready.reasoner.latent_size,
        "batch_size": settings.batch_size,
        **about,
        "latents": summary.latents_written(lines),
    }
    if plan.replacements:
        report["replacement"] = summary.replacement(lines, plan.replacements)
        report["power"] = summary.power(report["replacement"])
    if plan.swaps is not None:
        report["donor"] = summary.donor(lines)
    if "inside" in tests:
        report["inside"] = _inside(lines, store, ready.numbers)
    if plan.is_barred:
        report["barred"] = summary.barred(lines)
    verdict = judge(report)
    page, pictures = write_report(report, verdict, results.folder)
    _publish(ready, report, verdict.kind, pictures)
    return [*page, "", f"the audit: {results.folder}"]


def _inside(lines: list[Line], store: LatentStore, numbers: list[int]) -> dict[str, Any]:
    compared = _spread(numbers, MOST_COMPARED)
    return {
        "retrieval": summary.retrieval(lines),
        "latents": similarity(store.read("own", compared)),
        "targets": similarity(store.read("target", compared)),
        "attention": summary.attention(lines),
    }


def _publish(ready: Prepared, report: dict[str, Any], kind: str, pictures: list[Path]) -> None:
    settings = ready.settings
    metrics = metrics_of(report)
    if settings.tracking_uri:
        origin = read_origin(settings.model)
        experiment = settings.experiment or origin.get("experiment") or "evaluation"
        parent = None if settings.experiment else origin.get("mlflow_run_id")
        name = f"{origin.get('run') or Path(settings.model).name}-audit"
        params = {key: report[key] for key in ("model", "data", "samples", "benchmark", "latent_size")}
        params |= {"verdict": kind}
        log_scores(settings.tracking_uri, experiment, name, params, metrics, [], pictures, parent)
    if ready.reference:
        attach(ready.reference, settings.tracking_uri, "audit", metrics)


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
