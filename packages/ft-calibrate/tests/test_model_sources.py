import pytest
import torch
from ft_calibrate.classifier import load_classifier
from vfm_core.errors import UserError


def test_torchvision_weights_name_their_own_cache(tmp_path, monkeypatch):
    import urllib.error
    import urllib.request

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    for offline in (True, None):
        with pytest.raises(UserError) as caught:
            load_classifier("torchvision:resnet18@DEFAULT", offline=offline)
        message = str(caught.value)
        assert str(tmp_path / "hub" / "checkpoints") in message and "resnet18-f37072fd.pth" in message


def test_an_unknown_family_is_told_of_torchvision():
    with pytest.raises(UserError, match=r"unknown model family.*torchvision"):
        load_classifier("nonesuch:resnet18")
    with pytest.raises(UserError, match=r"did you mean torchvision"):
        load_classifier("torchvison:resnet18")
