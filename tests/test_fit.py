import gc
import math
import shutil
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

from aecore.config.experiment import Fit
from aecore.core.errors import DivergenceError, InputError
from aecore.core.types import Precision, Terms
from aecore.data.splits import Arrays
from aecore.training.checkpoint import Checkpoints
from aecore.training.fit import fit
from aecore.training.job import Fitted
from aecore.training.numerics import get_random_state
from aecore.training.optimizer import AdamW
from aecore.training.progress import schedule
from aecore.training.team import Team
from aecore.training.validation import Validation
from tests.fits import CPU, fit_model, job


class Affine(nn.Module):
    """A linear autoencoder."""

    def __init__(self, features: int, code: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(features, code), nn.Linear(code, features)

    def terms(self, x: Tensor) -> Terms:
        return {"reconstruction": (self.decoder(self.encoder(x)) - x).square().sum(1).mean()}


def run(vectors: Arrays, spec: Fit, seed: int = 0, code: int = 2) -> tuple[Affine, Fitted]:
    torch.manual_seed(seed)
    model = Affine(8, code)
    rows = [(torch.tensor(split.x),) for split in (vectors.train, vectors.validation)]
    return model, fit_model(model, model.terms, rows[0], rows[1], spec, seed=seed)


def test_a_linear_autoencoder_reaches_pca(vectors: Arrays) -> None:
    seen = vectors._replace(validation=vectors.train)  # the best epoch for the rows that PCA is fitted on
    model, _ = run(seen, Fit(epochs=600, batch_size=100, lr=2e-2, schedule="cosine"))
    x = torch.tensor(vectors.train.x)
    pca = PCA(2).fit(vectors.train.x)
    best = np.square(pca.inverse_transform(pca.transform(vectors.train.x)) - vectors.train.x).sum(1).mean()
    assert model.terms(x)["reconstruction"].item() == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_optimiser_is_torchs_adamw_bit_for_bit(weight_decay: float) -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(9, 4), nn.Linear(9, 4)
    theirs.load_state_dict(ours.state_dict())
    mine = AdamW(ours.parameters(), weight_decay)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=weight_decay, fused=True)
    for _ in range(5):
        x = torch.randn(3, 9)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
        mine.step(0.01)
        reference.step()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)


def test_moments_of_weights_without_gradients_never_become_denormal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle(Affine):
        def __init__(self) -> None:
            super().__init__(8, 2)
            self.idle = nn.Parameter(torch.ones(3))

        def terms(self, x: Tensor) -> Terms:
            return {**super().terms(x), "nothing": 0 * self.idle.sum()}

    class Watched(AdamW):
        def __init__(self, parameters: Iterable[Tensor], weight_decay: float) -> None:
            super().__init__(parameters, weight_decay)
            self.means[0].copy_(torch.tensor([1e-25, -1e-25, 0]))  # of a unit that died some 500 steps ago
            optimizers.append(self)

        def denormal(self) -> int:
            parts = [*self.means, *self.squares]
            return sum(int(((x != 0) & (x.abs() < torch.finfo().tiny)).sum()) for x in parts)

    optimizers: list[Watched] = []
    monkeypatch.setattr("aecore.training.fit.AdamW", Watched)
    rows, trained = (torch.rand(400, 8),), []
    for flushed in (True, False):
        if not flushed:
            monkeypatch.setattr(AdamW, "flush", lambda self: None)
        torch.manual_seed(0)
        model, found = Idle(), list[int]()
        assert next(iter(dict(model.named_parameters()))) == "idle"
        fit_model(
            model, model.terms, rows, rows, Fit(epochs=9, batch_size=10),
            report=lambda *told, found=found: found.append(optimizers[-1].denormal()),
        )  # fmt: skip
        assert any(found) != flushed
        trained.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *trained))


def test_same_seed_same_bits_and_another_seed_others(vectors: Arrays) -> None:
    weights = [run(vectors, Fit(epochs=3), seed)[0].state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["encoder.weight"], weights[2]["encoder.weight"])


def test_the_best_epoch_is_kept_and_patience_ends_training(vectors: Arrays) -> None:
    # so large a rate that the loss soon jumps about
    model, fitted = run(vectors, Fit(epochs=200, lr=0.5, patience=5))
    losses = [epoch["val/loss"] for epoch in fitted.history]
    assert fitted.best_epoch == 1 + int(np.argmin(losses))
    assert len(losses) == fitted.best_epoch + 5 < 200
    rows = (torch.tensor(vectors.validation.x),)
    kept, _ = Validation(job(model, model.terms, rows, rows, Fit())).score(lambda x: (model.terms(x), {}))
    assert kept["reconstruction"] == pytest.approx(min(losses), rel=1e-6)


