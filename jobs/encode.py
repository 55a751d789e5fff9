"""python -m jobs.encode --model models:/NAME@ALIAS --output FOLDER [--data.path ...] [--dotted.field VALUE ...]

A data set through a registered model into Parquet: codes, predictions, anomaly scores. Or codes back, or samples.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from aecore.config.experiment import Data
from aecore.config.facts import Facts
from aecore.core.errors import InputError
from aecore.core.fingerprint import Frozen, fingerprint
from aecore.data.dataset import identify
from aecore.models.spec import LayerSpec
from aecore.models.storage import Result
from aecore.serving.encoding import Way, Work, fit_codes, fit_data
from jobs import cli
from pipelines.cluster.resources import Resources
from pipelines.encoding.encode import absolute, write
from pipelines.execution.run import open_store
from pipelines.host.environment import store_is_empty, store_uri


class Encode(Frozen):
    """Encode all rows of a data set with a registered model, into a folder of Parquet files.

    One row each: `id` (running), `file` and `row` (where it came from), `code`, of a classifier `prediction` and
    `probability`, and, where there is an autoencoder, `reconstruction_mse` and `anomaly_score` (percent of the
    model's validation rows that it reconstructs no worse). The same command again goes on where it was killed.
    """

    recipe: CliPositionalArg[Path | None] = None
    """YAML file with whatever differs from the defaults."""
    model: str | None = None
    """models:/NAME@ALIAS or models:/NAME/VERSION."""
    data: Data = Data(labels=None)
    """All rows are encoded, whatever their split. Labels are ignored unless `data.labels` asks for them."""
    output: str | None = None
    """Folder or URI for the Parquet files."""
    decode: str | None = None
    """Folder of codes that this command wrote: reconstruct from these, in place of `data`."""
    sample: PositiveInt | None = None
    """So many rows drawn from a variational model, in place of `data`."""
    workers: PositiveInt | None = None
    """Processes side by side, each with one CPU; null takes as many as the cluster holds."""
    gpus: Annotated[float | None, Field(ge=0)] = None
    """GPUs a worker, fractions allowed; null takes 1 where the cluster has GPUs, else 0."""
    batch_size: PositiveInt | None = None
    """Rows that a worker computes at once; null takes 2,048, or fewer where a row has many outputs."""


def encode(settings: Encode) -> dict[str, Any]:
    """Run the job; the report for the last line of stdout."""
    if settings.model is None:
        raise InputError("model: missing; name one, --model models:/NAME@champion")
    if settings.output is None:
        raise InputError("output: missing; name a folder, --output codes")
    if settings.decode is not None and settings.sample is not None:
        raise InputError("sample: decode is asked for too; leave one of them out")
    if store_is_empty():
        raise InputError(
            f"model: {store_uri()} does not exist, so there is no {settings.model}; set MLFLOW_TRACKING_URI"
        )
    tracker = open_store(Resources(), ready=False)
    assert tracker is not None
    model = tracker.load_model(settings.model)
    way, data, facts, rows = _read_from(settings, model.result, model.uri, model.digest)
    work = Work(way, model.uri, model.digest, data, facts, rows, absolute(settings.output), settings.batch_size)

    key = fingerprint("encode", work.identity, work.output)
    tags = {name.removeprefix("diabolo."): value for name, value in work.identity.items()} | cli.ray_tags()
    config = cli.without_secrets(settings.model_dump(mode="json"))
    with tracker.job_run("encode", key, tags, config) as run_id:
        if facts is not None and data is not None:
            tracker.log_data(run_id, data.name, facts, "inference", model.model_id)
        done = write(work, model.result, tracker.uri, settings.workers, settings.gpus, cli.say)
        metrics = {"rows": float(done.rows), "files": float(done.files)}
        if done.fresh:
            metrics |= {"encode_seconds": done.seconds, "rows_per_second": done.fresh / max(done.seconds, 1e-9)}
        tracker.log_summary(run_id, metrics, {})
    print(f"{done.rows:,} rows in {done.files} files, {done.fresh:,} of them made now, by {model.uri}")
    return {
        "status": "finished",
        "run_id": run_id,
        "model": model.uri,
        "output": work.output,
        "rows": {"all": done.rows, "made": done.fresh},
        "metrics": metrics,
    }


def _read_from(settings: Encode, result: Result, model: str, digest: str) -> tuple[Way, Data | None, Facts | None, int]:
    """What is to be done, and with which rows.

    Raises:
        InputError: these, or that, are not for this model.
    """
    last = LayerSpec.model_validate(result.config["layers"][-1])
    if settings.sample is not None:
        if not last.stochastic:
            raise InputError(f"sample: {model} is not variational, so nothing can be drawn from it; name one that is")
        return "sample", None, None, settings.sample
    if settings.decode is not None:
        if result.config["task"] != "reconstruct":
            raise InputError(f"decode: {model} is a classifier, whose codes have no decoder; name an autoencoder")
        data = Data(name="parquet", path=absolute(settings.decode), column="code", labels=None)
        facts = identify(data)
        fit_codes(data, facts, last, model, digest)
        return "decode", data, facts, facts.rows
    path = settings.data.path and absolute(settings.data.path)
    data = settings.data.model_copy(update={"root": settings.data.root.absolute(), "path": path})
    facts = identify(data)
    return "encode", fit_data(result, data, facts, model), facts, facts.rows


if __name__ == "__main__":
    cli.main("encode", lambda: encode(cli.parse(Encode, "python -m jobs.encode")))
