import copy

import numpy as np
import pytest
import timm
import torch
from ft_calibrate.classifier import Classifier, find_head, logits_of
from ft_calibrate.fold import fold, fold_into_head
from ft_calibrate.head_change import HeadChange, head_change, largest_difference
from ft_calibrate.recipes.heads import CosineHead
from ft_calibrate.record import Calibration
from ft_calibrate.text_head import TextHead
from torch import nn
from vfm_core.errors import UserError

K, GAMMA = 5, 3.5
NAMES = tuple("abcde")
ABSENT = [1, 4]


def calibration(**changes):
    values = {"method": "alg", "gamma": GAMMA, "classes": NAMES, "seen": ("a", "c", "d"), "absent": ("b", "e")}
    return Calibration(**{**values, "n_train": 60, **changes})


def net(bias=True):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, K, bias=bias))


def images(size=2, n=4):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def expected(model, x, cal):
    with torch.no_grad():
        return cal.apply(logits_of(model(x)).double().numpy())


def assert_folded(model, folded, cal, x):
    with torch.no_grad():
        got = logits_of(folded(x)).double().numpy()
    assert largest_difference(got, expected(model, x, cal)) <= 1e-5
    assert (got.argmax(1) == expected(model, x, cal).argmax(1)).all()


# ---------------------------------------------------------------------- families
def hf_convnext():
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(num_stages=2, hidden_sizes=[8, 8], depths=[1, 1], num_labels=K)
    return transformers.AutoModelForImageClassification.from_config(config)


def tv_shuffle():
    from torchvision import models

    return models.get_model("shufflenet_v2_x0_5", weights=None, num_classes=K)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (net, 2),
        (lambda: net(bias=False), 2),
        (lambda: timm.create_model("test_resnet", num_classes=K), 32),
        (lambda: timm.create_model("test_vit", num_classes=K, img_size=32), 32),
        (lambda: timm.create_model("resnetv2_50", num_classes=K, layers=(1, 1, 1, 1)), 32),
        (hf_convnext, 32),
        (tv_shuffle, 32),
        (lambda: nn.Sequential(nn.Flatten(), CosineHead(12, K, 16.0)), 2),
        (lambda: nn.Sequential(nn.Flatten(), TextHead(torch.eye(K, 12), 100.0)), 2),
    ],
)
def test_a_folded_model_gives_logits_plus_gamma_and_the_given_one_is_untouched(make, size):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = make().eval()
    before = copy.deepcopy(model.state_dict())
    folded = fold_into_head(model, calibration())
    assert_folded(model, folded, calibration(), images(size))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items()) and set(before) == set(
        model.state_dict()
    )
    again = type(folded)  # a module of the same kind, usable and copyable as before
    assert isinstance(copy.deepcopy(folded), again)


def test_numbers_names_columns_and_masks_say_the_same():
    model = Classifier(net(), "3", None, list(NAMES))
    wanted = fold_into_head(model, calibration())[3].bias
    for absent in (ABSENT, ["b", "e"], [False, True, False, False, True], torch.tensor(ABSENT), np.array(ABSENT)):
        assert torch.equal(fold_into_head(model, GAMMA, absent)[3].bias, wanted)


def test_records_are_matched_by_name():
    order = ["e", "d", "c", "b", "a"]
    model = Classifier(net(), "3", None, order)
    folded = fold_into_head(model, calibration())
    assert (folded[3].bias - model.head.bias).detach().numpy() == pytest.approx([GAMMA, 0, 0, GAMMA, 0])
    with pytest.raises(UserError, match="does not know"):
        fold_into_head(Classifier(net(), "3", None, list("vwxyz")), calibration())


def test_factors_and_shifts_per_class_fold_too():
    cal = calibration(scale=(1.0, 2.0, 1.0, 0.5, 1.5), shift=(0.0, 1.0, -1.0, 0.0, 2.0))
    for bias in (True, False):
        assert_folded(net(bias), fold_into_head(net(bias), cal), cal, images())
    text = nn.Sequential(nn.Flatten(), TextHead(torch.eye(K, 12), 10.0))
    assert_folded(text, fold_into_head(text, cal), cal, images())
    with pytest.raises(UserError, match="normalises its weight"):
        fold_into_head(nn.Sequential(nn.Flatten(), CosineHead(12, K)), cal)
    with pytest.raises(UserError, match="belong to the fitted scores"):
        fold_into_head(net(), calibration(scale=(2.0,) * K, input_kind="logprob"))


def test_excluded_classes_are_masked_out():
    cal = calibration(absent=("b",), remaining=("e",), remaining_mode="exclude")
    folded = fold_into_head(net(), cal)
    assert folded[3].bias[4] == -torch.inf
    assert_folded(net(), folded, cal, images())


