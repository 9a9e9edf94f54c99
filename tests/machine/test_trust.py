"""Kernels are run, so they are read from what nobody else can write: permissions, owners, links, what is planted."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

import processes
import pytest

from fastattn.__main__ import _no_folder
from fastattn.machine import libraries as kernels
from fastattn.machine import trust

SCHEDULER = """
from fastattn.cpu.host.kernels import load
from fastattn.machine.kernel import Kernel
from fastattn.machine.table import host
load(Kernel("schedule", host()))  # the smallest kernel
print("loaded")
"""
has_owners = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="files have no such owners here")


def status(mode: int = 0o700, owner: int | None = None) -> os.stat_result:
    """Return what the system would say of a folder."""
    return os.stat_result((stat.S_IFDIR | mode, 1, 1, 1, os.geteuid() if owner is None else owner, 1, 0, 0, 0, 0))


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def cache_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path | None:
    """Return what becomes of a folder that the user names."""
    monkeypatch.setattr(kernels.os, "environ", {"FASTATTN_CACHE_DIR": str(folder)})
    found: Path | None = kernels.cache_folder.__wrapped__()
    return found


# -- who may write -----------------------------------------------------------------------------------------------------


@has_owners
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o500, 0o1755])
def test_the_users_own_and_the_systems_are_trusted(mode: int) -> None:
    assert trust.objection(status(mode)) == trust.objection(status(mode, owner=0)) == ""


@has_owners
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o720, 0o702])
def test_what_others_can_write_is_not(mode: int) -> None:
    for owner in (0, None):
        assert trust.objection(status(mode, owner)) == "can be written by other users"


@has_owners
def test_what_is_anothers_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trust.objection(status(0o700, owner=os.geteuid() + 1)) == "belongs to another user"
    mine = status()
    monkeypatch.setattr(trust.os, "geteuid", lambda: 0)  # root runs nothing that a user has written
    assert trust.objection(status(owner=1000)) == "belongs to another user"
    assert trust.objection(mine) == ("" if mine.st_uid == 0 else "belongs to another user")


def test_where_files_have_no_such_owners_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where the system makes up a mode that everybody may write."""
    made_up = os.stat_result((stat.S_IFDIR | 0o777, 1, 1, 1, 0, 0, 0, 0, 0, 0))
    monkeypatch.delattr(trust.os, "geteuid", raising=False)
    assert trust.objection(made_up) == ""


# -- what is made ------------------------------------------------------------------------------------------------------


@has_owners
def test_folders_and_files_are_for_the_user_alone(tmp_path: Path) -> None:
    """Also the folders on the way, and where the process's umask closes nothing."""
    folder = tmp_path / "made" / "on the way" / "kernels"
    code = "import os\nos.umask(0)\n" + SCHEDULER
    assert processes.run(code, FASTATTN_CACHE_DIR=str(folder)) == "loaded\n"
    (file,) = folder.iterdir()
    assert mode_of(file) == 0o600
    assert {mode_of(each) for each in (folder, *folder.parents[:2])} == {0o700}


@has_owners
def test_a_folder_that_was_there_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in (0o755, 0o777):
        tmp_path.chmod(mode)
        cache_folder(monkeypatch, tmp_path)
        assert mode_of(tmp_path) == mode


# -- what is not used --------------------------------------------------------------------------------------------------


@has_owners
def test_a_folder_that_others_can_write_is_neither_read_nor_written(tmp_path: Path) -> None:
    """Which is said, once."""
    tmp_path.chmod(0o1777)  # as /tmp is
    process = processes.start(SCHEDULER, FASTATTN_CACHE_DIR=str(tmp_path))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (0, "loaded\n")
    assert err.count("Warning") == 1
    assert f"FASTATTN_CACHE_DIR='{tmp_path}' can be written by other users, and kernels are run: kernels are" in err
    assert list(tmp_path.iterdir()) == []


@has_owners
def test_a_link_is_what_it_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    target.chmod(0o777)
    assert cache_folder(monkeypatch, link) is None
    target.chmod(0o755)
    assert cache_folder(monkeypatch, link) == link


@has_owners
@pytest.mark.parametrize("how", ["itself", "a link"])
def test_a_file_that_others_can_write_is_not_read(tmp_path: Path, how: str) -> None:
    """Its checksum says nothing of who has written it."""
    code = b"anything"
    target = path = tmp_path / "schedule.o"
    if how == "a link":
        target = tmp_path / "elsewhere"
        path.symlink_to(target)
    target.write_bytes(hashlib.sha256(code).digest() + code)
    target.chmod(0o644)
    assert kernels._read(path) == code
    target.chmod(0o666)
    assert kernels._read(path) is None
    assert kernels._write(path, code)
    assert kernels._read(path) == code
    assert mode_of(path) == 0o600
    assert not path.is_symlink()


@has_owners
def test_the_file_that_was_opened_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one that has its name by then: there is no moment at which another can be put in its place."""
    path, code = tmp_path / "schedule.o", b"anything"
    path.write_bytes(hashlib.sha256(code).digest() + code)
    path.chmod(0o666)

    def swapped(descriptor: int) -> os.stat_result:
        path.unlink()
        path.write_bytes(hashlib.sha256(code).digest() + code)
        path.chmod(0o600)
        return fstat(descriptor)

    fstat = os.fstat
    monkeypatch.setattr(kernels.os, "fstat", swapped)
    assert kernels._read(path) is None


@has_owners
def test_info_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    assert cache_folder(monkeypatch, tmp_path) is None
    assert _no_folder() == f"FASTATTN_CACHE_DIR='{tmp_path}' can be written by other users, and kernels are run"
    tmp_path.chmod(0o700)
    (tmp_path / "fastattn").mkdir(mode=0o777)
    (tmp_path / "fastattn").chmod(0o777)
    for system, name in (("linux", "XDG_CACHE_HOME"), ("win32", "LOCALAPPDATA")):
        monkeypatch.setattr(kernels.sys, "platform", system)
        monkeypatch.setattr(kernels.os, "environ", {name: str(tmp_path)})
        assert kernels.cache_folder.__wrapped__() is None
        assert _no_folder().startswith(
            "the user's folder can be written by other users, and kernels are run (FASTATTN_"
        )
