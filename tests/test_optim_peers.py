"""SAM and ASAM against pytorch_optimizer's, the peer that is installable: trainings of a small network, 20 steps.

Where the two differ, each difference is a test of its own:

- Its `step` expects a backward pass before it, returns None and never sees the loss at w.
- It adds `perturb_eps`, 1e-12 by default, to the norm; ours adds nothing. `norm_eps` is the same term.
- It squares and adds the norm in float32 whatever the parameters' type. In float64 its radius, and with it each
  perturbation, is off by up to 1.2e-7 of itself, which moves the weights of these trainings by 2e-9.
- Its `adaptive=True` scales every tensor, biases too, by |w|: our ASAM with eta 0 and no filter.
- It has no notion of batch norm's second pass: here the closures decide, as they do for ours.
- Where the second pass gives no gradient its weights are restored in 4.1, as ours are; a group with rho 0 still enters
  its norm, and does not ours.
"""

import copy
import math

import pytest
import torch
from pytorch_optimizer import SAM as PeerSAM
from test_optim_properties import SGD, all_backends
from torch import nn

from samlib.optim import SAM

# What float32 arithmetic in the peer's norm costs over 20 steps of float64; and float32 rounding, amplified likewise.
FLOAT32_NORM, FLOAT32 = 1e-8, 1e-6


def network(dtype):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(5, 3)).to(dtype)


def examples(seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(16, 1, 6, 6, generator=generator, dtype=torch.float64)
    return inputs.to(dtype), torch.randint(3, (16,), generator=generator)


def closure_of(opt, model, seed):
    inputs, labels = examples(seed, next(model.parameters()).dtype)

    def closure():
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    return closure


def train(opt, model, steps=20):
    for seed in range(steps):
        closure = closure_of(opt, model, seed)
        if isinstance(opt, PeerSAM):
            closure()
        opt.step(closure)


def pair(settings, peer_settings, dtype, backend, base=SGD, **hyper):
    """Two equal networks, trained by ours and by the peer's."""
    ours = network(dtype)
    theirs = copy.deepcopy(ours)
    train(SAM(ours.parameters(), base, **settings, **hyper, **backend), ours)
    train(PeerSAM(theirs.parameters(), base, **peer_settings, **hyper), theirs)
    return ours, theirs


def distance(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


HYPER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


@all_backends
@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "loop"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, FLOAT32_NORM), (torch.float32, FLOAT32)], ids=str)
@pytest.mark.parametrize("adaptive, rho", [(False, 0.1), (True, 0.5)], ids=["SAM", "ASAM"])
def test_a_training_is_the_peers(adaptive, rho, dtype, tolerance, foreach, backend):
    settings = {"rho": rho, "adaptive": adaptive}
    hyper = HYPER | {"foreach": foreach, "nesterov": True}
    ours, theirs = pair(settings, settings, dtype, backend, **hyper)
    for (name, found), expected in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: n + text)
    plain = network(dtype)
    train(SGD(plain.parameters(), **hyper), plain)
    assert distance(ours, plain) > 0.01  # the perturbation is felt far above the tolerance


@all_backends
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.RMSprop], ids=["AdamW", "RMSprop"])
def test_a_training_with_another_base_optimiser_is_the_peers(base, backend):
    settings = {"rho": 0.1}
    ours, theirs = pair(settings, settings, torch.float64, backend, base=base, lr=1e-3)
    assert distance(ours, theirs) < FLOAT32_NORM


@all_backends
def test_the_peers_perturb_eps_is_our_norm_eps(backend):
    ours, theirs = pair(
        {"rho": 0.1, "norm_eps": 0.5}, {"rho": 0.1, "perturb_eps": 0.5}, torch.float64, backend, **HYPER
    )
    assert distance(ours, theirs) < FLOAT32_NORM
    without, _ = pair({"rho": 0.1}, {"rho": 0.1}, torch.float64, backend, **HYPER)
    assert distance(without, theirs) > 1e-4


@all_backends
def test_the_peers_adaptive_is_ours_with_eta_0_and_every_tensor(backend):
    theirs = pair({"rho": 0.5}, {"rho": 0.5, "adaptive": True}, torch.float64, backend, **HYPER)[1]
    for other in ({"eta": 0.01}, {"eta": 0.0, "scale_filter": lambda w: w.ndim > 1}):
        ours = network(torch.float64)
        train(SAM(ours.parameters(), SGD, rho=0.5, adaptive=True, **other, **HYPER, **backend), ours)
        assert distance(ours, theirs) > 1e-4


@all_backends
def test_the_peers_radius_in_float64_has_the_accuracy_of_float32(backend):
    """Ours is exact to float64; its own is not, by less than one rounding of float32."""
    radii = []
    for cls, more in ((SAM, backend), (PeerSAM, {})):
        model = network(torch.float64)
        before = copy.deepcopy(list(model.parameters()))
        opt = cls(model.parameters(), SGD, rho=0.1, lr=0.1, **more)
        closure_of(opt, model, 0)()
        opt.first_step()
        squares = sum((w - old).square().sum().item() for w, old in zip(model.parameters(), before, strict=True))
        radii.append(math.sqrt(squares))
    ours, theirs = radii
    assert ours == pytest.approx(0.1, rel=1e-14)
    assert theirs == pytest.approx(0.1, rel=1.2e-7)
    assert theirs != pytest.approx(0.1, rel=1e-12)


@all_backends
def test_groups_with_their_own_rho_are_the_peers_but_for_rho_0(backend):
    for rho, same in ((0.3, True), (0.0, False)):
        ends = []
        for cls, more in ((SAM, backend), (PeerSAM, {})):
            model = network(torch.float64)
            first, *others = model.parameters()
            groups = [{"params": [first], "rho": rho, "lr": 0.02}, {"params": others}]
            train(cls(groups, SGD, rho=0.1, **HYPER, **more), model)
            ends.append(model)
        assert (distance(*ends) < FLOAT32_NORM) == same


@all_backends
@pytest.mark.parametrize("cls", [SAM, PeerSAM])
def test_without_a_gradient_in_the_second_pass_both_restore(cls, backend):
    w, v = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    opt = cls([w, v], SGD, rho=0.5, lr=0.1, **(backend if cls is SAM else {}))
    (w.sum() + v.sum()).backward()
    opt.first_step(zero_grad=True)
    assert not torch.equal(v, torch.ones(2).double())
    w.sum().backward()
    opt.second_step()
    assert torch.equal(v, torch.ones(2).double())
    torch.testing.assert_close(w.detach(), torch.full((2,), 0.9, dtype=torch.float64))
