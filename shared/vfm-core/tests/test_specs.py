"""The spec grammar."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vfm_core.errors import UserError
from vfm_core.specs import Spec, flag, height_width, parse_spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("timm:resnet50", Spec("timm", "resnet50")),
        ("timm:vit.tag?img_size=224&dynamic=1", Spec("timm", "vit.tag", None, {"img_size": "224", "dynamic": "1"})),
        ("timm:vit@./w.safetensors", Spec("timm", "vit", "./w.safetensors")),
        ("timm:vit@/a/b@2.pth?dtype=bf16", Spec("timm", "vit", "/a/b@2.pth", {"dtype": "bf16"})),
        ("open_clip:ViT-L-14/openai", Spec("open_clip", "ViT-L-14/openai")),
        ("open_clip:hf-hub:imageomics/bioclip-2", Spec("open_clip", "hf-hub:imageomics/bioclip-2")),
        ("timm:hf-hub:a/b@v1", Spec("timm", "hf-hub:a/b", "v1")),
        ("timm:local-dir:./no@such?x=1", Spec("timm", "local-dir:./no@such", None, {"x": "1"})),
        ("hf:org/name@train", Spec("hf", "org/name", "train")),
        (r"dir:C:\models\vit", Spec("dir", r"C:\models\vit")),
        ("dir:./no/such@place", Spec("dir", "./no/such@place")),
        ("dir:./what?", Spec("dir", "./what?")),
        ("folder:./photos?split=val", Spec("folder", "./photos", None, {"split": "val"})),
        ("csv:a.csv?x=a=b", Spec("csv", "a.csv", None, {"x": "a=b"})),
        ("tinyworld:birds?layout=nested&n=320", Spec("tinyworld", "birds", None, {"layout": "nested", "n": "320"})),
        ("random:timm:vit@x?seed=3", Spec("random", "timm:vit", "x", {"seed": "3"})),
        ("  timm:vit ", Spec("timm", "vit")),
        ("timm:vit?note=", Spec("timm", "vit", None, {"note": ""})),
    ],
)
def test_grammar_and_round_trip(text: str, spec: Spec) -> None:
    parsed = parse_spec(text)
    assert parsed == spec
    assert str(parsed) == text.strip() and parse_spec(str(parsed)) == parsed
    assert hash(parsed) == hash(spec)


names = st.text("abcXYZ019_.-/:", min_size=2).filter(lambda s: not s.startswith("local-dir:"))
keys = st.text("abc_", min_size=1)
values = st.text("abc019.,/x=-", max_size=6)


@given(
    st.sampled_from(["timm", "hf", "open_clip", "tiny", "x-y"]),
    names,
    st.none() | st.text("abc./@09", min_size=1),
    st.dictionaries(keys, values, max_size=3),
)
def test_any_spec_round_trips(family: str, name: str, source: str | None, options: dict[str, str]) -> None:
    spec = Spec(family, name, source, options)
    assert parse_spec(str(spec)) == spec


def test_existing_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a@b?c=d"
    odd.mkdir()
    assert parse_spec(str(odd)) == Spec("dir", str(odd))
    assert parse_spec(f"{odd}?x=1") == Spec("dir", str(odd), None, {"x": "1"})
    for family in ("dir", "folder", "hf"):
        assert parse_spec(f"{family}:{odd}") == Spec(family, str(odd))
        assert parse_spec(f"{family}:{odd}?x=1") == Spec(family, str(odd), None, {"x": "1"})
    assert parse_spec(f"timm:local-dir:{odd}") == Spec("timm", f"local-dir:{odd}")
    assert parse_spec(f"random:{odd}") == Spec("random", f"dir:{odd}")
    monkeypatch.chdir(tmp_path)
    assert parse_spec("a@b?c=d") == Spec("dir", "a@b?c=d")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "needs a family"),
        ("resnet50", "needs a family"),
        ("./missing/folder", "no such file or folder"),
        (r"C:\missing", "no such file or folder"),
        ("timm:", "needs a name"),
        ("timm:@x", "needs a name"),
        ("timm:vit@", "needs a source after '@'"),
        ("timm:vit?img_size", "key=value.*'img_size'"),
        ("timm:vit?a=1&", "key=value"),
        ("timm:vit?a=1&a=2", "given twice"),
        ("random:resnet50", "needs a family"),
        (":x", "needs a family"),
    ],
)
def test_what_is_refused(text: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        parse_spec(text)


def test_reading_options() -> None:
    spec = parse_spec("timm:vit?img_size=64x96&dynamic=on&n=3")
    assert spec.read(img_size=height_width, dynamic=flag, n=int) == {"img_size": (64, 96), "dynamic": True, "n": 3}
    assert parse_spec("timm:vit").read(n=int) == {}
    with pytest.raises(UserError, match=r"unknown option in timm:vit.*'n'"):
        spec.read(img_size=height_width, dynamic=flag)
    with pytest.raises(UserError, match=r"option n cannot be read in timm:vit\?n=x: 'x'"):
        parse_spec("timm:vit?n=x").read(n=int)


def test_converters() -> None:
    assert [flag(t) for t in ("1", "true", "ON", "0", "no")] == [True, True, True, False, False]
    assert height_width("224") == (224, 224) and height_width("10X20") == (10, 20)
    for bad in ("", "0", "1x2x3", "-4", "a"):
        with pytest.raises(ValueError, match="pixels"):
            height_width(bad)
    with pytest.raises(ValueError, match="1 or 0"):
        flag("2")
