"""nepa forecast: the next steps of a series, read from a pre-trained network, beside what needs none.

RUN is a run of `nepa pretrain` on an adapter that offers `forecasts` (see `nepa_core.modality`). For every horizon: a
ridge regression on the frozen features of the layer and read-out that validate best, the same from random weights, and
on the raw look-back window; and the last value repeated. `finetune=[96]` also trains, through `fit`, the whole network
from these weights and from random ones, and DLinear (arXiv 2205.13504). All of them are fitted on the same
`fit_samples` windows. Ridge strength, layer and read-out are chosen on the validation split; the trained networks are
taken after their last step. Windows left out for missing values are counted under the table. A test window may look
back into the validation rows for its input.

**Units.** One error fits, chooses, trains and is reported, for all rows: that of the series z-scored by its training
rows, MSE and MAE over every test window. Where windows are normalised one by one (`data.normalise=window`), a model
sees and says numbers in a window's own units, which are undone before its error is taken.

**Verdict.** The differences in MSE between pre-trained weights and random ones, the linear model, persistence and
DLinear have 95 % intervals, over stretches of time as long as a look-back with its horizon, all channels together.

**Samples.** `samples=100` gives distributions in place of points: futures sampled token by token from the frozen
network, by a flow head that is trained for each horizon (`flow_steps`), beside the same on random weights; and beside
the linear model, the last season repeated (`season`; by default the one that validates best) and persistence, each with
residuals of validation windows, drawn as whole horizons. CRPS, pinball loss and coverage of the central intervals of 50
and 90 %, over `test_windows` windows drawn at random. RUN/forecast/index.html has fans of some of them. The network was
trained on the places of a look-back alone: figures of long horizons say how well it goes on beyond them.

Every finished row is kept in RUN/forecast/, its figures in summary.json and the squared error of each test window in
errors.npy, and found again by what it depends on (weights, data, samples, steps), so a stopped command goes on where
it was, and another horizon costs only itself. `also=[RUN2,RUN3]` names runs of the same recipe with other seeds: the
table is then mean ± standard deviation over all of them, and intervals are over seeds and stretches together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nepa_core.runtime.distributed import World, world
from nepa_core.runtime.locks import at_work
from nepa_core.runtime.run import Run
from recipes.generation.sampled_forecasts import sample_forecasts, summarised
from recipes.readout.forecasting import ForecastOptions as Options
from recipes.readout.forecasting import check_runs, forecast, over_seeds
from recipes.readout.probing import FREE, check_free
from recipes.report.forecast import render
from recipes.report.sampled_forecasts import report
from recipes.training.pretraining import load_pretrained


def main(target: str, options: Options, changes: dict[str, Any]) -> None:
    check_free("forecast", changes, FREE)
    targets = [target, *options.also]
    check_runs(targets)
    with world() as ranks, ExitStack() as stack:
        for path in sorted(targets):  # in one order, or two commands could wait for each other
            stack.enter_context(at_work(Run(Path(path)), ranks, trains=False))
        if options.samples:
            sampled(targets, options, changes, ranks)
            return
        summaries = []
        for path in targets:
            run = Run(Path(path))
            config, model = load_pretrained(run, ranks.device, changes)
            summary = forecast(config, model, run, options, ranks, show=True)
            if ranks.is_main:
                run.write_summary(summary, "forecast.json")
            summaries.append(summary)
        if ranks.is_main:
            differences = summaries[0]["differences"]
            if options.also:
                whole = over_seeds(targets, summaries, config.data)
                differences = whole["differences"]
                Run(Path(target)).write_summary(whole, "forecast_seeds.json")
            print(render(summaries, differences))


def sampled(targets: Sequence[str], options: Options, changes: Mapping[str, Any], ranks: World) -> None:
    """Distributions in place of points."""
    runs, rows, configs = [Run(Path(target)) for target in targets], [], []
    for run in runs:
        config, model = load_pretrained(run, ranks.device, changes)
        rows.append(sample_forecasts(config, model, run, options, ranks, show=True))
        configs.append(config)
        if ranks.is_main:
            summary, drawn = summarised(config, [run], [config.train.seed], rows[-1:], options)
            run.write_summary(summary, "forecast_samples.json")
    if not ranks.is_main:
        return
    if len(runs) > 1:
        summary, drawn = summarised(configs[0], runs, [config.train.seed for config in configs], rows, options)
        runs[0].write_summary(summary, "forecast_samples_seeds.json")
    found, folder = report(runs[0].path, summary, drawn), runs[0].path / "forecast"
    found.write(folder)
    print(found.text(folder))
