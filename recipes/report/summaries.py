"""What the tasks leave as figures: every key of summary.json and its like, a class for each file.

Keys that only some runs have, or that runs of an earlier version lack, are marked by nothing: look whether they are
there. Shares and accuracies lie between 0 and 1, `seconds` are of training alone. A plain dictionary holds the fields
of the class that its comment names.

One kind of key has no end: `finetuned_10`, `finetuned_50`, `finetuned_all` and so on, of how many labels a class a
comparison was asked for. `finetuned` writes it, `found_at` reads it; beside random weights it ends in `_random`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, TypedDict, TypeVar, cast

from modalities.orders.measures import OrderMeasures
from nepa_core.runtime.going_on import Change
from nepa_core.runtime.weights import Origin
from recipes.networks.goals import GoalFigures
from recipes.statistics.segment_metrics import SegmentFigures
from recipes.statistics.significance import Spread


class MadeWith(TypedDict):
    """What a number needs beside it."""

    command: str
    commit: str | None  # with a + where the work tree differs from it; None outside a checkout
    device: str
    processes: int
    threads: int  # of torch
    python: str
    torch: str


class Unreadable(TypedDict, total=False):
    """Samples that could not be read and were left out: how many, and name and cause of each."""

    unreadable_samples: int  # for training
    unreadable_messages: list[str]
    unreadable_held_out: int
    unreadable_held_out_messages: list[str]


class Cost(TypedDict, total=False):
    """What training took."""

    steps: int
    seconds: float
    tokens_per_second: float  # without padding
    data_wait_share: float  # of the seconds, spent on waiting for batches
    parameters: int
    changes: list[Change]  # of settings, midway
    began_with: str  # a digest of the weights of `init=`, or of the file of a network of timm


class TrainingCost(Cost, Unreadable, total=False):
    """What `recipes.training.train.cost` gives."""

    made_with: MadeWith


# ------------------------------------------------------------------------------------------ training on one run


class PairCredits(TypedDict, total=False):
    """The share of its places that each held-out sample had identified, see `recipes.statistics.credits`."""

    model: str
    linear: str  # by the linear autoregression
    clusters: str | None  # see `recipes.statistics.held_out.pack_clusters`


class PretrainSummary(Cost, Unreadable, total=False):
    """summary.json of `nepa pretrain`. Down to `loss_per_position` it is `nepa_core.verdict.judge.Verdict`."""

    samples: int
    asked: int
    clusters: int
    rivals_overlap: bool
    fitted_samples: int
    training_samples: int
    linear_features: int
    linear_of: int
    linear_curve: list[dict[str, Any]]  # LinearPoint
    linear_moved: float | None
    linear_moved_ci95: float | None
    loss: float
    baseline_copy: float
    baseline_mean: float
    baseline_position_mean: float
    baseline_linear: float
    copy_wins: float
    retrieval_candidates: int
    retrieval_top1: float
    retrieval_top1_linear: float
    retrieval_top1_copy: float
    retrieval_top1_mean: float
    retrieval_top1_position_mean: float
    retrieval_top1_untrained: float
    margin_linear: float
    margin_linear_ci95: float | None
    margin_copy: float
    margin_copy_ci95: float | None
    margin_untrained: float
    margin_untrained_ci95: float | None
    counts: dict[str, Any]  # CountControl, where tokens are symbols
    effective_rank_embedding: float
    effective_rank_embedding_start: float
    effective_rank_prediction: float
    effective_rank_prediction_start: float
    spread_embedding: float
    spread_prediction: float
    shared_direction_embedding: float
    shared_direction_embedding_start: float
    shared_direction_prediction: float
    collapsed: bool
    loss_per_position: dict[str, list[float | None]]  # None where no sample has a token
    objective: float  # the run's own, on held-out data
    origin: Origin  # with init=: which weights it began with
    retrieval_top1_first: float  # with init=: identified among the samples watched while training, at step 0
    retrieval_top1_last: float  # and after the last step
    strata: dict[str, dict[str, Any]]  # nepa_core.verdict.judge.Verdict of each kind of samples: the parts of a mix
    crossings: dict[str, dict[str, Any]]  # "B from A" -> nepa_core.verdict.crossing.Crossed, of pairs
    optimum: float  # the loss that no predictor can beat, where the adapter knows it
    causal: bool
    weights: str  # "raw" or "ema": which were judged
    space: str  # of the objective
    credits: PairCredits
    advice: list[str]  # what to try, a sentence each
    made_with: MadeWith


class HeldOutFigures(GoalFigures, Unreadable, total=False):
    """Held-out figures of a network that was trained on labels."""


class FinetuneSummary(GoalFigures, Cost, Unreadable, total=False):
    """summary.json of `nepa finetune`."""

    init: str | None  # where the weights came from
    new_weights: list[str]  # parameters that were not in those
    classes: list[str] | None  # None of a regression
    causal: bool
    worth: dict[str, Any]  # recipes.statistics.worth.Worth: beside the control and others, where there are any
    backbone: str  # of a run that stands beside another: its network
    criterion: str  # the loss, where it is not the usual one of these labels: "bce"
    made_with: MadeWith


class FoldSpread(TypedDict):
    """A figure over folds: of each in their order, their mean, and their sample standard deviation."""

    values: list[float]
    mean: float
    std: float


class FoldsSummary(TypedDict, total=False):
    """summary.json of `nepa finetune folds=`, in the folder that holds the run of each fold."""

    init: str | None
    folds: list[str]
    samples: list[int]  # held out, that could be read
    unreadable_held_out: int  # of all folds together
    figures: dict[str, FoldSpread]  # key of GoalFigures
    margins: dict[str, FoldSpread]  # the control and others -> how far each run is ahead, in `metric`
    lacking: dict[str, list[str]]  # of these the ones that have no margin -> the folds that don't stand beside them
    metric: str
    made_with: MadeWith


class SegmentSummary(SegmentFigures, Cost, Unreadable, total=False):
    """summary.json of `nepa segment`."""

    init: str | None
    new_weights: list[str]
    head: str
    causal: bool
    evaluation: dict[str, Any]  # recipes.networks.windows.EvaluationConfig
    made_with: MadeWith


class EvaluateSummary(GoalFigures, SegmentFigures, Unreadable, total=False):
    """evaluate.json: figures of one pixel a class, or of one sample or token a class or number."""

    evaluation: dict[str, Any]  # as of SegmentSummary
    held_out_as: str | None  # how pixels came from the stored images
    weights: str  # "raw" or "ema"
    made_with: MadeWith


class ImportRecord(TypedDict, total=False):
    """import.json: where the weights of an imported run came from."""

    source: str
    sha256: dict[str, str]  # file -> digest
    config: dict[str, Any]  # the checkpoint's own
    preprocessor: dict[str, Any]
    made_with: MadeWith


class GraphTensor(TypedDict):
    """An input or output of a graph; an axis of any length has a name: "batch", "tokens", "4*tokens"."""

    name: str
    dtype: str
    shape: list[int | str]


class GraphRecord(TypedDict):
    """FILE.json of `nepa export format=onnx` and `format=torch`."""

    run: str
    weights: str  # "raw" or "ema"
    digest: str  # of the checkpoint
    layer: str  # and the pooling, as in probe.json
    causal: bool
    format: str
    opset: int | None  # of ONNX
    inputs: list[GraphTensor]
    outputs: list[GraphTensor]
    about: str  # what the inputs are, in which units
    adapter: str
    settings: dict[str, Any]  # of the adapter: how samples become the inputs
    held_out_as: str | None  # how pixels came from the stored images
    largest_difference: float  # between graph and run; of features above 1 as a share of the largest
    notes: list[str]  # ways that were tried before, and why they failed
    versions: dict[str, str]
    made_with: MadeWith


# -------------------------------------------------------------------------------------------------- read-outs


class ProbeScore(TypedDict, total=False):
    """One classifier on one row: held-out accuracy, mAP of several classes a sample, or R2 of numbers."""

    accuracy: float
    map: float
    r2: float
    validation: float  # the same on held-back training samples
    credits: str | None  # what each test sample adds, packed; None where one is not finite. Not in probe.json


class ProbeRow(TypedDict, total=False):
    """A layer and a pooling. Its own figures are those of the first classifier."""

    name: str
    accuracy: float
    map: float
    r2: float
    validation: float
    credits: str | None  # as of ProbeScore
    clusters: str | None  # of the test samples, packed; in comparisons alone
    scores: dict[str, ProbeScore]  # classifier -> its figures
    effective_rank: float | None  # None of an attentive row


class RandomInit(TypedDict):
    """The same of the network with random weights."""

    layers: list[ProbeRow]
    best: ProbeRow


class ProbeCredits(TypedDict):
    """What each test sample adds to the figure of a row, packed; None where one is not finite."""

    best: str | None
    random_init: str | None  # of its best
    raw_tokens: str | None
    clusters: str | None


class ProbeBeside(TypedDict):
    """Another network, read in the same way."""

    name: str
    about: str  # what it is, and how it reads its samples
    layers: list[ProbeRow]
    best: ProbeRow  # by the validation figure
    credits: str | None  # of its best, as of ProbeCredits


class ProbeSummary(Unreadable, total=False):
    """probe.json."""

    layers: list[ProbeRow]
    best: ProbeRow  # by the validation figure
    random_init: RandomInit
    raw_tokens: ProbeRow
    raw_tokens_attentive: ProbeRow  # where asked for
    beside: list[ProbeBeside]  # where asked for
    worth: dict[str, Any]  # recipes.statistics.worth.Worth
    credits: ProbeCredits
    paper: dict[str, ProbeRow]  # name of the paper's probe -> its row
    majority: float  # accuracy of the most frequent class, where tokens have classes
    causal: bool  # attention of the read-out
    train_samples: int  # tokens, where these have classes
    test_samples: int
    seed: int
    notes: list[str]  # what was left out, and why
    made_with: MadeWith


class ForecastFigures(TypedDict, total=False):
    """summary.json of a row of `nepa forecast`, in RUN/forecast/; errors of the z-scored series."""

    mse: float
    mae: float
    readout: str  # layer and form of the features, where they were chosen
    validation_mse: float
    steps: int  # of a network that was trained
    seconds: float


class ForecastRow(ForecastFigures, total=False):
    """The same row in the table."""

    name: str
    folder: str  # in the run's


class ErrorDifference(TypedDict):
    """Squared error of a rival minus that of a row, paired over test windows."""

    row: str
    rival: str
    mse: float  # of the rival
    mean: float
    half: float | None  # half-width of the 95 % interval
    df: float  # degrees of freedom


class ForecastSetting(TypedDict, total=False):
    """What was forecast and how. Horizons are keys, as text."""

    stretches: dict[str, int]  # independent ones among the test windows
    windows: dict[str, int]  # test windows
    left_out: dict[str, int]  # of them, for missing values
    fitted_on: dict[str, int]  # training windows
    look_back: int  # steps
    patch: int  # where the adapter has such a setting, as the next two
    channels: str
    normalise: str
    finetune_steps: int
    fit_samples: int  # most training windows
    made_with: MadeWith
    differences: dict[str, list[ErrorDifference]]


class ForecastSummary(ForecastSetting, total=False):
    """forecast.json."""

    horizons: dict[str, list[ForecastRow]]
    seed: int


class SeedsRow(TypedDict):
    """A row over several runs."""

    name: str
    mse: Spread
    mae: Spread


class SeedsSummary(ForecastSetting, total=False):
    """forecast_seeds.json: the setting is that of the first run."""

    horizons: dict[str, list[SeedsRow]]
    seed: list[int]
    runs: list[str]  # their folders


class SampledFigures(TypedDict, total=False):
    """summary.json of a row of `nepa forecast samples=`, in RUN/forecast/: means over windows, z-scored."""

    crps: float
    pinball_10: float
    pinball_50: float
    pinball_90: float
    coverage_50: float  # share of values within the central interval of 50 %
    coverage_90: float
    season: int  # steps, of a row that repeats one


class SampledRow(SampledFigures, total=False):
    """The same row in the table."""

    name: str
    folder: str  # in the first run's
    half: dict[str, float | None]  # half-widths of 95 % intervals, by figure


class ScoreDifference(TypedDict):
    """CRPS of a rival minus that of the pre-trained network's samples, paired over test windows."""

    rival: str
    crps: float  # of the rival
    mean: float
    half: float | None  # half-width of the 95 % interval
    df: float  # degrees of freedom


