"""Studies of many data sets: which files are sets, what is refused, what is planned of each, and the report on all."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from aecore.config.facts import Facts
from aecore.config.specs import Numerics
from aecore.core.errors import InputError
from aecore.data.collection import find_sets
from aecore.evaluation.trial import Trial
from jobs import cli
from jobs.compare import Compare, _write_report
from pipelines.cluster.resources import Resources
from pipelines.graph.stage import Stage
from pipelines.reporting import sets as reports
from pipelines.reporting.report import QUICK, About
from pipelines.study.agenda import Agenda
from pipelines.study.desk import config_of
from pipelines.study.groups import alike, reference_groups
from pipelines.study.plan import TrialPlan, plan_trials
from pipelines.study.preview import preview
from pipelines.study.race import Race
from pipelines.study.run import Ended
from pipelines.study.schema import Study
from pipelines.study.sets import StudySet, digest_of, inspect, key_of
from tests.test_compare import compare, runs
from tests.test_report import CLASSES, bare, text, trial
from tests.test_train import Done, store

SMALL: dict[str, Any] = {
    "base": {
        "data": {"limit": 100},
        "network": {"kind": "dense", "widths": [4, 2]},
        "pretrain": None,
        "finetune": {"batch_size": 32},
    },
    "variants": {"plain": {}, "denoising": {"variant": {"kind": "denoising"}}},
    "seeds": [0, 1],
    "budget": {"epochs": 2},
    "labels": {"counts": [], "fit": {"epochs": 1}},
}
UNSCALED: dict[str, Any] = {
    **SMALL, "base": {**SMALL["base"], "data": {"standardize": False}}, "variants": {"plain": {}}, "seeds": [0]
}  # fmt: skip
FACTS = Facts(digest="d", shape=(1, 8, 8), levels=17, classes=tuple("0123456789"), rows=1797)


def write_table(path: Path, features: int = 6, rows: int = 120, scale: float = 1.0, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=rows)
    x = scale * (rng.normal(size=(rows, features)) + y[:, None])
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(x, columns=[f"f{n}" for n in range(features)]).assign(label=y).to_parquet(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two sets, relative to the working folder."""
    monkeypatch.chdir(tmp_path)
    write_table(Path("sets/glass.parquet"))
    write_table(Path("sets/wine/part-0.parquet"), 9, seed=1)
    write_table(Path("sets/wine/part-1.parquet"), 9, seed=2)
    return Path("sets")


def studied(**fields: Any) -> Study:
    return Study.model_validate({**SMALL, "data": "sets", **fields})


def inspected(**fields: Any) -> list[StudySet]:
    return inspect(studied(**fields), Numerics())


