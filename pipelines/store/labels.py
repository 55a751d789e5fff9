"""What MLflow's pages show of a run besides its numbers: names, source, user, commit and data."""

import json
from collections.abc import Sequence

from mlflow.entities import Dataset, DatasetInput, InputTag, SourceType
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NAME,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from aecore.config.facts import Facts
from pipelines.graph.description import Description, run_name
from pipelines.graph.stage import Stage
from pipelines.host.environment import program_name, user_name

ORIGIN = (MLFLOW_USER, MLFLOW_SOURCE_NAME, MLFLOW_SOURCE_TYPE, MLFLOW_GIT_COMMIT)
"""Tags that the runs in a job's run have from it: who started the job, what program, and its commit."""

_COLUMNS = (
    "attributes.`Description`", "metrics.`test/accuracy`", "metrics.`control/accuracy`", "metrics.`gain/accuracy`",
    "metrics.`test/reconstruction_mse`", "metrics.`train_seconds`", "params.`data.name`", "params.`network.widths`",
    "params.`variant.kind`", "params.`pretrain.epochs`", "params.`pretrain.lr`", "params.`finetune.epochs`",
    "params.`finetune.lr`", "params.`seed`",
)  # fmt: skip
SAVED_VIEW = {
    "mlflow.sharedViewState.diabolo": json.dumps(
        {"name": "Results", "createdAt": 0, "state": json.dumps({"selectedColumns": _COLUMNS})}
    )
}
"""Tag of an experiment by which the menu "Views" over MLflow's list offers the columns that people compare by: the list
itself shows no result. MLflow's pages write such a tag for "Save as new view" (seen in MLflow 3.17); other versions
ignore it."""


def job_tags(description: Description, commit: str) -> dict[str, str]:
    """Return the tags by which MLflow's list shows a job.

    Args:
        commit: The commit of the code, or "unknown".
    """
    tags = {
        MLFLOW_RUN_NAME: run_name(description.name), MLFLOW_RUN_NOTE: description.text(), MLFLOW_USER: user_name(),
        MLFLOW_SOURCE_NAME: program_name(), MLFLOW_SOURCE_TYPE: SourceType.to_string(SourceType.LOCAL),
    }  # fmt: skip
    return tags if commit == "unknown" else {**tags, MLFLOW_GIT_COMMIT: commit}


def tags_of(stage: Stage, parent: str, job: str = "") -> dict[str, str]:
    """Return the tags of the run of a stage or trial, which is nested in the run `parent`.

    Args:
        job: The name of the job that the stage belongs to, to be part of the run's name; a trial's name says enough.
    """
    return {
        MLFLOW_RUN_NAME: run_name(f"{stage.name} ({job})" if job else stage.name), MLFLOW_PARENT_RUN_ID: parent,
        "stage.name": stage.name, "stage.key": stage.key, "stage.fn": stage.fn, "attempts": "1",
    }  # fmt: skip


def dataset_of(name: str, facts: Facts, about: Sequence[str], context: str) -> DatasetInput:
    """Return the data that a run read, as MLflow shows them.

    Args:
        about: What was read of them, see `aecore.data.dataset.describe`.
        context: What for: training or inference.
    """
    profile = {"rows": facts.rows, "shape": facts.shape, "classes": len(facts.classes), "read": list(about)}
    dataset = Dataset(
        name=name, digest=facts.digest[:36], source_type="local", source=json.dumps({"digest": facts.digest}),
        profile=json.dumps(profile),
    )  # fmt: skip
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])
