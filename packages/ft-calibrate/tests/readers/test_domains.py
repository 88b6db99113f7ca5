import numpy as np
import pytest
from ft_calibrate.readers.domains import open_domains
from vfm_core.errors import UserError
from vfm_core.specs import parse_spec


def opened(text: str, split: str | None = None):
    return open_domains(parse_spec(f"domains:{text}"), split)


def test_domains_share_the_classes_of_all(tmp_path, picture):
    for domain, names in (("photo", ("bat", "owl")), ("line art", ("bat", "cat", "owl"))):
        for c, name in enumerate(names):
            for i in range(10):
                picture(tmp_path / domain / name / f"{i}.png", 20 * c + i)
    photo = opened(f"{tmp_path}?domain=photo")
    assert photo.classes == opened(f"{tmp_path}?domain=line art").classes == ["bat", "cat", "owl"]
    assert sorted(set(photo.labels.tolist())) == [0, 2]
    for i in range(len(photo)):
        assert photo.classes[photo.labels[i]] in photo.ids[i]
        assert int(np.asarray(photo[i].image)[0, 0, 0]) // 20 == photo.labels[i] // 2
    train, test = (opened(f"{tmp_path}?domain=photo@{s}") for s in ("train", "test"))
    assert (len(train), len(test)) == (14, 6)
    assert not set(train.ids) & set(test.ids)
    assert test.meta_of(0) == {"group": "photo"}


def test_domains_may_hold_split_folders(tmp_path, picture):
    for part, n in (("train", 3), ("test", 2)):
        for i in range(n):
            picture(tmp_path / "b" / part / "owl" / f"{i}.png")
    picture(tmp_path / "a" / "bat" / "0.png")
    assert len(opened(f"{tmp_path}?domain=b", "train")) == 3
    data = opened(f"{tmp_path}?domain=b@test")
    assert (data.classes, data.labels.tolist()) == (["bat", "owl"], [1, 1])
    with pytest.raises(UserError, match="several splits"):
        opened(f"{tmp_path}?domain=b")


def test_a_table_with_domains(tmp_path, picture):
    lines = ["path,label,domain"]
    for domain, names in (("lab", ("bat", "owl")), ("field", ("bat", "", "cat"))):
        for name in names:
            for i in range(10):
                picture(tmp_path / "p" / f"{domain}{name}{i}.png", i)
                lines.append(f"p/{domain}{name}{i}.png,{name},{domain}")
    table = tmp_path / "t.csv"
    table.write_text("\n".join(lines) + "\n")
    lab = opened(f"{table}?domain=lab")
    assert lab.classes == ["bat", "cat", "owl"]
    assert np.bincount(lab.labels).tolist() == [10, 0, 10]
    assert np.bincount(opened(f"{table}?domain=field@test").labels).tolist() == [3, 3]
    assert (opened(f"{table}?domain=field").labels == -1).sum() == 10
    assert lab[3].image.size == (8, 6)
    table.write_text("path,label,domain,split\np/labbat0.png,bat,lab,train\np/labbat1.png,bat,lab,val\n")
    assert opened(f"{table}@validation").ids == ["p/labbat1.png"]
    assert opened(f"{table}@train").meta_of(0) == {"group": "lab", "split": "train"}


def test_faults_are_named(tmp_path, picture):
    with pytest.raises(UserError, match="no folders of domains"):
        opened(f"{tmp_path}")
    picture(tmp_path / "d" / "a" / "bat" / "0.png")
    picture(tmp_path / "d" / "b" / "0.png")
    with pytest.raises(UserError, match=r"several domains.*\?domain=a, \?domain=b"):
        opened(f"{tmp_path / 'd'}")
    with pytest.raises(UserError, match=r"unknown domain in \?domain=: 'c'"):
        opened(f"{tmp_path / 'd'}?domain=c")
    with pytest.raises(UserError, match="no class folders"):
        opened(f"{tmp_path / 'd'}?domain=b")
    table = tmp_path / "t.csv"
    table.write_text("path,label\nx.png,bat\n")
    with pytest.raises(UserError, match=r"no column 'domain' in .*t.csv, line 1"):
        opened(f"{table}?domain=a")
    table.write_text("path,label,domain\nx.png,bat,\n")
    with pytest.raises(UserError, match=r"empty cell in .*t.csv, line 2, column domain"):
        opened(f"{table}?domain=a")
