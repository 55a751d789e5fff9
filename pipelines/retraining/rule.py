"""The rule by which a challenger replaces the champion: what the user sets, and the decision itself."""

from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from pydantic_settings import CliImplicitFlag

from aecore.config.experiment import Experiment
from aecore.core.errors import InputError
from aecore.core.fingerprint import Frozen

Metric = Literal["accuracy", "reconstruction", "auroc"]
_UNITS: dict[Metric, tuple[int, int, str]] = {
    "accuracy": (100, 2, "points of accuracy"),
    "reconstruction": (100, 2, "% of the champion's reconstruction error"),
    "auroc": (1, 3, "AUROC"),
}
"""How a gain is written in a reason, for each metric: the factor that it is multiplied by, the number of decimals, and
the unit."""


def today() -> date:
    """Return the present date in UTC."""
    return datetime.now(UTC).date()


class Rule(Frozen):
    """When a model is trained again, and when the new model takes over."""

    logical_date: date = Field(default_factory=today)
    """The day that this run stands for (YYYY-MM-DD); today, UTC. In data.path, {date} is replaced by it."""
    metric: Literal["auto", Metric] = "auto"
    """Measure by which champion and challenger are compared, on the same test rows; auto takes auroc (the area under
    the ROC curve, by which anomalies rank first) with data.anomaly, accuracy where the model classifies, else
    reconstruction."""
    margin: NonNegativeFloat | None = None
    """Least gain with which the challenger takes over: a difference of accuracies or of areas under the ROC curve, or a
    share of the champion's reconstruction error; null is 0.005, and 0.02 of areas, which differ more between seeds. The
    95 % interval of the difference must exclude zero as well."""
    warm_start: CliImplicitFlag[bool] = False
    """Finetune from the champion's weights instead of pretraining anew."""
    only_on_drift: CliImplicitFlag[bool] = False
    """Train only if the data have drifted from those that the champion was trained on."""
    drift_effect: Annotated[PositiveFloat, Field(le=1)] = 0.2
    """Effect size from which on a significant difference counts as drift: the largest gap between two distribution
    functions, 0 to 1 (0.2: the means of two normal distributions lie half a standard deviation apart)."""
    catch_up: Literal["latest", "all"] = "latest"
    """What to do about dates that were missed since the last decision: decide once, for the logical date (latest), or
    for each date in order (all)."""
    max_lag: NonNegativeInt | None = None
    """Days after which a logical date is given up; null never gives one up."""

    def least_gain(self, metric: Metric) -> float:
        """Return the margin in units of the metric."""
        return self.margin if self.margin is not None else 0.02 if metric == "auroc" else 0.005


class Decision(NamedTuple):
    """A decision for one logical date: its status and the reason in words."""

    status: Literal["promoted", "kept", "unchanged", "drifted"]
    reason: str


def judge(metric: Metric, scores: Mapping[str, float], margin: float) -> tuple[bool, str]:
    """Return whether the challenger takes over, and the reason.

    The challenger takes over if it is better by the margin, if the 95 % interval of the difference excludes zero, and
    if it is not significantly worse on the frozen rows: those that were test rows already when the champion was made.

    Args:
        scores: metrics of the contest of challenger and champion (`aecore.stages.contest`).
    """
    times, digits, unit = _UNITS[metric]

    def describe(prefix: str) -> str:
        ends = (times * scores[f"{prefix}difference{end}"] for end in ("", "_low", "_high"))
        mean, low, high = (f"{end:+.{digits}f}" for end in ends)
        rows = f"{scores[f'{prefix}rows']:,.0f} test rows"
        if (anomalies := scores.get(f"{prefix}anomalies")) is not None:
            rows += f", {anomalies:,.0f} of them anomalies"
        return f"{mean} {unit} (95 % interval {low} to {high}, {rows})"

    gain = f"the challenger gains {describe('')}"
    if scores["difference"] < margin:
        return False, f"{gain}, less than the margin of {times * margin:g}: a tie, or worse"
    if not scores["difference_low"] > 0:
        return False, f"{gain}, which may be chance: a tie"
    if scores.get("frozen/difference_high", 0.0) < 0:
        return False, f"{gain}, but on the test rows by which the champion was chosen it loses: {describe('frozen/')}"
    return True, f"{gain}, at least the margin of {times * margin:g}"


def decide(
    rule: Rule, metric: Metric, scores: Mapping[str, float], number: str, parent: str, drift: Mapping[str, Any] | None
) -> Decision:
    """Return whether a challenger is promoted, and the reason.

    Args:
        scores: metrics of the challenger's contest with the champion.
        number: the challenger's version.
        parent: the champion's version, empty where there is none yet.
        drift: findings of `aecore.stages.drift`; None where there is no champion.
    """
    if not parent:
        promote, reason = True, f"version {number} is the first champion"
    else:
        promote, reason = judge(metric, scores, rule.least_gain(metric))
        reason = f"version {number} against {parent}: {reason}"
    if drift:
        reason = f"{reason}; {drift['words']}"
    return Decision("promoted" if promote else "drifted" if drift and drift["drifted"] else "kept", reason)


def check_recipe(experiment: Experiment) -> None:
    """Raise an InputError where an experiment cannot be retrained day by day."""
    if experiment.finetune is None:
        raise InputError("finetune: null leaves no model to register; set finetune")
    if experiment.data.split != "content":
        raise InputError(
            f"data.split: {experiment.data.split} moves rows between splits as the data grow, so that a challenger "
            "would train on the champion's test rows; use content"
        )
