"""SAM, ASAM and average SAM beside `torch.optim`.

Top: the three optimisers, which hold settings, groups and state. Below: parts of a step. The mathematics is in
`samlib.perturbation`, flat buffers are in `samlib.flat`.

Order of the closure calls in `step`, each call a *pass*:

==================================== ==========================================================================
call                                 passes
==================================== ==========================================================================
step(closure)                        closure at w; closure at w + eps
step([c0, c1, ...]) (mSAM)           c0 at w; c0 at w + eps0; c1 at w; c1 at w + eps1; ...
step(c, ascent_closure=a) (n-SAM)    a at w; c at w + eps
step([c0, c1], ascent_closure=a)     a at w; c0 at w + eps; c1 at w + eps
inner_steps=3                        the ascent closure at w and at two intermediate points; the descent at w + eps
AverageSAM                           each closure once, at w + eps
rho = 0, or between two ascents      each closure once, at w: the base optimiser's step, bit for bit
==================================== ==========================================================================

Inside a closure `opt.at_perturbed_point` says whether the weights are perturbed, and `opt.in_second_pass` whether this
is a further pass after one at w. They differ for AverageSAM, whose only pass is perturbed. The second is what batch
norm has to know (`samlib.batchnorm.second_pass`).

Speed. On a GPU a step waits for the device once for each ascent and once more, to learn whether gradients are finite;
with `fused=True` for the base optimiser, and no GradScaler, it never does. `SAM(flat=True)` makes the number of
operations independent of the number of tensors, `samlib.shards.Shards` runs the shards of mSAM side by side. `lr` and
`rho` may be tensors without axes on the device, which schedulers change in place (a number is frozen in a graph): then
a whole step can be captured in one `torch.cuda.CUDAGraph`, after two or more steps of warm-up, with a fused base
optimiser (Adam's also `capturable`), `ascent_every=1`, without `second_order` or a GradScaler; for AverageSAM its
`generator` has to be registered with the graph. `samlib.graph` does this.
With torch 2.15 (2.11 cannot; those between were not tried) `torch.compile(opt.first_step, fullgraph=True)` and the same
of `second_step` work from the second step on (with `flat`, clear gradients by `zero_grad(set_to_none=False)`; hooks of
the base optimiser are not called).
"""

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter as preserve_version
from torch.optim import Optimizer

from samlib.errors import InputError
from samlib.flat import DifferentStatesError, FlatBuffers, Member, own_state
from samlib.perturbation import (
    Radius,
    TensorFilter,
    add_quotient_,
    dual_vector,
    global_norm,
    inverse,
    multiplied,
    multiply_,
    project,
    scales,
    stretch,
    times,
    wide_dtype,
)

Closure = Callable[[], Tensor | float]
Pass = Callable[[], Tensor | float]  # runs one or more closures and leaves a gradient


