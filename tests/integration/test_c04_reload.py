"""C04: SIGHUP makes a running daemon read its configuration again, and ``config check`` says beforehand what it would say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.harness import ROOT, Host, wait_until
from tests.integration.test_c04_remotectl import Terminal

LIMITED = """
import json
from remoted_client import remote, CpuLiveServerless, SubmissionRefused
@remote(CpuLiveServerless(name="p", workersMax=1))
def f(): return 1
try: print(json.dumps(f().result().unwrap()))
except SubmissionRefused as error: print(json.dumps(str(error)))
"""


def _reload(host: Host, says: str) -> None:
    assert host.process is not None
    before = host.log().count(says)
    host.process.send_signal(signal.SIGHUP)
    wait_until(lambda: host.log().count(says) > before, 30, host.log)


def test_c04_a_reload_changes_limits_live_names_what_waits_and_a_bad_file_changes_nothing(bare_host: Host) -> None:
    host, remotectl = bare_host.start(), Terminal(bare_host)
    folder = host.config.parent / "conf.d"
    folder.mkdir()

    (folder / "10.toml").write_text(f"[users.{os.geteuid()}]\nqueued_jobs = 0\n[limits]\nworkers_total = 3\n", encoding="utf-8")
    _reload(host, "the configuration was reloaded")
    assert "limits.workers_total: changes at the next start" in host.log()
    assert "your limit queued_jobs is 0" in host.run(LIMITED).json
    shown = remotectl.json("config", "show")
    assert (shown["at_restart"], shown["limits"]["workers_total"]) == (["limits.workers_total"], 256)

    (folder / "20.toml").write_text(f"[users.{os.geteuid()}]\nqueued_jobs = 9\n[limits]\nspeed = 1\n", encoding="utf-8")
    _reload(host, "the configuration was not reloaded")
    assert "20.toml: limits.speed: this limit does not exist" in host.log()
    assert "your limit queued_jobs is 0" in host.run(LIMITED).json

    (folder / "20.toml").unlink()
    (folder / "10.toml").unlink()
    _reload(host, "the configuration was reloaded")
    assert host.run(LIMITED).json == 1


def test_c04_the_units_reload_fails_where_the_daemon_would_keep_what_it_has(bare_host: Host) -> None:
    unit = (ROOT / "systemd" / "system" / "remoted.service").read_text(encoding="utf-8").splitlines()
    (start,) = [line.partition("=")[2] for line in unit if line.startswith("ExecStart=")]
    check = [sys.executable, "-m", "remoted", "--user", "--config", os.fspath(bare_host.config), "--check"]

    assert [line.partition("=")[2] for line in unit if line.startswith("ExecReload=")] == [f"{start} --check", "/bin/kill -HUP $MAINPID"]
    good = subprocess.run(check, env=bare_host.environ, capture_output=True, text=True, check=False)
    assert (good.returncode, good.stdout, good.stderr) == (0, "", "")
    assert not bare_host.sockets.exists(), "nothing was started"
    bare_host.config.write_text("[limits]\nspeed = 1\n", encoding="utf-8")
    bad = subprocess.run(check, env=bare_host.environ, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert f"{bare_host.config}: limits.speed: this limit does not exist" in bad.stderr


def test_c04_config_check_reports_every_problem_with_its_file(bare_host: Host) -> None:
    remotectl = Terminal(bare_host)
    (remotectl.folder / "conf.d").mkdir()
    file, other = remotectl.folder / "config.toml", remotectl.folder / "conf.d" / "10.toml"
    file.write_text("[gpu]\npol_seconds = 1\n", encoding="utf-8")
    other.write_text("[limits]\nspeed = 1\n[users.nobody-has-this-name]\nweight = 2\n", encoding="utf-8")

    code, _, err = remotectl("config", "check", str(file))

    assert code == 1
    for expected in (f"{file}: gpu.pol_seconds: ", f"{other}: limits.speed: ", f"{other}: users.nobody-has-this-name: "):
        assert expected in err
    file.write_text("", encoding="utf-8")
    other.write_text("[users.nobody-has-this-name]\nweight = 2\n", encoding="utf-8")
    code, out, err = remotectl("config", "check", str(file))
    warning = f"{other}: users.nobody-has-this-name: there is no such account (and no such setting), so nothing comes of it"
    assert (code, out, err) == (0, f"{file}: good\n{other}: good\n", f"remotectl: warning: {warning}\n")
    bare_host.config.write_text(other.read_text(encoding="utf-8"), encoding="utf-8")
    bare_host.start()
    assert "WARNING" in bare_host.log()
    assert warning.replace(str(other), str(bare_host.config)) in bare_host.log(), "the daemon starts, and says the same"
    file.write_text("cpus = 2\n[limits]\nnesting_depth = 3\n[gpu]\n[environments]\n", encoding="utf-8")
    other.unlink()
    document = remotectl.json("config", "check", str(file))
    assert (document["good"], document["at_restart"], document["files"]) == (True, ["cpus"], [str(file)])
