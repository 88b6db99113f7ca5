"""Kill -9 at a random epoch, then the same call again: the same weights and the same history."""

import json
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from ft_calibrate.recipes import fine_tune, load_run
from vfm_core.errors import UserError

SEEN = [0, 1, 2]
OPTIONS = {"epochs": 4, "batch_size": 16, "lr": 0.05}
RECIPES = {
    "ft": "ft",
    "lp-ft": "lp-ft:lp_epochs=2+bn-frozen",
    "lolsgd": "lolsgd:M=2,E=2+distill+ema",
    "averages": "l2sp+ema+wise:0.5",
}

# The children are forked before anything is computed; each kills itself in the middle of its training.
SCRIPT = textwrap.dedent("""
    import importlib.util, json, os, signal, sys
    import torch
    from ft_calibrate.recipes import fine_tune

    spec = importlib.util.spec_from_file_location("parts", sys.argv[1])
    parts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parts)
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)  # its first use imports much: once, not in every child

    def fork(recipe, out, last, options):
        child = os.fork()
        if child:
            return child
        net, rows = parts.make_net(), parts.make_rows()

        def kill(model, record):
            if record["epoch"] == last:
                os.kill(os.getpid(), signal.SIGKILL)

        check = lambda model: {"sum": float(model(rows[0]).sum())}
        fine_tune(net, rows, [0, 1, 2], recipe, out=out, validate=check, callbacks=[kill], **options)
        os._exit(0)

    def end(child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    killed, shared = json.loads(sys.argv[2])
    for job in killed:
        assert end(fork(*job)) == -signal.SIGKILL, job
    recipe, out, options = shared
    children = [fork(recipe, out, 2 if m == 1 else None, {**options, "local": m}) for m in (2, 1, 0)]
    assert end(children[1]) == -signal.SIGKILL  # the others wait for its local runs, which another job goes on with
    children[1] = fork(recipe, out, None, {**options, "local": 1})
    assert [end(child) for child in children] == [0, 0, 0]
""")


def history(run):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in run.history]


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_and_resumed_equals_uninterrupted(net, rows, tmp_path):
    """Also: LOLSGD as three jobs that share a folder, one of which is killed and started again."""
    chance = random.Random()
    jobs = []
    for name, recipe in RECIPES.items():
        length = 6 if name == "lp-ft" else 4
        jobs.append((recipe, str(tmp_path / name), chance.randint(0, length), OPTIONS))
    parts = Path(__file__).with_name("conftest.py")
    shared = "lolsgd:M=3,E=2+swa", str(tmp_path / "shared"), OPTIONS
    command = [sys.executable, "-c", SCRIPT, str(parts), json.dumps([jobs, shared])]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]

    def check(model):
        return {"sum": float(model(rows[0]).sum())}

    for recipe, out, last, options in jobs:
        assert not (Path(out) / "ft_calibrate.json").exists()
        computed = []

        def note(model, record, computed=computed):
            computed.append(record["epoch"])

        run = fine_tune(net, rows, SEEN, recipe, out=out, validate=check, callbacks=[note], **options)
        whole = fine_tune(net, rows, SEEN, recipe, validate=check, **options)
        assert same(run.model, whole.model), (recipe, last)
        assert history(run) == history(whole), (recipe, last)
        trained = [r for r in run.history if "loss" in r]
        assert computed == list(range(last + 1, len(trained) + 1)), "no finished epoch is trained again"
        assert not (Path(out) / "state").exists()
        lines = [json.loads(line) for line in (Path(out) / "results.jsonl").read_text().splitlines()]
        assert len(lines) == len(run.history) == len({line["unit"] for line in lines})
        loaded = load_run(out, net)
        assert same(loaded.model, whole.model) and history(loaded) == history(whole)
    recipe, out, options = shared
    apart = fine_tune(net, rows, SEEN, recipe, out=out, validate=check, **options)
    alone = fine_tune(net, rows, SEEN, recipe, validate=check, **options)
    assert same(apart.model, alone.model) and history(apart) == history(alone)
    late = fine_tune(net, rows, SEEN, recipe, out=out, local=1, **options)
    assert same(late.model, alone.model), "a job that comes late finds the run finished"
    assert not [p.name for p in Path(out).iterdir() if p.suffix not in (".json", ".jsonl", ".safetensors", "")]


def test_a_finished_run_is_read_not_trained(net, rows, tmp_path):
    for recipe in ("ft", "cosine-head+source-ensemble"):
        out = tmp_path / recipe
        first = fine_tune(net, rows, SEEN, recipe, out=out, **OPTIONS)
        told = []
        again = fine_tune(
            net, rows, SEEN, recipe, out=out, callbacks=[lambda m, r, told=told: told.append(r)], **OPTIONS
        )
        assert not told and same(first.model, again.model) and history(first) == history(again)
        assert again.head_name == first.head_name and again.structure == first.structure
        assert torch.equal(again.model(rows[0]), first.model(rows[0]))


def test_changed_settings_are_refused_with_their_difference(net, rows, tmp_path):
    fine_tune(net, rows, SEEN, "distill", out=tmp_path, **OPTIONS)
    for change, message in [
        ({"lr": 0.1}, r"changed configuration.*lr = 0.05 -> 0.1"),
        ({"recipe": "distill:T=3"}, r"parts.distill.T = 2.0 -> 3.0"),
        ({"train": (rows[0] + 1, rows[1])}, r"data = "),
        ({"seen": [0, 1, 2, 3]}, r'seen = \["0", "1", "2"\] -> '),
    ]:
        call = {"train": rows, "seen": SEEN, "recipe": "distill", **OPTIONS, **change}
        with pytest.raises(UserError, match=message):
            fine_tune(net, out=tmp_path, **call)
    net.fc.bias.data += 1
    with pytest.raises(UserError, match="source = "):
        fine_tune(net, rows, SEEN, "distill", out=tmp_path, **OPTIONS)


def test_no_resume_and_overwrite(net, rows, tmp_path):
    fine_tune(net, rows, SEEN, out=tmp_path, **OPTIONS)
    with pytest.raises(UserError, match="a run is there"):
        fine_tune(net, rows, SEEN, out=tmp_path, resume=False, **OPTIONS)
    run = fine_tune(net, rows, SEEN, "lp", out=tmp_path, overwrite=True, **OPTIONS)
    assert load_run(tmp_path, net).recipe == "lp" == run.recipe


def test_an_explosion_keeps_the_last_good_epoch(net, rows, tmp_path):
    class Breaks(torch.nn.Sequential):
        calls = 0

        def forward(self, x):
            if torch.is_grad_enabled():
                Breaks.calls += 1
            return super().forward(x) * (float("nan") if Breaks.calls == 6 else 1)

    model = Breaks(net.body, net.flat, net.fc)
    with pytest.raises(UserError, match=r"loss is not finite in epoch 3.*after epoch 2 are kept"):
        fine_tune(model, rows, SEEN, out=tmp_path, **OPTIONS)
    Breaks.calls = 100
    run = fine_tune(model, rows, SEEN, out=tmp_path, **OPTIONS)
    whole = fine_tune(model, rows, SEEN, **OPTIONS)
    assert same(run.model, whole.model) and len(run.history) == 5
