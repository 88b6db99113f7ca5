import sys
from pathlib import Path

import pytest

from runner import environment, uv
from runner.process import Failure
from sample_workspace import FakeUv, refresh_lock

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for uv is a script")


def verbs(fake: FakeUv) -> list[str]:
    return [" ".join(call[:2]) if call[0] == "pip" else call[0] for call in fake.calls]


def test_sync_installs_hashes_verified_and_members_editable(workspace: Path, fake_uv: FakeUv) -> None:
    home = environment.sync(workspace)
    assert home == workspace / ".venv"
    assert verbs(fake_uv) == ["venv", "export", "export", "pip sync", "pip install"]
    made, everything, build, synced, installed = fake_uv.calls
    assert made[made.index("--python") + 1] == sys.executable
    assert {"--frozen", "--all-packages", "--all-extras", "--all-groups"} <= set(everything)
    assert build[build.index("--only-group") + 1] == "build"
    assert "--require-hashes" in synced
    assert synced[synced.index("--build-constraints") + 1].endswith("build.txt")
    assert "--no-deps" in installed
    assert [Path(word).name for at, word in enumerate(installed) if installed[at - 1] == "--editable"] == [
        "core",
        "world",
        "avid",
        "fine",
    ]


def test_a_second_sync_does_nothing(workspace: Path, fake_uv: FakeUv) -> None:
    environment.sync(workspace)
    before = len(fake_uv.calls)
    environment.sync(workspace)
    assert len(fake_uv.calls) == before


@pytest.mark.parametrize("change", ["lock", "version"])
def test_a_change_is_installed_into_the_same_environment(workspace: Path, fake_uv: FakeUv, change: str) -> None:
    environment.sync(workspace)
    before = len(fake_uv.calls)
    if change == "lock":
        text = (workspace / "uv.lock").read_text()
        (workspace / "uv.lock").write_text(text.replace("15.0.0", "15.0.1"))
    else:
        file = workspace / "packages/fine/pyproject.toml"
        file.write_text(file.read_text().replace('version = "0.1.0"', 'version = "0.2.0"'))
    environment.sync(workspace)
    assert verbs(fake_uv)[before:] == ["export", "export", "pip sync", "pip install"]


def test_clear_and_python_make_it_anew(workspace: Path, fake_uv: FakeUv) -> None:
    environment.sync(workspace)
    environment.sync(workspace, clear=True)
    environment.sync(workspace, python="3.13")
    made = [call for call in fake_uv.calls if call[0] == "venv"]
    assert len(made) == 3
    assert all("--clear" in call for call in made)
    assert made[2][made[2].index("--python") + 1] == "3.13"


def test_a_moved_workspace_is_installed_again(workspace: Path, fake_uv: FakeUv) -> None:
    environment.sync(workspace)
    moved = workspace.rename(workspace.with_name("moved"))
    before = len(fake_uv.calls)
    environment.sync(moved)
    assert len(fake_uv.calls) > before


def test_an_interrupted_sync_is_done_again(workspace: Path, fake_uv: FakeUv) -> None:
    environment.sync(workspace)
    refresh_lock(workspace)
    (workspace / ".venv/.lock-fingerprint").unlink()
    before = len(fake_uv.calls)
    environment.sync(workspace)
    assert "pip sync" in verbs(fake_uv)[before:]


def test_a_stale_lock_is_refused_before_anything_is_installed(workspace: Path, fake_uv: FakeUv) -> None:
    file = workspace / "packages/fine/pyproject.toml"
    file.write_text(file.read_text().replace("rich>=14", "rich>=15"))
    with pytest.raises(Failure, match=r"packages/fine/pyproject\.toml changed"):
        environment.sync(workspace)
    assert fake_uv.calls == []
    assert not (workspace / ".venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(workspace: Path, fake_uv: FakeUv) -> None:
    (workspace / ".venv").mkdir()
    (workspace / ".venv" / "thesis.txt").write_text("mine")
    with pytest.raises(Failure, match="is not a virtual environment; move it away"):
        environment.sync(workspace)
    assert (workspace / ".venv" / "thesis.txt").read_text() == "mine"


def test_a_broken_environment_is_made_anew(workspace: Path, fake_uv: FakeUv) -> None:
    home = environment.sync(workspace)
    (home / "bin" / "python").unlink()
    environment.sync(workspace)
    assert verbs(fake_uv).count("venv") == 2


def test_versions_of_uv() -> None:
    assert uv.parse_version("uv 0.13.9 (x86_64-unknown-linux-gnu)") == (0, 13, 9)
    assert uv.parse_version("uv 1.0") == (1, 0, 0)
    assert uv.parse_version("command not found") == ()
    assert uv.parse_version("uv 0.9.0") >= uv.MINIMUM > uv.parse_version("uv 0.8.22")


def test_the_pinned_requirement_has_every_wheels_hash(workspace: Path) -> None:
    from runner.workspace import read_toml

    locked = read_toml(workspace / "uv.lock")
    assert uv.pinned_requirement(locked, "uv") == ("0.13.9", "uv==0.13.9 --hash=sha256:0001 --hash=sha256:0002")
    with pytest.raises(Failure, match=r"nothing-such is not in uv\.lock"):
        uv.pinned_requirement(locked, "nothing-such")


def test_uv_on_the_path_is_used(workspace: Path, fake_uv: FakeUv) -> None:
    assert uv.find(workspace) == fake_uv.bin / "uv"


@pytest.mark.parametrize("version", [None, "0.4.30"])
def test_a_private_uv_replaces_a_missing_or_old_one(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str | None
) -> None:
    monkeypatch.setenv("PATH", str(FakeUv(tmp_path, version).bin) if version else str(tmp_path / "empty"))
    private = workspace / ".cache" / "uv-0.13.9" / "bin" / "uv"
    asked = []

    def bootstrap(folder: Path, version: str, requirement: str) -> None:
        asked.append((version, requirement.count("--hash=sha256:")))
        private.parent.mkdir(parents=True)
        private.touch()

    monkeypatch.setattr(uv, "_bootstrap", bootstrap)
    assert uv.find(workspace) == private
    assert uv.find(workspace) == private
    assert asked == [("0.13.9", 2)]


def test_a_failed_bootstrap_says_what_to_do_and_leaves_nothing(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(Failure, match=r"could not install uv .* apt-get install python3-venv"):
        uv.find(workspace)
    assert not (workspace / ".cache" / "uv-0.13.9").exists()
