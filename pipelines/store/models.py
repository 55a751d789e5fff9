"""Models in MLflow: logging a model that loads without Diabolo, and the registry's versions and aliases."""

import json
import re
import warnings
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import yaml
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature, infer_signature
from mlflow.types.schema import AnyType, ColSpec, Schema

import aecore
from aecore.core.errors import InputError
from aecore.models.storage import Result, load_weights
from pipelines.host.messages import one_line
from pipelines.host.scratch import scratch
from pipelines.store.client import Store, all_pages
from pipelines.store.patience import ignoring

LOADER = "aecore.serving.model"
"""Module that loads our models in MLflow."""
_LOADERS = (LOADER, "aecore.pyfunc")
"""`LOADER`, and the module in models that were logged before it moved."""
_NAME = "model"
_REQUIREMENTS = ("mlflow", "jaxtyping", "numpy", "pandas", "pydantic", "safetensors", "scikit-learn", "torch")
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for a model, version or alias that there is not."""


class Version(NamedTuple):
    """A version of a registered model."""

    number: str
    tags: dict[str, str]


class Registered(NamedTuple):
    """A version of a registered model with its weights."""

    uri: str
    """models:/NAME/VERSION."""
    digest: str
    """SHA-256 of the files of the version."""
    result: Result
    """Result of the finetuning that made the model."""
    model_id: str | None
    """Id of MLflow's logged model, if the version was registered from one."""


class Models(NamedTuple):
    """The registered models of a store."""

    store: Store

    def logged_by(self, run_id: str) -> str:
        """Return the address models:/ID of the model that a finished finetuning has logged."""
        outputs = self.store.client.get_run(run_id).outputs
        assert outputs is not None, "a finished finetuning has a model"
        return f"models:/{outputs.model_outputs[0].model_id}"

    def register(self, name: str, uri: str, tags: Mapping[str, str] | None = None) -> str:
        """Register a logged model under `name`, unless it is registered there.

        Args:
            tags: Tags of the version; tags that the version has already stay as they are.

        Returns:
            The number of the version.
        """
        mlflow.set_tracking_uri(self.store.uri)

        def look_then_register() -> str:
            search = partial(self.store.direct.search_model_versions, f"name = '{name}'")
            for known in all_pages(search):
                if known.source == uri or known.tags.get("model.uri") == uri:
                    return str(known.version)
            return str(mlflow.register_model(uri, name, tags={"model.uri": uri}).version)

        number = self.store.wait_for(look_then_register)
        known = self.store.client.get_model_version(name, number).tags if tags else {}
        for tag, value in (tags or {}).items():
            if tag not in known:
                self.store.client.set_model_version_tag(name, number, tag, value)
        return number

    def version(self, name: str, alias: str) -> Version | None:
        """Return the version of a registered model that has this alias, if there is one."""
        with ignoring(*_MISSING):
            found = self.store.client.get_model_version_by_alias(name, alias)
            return Version(str(found.version), dict(found.tags))
        return None

    def set_alias(self, name: str, alias: str, number: str) -> None:
        """Move an alias to this version."""
        self.store.client.set_registered_model_alias(name, alias, number)

    def load(self, uri: str) -> Registered:
        """Load a registered model by models:/NAME@ALIAS or models:/NAME/VERSION.

        Only safetensors and JSON are read; nothing is unpickled.

        Raises:
            InputError: There is no such model, it was altered, or Diabolo did not make it.
        """
        found = self._find(uri)
        exact = f"models:/{found.name}/{found.version}"
        try:
            digest, result = self._download(uri, exact)
        except (OSError, ValueError, KeyError, MlflowException, yaml.YAMLError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"model: {uri} is lost or was altered ({one_line(error)}); register it again") from error
        source = found.source or ""
        model_id = source.removeprefix("models:/") if source.startswith("models:/m-") else None
        return Registered(exact, digest, result, model_id)

    def _find(self, uri: str) -> ModelVersion:
        match = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
        if not match:
            raise InputError(
                f"model: {uri} names no registered model; write models:/NAME@ALIAS or models:/NAME/VERSION"
            )
        (name, alias, number), client = match.groups(), self.store.client
        with ignoring(*_MISSING):
            return client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
        raise InputError(
            f"model: {self.store.uri} has no {uri}; jobs.train --register NAME makes a version, and "
            "jobs.retrain a champion"
        )

    def _download(self, uri: str, exact: str) -> tuple[str, Result]:
        """Return the digest of a registered model and the model."""
        mlflow.set_tracking_uri(self.store.uri)  # MLflow reads MLFLOW_TRACKING_URI here as the user wrote it
        download = mlflow.artifacts.download_artifacts
        with scratch() as temporary:
            address = {"tracking_uri": self.store.uri, "registry_uri": self.store.uri}
            folder = Path(self.store.wait_for(partial(download, exact, dst_path=str(temporary), **address)))
            flavor = yaml.safe_load((folder / "MLmodel").read_text())["flavors"].get("python_function", {})
            if flavor.get("loader_module") not in _LOADERS:
                raise InputError(f"model: {uri} was not made by jobs.train, and is not unpickled; name one that was")
            config, weights = load_weights(folder / flavor["data"])
            digest = json.loads((folder / flavor["data"] / "config.json").read_text())["sha256"]
        return digest, Result(config, weights, {})


