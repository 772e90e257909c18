"""What the doctor says of the commands of steps, on real files with real modes."""

from __future__ import annotations

import msgspec
import pytest

from batchctl.config import Batch
from batchctl.doctor.hidden import hidden
from batchctl.doctor.steps import check_steps

PATH = "/usr/bin:/bin"


def look(directory, *command, path=PATH, here=PATH, **more):
    batch = msgspec.convert({"step": [{"id": "31", "command": command, **more}]}, Batch)
    return list(check_steps("daily", batch, directory, path, here))


def states(findings):
    return [finding.state for finding in findings]


def write(path, text, mode=0o755):
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_command_that_cron_finds_is_well(tmp_path):
    write(tmp_path / "own.sh", "#!/bin/sh\n")
    for command in (["sh", "-c", "true"], ["/bin/sh"], ["./own.sh", "{step}", "{account}"], ["sh", "own.sh"]):
        assert states(look(tmp_path, *command)) == ["ok"], command


def test_a_command_that_is_nowhere_is_an_error(tmp_path):
    (found,) = look(tmp_path, "no-such-program")
    assert found.state == "error"
    assert "no-such-program in PATH=/usr/bin:/bin" in found.found


def test_a_command_that_only_this_shell_finds_is_named_with_its_place(tmp_path):
    (tmp_path / "bin").mkdir()
    tool = write(tmp_path / "bin" / "tool", "#!/bin/sh\n")
    (found,) = look(tmp_path, "tool", here=f"{tmp_path}/bin:{PATH}")
    assert (found.state, str(tool) in found.found, str(tool) in found.advice) == ("error", True, True)
    # The control: a PATH of the step's own, or of the crontab, makes it well.
    assert states(look(tmp_path, "tool", env={"PATH": f"{tmp_path}/bin"})) == ["ok"]
    assert states(look(tmp_path, "tool", path=f"{tmp_path}/bin")) == ["ok"]


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("#!/bin/sh\n", 0o644, "may not be executed"),
        ("#!/no/such/interpreter\n", 0o755, "names an interpreter that does not exist"),
        ("echo no first line\n", 0o755, "neither a program nor a script"),
    ],
)
def test_a_program_that_the_kernel_would_refuse_is_an_error(tmp_path, text, mode, said):
    write(tmp_path / "program", text, mode)
    (found,) = look(tmp_path, "./program")
    assert found.state == "error"
    assert said in found.found


def test_a_script_that_its_interpreter_would_not_find_is_an_error(tmp_path):
    (found,) = look(tmp_path, "python3", "collect.py")
    assert found.state == "error"
    assert str(tmp_path / "collect.py") in found.found


def test_a_token_in_the_command_is_filled_in_before_it_is_looked_for(tmp_path):
    write(tmp_path / "step-31", "#!/bin/sh\n")
    assert states(look(tmp_path, "./step-{step}")) == ["ok"]
    assert states(look(tmp_path, "./step-{account}")) == ["error"]


def test_an_unknown_token_is_named_and_other_braces_are_not(tmp_path):
    warned, _ = look(tmp_path, "echo", "{acount}", "{account}")
    assert warned.state == "warning"
    assert "{acount} is not a token" in warned.found
    for text in ("${HOME}", '{"a": 1}', "{}", "{1..3}"):
        assert states(look(tmp_path, "echo", text)) == ["ok"], text


def test_a_directory_of_the_steps_that_is_gone_is_an_error(tmp_path):
    (found,) = look(tmp_path / "gone", "echo")
    assert "cannot be entered" in found.found


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["sudo", "-u", "x", "make"], ["sudo"]),
        (["/usr/bin/docker", "run", "--rm", "image"], ["docker"]),
        (["podman", "exec", "box", "job"], ["podman"]),
        (["systemd-run", "--user", "job"], ["systemd-run"]),
        (["ssh", "db1", "job"], ["ssh"]),
        (["nice", "-n", "5", "ssh", "db1"], ["ssh"]),
        (["env", "A=1", "sudo", "job"], ["sudo"]),
        (["nohup", "setsid", "job"], ["nohup", "setsid"]),
        (["sh", "-c", "cd /srv && sudo job; echo done | at now"], ["sudo", "at"]),
        (["bash", "-ec", "if true; then docker run x; fi"], ["docker"]),
        (["sh", "-c", "A=1 setsid job &"], ["setsid"]),
    ],
)
def test_what_hides_a_step_is_named(tmp_path, command, names):
    assert [name for name, _, _ in hidden(command, tmp_path)] == names


@pytest.mark.parametrize(
    "command",
    [
        ["python3", "sudo.py"],
        ["echo", "sudo", "docker run"],
        ["docker", "ps"],
        ["systemd-run", "--scope", "job"],
        ["sh", "-c", "echo 'ssh somewhere' # sudo"],
        ["grep", "-r", "ssh", "."],
    ],
)
def test_what_hides_nothing_is_not_named(tmp_path, command):
    assert list(hidden(command, tmp_path)) == []


def test_a_shell_script_is_looked_into(tmp_path):
    write(tmp_path / "job.sh", "#!/bin/bash\nset -e\n\n# ssh is not used\nfor i in 1 2; do\n  sudo -n job $i\ndone\n")
    for command in (["./job.sh"], ["bash", "job.sh"]):
        assert [name for name, _, _ in hidden(command, tmp_path)] == ["sudo"]
        warned, well = look(tmp_path, *command)
        assert (warned.state, well.state) == ("warning", "ok")
        assert "step 31 of daily runs sudo" in warned.found