def test_what_is_summed_up_can_choose_the_epoch(vectors: Arrays) -> None:
    torch.manual_seed(0)
    model = Affine(8, 2)
    seen: list[int] = []

    def scored(x: Tensor) -> tuple[Terms, Terms]:  # best at the second epoch, by decree
        seen.append(1)
        return model.terms(x), {"decree": torch.tensor(abs(len(seen) - 2.0) * len(x))}

    rows = (torch.tensor(vectors.train.x),), (torch.tensor(vectors.validation.x),)
    fitted = fit_model(model, model.terms, *rows, Fit(epochs=4), sums=scored, monitor="decree")
    assert fitted.best_epoch == 2
    assert [epoch["val/decree"] for epoch in fitted.history] == [1, 0, 1, 2]


def test_epochs_are_reported_once_each_as_they_end(vectors: Arrays) -> None:
    torch.manual_seed(0)
    model, told = Affine(8, 2), []
    rows = (torch.tensor(vectors.train.x),), (torch.tensor(vectors.validation.x),)
    fitted = fit_model(
        model,
        model.terms,
        *rows,
        Fit(epochs=3),
        report=lambda n, m: told.append((n, m["val/loss"])),
    )
    assert told == [(n, m["val/loss"]) for n, m in enumerate(fitted.history, 1)]
    assert {"train/loss", "train/reconstruction", "val/reconstruction", "lr", "seconds"} <= set(fitted.history[0])


def test_every_row_is_seen_once_an_epoch_in_another_order(vectors: Arrays) -> None:
    torch.manual_seed(0)
    model, rows = Affine(8, 2), ((torch.tensor(vectors.train.x),), (torch.tensor(vectors.validation.x),))
    n = len(vectors.train.x)
    seen, count = torch.zeros(2 * n), torch.zeros((), dtype=torch.long)

    def terms(x: Tensor) -> Terms:
        if model.training:  # by operations on tensors, which a repeated step does, too
            seen.index_copy_(0, count + torch.arange(len(x)), x[:, 0])
            count.add_(len(x))
        return model.terms(x)

    fit_model(model, terms, *rows, Fit(epochs=2, batch_size=64))
    first, second = seen.split(n)
    assert int(count) == 2 * n and not torch.equal(first, second)
    assert torch.equal(first.sort().values, rows[0][0][:, 0].sort().values)
    assert torch.equal(second.sort().values, rows[0][0][:, 0].sort().values)


def test_a_last_batch_of_one_row_is_left_out(vectors: Arrays) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 8))
    rows = (torch.tensor(vectors.train.x[:65]),), (torch.tensor(vectors.validation.x),)
    fitted = fit_model(model, lambda x: {"r": (model(x) - x).square().mean()}, *rows, Fit(epochs=1, batch_size=64))
    assert math.isfinite(fitted.history[0]["train/loss"])


def testschedules() -> None:
    cosine = Fit(epochs=10, schedule="cosine", warmup=2)
    assert [round(schedule(cosine, e), 6) for e in (1, 2, 6, 10)] == [0.5, 1, 0.5, 0]
    assert 0 < schedule(cosine, 0) < 0.01
    assert schedule(Fit(), 7.5) == 1


def test_plateau_halves_the_rate_after_three_bad_epochs(vectors: Arrays) -> None:
    _, fitted = run(vectors, Fit(epochs=60, lr=0.3, schedule="plateau"))
    losses, rates = ([epoch[name] for epoch in fitted.history] for name in ("val/loss", "lr"))
    best, bad, rate = math.inf, 0, 0.3
    for loss, used in zip(losses, rates, strict=True):
        assert used == pytest.approx(rate)
        bad = 0 if loss < best else bad + 1
        best = min(best, loss)
        if bad == 3:
            rate, bad = rate / 2, 0
    assert rates[-1] < 0.3


def test_clipping_bounds_the_step(vectors: Arrays) -> None:
    free, clipped = (run(vectors, Fit(epochs=1, clip=clip))[0] for clip in (None, 1e-9))
    torch.manual_seed(0)
    start = Affine(8, 2).encoder.weight
    # Adam scales gradients out, so that only a gradient below its epsilon shows in the step
    assert (clipped.encoder.weight - start).abs().max() < 0.2 * (free.encoder.weight - start).abs().max()