def log_model(store: Store, run_id: str, folder: Path, example: Any, served: Any) -> str:
    """Log the model in `folder` as an output of a run, so that the model loads anywhere: our own code is logged with
    it.

    A further try completes the model of an earlier try, so that a run has one model. An outage is raised at once.

    Args:
        example: Input rows that are kept with the model, an array or a table.
        served: The output of the model for the example.

    Returns:
        The id of MLflow's logged model.
    """
    client = store.direct
    models = client.search_logged_models([store.experiment_id], f"source_run_id = '{run_id}'")
    run = client.get_run(run_id)
    model = models[0] if models else client.create_logged_model(
        store.experiment_id, _NAME, source_run_id=run_id, params=run.data.params
    )  # fmt: skip
    linked = [output.model_id for output in run.outputs.model_outputs] if run.outputs else []
    if model.model_id not in linked:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    with scratch() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow 3.17 warns of its own type hints when `mlflow.pyfunc` is imported
        # not `mlflow.pyfunc.log_model`: it loads the model to try it, which imports torch, and needs an active run
        mlflow.pyfunc.save_model(
            temporary / _NAME,
            loader_module=LOADER,
            data_path=str(folder),
            code_paths=[str(Path(aecore.__file__).parent)],
            mlflow_model=Model(model.artifact_location, run_id, model_uuid=model.model_id, model_id=model.model_id),
            # without this list MLflow would run the model to see what it imports, for 16 to 27 s
            pip_requirements=[f"{name}=={version(name)}" for name in _REQUIREMENTS],
            signature=_signature(example, served),
            input_example=example,
        )
        client.log_model_artifacts(model.model_id, str(temporary / _NAME))
    client.finalize_logged_model(model.model_id, "READY")
    return str(model.model_id)


def _signature(example: Any, served: Any) -> ModelSignature:
    """Return the signature of a model: a tensor for an array; for a table its columns, by name and by position.

    MLflow 3.17 turns an array into a table whose columns are 0, 1, ..., and drops what the signature does not name. So
    positions are named as well, with one more by which the model notices rows that are too long, and nothing is
    required. It also refuses integers where the signature says double, so the signature leaves the types open. The
    model itself refuses what is missing and what is no number. Position 0 is the first, since MLflow takes a 0 as no
    name and puts the place of the column in its stead.
    """
    outputs = infer_signature(model_output=served).outputs
    if not hasattr(example, "columns"):
        return ModelSignature(infer_signature(example).inputs, outputs)
    names: list[Any] = [*range(len(example.columns) + 1), *example.columns]
    return ModelSignature(Schema([ColSpec(AnyType(), name, required=False) for name in names]), outputs)