class SAM(Optimizer):
    r"""Sharpness-aware minimisation around any base optimiser.

    Each step takes two gradients: it climbs by eps to a worse point nearby, takes the gradient there, goes back, and
    hands that gradient to the base optimiser. So it costs about two of the base optimiser's steps.

    .. math::
        \epsilon &= \rho \, T\, \operatorname{sign}(h) \left( |h| / \|h\|_q \right)^{q-1},
            \qquad h = T \nabla L(w), \quad 1/p + 1/q = 1 \\
        w &\leftarrow \text{base optimiser applied to } w \text{ with the gradient } \nabla L(w + \epsilon)

    eps maximises the linearised loss over the ball ||T^-1 eps||_p <= rho. T = 1 for SAM, |w| + eta for ASAM. For p = 2
    and T = 1, eps = rho g / ||g||. There is one norm over all perturbed tensors. Weight decay belongs to the base
    optimiser: it acts at w and does not enter eps.

    The weights are restored from a copy, bit for bit, also when a closure raises. A zero gradient gives a zero
    perturbation; a tensor whose gradient is None in the first pass is not perturbed. If the norm of an ascent gradient
    or an entry of the descent's is not finite, the weights stay at w, neither the closures that remain nor the base
    optimiser are called, and `skipped_steps` grows by one. On a GPU with a fused base optimiser nobody waits to know:
    the remaining closures are called, at weights that are not finite either, and the optimiser's kernel skips. Batch
    norm's running statistics are then lost, if such a pass updates them ("frozen" in `samlib.batchnorm` does not).

    Args:
        params: parameters, named parameters or groups, as for every torch optimiser; dense, real, on one device. A
            group may have its own `rho`; with rho 0 it is trained, but neither perturbed nor part of the norm.
        base_optimizer: class or factory, called as `base_optimizer(groups, **base_kwargs)`. It shares `param_groups`
            and `state` with this object, so schedulers may be given either of the two.
        rho: radius of the perturbation, >= 0: the length of eps as one vector over all weights, or, for ASAM, relative
            to each weight. The third argument is rho, not lr. The papers use 0.05 to 0.2 for SAM and 0.5 to 2 for ASAM.
        p: norm of the ball, 1 < p <= inf.
        adaptive: scale by T = |w| + eta (ASAM).
        eta: added to |w|, >= 0, in units of the weights.
        normalize: False leaves the division by the norm out; for p = 2, eps = rho T^2 g (the form that the theory of
            behdin2023 assumes).
        inner_steps: ascent steps, each of length rho followed by a projection on the ball; 1 is SAM. More than one
            keeps one more copy of the weights during the ascent.
        ascent_every: perturb in the first of every so many steps; the others are steps of the base optimiser.
        second_order: differentiate through eps as well, for the exact gradient of L(w + eps(w)); p at most 2, or inf.
            The closure then returns the loss and does not call backward. Refused for DistributedDataParallel,
            whose reducer does not see the extra term.
        perturb_filter: f(tensor) -> bool, which tensors are perturbed and enter the norm; default all.
        scale_filter: f(tensor) -> bool, which tensors ASAM scales, with T = 1 for the others; default all. Filters are
            asked when the optimiser is made or its groups change, not at every step.
        norm_eps: added to the norm, >= 0.
        flat: keep weights, gradients and the state of an elementwise base optimiser (SGD, Adam, ...) in contiguous
            buffers (`samlib.flat`): the same step with a number of operations that does not grow with the number of
            tensors. The parameters' data become views of the buffers at the first step. Fastest with
            `zero_grad(set_to_none=False)` in the closure. `flat` turns False by itself when a pass reaches some tensors
            and not others. Not with second_order.
        **base_kwargs: for the base optimiser.

    Attributes:
        base_optimizer: the wrapped optimiser; this object steps it. A step pre-hook on it sees the gradient that is
            stepped on, unscaled: the place to clip it. (A hook on this object sees gradients of the step before.)
        skipped_steps: number of steps skipped because of a gradient that was not finite.

    Raises:
        InputError: a setting outside its range, settings that exclude each other, sparse or complex parameters, a base
            optimiser that maximises or that calls closures itself (LBFGS).

    Source: foret2021, equation 2 and algorithm 1 (SAM), C.4 (second order), C.6 (inner steps); behdin2023, equations 4
    to 6 (mSAM). Where they leave a choice, it is an argument here.

    By themselves both passes update batch norm's running statistics, and dropout draws new masks in the second: see
    `samlib.batchnorm.second_pass` and `replay_rng`. After a step `.grad` holds the gradient that was stepped on.

    Example::

        opt = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        for inputs, targets in batches:
            def closure():
                opt.zero_grad()  # here, not after the step: the closure runs twice
                loss = loss_fn(model(inputs), targets)
                loss.backward()
                return loss
            loss = opt.step(closure)
    """

    _step_supports_amp_scaling = True  # GradScaler.step then leaves a mark, by which `step` knows that it was called so

    _has_ascent = True

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.05,
        *,
        p: float = 2.0,
        adaptive: bool = False,
        eta: float = 0.0,
        normalize: bool = True,
        inner_steps: int = 1,
        ascent_every: int = 1,
        second_order: bool = False,
        perturb_filter: TensorFilter | None = None,
        scale_filter: TensorFilter | None = None,
        norm_eps: float = 0.0,
        flat: bool = False,
        **base_kwargs: Any,
    ) -> None:
        if isinstance(base_optimizer, Optimizer):
            raise InputError(
                "base_optimizer is an optimizer already: pass its class, and its settings by keyword, or use "
                f"{type(self).__name__}.around(optimizer)"
            )
        self.p, self.adaptive, self.eta, self.normalize, self.norm_eps = float(p), adaptive, eta, normalize, norm_eps
        self.inner_steps, self.ascent_every, self.second_order = inner_steps, ascent_every, second_order
        self.perturb_filter, self.scale_filter = perturb_filter, scale_filter
        self.flat = flat
        self._check_settings()
        self._now = _Now()
        self._layout: _Layout | None = None
        self._copied: list[Tensor] = []
        self._copies: list[Tensor] = []
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        _check_base(self.base_optimizer)
        for group in self.base_optimizer.param_groups:
            _check_group({"rho": rho, **group})
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state
        self.defaults = {**self.base_optimizer.defaults, "rho": rho}
        self._check_filters()

    @classmethod
    def around(cls, base_optimizer: Optimizer, *arguments: Any, **settings: Any) -> Self:
        """Wraps an optimiser that has been at work, or that of another of these classes, and goes on with its momentum,
        its groups and its schedulers: for a hybrid that changes its method at some step.

        ::

            sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            ...                                             # the first half of training
            opt = SAM.around(sgd, rho=0.05)                 # then SAM
            opt = ASAM.around(opt.base_optimizer, rho=0.5)  # and so on

        Args:
            base_optimizer: an optimiser of torch, not to be stepped by itself any more.
            *arguments, **settings: this class's own, from `rho` on, which goes to all groups.

        Raises:
            InputError: as the class.
        """
        if not isinstance(base_optimizer, Optimizer):
            raise InputError(f"base_optimizer = {base_optimizer!r}: around() takes an optimizer, not its class")
        if isinstance(base_optimizer, SAM):
            raise InputError("base_optimizer is a SAM already: pass its `base_optimizer`")

        def existing(_: Any, **base_kwargs: Any) -> Optimizer:
            for name in base_kwargs:
                raise InputError(f"{name} is no setting of {cls.__name__}: set it in the optimizer's param_groups")
            return base_optimizer

        groups = [
            {name: value for name, value in group.items() if name != "rho"} for group in base_optimizer.param_groups
        ]
        opt = cls(groups, existing, *arguments, **settings)
        for group in opt.param_groups:
            group["rho"] = opt.defaults["rho"]
        opt.state.update(own_state(opt.state))
        opt._now.base_has_stepped = bool(opt.state)
        return opt

    # ------------------------------------------------------------------------------------------------ stepping

    @torch.no_grad()
    def step(
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        weights: Sequence[float] | None = None,
        ascent_closure: Closure | None = None,
        scaler: torch.amp.GradScaler | None = None,
        no_sync: Callable[[], AbstractContextManager] | None = None,
        replay_rng: bool = False,
    ) -> Tensor | float:
        """One step. The table at the top of `help(samlib.optim)` gives the order in which the closures are called.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss, as for
                `torch.optim.LBFGS`. A list of closures, one per shard of the mini-batch, is mSAM: each shard has its
                own ascent, and the base optimiser gets the mean of the shards' gradients. A list of one is SAM, bit
                for bit. `samlib.shards.Shards` makes such a list, and may run it side by side: not with an
                `ascent_closure`, `no_sync` or `replay_rng`.
            weights: of the shards in that mean: positive numbers, for example shard sizes, which are divided by their
                sum. Default equal, or those of a `samlib.shards.Shards`.
            ascent_closure: gives the ascent its own data. There is then one ascent, shared by all shards.
            scaler: closures call `scaler.scale(loss).backward()` and return the unscaled loss; both passes are unscaled
                here, and the caller calls `scaler.update()` after the step. Where a gradient is not finite on either
                pass the step is skipped and the scaler told so. This takes the place of `scaler.step(opt)`. Not with
                `Shards`.
            no_sync: `ddp_model.no_sync`. The ascent then uses this process's gradient alone and only the descent is
                averaged over processes. A process whose ascent is not finite makes all of them skip the step.
            replay_rng: run every later pass from the state of torch's generators at the first, so that dropout draws
                the same masks. Generators of Python and NumPy are not replayed.

        Returns:
            The loss at w, detached: the weighted mean over shards, or that of `ascent_closure`. For AverageSAM the loss
            at w + eps. If the step is skipped in an ascent, the loss of that ascent.

        Raises:
            InputError: no closure, a closure that returns no loss, weights that do not fit, options that exclude each
                other, a sparse gradient.
            RuntimeError: called between `first_step` and `second_step`.
        """
        self._check_not_called_by_scaler()
        closures = _closure_list(closure)
        is_shards = hasattr(closure, "gradients_at_w")
        if is_shards and scaler is not None:
            raise InputError("scaler with Shards, whose closures do not scale the loss: write the closures yourself")
        shares = _shares(closure.weights if is_shards and weights is None else weights, len(closures))
        self._check_step_options(ascent_closure, scaler, no_sync)
        if self._now.first_step_was_finite is not None:
            raise RuntimeError(
                "step() was called between first_step() and second_step(): finish with second_step(), or go back with "
                "cancel_step()"
            )
        self._restore()  # in case an interrupt fell into the restoring of the step before
        self._prepare()
        self._now.norms.clear()
        self._now.is_first_pass, self._now.scaler = True, scaler
        passes = [partial(self._evaluate, one) for one in closures]
        shard = partial(self._shard, scaler=scaler, no_sync=no_sync, replay_rng=replay_rng)
        at_once = is_shards and closure.at_once and self._has_ascent and no_sync is None and not replay_rng
        try:
            if not self._ascends():
                loss = self._mean(passes, shares)
            elif ascent_closure is not None:
                loss = shard(ascent_closure, partial(self._mean, passes, shares))
            elif at_once and (found := self._all_at_once(closure, shares)) is not None:
                loss = found
            else:
                loss = self._mean([partial(shard, *pair) for pair in zip(closures, passes, strict=True)], shares)
        except _NotFiniteError as stopped:
            self._finish(False, scaler)
            return stopped.loss
        self._finish(True, scaler)
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Perturbs the weights along the present gradients: the ascent of the two-step form.

        ::

            loss_fn(model(inputs), targets).backward()
            opt.first_step(zero_grad=True)
            loss_fn(model(inputs), targets).backward()
            opt.second_step(zero_grad=True)

        The weights after the two are those after `step(closure)`. Gradients must be cleared in between, here or by the
        caller: what is left in them has no meaning. Nothing is perturbed where `step` would make a step of the base
        optimiser. There is no form of this for a GradScaler: use `step(closure, scaler=scaler)`.

        Raises:
            InputError: the optimiser was made with `second_order` or more than one of `inner_steps`.
            RuntimeError: called twice without `second_step`.
        """
        if self.second_order or self.inner_steps > 1:
            raise InputError("second_order and inner_steps > 1 need more gradients: use step(closure)")
        if self._now.first_step_was_finite is not None:
            raise RuntimeError(
                "first_step() was called twice without second_step(): finish with second_step(), or go back with "
                "cancel_step()"
            )
        self._prepare()
        self._gather()
        finite = True
        if self._ascends():
            self._now.norms.clear()
            self._save(self._targets(self._layout.members))
            finite = self._climb()
            if not finite:  # as in `step`: if processes average the gradients that come, all of them shall skip
                self._now.poison = _poison(self.unperturbed())
        self._now.first_step_was_finite = finite
        torch.clear_autocast_cache()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Restores the weights and steps with the present gradients. Counts as `step` for schedulers.

        Raises:
            RuntimeError: called without `first_step`.
            InputError: a sparse gradient; the weights are then back at w.
        """
        if self._now.first_step_was_finite is None:
            raise RuntimeError("second_step() was called without first_step()")
        finite, norms = self._now.first_step_was_finite, list(self._now.norms)
        self._gather()
        self.cancel_step()
        self._now.norms.extend(norms)
        self._finish(finite, None)
        self._opt_called = True  # the mark by which a scheduler knows that the optimiser stepped before it
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def cancel_step(self) -> None:
        """Undoes `first_step`: the weights are back at w and no step is made. For the two-step form, where something
        went wrong in between; does nothing otherwise."""
        if self._now.poison is not None:
            self._now.poison.close()
            self._now.poison = None
        self._restore()
        self._now.first_step_was_finite = None
        self._now.norms.clear()

    @torch.no_grad()
    def perturbation(self) -> list[Tensor]:
        """The eps that the present gradients give, without a step and without a trace in this object.

        Returns:
            One tensor per parameter, in the order of `param_groups`; zeros for what is not perturbed. float32 for
            parameters of lower precision.
        """
        self._prepare()
        pairs = self._targets(self._layout.parameters)
        eps: dict[Tensor, Tensor] = {}
        if pairs:
            weights, rho = zip(*pairs, strict=True)
            scale = self._scales(weights)
            u, _ = self._direction(weights, self._gradients(weights), scale)
            eps = dict(zip(weights, stretch(u, scale, rho), strict=True))
        return [eps[w] if w in eps else torch.zeros_like(w) for w in self._params()]

    @property
    def at_perturbed_point(self) -> bool:
        """True while the weights are perturbed: in a closure, in a pass at a point other than w."""
        return self._now.saved is not None or self._now.has_perturbed_shards

    @property
    def in_second_pass(self) -> bool:
        """True in every pass that follows a pass at w in the same step. AverageSAM has none."""
        return self.at_perturbed_point

    def unperturbed(self) -> dict[Tensor, Tensor]:
        """The copies at w of the tensors that are perturbed at present, by parameter; empty while none is. The next
        perturbation overwrites them."""
        if self._now.saved is None:
            return {}
        weights, _, at_w, buffers = self._now.saved
        return dict(zip(weights, at_w, strict=True) if buffers is None else buffers.by_parameter(weights, at_w))

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because of a gradient that was not finite. Waits for the device."""
        return self._now.skipped + (0 if self._now.skipped_on_device is None else int(self._now.skipped_on_device))

    @property
    def has_only_skipped(self) -> bool:
        """Whether steps were skipped and none has been made, so that the base optimiser has no state yet. Does not wait
        for the device."""
        return self._now.skipped > 0 and not self._now.base_has_stepped

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`. With `flat`, `set_to_none=False` is one operation and the next
        backward pass adds straight into the buffer; a tensor it does not reach then has a gradient of 0, not None."""
        buffers = None if self._layout is None else self._layout.buffers
        if set_to_none or buffers is None or not buffers.clear():
            super().zero_grad(set_to_none)

    def scratch(self) -> list[Tensor]:
        """Memory of this object that a step writes to and no later step reads: a graph that has captured a step has to
        keep it, since this object may take other tensors."""
        buffers = None if self._layout is None else self._layout.buffers
        return [*self._copies, *([] if buffers is None else buffers.gradients())]

    # ---------------------------------------------------------------------------------------------- groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the group may have its own `rho`."""
        group = {"rho": self.defaults["rho"], **param_group}
        if not isinstance(group["params"], Tensor):
            group["params"] = list(group["params"])
        _check_group(group)
        if hasattr(self, "base_optimizer"):
            self.base_optimizer.add_param_group(group)
            self._now.base_has_stepped = False  # the new tensors have no momentum yet
        else:  # within the constructor
            super().add_param_group(group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimiser's state (its momentum) and groups, and this object's counters. Holds no weights."""
        found = super().state_dict()
        return {**found, "state": own_state(found["state"]), "sam": self._own_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave: groups (lr, rho, ...), momentum and counters. The other settings are the
        constructor's. The state of a bare base optimiser is taken too: its groups get the constructor's rho, and
        the counters stay.

        Raises:
            RuntimeError: called between `first_step` and `second_step`.
            InputError: a state of another class.
        """
        if self._now.first_step_was_finite is not None:
            raise RuntimeError(
                "load_state_dict() was called between first_step() and second_step(): cancel_step() first"
            )
        self._check_own_state(state_dict.get("sam", {}))
        super().load_state_dict(state_dict)
        if "sam" in state_dict:
            self._load_own_state(state_dict["sam"])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("rho", self.defaults["rho"])
        # shares the new objects again, and lets the base optimiser fill in what an older version of it did not save
        self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})
        self._layout, self._copied, self._copies, self._now.base_has_stepped = None, [], [], bool(self.state)

    def __getstate__(self) -> dict[str, Any]:
        # For copy.deepcopy and pickle. A scheduler leaves a `step` of its own behind, bound to this object; and a copy
        # of a parameter is no view of a flat buffer.
        left_out = {"step", "_layout", "_copied", "_copies"}
        kept = {name: value for name, value in self.__dict__.items() if name not in left_out}
        state = self.state.copy()
        state.update(own_state(self.state))
        return {**kept, "state": state}

    def _own_state(self) -> dict[str, Any]:
        return {"steps": self._now.steps, "skipped_steps": self.skipped_steps}

    def _check_own_state(self, state: dict[str, Any]) -> None:
        pass

    def _load_own_state(self, state: dict[str, Any]) -> None:
        self._now.steps, self._now.skipped = state["steps"], state["skipped_steps"]
        if self._now.skipped_on_device is not None:
            self._now.skipped_on_device.zero_()

    # ---------------------------------------------------------------------------------------------- ascent and descent

    def _shard(
        self,
        ascent: Closure,
        descent: Pass,
        *,
        scaler: torch.amp.GradScaler | None,
        no_sync: Callable[[], AbstractContextManager] | None,
        replay_rng: bool,
    ) -> Tensor | float:
        """One ascent and the descent where it ends: leaves the descent's gradients, returns the loss at w."""
        rewind = _rewinder(self._device() if replay_rng else None)
        if self.second_order:
            return self._second_order_shard(ascent, descent, rewind)

        def local_pass() -> Tensor | float:
            with nullcontext() if no_sync is None else no_sync():
                return self._evaluate(ascent)

        def later_pass() -> None:
            rewind()
            local_pass()

        loss = local_pass()
        with self._kept(self._targets(self._layout.members)):
            unscale = None if scaler is None else scaler.scale(torch.ones((), device=self._device())).reciprocal()
            finite = self._climb(later_pass, unscale)
            if not finite and no_sync is None:
                raise _NotFiniteError(loss)
            rewind()
            # The other processes wait in the descent's average, so this one takes part in it, with a gradient of NaN:
            # then all of them skip the step.
            with nullcontext() if finite else _poison(self.unperturbed()):
                descent()
        return loss

    def _all_at_once(self, shards: Any, shares: Sequence[float]) -> Tensor | None:
        """Both passes of a `samlib.shards.Shards` for all shards together, each with its own eps in between. Leaves the
        mean of the gradients, returns that of the losses at w; None if it turns out that they cannot."""
        trained = [member.tensor for member in self._layout.parameters if member.tensor.requires_grad]
        super().zero_grad()
        first_pass = shards.gradients_at_w(trained)
        if first_pass is None:
            return None
        losses, grads = first_pass
        _dense([one for of_all in grads for one in ([of_all] if isinstance(of_all, Tensor) else of_all)])
        loss = sum(share * one for share, one in zip(shares, losses.unbind(), strict=True))
        weights, rho = map(list, zip(*self._perturbable(self._layout.parameters), strict=True))
        scale, of = self._scales(weights), dict(zip(trained, grads, strict=True))
        eps = []
        for gradient in zip(*(of[w] for w in weights), strict=True):
            u, norm = self._direction(weights, gradient, scale)
            if not self._is_finite(norm):
                raise _NotFiniteError(loss)
            eps.append(stretch(u, scale, rho))
        of_all = dict(zip(weights, zip(*eps, strict=True), strict=True))
        self._now.has_perturbed_shards = True
        try:
            means = shards.mean_gradients(trained, [of_all.get(w) for w in trained], shares)
        finally:
            self._now.has_perturbed_shards = False
        if means is None:
            return None
        for w, mean in zip(trained, means, strict=True):
            # with the strides of w, as autograd makes them: fused kernels go by memory, and vmap loses channels_last
            w.grad = mean if mean is None or mean.stride() == w.stride() else torch.empty_like(w).copy_(mean)
        self._gather()
        return loss

    def _climb(self, later_pass: Pass | None = None, unscale: Tensor | None = None) -> bool:
        """Moves the saved weights from w to w + eps, on the gradients there are and, for further inner steps, on those
        that `later_pass` makes. False, at once, if a gradient is known not to be finite."""
        weights, rho, at_w, _ = self._now.saved
        if not weights:
            return True
        scale = self._scales(weights)
        if self._climbs_in_place and all(w.dtype.itemsize >= 4 for w in weights):
            return self._climb_in_place(weights, self._gradients(weights, unscale), scale, rho)
        u: list[Tensor] = []
        for inner_step in range(self.inner_steps):
            if inner_step:
                later_pass()
            direction, norm = self._direction(weights, self._gradients(weights, unscale), scale)
            if not self._is_finite(norm):
                return False
            if inner_step:
                direction = project(torch._foreach_add(u, direction), self.p)
                torch._foreach_copy_(weights, at_w)
            u = direction
            torch._foreach_add_(weights, stretch(u, scale, rho))
        return True

    def _climb_in_place(
        self, weights: list[Tensor], grads: list[Tensor], scale: list[Tensor | None], rho: list[Radius]
    ) -> bool:
        """The same for p = 2 and one inner step, without memory of its own but for T: it works in the gradients."""
        multiply_(grads, scale)
        norm = global_norm(grads)
        multiply_(grads, scale)
        if self._waits():
            length = norm.item()
            if not math.isfinite(length):
                return False
            # a norm too small to invert belongs to gradients of 0, which anything else divides
            divisor = max(length, torch.finfo(norm.dtype).tiny) if self.normalize else 1.0
        else:
            self._now.norms.append(norm)
            # fmax, for a norm that is NaN would divide the gaps of a flat buffer, which stay 0, too
            divisor = torch.fmax(norm, self._now.tiny[norm.dtype]) if self.normalize else torch.ones_like(norm)
        add_quotient_(weights, grads, divisor + self.norm_eps if self.norm_eps else divisor, rho)
        return True

    @property
    def _climbs_in_place(self) -> bool:
        return self.p == 2 and self.inner_steps == 1

    def _is_finite(self, norm: Tensor) -> bool:
        """Whether the norm of an ascent's gradient is finite. True for now where asking would mean waiting."""
        if self._waits():
            return bool(torch.isfinite(norm))
        self._now.norms.append(norm)
        return True

    def _second_order_shard(self, ascent: Closure, descent: Pass, rewind: Callable[[], None]) -> Tensor:
        """As `_shard`, for the gradient v + (d eps / d w)' v, where v is the gradient at w + eps."""
        pairs = self._perturbable(self._layout.members)
        weights, rho = map(list, zip(*pairs, strict=True))
        with torch.enable_grad():
            self.zero_grad()
            with _without_ddp() if _is_distributed() else nullcontext():
                loss = _loss_of(ascent)
            if any(w.grad is not None for w in weights):
                raise InputError("second_order=True: the closure must return the loss and not call backward()")
            grads = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            scale = self._scales(weights)
            u, norm = self._direction(weights, grads, scale)
            eps = stretch(u, scale, rho)
        if not self._is_finite(norm):
            raise _NotFiniteError(loss.detach())
        # The graph of eps has saved the weights; it is walked only after they are back at w, bit for bit.
        with preserve_version(tuple(weights)), self._kept(pairs):
            torch._foreach_add_(weights, [e.detach() for e in eps])
            rewind()
            descent()
        if norm >= torch.finfo(norm.dtype).tiny:  # where the gradient vanishes eps is 0 and has no derivative
            self._add_second_order_term(weights, eps)
        return loss.detach()

    def _add_second_order_term(self, weights: list[Tensor], eps: list[Tensor]) -> None:
        pairs = [(e, w.grad) for e, w in zip(eps, weights, strict=True) if e.requires_grad and w.grad is not None]
        if not pairs:  # a loss that is linear in the weights
            return
        params = [w for w in self._params() if w.requires_grad]
        outputs, v = zip(*pairs, strict=True)
        for w, term in zip(params, torch.autograd.grad(outputs, params, v, allow_unused=True), strict=True):
            if term is not None:
                w.grad = term if w.grad is None else w.grad + term

    def _evaluate(self, closure: Closure) -> Tensor | float:
        """Runs one pass; its gradients are then in `.grad`. The loss, detached."""
        if not self._now.is_first_pass:
            self._clear_used_gradients()
        self._now.is_first_pass = False
        torch.clear_autocast_cache()  # of casts of the weights where they were, if autocast is around it all
        with torch.enable_grad():
            loss = _loss_of(closure)
            if self.second_order:
                self.zero_grad()
                loss.backward()
        self._gather()
        return loss.detach() if isinstance(loss, Tensor) else loss

    def _clear_used_gradients(self) -> None:
        """For a closure that does not clear them, since whoever calls `step` does so after it."""
        buffers = self._layout.buffers
        if buffers is not None and buffers.are_shown():
            buffers.zero()
        else:
            super().zero_grad()

    def _mean(self, passes: Sequence[Pass], shares: Sequence[float]) -> Tensor | float:
        """Runs the passes, leaves the weighted mean of their gradients and returns that of their losses."""
        if len(passes) == 1:
            return passes[0]()
        total: dict[Tensor, Tensor] = {}
        loss: Tensor | float = 0.0
        for one, share in zip(passes, shares, strict=True):
            buffers = self._layout.buffers
            loss = loss + share * one()
            if self._layout.buffers is not buffers:  # this pass did not reach all tensors
                total = dict(buffers.by_parameter(list(total), list(total.values())))
            _add_gradients(total, [w for w in self._tensors() if w.grad is not None], share)
        for w in self._tensors():
            w.grad = total.get(w)
        return loss

    def _finish(self, ascent_was_finite: bool, scaler: torch.amp.GradScaler | None) -> None:
        """Steps the base optimiser if every gradient of this step was finite."""
        self._now.steps += 1
        buffers = self._layout.buffers
        base = self.base_optimizer if buffers is None else buffers.stand_in(self.base_optimizer)
        if scaler is not None:
            scaler.unscale_(base)  # takes note of an inf, for scaler.update()
        grads = _dense([w.grad for w in self._tensors() if w.grad is not None])
        found_inf = _found_inf([*grads, *self._now.norms], self._now.one)
        waits = self._waits()
        if waits and not (ascent_was_finite and not found_inf):
            self._now.skipped += 1
        else:
            if buffers is not None:
                buffers.before_step(self.base_optimizer)
            if waits:
                base.step()
                self._now.base_has_stepped = True
            else:
                self._step_or_skip_on_device(base, found_inf)
            if buffers is not None:
                buffers.after_step(self.base_optimizer)
        self._now.norms.clear()
        self._now.scaler = None
        torch.clear_autocast_cache()

    def _step_or_skip_on_device(self, base: Optimizer, found_inf: Tensor) -> None:
        """Hands the flag to a fused base optimiser, whose kernel then skips. Any other one steps: the weights are lost,
        and `skipped_steps` tells."""
        self._now.skipped_on_device.add_(found_inf)
        if torch.compiler.is_compiling():
            # torch breaks the graph around `step`; what it wraps is the update alone, without hooks
            inspect.unwrap(type(base).step)(base)
            return
        if self._base_skips:
            base.found_inf = found_inf
        try:
            base.step()
        finally:
            if self._base_skips:
                del base.found_inf

    @property
    def _base_skips(self) -> bool:
        base = self.base_optimizer  # a loaded state may have brought groups that are not fused
        return getattr(base, "_step_supports_amp_scaling", False) and all(g.get("fused") for g in base.param_groups)

    def _waits(self) -> bool:
        """Whether the step asks the device if a gradient is finite, and waits for the answer: not while it is captured
        or compiled, nor where a fused base optimiser can skip by itself. That one's first step waits all the same,
        since torch leaves new momentum uninitialised when it skips; and with a GradScaler, where overflow is normal,
        every step does, so that no pass runs at weights that are not finite."""
        device = self._device()
        if _is_recorded(device):
            return False
        if device.type == "cpu":
            return True
        return not (self._now.base_has_stepped and self._base_skips and self._now.scaler is None)

    # ---------------------------------------------------------------------------------------------- what is perturbed

    def _prepare(self) -> None:
        """Settles what a step works on: the parameters or, with `flat`, the buffers that hold them."""
        if torch.compiler.is_compiling() and self._layout is not None:
            return
        self._share_with_base()
        if self._now.one is None or self._now.one.device != self._device():
            self._now.one = torch.ones((), device=self._device())
            self._now.skipped_on_device = torch.zeros((), device=self._device())
            self._now.tiny = {
                dtype: torch.tensor(torch.finfo(dtype).tiny, dtype=dtype, device=self._device())
                for dtype in (torch.float32, torch.float64)
            }
        groups = [(id(group), *map(id, group["params"])) for group in self.param_groups]
        if self._layout is None or self._layout.groups != groups:
            self._layout = _Layout.of(groups, self._parameters())
        buffers = self._layout.buffers
        if buffers is not None and not self.flat:
            self._give_up_buffers()
        if self.flat and (buffers is None or not buffers.holds(self.state)):
            self._flatten()

    def _share_with_base(self) -> None:
        """Takes over what the base optimiser was given behind this object's back, by a `load_state_dict` of its own."""
        base = self.base_optimizer
        if self.param_groups is not base.param_groups or self.state is not base.state:
            self.param_groups, self.state, self._layout = base.param_groups, base.state, None
            self._now.base_has_stepped = bool(base.state)
        for group in self.param_groups:
            group.setdefault("rho", self.defaults["rho"])

    def _parameters(self) -> list[Member]:
        def chosen(choice: TensorFilter | None, w: Tensor) -> bool:
            return choice is None or bool(choice(w))

        return [
            Member(w, group, chosen(self.perturb_filter, w), chosen(self.scale_filter, w))
            for group in self.param_groups
            for w in group["params"]
        ]

    def _flatten(self) -> None:
        self.state.update(own_state(self.state))
        try:
            buffers = FlatBuffers(self._layout.parameters, self.base_optimizer)
        except DifferentStatesError:
            self.flat, buffers = False, None
        self._layout = _Layout.of(self._layout.groups, self._layout.parameters, buffers)

    def _gather(self) -> None:
        """Brings the gradients of a pass together, or gives the buffers up where it did not reach all tensors."""
        buffers = self._layout.buffers
        if buffers is not None and not buffers.gather():
            self.flat = False
            self._give_up_buffers()

    def _give_up_buffers(self) -> None:
        self.state.update(own_state(self.state))
        self._layout = _Layout.of(self._layout.groups, self._layout.parameters)

    def _ascends(self) -> bool:
        return self._now.steps % self.ascent_every == 0 and len(self._perturbable(self._layout.members)) > 0

    def _params(self) -> list[Tensor]:
        return [w for group in self.param_groups for w in group["params"]]

    def _tensors(self) -> list[Tensor]:
        """What the step works on."""
        return [member.tensor for member in self._layout.members]

    def _device(self) -> torch.device:
        return next((w.device for group in self.param_groups for w in group["params"]), torch.device("cpu"))

    def _perturbable(self, members: Sequence[Member]) -> list[tuple[Tensor, Radius]]:
        """The tensors that may be perturbed, each with its radius."""
        return [
            (w, group["rho"])
            for w, group, perturbed, _ in members
            if perturbed and w.requires_grad and (isinstance(group["rho"], Tensor) or group["rho"] > 0)
        ]

    def _targets(self, members: Sequence[Member]) -> list[tuple[Tensor, Radius]]:
        """The tensors that the present gradients perturb, each with its radius."""
        pairs = [(w, rho) for w, rho in self._perturbable(members) if w.grad is not None]
        _dense([w.grad for w, _ in pairs])
        return pairs

    def _scales(self, weights: Sequence[Tensor]) -> list[Tensor | None]:
        return scales(weights, self.eta, self._layout.scaled.get) if self.adaptive else [None] * len(weights)

    def _gradients(self, weights: Sequence[Tensor], unscale: Tensor | None = None) -> list[Tensor]:
        """What the ascent follows; zero where a further inner step no longer reaches a tensor."""
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        if unscale is not None:
            torch._foreach_mul_(grads, unscale)
        return grads

    def _direction(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], scale: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], Tensor]:
        """u = eps / (rho T), and a norm that is finite if and only if the gradients are."""
        return dual_vector(times(grads, scale), self.p, normalize=self.normalize, norm_eps=self.norm_eps)

    def _save(self, pairs: Sequence[tuple[Tensor, Radius]]) -> None:
        weights = [w for w, _ in pairs]
        if not _fit(self._copies, self._copied, weights):
            self._copied, self._copies = weights, [torch.empty_like(w) for w in weights]
        if weights:
            torch._foreach_copy_(self._copies, weights)
        self._now.saved = _Saved(weights, [rho for _, rho in pairs], self._copies, self._layout.buffers)

    def _restore(self) -> None:
        if self._now.saved is not None and self._now.saved.weights:
            torch._foreach_copy_(self._now.saved.weights, self._now.saved.at_w)
        self._now.saved = None

    @contextmanager
    def _kept(self, pairs: Sequence[tuple[Tensor, Radius]]) -> Iterator[None]:
        """Copies the weights that are to be perturbed and puts them back afterwards, whatever happens."""
        self._save(pairs)
        try:
            yield
        finally:
            self._restore()

    # ---------------------------------------------------------------------------------------------- refusals

    def _check_settings(self) -> None:
        if not self.p > 1:
            raise InputError(f"Invalid p value: {self.p}: it must be above 1 (math.inf is allowed)")
        for name in ("eta", "norm_eps"):
            _check_not_negative(name, getattr(self, name))
        for name in ("inner_steps", "ascent_every"):
            if type(count := getattr(self, name)) is not int or count < 1:
                raise InputError(f"Invalid {name} value: {count}: it must be a whole number of 1 or more")
        if not self.adaptive and (self.eta or self.scale_filter):
            raise InputError("eta and scale_filter act only with adaptive=True: set it, use ASAM, or leave them out")
        if self.inner_steps > 1 and not self.normalize:
            raise InputError("inner_steps > 1 projects on a ball, and normalize=False has none: change one of the two")
        if self.flat and (self.second_order or self.inner_steps > 1):
            raise InputError("flat=True excludes second_order and inner_steps > 1: leave one of them out")
        if self.second_order and (self.inner_steps > 1 or 2 < self.p < math.inf):
            # at p between 2 and inf, d eps / d g is infinite wherever an entry of g is 0
            raise InputError(
                f"second_order=True with inner_steps={self.inner_steps} and p={self.p}: it needs inner_steps=1 and p at"
                " most 2, or inf"
            )

    def _check_filters(self) -> None:
        for name in ("perturb_filter", "scale_filter"):
            if (chosen := getattr(self, name)) and not any(map(chosen, self._params())):
                raise InputError(f"{name} declines all {len(self._params())} tensors: let it return True for some")

    def _check_not_called_by_scaler(self) -> None:
        if hasattr(self, "found_inf"):
            del self.found_inf, self.grad_scale
            raise InputError("scaler.step(opt) cannot scale two passes: call opt.step(closure, scaler=scaler) instead")

    def _check_step_options(self, ascent_closure: Any, scaler: Any, no_sync: Any) -> None:
        if self.second_order and (scaler is not None or no_sync is not None):
            raise InputError("second_order=True excludes scaler and no_sync: leave them out of step()")


