"""`python -m jobs.retrain`: a week of data, firings that race or break off, and how often chance promotes a model."""

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from aecore.core.errors import InputError
from aecore.models.storage import Result
from jobs import cli
from jobs.retrain import Retrain, run
from pipelines.cluster.resources import Resources
from pipelines.execution.chain import Outcome
from pipelines.graph.stage import Stage
from pipelines.retraining import retrain, rule
from pipelines.retraining.history import dates_to_decide
from pipelines.store.connection import connect
from pipelines.store.lease import existing_leases
from pipelines.store.models import Models
from pipelines.store.runs import Tracker
from tests.here import run_here
from tests.test_train import Done, clean
from tests.test_train import command as started

QUICK = (
    "--data.name", "parquet", "--data.path", "digits", "--network.widths", "[32, 16]", "--pretrain.epochs", "10",
    "--finetune.epochs", "30", "--finetune.lr", "5e-3", "--model", "digits",
)  # fmt: skip


NINES = (9,)
"""170 rows of a class that the first champions never saw."""


def write(folder: Path, first: int, last: int, classes: Sequence[int] = range(9)) -> None:
    """Add a file with some of scikit-learn's digits to the data, by default without nines."""
    digits = load_digits()
    own = np.isin(digits.target, classes)
    x, y = digits.images[own].astype(np.uint8)[first:last], digits.target[own][first:last]
    kind = pa.fixed_shape_tensor(pa.uint8(), (8, 8))
    column = pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(x.ravel(), 64))
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": column, "label": y}), folder / f"{first}-{len(classes)}.parquet")


def store(folder: Path) -> Tracker:
    tracker = connect(f"sqlite:///{folder}/mlflow.db")
    assert tracker is not None
    return tracker


def retrained(folder: Path, *args: str, **env: str) -> Done:
    """Run the command as a scheduler does, in a process of its own."""
    return started("jobs.retrain", folder, *QUICK, *args, **env)


Here = Callable[..., dict[str, Any]]


def in_process(patch: pytest.MonkeyPatch, folder: Path, fixed: Sequence[str] = ()) -> Here:
    """Return the command as a function from arguments to report, whose stages run in this process without Ray.

    Args:
        fixed: arguments of all calls, by default QUICK.
    """

    def compute(
        stages: Sequence[Stage], tracker: Tracker, parent: str, resources: Resources, say: Any
    ) -> dict[str, Outcome]:
        found = {stage.name: tracker.find(stage.key) for stage in stages}
        made: dict[str, Any] = {}
        for stage in stages:
            run_here(stage, tracker, parent, done=made)
        runs = {stage.name: tracker.find(stage.key) or "" for stage in stages}
        return {name: Outcome(run, tracker.metrics(run), found[name] is not None) for name, run in runs.items()}

    def command(*args: str) -> dict[str, Any]:
        report = run(cli.parse(Retrain, "python -m jobs.retrain", [*(fixed or QUICK), *args]))
        assert report is not None and json.dumps(report)
        return report

    patch.setattr(retrain, "compute", compute)
    # the figures take longer than the training, and no decision depends on them
    patch.setattr("aecore.stages.evaluate.evaluate", lambda spec, run, **inputs: Result({}, {}, {"test/accuracy": 0.5}))
    patch.chdir(folder)
    return command


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Here:
    return in_process(monkeypatch, tmp_path)


def day(number: int) -> tuple[str, str]:
    return "--logical-date", f"2026-11-{number:02}"


def aliases(report: dict[str, Any]) -> tuple[str, ...]:
    return tuple(report["model"].get(alias, "") for alias in ("champion", "previous", "challenger"))


