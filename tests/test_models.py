"""Models: sizes, shapes, and initial weights that depend on their own generator only."""

import pytest
import torch

from samlib import data, models
from samlib.errors import InputError
from samlib.spec import CIFAR_MODELS, ModelSpec


def build(seed=0, channels=1, **fields):
    return models.build(ModelSpec(**fields), (channels, 8, 8), 10, data.generator(seed, "init"))


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({}, 7234),
        ({"norm": "group"}, 7234),
        ({"norm": "none"}, 7178),
        ({"name": "mlp", "width": 64}, 9098),
        ({"name": "mlp", "width": 64, "norm": "group"}, 9098),
        ({"name": "mlp", "width": 64, "norm": "none"}, 8970),
    ],
)
def test_parameter_counts(fields, parameters):
    assert sum(p.numel() for p in build(**fields).parameters()) == parameters


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (3, 5)])
def test_output_shape(channels, size):
    assert build(channels=channels)(torch.zeros(4, channels, size, size)).shape == (4, 10)


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
def test_the_mlp_takes_images_of_the_shape_it_was_built_for(norm):
    model = models.build(ModelSpec(name="mlp", width=8, norm=norm), (3, 4, 5), 7, data.generator(0, "init"))
    assert model(torch.zeros(2, 3, 4, 5)).shape == (2, 7)
    wide = [(m.in_features, m.out_features) for m in model if isinstance(m, torch.nn.Linear)]
    assert wide == [(60, 8), (8, 8), (8, 7)]


def test_no_norm_means_none():
    kinds = {type(module).__name__ for module in build(norm="none").modules()}
    assert not {name for name in kinds if "Norm" in name}


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_dropout_is_there_only_if_asked_for(name):
    assert not [m for m in build(name=name).modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.p for m in build(name=name, dropout=0.25).modules() if isinstance(m, torch.nn.Dropout)] == [0.25]


def test_initial_weights_come_from_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for a, b in zip(one.parameters(), build(seed=3).parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(next(one.parameters()), next(build(seed=4).parameters()))


# ---- the networks of the papers. Parameters, tensors and convolutions, and GFLOP per image of a forward and a backward
# pass without the stem's input gradient: the table in the project's performance notes, counted there by layer hooks.
NETWORKS = {
    "resnet20": (269_722, 59, 19, 0.242),
    "resnet32": (464_154, 95, 31, None),
    "wrn40_2": (2_243_546, 116, 40, 1.965),
    "mobilenet_v2": (2_296_922, 173, 57, 0.545),
    "resnet18": (11_173_962, 62, 20, 3.329),
    "resnet50": (23_520_842, 161, 53, 7.783),
    "wrn28_10": (36_479_194, 80, 28, 31.46),
}


def on_meta(name, *arguments):
    """The network without memory or time: shapes only."""
    with torch.device("meta"):
        return getattr(models, name)(*arguments)


def convolutions(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]


@pytest.mark.parametrize(("name", "counts"), NETWORKS.items(), ids=NETWORKS)
def test_sizes_are_those_of_the_papers(name, counts):
    model = on_meta(name)
    parameters = list(model.parameters())
    assert (sum(p.numel() for p in parameters), len(parameters), len(convolutions(model))) == counts[:3]


@pytest.mark.parametrize(
    ("name", "counts"), [(n, c) for n, c in NETWORKS.items() if c[3]], ids=lambda value: str(value)
)
def test_operations_are_those_of_the_papers(name, counts):
    """A stride in the wrong place leaves the parameters as they are, but not the operations."""
    model = on_meta(name)
    operations = []

    def count(layer, inputs, output):
        forward = 2 * layer.weight.numel() * output[0].numel() // layer.weight.shape[0]
        operations.append(forward * (2 if inputs[0].shape[1] == 3 else 3))

    for layer in [*convolutions(model), *(m for m in model.modules() if isinstance(m, torch.nn.Linear))]:
        layer.register_forward_hook(count)
    assert model(torch.zeros(1, 3, 32, 32, device="meta")).shape == (1, 10)
    assert sum(operations) / 1e9 == pytest.approx(counts[3], rel=0.003)


def build_cifar(**fields):
    return models.build(ModelSpec(**fields), (3, 32, 32), 10, data.generator(0, "init"))


@pytest.mark.parametrize("name", CIFAR_MODELS)
def test_a_spec_builds_the_network_of_its_name(name):
    model = build_cifar(name=name)
    assert sum(p.numel() for p in model.parameters()) == NETWORKS[name][0]
    plain = build_cifar(name=name, norm="none")
    assert not [m for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    identities = [m for m in plain.modules() if isinstance(m, torch.nn.Identity)]
    assert len(identities) - len([m for m in model.modules() if isinstance(m, torch.nn.Identity)]) == len(norms)
    removed = sum(p.numel() for m in norms for p in m.parameters())
    assert sum(p.numel() for p in plain.parameters()) == NETWORKS[name][0] - removed


def test_coldenhoff_s_network_is_torchvision_s_resnet18_with_its_thousand_outputs():
    torchvision = pytest.importorskip("torchvision")
    model = build_cifar(name="resnet18", stem="imagenet", num_outputs=1000)
    expected = torchvision.models.resnet18()
    assert {name: p.shape for name, p in model.named_parameters()} == {
        name: p.shape for name, p in expected.named_parameters()
    }
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1000)


def test_fewer_outputs_than_classes_are_refused():
    with pytest.raises(InputError, match=r"model\.num_outputs = 5 .* 10"):
        build(num_outputs=5)


def test_the_imagenet_stem_is_torchvision_s():
    model = on_meta("resnet18", 1000, "imagenet")
    assert sum(p.numel() for p in model.parameters()) == 11_689_512
    assert model(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 1000)
    with pytest.raises(InputError, match=r"stem = 'small'.*imagenet"):
        on_meta("resnet18", 10, "small")


@pytest.mark.parametrize("name", ["resnet20", "wrn40_2", "mobilenet_v2", "resnet18"])
def test_initial_weights_keep_the_signal(name):
    """Logits and gradients are neither 0 nor beyond use at the start."""
    torch.manual_seed(0)
    model = getattr(models, name)(100)
    logits = model(torch.randn(8, 3, 32, 32))
    assert logits.shape == (8, 100)
    torch.nn.functional.cross_entropy(logits, torch.arange(8)).backward()
    assert all(0 < p.grad.norm() < 100 for p in model.parameters())


def test_the_shortcut_of_option_a_has_no_weights_and_keeps_every_second_pixel():
    block = next(m for m in models.resnet20() if getattr(m, "downsample", None) is not None)
    x = torch.randn(2, 16, 8, 8)
    shortcut = block.downsample(x)
    assert not list(block.downsample.parameters())
    assert torch.equal(shortcut[:, :16], x[:, :, ::2, ::2])
    assert shortcut.shape == (2, 32, 4, 4)
    assert not shortcut[:, 16:].any()


def test_the_pool_is_that_of_pytorch():
    model = build()
    (pool,) = (module for module in model if isinstance(module, torch.nn.AdaptiveAvgPool2d))
    for size in (2, 3, 8):
        x = torch.randn(2, 3, size, size)
        assert torch.equal(pool(x), torch.nn.functional.adaptive_avg_pool2d(x, 2))
