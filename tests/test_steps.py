"""Training that is counted in steps: sets of all sizes train equally long, and each row is drawn as often as others."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from aecore.config.experiment import Dense, Experiment, Finetune, Fit
from aecore.config.facts import Facts
from aecore.config.specs import FinetuneSpec, Numerics
from aecore.core.errors import InputError
from aecore.core.fingerprint import fingerprint
from aecore.core.types import Terms
from aecore.data.splits import Arrays, Split
from aecore.data.stream import Shuffled
from aecore.stages.context import Context
from aecore.stages.finetune import finetune, prepare
from aecore.stages.pretrain import pretrain_layer
from aecore.stages.training import train, train_as_one
from aecore.training import fused, graphs, groups
from aecore.training.batches import epoch_of
from aecore.training.checkpoint import Checkpoints
from aecore.training.job import Job
from aecore.training.team import Team
from aecore.variants import Plain
from pipelines.cluster.share import Share
from pipelines.execution.probe import expected_seconds
from pipelines.graph.recipe import build
from pipelines.graph.work import epoch_rows, epoch_steps, guessed_seconds, shape_of
from tests.fits import fit_model, job
from tests.test_checkpoint import KilledError, same, spec, until
from tests.test_fused import SAME, differ, few, prepared, tuning
from tests.test_parallel import arrays, trained
from tests.test_parallel import spec as team_spec
from tests.test_stream import open_data, write


class Numbered(nn.Linear):
    """A model that notes the rows of each batch: their numbers are their only feature."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.batches: list[list[int]] = []

    def terms(self, x: Tensor) -> Terms:
        if self.training:
            self.batches.append(x[:, 0].long().tolist())
        return {"reconstruction": (self(x) - x).square().mean()}


def rows(count: int) -> tuple[Tensor, ...]:
    return (torch.arange(count, dtype=torch.float32)[:, None],)


def drawn(count: int, fit: Fit, **options: Any) -> list[list[int]]:
    """Return the rows of each batch of a fit to so many rows."""
    model = Numbered()
    fitted = fit_model(model, model.terms, rows(count), rows(3), fit, **options)
    assert len(fitted.history) == fit.epochs
    return model.batches


@pytest.mark.parametrize(
    ("count", "batch", "steps", "epochs"),
    # few rows and many steps; parts that end within a pass; parts of several passes; more rows than are read; one row
    [(5, 128, 1000, 10), (100, 32, 50, 7), (64, 16, 60, 3), (100_000, 16, 20, 4), (1, 8, 6, 2)],
)
def test_rows_take_turns(count: int, batch: int, steps: int, epochs: int) -> None:
    batches = drawn(count, Fit(steps=steps, epochs=epochs, batch_size=batch, lr=1e-9))
    assert len(batches) == steps and {len(one) for one in batches} == {min(batch, count)}
    times = np.bincount([row for one in batches for row in one], minlength=count)
    assert times.max() - times.min() <= 1
    assert count < 10 or batches[0] != sorted(batches[0])


def test_parts_differ_by_one_step_at_most() -> None:
    model, counts = Numbered(), list[int]()
    fit_model(
        model, model.terms, rows(50), rows(3), Fit(steps=47, epochs=5, batch_size=8),
        report=lambda *_: counts.append(len(model.batches)),
    )  # fmt: skip
    assert counts == [9, 18, 28, 37, 47]


def test_other_seeds_and_other_passes_have_other_orders() -> None:
    fit = Fit(steps=8, epochs=1, batch_size=20, lr=1e-9)
    first, again, second = (list(chain(*drawn(40, fit, seed=seed))) for seed in (0, 0, 1))
    assert first == again != second
    passes = [first[n : n + 40] for n in range(0, 160, 40)]
    assert all(sorted(one) == list(range(40)) for one in passes) and len({*map(tuple, passes)}) == 4


@pytest.mark.parametrize("fit", [{"warmup": 1}, {"schedule": "cosine"}])
def test_the_learning_rate_follows_the_parts_as_it_follows_epochs(fit: dict[str, Any]) -> None:
    """Ten batches are one pass, so the rates of both are the same."""
    rates = []
    for steps in (None, 50):
        model = Numbered()
        given = Fit.model_validate({"epochs": 5, "steps": steps, "batch_size": 10, **fit})
        rates.append([epoch["lr"] for epoch in fit_model(model, model.terms, rows(100), rows(3), given).history])
    assert rates[0] == rates[1] and len(set(rates[0])) > 1


@pytest.mark.parametrize(
    "fit", [{}, {"schedule": "plateau"}, {"schedule": "cosine", "clip": 0.5}, {"patience": 2}, {"batch_size": 1000}]
)
def test_broken_off_it_ends_with_the_same_bits(fit: dict[str, Any], vectors: Arrays, tmp_path: Path) -> None:
    given = spec(steps=61, **fit)  # 7 or 8 steps in a part, and 7 in a pass
    unbroken = pretrain_layer(given, Context(), data=vectors)
    place = Checkpoints(str(tmp_path / "stage"), seconds=0)
    for epoch in (1, 3):
        with pytest.raises(KilledError):
            pretrain_layer(given, Context(report=until(epoch, []), checkpoints=place), data=vectors)
    assert same(unbroken, pretrain_layer(given, Context(checkpoints=place), data=vectors))


