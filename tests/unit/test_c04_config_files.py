"""C04: the configuration in a file and a folder; what is wrong is named whole; what can change live does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remoted.config_files import read
from remoted.errors import StartupError
from remoted.limits import Share
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
    assert found(file) == [("x.toml", "users.1001")]


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