class SampledSummary(TypedDict, total=False):
    """forecast_samples.json, and forecast_samples_seeds.json over several runs. Horizons are keys, as text."""

    horizons: dict[str, list[SampledRow]]
    differences: dict[str, list[ScoreDifference]]
    stretches: dict[str, int]  # independent ones among the test windows that are scored
    windows: dict[str, int]  # test windows that are scored
    whole: dict[str, int]  # that there are
    look_back: int  # steps
    places: int  # tokens of the look-back
    samples: int  # of each window
    fit_samples: int  # most training windows
    flow_steps: int
    seed: list[int]
    runs: list[str]  # their folders
    made_with: MadeWith


# ------------------------------------------------------------------------------------------------- generation


class GenerateRow(TypedDict):
    """What a rival scores, lower is better."""

    name: str
    figure: float
    margin: float  # this figure minus that of the network, paired over samples
    ci95: float | None  # half-width of its 95 % interval; None of the network itself, or where it is not known


class GenerateVerdict(TypedDict):
    """What beats the network."""

    headline: str
    verdict: str  # the sentence that begins with it


class LawFigures(TypedDict):
    """Samples against the law of the data, where that is known: a mean and the half-width of its 95 % interval each."""

    mean: list[float | None]  # shift of their mean, in standard deviations
    variance: list[float | None]  # of theirs over the law's


