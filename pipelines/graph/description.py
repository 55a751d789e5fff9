"""What a person reads of a job in MLflow's list of runs: a name, and a description of a few lines.

The code never finds a run by these words, but by keys and tags.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import PurePosixPath

from aecore.config.experiment import Conv, Data, Experiment, Fit
from aecore.config.facts import Facts
from aecore.core.errors import escape_unprintable, hide_secrets, join_names

_MOST_CHARACTERS = 4000
"""Length of a description; MLflow's servers take 5,000 characters or more."""
_NAME_CHARACTERS, _NAME_END = 120, 30
"""Length of a run's name, and how many of its last characters are kept where it is longer."""


@dataclass
class Description:
    """Name and description of a job's run. The job adds what came out of it; the store writes it when the job ends."""

    name: str
    """Such as `mnist 784-256-32 denoising seed 0`."""
    about: str = ""
    """What the job does."""
    results: list[str] = field(default_factory=list)
    """What came out, in Markdown, a line each; the most important number begins the first line."""
    status: str = "finished"
    """How the job ended, where it came to its end."""

    def text(self, status: str = "") -> str:
        """Return the description in Markdown.

        MLflow's list shows the first 40 characters as they are. So these are what came out, or what went wrong.

        Args:
            status: How the job ended; empty while it runs, since MLflow itself shows that.
        """
        lines = [*self.results, self.about]
        if status:
            lines.insert(len(lines) if status == "finished" else 0, f"Status: {status}")
        return "  \n".join(_clean(line) for line in lines if line)[:_MOST_CHARACTERS]  # two blanks break a line


def run_name(text: str) -> str:
    """Return text as the name of a run: one line without secrets, which MLflow's databases can hold. A long text loses
    its middle, since the names of trials and files end with what tells them apart."""
    text = _clean(text)
    if len(text) <= _NAME_CHARACTERS:
        return text
    return f"{text[: _NAME_CHARACTERS - _NAME_END - 3]}...{text[-_NAME_END:]}"


def data_name(data: Data) -> str:
    """Return the name of a named set, or the last part of the path of Parquet data; of several paths, of the first."""
    if data.path is None:
        return data.name
    first, *others = [data.path] if isinstance(data.path, str) else data.path
    name = PurePosixPath(hide_secrets(first).partition("?")[0]).name or data.name
    return run_name(f"{name} and {len(others)} more" if others else name)


def experiment_name(experiment: Experiment, facts: Facts) -> str:
    """Return data, sizes of the layers, variant and seed of an experiment: `mnist 784-256-32 denoising seed 0`.

    The sizes begin with those of the data: the number of features, or of channels before convolutions.
    """
    network = experiment.network
    sizes = [prod(facts.shape), *network.widths]
    if isinstance(network, Conv):
        sizes = [facts.shape[0], *network.widths, *network.dense]
    kind = "conv " if isinstance(network, Conv) else ""
    layers = kind + "-".join(map(str, sizes))
    return run_name(f"{data_name(experiment.data)} {layers} {_training(experiment)} seed {experiment.seed}")


def describe_experiment(experiment: Experiment) -> str:
    """Say in a sentence what is trained, and for how long.

    Args:
        experiment: The experiment, in which every `auto` is resolved.
    """
    parts = []
    if experiment.pretrain is not None:
        network = experiment.network
        count = len(network.widths) + (len(network.dense) if isinstance(network, Conv) else 0)
        layers = "1 layer" if count == 1 else f"{count} layers"
        parts.append(f"{layers} pretrained ({_length(experiment.pretrain)})")
    if experiment.finetune is not None:
        goal = f"finetuned to {experiment.finetune.task}" if parts else f"trained to {experiment.finetune.task}"
        parts.append(f"the whole {goal} ({_length(experiment.finetune)})")
    data = experiment.data
    limit = f"; {data.limit:,} training rows" if data.limit else ""
    # the labels come from the data
    anomaly = f"; anomalies are {_clean(join_names(data.anomaly))}, in training {_kept(data)}" if data.anomaly else ""
    return f"What: {', '.join(parts)}{limit}{anomaly}."


def describe_scores(metrics: Mapping[str, float]) -> list[str]:
    """Say what the metrics of a job tell of its model, and what pretraining was worth, in a line each.

    Args:
        metrics: As `pipelines.execution.summary.job_metrics` names them.
    """
    lines = []
    if (accuracy := metrics.get("test/accuracy")) is not None:
        control = ""
        if "gain/accuracy" in metrics:
            gain = 100 * metrics["gain/accuracy"]
            control = f", control {_percent(metrics['control/accuracy'])}, pretraining gains {gain:+.2f} points"
        lines.append(f"Test accuracy {_percent(accuracy)}{control}.")
    if (auroc := metrics.get("test/auroc")) is not None:
        ends = [metrics.get(f"test/auroc_{end}") for end in ("low", "high")]
        interval = f" (95 % interval {ends[0]:.3f} to {ends[1]:.3f})" if None not in ends else ""
        lines.append(
            f"Area under the ROC curve {auroc:.3f}{interval}, average precision "
            f"{metrics['test/average_precision']:.3f}."
        )
    if "reference/auroc" in metrics:
        lines.append(_against_neighbours(metrics))
    if (error := metrics.get("test/reconstruction_mse")) is not None:
        control = ""
        if "gain/reconstruction_mse" in metrics:
            gain = metrics["gain/reconstruction_mse"]
            control = f", control {metrics['control/reconstruction_mse']:.4g}, pretraining lowers it by {gain:.4g}"
        lines.append(f"Reconstruction error per feature {error:.4g}{control}.")
    if "test/accuracy_low" in metrics:
        low, high = _percent(metrics["test/accuracy_low"]), _percent(metrics["test/accuracy_high"])
        lines.append(f"95 % interval of the accuracy: {low} to {high}.")
    if any(name.startswith("control/") for name in metrics):
        lines.append("Control: the same network, finetuned from random weights.")
    return lines


def _training(experiment: Experiment) -> str:
    """Name the variant, and say so where nothing is pretrained: a classifier then has no variant."""
    if experiment.pretrain is not None:
        return experiment.variant.kind
    assert experiment.finetune is not None, "an experiment trains something"
    return f"{experiment.variant.kind} end to end" if experiment.finetune.task == "reconstruct" else "supervised"


def _length(fit: Fit) -> str:
    length = f"{fit.epochs} epochs" if fit.steps is None else f"{fit.steps:,} steps"
    return f"{length}, lr {fit.lr:g}"


def _against_neighbours(metrics: Mapping[str, float]) -> str:
    """Say whether a model finds anomalies better than the distance to nearest neighbours among the features does."""
    gain, low, high = (metrics[f"reference/difference{end}"] for end in ("", "_low", "_high"))
    verdict = "better" if low > 0 else "worse" if high < 0 else "no different"
    return (
        f"Nearest neighbours on the features have {metrics['reference/auroc']:.3f}: the model is {verdict} "
        f"({gain:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _kept(data: Data) -> str:
    """Say which anomalies stay among the training rows."""
    words = {"clean": "none", "mixed": "as many as there are"}
    return words.get(str(data.contamination)) or f"{100 * float(data.contamination):g} % of the rows"


def _clean(text: str) -> str:
    return escape_unprintable(hide_secrets(" ".join(text.split())))
