"""Every fault a user can run into, through the real command: one line, exit status 2, finished work kept.

Each test starts ``python -m finecam`` as a process of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finecam.classifiers import Classifier
from finecam.explain import explain_folder
from PIL import Image
from torch import nn
from vfm_core.errors import UserError
from vfm_core.preprocess import Preprocess

PHOTOS = Path(__file__).resolve().parents[3].parent / "shared" / "data"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "finecam", *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


def finecam(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=240, env=environment())


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a call that must have failed as a user expects it to."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def records(out: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


def noise(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels, "RGB").save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        noise(tmp_path / "photos" / f"{i}.png", seed=i)
    return tmp_path / "photos"


def test_unreadable_images_are_recorded_the_rest_is_done_and_a_mended_file_heals(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "0.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.webp").write_text("this is no picture")
    Image.new("CMYK", (64, 64)).save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)).save(folder / "deep.png")
    Image.new("RGBA", (64, 64), (255, 0, 0, 10)).save(folder / "clear.png")
    call = ["explain", folder, "--model", "tiny:cnn", "--out", tmp_path / "o"]
    done = finecam(*call)
    assert "3 images failed in" in one_line(done) and "errors.jsonl" in one_line(done)
    assert "6 images explained" in done.stdout and (tmp_path / "o" / "index.html").is_file()
    reasons = {e["image"]: e["error"] for e in records(tmp_path / "o", "errors.jsonl")}
    assert set(reasons) == {"cut.png", "empty.jpg", "text.webp"}
    assert all(name in reason for name, reason in reasons.items())
    for name in reasons:
        noise(folder / name)
    again = finecam(*call, "--json")
    assert again.returncode == 0, again.stderr
    found = json.loads(again.stdout)
    assert (found["done"], found["new"], found["failed"]) == (9, 3, 0)
    assert '"error"' not in (tmp_path / "o" / "gallery" / "data.js").read_text(encoding="utf-8")


def test_strict_stops_at_the_first_bad_image_and_keeps_what_is_done(folder: Path, tmp_path: Path) -> None:
    (folder / "1.png").write_bytes(b"")
    done = finecam("explain", folder, "--model", "tiny:cnn", "--out", tmp_path / "o", "--strict", "--batch-size", 1)
    assert "1.png" in one_line(done)
    assert [r["image"] for r in records(tmp_path / "o")] == ["0.png"]


def test_a_second_run_does_not_explain_the_pictures_of_the_first(folder: Path) -> None:
    call = ["explain", folder, "--model", "timm:resnet18?img_size=64", "--random-weights", "--out", folder / "cams"]
    for new in (3, 0):
        done = finecam(*call, "--json")
        assert done.returncode == 0, done.stderr
        assert (json.loads(done.stdout)["done"], json.loads(done.stdout)["new"]) == (3, new)
        assert done.stderr.count("random:timm:resnet18?img_size=64 has random weights") == 1
    line = one_line(finecam(*call[:-1], folder))
    assert "results cannot go among the images" in line and not (folder / "config.json").exists()


def test_a_run_with_other_options_is_refused_and_keeps_its_results(folder: Path, tmp_path: Path) -> None:
    call = ["explain", folder, "--model", "tiny:cnn", "--out", tmp_path / "o"]
    assert finecam(*call).returncode == 0
    before = (tmp_path / "o" / "results.jsonl").read_bytes()
    line = one_line(finecam(*call, "--gamma", "1"))
    assert "changed configuration" in line and "gammas" in line and "--overwrite" in line
    assert (tmp_path / "o" / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--model", "timm:resnet18.a1_in1k", "--offline"], ["dir:PATH", "tiny:", "cache"]),
        (["--model", "tiny:cnn", "--target", "blue bird with red wing path"], ["did you mean", "red wing patch"]),
        (["--model", "tiny:cnn", "--layer", "layer5"], ["layer4"]),
    ],
    ids=["offline", "target", "layer"],
)
def test_bad_questions_leave_nothing_behind(
    folder: Path, tmp_path: Path, arguments: list[str], said: list[str]
) -> None:
    line = one_line(finecam("explain", folder, *arguments, "--out", tmp_path / "o"))
    assert all(word in line for word in said), line
    assert not (tmp_path / "o" / "results.jsonl").exists()


def test_folder_names_that_are_no_classes_are_named_before_any_work(tmp_path: Path) -> None:
    noise(tmp_path / "d" / "blue bird with red wing patch" / "a.png")
    noise(tmp_path / "d" / "blue bird with yelow crown" / "b.png")
    call = ["explain", tmp_path / "d", "--model", "tiny:cnn", "--target", "label", "--out", tmp_path / "o"]
    line = one_line(finecam(*call))
    assert "'blue bird with yelow crown' (closest: 'blue bird with yellow crown')" in line and "--class-map" in line
    assert not (tmp_path / "o").exists()
    (tmp_path / "m.csv").write_text("blue bird with yelow crown,blue bird with yellow crown\n", encoding="utf-8")
    done = explain_folder(tmp_path / "d", "tiny:cnn", tmp_path / "o", target="label", class_map=tmp_path / "m.csv")
    assert (done.done, done.failed) == (2, 0)


def test_a_head_on_the_wrong_backbone(folder: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3, 768), "bias": torch.zeros(3)}, tmp_path / "head.pth")
    call = ["explain", folder, "--model", tmp_path / "head.pth", "--backbone", "tiny:vit", "--out", tmp_path / "o"]
    line = one_line(finecam(*call))
    assert "head expects D=768, backbone gives 64" in line and "head.pth" in line


def test_images_of_one_name_keep_their_folders(tmp_path: Path) -> None:
    for k, name in enumerate(("a/x.png", "b/x.png", "b/x.jpg")):
        noise(tmp_path / "d" / name, seed=k)
    out = tmp_path / "o"
    done = finecam("explain", tmp_path / "d", "--model", "tiny:cnn", "--out", out, "--json")
    assert json.loads(done.stdout)["done"] == 3
    assert sorted(str(p.relative_to(out / "maps")) for p in (out / "maps").rglob("*.npz")) == [
        "a/x.png.npz",
        "b/x.jpg.npz",
        "b/x.png.npz",
    ]


def killed_in_the_middle(call: list[str], out: Path, at_least: int) -> int:
    """Start a run, kill it hard after some records, and return how many there are."""
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    results, deadline = out / "results.jsonl", time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if results.exists() and results.read_bytes().count(b"\n") >= at_least:
                break
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    return results.read_bytes().count(b"\n")


def test_kill_9_then_the_same_command_finishes_the_rest_only(tmp_path: Path) -> None:
    data, out, count = tmp_path / "d", tmp_path / "o", 32
    for i in range(count):
        noise(data / f"{i:02d}.jpg", (400, 300), i, quality=90)
    call = ["explain", data, "--model", "tiny:cnn", "--out", out, "--batch-size", 2, "--workers", 1]
    kept = killed_in_the_middle(command(*call), out, 4)
    assert 4 <= kept < count
    first = {r["image"]: r for r in records(out)[:kept]}
    stamps = {image: (out / r["map"]).stat().st_mtime_ns for image, r in first.items()}
    with (out / "results.jsonl").open("ab") as file:
        file.write(b'{"image": "torn')  # what a kill within the write itself leaves
    done = finecam(*call, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["done"], found["new"]) == (count, count - kept)
    rows = records(out)
    assert len(rows) == count == len({r["image"] for r in rows})  # no image twice
    assert [r for r in rows if r["image"] in first] == list(first.values())
    assert all((out / r["map"]).stat().st_mtime_ns == stamps[image] for image, r in first.items())
    for r in rows:
        with np.load(out / r["map"]) as arrays:
            assert set(arrays.files) == {"plain", "finer", "gammas", "ranges", "box", "size"}
        for name in (r["overlay"], r["pictures"]["image"], *r["pictures"]["layers"]):
            with Image.open(out / name) as picture:
                picture.load()
    assert not list(out.rglob(".vfm-tmp-*"))
    whole = tmp_path / "whole"
    assert explain_folder(data, "tiny:cnn", whole).done == count
    files = [sorted(str(p.relative_to(o)) for p in o.rglob("*") if not p.name.startswith(".")) for o in (out, whole)]
    assert files[0] == files[1]
    for r in records(whole):
        with np.load(out / r["map"]) as a, np.load(whole / r["map"]) as b:
            np.testing.assert_allclose(a["finer"], b["finer"], atol=2e-3)


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    data, out = tmp_path / "d", tmp_path / "o"
    for i in range(40):
        noise(data / f"{i:02d}.png", (240, 180), i)
    call = command("explain", data, "--model", "tiny:cnn", "--out", out, "--batch-size", 1, "--workers", 1)
    process = subprocess.Popen(
        call,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # A background job starts with the signal ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not ((out / "results.jsonl").exists() and (out / "results.jsonl").stat().st_size):
            assert process.poll() is None, "the run ended before it could be interrupted"
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and "resume with: finecam explain" in err and "Traceback" not in err
    assert 1 <= len(records(out)) < 40


def test_two_writers_of_one_folder(folder: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    out = tmp_path / "o"
    out.mkdir()
    with FileLock(out / ".lock"):
        line = one_line(finecam("explain", folder, "--model", "tiny:cnn", "--out", out))
    assert "run folder in use" in line


def test_launched_processes_share_the_images_and_the_first_builds_the_page(tmp_path: Path) -> None:
    for i in range(5):
        noise(tmp_path / "d" / f"{i}.png", seed=i)
    with_port = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    call = command("explain", tmp_path / "d", "--model", "tiny:cnn", "--out", tmp_path / "o", "--device", "cpu")
    processes = [
        subprocess.Popen(
            call,
            env=with_port | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        ends = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], ends
    assert "index.html" in ends[0][0] and "index.html" not in ends[1][0]
    assert len({r["image"] for r in records(tmp_path / "o")}) == 5
    assert (tmp_path / "o" / "index.html").is_file()


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# --- faults that need a model of their own, in this process -----------------------------------


class Moody(nn.Module):
    """Drop-out and a frozen layer; raises on request."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.9)
        self.head = nn.Linear(6, 3)
        self.fail = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fail:
            raise UserError("the model refuses")
        return self.head(self.drop(self.conv(x).relu().mean((2, 3))))