class ReadingFigures(TypedDict):
    """What is read of the mean of the next token, by name: `Modality.readings`."""

    name: str
    measure: str  # "right", the share of classes, or "error", the mean absolute one of numbers
    rows: list[GenerateRow]


class ToldApart(TypedDict, total=False):
    """Generated signals among held-out ones; pairs are a mean and the half-width of its 95 % interval."""

    trees: list[float | None]  # share that boosted trees tell for what they are
    linear: list[float | None]  # and a linear classifier
    each: int  # signals of either kind
    copies: list[float | None]  # share as close to a training sample as the closest 1 % of held-out ones
    copies_held_out: float  # of these
    diversity: list[float | None]  # mean distance of two of them over that of two held-out ones


class GenerateSummary(TypedDict, total=False):
    """generate.json."""

    keep: float  # share of the tokens that is given, or how many
    region: list[int] | None  # or what of the grid is made
    split: str
    samples: int
    clusters: int  # independent ones
    of: int  # samples of the split
    draws: int  # of every token and completion
    steps: int  # of the solver
    temperature: float
    seed: int
    train_samples: int  # the decoders are of
    decoder_steps: int
    width: int
    first: int  # tokens that are given where all else is drawn: 0 with BOS
    verdict: GenerateVerdict  # by completions
    verdict_next: GenerateVerdict  # by next tokens
    completion: list[GenerateRow]  # energy score
    next_token: list[GenerateRow]  # energy score
    mean_error: list[GenerateRow]  # squared error of the mean of the next token
    own_error: float  # of a token from its own embedding
    fid: dict[str, float]  # recipes.generation.frechet.Frechet
    psnr: float  # of mean completions, where samples are pictures, in dB
    quantised: int  # numbers of a sample that have levels
    numbers: int  # of a sample
    from_nothing: ToldApart
    completed: ToldApart
    training: ToldApart  # the same of training samples, which are real: what the splits differ by
    readings: list[ReadingFigures]  # where the adapter names any
    law: LawFigures
    notes: list[str]
    seconds: float
    made_with: MadeWith