@pytest.mark.parametrize(
    ("files", "path", "names"),
    [
        (["a.parquet", "b.pq", "c/1.parquet", "c/d/2.parquet", "_e.parquet", "notes.txt", ".f/1.parquet"], "sets",
         {"a": "sets/a.parquet", "b": "sets/b.pq", "c": "sets/c"}),
        (["a.parquet", "b/1.parquet", "b/2.parquet", "notes.txt"], "sets/*",
         {"a": "sets/a.parquet", "b": "sets/b"}),
        (["x/data.parquet", "y/data.parquet", "other.parquet"], "sets/*/data.parquet",
         {"x-data": "sets/x/data.parquet", "y-data": "sets/y/data.parquet"}),
        (["x/data.parquet", "y/z/data.parquet"], "sets/**/*.parquet",
         {"x-data": "sets/x/data.parquet", "z-data": "sets/y/z/data.parquet"}),
        (["a.parquet", "b/x.parquet", "b/y.parquet"], ["sets/a.parquet", "sets/b"],
         {"a": "sets/a.parquet", "x": "sets/b/x.parquet", "y": "sets/b/y.parquet"}),
        (["a(1), b=ü.parquet", ".x.parquet", "20 % v1.2/1.parquet"], "sets",
         {"a_1__ b_ü": "sets/a(1), b=ü.parquet", "20 _ v1.2": "sets/20 % v1.2"}),
        (["trainer.parquet", "test.parquet"], "sets",
         {"trainer": "sets/trainer.parquet", "test": "sets/test.parquet"}),
    ],
)  # fmt: skip
def test_files_and_folders_are_sets(
    files: list[str], path: Any, names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path("sets", file).parent.mkdir(parents=True, exist_ok=True)
        Path("sets", file).touch()
    assert find_sets(path) == names
    assert all(Study.model_validate({"data": path, "variants": {name: {}}}) for name in names), "names suit metrics"
    if path == "sets":
        uri = f"file://{tmp_path}/sets"
        assert list(find_sets(uri)) == list(find_sets(str(tmp_path / "sets"))) == list(find_sets("sets/"))
        assert all(place.startswith(uri) for place in find_sets(uri).values())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["label=a/0.parquet", "label=b/0.parquet"], r"data: sets holds folders of one set by key, label=a, label=b: "),
        (["year=2024/0.parquet"], r"it is one set; name it in base\.data\.path, and leave data out"),
        (["train-0.parquet", "test-0.parquet"], r"data: sets holds the splits of one set, test-0.parquet, train-0"),
        (["train/0.parquet", "validation/0.parquet", "test/0.parquet"], r"the splits of one set, test, train, val"),
        (["notes.txt"], r"data: no \.parquet file in sets \(notes\.txt: name them by a pattern\)"),
        ([], r"data: sets does not exist; name a Parquet file"),
        (["_delta_log/0.json", "a.parquet"], r"data: sets is a table of Delta Lake"),
        (["a,b.parquet", "a b/_c/0.parquet", "a;b.parquet"],
         r"data: sets/a,b\.parquet, sets/a;b\.parquet would both be called .*; rename"),
    ],
)  # fmt: skip
def test_what_is_no_folder_of_sets_is_refused(
    files: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        Path("sets", file).parent.mkdir(parents=True, exist_ok=True)
        Path("sets", file).touch()
    with pytest.raises(InputError, match=message) as error:
        find_sets("sets")
    assert len(str(error.value).splitlines()) == 1


def test_base_data_holds_what_the_sets_have_in_common(folder: Path) -> None:
    (Path("study.yaml")).write_text(
        "base: {network: {widths: [4, 2]}, data: {validation: 0.25, labels: label}}\nseeds: [0]\n"
    )
    study = cli.parse(Compare, "compare", ["study.yaml", "--data", "sets"]).study
    assert (study.data, study.base.data.name, study.base.data.validation) == ("sets", "parquet", 0.25)
    assert Study.model_validate(study.model_dump()) == study
    listed = cli.parse(Compare, "compare", ["--data", "[sets/glass.parquet,sets/wine]"]).study
    assert listed.data == ("sets/glass.parquet", "sets/wine")
    assert Study(data="~/x").data == str(Path.home() / "x")
    one, other = inspect(study, Numerics())
    assert (one.name, one.study.base.data.path, one.study.data) == ("glass", "sets/glass.parquet", None)
    assert (other.name, other.facts.rows, other.facts.shape) == ("wine", 240, (9,))
    assert {each.study.base.data.validation for each in (one, other)} == {0.25}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base": {"data": {"path": "b.parquet"}}}, r"base\.data\.path: data names the sets of the study already"),
        ({"base": {"data": {"name": "mnist"}}}, r"base\.data\.name: 'mnist', but data names sets of Parquet"),
        ({"scheduler": "asha"}, r"scheduler: asha compares errors, which differ between sets of data"),
        ({"data": 5}, r"data: name a file or folder, or several"),
    ],
)  # fmt: skip
def test_what_the_sets_cannot_have_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Study.model_validate({"data": "sets", **fields})


def test_a_set_that_does_not_fit_is_named_before_anything_trains(folder: Path) -> None:
    write_table(folder / "single.parquet", 1)
    wide = {"plain": {"variant": {"kind": "sparse", "penalty": "kl"}, "network": {"code_activation": "elu"}}}
    with pytest.raises(InputError, match=r"^data: glass: variants\.plain: variant\.penalty: kl needs codes"):
        inspected(variants=wide)
    (folder / "broken.parquet").write_bytes(b"no Parquet")
    with pytest.raises(InputError, match=r"^data: broken: data\.path: sets/broken\.parquet is not a readable Parquet"):
        inspected()
    (folder / "broken.parquet").write_bytes((folder / "glass.parquet").read_bytes())
    with pytest.raises(InputError, match=r"^data: broken and glass are the same rows; leave one of them out"):
        inspected()