class ASAM(SAM):
    r"""Adaptive SAM: `SAM` with `adaptive=True`, in whose ball a weight may move in proportion to its size.

    .. math::
        \epsilon = \rho \, T^2 g / \|T g\|_2, \qquad T = \operatorname{diag}(|w| + \eta), \quad g = \nabla L(w)

    for p = 2; otherwise as for `SAM`.

    Args:
        params, base_optimizer: as for `SAM`.
        rho: radius, relative to the weights.
        eta: added to |w|, in units of the weights; with 0 a weight of exactly 0 is never perturbed.
        **settings: `SAM`'s other keyword arguments (`scale_filter` above all) and those of the base optimiser.

    Raises:
        InputError: as `SAM`.

    Source: Kwon et al. 2021, section 4 and algorithm 1. Their code scales weights and batch-norm gains but no biases;
    davda54/sam, which coldenhoff2022 used, scales every tensor, with eta 0. Every tensor is the default here.

    Example::

        opt = ASAM(model.parameters(), torch.optim.SGD, rho=0.5, scale_filter=lambda w: w.ndim > 1, lr=0.1)
        def closure():
            opt.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            return loss
        loss = opt.step(closure)
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.5,
        *,
        eta: float = 0.01,
        **settings: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, adaptive=True, eta=eta, **settings)


class AverageSAM(SAM):
    r"""Average SAM: the gradient at a random point at distance rho, in place of the worst one.

    .. math::
        \epsilon = \rho \, T z / \|z\|_p, \qquad z \sim N(0, I)

    with T and p as for `SAM`; eps = rho T z where `normalize` is False. Each step, and each shard, draws a new z over
    all perturbed tensors from the optimiser's own generator, whose state is part of `state_dict`. There is one pass, so
    a step costs what one of the base optimiser costs, and batch norm's running statistics are those of perturbed
    weights.

    Args:
        params, base_optimizer: as for `SAM`.
        rho: radius, in units of the weights.
        seed: of the generator, which lives on the device of the parameters. Processes of one job that shall draw
            different perturbations need different seeds.
        **settings: `SAM`'s other keyword arguments and those of the base optimiser.

    Raises:
        InputError: as `SAM`; `inner_steps`, `second_order` and, in `step`, `ascent_closure` and `no_sync`, which need
            an ascent.

    Source: foret2021, C.5; boca2023, section 3, whose printed formula divides by the squared norm and whose code does
    not.

    Example::

        opt = AverageSAM(model.parameters(), torch.optim.SGD, rho=0.5, seed=1, lr=0.1, momentum=0.9)
        def closure():
            opt.zero_grad()
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            return loss
        loss_at_the_perturbed_point = opt.step(closure)
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer],
        rho: float = 0.5,
        *,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(params, base_optimizer, rho, **settings)
        if self.inner_steps > 1 or self.second_order:
            raise InputError("AverageSAM has no ascent: leave inner_steps at 1 and second_order at False")
        self.seed = seed
        self._generator: torch.Generator | None = None

    @property
    def in_second_pass(self) -> bool:
        """False: the only pass of a step is the one at w + eps."""
        return False

    def perturbation(self) -> list[Tensor]:
        """The eps of the next step; its draw is not used up."""
        state = self.generator.get_state()
        try:
            return super().perturbation()
        finally:
            self.generator.set_state(state)

    def _shard(self, ascent: Closure, descent: Pass, **_: Any) -> Tensor | float:
        with self._kept(self._targets(self._layout.members)):
            self._climb()
            return descent()

    _has_ascent = False

    @property
    def _climbs_in_place(self) -> bool:
        return False

    def _targets(self, members: Sequence[Member]) -> list[tuple[Tensor, Radius]]:
        return self._perturbable(members)

    def _gradients(self, weights: Sequence[Tensor], unscale: Tensor | None = None) -> list[Tensor]:
        return []

    def _direction(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], scale: Sequence[Tensor | None]
    ) -> tuple[list[Tensor], Tensor]:
        generator = self.generator
        z = [torch.zeros_like(w, dtype=wide_dtype(w), requires_grad=False) for w in weights]
        for _, part in self._layout.by_parameter(weights, z):  # the same draws with flat buffers as without
            part.normal_(generator=generator)
        norm = global_norm(z, self.p)
        return multiplied(z, inverse(norm, self.norm_eps)) if self.normalize else z, norm

    @property
    def generator(self) -> torch.Generator:
        """The generator of the draws, on the device of the parameters; `state_dict` has its state."""
        if self._generator is None:  # made late: a model may move to its device after the optimiser is made
            self._generator = torch.Generator(self._device()).manual_seed(self.seed)
        return self._generator

    def _own_state(self) -> dict[str, Any]:
        return {**super()._own_state(), "generator": self.generator.get_state()}

    def _check_own_state(self, state: dict[str, Any]) -> None:
        if state and "generator" not in state:
            raise InputError("state_dict is of another class: an AverageSAM's has the state of its generator")

    def _load_own_state(self, state: dict[str, Any]) -> None:
        super()._load_own_state(state)
        self.generator.set_state(state["generator"].cpu())  # a generator's state is a CPU tensor

    def _check_step_options(self, ascent_closure: Any, scaler: Any, no_sync: Any) -> None:
        if ascent_closure is not None or no_sync is not None:
            raise InputError("AverageSAM has no ascent: leave ascent_closure and no_sync out of step()")


