"""What a later trial found about what runs: commands, what bodies leave behind, signals, streams over HTTP."""

from __future__ import annotations

import pytest

from tests.integration.test_c04_remotectl import Terminal, remotectl  # noqa: F401


@pytest.mark.parametrize(
    ("command", "code", "expected"),
    [
        (["sh", "-c", "exit 3"], 3, "the command exited with code 3"),
        (["sh", "-c", "kill -9 $$"], 137, "the command was killed by signal 9 (SIGKILL)"),
        (["nosuchcmd"], 127, "cannot run nosuchcmd: not found"),
        (["/dev/null"], 126, "cannot run /dev/null: permission denied"),
    ],
)
def test_c04_a_command_ends_in_the_words_of_commands(remotectl: Terminal, command: list[str], code: int, expected: str) -> None:  # noqa: F811
    job = remotectl.job(*command)
    _, waited, _ = remotectl("wait", job)
    document = remotectl.json("show", job)
    assert (document["error"], document["state_reason"], document["status"]) == (expected, "EXITED", "FAILED")
    assert expected in waited + remotectl("show", job)[1]
    assert "Traceback" not in remotectl("show", job)[1]
    assert remotectl("run", "--", *command)[0] == code


def test_c04_a_command_without_a_gpu_is_not_told_about_functions(remotectl: Terminal) -> None:  # noqa: F811
    code, _, err = remotectl("run", "--gpus", "1", "--", "true")
    assert code == 1
    assert "leave --gpus and --gpu out" in err
    assert "local" not in err
