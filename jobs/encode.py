"""python -m jobs.encode --model models:/NAME@ALIAS --output FOLDER [--data.path ...] [--dotted.field VALUE ...]

Run a data set through a registered model and write codes, predictions and anomaly scores as Parquet files. It can also
turn codes back into reconstructions, or draw samples.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt
from pydantic_settings import CliPositionalArg

from aecore.config.experiment import Data
from aecore.config.facts import Facts, columns_of
from aecore.config.resolve import absolute_places
from aecore.core.errors import InputError
from aecore.core.fingerprint import Frozen, fingerprint
from aecore.data.dataset import describe, identify
from aecore.models.spec import LayerSpec
from aecore.models.storage import Result
from aecore.serving.encoding import Operation, Work, adapt_data, check_codes
from jobs import cli
from pipelines.cluster.resources import Resources
from pipelines.encoding.encode import absolute_path, write_files
from pipelines.execution.store import open_store
from pipelines.graph.description import Description, data_name
from pipelines.host.environment import store_is_empty, store_uri
from pipelines.host.messages import say


class Encode(Frozen):
    """Encodes all rows of a data set with a registered model, into a folder of Parquet files.

    Each row has `id` (a running number), `file` and `row` (where it came from) and `code`. Classifiers add `prediction`
    and `probability`. Models with an autoencoder add `reconstruction_mse` and `anomaly_score`: the percentage of the
    model's validation rows with no larger error. Models that keep a score of anomalies add `score`, the percentage is
    then by the score, and strange rows get `reasons`; the strangest rows of all are listed in _strangest.parquet. If
    the command is killed, the same command finishes the job.
    """

    recipe: CliPositionalArg[Path | None] = None
    """YAML file with the fields that differ from the defaults."""
    model: str | None = None
    """The registered model: models:/NAME@ALIAS or models:/NAME/VERSION."""
    data: Data = Data(labels=None)
    """The data set; all rows are encoded, whatever their split. Labels are left out unless `data.labels` is set."""
    output: str | None = None
    """Folder or URI for the Parquet files."""
    decode: str | None = None
    """Folder of codes that this command wrote; they are reconstructed, and `data` is not read."""
    sample: PositiveInt | None = None
    """Number of rows to draw from a variational model; `data` is not read."""
    workers: PositiveInt | None = None
    """Processes side by side, each with one CPU; null takes as many as the cluster holds."""
    gpus: Annotated[float | None, Field(ge=0)] = None
    """GPUs per worker, fractions allowed; null takes 1 where the cluster has GPUs, else 0."""
    batch_size: PositiveInt | None = None
    """Rows that a worker computes at once; null takes 2,048, or fewer where a row has many outputs."""


def encode(settings: Encode) -> dict[str, Any]:
    """Run the job and return the report for the last line of stdout."""
    if settings.model is None:
        raise InputError("model: missing; name one, --model models:/NAME@champion")
    if not settings.output:
        raise InputError("output: missing; name a folder, --output codes")
    if settings.decode is not None and settings.sample is not None:
        raise InputError("sample: excludes decode; leave one of them out")
    if settings.data.anomaly:
        raise InputError(
            "data.anomaly: all rows are encoded, whatever their labels tell; leave it out, and data.contamination too"
        )
    if store_is_empty():
        raise InputError(
            f"model: {store_uri()} does not exist, so there is no {settings.model}; set MLFLOW_TRACKING_URI"
        )
    tracker = open_store(Resources(), ready=False)
    assert tracker is not None
    model = tracker.models.load(settings.model)
    operation, data, facts, rows = _find_rows(settings, model.result, model.uri, model.digest)
    output = absolute_path(settings.output)
    work = Work(
        operation=operation, model=model.uri, model_digest=model.digest, data=data, facts=facts, rows=rows,
        output=output, batch_size=settings.batch_size,
    )  # fmt: skip

    key = fingerprint("encode", work.identity, output)
    tags = {name.removeprefix("diabolo."): value for name, value in work.identity.items()} | cli.ray_tags()
    source = {"decode": " decoded", "sample": " drawn"}.get(operation) or (f" of {data_name(data)}" if data else "")
    name = f"{model.uri.removeprefix('models:/')}: {rows:,} rows{source}"
    shown = Description(name, f"What: {operation} with {model.uri}, into {output}.")
    config = cli.without_secrets(settings.model_dump(mode="json"))
    with tracker.job_run("encode", key, tags, config, shown) as run_id:
        if facts is not None and data is not None:
            about = describe(data, facts, divided=False)
            for line in about:
                say(line)
            tracker.log_data(run_id, data_name(data), facts, about, model.model_id)
        written = write_files(work, model.result, tracker.uri, settings.workers, settings.gpus, say)
        metrics = {"rows": float(written.rows), "files": float(written.files)}
        if written.computed:
            rate = written.computed / max(written.seconds, 1e-9)
            metrics |= {"encode_seconds": written.seconds, "rows_per_second": rate}
        tracker.log_summary(run_id, metrics, {})
        files = "1 file" if written.files == 1 else f"{written.files} files"
        shown.results = [f"{written.rows:,} rows in {files}."]
    if written.strangest:
        _print_strangest(written.strangest)
    print(f"{written.rows:,} rows in {written.files} files, {written.computed:,} of them computed now, by {model.uri}")
    return {
        "status": "finished",
        "run_id": run_id,
        "model": model.uri,
        "output": output,
        "rows": {"all": written.rows, "made": written.computed},
        "metrics": metrics,
        **({"strangest": [_short(row) for row in written.strangest]} if written.strangest else {}),
    }


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Return a strange row as the report's last line has it."""
    return {"id": row["id"], "score": row["score"], "features": [reason["feature"] for reason in row["reasons"]]}


def _print_strangest(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "rank", "id", "score", "anomaly score", "what is strange", title="The strangest rows", title_justify="left"
    )
    for row in rows:
        features = (f"{each['feature']} {each['value']} (expected {each['expected']})" for each in row["reasons"])
        numbers = str(row["rank"]), str(row["id"]), f"{row['score']:.4g}", f"{row['anomaly_score']:.4g}"
        table.add_row(*numbers, ", ".join(features))
    Console(width=110, markup=False).print(table)


def _find_rows(
    settings: Encode, result: Result, model: str, digest: str
) -> tuple[Operation, Data | None, Facts | None, int]:
    """Return what to do with the model (see `Operation`), the data to read, their facts, and the number of rows.

    Data and facts are None where rows are drawn from the model.

    Raises:
        InputError: the data, the codes or the sampling do not fit the model.
    """
    last = LayerSpec.model_validate(result.config["layers"][-1])
    if settings.sample is not None:
        if not last.stochastic:
            raise InputError(f"sample: {model} is not variational, so nothing can be drawn from it; name one that is")
        return "sample", None, None, settings.sample
    if settings.decode is not None:
        if result.config["task"] != "reconstruct":
            raise InputError(f"decode: {model} is a classifier, whose codes have no decoder; name an autoencoder")
        data = Data(name="parquet", path=absolute_path(settings.decode), column="code", labels=None)
        facts = identify(data)
        check_codes(data, facts, last, model, digest)
        return "decode", data, facts, facts.rows
    columns = columns_of(result.config)
    data = settings.data.model_copy(update=absolute_places(settings.data) | {"missing": columns.missing})
    facts = identify(data, columns)
    return "encode", adapt_data(result, data, facts, model), facts, facts.rows


if __name__ == "__main__":
    cli.main("encode", lambda: encode(cli.parse(Encode, "python -m jobs.encode")))
