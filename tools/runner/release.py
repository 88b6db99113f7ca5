"""Is one package ready to be published? Everything that can be known before its tag is pushed."""

import email
import email.message
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

from runner import environment, isolated, uv
from runner.process import Failure, clean_environment, program, run, say, scripts_dir
from runner.workspace import Member, closure, members, normal_name, read_toml

VERSION = re.compile(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?(?:\.post\d+)?")
LARGEST_WHEEL = 40 * 2**20


def tag_of(member: Member) -> str:
    """The tag that publishes this version: `finecam-v1.2.3`."""
    return f"{member.name}-v{member.version}"


def changelog_version(text: str) -> str | None:
    """The version of the newest section, from `## 1.2.3`, `## [1.2.3] - date` or `## 1.2.3 (date)`."""
    match = re.search(r"^## \[?([^\s\]]+)", text, flags=re.MULTILINE)
    return match[1] if match else None


def version_problems(member: Member, changelog: str, tag: str | None, tagged_elsewhere: bool) -> list[str]:
    """What does not agree between version, changelog and tag."""
    found = []
    if not VERSION.fullmatch(member.version):
        found.append(f"version {member.version!r} is not of the form 1.2.3, 1.2.3rc1 or 1.2.3.post1")
    newest = changelog_version(changelog)
    if newest != member.version:
        found.append(f"CHANGELOG.md is at {newest}, pyproject.toml at {member.version}: add a section for this version")
    if tag is not None and tag != tag_of(member):
        found.append(f"the tag is {tag}, this version's is {tag_of(member)}")
    if tagged_elsewhere:
        found.append(f"{tag_of(member)} is already a tag of another commit: raise the version")
    return found


def metadata_problems(
    member: Member, metadata: email.message.Message, requires_python: str, local: set[str]
) -> list[str]:
    """What is missing or wrong in a wheel's metadata; `local` names the workspace's members."""
    found = []
    expected = {"Version": member.version, "Requires-Python": requires_python, "License-Expression": "Apache-2.0"}
    expected["Description-Content-Type"] = "text/markdown"
    for key, value in expected.items():
        if metadata[key] != value:
            found.append(f"metadata {key} is {metadata[key]!r}, expected {value!r}")
    if normal_name(metadata["Name"] or "?") != member.name:
        found.append(f"metadata Name is {metadata['Name']!r}, expected {member.name!r}")
    if not metadata["Summary"]:
        found.append("metadata has no Summary")
    if len(str(metadata.get_payload())) < 400:
        found.append("README.md says next to nothing: it is the package's page")
    if not metadata.get_all("License-File"):
        found.append("no LICENSE file beside pyproject.toml")
    for requirement in metadata.get_all("Requires-Dist") or []:
        name, rest = normal_name(requirement), requirement.partition(";")[0]
        if "@" in rest:
            found.append(f"depends on an address, not on a release: {requirement}")
        if name in local - {member.name} and ">=" not in rest:
            found.append(f"no lower bound for {name}: {requirement}")
    return found


def content_problems(member: Member, names: list[str]) -> list[str]:
    """What a wheel contains that it should not, or lacks."""
    own, info = f"{member.import_name}/", f"{member.import_name}-{member.version}.dist-info/"
    found = [f"the wheel contains {name}" for name in names if not name.startswith((own, info))]
    tests = re.compile(r"(?:^|/)(?:tests?/|test_[^/]*\.py$|conftest\.py$)")
    found += [f"the wheel contains a test: {name}" for name in names if tests.search(name)]
    required = [f"{own}__init__.py", f"{own}py.typed", *([f"{info}entry_points.txt"] if member.scripts else [])]
    return found + [f"the wheel lacks {name}" for name in required if name not in names]


def check(root: Path, member: Member, folder: Path, out: Path, tag: str | None) -> list[Path]:
    """Build a member's sdist and, from it, its wheel into `out`; check both; install the wheel in a fresh environment.

    Raises
    ------
    Failure
        Naming everything that is wrong.
    """
    pins = environment.export(root, uv.find(root), folder)
    out.mkdir(parents=True, exist_ok=True)
    leftover = next(out.iterdir(), None)
    if leftover is not None:
        raise Failure(f"{out} is not empty ({leftover.name}): a release is published from a folder of its own")
    command = [uv.find(root), "build", "--quiet", "--build-constraints", pins.build, "--require-hashes"]
    run([*command, "--out-dir", out, member.path], cwd=root)
    (out / ".gitignore").unlink(missing_ok=True)
    wheel, sdist = next(out.glob("*.whl")), next(out.glob("*.tar.gz"))

    changelog = (member.path / "CHANGELOG.md").read_text(encoding="utf-8")
    found = version_problems(member, changelog, tag, _tagged_elsewhere(root, member))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = email.message_from_bytes(archive.read(f"{_info(names)}/METADATA"))
    requires_python = read_toml(member.path / "pyproject.toml")["project"]["requires-python"]
    found += metadata_problems(member, metadata, requires_python, {other.name for other in members(root)})
    found += content_problems(member, names)
    if wheel.stat().st_size > LARGEST_WHEEL:
        found.append(f"the wheel has {wheel.stat().st_size / 2**20:.0f} MiB")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    found += [f"the sdist lacks {name}" for name in ("pyproject.toml", "README.md", "LICENSE") if name not in inside]
    if found:
        raise Failure(f"{member.name} {member.version} is not ready: " + "; ".join(found))
    _check_install(root, member, wheel, pins, folder)
    return [sdist, wheel]


def _check_install(root: Path, member: Member, wheel: Path, pins: environment.Requirements, folder: Path) -> None:
    say(f"{member.name}: installing its wheel in a fresh environment")
    below = closure(member, members(root))[:-1]
    wheels = isolated.build_wheels(root, below, folder / "wheels", pins.build) | {member.name: wheel}
    fresh = isolated.install(root, member, wheels, pins, folder)
    env = clean_environment(bin_dir=scripts_dir(fresh))
    run([program(fresh, "python"), "-c", f"import {member.import_name}"], cwd=folder, env=env)
    for script in member.scripts:
        shown = run([program(fresh, script), "--version"], cwd=folder, env=env, stdout=subprocess.PIPE)
        if member.version not in shown:
            raise Failure(f"{script} --version says {shown.strip()!r}, expected {member.version}")


def _info(names: list[str]) -> str:
    return next(name.partition("/")[0] for name in names if ".dist-info/" in name)


def _tagged_elsewhere(root: Path, member: Member) -> bool:
    """Whether this version's tag exists and is not the commit that is checked out."""
    commits = []
    for revision in (f"refs/tags/{tag_of(member)}^{{commit}}", "HEAD^{commit}"):
        command = ["git", "rev-parse", "--quiet", "--verify", revision]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        commits.append(done.stdout.strip())
    return bool(commits[0]) and commits[0] != commits[1]
