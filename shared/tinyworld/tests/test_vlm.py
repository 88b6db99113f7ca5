"""The multimodal language model: real classes, a real checkpoint folder, and the quality that its card promises."""

from __future__ import annotations

import hashlib
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tinyworld import build_vlm, load_vlm, make_albums, recipes, save_vlm, vlm_training
from tinyworld.albums import SPECIAL, VOCABULARY
from tinyworld.catalogue import LANGUAGE_MODELS, read_card, weights_path
from tinyworld.models import rounded
from tinyworld.training import Schedule, to_input, train
from tinyworld.vlm import answers
from tinyworld.vlm_training import (
    COURSE,
    IDS,
    IGNORED,
    STAGE_TWO,
    answer_loss,
    encode,
    lesson,
    lesson_at,
    measure_vlm,
    patch_batches,
    patch_loss,
)
from vfm_core.backbones import load_backbone
from vfm_core.errors import UserError

transformers = pytest.importorskip("transformers")
STEMS = LANGUAGE_MODELS["vlm"].files()
SAMPLE = 60


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_vlm(0)


# ------------------------------------------------------------------------------------------------ shipped files
@pytest.mark.parametrize("stem", STEMS)
def test_file_is_the_one_on_the_card(stem: str) -> None:
    card, path = read_card(stem), weights_path(stem)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == card["sha256"]
    assert path.stat().st_size == card["bytes"] < 600_000
    assert card["model"] == f"tiny:vlm?seed={card['seed']}" and card["training_cpu_seconds"] > 0
    assert card["parameters"] == sum(p.numel() for p in build_vlm().parameters())
    assert min(card["measured"].values()) >= 0.95


@pytest.mark.parametrize("seed", LANGUAGE_MODELS["vlm"].seeds)
def test_quality_is_the_one_on_the_card(seed: int) -> None:
    """On albums that nobody has seen."""
    found = measure_vlm(n=SAMPLE, split="test", seed=seed)
    promised = read_card(f"vlm-{seed}")["measured"]
    assert list(found) == list(promised)
    for label, value in promised.items():
        spread = 3 * math.sqrt(value * (1 - value) * (1 / SAMPLE + 1 / 240))
        assert found[label] >= max(0.9, value - 0.03 - spread), label


def test_answers_survive_words_padding_and_other_lengths(loaded: tuple[Any, Any]) -> None:
    albums = [album for size in (2, 5, 8) for album in make_albums("list", 8, size, words=size % 3)]
    said = answers(*loaded, albums, batch=24)
    assert said == [one for album in albums for one in answers(*loaded, [album])]
    right = [x == y for album, one in zip(albums, said) for x, y in zip(album.questions[0][1].split(), one.split())]
    assert len(right) == 8 * 15 and np.mean(right) > 0.9


# ------------------------------------------------------------------------------------------------ transformers
def test_checkpoint_folder_is_like_any_other(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = loaded
    folder = save_vlm(tmp_path / "sub" / "vlm", 0)
    assert folder == tmp_path / "sub" / "vlm" and not [p for p in folder.parent.iterdir() if p != folder]
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).stat().st_size > 0
    other = transformers.AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    reader = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    assert type(other) is type(model) and type(reader) is type(processor)
    assert next(other.parameters()).dtype == torch.float32 and not other.training
    albums = make_albums("needle", 1, 3) + make_albums("needle", 1, 8)
    pictures = [list(albums[0].images), [Image.fromarray(one) for one in albums[1].images]]
    call = {"text": [album.prompt() for album in albums], "images": pictures, "return_tensors": "pt", "padding": True}
    inputs, again = processor(**call), reader(**call)
    assert {key: value.tolist() for key, value in inputs.items()} == {key: v.tolist() for key, v in again.items()}
    assert inputs["input_ids"].shape == (2, 1 + 8 * 17 + 2)
    assert inputs["attention_mask"][0].tolist() == [0] * 85 + [1] * 54  # the shorter one is padded on the left
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [3 * 16, 8 * 16]
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, other(**again).logits)
    settings = other.generation_config
    assert (settings.pad_token_id, settings.eos_token_id, settings.do_sample) == (0, 2, False)
    assert model.generate(**inputs).tolist() == other.generate(**again).tolist()
    with pytest.raises(UserError, match="holds something"):
        save_vlm(folder)


