"""Models against benchmarks: accuracies, and their differences to the first line's with paired intervals.

Every cell of a column is of the same samples, judged by the same version of the same rules. Models without latents,
such as the base before training, come first: all others are compared with the first line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from ilvr_ds.errors import UserError, nearest
from ilvr_ds.evaluation.finished import Finished, evaluations_in, read_finished
from ilvr_ds.evaluation.intervals import Effect, effect
from ilvr_ds.tracking.names import metric_name
from ilvr_ds.tracking.scores import check_address, log_scores

SETTINGS = (
    "max_image_pixels", "precision", "generation.max_new_tokens", "generation.temperature", "generation.top_p",
    "generation.seed", "generation.stop",
)  # fmt: skip
"""What changes answers, whichever model gives them, and is said where not all evaluations have the same."""
Column = tuple[str, str, str]
"""Benchmark, fingerprint of its data, rule set."""


@dataclass(frozen=True)
class Row:
    """One model in one mode, and its evaluation for each column that it has."""

    name: str
    cells: dict[Column, Finished]


@dataclass(frozen=True)
class Table:
    """The whole comparison."""

    columns: list[Column]
    rows: list[Row]

    def accuracy(self, row: Row, column: Column) -> float | None:
        """Share of right answers; None where there is no such evaluation."""
        found = row.cells.get(column)
        return sum(found.verdicts[column[2]].values()) / self.samples(column) if found else None

    def effect(self, row: Row, column: Column) -> Effect | None:
        """Accuracy and its difference to the first row's; None for that one, and where one of both is missing."""
        first = self.rows[0].cells.get(column)
        found = row.cells.get(column)
        if first is None or found is None or row is self.rows[0]:
            return None
        base, own = first.verdicts[column[2]], found.verdicts[column[2]]
        return effect([base[number] for number in base], [own[number] for number in base])

    def samples(self, column: Column) -> int:
        """How many there are in each cell."""
        return len(self._any(column).verdicts[column[2]])

    def judge(self, column: Column) -> str:
        """Rule set and version."""
        return f"{column[2]} version {self._any(column).rules[column[2]]['version']}"

    def _any(self, column: Column) -> Finished:
        return next(row.cells[column] for row in self.rows if column in row.cells)


def compare_scores(folders: Sequence[Path], rules: Sequence[str] = ()) -> Table:
    """Set finished evaluations side by side.

    folders: of evaluations, or of models with evaluations in them. rules: rule sets to show, the main one of each
    benchmark unless told. Raises UserError for what cannot be compared: other samples or other versions of the rules.
    """
    found = [read_finished(part) for folder in folders for part in evaluations_in(folder)]
    known = {rule for one in found for rule in one.rules}
    for rule in rules:
        if rule not in known:
            raise UserError(f"--rule: no evaluation was judged by '{rule}'{nearest(rule, known)}")
    columns: dict[Column, Finished] = {}
    rows: dict[str, list[Row]] = {}
    for one in sorted(found, key=lambda one: one.has_latents):
        mine = [(one.settings["benchmark"], one.settings["data"], rule) for rule in _shown(one, rules)]
        for column in mine:
            _check_alike(columns.setdefault(column, one), one, column[2])
        if mine:
            _row_for(one, rows.setdefault(one.model, []), mine).cells.update(dict.fromkeys(mine, one))
    return Table(list(columns), [row for same in rows.values() for row in same])