# -------------------------------------------------------------------------------------------------- parts of a step


class _NotFiniteError(Exception):
    """Ends a step whose ascent gradient is not finite; `loss` is that of the ascent."""

    def __init__(self, loss: Tensor | float) -> None:
        super().__init__("the ascent gradient is not finite")
        self.loss = loss


class _Saved(NamedTuple):
    """What is perturbed: the weights, their radii and their copies at w."""

    weights: list[Tensor]
    rho: list[Radius]
    at_w: list[Tensor]
    buffers: FlatBuffers | None  # that the weights belong to


@dataclass
class _Now:
    """What changes from step to step. An object of its own, because torch.compile drops changes to an optimiser's
    attributes without a word."""

    steps: int = 0
    base_has_stepped: bool = False
    skipped: int = 0
    skipped_on_device: Tensor | None = None
    saved: _Saved | None = None  # while the weights are perturbed
    is_first_pass: bool = True  # in `step`
    scaler: torch.amp.GradScaler | None = None  # in `step`
    has_perturbed_shards: bool = False  # while shards have weights of their own, at w + eps
    first_step_was_finite: bool | None = None  # between first_step and second_step
    poison: ExitStack | None = None  # likewise
    norms: list[Tensor] = field(default_factory=list)  # of this step's ascents, as far as they were not read
    one: Tensor | None = None  # constants on the device
    tiny: dict[torch.dtype, Tensor] = field(default_factory=dict)


