"""`ilvr-ds audit`: two passes over the samples on all ranks, and what the main rank makes of them."""

from __future__ import annotations

from pathlib import Path

from ilvr_ds import dist
from ilvr_ds.audit.donors import Member, find_swaps, next_members
from ilvr_ds.audit.finish import Finish, spread
from ilvr_ds.audit.passes import ChangedPass, OwnPass, Plan
from ilvr_ds.audit.readings.attention import SAMPLES
from ilvr_ds.audit.readings.retrieval import OTHERS, Retrieval
from ilvr_ds.audit.readings.targets import Chosen, TargetChooser
from ilvr_ds.audit.settings import REPLACEMENTS, AuditSettings, selection_of
from ilvr_ds.audit.store import LatentStore
from ilvr_ds.evaluation.batches import answer_batches, cut_batches
from ilvr_ds.evaluation.preparation import Prepared, prepare
from ilvr_ds.evaluation.report import left_out_lines
from ilvr_ds.evaluation.results import Results
from ilvr_ds.evaluation.scoring import clean
from ilvr_ds.monitoring.run_lock import ANSWERING, run_lock
from ilvr_ds.monitoring.stop_signal import StopSignal


def audit(settings: AuditSettings) -> list[str]:
    """Audit on this rank (collective over the launcher's ranks); returns audit.md as lines.

    Raises UserError for everything that a person can mend, before anything is written; Stopped where a signal came.
    """
    ready = prepare(settings.evaluation, f"audit-{settings.evaluation.benchmark}")
    selection, source = selection_of(str(ready.folder), ready.reasoner.latent_size, settings.overrides)
    members = dist.decided_by_main(lambda: _members(ready))
    tests, left_out = _possible(settings.tests, ready, members)
    output = ready.settings.output or Path()
    own_results, results = Results(output, "own"), Results(output)
    chooser = TargetChooser(ready.reasoner, selection) if "targets" in tests else None
    identity = ready.identity() | {
        "rules": ready.benchmark.versions(),
        "tests": list(tests),
        "selection": selection.__dict__ if chooser else None,
    }
    size, numbers = ready.settings.batch_size, ready.numbers
    store = LatentStore(output, [numbers[batch.start : batch.stop] for batch in cut_batches(len(numbers), size)])
    with run_lock(output, ANSWERING), StopSignal() as signal:
        dist.decided_by_main(lambda: results.open(identity))
        dist.decided_by_main(lambda: own_results.open(identity))
        first = OwnPass(
            ready,
            store,
            chooser,
            Retrieval(_retrieval_pool(ready, chooser)) if chooser and "inside" in tests else None,
            frozenset(spread(numbers, SAMPLES)) if "inside" in tests else frozenset(),
        )
        answer_batches(own_results, numbers, size, first.answer, f"{ready.reader.location}: own latents", signal)
        own_lines = {line["number"]: line for line in dist.decided_by_main(own_results.lines)}
        plan = _plan(tests, members)
        if plan.replacements or plan.swaps is not None or plan.is_barred:
            second = ChangedPass(ready, store, own_lines, plan)
            answer_batches(results, numbers, size, second.answer, f"{ready.reader.location}: other latents", signal)
        about = {"selection": selection.__dict__, "selection_from": source, "left_out": left_out}
        finish = Finish(ready, own_lines, store, plan, "inside" in tests, chooser)
        lines = dist.decided_by_main(lambda: finish(results, about))
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
    if "donor" in tests and (not swaps or ready.benchmark.name == "vsp"):
        tests.remove("donor")
        why = (
            "no two samples of a group have different answers"
            if not swaps
            else "plans are judged on a sample's own map"
        )
        left_out["donor"] = why
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
    numbers = spread(ready.numbers, OTHERS + 1)
    for start in range(0, len(numbers), ready.settings.batch_size):
        part = numbers[start : start + ready.settings.batch_size]
        pool |= dict(zip(part, chooser([ready.reader.read(number) for number in part]), strict=True))
    return pool