def test_a_week(here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "digits"
    write(data, 0, 900)
    first = here(*day(1))
    assert first["status"] == "promoted" and "version 1 is the first champion" in first["reason"]
    assert aliases(first) == ("1", "", "1") and first["stages"] == {"computed": 5, "restored": 0}

    same = here(*day(2))
    assert same["status"] == "unchanged" and same["reason"] == "data and recipe are those of the champion, version 1"
    assert same["stages"] == {"computed": 0, "restored": 0} and aliases(same) == ("1", "", "1")

    write(data, 900, 1400)
    tie = here(*day(3))
    assert tie["status"] == "kept" and "no drift in" in tie["reason"], tie
    assert aliases(tie) == ("1", "", "2")
    scores = tie["metrics"]
    assert scores["frozen/rows"] + scores["newest/rows"] == scores["rows"] > scores["newest/rows"] > 50
    assert scores["frozen/champion/accuracy"] == first["metrics"]["challenger/accuracy"]  # the same rows
    assert here(*day(3)) == tie  # a second firing only reports the decision

    write(data, 0, 170, NINES)
    better = here(*day(4))
    assert better["status"] == "promoted" and "drift in" in better["reason"], better
    assert "unknown classes" in better["reason"] and better["metrics"]["drift/drifted"] == 1
    assert aliases(better) == ("3", "1", "3") and better["metrics"]["difference_low"] > 0.02
    tracker = store(tmp_path)
    names = {item.path for item in tracker.client.list_artifacts(better["run_id"], "drift")}
    assert names == {"drift/drift.csv", "drift/drift.png"}

    good = next(data.glob("*.parquet"))
    shutil.copy(good, tmp_path / "good")
    good.write_bytes(good.read_bytes()[:1000])
    with pytest.raises(InputError, match="is not a readable Parquet file"):
        here(*day(5))
    assert aliases(here(*day(4))) == ("3", "1", "3")
    (failed,) = tracker.runs({"job": "retrain", "logical.date": "2026-11-05"}, "FAILED")
    assert "is not a readable Parquet file" in failed.data.tags["reason"]
    shutil.copy(tmp_path / "good", good)

    # a firing is broken off in the middle of training; then the command is fired again
    write(data, 1400, 1600)
    inside = vars(retrain)["compute"]

    def broken(stages: Sequence[Stage], *args: Any) -> Any:
        if any(stage.name == "finetune" for stage in stages):
            inside(stages[:1], *args)
            raise KeyboardInterrupt
        return inside(stages, *args)

    monkeypatch.setattr(retrain, "compute", broken)
    with pytest.raises(KeyboardInterrupt):
        here(*day(6))
    monkeypatch.setattr(retrain, "compute", inside)
    again = here(*day(6))
    assert again["status"] == "kept" and aliases(again) == ("3", "1", "4")
    # the broken firing had computed drift and a layer: these are restored, and count as computed once
    assert again["stages"] == {"computed": 5, "restored": 2}

    back = here("--rollback")
    assert back["status"] == "promoted" and aliases(back) == ("1", "3", "4")
    assert "version 1 is the champion again" in back["reason"]
    assert here(*day(8))["reason"] == "data and recipe are those that 2026-11-06 was decided on"

    decided = tracker.runs({"job": "retrain", "model": "digits"})
    assert len(decided) == 6 and len(tracker.client.search_model_versions("name = 'digits'")) == 4
    tags = next(run.data.tags for run in decided if run.info.run_id == better["run_id"])
    assert tags["parent.version"] == "1" and tags["model.version"] == "3" and tags["decision"] == "promoted"
    assert {"data.digest", "key.finetune", "key.contest", "key.drift", "run.finetune", "git.commit"} <= set(tags)
    assert not existing_leases(tracker)

    shown = {run.info.run_name: run.data for run in [*decided, *tracker.runs({"job": "rollback"}), failed]}
    assert {f"digits 2026-11-0{number}" for number in (1, 2, 3, 4, 5, 6, 8)} | {"digits rollback"} == shown.keys()
    notes = {name: data.tags["mlflow.note.content"].split("  \n") for name, data in shown.items()}
    assert notes["digits 2026-11-04"][0] == f"Promoted: {better['reason']}."
    assert notes["digits 2026-11-04"][1] == "Challenger: Test accuracy 50.00 %."
    assert f"/runs/{tags['run.evaluate']}/artifacts/figures" in notes["digits 2026-11-04"][2]
    assert notes["digits 2026-11-02"][0] == f"Unchanged: {same['reason']}."
    assert "is not a readable Parquet file" in notes["digits 2026-11-05"][0]
    assert notes["digits rollback"] == [f"What: {back['reason']}.", "Status: finished"]
    for name in ("digits 2026-11-02", "digits 2026-11-04"):
        assert shown[name].params["network.widths"] == "[32, 16]" and shown[name].params["variant.kind"] == "plain"
    assert shown["digits 2026-11-04"].metrics["train_seconds"] > 0


@pytest.fixture(scope="module")
def _first_day(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make a folder with data and their first champion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it
        folder = tmp_path_factory.mktemp("first")
        write(folder / "digits", 0, 900)
        assert in_process(patch, folder)(*day(1))["status"] == "promoted"
        yield folder


@pytest.fixture
def champion(_first_day: Path, tmp_path: Path) -> Path:
    """Copy the folder with the first champion for one test."""
    shutil.copytree(_first_day / "digits", tmp_path / "digits")
    shutil.copy(_first_day / "mlflow.db", tmp_path)
    return tmp_path


def test_a_champion_that_was_promoted_meanwhile_must_be_beaten(
    champion: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(champion / "digits", 900, 1400)
    inside, raced = vars(retrain)["compute"], list[int]()

    def race(stages: Sequence[Stage], *args: Any) -> Any:
        outcomes = inside(stages, *args)
        if "contest" in outcomes and not raced:  # another firing decides between contest and decision
            raced.append(1)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(rule, "judge", lambda *_: (True, "by all means"))
                assert aliases(here(*day(2), "--seed", "1"))[0] == "2"
        return outcomes

    monkeypatch.setattr(retrain, "compute", race)
    report = here(*day(3))
    assert report["status"] == "kept" and "version 3 against 2: " in report["reason"]
    assert aliases(report) == ("2", "1", "3")


def test_two_firings_that_train_the_same_model_promote_it_once(
    champion: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(champion / "digits", 0, 170, NINES)
    inside, raced = vars(retrain)["compute"], list[int]()

    def race(stages: Sequence[Stage], *args: Any) -> Any:
        outcomes = inside(stages, *args)
        if "contest" in outcomes and not raced:
            raced.append(1)
            assert aliases(here(*day(2))) == ("2", "1", "2")
        return outcomes

    monkeypatch.setattr(retrain, "compute", race)
    report = here(*day(3))
    assert report["status"] == "unchanged" and report["reason"] == "version 2 is the champion already"
    assert aliases(report) == ("2", "1", "2")


def test_a_firing_that_breaks_off_between_two_aliases_is_repeated_with_the_same_end(
    champion: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(champion / "digits", 0, 170, NINES)
    real = Models.set_alias
    for allowed in ([], ["challenger"], ["challenger", "previous"]):

        def broken(self: Models, name: str, alias: str, number: str, allowed: list[str] = allowed) -> None:
            if alias not in allowed:
                raise KeyboardInterrupt
            real(self, name, alias, number)

        monkeypatch.setattr(Models, "set_alias", broken)
        with pytest.raises(KeyboardInterrupt):
            here(*day(2))
    conclude = vars(retrain)["_conclude"]
    monkeypatch.setattr(Models, "set_alias", real)
    monkeypatch.setattr(retrain, "_conclude", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        here(*day(2))  # all aliases are set, but the decision is not logged
    monkeypatch.setattr(retrain, "_conclude", conclude)
    report = here(*day(2))
    assert report["status"] == "promoted" and "version 2 against 1" in report["reason"]
    assert aliases(report) == ("2", "1", "2")


def test_missed_dates(champion: Path, here: Here) -> None:
    tracker = store(champion)

    def missed(last: int, **fields: Any) -> list[int]:
        made = rule.Rule(logical_date=date(2026, 11, last), **fields)
        return [found.day for found in dates_to_decide("digits", made, tracker)]

    assert missed(4) == [4] and missed(4, catch_up="all") == [2, 3, 4] and missed(1, catch_up="all") == [1]
    lag = (rule.today() - date(2026, 11, 3)).days
    assert missed(4, catch_up="all", max_lag=lag) == [3, 4] and missed(1, max_lag=lag) == []
    late = here(*day(1), "--max-lag", "0") if lag > 0 else {"status": "unchanged", "reason": "(max_lag)"}
    assert late["status"] == "unchanged" and "(max_lag)" in late["reason"]
    report = here(*day(4), "--catch-up", "all")
    assert report["logical_date"] == "2026-11-04" and report["status"] == "unchanged"
    assert [(one["logical_date"], one["status"]) for one in report["earlier"]] == [
        ("2026-11-02", "unchanged"), ("2026-11-03", "unchanged"),
    ]  # fmt: skip
    before = here("--logical-date", "2026-10-30", "--seed", "5")
    assert before["status"] == "unchanged" and before["reason"] == "2026-11-04, a later date, is decided already"


def test_a_date_in_the_path_is_filled_in(champion: Path, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    (champion / "digits").rename(champion / "2026-11-02")
    monkeypatch.setattr("tests.test_retrain.QUICK", ("--data.name", "parquet", "--data.path", "{date}", *QUICK[4:]))
    report = here(*day(2))
    assert report["status"] == "unchanged" and "data and recipe are those of the champion" in report["reason"]
    with pytest.raises(InputError, match="2026-11-03 does not exist"):
        here(*day(3))


def test_only_on_drift(champion: Path, here: Here) -> None:
    write(champion / "digits", 900, 1400)
    report = here(*day(2), "--only-on-drift")
    assert report["status"] == "kept" and report["stages"]["computed"] == 1
    assert re.fullmatch(r"no drift in \d+ new test rows, so nothing was trained", report["reason"])
    write(champion / "digits", 0, 170, NINES)
    report = here(*day(3), "--only-on-drift", "--margin", "0.9")
    assert report["status"] == "drifted" and "less than the margin of 90" in report["reason"]
    assert aliases(report) == ("1", "", "2")


def test_warm_start(champion: Path, here: Here) -> None:
    write(champion / "digits", 0, 170, NINES)
    report = here(*day(2), "--warm-start", "--margin", "0.9", "--metric", "reconstruction")
    assert report["stages"]["computed"] == 4 and report["status"] == "drifted"  # no layer was pretrained
    # the autoencoder is the champion's
    assert report["metrics"]["difference"] == 0 and "% of the champion's reconstruction error" in report["reason"]
    tracker = store(champion)
    version, parent = (tracker.models.version("digits", alias) for alias in ("challenger", "champion"))
    assert version and parent and version.tags["parent.version"] == "1"
    ours, theirs = (tracker.restore(tracker.find(v.tags["stage.key"]) or "") for v in (version, parent))
    assert (
        ours.weights["autoencoder.layers.0.decoder.weight"] == theirs.weights["autoencoder.layers.0.decoder.weight"]
    ).all()
    assert ours.config["classes"] == [*"0123456789"] and theirs.config["classes"] == [*"012345678"]
    with pytest.raises(InputError, match="warm_start: the network is not that of models:/digits@champion"):
        here(*day(3), "--warm-start", "--network.tied", "true")


def vectors(folder: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(90, 5)).astype(np.float32)
    pq.write_table(pa.table({"x": rows.tolist(), "label": np.arange(90) % 9}), folder / "x.parquet")


def floats(folder: Path) -> None:
    x = np.random.default_rng(0).random((90, 64)).astype(np.float32)
    column = pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.float32(), (8, 8)), pa.FixedSizeListArray.from_arrays(x.ravel(), 64)
    )
    pq.write_table(pa.table({"image": column, "label": np.arange(90) % 9}), folder / "x.parquet")


BROKEN: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "another shape": (vectors, [], "vectors of 5 features, those of models:/digits@champion images of 8 x 8 pixels"),
    "other values": (floats, ["--data.likelihood", "bernoulli"], "data: values are floats, those of .* bytes"),
    "a class is gone": (
        lambda folder: write(folder, 0, 700, range(7)), [], "data: no row has the classes 7, 8 any more"
    ),
    "no labels": (
        lambda folder: write(folder, 0, 900), ["--data.labels", "null"],
        "finetune.task: models:/digits@champion was trained to classify, this model to reconstruct",
    ),
    "another cut": (
        lambda folder: write(folder, 0, 900), ["--data.test", "0.3"],
        r"data.test: 0.3, but the test rows of models:/digits@champion were cut by 0.2 \(content\)",
    ),
    "drawn": (lambda folder: write(folder, 0, 900), ["--data.split", "drawn"], "data.split: drawn moves rows between"),
    "no model": (
        lambda folder: write(folder, 0, 900), ["--finetune", "null"], "finetune: null leaves no model to register"
    ),
    "no errors": (
        lambda folder: write(folder, 0, 900), ["--pretrain", "null", "--metric", "reconstruction"],
        "metric: reconstruction needs an autoencoder",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.filterwarnings("ignore")
def test_data_that_differ_from_the_champions_are_refused(what: str, champion: Path, here: Here) -> None:
    make, args, message = BROKEN[what]
    shutil.rmtree(champion / "digits")
    (champion / "digits").mkdir()
    make(champion / "digits")
    with pytest.raises(InputError, match=message):
        here(*day(2), *args)
    version = store(champion).models.version("digits", "champion")
    assert version is not None and version.number == "1"


def test_champions_that_this_command_did_not_make_are_not_touched(champion: Path, here: Here) -> None:
    client = store(champion).client
    client.create_registered_model("theirs")
    client.create_model_version("theirs", "elsewhere")
    client.set_registered_model_alias("theirs", "champion", "1")
    with pytest.raises(InputError, match=r"models:/theirs@champion, version 1 was not made champion by jobs.retrain"):
        here(*day(2), "--model", "theirs")
    with pytest.raises(InputError, match="rollback: digits has no previous champion, version 1 is its first"):
        here("--rollback")
    with pytest.raises(InputError, match="model: nobody has no champion to roll back"):
        here("--rollback", "--model", "nobody")
    with pytest.raises(InputError, match="model: name the registered model, --model NAME"):
        run(cli.parse(Retrain, "python -m jobs.retrain", []))


def test_the_plan_writes_nothing(champion: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(champion)
    before = (champion / "mlflow.db").stat().st_mtime_ns
    line = [*QUICK, "--plan", *day(3), "--catch-up", "all"]
    assert run(cli.parse(Retrain, "test", line)) is None
    said = capsys.readouterr().out
    assert "2026-11-02, 2026-11-03" in said and "data and recipe are those of the champion, version 1" in said
    write(champion / "digits", 900, 1400)
    assert run(cli.parse(Retrain, "test", [*line, "--warm-start"])) is None
    said = capsys.readouterr().out
    assert re.search(r"drift +\w{12}  would run", said) and "layer 1" not in said
    # a warm start leaves pretraining out; the metric, which needs an autoencoder, is resolved before that
    assert run(cli.parse(Retrain, "test", [*line, "--warm-start", "--metric", "reconstruction"])) is None
    assert re.search(r"contest +\w{12}  would run", capsys.readouterr().out)
    assert (champion / "mlflow.db").stat().st_mtime_ns == before


def test_unchanged_data_import_neither_ray_nor_torch(champion: Path) -> None:
    code = f"""
import sys
from jobs import cli
from jobs.retrain import Retrain, run
report = run(cli.parse(Retrain, "retrain", {[*QUICK, *day(2)]!r}))
print(report["status"], sorted({{"ray", "torch", "sklearn"}} & set(sys.modules)))
"""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=champion, capture_output=True, text=True, check=False, env=clean()
    )
    assert done.stdout.splitlines()[-1] == "unchanged []", done.stdout + done.stderr
    assert time.monotonic() - began < 30  # 5 s on a quiet machine


class Hook(HTTPServer):
    """A server on this machine that answers with these status codes, one after another."""

    def __init__(self, *codes: int) -> None:
        self.codes, self.got = list(codes), []  # type: list[int], list[dict[str, Any]]
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(hook.codes.pop(0))
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/secret?token=secret"


def test_the_webhook_is_tried_again_and_never_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with Hook(500, 503, 200) as hook:
        assert cli.post(hook.url, '{"status": "kept"}', pause=0.01)
        assert hook.got == [{"status": "kept"}] * 3
        assert capsys.readouterr().err == ""
        hook.shutdown()
    with Hook(404) as hook:
        assert not cli.post(hook.url, "{}", pause=0.01) and len(hook.got) == 1
        hook.shutdown()
    assert not cli.post(hook.url, "{}", pause=0.01)  # the server is gone
    said = capsys.readouterr().err
    assert "warning: webhook: not delivered (HTTP 404)" in said and "(ConnectionRefusedError)" in said
    assert not cli.post("http://[secret", "{}", pause=0.01)
    assert "secret" not in said + capsys.readouterr().err
    with pytest.raises(InputError, match=r"^webhook: not an address; write http://HOST/PATH or https://HOST/PATH$"):
        cli.parse(Retrain, "test", ["--webhook", "hooks.example.org/secret"])


def test_bad_data_are_posted_too(champion: Path) -> None:
    with Hook(200) as hook:
        done = retrained(champion, *day(2), "--data.path", "nowhere", "--webhook", hook.url)
        hook.shutdown()
    assert done.code == 2 and done.err.splitlines()[-1].startswith("error: data.path: ")
    assert done.report["status"] == "failed" and "nowhere does not exist" in done.report["reason"]
    assert hook.got == [done.report] and "secret" not in done.out + done.err


@pytest.mark.long
def test_forty_retrainings_with_other_seeds_promote_two_at_most(champion: Path, here: Here) -> None:
    days = [date(2027, 1, 1) + timedelta(n) for n in range(40)]
    status = [here("--logical-date", str(when), "--seed", str(n))["status"] for n, when in enumerate(days, 1)]
    print(status.count("promoted"), "of", len(status), "promoted")
    assert status.count("promoted") <= 2 and status.count("kept") + status.count("promoted") == 40


@pytest.mark.long
def test_a_week_on_ray(tmp_path: Path) -> None:
    """Run the week of jobs/RETRAIN.md, each day in a process of its own."""
    data = tmp_path / "digits"
    lines = []

    def fired(number: int, what: str, *args: str) -> Done:
        when = [] if "--rollback" in args else day(number)
        done = retrained(tmp_path, *when, *args)
        aliased = store(tmp_path)
        now = {alias: aliased.models.version("digits", alias) for alias in ("champion", "previous", "challenger")}
        numbers = " ".join(v.number if v else "-" for v in now.values())
        lines.append(
            f"| {number} | {what} | {done.report.get('status')} | {done.code} | {numbers} | {done.seconds:.0f} | "
            f"{done.report.get('reason')} |"
        )
        print(lines[-1], flush=True)
        return done

    write(data, 0, 900)
    assert fired(1, "900 rows, no nines").report["status"] == "promoted"
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    same = fired(2, "the same bytes")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert same.report["status"] == "unchanged"
    # processor seconds, which are the wall time on a quiet machine
    assert after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime < 10
    assert same.report["stages"] == {"computed": 0, "restored": 0}
    (unchanged,) = store(tmp_path).runs({"job": "retrain", "logical.date": "2026-11-02"})
    assert "ray.job_id" not in unchanged.data.tags
    write(data, 900, 1400)
    assert fired(3, "500 rows more of the same kind").report["status"] == "kept"
    write(data, 0, 170, NINES)
    new = fired(4, "170 nines, a class the champion never saw")
    assert new.report["status"] == "promoted" and "unknown classes" in new.report["reason"]
    good = next(data.glob("*.parquet"))
    whole = good.read_bytes()
    good.write_bytes(whole[:1000])
    bad = fired(5, "a file cut short")
    assert bad.code == 2 and bad.err.splitlines()[-1].startswith("error: data.path: ")
    assert (version := store(tmp_path).models.version("digits", "champion")) and version.number == "3"
    good.write_bytes(whole)

    write(data, 1400, 1600)
    line = [sys.executable, "-m", "jobs.retrain", *QUICK, *day(6), "--finetune.epochs", "200"]
    err = tmp_path / "killed.err"
    with (
        err.open("w") as stderr,
        subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=stderr, env=clean()) as process,
    ):
        deadline = time.monotonic() + 200
        while "finetune: epoch" not in err.read_text():
            assert process.poll() is None and time.monotonic() < deadline, err.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    lines.append("| 6 | 200 rows more; SIGKILL while it finetunes | | 137 | 3 1 3 | | |")
    again = fired(6, "fired again", "--finetune.epochs", "200")
    assert again.code == 0 and again.report["stages"]["restored"] >= 1, again.err
    versions = store(tmp_path).client.search_model_versions("name = 'digits'")
    assert sorted(int(v.version) for v in versions) == [1, 2, 3, 4]
    runs = store(tmp_path).runs({"job": "retrain", "logical.date": "2026-11-06"})
    assert len(runs) == 1
    back = fired(7, "`--rollback`", "--rollback")
    before = again.report["model"]
    assert (back.report["model"]["champion"], back.report["model"]["previous"]) == (
        before["previous"],
        before["champion"],
    )
    print("\n".join(lines))


@pytest.mark.long
def test_two_in_the_same_second_promote_once(tmp_path: Path, head: dict[str, str]) -> None:
    write(tmp_path / "digits", 0, 900)
    assert retrained(tmp_path, *day(1), **head).report["status"] == "promoted"
    write(tmp_path / "digits", 0, 170, NINES)

    def at_once(*lines: Sequence[str]) -> list[dict[str, Any]]:
        both = [
            subprocess.Popen(
                [sys.executable, "-m", "jobs.retrain", *QUICK, *line], cwd=tmp_path, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True, env=clean() | head,
            )
            for line in lines
        ]  # fmt: skip
        said = [process.communicate(timeout=300) for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        return [json.loads(out.splitlines()[-1]) for out, _ in said]

    one, two = at_once(day(2), day(2))
    assert one["status"] == two["status"] == "promoted" and one["run_id"] == two["run_id"]
    assert aliases(one) == aliases(two) == ("2", "1", "2")
    # two dates with the same data make one model and one promotion
    write(tmp_path / "digits", 900, 1200)
    found = at_once((*day(3), "--margin", "0"), (*day(4), "--margin", "0"))
    tracker = store(tmp_path)
    versions = tracker.client.search_model_versions("name = 'digits'")
    assert sorted(int(v.version) for v in versions) == [1, 2, 3]
    assert sum(report["status"] == "promoted" for report in found) <= 1
    assert not existing_leases(tracker)