def test_random_weights_come_from_the_seed(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    a, b, c = (save_vlm(tmp_path / str(k), seed, pretrained=False) for k, seed in enumerate((5, 5, 6)))
    assert torch.equal(before, torch.random.get_rng_state())
    files = [(folder / "model.safetensors").read_bytes() for folder in (a, b, c)]
    assert files[0] == files[1] != files[2]


def test_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(transformers.LlavaProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        save_vlm(tmp_path / "vlm", pretrained=False)
    assert not list(tmp_path.iterdir())


def test_text_is_words_of_the_vocabulary(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1].tokenizer
    for word in VOCABULARY:
        assert tokenizer.encode(word) == [IDS[word]]
    album = make_albums("list", 1, 4, words=2)[0]
    inputs = loaded[1](text=[album.prompt()], images=[list(album.images)], return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == encode(album.prompt())
    torch.testing.assert_close(inputs["pixel_values"], to_input(album.images))
    assert tokenizer.batch_decode([[IDS["Q"], IDS["red"], IDS["<eos>"]]], skip_special_tokens=True) == ["Q red"]
    assert tokenizer.encode("zebra") == [IDS["<unk>"]] and set(SPECIAL) <= set(VOCABULARY)


def test_chat_template_gives_the_prompt_of_an_album(loaded: tuple[Any, Any]) -> None:
    album = make_albums("needle", 1, 2)[0]
    (first, answer), (second, _) = album.questions
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": first}]
    talk = [{"role": "user", "content": parts}]
    assert loaded[1].apply_chat_template(talk) == album.prompt()
    talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": second}]
    assert loaded[1].apply_chat_template(talk) == f"{album.prompt()} {answer} <eos> {second}"


def test_larger_shapes_for_timing() -> None:
    model = build_vlm(hidden=128, layers=2, heads=8, kv_heads=4)
    text = model.config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.num_key_value_heads) == (128, 2, 4)
    ids = torch.tensor([encode("<bos> <sep> <image> Q red")])
    images = to_input(make_albums("needle", 1, 1)[0].images)
    with torch.inference_mode():
        logits = model(input_ids=ids, pixel_values=images).logits
    assert logits.shape == (1, 20, len(VOCABULARY)) and 0.1 < float(logits.std()) < 10


@pytest.mark.parametrize(
    ("shape", "hint"),
    [({"layers": 0}, "layers must be positive"), ({"hidden": 60, "heads": 8}, "do not fit"), ({"kv_heads": 3}, "fit")],
)
def test_bad_shapes(shape: dict[str, int], hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        build_vlm(**shape)


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no vision backbone.*tiny:vlm; use tinyworld.load_vlm"):
        load_backbone("tiny:vlm")
    with pytest.raises(UserError, match="shipped: 0, 1, 2; make others with `tinyworld train vlm --seed 7`"):
        load_vlm(7)
    with pytest.raises(UserError, match="no weights"):
        load_vlm(path=tmp_path / "none.safetensors")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for call in (build_vlm, load_vlm, lambda: save_vlm(tmp_path / "x")):
        with pytest.raises(UserError, match=r"transformers is not installed.*tinyworld\[vlm\]"):
            call()


def test_make_writes_weights_and_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = load_vlm(1)[0]
    monkeypatch.setattr(vlm_training, "train_vlm", lambda seed, report: (shipped, 0.5))
    monkeypatch.setattr(vlm_training, "measure_vlm", lambda path: measure_vlm(path, n=8))
    card = recipes.make("vlm", seed=5, out=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vlm-5.json", "vlm-5.safetensors"]
    assert (card["seed"], card["model"], card["parameters"]) == (5, "tiny:vlm?seed=5", 205824)
    assert "seed=5)" in card["recipe"] and min(card["measured"].values()) > 0.7
    mine = load_vlm(path=tmp_path / "vlm-5.safetensors")[0]
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), shipped.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ training pieces
def test_lessons_teach_answers_and_their_end() -> None:
    albums = make_albums("list", 2, 3)
    turns = [[("Q red", "4"), *album.questions] for album in albums]
    ids, goals = lesson(albums, turns, [False, True])
    texts = [f"{album.context} Q red 4 L {album.questions[0][1]} <eos>" for album in albums]
    assert ids.tolist() == [encode(text) for text in texts]
    for row, album in zip(goals, albums):
        taught = [VOCABULARY[goal] if goal != IGNORED else "" for goal in row[-8:]]
        assert taught == ["", "4", "<eos>", *album.questions[0][1].split(), "<eos>", ""]
    assert (goals[:, :-8] == IGNORED).all()


def test_every_step_of_the_course_is_a_true_lesson() -> None:
    assert COURSE[-1][0] == STAGE_TWO.epochs * STAGE_TWO.steps
    sizes = set()
    for step in (0, 79, 80, 300, *range(2980, 3000)):
        ids, goals, images = lesson_at(step, 0)
        again = lesson_at(step, 0)
        assert torch.equal(ids, again[0]) and torch.equal(images, again[2])
        n, placeholders = len(ids), (ids[0] == IDS["<image>"]).sum().item()
        assert images.shape == (n * placeholders // 16, 3, 32, 32) and goals.shape == ids.shape
        assert ((goals == IDS["<eos>"]).sum(1) > 0).all()
        last = goals != IGNORED
        follows = last[:, :-1] & last[:, 1:] & (goals[:, :-1] != IDS["<eos>"])  # an answer token feeds the next one
        assert torch.equal(ids[:, 1:][follows], goals[:, :-1][follows])
        sizes.add(placeholders // 16)
    assert {1, 2, 8} <= sizes and not torch.equal(lesson_at(5, 0)[2], lesson_at(5, 1)[2])


def test_a_few_steps_learn() -> None:
    losses: list[float] = []
    model = build_vlm(3)
    batches = patch_batches(3, batch=16)
    train(model, batches, patch_loss, Schedule(2, 30, 4e-3), 3, lambda _, loss: losses.append(loss))
    assert losses[1] < 0.7 * losses[0]
    batch = lesson_at(0, 3)
    first = float(answer_loss(model, *batch).detach())
    train(model, lambda _: iter([batch] * 8), answer_loss, Schedule(1, 8, 2e-3), 3)
    assert float(answer_loss(model, *batch).detach()) < 0.8 * first
    twin: Any = rounded(build_vlm(3))
    assert torch.equal(twin.lm_head.weight, twin.get_input_embeddings().weight)