# ------------------------------------------------------------------------------------------------ comparisons

Value = TypeVar("Value")
"""A number in what was measured of one run, and its `Spread` over seeds in a summary."""


class Predicted(TypedDict, Generic[Value], total=False):
    """Of the verdict of pre-training; a lift is how much lower the loss is than a baseline's."""

    loss: Value
    lift_copy: Value
    lift_mean: Value
    lift_position_mean: Value
    lift_linear: Value
    retrieval_top1: Value
    retrieval_top1_linear: Value
    retrieval_top1_copy: Value
    retrieval_top1_mean: Value
    retrieval_top1_position_mean: Value
    retrieval_top1_untrained: Value
    effective_rank_embedding: Value
    effective_rank_embedding_start: Value
    effective_rank_prediction: Value
    effective_rank_prediction_start: Value
    collapsed: Value


class ReadOut(TypedDict, Generic[Value], total=False):
    """The probe of a start, and of random weights where each variant has its own; `finetuned_N` stands beside it."""

    probe: Value  # of the best layer
    probe_final: Value  # of the final norm
    probe_random: Value
    probe_final_random: Value
    raw_tokens: Value


class Layers(TypedDict, total=False):
    """Layer by layer."""

    name: list[str]
    probe: list[float]
    rank: list[float]  # effective rank of the means over tokens
    probe_random: list[float]
    rank_random: list[float]


