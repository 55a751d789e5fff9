"""Checks of all variants: their steps are captured, they are trained as one, and their losses are those of steps that
torch takes one by one."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from aecore.config.experiment import Conv, Data, Dense, Fit, Network
from aecore.config.facts import Facts
from aecore.config.resolve import layer_specs
from aecore.config.specs import FinetuneSpec, Numerics
from aecore.core.types import LikelihoodKind, Precision
from aecore.data.splits import Arrays, Split
from aecore.models.storage import Result
from aecore.stages.finetune import finetune, prepare
from aecore.stages.training import train_as_one
from aecore.variants import Contractive, Denoising, Plain, Sparse, Variant, Variational
from tests.benchmarks.tables import show
from tests.gpu.report import Report
from tests.gpu.scale import Scale
from tests.gpu.watch import Seen, step_by_step, watched

SIDE, HELD, CLASSES = 16, 128, tuple("0123456789")
TOLERANCES: dict[Precision, float] = {"fp32": 1e-3, "tf32": 5e-3, "bf16": 2e-2}
"""Largest relative difference of a term of the loss in any epoch. Kernels round differently: fp32 to 24 bits, tf32 to
11 and bf16 to 8. On a CPU, whole fits in bf16 and in fp32 differ by less than 1e-2."""
RANDOM_TOLERANCE = 0.1
"""Largest relative difference of the reconstruction term in the last epoch where fits draw different noise, dropout or
samples, so that their losses agree only roughly."""


class Case(NamedTuple):
    """A network with the variants of two fits, which differ in numbers alone; None is a classifier."""

    network: Network
    variants: tuple[Variant | None, Variant | None]
    is_random: bool = False
    """Whether noise, dropout or samples are drawn, which differ where fits are trained as one."""
    likelihood: LikelihoodKind = "gaussian"
    """The reconstruction term. The squared error is the default because it halves within the few epochs of a check, so
    that a wrong step changes it visibly."""


FITS = (Fit(lr=1e-3), Fit(lr=3e-3, weight_decay=0.1, schedule="cosine", clip=2.0))
NETWORKS: dict[str, Network] = {"dense": Dense(widths=(64, 16)), "conv": Conv(widths=(8, 16), dense=(16,))}
VARIANTS: dict[str, tuple[Variant, Variant]] = {
    "plain": (Plain(), Plain()),
    "sparse l1": (Sparse(weight=0.1), Sparse(weight=0.2)),
    "sparse kl": (Sparse(penalty="kl", rate=0.1), Sparse(penalty="kl", rate=0.2)),
    "sparse topk": (Sparse(penalty="topk", k=0.25), Sparse(penalty="topk", k=0.25)),
    "denoising": (Denoising(level=0.1), Denoising(level=0.2)),
    "contractive": (Contractive(weight=0.1, probes=None), Contractive(weight=0.2, probes=None)),
    "variational": (Variational(beta=0.5), Variational(beta=1.0)),
}
CASES = {
    f"{network}, {variant}": Case(NETWORKS[network], each, variant in ("denoising", "variational"))
    for network in NETWORKS
    for variant, each in VARIANTS.items()
} | {
    "dense, contractive with a probe": Case(NETWORKS["dense"], (Contractive(), Contractive(weight=0.2)), True),
    "dense, batch normalisation": Case(
        Dense(widths=(64, 16), normalization="batch", dropout=0.2), (Denoising(level=0.1), Denoising(level=0.2)), True
    ),
    "dense, classifier": Case(NETWORKS["dense"], (None, None)),
    "dense, cross-entropy": Case(NETWORKS["dense"], (Plain(), Plain()), likelihood="bernoulli"),
}


def images(rows: int) -> Arrays:
    """Return grey images that lie near a plane of 16 dimensions, with the largest of ten coordinates as their class."""
    draw = np.random.default_rng(0)
    basis = draw.normal(size=(16, SIDE * SIDE))

    def split(count: int) -> Split:
        place = draw.normal(size=(count, 16))
        pixels = np.clip(128 + 24 * place @ basis, 0, 255).astype(np.uint8)
        return Split(pixels.reshape(count, 1, SIDE, SIDE), place[:, : len(CLASSES)].argmax(1))

    return Arrays(split(rows), split(HELD), split(HELD), np.zeros((), np.float32), np.array(1 / 255, np.float32))


def specs_of(case: Case, precision: Precision, epochs: int) -> list[FinetuneSpec]:
    """Return the specs of the case's fits, which train the whole stack."""
    facts = Facts(digest="", shape=(1, SIDE, SIDE), levels=256, classes=CLASSES, rows=0)
    data, specs = Data(likelihood=case.likelihood), []
    for seed, (variant, fit) in enumerate(zip(case.variants, FITS, strict=True)):
        layers = layer_specs(case.network, data, facts, variant.code_activation if variant else None)
        if variant is not None:
            layers[-1] = variant.build(layers[-1], len(layers))
        spec = FinetuneSpec(
            layers=tuple(layers), task="reconstruct" if variant else "classify", classes=() if variant else CLASSES,
            variant=variant, fit=fit.model_copy(update={"epochs": epochs}), seed=seed,
            numerics=Numerics(precision=precision), served=False,
        )  # fmt: skip
        specs.append(spec)
    return specs