STEPS = (
    Fit(epochs=3, steps=25), Fit(epochs=3, steps=25, lr=3e-3, weight_decay=0.1, schedule="cosine"),
    Fit(epochs=3, steps=25, lr=5e-3, clip=2.0, schedule="plateau"),
)  # fmt: skip


def test_as_one_they_are_what_they_are_alone(
    digits: tuple[Facts, Arrays], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    facts, data = few(digits)
    sizes, fit_as_one = list[int](), fused.fit_as_one

    def counted(jobs: Any) -> Any:
        sizes.append(len(jobs))
        return fit_as_one(jobs)

    monkeypatch.setattr(groups, "fit_as_one", counted)
    each = [tuning(facts, Plain(), fit, n) for n, fit in enumerate(STEPS)]
    each += [tuning(facts, Plain(), fit, n) for n, fit in enumerate((Fit(epochs=5, steps=25), Fit(epochs=3)))]
    tiny = [one.model_copy(update={"fit": one.fit.model_copy(update={"batch_size": 1000})}) for one in each[:2]]
    alone = [finetune(one, Context(), data=data) for one in (*each, *tiny)]
    ended = train_as_one(prepared([*each, *tiny], data), everywhere=True)
    assert sizes == [3, 2]  # parts of other numbers of steps are trained alone
    assert all(differ(one, two) < SAME for one, two in zip(alone, ended, strict=True))
    assert len({result.config["history"][0]["val/loss"] for result in alone[:3]}) == 3


def test_batches_of_all_rows_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[Any] = []

    def capture(step: Any, stream: Any) -> Any:
        captures.append(step)
        return step

    monkeypatch.setattr(graphs, "can_be_captured", lambda job: True)
    monkeypatch.setattr(graphs, "capture", capture)
    assert len(drawn(5, Fit(steps=20, epochs=2, batch_size=128))) == 20 and len(captures) == 1


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shuffled:
    """Rows that are read from disk, in small pieces."""
    monkeypatch.setattr("aecore.data.sets.PIECE_BYTES", 100 * 32)
    return Shuffled(open_data(write(tmp_path / "set", rows=600, group=50)))


def streamed(rows: Shuffled, fit: Fit, team: Team) -> Iterator[list[list[float]]]:
    """Yield for each part of a fit the first features of its batches, which are the numbers of their rows."""
    model, shuffle = Numbered(), torch.Generator().manual_seed(0)
    given: Job = job(model, model.terms, (), (), fit, team=team)
    given = Job(**{**vars(given), "train": rows})
    for epoch in range(1, fit.epochs + 1):
        yield [part.tensors[0][:, 0].tolist() if part.rows else [] for part in epoch_of(given, epoch, shuffle)]


@pytest.mark.parametrize("steps", [9, 100])
def test_a_part_of_a_stream_begins_a_pass_and_goes_on_with_others(steps: int, stream: Shuffled) -> None:
    fit = Fit(epochs=3, steps=steps, batch_size=32)
    parts = list(streamed(stream, fit, Team()))
    assert [len(part) for part in parts] == [steps * n // 3 - steps * (n - 1) // 3 for n in (1, 2, 3)]
    assert {len(batch) for part in parts for batch in part} == {32}
    whole = len(stream) // 32  # whole batches of a pass
    first = [row for batch in parts[0][:whole] for row in batch]
    assert len(set(first)) == len(first) and parts[0][0] != parts[1][0]
    (all_rows, *_) = streamed(stream, Fit(epochs=1, steps=3, batch_size=10_000), Team())
    assert [len(batch) for batch in all_rows] == [len(stream)] * 3


def test_all_of_a_team_take_the_same_steps_of_a_stream(stream: Shuffled) -> None:
    fit = Fit(epochs=2, steps=75, batch_size=32)
    parts = [list(streamed(stream, fit, Team(rank, 3))) for rank in range(3)]
    assert [[len(part) for part in own] for own in parts] == [[37, 38]] * 3
    rows = [{row for part in own for batch in part for row in batch} for own in parts]
    assert len(set.union(*rows)) == len(stream)


def test_a_stream_of_too_few_rows_for_its_workers_ends(tmp_path: Path) -> None:
    """With batch normalisation each worker's part needs two rows; the one piece gives all rows to one worker."""
    model = nn.Sequential(nn.BatchNorm1d(8))
    rows = Shuffled(open_data(write(tmp_path / "set", rows=60, files=1)))
    given = job(model, lambda x: {}, (), (), Fit(epochs=1, steps=4, batch_size=2), team=Team(0, 2))
    with pytest.raises(InputError, match="batch_size: workers get too few rows for a batch; use fewer"):
        list(epoch_of(Job(**{**vars(given), "train": rows}), 1, torch.Generator()))


def test_a_stream_that_was_broken_off_ends_with_the_same_bits(tmp_path: Path) -> None:
    data, given = open_data(write(tmp_path / "set", rows=600)), spec(steps=100)
    unbroken = pretrain_layer(given, Context(), data=data)
    place = Checkpoints(str(tmp_path / "stage"), seconds=0)
    with pytest.raises(KilledError):
        pretrain_layer(given, Context(report=until(3, []), checkpoints=place), data=data)
    assert same(unbroken, pretrain_layer(given, Context(checkpoints=place), data=data))


def test_a_team_trains_what_one_worker_trains(tmp_path: Path) -> None:
    given = team_spec(Plain())
    given = given.model_copy(update={"fit": given.fit.model_copy(update={"steps": 40})})
    alone = pretrain_layer(given, Context(), data=arrays())
    for together in trained(tmp_path / "team", 2, given):
        for before, after in zip(alone.config["history"], together.config["history"], strict=True):
            assert after["val/loss"] == pytest.approx(before["val/loss"], rel=1e-5)


def test_few_labels_are_not_repeated(digits: tuple[Facts, Arrays]) -> None:
    facts, data = digits
    layers = tuning(facts, Plain(), Fit(), 0).layers
    classifier = FinetuneSpec(
        layers=layers, task="classify", classes=facts.classes, variant=None, seed=0, numerics=Numerics(), labels=20,
        fit=Fit(epochs=2, steps=9),
    )  # fmt: skip
    training = prepare(classifier, Context(), data=data)
    assert (training.job.rows, training.job.batch_rows) == (20, 20)
    assert len(train(training).config["history"]) == 2
    assert (epoch_steps(classifier, 1000), epoch_rows(classifier, 1000)) == (4.5, 90)


def vectors_of(rows: int) -> Facts:
    return Facts(digest="d", shape=(8,), levels=0, classes=(), rows=rows)


def experiment(finetuned: Finetune) -> Experiment:
    return Experiment(network=Dense(widths=(4,)), pretrain=None, finetune=finetuned)


def test_work_is_that_of_the_steps() -> None:
    def stage(rows: int, **fit: Any) -> Any:
        finetuned = Finetune.model_validate({"batch_size": 50, **fit})
        return build(experiment(finetuned), vectors_of(rows), Numerics()).finetune

    few, many, epochs = stage(100, steps=600, epochs=30), stage(10**6, steps=600, epochs=3), stage(1000, epochs=30)
    assert guessed_seconds(few) == pytest.approx(guessed_seconds(many))
    assert guessed_seconds(few) == pytest.approx(guessed_seconds(epochs))  # 30 epochs of 20 batches
    assert guessed_seconds(stage(100, steps=1200)) == pytest.approx(2 * guessed_seconds(few))
    assert shape_of([few]) == shape_of([many]) == shape_of([epochs])


def test_a_probe_takes_few_steps_of_many(vectors: Arrays) -> None:
    seconds = []
    for steps in (200, 200_000):
        stage = build(experiment(Finetune(epochs=2, steps=steps)), vectors_of(600), Numerics()).finetune
        assert stage is not None
        seconds.append(expected_seconds([stage], Share(0, 1), False, vectors)[stage.key])
    assert seconds[1] > 100 * seconds[0] > 0


def test_larger_batches_than_rows_are_no_mistake_under_steps(recwarn: pytest.WarningsRecorder) -> None:
    build(experiment(Finetune(batch_size=256, steps=60, epochs=5)), vectors_of(100), Numerics())
    assert not recwarn
    with pytest.warns(UserWarning, match=r"finetune\.batch_size: 256 is more than the 100 rows"):
        build(experiment(Finetune(batch_size=256)), vectors_of(100), Numerics())


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
def test_more_parts_than_steps_are_refused(name: str) -> None:
    message = rf"{name}\.epochs: 10 steps cannot be cut into 20 parts; raise {name}\.steps or lower {name}\.epochs"
    with pytest.raises(ValidationError, match=message):
        Experiment.model_validate({name: {"steps": 10, "epochs": 20}})
    assert Experiment.model_validate({name: {"steps": 20, "epochs": 20}})


def test_without_steps_keys_stay() -> None:
    # of the version before there were steps
    assert fingerprint(Fit()) == "29b45319733b37f34a29b751ed9693685dc4a8362943ba0da318c0d0eda2b98d"
    assert fingerprint(Fit(steps=100)) != fingerprint(Fit())


def test_tables_of_few_rows_train(vectors: Arrays) -> None:
    small = vectors._replace(train=Split(vectors.train.x[:5], None))
    result = pretrain_layer(spec(steps=1000, batch_size=128), Context(), data=small)
    losses = [epoch["train/loss"] for epoch in result.config["history"]]
    assert len(losses) == 8 and losses[-1] < losses[0]
