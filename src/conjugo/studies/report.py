"""The report of a comparison: plots as files, and one HTML page that needs nothing else.

The page reads on a phone, in dark mode and on paper; its frame and style are in report.html.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from conjugo._files import write_aside
from conjugo.studies import drawing, elements, plots, summary
from conjugo.studies.plans import repetitions
from conjugo.studies.statistics import Octaves
from conjugo.studies.summary import Row, batch_name, batches, percent, plural

if TYPE_CHECKING:
    from conjugo.studies.results import CompareResult
    from conjugo.studies.tuning import Axis

__all__ = ["page", "write", "write_plots"]


def write(result: CompareResult, path: Path) -> None:
    """Write the page to *path*."""
    write_aside(Path(path), page(result))


def write_plots(result: CompareResult, out: Path) -> None:
    """Write accuracy and steps_to_target, each as .png and .svg, into folder *out*."""
    for name, draw in (("accuracy", plots.accuracy), ("steps_to_target", plots.steps_to_target)):
        write_aside(Path(out) / f"{name}.png", drawing.png(draw(result)))
        write_aside(Path(out) / f"{name}.svg", drawing.svg(draw(result), name, background="white"))


def page(result: CompareResult) -> str:
    """The whole page; equal results give equal pages."""
    sections = (_problems, _accuracy, _steps, _curves, _settings, _protocol, _configuration)
    main = "\n".join(section(result) for section in sections)
    title = f"Optimizers over batch sizes on {result.config.train.data}"
    return elements.page(title, _header(result, title), main, _footer(result))


# ---- sections ----


def _header(result: CompareResult, title: str) -> str:
    lines = [
        elements.paragraph(summary.headline(result), "headline"),
        elements.paragraph(summary.scaling(result), "lead"),
    ]
    return f"<header>\n<h1>{escape(title)}</h1>\n{''.join(lines)}</header>"


def _footer(result: CompareResult) -> str:
    hours = sum(run.outcome.seconds for run in result.runs) / 3600
    spent = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    text = (
        f"{len(result.runs):,} training runs, {spent} of training in all. Made by conjugo {result.versions['conjugo']}."
    )
    return f"<footer>{escape(text)}</footer>"


def _problems(result: CompareResult) -> str:
    if result.complete:
        return ""
    missing = sum(not cell.complete for cell in result.cells)
    text = (
        f"{missing} of {plural(len(result.cells), 'cell')} are not finished and missing below. Resume to do the rest."
    )
    crashes = "".join(f"<pre>{escape(message)}</pre>" for message in result.crashes)
    return elements.section("Not finished", elements.paragraph(text), crashes)


def _accuracy(result: CompareResult) -> str:
    finished = summary.rows(result)
    best = {batch: max(row.accuracy for row in finished if row.batch_size == batch) for batch in batches(finished)}
    baseline, seeds = result.config.baseline, result.config.seeds

    def cell(row: Row) -> str:
        mark = _mark(row, baseline)
        return elements.cell(
            percent(row.accuracy, row.sd), mark, kind="best" if row.accuracy == best[row.batch_size] else ""
        )

    note = (
        f"Mean ± standard deviation over {plural(seeds, 'fresh seed')}; the best of each batch size is shaded. "
        f"▲ significantly above, ▼ significantly below {baseline} at the same batch size "
        f"(two-sided Welch test, p < {summary.SIGNIFICANT}, not corrected for the number of comparisons)."
    )
    return elements.section(
        "Accuracy",
        elements.figure(
            plots.accuracy(result),
            "accuracy",
            "Test accuracy against batch size.",
            f"Mean and standard deviation of {plural(seeds, 'seed')}.",
            single=True,
        ),
        _matrix("Test accuracy in percent", result, cell),
        elements.paragraph(note, "note"),
        _significance(result),
    )


def _significance(result: CompareResult) -> str:
    baseline = result.config.baseline

    def cell(row: Row) -> str:
        if row.gain is None:
            return elements.cell("–", kind="off")
        return elements.cell(
            f"{100 * row.gain:+.1f}".replace("-", "−"),
            f' <span class="off">(p {escape(summary.p_text(row.p_baseline))})</span>',
        )

    others = [name for name in result.config.optimizers if name != baseline]
    return _matrix(f"Points above or below tuned {baseline}", result, cell, others) if others else ""


def _steps(result: CompareResult) -> str:
    def cell(row: Row) -> str:
        if row.steps_to_target is None:
            return elements.cell("not reached", _reached(row), kind="off")
        return elements.cell(f"{row.steps_to_target:,.0f}", _reached(row))

    def _reached(row: Row) -> str:
        return "" if row.reached in (0, row.seeds) else f' <span class="off">({row.reached} of {row.seeds})</span>'

    target = percent(result.target)
    chosen = (
        "as asked for"
        if result.config.target is not None
        else f"one point below {result.config.baseline} at the smallest batch size"
    )
    note = (
        f"Median of the seeds; “not reached” if the median run does not reach {target} % within the budget; in brackets how "
        f"many did, where some did. Accuracy is measured {result.config.evaluations} times per run. The target is {chosen}."
    )
    caption = "Where a line ends early, the target is not reached at larger batch sizes."
    return elements.section(
        "Steps to target",
        elements.figure(
            plots.steps_to_target(result),
            "steps",
            f"Optimizer steps to {target} % test accuracy against batch size.",
            caption,
            single=True,
        ),
        _matrix(f"Steps to {target} % test accuracy", result, cell),
        elements.paragraph(note, "note"),
    )


def _curves(result: CompareResult) -> str:
    figures = [
        elements.figure(
            plots.learning_curves(result, batch),
            f"curves-{batch}",
            f"{batch_name(result, batch).capitalize()}.",
            "",
            label=f"Test accuracy against steps at {batch_name(result, batch)}, one line per optimizer",
        )
        for batch in batches(summary.rows(result))
    ]
    text = (
        "Median test accuracy of the fresh seeds while they train, their range shaded. The dotted line is the target."
    )
    return elements.section("Learning curves", elements.paragraph(text), elements.grid(figures))


def _settings(result: CompareResult) -> str:
    finished = summary.rows(result)
    header = ("optimizer", "batch size", "learning rate", "second", "usable learning rates", "diverged", "at an edge")
    body = []
    for name in result.config.optimizers:
        for row in (row for row in finished if row.optimizer == name):
            second = "–" if row.second is None else f"{row.second_name} {row.second:.3g}"
            octaves = "–" if row.lr_octaves is None else f"{Octaves(row.lr_octaves, row.lr_octaves_open)} octaves"
            diverged = row.diverged_trials + row.diverged_runs
            cells = [
                elements.cell(batch_name(result, row.batch_size, short=True)),
                elements.cell(f"{row.lr:.3g}"),
                elements.cell(second),
                elements.cell(octaves),
                elements.cell(str(diverged)),
                elements.cell(row.edges or "no", kind="flag" if row.edges else "off"),
            ]
            body.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    edges = sum(bool(row.edges) for row in finished)
    note = (
        "Usable learning rates: how far apart (in doublings) the tried learning rates around the best lie that are within two "
        "points of it; “≥” if they reach an end of what was tried. Diverged: runs whose loss stopped being finite, of all "
        f"{result.config.trials + result.config.seeds}. At an edge: settings in the outer 5 % of their range; a better one may "
        "lie outside, or the hyperparameter matters little."
    )
    verdict = f"{edges} of {len(finished)} chosen settings lie at an edge of the range that was searched."
    return elements.section(
        "Tuned settings",
        elements.paragraph(verdict),
        elements.table("What tuning chose", header, body),
        elements.paragraph(note, "note"),
        _tuning_plots(result),
    )


def _tuning_plots(result: CompareResult) -> str:
    swatch = '<svg viewBox="0 0 10 10" aria-hidden="true"><circle cx="5" cy="5" r="5" fill="{}"/></svg>'
    legend = "".join(
        f"<li>{swatch.format(color)}{escape(batch_name(result, batch))}</li>"
        for batch, color in plots.batch_colors(result).items()
    )
    figures = [
        elements.figure(
            plots.tuning(result, name),
            f"tuning-{name}",
            f"{name}.",
            "",
            label=f"Validation accuracy of the tuning trials of {name} against their learning rate",
        )
        for name in result.config.optimizers
        if any(cell.trials for cell in result.cells if cell.contender.name == name)
    ]
    text = "All tuning trials, over the whole range of learning rates that was searched; the chosen ones are large and ringed."
    return f'{elements.paragraph(text)}<ul class="swatches">{legend}</ul>{elements.grid(figures)}' if figures else ""


def _protocol(result: CompareResult) -> str:
    config, train = result.config, result.config.train
    validation = round(config.validation * result.num_train)
    repeats = repetitions(config.trials)
    items = [
        f"Budget. Every run processes {train.epochs:g} × {result.num_train:,} training examples, forward and backward, at "
        "every batch size: larger batches mean fewer steps, and nothing is free. Step counts are rounded to whole steps.",
        f"Tuning. Each of the {len(result.cells)} cells (an optimizer at a batch size) gets {plural(config.trials, 'trial')}, "
        "over the learning rate on a logarithmic scale and, where the optimizer has one, its second sensitive hyperparameter. "
        f"{plural(config.trials - repeats, 'trial')} search: the first half of them is a scrambled Sobol sequence, the same "
        "for all, the second half is proposed by Optuna's Gaussian-process sampler."
        + (
            f" The other {repeats} repeat the three best settings with other seeds; the best mean wins."
            if repeats
            else ""
        ),
        f"No peeking. Tuning trains on {result.num_train - validation:,} training examples and is judged on the other "
        f"{validation:,}, after as many steps as a final run takes. It never sees the test split.",
        "Measurement. The best setting of each cell is trained on all training data with "
        f"{plural(config.seeds, 'fresh seed')}, which tuning did not use; all accuracies above are of these runs on the test "
        "split, with the weights at the end.",
        *(
            [f"Workers. {config.workers} processes share each run (synchronously; batches are the same as for one)."]
            if config.workers > 1
            else []
        ),
        "Schedules, augmentation, weight decay and initial weights (per seed) are the same for all optimizers.",
        "Runs that diverge count with the accuracy of the weights they end with.",
    ]
    return elements.section("How it was measured", elements.bullets(items))


def _configuration(result: CompareResult) -> str:
    settings = result.config.to_dict()
    train = settings.pop("train")
    for name in ("optimizer", "lr", "optimizer_options", "batch_size", "steps", "evaluations", "checkpoints", "seed"):
        del train[name]  # the comparison sets them
    tuned = {cell.contender.name: cell.contender.axes for cell in result.cells}
    ranges = {
        name: "; ".join(f"{axis.name} {axis.low:g} to {axis.high:g}{_scale(axis)}" for axis in axes)
        for name, axes in tuned.items()
    }
    return elements.section(
        "Configuration",
        "<h3>Comparison</h3>",
        elements.definitions(settings),
        "<h3>Every run</h3>",
        elements.definitions(train),
        "<h3>Searched ranges</h3>",
        elements.definitions(ranges),
        "<h3>Versions</h3>",
        elements.definitions(result.versions),
    )


def _scale(axis: Axis) -> str:
    if axis.complement:
        return f", logarithmic in 1 - {axis.name}"
    return ", logarithmic" if axis.log else ""


# ---- elements ----


def _mark(row: Row, baseline: str) -> str:
    if not row.verdict:
        return '<abbr class="none" aria-hidden="true">▲</abbr>'  # keeps the numbers below each other
    title = f"significantly {row.verdict} than {baseline}"
    return f'<abbr title="{escape(title)}">{summary.MARKS[row.verdict]}</abbr>'


def _matrix(
    caption: str, result: CompareResult, cell: Callable[[Row], str], optimizers: Sequence[str] | None = None
) -> str:
    """A table with a row per optimizer and a column per batch size."""
    finished = summary.rows(result)
    by_cell = {(row.optimizer, row.batch_size): row for row in finished}
    steps = {row.batch_size: row.steps for row in finished}
    header = ["optimizer"]
    for batch in result.batch_sizes:
        below = f"<small>{plural(steps[batch], 'step')}</small>" if batch in steps else ""
        header.append(f"{escape(batch_name(result, batch, short=True))}{below}")
    body = []
    for name in optimizers or result.config.optimizers:
        cells = [by_cell.get((name, batch)) for batch in result.batch_sizes]
        shown = "".join(elements.cell("–", kind="off") if row is None else cell(row) for row in cells)
        body.append(f'<tr><th scope="row">{escape(name)}</th>{shown}</tr>')
    return elements.table(caption, header, body)
