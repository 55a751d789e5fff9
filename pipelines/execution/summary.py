"""The metrics of a job's run, gathered from those of its stages."""

from collections.abc import Mapping

from pipelines.execution.chain import Outcome


def job_metrics(outcomes: Mapping[str, Outcome]) -> dict[str, float]:
    """Return the metrics of a job that has trained a model: `test/...`, `val/...` (finetuning's best epoch),
    `control/...` (the control), and `gain/...`, by how much the model is better than the control: the difference of
    accuracies, or by how much the reconstruction error is lower.

    Args:
        outcomes: The job's stages by name.
    """
    metrics = dict(outcomes["evaluate"].metrics)
    if "finetune" in outcomes:
        best = {k: v for k, v in outcomes["finetune"].metrics.items() if k.startswith("best/")}
        metrics |= {k.replace("best/", "val/"): v for k, v in best.items()}
    if "evaluate control" in outcomes:
        control = {k.replace("test/", "control/"): v for k, v in outcomes["evaluate control"].metrics.items()}
        metrics |= control
        for name, sign in (("accuracy", 1), ("reconstruction_mse", -1)):
            if f"control/{name}" in control and f"test/{name}" in metrics:
                metrics[f"gain/{name}"] = sign * (metrics[f"test/{name}"] - control[f"control/{name}"])
    return metrics


def train_seconds(outcomes: Mapping[str, Outcome]) -> float:
    """Return the seconds that training took in all stages, in restored ones at their time."""
    return sum(outcome.metrics.get("train_seconds", 0.0) for outcome in outcomes.values())