def test_warnings_name_the_set(folder: Path) -> None:
    table = pd.read_parquet(folder / "glass.parquet")
    pd.concat([table] * 3).to_parquet(folder / "copied.parquet")
    with pytest.warns(UserWarning, match=r"^copied: data\.path: \d+ of the \d+ test rows are equal to training rows"):
        inspected()


def test_trials_have_the_keys_of_a_study_of_their_set_alone(folder: Path) -> None:
    sets = inspected()
    planned = [plan for one in sets for plan in one.plans()]
    alone = []
    for one, path in zip(sets, ("sets/glass.parquet", "sets/wine"), strict=True):
        base = {**SMALL["base"], "data": {"name": "parquet", "limit": 100, "path": path}}
        alone.append(plan_trials(Study.model_validate({**SMALL, "base": base}), one.facts, Numerics()))
    assert [list(plan.stages()) for plan in planned] == [list(plan.stages()) for plans in alone for plan in plans]
    assert [plan.name for plan in planned][:2] == ["glass: plain seed=0", "glass: plain seed=1"]
    assert {plan.tags()["data"] for plan in planned[8:]} == {"wine"} and "data" not in alone[0][0].tags()
    stages: dict[str, Stage] = {key: stage for plan in planned for key, stage in plan.stages().items()}
    assert len({stage.name for stage in stages.values() if stage.kept}) == sum(stage.kept for stage in stages.values())


def test_groups_are_of_one_set_and_sets_come_one_after_another(folder: Path) -> None:
    write_table(folder / "like glass.parquet", seed=5)  # of the same shape, so that networks are alike
    sets = inspected()
    plans = [plan for one in sets for plan in one.plans()]
    for groups in (alike([p for p in plans if not p.is_fixed_reference]), reference_groups(plans)):
        assert [len(group) for group in groups] == [2] * 6
        assert all(len({plan.data for plan in group}) == 1 for group in groups)
    agenda = Agenda(retries=0)
    for one in sets:
        agenda.add(one.plans())
    order: list[str] = []
    while group := agenda.take(1):
        assert config_of(group)["data"] == group[0].data
        order.append(group[0].data)
    assert order == [one.name for one in sets for _ in range(4)]


def test_a_race_drops_rows_of_its_own_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def scores(plans: Sequence[TrialPlan]) -> dict[str, np.ndarray]:
        return {p.stage.key: np.linspace(0, 1, 50) + 5 * (p.row == bad[p.data]) + 0.01 * p.seed for p in plans}

    bad = {"glass": "plain", "wine": "denoising"}
    sets = inspected(seeds=[0, 1, 2, 3], scheduler="race")
    races = {one.name: Race(one.study, one.plan, scores) for one in sets}
    agenda = Agenda(retries=0, sources=list(races.values()))
    while group := agenda.take(None):
        for plan in group:
            agenda.finish(plan)
    assert {name: [one.row for one in race.dropped] for name, race in races.items()} == {
        "glass": ["plain"], "wine": ["denoising"]
    }  # fmt: skip
    assert "glass: plain: dropped, worse than " in capsys.readouterr().err


def test_the_key_of_a_study_without_data_stays() -> None:
    def key(**fields: Any) -> str:
        study = Study.model_validate(fields)
        return key_of(study, [StudySet("", study, FACTS, Numerics())])

    # as versions made them that knew neither data nor anomalies
    assert key() == "41f5c40fba1d1f9ff2daffa348891885d93200011220d99dfbb028a78e66959c"
    table = {"base": {"data": {"name": "parquet", "path": "a.parquet", "exclude": ["x"]}}}
    assert key(**table) == "ed27b1ba8764468ce17895e9cc78747dcfe205a9489561ef0c384a5bf6873030"
    assert key(seeds=[5, 6], variants={"a": {}}, budget={"cpu_hours": 3}) == key()
    assert len({key(), key(**table), key(choose="probe"), key(base={"data": {"anomaly": ["1"]}})}) == 4


