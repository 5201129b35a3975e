"""Each of the system's errors is reported with what helps against it; only a full disk is to be freed."""

import errno
import os

import pyarrow as pa
import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

import endwise.common.files as files
from endwise import SAE, RunConfig
from endwise.cli import app
from endwise.common.errors import ConfigError, FormatError, RunFolderError, Unreadable
from endwise.common.files import read_json, write_atomic
from endwise.common.remedies import number, remedy, unreadable
from endwise.dictionaries import ReluSAE
from endwise.explaining.cache import Answer, in_memory
from endwise.runs.checkpoints import read_checkpoint
from endwise.runs.folder import RunFolder

NAMES = """ENOSPC EDQUOT EACCES EPERM EROFS ENOLCK ENOTSUP EOPNOTSUPP EMFILE ENFILE ENAMETOOLONG ENOENT ENOTDIR EISDIR
EIO ESTALE ENODEV ENXIO EBUSY EFBIG ELOOP ETIMEDOUT ENOMEM EINTR EUCLEAN EEXIST""".split()  # noqa: SIM905
TELLS = {
    "EACCES": "permission",
    "EPERM": "permission",
    "EROFS": "read-only",
    "ENOLCK": "locks",
    "ENOTSUP": "cannot do this",
    "EMFILE": "ulimit -n",
    "ENFILE": "file-max",
    "ENAMETOOLONG": "Shorten",
    "ENOENT": "no such",
    "EIO": "reports errors",
    "ESTALE": "again",
    "ENODEV": "mounted",
    "EDQUOT": "quota",
    "ENOSPC": "Free space on that disk",
    "EFBIG": "ulimit -f",
}


def raising(given):
    def fails(*_, **__):
        raise given

    return fails


def error(name, path=None):
    code = getattr(errno, name)
    return OSError(code, f"what {name} says", *([str(path)] if path else []))


@pytest.mark.parametrize("name", NAMES)
def test_only_a_full_disk_is_to_be_freed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", raising(error(name)))
    with pytest.raises(RunFolderError) as caught:
        write_atomic(tmp_path / "a", b"")
    told = str(caught.value)
    assert f"Cannot write {tmp_path / 'a'} (what {name} says)" in told
    assert ("Free space" in told) == (name in ("ENOSPC", "EDQUOT"))
    assert TELLS.get(name, "") in told and told.count("\n") == 0
    assert ("another folder" in told) == (name not in ("EMFILE", "ENFILE", "ENOMEM", "EINTR"))


def test_remedies_differ():
    told = [remedy(error(name)) for name in NAMES if name not in ("EPERM", "EOPNOTSUPP", "ENXIO")]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (OSError("[Errno 122] Error writing bytes to file. Detail: [errno 122] Disk quota exceeded"), errno.EDQUOT),
        (OSError(errno.EIO, "x"), errno.EIO),
        (OSError("no number"), None),
        (pa.ArrowInvalid("Parquet magic bytes not found"), None),
    ],
    ids=str,
)
def test_numbers_of_libraries_that_keep_them_in_their_text(given, expected):
    assert number(given) == expected


@pytest.mark.parametrize("name", ["EACCES", "EIO", "EMFILE", "ESTALE"])
def test_a_file_that_the_system_does_not_give_is_not_called_damaged(name, tmp_path, monkeypatch):
    ReluSAE(4, 6).save(tmp_path)
    monkeypatch.setattr("endwise.formats.reading.load_file", raising(error(name)))
    monkeypatch.setattr("endwise.runs.checkpoints.safe_open", raising(error(name)))
    for read in (lambda: SAE.load(tmp_path), lambda: read_checkpoint(tmp_path / "step")):
        with pytest.raises(Unreadable) as caught:
            read()
        assert remedy(error(name)) in str(caught.value) and "Restore" not in str(caught.value)
    assert unreadable(tmp_path, OSError(errno.ENOENT, "gone")) is None and unreadable(tmp_path, ValueError("x")) is None


def test_json_recipes_and_lines(tmp_path):
    for read, kind in ((read_json, FormatError), (RunConfig.read, ConfigError)):
        with pytest.raises(kind, match="it is a folder, not a file"):
            read(tmp_path)
    folder = RunFolder(tmp_path / "run")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(RunFolderError, match="a part of it is a file"):
        folder.append(folder.metrics_file, {"step": 1})


def test_a_disk_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(files.FileLock, "acquire", raising(NotImplementedError("no flock")))
    with pytest.raises(RunFolderError, match=r"file locks.*another folder"), files.held(tmp_path / "lock"):
        pass


def test_answers_on_a_full_disk(monkeypatch):
    with in_memory() as cache:
        cache._connection.execute("PRAGMA max_page_count = 3")
        with pytest.raises(RunFolderError, match="Free space"):
            cache.put("key", Answer("text" * 100_000, 1, 1))
        cache._connection.execute("PRAGMA query_only = 1")
        with pytest.raises(RunFolderError, match="permission"):
            cache.put("key", Answer("text", 1, 1))


def test_at_the_door(monkeypatch, tmp_path):
    monkeypatch.setattr("endwise.training.planning.outline.sites_of", raising(error("EMFILE", "a")))
    result = CliRunner().invoke(app, ["sites"])
    assert result.exit_code == 1 and "a: what EMFILE says. Raise the number of files" in result.stderr