def test_a_term_that_is_not_finite_stops_with_its_name(vectors: Arrays) -> None:
    model = Affine(8, 2)
    rows = (torch.tensor(vectors.train.x),), (torch.tensor(vectors.validation.x),)
    with pytest.raises(DivergenceError, match="train/penalty is nan in epoch 1, batch 1: lower the learning rate"):
        fit_model(
            model, lambda x: {**model.terms(x), "penalty": model.encoder.weight.sum() * math.nan}, *rows,
            Fit(epochs=2, batch_size=400),
        )  # fmt: skip


def test_divergence_names_the_step_and_what_is_kept(vectors: Arrays, tmp_path: Path) -> None:
    model, steps = Affine(8, 2), torch.zeros(())

    def terms(x: Tensor) -> Terms:
        if model.training:
            steps.add_(1)
        return {name: value * torch.where(steps == 11, math.inf, 1.0) for name, value in model.terms(x).items()}

    rows = (torch.tensor(vectors.train.x),), (torch.tensor(vectors.validation.x),)
    place = Checkpoints(str(tmp_path / "kept"), 0.0)
    said = rf"train/reconstruction is inf in epoch 3, batch 3: .*; epoch 2 is kept in {place.place}"
    with pytest.raises(DivergenceError, match=said):
        fit_model(model, terms, *rows, Fit(epochs=9, batch_size=100), checkpoints=place)
    assert int(steps) == 11 and place.load() is not None


def test_a_batch_that_does_not_fit_is_cut_in_two(vectors: Arrays) -> None:
    spec = Fit(epochs=3, batch_size=100)
    whole, before = run(vectors, spec)
    rows = [(torch.tensor(split.x),) for split in (vectors.train, vectors.validation)]

    def fitted(most: int) -> tuple[Affine, Fitted]:
        torch.manual_seed(0)
        model = Affine(8, 2)

        def terms(x: Tensor) -> Terms:
            if model.training and len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return model.terms(x)

        return model, fit_model(model, terms, rows[0], rows[1], spec)

    with pytest.warns(UserWarning, match="out of memory with batches of 100 rows: cut in two"):
        model, after = fitted(60)
    assert [epoch["parts"] for epoch in after.history] == [2, 2, 2] and "parts" not in before.history[0]
    assert after.history[-1]["train/loss"] == pytest.approx(before.history[-1]["train/loss"], rel=1e-5)
    assert torch.allclose(model.encoder.weight, whole.encoder.weight, atol=1e-5)
    with (
        pytest.warns(UserWarning, match="cut in two"),
        pytest.raises(MemoryError, match="out of memory with 50 rows at once; lower batch_size or the widths"),
    ):
        fitted(40)


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_lower_precision_trains_and_leaves_no_trace(vectors: Arrays, precision: Precision) -> None:
    torch.manual_seed(0)
    model = Affine(8, 2)
    rows = (torch.tensor(vectors.train.x),), (torch.tensor(vectors.validation.x),)
    before = torch.get_float32_matmul_precision()
    fitted = fit_model(model, model.terms, *rows, Fit(epochs=5), precision=precision)
    assert fitted.history[-1]["val/loss"] < fitted.history[0]["val/loss"]
    assert model.encoder.weight.dtype == torch.float32 and torch.get_float32_matmul_precision() == before


def test_validation_noise_is_the_same_at_every_epoch(vectors: Arrays) -> None:
    model = Affine(8, 2)
    rows = (torch.tensor(vectors.validation.x),)

    def scored(x: Tensor) -> tuple[Terms, Terms]:
        return model.terms(x + torch.randn_like(x)), {}

    fits = [job(model, model.terms, rows, rows, Fit(), seed=seed) for seed in (1, 1, 2)]
    noisy = [Validation(each).score(scored)[0]["reconstruction"] for each in fits]
    assert noisy[0] == noisy[1] != noisy[2]