def test_the_record_tells_shifts_factors_and_masked_classes():
    prior = calibration(method="prior", gamma=0.0, shift=(0.0, 1.5, 0.0, 0.0, 2.0))
    line = fold(Classifier(net(), "3"), head_change(prior, K))[1].line()
    assert line.startswith("shift 0 to 2 per class, in 3.bias (float32)") and "gamma =" not in line
    masked = calibration(absent=("b",), remaining=("e",), remaining_mode="exclude")
    assert "1 class masked (-inf)" in fold(Classifier(net(), "3"), head_change(masked, K))[1].line()


def test_matching_by_position_is_said():
    assert any("matched by position (--classes" in note for note in head_change(calibration(), K).notes)
    assert head_change(calibration(), K, NAMES).notes == ()
    numbers = calibration(classes=tuple("01234"), seen=tuple("023"), absent=tuple("14"))
    assert head_change(numbers, K).notes == ()
    assert "the calibration names no classes: matched by position" in head_change(numbers, K, NAMES).notes


def test_the_record_says_what_was_done_and_which_data_chose_gamma():
    cal = calibration(temperature=2.0, uses_absent_labels=True, oracle=True)
    found = Classifier(net(bias=False), "3")
    _, record = fold(found, head_change(cal, K), images())
    assert record.changed == ("3.bias",) and (record.moved, record.num_classes, record.dtype) == (2, K, "float32")
    line = record.line()
    for words in (
        "gamma = 3.5",
        "method alg, 60 rows, labels of absent classes used",
        "temperature 2",
        "oracle",
        "no bias",
    ):
        assert words in line
    assert record.max_abs_diff is not None and record.max_abs_diff <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_heads_keep_their_dtype_and_warn_when_gamma_rounds(dtype, caplog):
    model = net().to(dtype)
    folded, record = fold(Classifier(model, "3"), head_change(7.123456, K, absent=ABSENT))
    assert folded[3].bias.dtype == dtype and record.rounding > 1e-5 and "rounds the new bias" in caplog.text
    caplog.clear()
    zero = net().to(dtype)
    zero[3].bias.data.zero_()
    assert fold(Classifier(zero, "3"), head_change(4.0, K, absent=ABSENT))[1].rounding == 0 and not caplog.text


def test_shared_tensors_are_untied_and_said_so():
    model = net()
    other = nn.Linear(6, K)
    other.bias = model[3].bias
    both = nn.ModuleDict({"fc": model[3], "other": other})
    folded, record = fold(Classifier(both, "fc"), head_change(GAMMA, K, absent=ABSENT))
    assert torch.equal(folded["other"].bias, model[3].bias) and not torch.equal(folded["fc"].bias, model[3].bias)
    assert "shared with another layer" in record.line()
    tied = nn.ModuleDict({"fc": nn.Linear(6, K), "other": nn.Linear(6, K)})
    tied["other"].weight = tied["fc"].weight
    scaled = fold_into_head(Classifier(tied, "fc"), calibration(scale=(2.0,) * K))
    assert torch.equal(scaled["other"].weight, tied["fc"].weight)
    assert torch.equal(scaled["fc"].weight, 2 * tied["fc"].weight)


def test_parametrized_heads_take_a_bias_but_no_factors():
    model = net()
    nn.utils.parametrizations.weight_norm(model[3])
    assert_folded(model, fold_into_head(model, calibration()), calibration(), images())
    with pytest.raises(UserError, match="parametrization"):
        fold_into_head(model, calibration(scale=(2.0,) * K))


@pytest.mark.filterwarnings("ignore")  # the module is deprecated, the checkpoints are not gone
@pytest.mark.skipif(not hasattr(torch.ao.quantization, "quantize_dynamic"), reason="gone from this torch")
def test_quantised_heads_take_a_bias():
    model = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear})
    assert find_head(model)[0] == "3"
    assert_folded(model, fold_into_head(model, calibration()), calibration(), images())
    with pytest.raises(UserError, match="takes a bias only"):
        fold_into_head(model, calibration(scale=(2.0,) * K))


def test_adapted_heads_are_folded_in_their_base_layer():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["3"], r=2))
    assert_folded(model, fold_into_head(model, calibration()), calibration(), images())
    with pytest.raises(UserError, match="adapted head cannot be scaled"):
        fold_into_head(model, calibration(scale=(2.0,) * K))