def test_a_set_more_is_the_same_study_and_another_folder_another(folder: Path) -> None:
    before = inspected()
    write_table(folder / "yeast.parquet", seed=7)
    after = inspected()
    assert [one.name for one in after] == ["glass", "wine", "yeast"]
    assert key_of(studied(), before) == key_of(studied(), after) != key_of(studied(data="other"), after)
    assert digest_of(before) != digest_of(after) and digest_of(before[:1]) != before[0].facts.digest


def test_the_preview_of_many_sets_is_short(folder: Path) -> None:
    few = list(preview(studied(), inspected(), Resources(cpus=1), None, None, probes=False))
    assert len([line for line in few if "would run" in line]) == 16 and "glass: 8 trials, 0 finished" in few
    for number in range(3):
        write_table(folder / f"more {number}.parquet", 5, seed=10 + number)
    many = list(preview(studied(), inspected(), Resources(cpus=1), None, None, probes=False))
    assert many[:5] == [
        "glass: 120 rows, vectors of 6 features; 8 trials, 0 finished", *few[4:7], "... and 5 more"
    ]  # fmt: skip
    (total,) = [line.split() for line in many if line.startswith("all rows")]
    assert total[2] == "40" and len([line for line in many if "would run" in line]) == 15


def of_sets(names: Sequence[str], make: Callable[..., Trial] = bare) -> list[Trial]:
    return [
        make(row, seed, row if row == "pca" else "plain", quality + 0.1 * place)._replace(data=name)
        for place, name in enumerate(names)
        for row, quality in (("plain", 1.0 - 2 * (name == "hard")), ("wide", 0.5), ("pca", 0.0))
        for seed in (0, 1)
    ]


def report_of(trials: list[Trial], folder: Path) -> Any:
    names = dict.fromkeys(one.data for one in trials)
    abouts = {name: About(f"A study: {name}", "val/reconstruction_mse", {}, CLASSES) for name in names}
    each = reports.write_each(trials, abouts, folder, lambda one: one)
    return each, reports.write(each, trials, About("A study", "val/reconstruction_mse"), folder)


def test_a_page_of_each_set_and_one_of_all(tmp_path: Path) -> None:
    trials = of_sets(["easy", "hard", "new set"])
    trials = [
        one._replace(status="failed", error="lost", metrics={}) if (one.data, one.row) == ("hard", "wide") else one
        for one in trials
    ]
    each, overview = report_of(trials, tmp_path)
    page = overview.files[0].read_text()
    links = list(dict.fromkeys(re.findall(r'href="([^"]*)"', page)))
    assert links == ["sets/easy/report.html", "sets/hard/report.html", "sets/new%20set/report.html"]
    assert [tmp_path / link.replace("%20", " ") for link in links] == [one.files[0] for one in each.values()]
    assert all("<title>A study: " in one.files[0].read_text() for one in each.values())
    said = text(overview.files[0])
    assert "2 of 18 trials failed" in said and "2 × lost" in said
    assert "plain has the best mean rank, 1.00 of 3 rows on 2 sets; no difference of ranks holds." in said
    table = pd.read_parquet(tmp_path / "results.parquet")
    assert list(table["data"]) == [one.data for one in trials] and next(iter(table)) == "data"
    assert set(pd.read_csv(tmp_path / "sets" / "hard" / "results.csv")["data"]) == {"hard"}
    # a row that fails on the hard set gains nothing by it: that set counts for no row
    name = "test/reconstruction_mse"
    expected = np.mean([each[one].means[name]["plain"] for one in ("easy", "new set")])
    assert overview.means[name]["plain"] == pytest.approx(expected) and "wide" not in each["hard"].means[name]
    assert not re.search(r"https?://", page)


def test_pages_of_many_sets_have_the_quick_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "_MOST_WITH_ALL_FIGURES", 0)
    report_of(of_sets(["a"], trial), tmp_path)
    drawn = {file.stem for file in (tmp_path / "sets" / "a" / "figures").iterdir()}
    assert drawn == {"learning_curves", "label_efficiency"} < set(QUICK)


