"""Batch norm in the second pass and its recalibration, against torch's own layers run by hand."""

import copy

import pytest
import torch
from torch import nn

from samlib.batchnorm import recalibrate, second_pass
from samlib.errors import InputError

CASES = {
    "1d": (lambda: nn.BatchNorm1d(3), (8, 3)),
    "1d with length": (lambda: nn.BatchNorm1d(3), (8, 3, 5)),
    "2d": (lambda: nn.BatchNorm2d(3), (4, 3, 2, 2)),
    "3d": (lambda: nn.BatchNorm3d(3), (4, 3, 2, 2, 2)),
    "sync": (lambda: nn.SyncBatchNorm(3), (4, 3, 2, 2)),
    "lazy": (lambda: nn.LazyBatchNorm2d(), (4, 3, 2, 2)),
    "no affine": (lambda: nn.BatchNorm1d(3, affine=False), (8, 3)),
    "cumulative": (lambda: nn.BatchNorm1d(3, momentum=None), (8, 3)),
}


def batch(*shape, seed=0, loc=2.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3 + loc


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(params=CASES.values(), ids=CASES)
def layer_and_shape(request):
    """A layer of each of torch's classes that has seen one batch."""
    make, shape = request.param
    layer = make()
    layer(batch(*shape, seed=1))
    return layer, shape


def test_frozen_normalises_with_the_batch_and_leaves_every_buffer(layer_and_shape):
    layer, shape = layer_and_shape
    before, x = buffers(layer), batch(*shape, seed=2)
    expected = copy.deepcopy(layer)(x)
    with second_pass(layer, "frozen"):
        found = layer(x)
    assert torch.equal(found, expected)
    assert_same(buffers(layer), before)


def test_update_is_an_ordinary_training_pass(layer_and_shape):
    layer, shape = layer_and_shape
    reference, x = copy.deepcopy(layer), batch(*shape, seed=2)
    expected = reference(x)
    with second_pass(layer, "update"):
        assert torch.equal(layer(x), expected)
    assert_same(buffers(layer), buffers(reference))
    assert layer.num_batches_tracked == 2


def test_eval_normalises_with_the_running_statistics(layer_and_shape):
    layer, shape = layer_and_shape
    before, x = buffers(layer), batch(*shape, seed=2)
    with second_pass(layer, "eval"):
        found = layer(x)
    assert_same(buffers(layer), before)
    assert torch.equal(found, copy.deepcopy(layer).eval()(x))
    assert not torch.equal(found, copy.deepcopy(layer).train()(x))


@pytest.mark.parametrize("statistics", ["frozen", "update", "eval"])
def test_layers_are_as_before_after_nesting_and_after_an_error(statistics):
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.BatchNorm1d(3, momentum=0.3)))
    with pytest.raises(RuntimeError), second_pass(model, statistics), second_pass(model, statistics):
        model(batch(8, 4))  # one channel too many
    before = buffers(model)
    assert all(layer.training and layer.track_running_stats for layer in (model[0], model[1][0]))
    assert (model[0].momentum, model[1][0].momentum) == (0.1, 0.3)
    model(batch(8, 3, seed=3))
    assert all(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_the_inner_of_two_contexts_ends_without_ending_the_outer():
    layer = nn.BatchNorm1d(3)
    before = buffers(layer)
    with second_pass(layer, "frozen"):
        with second_pass(layer, "frozen"):
            layer(batch(8, 3))
        layer(batch(8, 3))
    assert_same(buffers(layer), before)


def test_layers_in_eval_mode_stay_there():
    layer = nn.BatchNorm1d(3).eval()
    x = batch(8, 3)
    with second_pass(layer, "frozen"):
        assert torch.equal(layer(x), copy.deepcopy(layer)(x))
    assert not layer.training


def test_backward_may_follow_outside_the_context():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    reference = copy.deepcopy(model)
    with second_pass(model, "frozen"):
        loss = model(batch(8, 3)).square().mean()
    loss.backward()
    reference(batch(8, 3)).square().mean().backward()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(found.grad, expected.grad)


def test_a_model_without_batch_norm_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    with second_pass(model, "eval"):
        assert all(module.training for module in model.modules())
    batches = iter([batch(8, 3)])
    recalibrate(model, batches)
    assert len(list(batches)) == 1  # not even read


def test_an_unknown_choice_and_an_unseen_lazy_layer_are_refused():
    with pytest.raises(InputError, match="'freeze' is unknown: use one of frozen"), second_pass(nn.ReLU(), "freeze"):
        pass
    with pytest.raises(InputError, match="run one forward pass first"), second_pass(nn.LazyBatchNorm1d(), "frozen"):
        pass


# ------------------------------------------------------------------------------------------------------- recalibration


def test_recalibration_equals_torch_update_bn_on_batches_of_one_size():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)).double()
    reference = copy.deepcopy(model)
    batches = [batch(8, 3, seed=seed).double() for seed in range(5)]
    recalibrate(model, batches)
    torch.optim.swa_utils.update_bn(batches, reference)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(reference.named_buffers())[name], rtol=1e-13, atol=0)


def test_recalibration_weighs_a_smaller_last_batch_by_its_size():
    layer = nn.BatchNorm1d(3).double()
    layer(batch(64, 3, loc=50.0).double())
    data = batch(20, 3).double()
    parts = data.split([8, 8, 4])
    recalibrate(layer, [(part, torch.zeros(len(part))) for part in parts])
    torch.testing.assert_close(layer.running_mean, data.mean(0), rtol=1e-13, atol=0)
    within = sum(len(part) * part.var(0) for part in parts) / 20
    torch.testing.assert_close(layer.running_var, within, rtol=1e-13, atol=0)
    assert layer.num_batches_tracked == 3


def test_recalibration_restores_modes_and_momentum_also_after_an_error():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.2), nn.Dropout(), nn.BatchNorm1d(3, momentum=None))
    model.eval()
    model[1].train()
    recalibrate(model, [[batch(8, 3)]])
    with pytest.raises(RuntimeError):
        recalibrate(model, [batch(8, 3), batch(8, 4)])
    assert [module.training for module in model.modules()] == [False, False, True, False]
    assert (model[0].momentum, model[2].momentum) == (0.2, None)


def test_recalibration_without_a_batch_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    model(batch(8, 3))
    before = buffers(model)
    with pytest.raises(InputError, match="batches is empty"):
        recalibrate(model, [])
    assert_same(buffers(model), before)
    assert model.training