class ChosenSetting(TypedDict, total=False):
    """The best setting of a fine-tuning."""

    lr: float
    steps: int
    causal: bool
    at_end: list[str]  # "lr", "steps": those whose best lies at an end of what was tried


HeadKey = Literal["distance", "entropy", "on_bos", "on_neighbours"]


class HeadFigures(TypedDict):
    """Of every layer and head."""

    distance: list[list[float]]  # cells of the grid
    entropy: list[list[float]]  # nats
    on_bos: list[list[float]]
    on_neighbours: list[list[float]]  # share on the 8 tokens around
    uniform: list[float]  # the same four of equal attention wherever a token may look


class RunMeasures(Predicted[float], ReadOut[float], total=False):
    """What a comparison keeps of one run: NAME-HASH.json in the run's folder, and random/ of random weights."""

    loss_per_position: dict[str, list[float | None]]
    metric: str  # of the probe and of fine-tuning: accuracy, map, r2, or skill of a forecast
    probe_row: str  # which one is the best
    probe_row_random: str
    layers: Layers
    settings: dict[str, ChosenSetting]  # finetuned_N -> how
    label_counts: dict[str, int]  # finetuned_N -> labelled samples used in all
    credits: dict[str, str]  # measure -> what each test sample adds, packed
    clusters: dict[str, str]  # measure -> of the test samples, packed
    attention: HeadFigures  # of `nepa orders`, as the next
    order: OrderMeasures
    verdict: str  # of `nepa objectives`: the judgement in capitals
    rank_over_training: list[list[float]]  # step and effective rank of the embeddings


Runs = Mapping[str, Sequence[RunMeasures]]
"""Variant -> what was measured, one a seed."""


class Accuracies(TypedDict, total=False):
    """The spread of the probe, flat."""

    accuracies: list[float]  # a number a seed
    mean: float
    std: float
    ci95: float | None
    both: float


class OrderFigures(Accuracies, Predicted[Spread], ReadOut[Spread], total=False):
    """One order."""

    probe_gain: Spread  # over random weights
    order: OrderMeasures  # of the first seed, as the next three
    attention: HeadFigures
    layers: Layers
    loss_per_position: dict[str, list[float | None]]
    probe_rows: list[str]  # a seed each


class ObjectiveFigures(Accuracies, Predicted[Spread], ReadOut[Spread], total=False):
    """One objective, or random weights, which have no prediction."""

    gain: dict[str, Spread]  # measure -> over random weights
    verdicts: list[str]  # a seed each, as the next two
    settings: dict[str, list[ChosenSetting]]
    probe_rows: list[str]
    terms: dict[str, float]  # of the config, as the next two
    stop_gradient: bool
    head: str


class ComparisonSummary(TypedDict, total=False):
    """What the summary.json of comparisons have in common."""

    task: str
    recipe: str
    seeds: list[int]
    look: dict[str, Any]  # recipes.statistics.protocol.Look
    raw_tokens: float  # their probe
    margins: dict[str, Spread | None]  # variant -> identification over the linear baseline
    made_with: MadeWith


class Cross(TypedDict):
    """Probes of the models of one seed, read with other orders than they were trained with."""

    orders: list[str]
    seed: int
    accuracy: list[list[float]]  # trained with x read with


