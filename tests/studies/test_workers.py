"""Several processes share one study; one is killed in the middle of a trial; nothing is lost."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import optuna
import pytest
import synthetic_worker
from optuna.trial import TrialState

from sparsesearch.errors import ArtifactError, SpecError
from sparsesearch.studies.liveness import BEAT, RETRY_OF, Liveness, Watch, beating, own_identity, retry
from sparsesearch.studies.storage import create_study, open_storage, open_study
from sparsesearch.studies.work import work

optuna.logging.set_verbosity(optuna.logging.ERROR)


def run_with_a_kill(storage: str, num_trials: int) -> optuna.Study:
    """Four workers; the first one hangs in its first trial and is killed with SIGKILL while the others work."""
    study = create_study(storage, "s", seed=0)
    for bound in (0.2, 0.5):
        study.enqueue_trial({"density": bound, "answer_weight": 1.0}, user_attrs={"origin": "exact front"})
    here, there = multiprocessing.Pipe()
    victim = synthetic_worker.started(storage, "s", num_trials, there)
    others: list[ForkServerProcess] = []
    try:
        assert here.poll(60), "it must begin"
        number = here.recv()  # it is inside a trial now
        others = [synthetic_worker.started(storage, "s", num_trials) for _ in range(3)]
        deadline = time.monotonic() + 60
        while not any(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
            assert time.monotonic() < deadline, "the other workers must get on"
            time.sleep(0.1)
        victim.kill()
        victim.join()
        for worker in others:
            worker.join(timeout=120)
        assert [worker.exitcode for worker in (victim, *others)] == [-signal.SIGKILL, 0, 0, 0]
    finally:
        for worker in (victim, *others):
            worker.kill()
            worker.join()
    study = open_study(storage, "s", seed=0)
    dead = study.trials[number]
    assert dead.state == TrialState.FAIL
    again = [trial for trial in study.trials if trial.user_attrs.get(RETRY_OF) == number]
    assert [trial.state for trial in again] == [TrialState.COMPLETE]
    assert again[0].params == dead.params
    assert again[0].user_attrs.get("origin") == dead.user_attrs.get("origin")
    return study


def check(study: optuna.Study, num_trials: int) -> None:
    states = Counter(trial.state for trial in study.trials)
    assert num_trials <= states[TrialState.COMPLETE] <= num_trials + 2  # workers that began at the same instant
    assert states[TrialState.FAIL] == 1
    assert states[TrialState.RUNNING] == states[TrialState.WAITING] == 0
    assert len({trial.user_attrs[BEAT]["pid"] for trial in study.trials}) >= 3, "several processes took part"
    assert study.best_trials


@pytest.mark.slow
def test_four_workers_one_killed_on_a_journal(tmp_path: Path) -> None:
    storage = str(tmp_path / "study.journal")
    check(run_with_a_kill(storage, 16), 16)


def test_the_dashboard_opens_a_journal(tmp_path: Path) -> None:
    dashboard = pytest.importorskip("optuna_dashboard")
    study = create_study(str(tmp_path / "study.journal"), "shown", seed=0)
    work(study, lambda trial: (trial.suggest_float("x", 0, 1), 1.0), num_trials=2)
    application = dashboard.wsgi(open_storage(str(tmp_path / "study.journal")))
    found: dict[str, str] = {}
    body = b"".join(
        application(
            {
                "REQUEST_METHOD": "GET",
                "PATH_INFO": "/api/studies",
                "QUERY_STRING": "",
                "SERVER_NAME": "localhost",
                "SERVER_PORT": "80",
                "wsgi.url_scheme": "http",
                "wsgi.input": __import__("io").BytesIO(),
                "wsgi.errors": sys.stderr,
            },
            lambda status, headers, info=None: found.update(status=status),
        )
    )
    assert found["status"].startswith("200")
    assert b"shown" in body


@pytest.fixture
def postgres() -> Iterator[str]:
    """A fresh PostgreSQL on a Unix socket, as an unprivileged user; its URL."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    homes = [Path(home) for home in sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)]
    initdb = shutil.which("initdb") or next(
        (str(home / "initdb") for home in homes if (home / "initdb").exists()), None
    )
    server = next((str(home / "postgres") for home in homes if (home / "postgres").exists()), None) or shutil.which(
        "postgres"
    )
    if initdb is None or server is None:
        pytest.skip("no postgres binary on this machine (Debian: apt-get install postgresql)")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))
    user: dict[str, str] = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        user = {"user": "nobody"}
        shutil.chown(folder, "nobody")
    process = None
    try:
        subprocess.run(
            [initdb, "-D", str(folder / "data"), "-U", "study", "--auth=trust", "--no-sync"],
            check=True,
            capture_output=True,
            cwd="/tmp",
            **user,
        )
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [server, "-D", str(folder / "data"), "-k", str(folder), "-c", "listen_addresses=", "-c", "fsync=off"],
                stdout=log,
                stderr=log,
                cwd="/tmp",
                **user,
            )
        deadline = time.monotonic() + 60
        while not (folder / ".s.PGSQL.5432").exists():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"postgresql+psycopg://study@/postgres?host={folder}"
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=30)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_four_workers_one_killed_on_postgresql(postgres: str) -> None:
    check(run_with_a_kill(postgres, 12), 12)


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    """A fresh Redis on a free port of this machine; its URL."""
    client = pytest.importorskip("redis", reason="the extra redis is not installed (pip install 'sparsesearch[redis]')")
    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "redis.log").open("wb") as log:
        process = subprocess.Popen(
            [server, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)],
            stdout=log,
            stderr=log,
        )
    url = f"redis://127.0.0.1:{port}/0"
    try:
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, (tmp_path / "redis.log").read_text()
            assert time.monotonic() < deadline
            try:
                client.Redis.from_url(url).ping()
                break
            except client.exceptions.ConnectionError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_study_lives_in_redis(redis_url: str) -> None:
    study = create_study(redis_url, "kept", seed=0, num_objectives=1)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) ** 2, n_trials=3)
    again = open_study(redis_url, "kept", seed=1)
    assert [trial.value for trial in again.trials] == [trial.value for trial in study.trials]
    with pytest.raises(SpecError, match="it holds kept"):
        open_study(redis_url, "other", seed=0)
    with pytest.raises(SpecError, match="must not exist yet"):
        create_study(redis_url, "kept", seed=0)