def difference(one: Result, two: Result, is_random: bool = False) -> float:
    """Return the largest relative difference of two fits' terms of the loss: over all epochs or, where they are random,
    of the reconstruction in the last epoch."""
    epochs = list(zip(one.config["history"], two.config["history"], strict=True))
    if is_random:
        pairs = [(a[name], b[name]) for a, b in epochs[-1:] for name in ("train/reconstruction", "val/reconstruction")]
    else:
        terms = [name for name in epochs[0][0] if "/" in name and not name.endswith("error")]
        pairs = [(a[name], b[name]) for a, b in epochs for name in terms]
    each = [abs(a - b) / max(abs(a), 1e-9) for a, b in pairs]
    return math.inf if any(math.isnan(value) for value in each) else max(each)


def check(scale: Scale, report: Report) -> list[dict[str, Any]]:
    """Check every case in every precision; print a table and return its rows."""
    arrays, rows = images(scale.check_rows), []
    for precision in scale.precisions:
        for name in CASES:
            try:
                rows.append(check_case(name, precision, arrays, scale, report))
            except Exception as error:
                report.fail(f"{name}, {precision}: {type(error).__name__}: {error}")
                rows.append({"case": name, "precision": precision, "captured": type(error).__name__})
    show("Two fits of each variant: alone and as one, against steps that are taken one by one", rows)
    return rows


def check_case(name: str, precision: Precision, arrays: Arrays, scale: Scale, report: Report) -> dict[str, Any]:
    """Check one case in one precision; return its row of the table."""
    case = CASES[name]
    specs = specs_of(case, precision, scale.check_epochs)
    with step_by_step():
        eager = [finetune(spec, scale.context, data=arrays) for spec in specs]
    with watched() as alone:
        replayed = [finetune(spec, scale.context, data=arrays) for spec in specs]
    with watched() as together:
        outcomes = train_as_one((prepare(spec, scale.context, data=arrays) for spec in specs), scale.everywhere)
    fused = [outcome for outcome in outcomes if isinstance(outcome, Result)]
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome

    def fail(message: str) -> None:
        report.fail(f"{name}, {precision}: {message}")

    if any(not learned(result) for result in eager):
        fail("the loss does not fall")
    check_paths(alone, together, len(specs), scale.captures, fail)
    tolerance = RANDOM_TOLERANCE if case.is_random else TOLERANCES[precision]
    differences = [
        max(difference(one, two, case.is_random) for one, two in zip(eager, others, strict=True))
        for others in (replayed, fused)
    ]
    for path, value in zip(("alone" if scale.captures else "repeated", "as one"), differences, strict=True):
        if not value <= tolerance:
            fail(f"losses {path} differ by {value:.2g} from those of single steps, more than {tolerance:g}")
    return {
        "case": name, "precision": precision, "captured": f"{alone.captured} of {len(specs)}",
        "as one": f"{max(together.fused, default=0)} of {len(specs)}", "as one captured": together.captured,
        "alone differs by": differences[0], "as one differs by": differences[1], "tolerance": tolerance,
    }  # fmt: skip


def check_paths(alone: Seen, together: Seen, count: int, captures: bool, fail: Any) -> None:
    """Report it where the fits were not captured each, not trained as one, or not captured as one."""
    if captures and alone.captured != count:
        fail(f"{alone.captured} of {count} fits were captured{alone.reason}")
    if together.fused != [count]:
        fail(f"the fits were not trained as one{together.reason}")
    elif captures and not together.captured:
        fail(f"the step of all was not captured{together.reason}")


def learned(result: Result) -> bool:
    """Return whether the training loss fell."""
    history: Sequence[dict[str, float]] = result.config["history"]
    return history[-1]["train/loss"] < history[0]["train/loss"]