# nothing stands in for it: what is tested is the step as the compiler has built it
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU, and there is none")
def test_a_compiled_step_trains_the_same(vectors: Arrays) -> None:
    rows = (torch.tensor(vectors.train.x),), (torch.tensor(vectors.validation.x),)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Affine(8, 2)
        fitted = fit_model(model, model.terms, *rows, Fit(epochs=3), compile=compiled)
        losses.append([epoch["val/loss"] for epoch in fitted.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_batches_in_halves_from_the_start(vectors: Arrays) -> None:
    rows = [(torch.tensor(split.x),) for split in (vectors.train, vectors.validation)]
    losses = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = Affine(8, 2)
        after = fit_model(model, model.terms, rows[0], rows[1], Fit(epochs=3), parts=parts)
        losses.append(after.history[-1]["train/loss"])
        assert [epoch.get("parts") for epoch in after.history] == [None if parts == 1 else 2] * 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def lacking(model: Affine, most: int, training: bool) -> Callable[[Tensor], Terms]:
    """The model's terms, for which memory is not enough with more rows, in training or in validation."""

    def terms(x: Tensor) -> Terms:
        if model.training == training and len(x) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model.terms(x)

    return terms


def test_validation_that_does_not_fit_is_cut_in_two(vectors: Arrays) -> None:
    rows = [(torch.tensor(split.x),) for split in (vectors.train, vectors.validation)]
    whole, before = run(vectors, Fit(epochs=3))
    torch.manual_seed(0)
    model = Affine(8, 2)
    with pytest.warns(UserWarning, match="out of memory with batches of 100 validation rows: cut in two") as warned:
        after = fit_model(model, lacking(model, 60, False), rows[0], rows[1], Fit(epochs=3))
    assert len(warned) == 1 and "parts" not in after.history[0]
    assert torch.equal(model.encoder.weight, whole.encoder.weight)
    assert after.history[-1]["val/loss"] == pytest.approx(before.history[-1]["val/loss"], rel=1e-6)
    said = "out of memory with 50 validation rows at once; lower the widths"
    with pytest.warns(UserWarning, match="cut in two"), pytest.raises(MemoryError, match=said):
        fit_model(model, lacking(model, 40, False), rows[0], rows[1], Fit(epochs=3))


@pytest.mark.parametrize("last", [1, 2, 3])
def test_parts_of_a_batch_are_never_too_small(last: int, vectors: Arrays) -> None:
    """A part of one row has no batch statistics, and one of none no mean."""
    rows = (torch.tensor(vectors.train.x[: 64 + last]),)
    normalised = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 8))
    for model in (normalised, nn.Linear(8, 8)):
        halves = fit_model(
            model, lambda x, model=model: {"r": (model(x) - x).square().mean()}, rows, rows,
            Fit(epochs=2, batch_size=64 if last > 1 else 13), parts=2,
        )  # fmt: skip
        assert math.isfinite(halves.history[-1]["train/loss"]) and halves.history[-1]["parts"] == 2


def test_batches_too_small_for_batch_statistics_are_refused_with_a_remedy(vectors: Arrays) -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 8))
    rows = (torch.tensor(vectors.train.x),)
    with pytest.raises(InputError, match=r"batch_size: batches of 3 rows .* two for each of 2 workers; .* to 4"):
        fit_model(
            model, lambda x: {"r": (model(x) - x).square().mean()}, rows, rows, Fit(batch_size=3), team=Team(0, 2)
        )  # fmt: skip


def test_what_was_trained_is_let_go_at_once(vectors: Arrays) -> None:
    """Without waiting for Python's collector of cycles, so that a GPU's memory comes back."""

    def once() -> weakref.ref[Tensor]:
        return weakref.ref(run(vectors, Fit(epochs=2))[0].encoder.weight)

    gc.disable()
    try:
        assert once()() is None
    finally:
        gc.enable()


def test_a_fit_begins_in_the_random_state_that_it_is_given_and_leaves_the_present_one(vectors: Arrays) -> None:
    x, weights = (torch.tensor(vectors.train.x),), []
    torch.manual_seed(5)
    begun = get_random_state(CPU)
    for seed in (5, 6):
        torch.manual_seed(seed)
        present, model = torch.get_rng_state(), Affine(8, 2)
        model.load_state_dict({name: torch.full_like(value, 0.1) for name, value in model.state_dict().items()})
        torch.set_rng_state(present)

        def terms(rows: Tensor, model: Affine = model) -> Terms:
            return model.terms(rows + torch.randn_like(rows))

        fit(job(model, terms, x, x, Fit(epochs=1), random=begun))
        assert torch.equal(torch.get_rng_state(), present)
        weights.append(model.encoder.weight.detach())
    assert torch.equal(*weights)
