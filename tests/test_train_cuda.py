"""Training on a GPU: in a graph as eagerly, and cut as uncut. Skipped where there is no GPU."""

import dataclasses

import pytest
import torch
from test_train_cifar import EVERYTHING, METHODS, change, images, same  # noqa: F401

from samlib import spec as specs_of
from samlib import sweep, train
from samlib.store import Store

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


def trained(spec, graph, compile=False):
    training = train.Training.start(spec, CUDA, graph, compile)
    training.go_on(lambda: None)
    return training


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
@pytest.mark.parametrize("fields", METHODS.values(), ids=METHODS)
def test_a_graph_makes_the_steps_of_the_eager_run(fields, precision):
    spec = dataclasses.replace(change(lr=0.02, precision=precision, epochs=13, **fields), augment=EVERYTHING)
    plain, graphed = (trained(spec, graph) for graph in (False, True))
    assert graphed.graphed.calls == 52
    losses = [training.record().history["running_loss"] for training in (plain, graphed)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_run_cut_on_a_gpu_goes_on_where_it_was(tmp_path):
    spec, path = dataclasses.replace(change(lr=0.02), augment=EVERYTHING), tmp_path / "cut"
    whole, cut = trained(spec, graph=True), train.Training.start(spec, CUDA, graph=True)
    for _, indices in zip(range(6), cut.batches_left(), strict=False):
        cut.take(indices)
    cut.save(path)
    again = train.Training.start(spec, CUDA, graph=True)
    again.restore(train.read_checkpoint(path))
    again.go_on(lambda: None)
    assert again.record().history["running_loss"] == pytest.approx(whole.record().history["running_loss"], rel=1e-3)


def test_network_for_cifar_lies_channels_last():
    training = train.Training.start(change(**{"model.name": "resnet20"}, width=8), CUDA)
    convolution = next(m for m in training.model.modules() if isinstance(m, torch.nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # of inductor, wherever fp32 forbids them
def test_compiled_passes_in_a_graph_make_the_steps_of_the_eager_run():
    spec = dataclasses.replace(change(lr=0.02, epochs=13), augment=EVERYTHING)
    plain, compiled = trained(spec, graph=False), trained(spec, graph=True, compile=True)
    assert compiled.graphed.calls == 52
    losses = [training.record().history["running_loss"] for training in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("graph", ["0", "1"])
def test_side_by_side_on_streams_runs_are_those_alone(tmp_path, monkeypatch, graph):
    """Five runs, three at a time: others begin, and are captured, while some are on."""
    monkeypatch.setenv("SAMLIB_GRAPH", graph)
    stores = [Store(tmp_path / name, writable=True) for name in ("together", "alone")]
    specs = [dataclasses.replace(change(lr=0.02, epochs=9), augment=EVERYTHING, seed=seed) for seed in range(5)]
    for store, side_by_side in zip(stores, (3, 1), strict=True):
        assert sweep.run_all(specs, store, device="cuda", side_by_side=side_by_side).done == 5
    for spec in specs:
        together, alone = (store.load(specs_of.key(spec)).history["running_loss"] for store in stores)
        assert together == pytest.approx(alone, rel=1e-3)