class _Layout(NamedTuple):
    """What a step works on."""

    groups: list[tuple[int, ...]]  # identities of each and of its tensors, by which a change is noticed
    parameters: list[Member]
    members: list[Member]  # the parameters, or the flat buffers in their place
    scaled: dict[Tensor, bool]
    buffers: FlatBuffers | None

    @classmethod
    def of(
        cls, groups: list[tuple[int, ...]], parameters: list[Member], buffers: FlatBuffers | None = None
    ) -> "_Layout":
        members = parameters if buffers is None else buffers.members
        scaled = {member.tensor: member.scaled for member in (*parameters, *members)}
        return cls(groups, parameters, members, scaled, buffers)

    def by_parameter(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
        if self.buffers is None:
            return zip(tensors, values, strict=True)
        return self.buffers.by_parameter(tensors, values)


def _closure_list(closure: Any) -> list[Closure]:
    closures = [closure] if callable(closure) else closure
    if not isinstance(closures, list | tuple) or not closures or not all(map(callable, closures)):
        raise InputError(
            f"closure = {closure!r}: step() needs a function that zeroes the gradients, calls backward and returns the "
            "loss, or a list of them, one per shard (first_step() and second_step() do without)"
        )
    return list(closures)


def _shares(weights: Sequence[float] | None, num_shards: int) -> list[float]:
    sizes = [1.0] * num_shards if weights is None else [float(weight) for weight in weights]
    if len(sizes) != num_shards or not all(0 < size < math.inf for size in sizes):
        raise InputError(f"weights = {sizes}: give one positive number for each of the {num_shards} closures")
    return [size / sum(sizes) for size in sizes]


def _fit(copies: list[Tensor], copied: list[Tensor], weights: list[Tensor]) -> bool:
    """Whether the copies can take these weights in."""
    return (
        len(copied) == len(weights)
        and all(map(operator.is_, copied, weights))
        and [(copy.dtype, copy.shape) for copy in copies] == [(w.dtype, w.shape) for w in weights]
    )


def _loss_of(closure: Closure) -> Tensor | float:
    loss = closure()
    if loss is None:
        raise InputError("closure returned None: end it with `return loss`")
    return loss


def _add_gradients(total: dict[Tensor, Tensor], weights: Sequence[Tensor], share: float) -> None:
    """total += share * gradient; not every shard need reach every tensor."""
    old = [w for w in weights if w in total]
    new = [w for w in weights if w not in total]
    if old:
        torch._foreach_add_([total[w] for w in old], [w.grad for w in old], alpha=share)
    if new:
        total.update(zip(new, torch._foreach_mul([w.grad for w in new], share), strict=True))


def _poison(weights: Iterable[Tensor]) -> ExitStack:
    """Until the result is closed, backward passes give these weights gradients of NaN."""
    poison = ExitStack()
    for w in weights:
        poison.callback(w.register_hook(lambda grad: torch.full_like(grad, math.nan)).remove)
    return poison


@contextmanager
def _without_ddp() -> Iterator[None]:
    """Refuses to call a DistributedDataParallel in this context."""

    def refuse(module: torch.nn.Module, _: Any) -> None:
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            raise InputError(
                "second_order=True with DistributedDataParallel: its reducer does not see the extra term, so processes "
                "would drift apart. Leave second_order out, or average the gradients yourself"
            )

    handle = torch.nn.modules.module.register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _rewinder(device: torch.device | None) -> Callable[[], None]:
    """A function that puts torch's default generators, of the CPU and of `device`, back to where they are now; one that
    does nothing for None."""
    if device is None:
        return lambda: None
    generators: list[tuple[Tensor, Callable[[Tensor], None]]] = [(torch.get_rng_state(), torch.set_rng_state)]
    if device.type != "cpu":
        module = torch.get_device_module(device)
        generators.append((module.get_rng_state(device), partial(module.set_rng_state, device=device)))

    def rewind() -> None:
        for state, set_state in generators:
            set_state(state)

    return rewind


def _found_inf(tensors: Sequence[Tensor], one: Tensor) -> Tensor:
    """1.0 if an entry is not finite, else 0.0, as GradScaler keeps it; in one pass without temporaries."""
    if torch.compiler.is_compiling():  # torch would copy the gradients for the operation below
        return torch.stack([tensor.isfinite().logical_not().any() for tensor in tensors]).any().to(one.dtype)
    found = torch.zeros_like(one)
    for dtype in {tensor.dtype for tensor in tensors}:
        alike = [tensor for tensor in tensors if tensor.dtype == dtype]
        torch._amp_foreach_non_finite_check_and_unscale_(alike, found, one)
    return found


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _is_recorded(device: torch.device) -> bool:
    """Whether the code that runs is being captured in a CUDA graph or compiled, so that nothing may be read."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _dense(grads: list[Tensor]) -> list[Tensor]:
    if any(grad.layout != torch.strided for grad in grads):
        raise InputError("a gradient is sparse: make it dense, for example torch.nn.Embedding(..., sparse=False)")
    return grads


def _check_not_negative(name: str, value: Any) -> None:
    single = isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
    if not single or not 0 <= value < math.inf:
        raise InputError(f"Invalid {name} value: {value!r}: it must be 0 or a positive number")


def _check_base(base: Optimizer) -> None:
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise InputError(f"base_optimizer = {type(base).__name__} calls a closure itself: use one that takes gradients")


def _check_group(group: dict[str, Any]) -> None:
    _check_not_negative("rho", group["rho"])
    if group.get("maximize"):
        raise InputError("maximize=True: SAM climbs what the base optimiser descends. Leave it out and negate the loss")
    params = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
    for param in params:
        tensor = param[1] if isinstance(param, tuple) else param  # named parameters are pairs
        if isinstance(tensor, Tensor) and (tensor.is_complex() or tensor.layout != torch.strided):
            raise InputError(
                f"params holds a tensor of {tensor.dtype} and {tensor.layout}: SAM takes real, dense ones; "
                "use torch.view_as_real or Tensor.to_dense"
            )
