"""What an installation is made from, what it finds out before it changes anything, and what an uninstall says that it did."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remoted.cli.editions import Edition, remove_all, require_remoted
from remoted.cli.ending import CliError
from remoted.cli.install import requirement, source_of
from remoted.store import SCHEMA_VERSION


def test_c01_the_folder_of_the_first_installation_is_gone_and_source_is_named(tmp_path: Path) -> None:
    assert source_of(tmp_path.as_uri()) == os.fspath(tmp_path)

    with pytest.raises(CliError, match=r"/gone, from which this remotectl was installed, is not there any more; .*--source FOLDER"):
        source_of((tmp_path / "gone").as_uri())


def test_c01_what_came_from_the_net_comes_from_there_again() -> None:
    assert requirement(source_of("git+https://example.org/remoted.git")) == "remoted[daemon] @ git+https://example.org/remoted.git"


def test_c01_a_source_may_be_a_folder_a_wheel_or_a_requirement(tmp_path: Path) -> None:
    assert requirement(os.fspath(tmp_path)) == f"remoted[daemon] @ {tmp_path.as_uri()}"
    assert requirement("remoted==0.2") == "remoted[daemon]==0.2"
    for absent in (os.fspath(tmp_path / "no"), "remoted-0.2-py3-none-any.whl"):
        with pytest.raises(CliError, match="there is no such file or folder"):
            requirement(absent)


def test_c01_another_package_is_not_taken_for_remoted(tmp_path: Path) -> None:
    with pytest.raises(CliError, match="there is no remoted in click; give --source"):
        require_remoted(tmp_path, "click")


def test_c01_an_edition_that_would_not_start_is_refused_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text("#!/bin/sh\necho 'remoted: cannot use the configuration: x.toml: cpus: it must be a whole number' >&2; exit 1\n", encoding="ascii")
    python.chmod(0o755)

    with pytest.raises(CliError) as refused:
        Edition(tmp_path, "2.0", SCHEMA_VERSION).require_starts()
    assert str(refused.value) == "cannot install remoted 2.0: it would not start: cannot use the configuration: x.toml: cpus: it must be a whole number"


def test_c01_an_uninstall_names_what_there_was_and_nothing_else(tmp_path: Path) -> None:
    prefix, units, link = tmp_path / "remoted", tmp_path / "units", tmp_path / "remotectl"
    units.mkdir()
    assert list(remove_all(prefix, units, link)) == []

    edition = tmp_path / "remoted-abcd1234"
    edition.mkdir()
    (edition / "pyvenv.cfg").touch()
    prefix.symlink_to(edition)
    link.symlink_to(prefix / "bin" / "gone")
    (units / "remoted.service").touch()
    assert list(remove_all(prefix, units, link)) == [units / "remoted.service", link, prefix, edition]
    assert sorted(tmp_path.iterdir()) == [units]
