"""All benches, one after another so that none disturbs another, their JSON side by side in one folder."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from runner.process import Failure, clean_environment, program, run, say, scripts_dir
from runner.workspace import Member


def run_all(environment: Path, packages: Sequence[Member], out: Path, options: Sequence[str]) -> list[Path]:
    """Run `<package> bench --json` for each package and write its result to `out/<package>.json`.

    Raises
    ------
    Failure
        After all have run, when one failed or printed something else than JSON.
    """
    out.mkdir(parents=True, exist_ok=True)
    written, failed = [], []
    for package in packages:
        say(f"== {package.name} bench ==")
        env = clean_environment(bin_dir=scripts_dir(environment))
        command = [program(environment, package.name), "bench", "--out", out / package.name, "--json", *options]
        try:
            result = json.loads(run(command, cwd=out, env=env, stdout=subprocess.PIPE))
        except (Failure, json.JSONDecodeError) as error:
            failed.append(f"{package.name}: {error}")
            continue
        file = out / f"{package.name}.json"
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        written.append(file)
    if failed:
        raise Failure("; ".join(failed))
    return written