def test_a_model_that_works_on_the_heads_output_is_refused_when_tried_out():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(12, K)

        def forward(self, x):
            return 2 * self.fc(x.flatten(1))

    with pytest.raises(UserError, match=r"differ by .* from logits \+ gamma in fc|in fc: logits differ"):
        fold(Classifier(Doubled(), "fc"), head_change(GAMMA, K, absent=ABSENT), images())


def test_a_source_ensemble_is_refused():
    from ft_calibrate.recipes import SourceEnsemble

    both = SourceEnsemble(net(), net(), "logit")
    with pytest.raises(UserError, match=r"averages two models.*ship calibration\.json"):
        fold_into_head(Classifier(both, "tuned.3"), calibration())


def test_a_classifier_that_knows_its_input_is_tried_out(monkeypatch):
    from ft_calibrate import fold as module
    from vfm_core.preprocess import Preprocess

    seen = []
    real = module._compare
    monkeypatch.setattr(module, "_compare", lambda *args: seen.append(args[3]) or real(*args))
    fold_into_head(Classifier(net().double(), "3", Preprocess((2, 2))), calibration())
    fold_into_head(net(), calibration())
    assert [(tuple(x.shape), x.dtype) for x in seen] == [((2, 3, 2, 2), torch.float64)]


@pytest.mark.parametrize(
    ("gamma", "absent", "words"),
    [
        (GAMMA, None, "needs the classes"),
        (float("nan"), ABSENT, "must be finite"),
        (GAMMA, [], "no absent class"),
        (GAMMA, ["zebra"], "zebra"),
        (GAMMA, [True, False], "mask of absent classes has another length"),
        (calibration(), ABSENT, "names its absent classes"),
        (calibration(classes=(*NAMES, "f"), absent=("b", "e", "f")), None, "6 calibrated classes, 5 logits"),
    ],
)
def test_what_cannot_be_meant_is_refused(gamma, absent, words):
    with pytest.raises(UserError, match=words):
        fold_into_head(Classifier(net(), "3", None, list(NAMES)), gamma, absent)
    with pytest.raises(UserError, match="another number of classes"):
        fold(Classifier(net(), "3"), HeadChange(np.ones(2), np.ones(2), 1.0, np.arange(2), "test"))


def test_specs_and_calibration_files_are_read(tmp_path):
    cal = calibration(classes=tuple(map(str, range(K))), seen=("0", "2", "3"), absent=("1", "4"))
    cal.write(tmp_path / "gamma.json")
    spec = f"random:timm:test_resnet?num_classes={K}"
    folded = fold_into_head(spec, tmp_path / "gamma.json")
    assert folded.fc.bias.detach().numpy() == pytest.approx(
        fold_into_head(spec, 0.0, ["1"]).fc.bias.detach().numpy() + cal.bias()
    )


def test_training_goes_on_with_a_folded_head():
    folded = fold_into_head(net(bias=False), calibration())
    assert folded[3].bias.requires_grad
    folded(images()).sum().backward()
    assert folded[3].bias.grad is not None
    frozen = net(bias=False).requires_grad_(False)
    assert not fold_into_head(frozen, calibration())[3].bias.requires_grad


class OwnModel(nn.Module):
    """A module of one's own: it may work on what its head returns."""

    def __init__(self, after):
        super().__init__()
        self.fc, self.after = nn.Linear(12, K), after

    def forward(self, x):
        return self.after(self.fc(x.flatten(1)))


def test_own_modules_are_checked_on_given_inputs(caplog):
    for after in (lambda z: 10 * z, lambda z: z.softmax(1)):
        with pytest.raises(UserError, match="cannot be folded into this layer"):
            fold_into_head(OwnModel(after), calibration(), inputs=images())
    plain = OwnModel(lambda z: z)
    assert_folded(plain, fold_into_head(plain, calibration(), inputs=images()), calibration(), images())
    large = OwnModel(lambda z: z)  # float32 holds logits of thousands to a few 1e-4
    fold_into_head(large, calibration(), inputs=1e4 * images(n=64))
    with pytest.raises(UserError, match="cannot be folded into this layer"):
        fold_into_head(OwnModel(lambda z: 10 * z), calibration(), inputs=1e4 * images(n=64))
    assert not caplog.text
    fold_into_head(plain, calibration())
    assert "OwnModel: not checked" in caplog.text and "give inputs=" in caplog.text
    for bad in (images()[:0], [1.0]):
        with pytest.raises(UserError, match="not a batch of inputs"):
            fold_into_head(plain, calibration(), inputs=bad)


def test_a_classifier_with_a_calibration_is_not_folded_again():
    found = Classifier(net(), "3", folded="gamma = 2")
    with pytest.raises(UserError, match=r"folded in already.*gamma = 2"):
        fold_into_head(found, calibration())