@pytest.mark.slow
def test_four_workers_one_killed_on_redis(redis_url: str) -> None:
    check(run_with_a_kill(redis_url, 12), 12)


def test_a_redis_that_is_not_there_is_named() -> None:
    pytest.importorskip("redis", reason="the extra redis is not installed")
    with pytest.raises(ArtifactError, match=r"redis://… must be reachable"):
        open_storage("redis://127.0.0.1:1/0")


def test_an_interrupted_worker_leaves_its_trial_to_the_next(tmp_path: Path) -> None:
    study = create_study(str(tmp_path / "s.journal"), "s", seed=0, num_objectives=1)
    calls = []

    def objective(trial: optuna.Trial) -> tuple[float]:
        calls.append(trial.suggest_float("x", 0, 1))
        if len(calls) == 1:
            raise KeyboardInterrupt
        return (calls[-1],)

    with pytest.raises(KeyboardInterrupt):
        work(study, objective, num_trials=1)
    assert work(study, objective, num_trials=1) == 1
    assert calls[0] == calls[1]


def test_silence_is_noticed_without_comparing_clocks(tmp_path: Path) -> None:
    """A trial of another machine is stale only after this observer saw no new beat for the grace period."""
    study = create_study(str(tmp_path / "s.journal"), "s", seed=0)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr(BEAT, {"machine": "elsewhere", "pid": 1, "started": 1, "count": 1})
    watch = Watch(study, Liveness(grace_s=0.3))
    assert watch.revive() == []
    time.sleep(0.2)
    trial.set_user_attr(BEAT, {"machine": "elsewhere", "pid": 1, "started": 1, "count": 2})
    assert watch.revive() == []
    time.sleep(0.2)
    assert watch.revive() == []
    time.sleep(0.2)
    assert watch.revive() == [0]
    assert Watch(study, Liveness(grace_s=0.0)).revive() == []
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_retries_end(tmp_path: Path) -> None:
    study = create_study(str(tmp_path / "s.journal"), "s", seed=0)
    first = study.ask()
    first.suggest_float("x", 0, 1)
    for count in range(3):
        trial = study.trials[-1]
        retry(study, trial, max_retries=2)
        assert len(study.trials) == min(count + 2, 3)


def test_a_late_result_of_a_trial_taken_for_dead_is_dropped(tmp_path: Path) -> None:
    study = create_study(str(tmp_path / "s.journal"), "s", seed=0)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        x = trial.suggest_float("x", 0, 1)
        if trial.number == 0:
            other = open_study(str(tmp_path / "s.journal"), "s", seed=1)
            other.tell(0, state=TrialState.FAIL)
            retry(other, other.trials[0], 1)
        return x, x

    assert work(study, objective, num_trials=1) == 1
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[0].params == study.trials[1].params


def test_beats_carry_who_and_where(tmp_path: Path) -> None:
    study = create_study(str(tmp_path / "s.journal"), "s", seed=0)
    trial = study.ask()
    with beating(trial, Liveness(beat_s=0.05)):
        time.sleep(0.2)
    beat = study.trials[0].user_attrs[BEAT]
    assert {key: beat[key] for key in ("machine", "pid", "started")} == own_identity()
    assert beat["count"] >= 2


def test_failing_objectives_are_loud(tmp_path: Path) -> None:
    study = create_study(str(tmp_path / "s.journal"), "s", seed=0)

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work(study, objective, num_trials=3)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL]


def test_bad_storages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="SQLite"):
        open_storage("sqlite:///x.db")
    with pytest.raises(SpecError, match="there is no such file"):
        open_study(str(tmp_path / "s.journal"), "nothing", seed=0)
    assert not (tmp_path / "s.journal").exists(), "to join makes nothing"
    create_study(str(tmp_path / "s.journal"), "s", seed=0)
    with pytest.raises(SpecError, match="there is no 'nothing': it holds s"):
        open_study(str(tmp_path / "s.journal"), "nothing", seed=0)
    with pytest.raises(SpecError, match="--join s"):
        create_study(str(tmp_path / "s.journal"), "s", seed=0)
    pytest.importorskip("psycopg")
    with pytest.raises(ArtifactError, match="reachable"):
        open_storage(f"postgresql+psycopg://nobody@/x?host={tmp_path}")
