"""What a pipeline is made of: pure functions of (spec, inputs).

Each takes a hashed spec and the results of the stages it stands on, and returns a `Result`.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aecore import metrics
from aecore.checkpoint import Checkpoints
from aecore.data import Arrays, Split, cut
from aecore.fingerprint import derive_seed
from aecore.fit import Fitted, Report, fit
from aecore.networks import Classifier, Encoder, Layer, Prepare, Stack, Terms
from aecore.parallel import ALONE, Team
from aecore.specs import FinetuneSpec, LayerSpec, PretrainSpec, ReferenceSpec
from aecore.storage import Result, Weights
from aecore.stream import Shuffled, Spread, Stream, in_turn
from aecore.variants import Variant

_RESIDENT_BYTES = 2**30
"""Largest set kept on the device as the floats that a layer reads."""
_PREPARED_BYTES = 2**26
"""The same on a CPU where only the preprocessing is spared, which costs a step next to nothing."""
_SCORED_VALUES = 2**25
"""Most outputs of a batch that is scored at once."""
_BATCH_ROWS, _REFERENCE_ROWS = 2048, 2000


class Run(NamedTuple):
    """Where a stage runs and whom it tells; nothing here reaches the numbers."""

    device: torch.device = torch.device("cpu")
    report: Report = lambda epoch, metrics: None
    team: Team = ALONE
    checkpoints: Checkpoints | None = None
    spread: Spread = in_turn
    parts: int = 1
    """Into how many a batch is cut whose gradients are added up, where memory lacks."""
    fit: Callable[..., Fitted] = fit
    """The training loop, or what has several stages go through it as one: see `aecore.fused`."""


@dataclass(frozen=True)
class Objective:
    """What a stage minimises, (*batch) -> terms: a variant's loss or, without one, the cross-entropy of labels."""

    model: nn.Module
    read: nn.Module
    """Makes of a batch what the model reads."""
    variant: Variant | None

    def __call__(self, x: Tensor, labels: Tensor | None = None) -> Terms:
        if self.variant is not None:
            return self.variant.loss(cast(Any, self.model), self.read(x))
        assert labels is not None
        return {"cross_entropy": F.cross_entropy(self.model(self.read(x)).float(), labels)}

    def scored(self, x: Tensor, labels: Tensor | None = None) -> tuple[Terms, Terms]:
        """The same and, of labelled rows, how many are classified wrongly."""
        if self.variant is not None:
            return self(x), {}
        assert labels is not None
        logits = self.model(self.read(x))
        return {"cross_entropy": F.cross_entropy(logits.float(), labels)}, {"error": (logits.argmax(1) != labels).sum()}


def pretrain_layer(spec: PretrainSpec, run: Run, *, data: Arrays | Stream, below: Sequence[Result] = ()) -> Result:
    """Train one layer by its variant's loss on the codes of the frozen layers below (Bengio et al. 2006).

    The codes are computed here, on this device, without noise or dropout; they never travel.
    """
    prepare = prepared(data, run.device)
    layers = [build_layer(result).to(run.device).eval() for result in below]
    read: nn.Module = nn.Sequential(prepare, *(layer.encoder for layer in layers)).requires_grad_(False)
    train, validation, read = _rows(data, read, run, prod(spec.layer.in_shape), labelled=False)
    seed = derive_seed(spec.seed, "pretrain", spec.number)
    with _seeded(seed):
        layer = Layer(spec.layer).to(run.device)

        fitted = run.fit(
            layer, Objective(layer, read, spec.variant), train, validation, spec.fit, seed=seed, device=run.device,
            precision=spec.numerics.precision, compile=spec.numerics.compile, report=run.report,
            scoring_rows=scoring_rows(spec.layer), team=run.team, checkpoints=run.checkpoints,
            parts=run.parts,
        )  # fmt: skip
    config = {"layer": spec.layer.model_dump(mode="json"), **_curves(fitted)}
    return Result(config, _weights(layer), _summary(fitted))