class Foresight(TypedDict):
    """recipes.statistics.power.Outlook, and in words: what so many seeds will show, said before they are trained."""

    seeds: int
    variants: int
    spread: float | None
    sees: float | None
    needs: int | None
    at_best: float | None
    words: str


class OrdersSummary(ComparisonSummary, total=False):
    """summary.json of `nepa orders`."""

    metric: str
    labels: list[int | str]  # a class; "all"
    finetune_steps: int
    verdict: list[str]  # sentences
    ranking: list[str]  # by mean accuracy
    orders: dict[str, OrderFigures]
    differences: list[dict[str, Any]]  # recipes.statistics.significance.Difference: orders against each other
    against_random: list[dict[str, Any]]  # the same against random weights under the same order
    foresight: Foresight | None
    cross: Cross
    runs: dict[str, list[str]]  # order -> folders, a seed each


class Choices(TypedDict, total=False):
    """What the settings of a fine-tuning were chosen from, see `recipes.comparison.downstream.Care`."""

    learning_rates: list[float]
    finetune_steps: list[int]
    finetune_causal: list[bool]
    horizon: int
    folds: int
    extensions: int


class ObjectivesSummary(ComparisonSummary, total=False):
    """summary.json of `nepa objectives`."""

    metric: str
    measures: list[str]  # "probe", "probe_final", then finetuned_N
    labels: list[int | str]
    choices: Choices
    label_counts: dict[str, int]  # finetuned_N -> labelled samples used in all
    verdict: list[str]
    ranking: list[str]
    random: ObjectiveFigures  # random weights
    objectives: dict[str, ObjectiveFigures]
    against_random: dict[str, list[dict[str, Any]]]  # measure -> Difference
    against_cosine: dict[str, list[dict[str, Any]]]
    runs: dict[str, list[str]]


class AblateFigures(TypedDict, Generic[Value], total=False):
    """An arm: of one seed, or over all."""

    objective: Value
    loss: Value
    retrieval_top1: Value
    effective_rank_embedding: Value
    probe_best: Value
    probe_final: Value
    rank_over_training: list[list[float]]  # of the first seed


class AblateRow(AblateFigures[float], total=False):
    """ablate-HASH.json in the folder of a run."""

    effective_rank_embedding_start: float
    collapsed: bool
    probe_random: float
    probe_raw: float
    credits: dict[str, str]  # as of RunMeasures
    clusters: dict[str, str]


class Arm(AblateFigures[Spread], total=False):
    """One arm over seeds."""

    collapsed: int  # seeds


class AblateSummary(ComparisonSummary, total=False):
    """summary.json of `nepa ablate`."""

    verdict: str
    arms: dict[str, Arm]
    differences: list[dict[str, Any]]  # recipes.statistics.significance.Difference: arms against the base
    effective_rank_embedding_start: float
    random_init: Spread  # the probe of random weights


class TransferRow(TypedDict, total=False):
    """transfer-HASH.json in the folder of a run, and random/ of random weights."""

    parts: dict[str, RunMeasures]  # of those that the run was trained on
    raw_tokens: dict[str, float]  # beside random weights: part -> the probe of its raw tokens


class TransferSummary(ComparisonSummary, total=False):
    """summary.json of `nepa transfer`; plain dictionaries are by part."""

    parts: list[str]
    metrics: dict[str, str]
    steps: dict[str, int]  # by variant
    probes: dict[str, dict[str, Spread]]  # variant -> the probe of the best layer
    gains: dict[str, dict[str, Spread]]  # way of training together -> over the part alone
    random: dict[str, Spread]
    raw: dict[str, float]
    differences: dict[str, list[dict[str, Any]]]  # recipes.statistics.significance.Difference: against the part alone
    verdict: list[str]
    runs: dict[str, list[str]]


def finetuned(labels: int | str | None) -> str:
    """The key of fine-tuning on so many labels a class, None or "all" for all."""
    return f"finetuned_{'all' if labels is None else labels}"


def found_at(figures: Mapping[str, object], measure: str) -> Spread:
    """The spread of a measure whose name is not known before, such as one of `finetuned`."""
    return cast(Spread, figures[measure])
