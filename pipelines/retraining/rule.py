"""The rule by which a challenger replaces the champion: what the user sets, and the decision itself."""

from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from pydantic_settings import CliImplicitFlag

from aecore.config.experiment import Experiment
from aecore.core.errors import InputError
from aecore.core.fingerprint import Frozen

Metric = Literal["accuracy", "reconstruction"]


def today() -> date:
    """Return the present date in UTC."""
    return datetime.now(UTC).date()


class Rule(Frozen):
    """When a model is trained again, and when the new model takes over."""

    logical_date: date = Field(default_factory=today)
    """The day that this run stands for (YYYY-MM-DD); today, UTC. In data.path, {date} is replaced by it."""
    metric: Literal["auto", Metric] = "auto"
    """Measure by which champion and challenger are compared, on the same test rows; auto takes accuracy where the model
    classifies, else reconstruction."""
    margin: NonNegativeFloat = 0.005
    """Least gain with which the challenger takes over: a difference of accuracies, or a share of the champion's
    reconstruction error. The 95 % interval of the difference must exclude zero as well."""
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
    unit = "points of accuracy" if metric == "accuracy" else "% of the champion's reconstruction error"

    def describe(prefix: str) -> str:
        mean, low, high = (100 * scores[f"{prefix}difference{end}"] for end in ("", "_low", "_high"))
        return f"{mean:+.2f} {unit} (95 % interval {low:+.2f} to {high:+.2f}, {scores[f'{prefix}rows']:,.0f} test rows)"

    gain = f"the challenger gains {describe('')}"
    if scores["difference"] < margin:
        return False, f"{gain}, less than the margin of {100 * margin:g}: a tie, or worse"
    if not scores["difference_low"] > 0:
        return False, f"{gain}, which may be chance: a tie"
    if scores.get("frozen/difference_high", 0.0) < 0:
        return False, f"{gain}, but on the test rows by which the champion was chosen it loses: {describe('frozen/')}"
    return True, f"{gain}, at least the margin of {100 * margin:g}"


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
        promote, reason = judge(metric, scores, rule.margin)
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