def terminal_lines(table: Table) -> list[str]:
    """The table in columns of even width, and what it rests on."""
    cells = _cells(table)
    widths = [max(len(row[place]) for row in cells) for place in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [*lines, *_notes(table)]


def markdown(table: Table) -> str:
    """The table in Markdown, with the same notes."""
    header, *rows = [[cell.replace("|", "\\|") for cell in row] for row in _cells(table)]
    lines = [header, ["---"] * len(header), *rows]
    notes = "\n".join(f"- {note}" for note in _notes(table))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{notes}\n"


def send(table: Table, uri: str, experiment: str, file: Path) -> str | None:
    """Log a comparison to MLflow, as a run of its own: the numbers, the rows, and `file` with the Markdown.

    Returns the run's id; None where the server failed. Raises UserError as `log_scores` does.
    """
    check_address(uri)
    metrics: dict[str, float] = {}
    lines: list[dict[str, Any]] = []
    for row, column in product(table.rows, table.columns):
        accuracy, change = table.accuracy(row, column), table.effect(row, column)
        if accuracy is None:
            continue
        name = f"{_title(table, column)}/{column[2]}"
        line: dict[str, Any] = {"model": row.name, "benchmark": _title(table, column), "judge": table.judge(column)}
        line |= {"samples": table.samples(column), "accuracy": accuracy, "cell": _cell(table, row, column)}
        metrics[metric_name(f"{name}/accuracy", row.name)] = accuracy
        if change:
            metrics[metric_name(f"{name}/difference", row.name)] = change.difference
        lines.append(line)
    params = {"first": table.rows[0].name, "judges": ", ".join(sorted({table.judge(c) for c in table.columns}))}
    return log_scores(
        uri, experiment, "comparison", params, metrics, lines, kind="comparison", files=[file], table="comparison.json"
    )


def _shown(one: Finished, rules: Sequence[str]) -> list[str]:
    return [rule for rule in one.rules if rule in rules] if rules else list(one.rules)[:1]


def _row_for(one: Finished, same: list[Row], mine: list[Column]) -> Row:
    """The row of this model: one with its weights that has none of these columns yet, or a new one."""
    for row in same:
        other = next(iter(row.cells.values()))
        is_same_model = other.settings.get("weights") == one.settings.get("weights")
        if is_same_model and not row.cells.keys() & set(mine):
            return row
    same.append(Row(f"{one.model} in {one.folder}" if same else one.model, {}))
    return same[-1]


def _check_alike(first: Finished, other: Finished, rule: str) -> None:
    """Raise UserError where two evaluations of a column have other samples or other rules."""
    if first.verdicts[rule].keys() != other.verdicts[rule].keys():
        counts = " and ".join(str(len(one.verdicts[rule])) for one in (first, other))
        raise UserError(
            f"{other.folder}: has other samples than {first.folder} ({counts}, from the same data); "
            "evaluate both with the same --max-samples"
        )
    versions = [one.rules[rule]["version"] for one in (first, other)]
    if versions[0] != versions[1]:
        raise UserError(
            f"{other.folder}: judged by {rule} version {versions[1]}, {first.folder} by version {versions[0]}; start "
            "the evaluation with the older one again: it judges anew, and answers nothing twice"
        )


def _cells(table: Table) -> list[list[str]]:
    """Header and rows as text."""
    rows = [["model", *(_heading(table, column) for column in table.columns)]]
    for row in table.rows:
        rows.append([row.name, *(_cell(table, row, column) for column in table.columns)])
    return rows


def _heading(table: Table, column: Column) -> str:
    return f"{_title(table, column)}: {column[2]}, n {table.samples(column)}"


def _title(table: Table, column: Column) -> str:
    """The benchmark, and which data where it was run on several."""
    benchmark, data, _ = column
    is_alone = all(other[1] == data for other in table.columns if other[0] == benchmark)
    return benchmark if is_alone else f"{benchmark} on data {data[:8]}"


def _cell(table: Table, row: Row, column: Column) -> str:
    accuracy, change = table.accuracy(row, column), table.effect(row, column)
    if accuracy is None:
        return "-"
    if change is None:
        return f"{accuracy:.3f}"
    return f"{accuracy:.3f}  {change.difference:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"


def _notes(table: Table) -> list[str]:
    judged = f"judged by {', '.join(dict.fromkeys(map(table.judge, table.columns)))}"
    notes = [judged, *_unequal_settings(table)]
    if len(table.rows) == 1:
        return notes
    first = table.rows[0]
    paired = f"differences to {first.name} on the same samples, with 95 % intervals (Newcombe, paired)"
    lacking = [f"{_title(table, column)} ({column[2]})" for column in table.columns if column not in first.cells]
    if lacking:
        notes.insert(0, f"{first.name} has no evaluation of {', '.join(lacking)}: no differences are shown there")
    return [paired, *notes]


def _unequal_settings(table: Table) -> Iterator[str]:
    """A line for each of SETTINGS that has several values; evaluations that do not say theirs do not count."""
    for key in SETTINGS:
        section, _, name = key.rpartition(".")
        found: dict[str, dict[str, None]] = {}
        for row in table.rows:
            for cell in row.cells.values():
                settings = cell.settings.get(section, {}) if section else cell.settings
                if name in settings:
                    found.setdefault(str(settings[name]), {})[row.name] = None
        if len(found) > 1:
            yield f"not the same {name}: " + "; ".join(f"{value} of {', '.join(of)}" for value, of in found.items())