def moody(classes: int = 3) -> Classifier:
    model = Moody()
    if classes != 3:
        model.head = nn.Linear(6, classes)
    model.conv.requires_grad_(False)
    names = [f"c{i}" for i in range(classes)]
    return Classifier(model, names, Preprocess(size=(16, 16)), layer="conv", spec="moody")


def test_the_callers_model_comes_back_as_it_was(folder: Path, tmp_path: Path) -> None:
    classifier = moody()
    model: Any = classifier.model
    model.train()
    with torch.no_grad():
        explain_folder(folder, classifier, tmp_path / "o")
    for fail in (False, True):
        model.fail = fail
        if fail:
            with pytest.raises(UserError, match=r"refuses"):
                explain_folder(folder, classifier, tmp_path / "p")
        assert model.training and model.drop.training
        assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
        assert all(p.grad is None for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_drop_out_is_off(folder: Path, tmp_path: Path) -> None:
    classifier = moody()
    classifier.model.train()
    for name in ("a", "b"):
        explain_folder(folder, classifier, tmp_path / name)
    a, b = (records(tmp_path / name) for name in ("a", "b"))
    assert [r["target"] for r in a] == [r["target"] for r in b]


def test_one_class_cannot_be_contrasted(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a contrast needs two classes"):
        explain_folder(folder, moody(1), tmp_path / "o")
    assert explain_folder(folder, moody(1), tmp_path / "o", references=None).done == 3


def test_out_of_memory_halves_the_batch_and_goes_on(folder: Path, tmp_path: Path) -> None:
    class Greedy(Moody):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    classifier = moody()
    classifier.model = Greedy().eval()
    done = explain_folder(folder, classifier, tmp_path / "o", batch_size=3)
    assert (done.done, done.failed) == (3, 0)


def test_an_image_too_large_for_the_gpu_costs_only_itself(folder: Path, tmp_path: Path) -> None:
    class Picky(Moody):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if bool((x.mean((1, 2, 3)) > 1.5).any()):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    Image.new("RGB", (64, 64), "white").save(folder / "white.png")
    classifier = moody()
    classifier.model = Picky().eval()
    done = explain_folder(folder, classifier, tmp_path / "o", batch_size=4)
    assert (done.done, done.failed) == (3, 1)
    assert "out of memory" in records(tmp_path / "o", "errors.jsonl")[0]["error"]


@pytest.mark.skipif(not (PHOTOS / "birds").is_dir(), reason="the real photos are not here")
def test_real_photos_of_every_shape(tmp_path: Path) -> None:
    done = finecam(
        "explain", PHOTOS / "birds", "--model", "torchvision:squeezenet1_1", "--random-weights", "--json",
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["done"] == 9
    for r in records(tmp_path / "o"):
        with Image.open(PHOTOS / "birds" / r["image"]) as photo:
            assert list(photo.size) == r["size"]