def finetune(
    spec: FinetuneSpec, run: Run, *, data: Arrays | Stream, layers: Sequence[Result] = (), stack: Result | None = None,
    parent: Result | None = None,
) -> Result:  # fmt: skip
    """Train all weights together, starting from exactly those of the pretrained `layers`, or of a `stack` that was
    trained as a whole, or from those of a `parent`, finetuned another day, whose head is taken over where the classes
    are the same; or from random ones where there are none.

    `classify` puts a softmax head on the code and minimises cross-entropy on its logits; the epoch with the fewest
    validation errors is kept. `reconstruct` trains the unrolled autoencoder (Hinton & Salakhutdinov 2006).

    Returns:
        A result with the model in `weights` and, behind `prepare.`, its preprocessing. Where it is to be served, also

        - `autoencoder.*`, its layers in the config's `autoencoder`: what a classifier was finetuned from, since it has
          no decoder of its own;
        - `reference.*` of at most 2,000 validation rows, what new data are compared with: `error` (rows,) of
          reconstruction, squared, a feature; `code` (rows, units); `label` (rows,); and `mean` and `std` (features,) of
          what the first layer reads.
    """
    if spec.labels is not None:
        data = _labelled(held(data), spec.labels, spec.seed, spec.fit.batch_size)
    prepare = prepared(data, run.device)
    supervised = spec.task == "classify"
    train, validation, read = _rows(data, prepare, run, prod(spec.layers[0].in_shape), labelled=supervised)
    seed = derive_seed(spec.seed, "finetune")
    with _seeded(seed):
        # drawn before any trained weights are read: the control's head is the same as the pretrained net's
        net = Stack([Layer(layer) for layer in spec.layers])
        head = Classifier([layer.encoder for layer in net], len(spec.classes)) if spec.task == "classify" else None
        for layer, result in zip(net, layers, strict=True) if layers else ():
            _load(layer, result.weights)
        if stack is not None:
            _load(net, stack.weights)
        model = head or net
        if parent is not None:
            own, same = model.state_dict(), parent.config["classes"] == list(spec.classes)
            given = {name: torch.tensor(value) for name, value in parent.weights.items() if name in own}
            model.load_state_dict(own | {n: v for n, v in given.items() if same or not n.startswith("head.")})
        model = model.to(run.device)

        objective = Objective(model, read, None if supervised else spec.variant)
        fitted = run.fit(
            model, objective, train, validation, spec.fit, seed=seed, device=run.device,
            scored=objective.scored,
            monitor="error" if supervised else "loss",
            precision=spec.numerics.precision, compile=spec.numerics.compile, report=run.report,
            scoring_rows=scoring_rows(spec.layers[0]), team=run.team, checkpoints=run.checkpoints,
            parts=run.parts,
        )  # fmt: skip
    config = {
        "task": spec.task,
        "classes": list(spec.classes),
        "layers": [layer.model_dump(mode="json") for layer in spec.layers],
        **_curves(fitted),
    }
    summary = _summary(fitted)
    if supervised:
        summary["best/accuracy"] = 1 - summary["best/error"]
    weights = _weights(model) | {f"prepare.{name}": value for name, value in _weights(prepare).items()}
    config["autoencoder"] = None
    if not spec.served:
        return Result(config, weights, summary)
    autoencoder: Stack | None = net
    if supervised:
        if parent is not None:
            autoencoder = build_autoencoder(parent)
        else:
            before = list(build_stack(stack)) if stack is not None else [build_layer(result) for result in layers]
            autoencoder = Stack(before) if before else None
        autoencoder = autoencoder and autoencoder.to(run.device)
    if supervised and autoencoder is not None:
        config["autoencoder"] = [layer.spec.model_dump(mode="json") for layer in autoencoder]
        weights |= {f"autoencoder.{name}": value for name, value in _weights(autoencoder).items()}
    found = _reference(model, autoencoder, prepare, held(data).validation, run.device)
    weights |= {f"reference.{name}": value for name, value in found.items()}
    return Result(config, weights, summary, example=held(data).train.x[:4])


