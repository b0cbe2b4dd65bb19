"""C04: the configuration in a file and a folder; what is wrong is named whole; what can change live does."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest

from remoted.cli import configuration
from remoted.config import Config
from remoted.config_files import default_limits, read
from remoted.errors import StartupError
from remoted.limits import Limits, Share
from remoted.settings import Settings, is_live

USERS = {"alice": 1001, "bob": 1002}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "conf.d").mkdir()
    return tmp_path / "config.toml"


def drop_in(file: Path, name: str, text: str) -> None:
    (file.parent / "conf.d" / name).write_text(text, encoding="utf-8")


def found(file: Path) -> list[tuple[str, str]]:
    return [(problem.file.name, problem.key) for problem in read(file, look_up=USERS.__getitem__).problems]


def test_c04_without_any_file_the_defaults_hold(file: Path) -> None:
    reading = read(file)

    assert reading.files == ()
    assert reading.limits.queued_jobs_per_uid == 100_000
    assert read(file, is_shared=os.geteuid() == 0).limits.connections_per_uid in (256, 512)


def test_c04_later_names_win_key_by_key(file: Path) -> None:
    file.write_text("cpus = 4\n[gpu]\npoll_seconds = 1\nnvml_deadline_seconds = 2\n", encoding="utf-8")
    drop_in(file, "20-site.toml", "[gpu]\npoll_seconds = 3\n")
    drop_in(file, "10-vendor.toml", "cpus = 2\n[gpu]\npoll_seconds = 9\n")
    drop_in(file, "README", "no toml")

    reading = read(file)

    assert [each.name for each in reading.files] == ["config.toml", "10-vendor.toml", "20-site.toml"]
    assert (reading.config.cpus, reading.config.gpu.poll_seconds, reading.config.gpu.nvml_deadline_seconds) == (2, 3, 2)
    assert not reading.problems


def test_c04_every_problem_is_named_with_file_and_key(file: Path) -> None:
    file.write_text('[gpu]\npol_seconds = 1\npoll_seconds = "often"\n[limits]\nspeed = 1\n[environments]\nwheel_folders = [1]\n', encoding="utf-8")
    drop_in(file, "10.toml", "[limits]\nnesting_depth = -1\nworkers_total = 8\n")
    drop_in(file, "20.toml", "cpus = [\n")
    drop_in(file, "30.toml", "cpus = 0\n[users.alice]\nweight = 1000\n[users.carol]\nweight = 2\n[users.bob]\n")

    assert sorted(found(file)) == [
        ("10.toml", "limits.nesting_depth"),
        ("20.toml", ""),
        ("30.toml", "cpus"),
        ("30.toml", "users.alice.weight"),
        ("30.toml", "users.carol"),
        ("config.toml", "environments.wheel_folders.0"),
        ("config.toml", "gpu.pol_seconds"),
        ("config.toml", "gpu.poll_seconds"),
        ("config.toml", "limits.speed"),
    ]
    assert read(file).limits.workers_total == 8, "what is right is read all the same"


def test_c04_a_setting_that_does_not_exist_is_answered_with_the_nearest_one_and_where_the_list_is(file: Path) -> None:
    file.write_text("[limits]\nworker_totals = 8\nspeed = 1\n[gpu]\npol_seconds = 1\n[users.alice]\nweigth = 2\n", encoding="utf-8")

    assert {problem.key: problem.reason for problem in read(file, look_up=USERS.__getitem__).problems} == {
        "gpu.pol_seconds": "this setting does not exist; did you mean 'poll_seconds'? `remotectl config defaults` lists those that do",
        "limits.speed": "this limit does not exist; `remotectl config defaults` lists those that do",
        "limits.worker_totals": "this limit does not exist; did you mean 'workers_total'? `remotectl config defaults` lists those that do",
        "users.alice.weigth": "this setting does not exist; did you mean 'weight'? `remotectl config defaults` lists those that do",
    }


def test_c04_a_daemon_starts_although_an_account_is_gone_and_with_no_other_problem(file: Path) -> None:
    file.write_text("[users.carol]\nweight = 2\n", encoding="utf-8")
    assert read(file, look_up=USERS.__getitem__).require().limits.users == {}

    file.write_text("[user]\nallow_root = true\n", encoding="utf-8")
    with pytest.raises(StartupError, match=r"config\.toml: user: "):
        read(file).require()


def test_c04_users_are_named_by_account_or_uid_and_once(file: Path) -> None:
    file.write_text('[users]\nallow_root = true\n[users.alice]\nweight = 2\nqueued_jobs = 5\n[users.1003]\nrunning_jobs = 1\n', encoding="utf-8")
    reading = read(file, look_up=USERS.__getitem__)

    assert reading.config.users.allow_root
    assert reading.limits.users == {1001: Share(2, queued_jobs=5), 1003: Share(running_jobs=1)}
    assert (reading.limits.queued_jobs(1001), reading.limits.queued_jobs(1002)) == (5, 100_000)
    drop_in(file, "x.toml", "[users.1001]\nweight = 1\n")
    [twice] = read(file, look_up=USERS.__getitem__).problems
    assert (twice.file.name, twice.key) == ("x.toml", "users.1001")
    assert twice.reason == f"uid 1001 is named twice: it is users.alice in {file} too; put both into one table"


def test_c04_a_value_of_another_kind_is_refused_in_the_words_of_the_file(file: Path) -> None:
    file.write_text('cpus = "3"\nworkers = 3\n[limits]\nrunning_jobs_per_uid = "3"\nworkers_total = 2.5\nworker_tasks = inf\nstream_items = true\n[users]\nalice = 3\nalow_root = true\n[privacy]\nothers = "all"\n', encoding="utf-8")

    assert {problem.key: problem.reason for problem in read(file, look_up=USERS.__getitem__).problems} == {
        "cpus": "it must be a whole number",
        "workers": "it is a table: write [workers], and what is in it below",
        "limits.running_jobs_per_uid": "it must be a number",
        "limits.workers_total": "2.5 is no whole number",
        "limits.worker_tasks": "inf is no amount",
        "limits.stream_items": "it must be a number",
        "users.alice": "this setting does not exist; `remotectl config defaults` lists those that do, and what one user has of his own is a table: write [users.alice], and what is in it below",
        "users.alow_root": "this setting does not exist; did you mean 'allow_root'? `remotectl config defaults` lists those that do, and what one user has of his own is a table: write [users.alow_root], and what is in it below",
        "privacy.others": "it must be 'work', 'totals' or 'nothing'",
    }


def test_c04_a_reserve_of_workers_that_is_not_there_is_a_warning(file: Path) -> None:
    file.write_text("[limits]\nworkers_reserved = 400\nworkers_total = 3\n", encoding="utf-8")
    [problem] = read(file).problems
    assert (problem.key, problem.reason, problem.fatal) == ("limits.workers_reserved", "no more than a quarter of workers_total (3) is reserved: 0", False)

    file.write_text("[limits]\nworkers_total = 3\n", encoding="utf-8")
    assert not read(file).problems


# -- what can be set ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_shared", [False, True])
def test_c04_the_defaults_are_a_file_that_says_what_holds_anyway_with_a_remark_for_each(file: Path, is_shared: bool) -> None:
    text = "\n".join(configuration.defaults(is_shared))
    file.write_text(text, encoding="utf-8")
    reading = read(file)

    assert not reading.problems
    assert reading.limits == default_limits(is_shared)
    assert reading.config.model_copy(update={"limits": {}}) == Config()
    lines = text.splitlines()
    settings = [number for number, line in enumerate(lines) if re.match(r"#?\w+ = ", line)]
    assert len(settings) == len(fields(Limits)) - 1 + 20
    assert [lines[number] for number in settings if not lines[number - 1].startswith("# ")] == []


def test_c04_the_first_file_of_an_installation_sets_nothing_and_each_mark_can_be_taken_away(file: Path) -> None:
    text = "\n".join(configuration.defaults(is_shared=True, off=True))
    file.write_text(text, encoding="utf-8")
    assert (read(file).keys, read(file).problems) == ((), ())

    file.write_text(re.sub(r"^#(?=\S)", "", text, flags=re.MULTILINE), encoding="utf-8")
    reading = read(file, look_up=USERS.__getitem__)
    assert not reading.problems
    assert (reading.config.cpus, reading.config.gpu.nvml_library, reading.limits.users[1001].running_jobs) == (8, "libnvidia-ml.so.1", 8)


def test_c04_what_is_in_force_is_printed_as_toml_with_tables_of_users() -> None:
    config = {"cpus": None, "users": {"allow_root": True, "alice": {"weight": 2, "connections": None}}}

    assert list(configuration.in_force(config, {"stream_items": 1})) == [
        "# cpus is not set", "", "[users]", "allow_root = true", "", "[users.alice]", "weight = 2", "# connections is not set", "", "[limits]", "stream_items = 1",
    ]  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="NEEDS ROOT: files of two users")
def test_t31_a_drop_in_that_is_not_roots_is_not_believed_by_the_systems_daemon(file: Path) -> None:
    drop_in(file, "10.toml", "cpus = 2\n")
    os.chown(file.parent / "conf.d" / "10.toml", 60001, 60001)

    reading = read(file, is_shared=True)

    assert any("uid 60001" in problem.reason for problem in reading.fatal)


# -- reloading ---------------------------------------------------------------------------------------------


def test_c04_what_can_change_live_does_in_the_object_that_everybody_holds(file: Path) -> None:
    settings = Settings(read(file))
    held = settings.limits
    file.write_text("[limits]\nnesting_depth = 3\nworkers_total = 7\n[gpu]\npoll_seconds = 9\nlock_folder = \"/x\"\n[users.1001]\nweight = 2\n[audit]\nnames = false\n", encoding="utf-8")

    changes = settings.take(read(file))

    assert changes.live == ("audit.names", "gpu.poll_seconds", "limits.nesting_depth", "users.1001")
    assert changes.at_restart == ("gpu.lock_folder", "limits.workers_total") == settings.at_restart
    assert (held.nesting_depth, held.workers_total, held.share(1001).weight) == (3, 256, 2)
    assert (settings.config.gpu.poll_seconds, settings.config.gpu.lock_folder, settings.config.audit.names) == (9, "/run/lock", False)
    assert "limits.workers_total: changes at the next start" in str(changes)


def test_c04_what_is_taken_back_is_as_it_was(file: Path) -> None:
    settings = Settings(read(file))
    file.write_text("[limits]\nnesting_depth = 3\nworkers_total = 7\n[users.1001]\nweight = 2\n", encoding="utf-8")
    settings.take(read(file))
    file.unlink()

    changes = settings.take(read(file))

    assert changes.live == ("limits.nesting_depth", "users.1001")
    assert (settings.limits.nesting_depth, settings.limits.users, settings.at_restart) == (16, {}, ())
    assert str(settings.take(read(file))) == "nothing changed"


def test_c04_a_bad_file_changes_nothing(file: Path) -> None:
    settings = Settings(read(file))
    file.write_text("[limits]\nnesting_depth = 3\nspeed = 1\n", encoding="utf-8")

    with pytest.raises(StartupError):
        settings.take(read(file))

    assert settings.limits.nesting_depth == 16


def test_c04_what_needs_a_restart_is_known_by_key() -> None:
    assert is_live("limits.nesting_depth")
    assert is_live("users.alice.weight")
    assert not is_live("users.allow_root")
    assert not is_live("limits.workers_total")
    assert not is_live("cpus")
