"""What only a GPU can show: no waiting, and a whole step in one CUDA graph. Skipped where there is none."""

import pytest
import torch
from torch import nn

from samlib.batchnorm import second_pass
from samlib.optim import ASAM, SAM, AverageSAM

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SGD = torch.optim.SGD


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)]
    return nn.Sequential(*layers).cuda()


def batches(steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield (
            torch.randn(16, 3, 8, 8, generator=generator).cuda(),
            torch.randint(10, (16,), generator=generator).cuda(),
        )


def closure_of(opt, model, inputs, labels, set_to_none=True):
    def closure():
        opt.zero_grad(set_to_none)
        with second_pass(model, "frozen" if opt.in_second_pass else "update"):
            loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    return closure


def train(cls, flat, steps, lr, rho):
    model = network()
    opt = cls(model.parameters(), SGD, rho=rho[0], lr=lr[0], momentum=0.9, fused=True, flat=flat)
    for step, (inputs, labels) in enumerate(batches(steps)):
        opt.param_groups[0].update(lr=lr[step], rho=rho[step])
        opt.step(closure_of(opt, model, inputs, labels))
    return model, opt


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("cls", [SAM, ASAM, AverageSAM])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_step_with_a_fused_base_optimiser_never_waits(cls, flat, shards):
    model = network()
    opt = cls(model.parameters(), SGD, lr=0.1, momentum=0.9, fused=True, flat=flat)
    inputs, labels = next(batches(1))
    closures = [closure_of(opt, model, inputs, labels)] * shards
    opt.step(closures)  # makes the momentum
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            opt.step(closures)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert opt.skipped_steps == 0


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_fifty_replays_of_a_graph_are_fifty_steps_under_a_changing_learning_rate_and_radius(cls, flat):
    steps, warm_up = 50, 3
    lr = [0.1 * 0.95**step for step in range(steps)]
    rho = [0.01 * (1 + step % 7) for step in range(steps)]
    expected, _ = train(cls, flat, steps, lr, rho)

    model = network()
    settings = {"rho": torch.tensor(rho[0]).cuda(), "lr": torch.tensor(lr[0]).cuda()}
    opt = cls(model.parameters(), SGD, momentum=0.9, fused=True, flat=flat, **settings)
    data = list(batches(steps))
    inputs, labels = data[0][0].clone(), data[0][1].clone()
    closure = closure_of(opt, model, inputs, labels, set_to_none=not flat)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    for step in range(steps):
        inputs.copy_(data[step][0])
        labels.copy_(data[step][1])
        opt.param_groups[0]["lr"].fill_(lr[step])
        opt.param_groups[0]["rho"].fill_(rho[step])
        if step < warm_up:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                opt.step(closure)
            torch.cuda.current_stream().wait_stream(stream)
        else:
            if step == warm_up:
                with torch.cuda.graph(graph):
                    opt.step(closure)
            graph.replay()
    assert opt.skipped_steps == 0
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("flat", [False, True])
def test_a_graph_with_a_gradient_that_is_not_finite_keeps_the_weights_and_counts(flat):
    model = network()
    opt = SAM(model.parameters(), SGD, lr=0.1, momentum=0.9, fused=True, flat=flat)
    inputs, labels = next(batches(1))
    closure = closure_of(opt, model, inputs, labels, set_to_none=not flat)
    for _ in range(3):
        opt.step(closure)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step(closure)
    before = [w.detach().clone() for w in model.parameters()]
    good = inputs.clone()
    inputs.fill_(float("nan"))
    graph.replay()
    assert opt.skipped_steps == 1
    assert all(map(torch.equal, model.parameters(), before))
    inputs.copy_(good)
    graph.replay()
    assert opt.skipped_steps == 1
    assert all(torch.isfinite(w).all() for w in model.parameters())


@pytest.mark.parametrize("flat", [False, True])
def test_extra_memory_on_the_device_is_one_copy_of_the_weights(flat):
    params = [nn.Parameter(torch.randn(512, 512, device="cuda")) for _ in range(8)]
    size = sum(w.nbytes for w in params)
    opt = SAM(params, SGD, lr=0.0, fused=True, flat=flat)
    grads = [torch.randn_like(w) for w in params]

    def closure():
        for w, grad in zip(params, grads, strict=True):
            w.grad = grad
        return torch.zeros(())

    start = torch.cuda.memory_allocated()
    opt.step(closure)
    kept = torch.cuda.memory_allocated() - start
    assert size <= kept <= (1 + flat) * size + 1_000_000
    torch.cuda.reset_peak_memory_stats()
    opt.step(closure)
    assert torch.cuda.max_memory_allocated() - start <= kept + 1_000_000