def _reference(
    model: Classifier | Stack, autoencoder: Stack | None, prepare: Prepare, rows: Split, device: torch.device
) -> Weights:
    """What a model makes of some of the rows that it was chosen by."""
    drawn = np.sort(np.random.default_rng(0).permutation(len(rows.x))[:_REFERENCE_ROWS])
    x = metrics.over_batches(prepare, rows.x[drawn], device)
    model.eval()
    found = {"mean": x.flatten(1).mean(0), "std": x.flatten(1).std(0, correction=0)}
    with torch.no_grad():
        found["code"] = torch.cat([model.encode(part).flatten(1) for part in x.split(_BATCH_ROWS)])
        if autoencoder is not None:
            autoencoder.eval()
            parts = x.split(scoring_rows(autoencoder.first.spec))
            found["error"] = torch.cat([metrics.row_errors(part, autoencoder.reconstruct(part)) for part in parts])
    label = {} if rows.y is None else {"label": rows.y[drawn]}
    return {name: value.cpu().numpy() for name, value in found.items()} | label


def reference(spec: ReferenceSpec, run: Run, *, data: Arrays | Stream) -> Result:
    """What a trained autoencoder must beat: PCA (as one linear layer), or the same stack with random weights."""
    seed = derive_seed(spec.seed, "finetune")  # the weights that training from scratch starts from
    with _seeded(seed):
        stack = Stack([Layer(layer) for layer in spec.layers])
    weights = _weights(stack)
    if spec.kind == "pca":
        from sklearn.decomposition import PCA

        prepare = prepared(data, run.device)
        x = metrics.over_batches(prepare, held(data).train.x, run.device).flatten(1).cpu().numpy()
        pca = PCA(prod(spec.layers[0].code_shape), svd_solver="covariance_eigh").fit(x)
        axes, centre = pca.components_, pca.mean_
        weights = {
            "layers.0.encoder.affine.weight": axes, "layers.0.encoder.affine.bias": -axes @ centre,
            "layers.0.decoder.weight": axes.T, "layers.0.decoder.bias": centre,
        }  # fmt: skip
    config = {"layers": [layer.model_dump(mode="json") for layer in spec.layers], "history": []}
    return Result(config, weights, {})


def build_layer(result: Result) -> Layer:
    """The layer that `pretrain_layer` returned."""
    layer = Layer(LayerSpec.model_validate(result.config["layer"]))
    _load(layer, result.weights)
    return layer


def build_stack(result: Result) -> Stack:
    """The unrolled autoencoder that `finetune` or `reference` returned."""
    stack = Stack([Layer(LayerSpec.model_validate(layer)) for layer in result.config["layers"]])
    _load(stack, result.weights)
    return stack


def build_autoencoder(result: Result) -> Stack | None:
    """The autoencoder of the model that `finetune` returned: itself, or what the classifier was finetuned from."""
    if result.config["task"] == "reconstruct":
        return build_stack(result)
    if not (layers := result.config["autoencoder"]):
        return None
    prefix = "autoencoder."
    weights = {name.removeprefix(prefix): v for name, v in result.weights.items() if name.startswith(prefix)}
    return build_stack(Result({"layers": layers}, weights, {}))


def build_classifier(result: Result) -> Classifier:
    """The classifier that `finetune` returned."""
    layers = [Layer(LayerSpec.model_validate(layer)) for layer in result.config["layers"]]
    classifier = Classifier([layer.encoder for layer in layers], len(result.config["classes"]))
    _load(classifier, result.weights)
    return classifier


def build_prepare(result: Result) -> Prepare:
    """The preprocessing that the model of `finetune` was trained behind."""
    shift, scale = (torch.tensor(result.weights[f"prepare.{name}"]) for name in ("shift", "scale"))
    return Prepare(shift, scale)


def held(data: Arrays | Stream) -> Arrays:
    """The rows that lie in memory: all, or the sample of a larger set."""
    return data.sample if isinstance(data, Stream) else data


def all_test_rows(data: Arrays | Stream, run: Run) -> Iterable[Split]:
    """Also of a larger set, in chunks."""
    return run.spread(data.reader("test"), data.pieces) if isinstance(data, Stream) else [data.test]


def prepared(data: Arrays | Stream, device: torch.device) -> Prepare:
    """The preprocessing of a data set, on `device`."""
    return Prepare(torch.tensor(data.shift), torch.tensor(data.scale)).to(device)