def test_one_set_has_the_report_of_a_study_of_it_alone(folder: Path, tmp_path: Path) -> None:
    """The page on many sets had no answer for one: it ranks rows over sets."""
    sets, trials = inspected(data="sets/glass.parquet"), of_sets(["glass"])
    ended = Ended(trials, 0, 0, None, {}, {})
    written, by_set = _write_report(studied(data="sets/glass.parquet"), sets, ended, (), lambda one: one, tmp_path)
    assert by_set == {} and written.files[0] == tmp_path / "report.html" and (tmp_path / "pairs.csv").exists()
    assert "Fewer than two sets" not in written.answer and written.comparisons
    assert "<title>glass: study" in written.files[0].read_text()


def test_rows_that_cannot_be_ranked_have_no_mean_rank(tmp_path: Path) -> None:
    trials = [
        one._replace(status="failed", metrics={}) if (one.data, one.row) == ("b", "wide") else one
        for one in of_sets(["a", "b"])
    ]
    answer = report_of(trials, tmp_path)[1].answer
    assert answer == "Fewer than two sets have all rows: not ranked. The page of each set answers for the set."


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, head: dict[str, str]) -> tuple[Path, Done]:
    where = tmp_path_factory.mktemp("study")
    write_table(where / "sets" / "glass.parquet")
    write_table(where / "sets" / "wine.parquet", 9, seed=1)
    done = compare(where, UNSCALED, "--data", "sets", "--figures", "out", **head)
    assert done.code == 0, done.err
    return where, done


def test_two_sets_are_one_study(first: tuple[Path, Done]) -> None:
    where, done = first
    assert done.report["trials"] == {"finished": 6, "stopped": 0, "failed": 0}
    assert done.report["sets"] == ["glass", "wine"] == list(done.report["verdicts"])
    top = store(where).client.get_run(done.report["run_id"])
    metrics, name = top.data.metrics, "plain/test/reconstruction_mse"
    assert done.report["metrics"][name] == pytest.approx(np.mean([metrics[f"{s}/{name}"] for s in ("glass", "wine")]))
    assert metrics[name] == done.report["metrics"][name]
    assert top.inputs and sorted(one.dataset.name for one in top.inputs.dataset_inputs) == ["glass", "wine"]
    tags = [run.data.tags for run in runs(where)]
    assert [sum(one["data"] == name for one in tags) for name in ("glass", "wine")] == [3, 3]
    assert (where / "out" / "report.html").exists() and (where / "out" / "sets" / "wine" / "report.html").exists()


def test_the_trials_of_a_set_are_those_of_a_study_of_it_alone(
    first: tuple[Path, Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    where, _ = first
    plan = compare(where, UNSCALED, "--data", "sets", "--plan")
    assert "glass: 3 trials, 3 finished" in plan.out and "all trials are finished: nothing to compute" in plan.out
    keys = re.findall(r"seed=\d +(\w{12}) ", plan.out)
    monkeypatch.chdir(where)
    data = {**UNSCALED["base"]["data"], "name": "parquet", "path": "sets/wine.parquet"}
    alone, listed = (
        Study.model_validate({**UNSCALED, **fields})
        for fields in ({"base": {**UNSCALED["base"], "data": data}}, {"data": "[sets/wine.parquet]"})
    )
    for study in (alone, listed):
        (one,) = inspect(study, Numerics())
        assert [plan.stage.key[:12] for plan in one.plans()] == keys[3:]


@pytest.mark.long
def test_a_set_that_fails_ends_nothing_else(first: tuple[Path, Done], head: dict[str, str]) -> None:
    where, done = first
    # its squares are infinite, so that all training diverges; what the others have is restored
    write_table(where / "sets" / "huge.parquet", scale=1e25)
    more = compare(where, UNSCALED, "--data", "sets", "--figures", "out", **head)
    assert more.code == 3 and more.report["status"] == "partial", more.err
    assert more.report["run_id"] == done.report["run_id"] and more.report["stages"]["restored"] == 6
    assert more.report["trials"]["finished"] >= 6 and more.report["trials"]["failed"] >= 1
    assert "huge: plain seed=0" in more.err and "the same command runs these trials again" in more.err
    assert (where / "out" / "sets" / "huge" / "report.html").exists()
    alone = ("--base.data.name", "parquet", "--base.data.path", "sets/wine.parquet")
    assert compare(where, UNSCALED, *alone, **head).report["stages"] == {"computed": 0, "restored": 3}
