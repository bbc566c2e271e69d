"""Where a study lives: a journal file, Redis, or any database SQLAlchemy reaches.

A journal file needs no server, works on NFS, and is what `optuna-dashboard FILE` opens. SQLite is refused: concurrent writers lock each
other out.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
from sqlalchemy.pool import NullPool

from sparsesearch.errors import ArtifactError, SpecError

_DRIVERS = {"postgresql+psycopg": "psycopg", "postgresql": "psycopg2", "mysql": "MySQLdb", "redis": "redis"}
_PACKAGES = {
    "postgresql+psycopg": "sparsesearch[postgresql]",
    "redis": "sparsesearch[redis]",
    "mysql": "mysqlclient",
}
"""Scheme -> what brings its driver, where that is not called like the driver."""


def open_storage(where: str) -> BaseStorage:
    """Open a storage by URL or path.

    Args:
        where: a path (journal file, made when missing), `redis://host:port/db`, or an SQLAlchemy URL such as
            `postgresql+psycopg://user@host/database`.

    Raises:
        SpecError: SQLite was asked for, or the scheme's driver is not installed.
        ArtifactError: the place cannot be reached.
    """
    scheme, separator, _ = where.partition("://")
    if not separator:
        Path(where).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(where))
    if scheme.startswith("sqlite"):
        raise SpecError(
            "several workers must be able to write to --storage, but SQLite cannot. Give a path: it becomes a journal file."
        )
    driver = _DRIVERS.get(scheme)
    if driver is not None and find_spec(driver) is None:
        hint = _PACKAGES.get(scheme, driver)
        also = " (or write postgresql+psycopg://…)" if scheme == "postgresql" else ""
        raise SpecError(
            f"{scheme}:// must have its driver {driver}, which is not installed. Run `pip install '{hint}'`{also}."
        )
    try:
        if scheme == "redis":
            # Optuna calls this back end experimental; the tests run it against a server
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return JournalStorage(JournalRedisBackend(where))
        # no pool: a worker spends minutes inside a trial and must not hold one of the server's connections meanwhile
        return RDBStorage(where, engine_kwargs={"poolclass": NullPool})
    except Exception as error:  # each driver raises its own kinds
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(f"the storage {scheme}://… must be reachable, but: {reason}. Check --storage.") from error


def open_study(where: str, name: str, *, seed: int) -> optuna.Study:
    """Join a study that exists.

    Raises:
        SpecError: there is no study of that name; the message lists those there are.
    """
    if "://" not in where and not Path(where).exists():
        raise SpecError(f"--join must name a study in {where}, but there is no such file. Check --storage or -o.")
    storage = open_storage(where)
    names = sorted(summary.study_name for summary in optuna.get_all_study_summaries(storage))
    if name not in names:
        known = f"it holds {', '.join(names)}" if names else "it holds none"
        raise SpecError(f"--join must name a study in {_shown(where)}, but there is no {name!r}: {known}.")
    return optuna.load_study(study_name=name, storage=storage, sampler=optuna.samplers.TPESampler(seed=seed))


def create_study(where: str, name: str, *, seed: int, num_objectives: int = 2) -> optuna.Study:
    """Make a new study that minimises its objectives.

    Raises:
        SpecError: the name is taken.
    """
    try:
        return optuna.create_study(
            study_name=name,
            storage=open_storage(where),
            sampler=optuna.samplers.TPESampler(seed=seed),
            directions=["minimize"] * num_objectives,
        )
    except optuna.exceptions.DuplicatedStudyError as error:
        raise SpecError(
            f"the study {name!r} must not exist yet in {_shown(where)}, but does. Continue it with --join {name}, or choose another --name."
        ) from error


def _shown(where: str) -> str:
    """The storage without what may be a password."""
    return where if "://" not in where else f"{where.partition('://')[0]}://…"