def _rows(
    data: Arrays | Stream, read: nn.Module, run: Run, features: int, labelled: bool
) -> tuple[tuple[Tensor, ...] | Shuffled, tuple[Tensor, ...], nn.Module]:
    """Training and validation rows to cut batches from, and what makes of a batch what the trained layer reads.

    A small set lies on the device as `read` makes it, `features` floats a row, once for all epochs. A larger one lies
    there as it came (uint8 stays uint8; on a CPU, where it came) and is read batch by batch; one that takes more than
    half of the device's free memory stays in pinned host memory; one that is larger than memory is streamed, but for
    the validation rows.
    """
    read.eval()
    coded = any(isinstance(module, Encoder) for module in read.modules())
    here = held(data)

    def beside(x: Tensor, split: Split) -> tuple[Tensor, ...]:
        """The labels, where they are used, beside the rows, so that one index cuts both."""
        return (x, torch.tensor(split.y, device=x.device)) if labelled else (x,)

    needed = 4 * features * (len(here.train.x) + len(here.validation.x))
    if run.device.type == "cuda":
        room = torch.cuda.mem_get_info(run.device)[0] // 2
    else:
        room = _RESIDENT_BYTES if coded else _PREPARED_BYTES
    if isinstance(data, Stream):
        validation = torch.tensor(here.validation.x).to(run.device)
        return Shuffled(data, labelled, run.spread), beside(validation, here.validation), read
    if needed <= min(room, _RESIDENT_BYTES):
        train, validation = (metrics.over_batches(read, split.x, run.device) for split in (here.train, here.validation))
        read = nn.Identity()
    else:
        train, validation = _in_place(here.train.x), _in_place(here.validation.x)
        if run.device.type == "cuda" and train.nbytes + validation.nbytes > room:
            train, validation = train.pin_memory(), validation.pin_memory()
        else:
            train, validation = train.to(run.device), validation.to(run.device)
    return beside(train, here.train), beside(validation, here.validation), read


def _in_place(rows: np.ndarray) -> Tensor:
    """A tensor of the same memory, which may be the object store's, read by others: nothing may write to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an array that cannot be written to
        return torch.from_numpy(rows)


def _labelled(data: Arrays, count: int, seed: int, batch_size: int) -> Arrays:
    """`count` training rows, stratified by label, repeated until an epoch has some 20 batches: a few labels get as many
    steps and as few looks at validation as many do."""
    x, y = data.train
    rows = cut(np.arange(len(x)), y, count, "labels", seed)[1] if count < len(x) else np.arange(len(x))
    rows = np.tile(rows, max(1, 20 * batch_size // len(rows)))
    return data._replace(train=Split(x[rows], None if y is None else y[rows]))


def scoring_rows(spec: LayerSpec) -> int:
    """Rows of a batch that is scored at once: fewer where each has many outputs (256 a colour value, say)."""
    return max(1, min(_BATCH_ROWS, _SCORED_VALUES // (max(spec.levels, 1) * prod(spec.in_shape))))


def _weights(module: nn.Module) -> Weights:
    return {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()}


def _load(module: nn.Module, weights: Weights) -> None:
    # a classifier's weights lie beside its preprocessing; a layer that is a code no more needs no log-variance
    needed = module.state_dict().keys()
    module.load_state_dict({name: torch.tensor(value) for name, value in weights.items() if name in needed})


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds torch's global generators for a block and restores them after it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _curves(fitted: Fitted) -> dict[str, Any]:
    return {"history": fitted.history, "best_epoch": fitted.best_epoch}


def _summary(fitted: Fitted) -> dict[str, float]:
    best = fitted.history[fitted.best_epoch - 1]
    # named apart from the curves, whose last point is the last epoch's
    kept = {name.replace("val/", "best/"): value for name, value in best.items() if name.startswith("val/")}
    return {
        **kept,
        "best_epoch": fitted.best_epoch,
        "epochs": len(fitted.history),
        "train_seconds": sum(epoch["seconds"] for epoch in fitted.history),  # of all attempts
    }
