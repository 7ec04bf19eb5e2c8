"""Flat buffers: the weights, gradients and momentum of many tensors in a few pieces of contiguous memory.

An operation on all weights is then one operation on one long tensor, however many tensors a network has. The parameters
stay those the model holds: their data become views of the long tensor, with their own shapes and strides.
"""

import operator
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

ALIGNMENT = 64  # bytes; every view starts at a multiple of it, since kernels load vectors of up to this length

# Their update of an entry depends on that entry's weight, gradient and state alone, so it may run on one long tensor in
# place of many short ones. A subclass may do more than that and is not meant.
ELEMENTWISE = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
}

State = dict[Tensor, dict[str, Any]]

_is_trained, _gradient_of = operator.attrgetter("requires_grad"), operator.attrgetter("grad")
# A loop in C++ over (tensors, addresses, indices), made for torch's own CUDA graphs; None in a torch without it.
_are_at = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)


class DifferentStatesError(Exception):
    """The parameters of a bucket differ in what they should have in common."""


class Member(NamedTuple):
    """A tensor as an optimiser sees it: a parameter, or the long tensor of a bucket of them."""

    tensor: Tensor
    group: dict[str, Any]
    perturbed: bool
    scaled: bool


class Addresses:
    """Where tensors lie in memory. A step asks for those of all parameters once and of their gradients four times."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._indices = list(range(len(tensors)))

    def are_those_of(self, tensors: list[Tensor]) -> bool:
        if _are_at is None:
            return list(map(Tensor.data_ptr, tensors)) == self._addresses
        return _are_at(tensors, self._addresses, self._indices)


class Bucket:
    """Parameters of one group, dtype and treatment as views of one long tensor.

    Attributes:
        tensors: the parameters, in order.
        flat: the long tensor, itself a parameter with `.grad`. What lies between two views is 0 and stays 0.
        gradient: the long tensor that becomes `flat.grad`.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)
        dtype, device = tensors[0].dtype, tensors[0].device
        step, size = ALIGNMENT // dtype.itemsize, 0
        self._offsets = []
        for tensor in tensors:
            self._offsets.append(size)
            size += -(-tensor.numel() // step) * step
        self.flat = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
        self.gradient = torch.zeros(size, dtype=dtype, device=device)
        self._gradient_views = self.views(self.gradient)
        self._gradient_addresses = Addresses(self._gradient_views)
        self._handed_out = self.views(self.gradient)  # others may do with these as they like
        self.shown = False  # by the last pass: whether the parameters' gradients are these views
        for tensor, view in zip(tensors, self.views(self.flat.data), strict=True):
            tensor.data = view.copy_(tensor.data)
        self._addresses = Addresses(self.tensors)

    def views(self, long: Tensor) -> list[Tensor]:
        """The parts of a tensor like `flat` that belong to the parameters, with their shapes and strides."""
        return [
            long.as_strided(tensor.shape, tensor.stride(), offset)
            for tensor, offset in zip(self.tensors, self._offsets, strict=True)
        ]

    def holds(self) -> bool:
        """Whether the parameters still are views of `flat`, all of them trained: a model that was moved or converted
        has new data."""
        return self._addresses.are_those_of(self.tensors) and all(map(_is_trained, self.tensors))

    def gather(self) -> bool:
        """Brings the parameters' gradients together in `flat.grad`; None if no parameter has one.

        Returns:
            False, with nothing done, if some parameters have a dense gradient and others have not.
        """
        self.shown = self._shows()
        if self.shown:
            self._give_gradient()
            return True
        grads = [tensor.grad for tensor in self.tensors]
        if all(grad is None for grad in grads):
            self.flat.grad = None
        elif any(grad is None or grad.layout != torch.strided for grad in grads):
            return False
        else:
            torch._foreach_copy_(self._gradient_views, grads)
            self._give_gradient()
        return True

    def show(self) -> None:
        """Makes the parameters' gradients views of `flat.grad`, so that whoever reads or clips either sees both."""
        if self.flat.grad is None:
            return
        if self.flat.grad is not self.gradient:
            self.gradient.copy_(self.flat.grad)
            self._give_gradient()
        if not self.shown:
            self._show()

    def clear(self) -> bool:
        """Sets the gradients to zero, as views of `flat.grad`.

        Returns:
            False, with nothing done, if they are not such views and the parameters no longer are views either.
        """
        if not self._shows():  # all of them: one may have been replaced
            if not (torch.compiler.is_compiling() or self.holds()):
                return False
            self._show()
        self.zero()
        return True

    def zero(self) -> None:
        """Sets the long gradient to zero."""
        if torch.compiler.is_compiling():  # as a function of the gradient, which the loop that read it can then write
            self.gradient.copy_(torch.where(self.gradient > 0, 0.0, 0.0))
        else:
            self.gradient.zero_()

    def _give_gradient(self) -> None:
        if self.flat.grad is not self.gradient:  # torch.compile takes no assignment, not even one that changes nothing
            self.flat.grad = self.gradient

    def _shows(self) -> bool:
        """Whether the parameters' gradients are the views."""
        if torch.compiler.is_compiling():  # which cannot look at addresses
            return all(tensor.grad is view for tensor, view in zip(self.tensors, self._handed_out, strict=True))
        if not all(map(operator.is_, map(_gradient_of, self.tensors), self._handed_out)):
            return False
        return self._gradient_addresses.are_those_of(self._handed_out)  # data may have been exchanged

    def _show(self) -> None:
        if not self._gradient_addresses.are_those_of(self._handed_out):
            self._handed_out = self.views(self.gradient)
        for tensor, view in zip(self.tensors, self._handed_out, strict=True):
            tensor.grad = view


class FlatBuffers:
    """The members of an optimiser, with buckets in place of the parameters that fit into one.

    A parameter stays by itself if it is frozen, has no axes (its momentum could not be told from a step count), leaves
    gaps in its memory, or shares memory with another.

    Args:
        members: all parameters.
        optimizer: the base optimiser, with the state it has so far.

    Attributes:
        members: buckets first, then the parameters that stay by themselves.

    Raises:
        DifferentStatesError: as after steps that not all parameters took.
    """

    def __init__(self, members: Sequence[Member], optimizer: Optimizer) -> None:
        # with eps = 0 the update of what lies between the views would be 0 / 0
        elementwise = type(optimizer) in ELEMENTWISE and all(group.get("eps") != 0 for group in optimizer.param_groups)
        together, self._alone = _sorted(members)
        joined = [_joined(group, optimizer.state) if elementwise else {} for group in together]  # before any change
        self.buckets = [Bucket([one.tensor for one in group]) for group in together]
        self.members = [
            group[0]._replace(tensor=bucket.flat) for bucket, group in zip(self.buckets, together, strict=True)
        ]
        self.members += self._alone
        self._shown: dict[Tensor, dict[str, int]] = {}
        self._twin = self._make_twin(optimizer, joined) if elementwise else None
        if self._twin is not None:
            self._show_state(optimizer.state)

    def holds(self, state: State) -> bool:
        """Whether parameters and state still are views of the buffers, as far as a look at the first ones tells."""
        return all(bucket.holds() for bucket in self.buckets) and (
            self._twin is None or all(state.get(tensor) is shown for tensor, shown in self._first_states)
        )

    def gather(self) -> bool:
        return all(bucket.gather() for bucket in self.buckets)

    def are_shown(self) -> bool:
        """Whether the gradients of the last pass were made in the buffers."""
        return all(bucket.shown for bucket in self.buckets)

    def gradients(self) -> list[Tensor]:
        """The long tensors that passes write their gradients to."""
        return [bucket.gradient for bucket in self.buckets]

    def clear(self) -> bool:
        """Sets all gradients to zero; False if a bucket cannot (`Bucket.clear`)."""
        if not all(bucket.clear() for bucket in self.buckets):  # its caller then clears them one by one
            return False
        self._zero_alone()
        return True

    def zero(self) -> None:
        """The same right after a pass whose gradients are the buffers', when nobody else can have been there."""
        for bucket in self.buckets:
            bucket.zero()
        self._zero_alone()

    def _zero_alone(self) -> None:
        for member in self._alone:
            if member.tensor.grad is not None:
                member.tensor.grad.zero_()

    def by_parameter(self, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(parameter, its part of the value), for members' tensors and values of their shapes."""
        buckets = {bucket.flat: bucket for bucket in self.buckets}
        for tensor, value in zip(tensors, values, strict=True):
            if tensor in buckets:
                yield from zip(buckets[tensor].tensors, buckets[tensor].views(value), strict=True)
            else:
                yield tensor, value

    def stand_in(self, base: Optimizer) -> Optimizer:
        """The optimiser to step instead of `base`: one with the long tensors for parameters and the settings that
        `base` has now, or, where its update is not elementwise, `base` itself. The parameters' gradients become
        views of the long ones, so that hooks and others find them where they look."""
        for bucket in self.buckets:
            bucket.show()
        if self._twin is None:
            return base
        for group, settings in zip(self._twin.param_groups, base.param_groups, strict=True):
            for name, value in settings.items():
                if name != "params":
                    group[name] = value
        return self._twin

    def before_step(self, base: Optimizer) -> None:
        """Calls the hooks of `base`, which may exchange the gradients."""
        hooks = [] if self._twin is None else list(base._optimizer_step_pre_hooks.values())
        for hook in hooks:
            hook(base, (), {})
        if hooks:
            self.gather()

    def after_step(self, base: Optimizer) -> None:
        """Shows `base` the state, and calls its hooks."""
        if self._twin is None:
            return
        state = self._twin.state
        base.state.update({one.tensor: state[one.tensor] for one in self._alone if one.tensor in state})
        self._show_state(base.state)
        base._opt_called = True  # the mark by which a scheduler knows that the optimiser stepped before it
        for hook in base._optimizer_step_post_hooks.values():
            hook(base, (), {})

    # ------------------------------------------------------------------------------- the state of the base optimiser

    def _make_twin(self, base: Optimizer, joined: Sequence[dict[str, Any]]) -> Optimizer:
        twin = object.__new__(type(base))
        twin.__dict__.update({name: value for name, value in base.__dict__.items() if name != "step"})  # a scheduler's
        twin._optimizer_step_pre_hooks, twin._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        twin.param_groups = [
            {**group, "params": [one.tensor for one in self.members if one.group is group]}
            for group in base.param_groups
        ]
        twin.state = base.state.copy()
        twin.state.clear()
        twin.state.update({one.tensor: base.state[one.tensor] for one in self._alone if one.tensor in base.state})
        for bucket, values in zip(self.buckets, joined, strict=True):
            if values:
                twin.state[bucket.flat] = {name: _whole(bucket, value) for name, value in values.items()}
        return twin

    def _show_state(self, state: State) -> None:
        """Gives each parameter its part of the state as a view; what is one number for all (a step count) is shared."""
        for bucket in self.buckets:
            whole = self._twin.state.get(bucket.flat, {})
            identity = {name: id(value) for name, value in whole.items()}
            if self._shown.get(bucket.flat, {}) == identity:  # all but the first step change the state in place
                continue
            self._shown[bucket.flat] = identity
            parts = {name: bucket.views(value) for name, value in whole.items() if _is_per_entry(value, bucket.flat)}
            for index, tensor in enumerate(bucket.tensors):
                state[tensor] = {name: parts[name][index] if name in parts else whole[name] for name in whole}
        self._first_states = [(bucket.tensors[0], state.get(bucket.tensors[0])) for bucket in self.buckets]


def own_state(state: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
    """The state with a step count of its own for each parameter, as optimisers keep it and as is saved."""
    return {
        index: {name: value.clone() if _is_number(value) else value for name, value in one.items()}
        for index, one in state.items()
    }


def _sorted(members: Sequence[Member]) -> tuple[list[list[Member]], list[Member]]:
    """The members of each bucket, and those that stay by themselves."""
    together: dict[tuple, list[Member]] = {}
    alone = []
    shared = overlapping([member.tensor for member in members])
    for member in members:
        tensor = member.tensor
        # an empty tensor of the same strides: neither gaps nor overlaps within it
        like = torch.empty_like(tensor, device="meta")
        dense = tensor.dim() > 0 and tensor.numel() > 0 and like.stride() == tensor.stride()
        if tensor.requires_grad and dense and tensor not in shared:
            key = (id(member.group), tensor.dtype, tensor.device, member.perturbed, member.scaled)
            together.setdefault(key, []).append(member)
        else:
            alone.append(member)
    return list(together.values()), alone


def overlapping(tensors: Sequence[Tensor]) -> set[Tensor]:
    """Those that share memory with another."""
    found, last, end = set(), None, 0
    for tensor in sorted(tensors, key=Tensor.data_ptr):
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        extent = tensor.itemsize * (1 + sum((size - 1) * stride for size, stride in steps)) if tensor.numel() else 0
        if last is not None and tensor.data_ptr() < end:
            found |= {last, tensor}
        if last is None or tensor.data_ptr() + extent > end:
            last, end = tensor, tensor.data_ptr() + extent
    return found


def _joined(members: Sequence[Member], state: State) -> dict[str, list[Tensor] | Any]:
    """The state of a bucket's parameters by name: a list of tensors, one per parameter, or what all have in common.

    Raises:
        DifferentStatesError: they differ in what they should have in common.
    """
    states = [state.get(member.tensor, {}) for member in members]
    if any(one.keys() != states[0].keys() for one in states):
        raise DifferentStatesError("the parameters of a bucket have different kinds of state")
    joined: dict[str, Any] = {}
    for name, first in states[0].items():
        values = [one[name] for one in states]
        if all(_is_per_entry(value, member.tensor) for value, member in zip(values, members, strict=True)):
            joined[name] = values
        elif all(_equal(value, first) for value in values):
            joined[name] = first.clone() if isinstance(first, Tensor) else first
        else:
            raise DifferentStatesError(f"the parameters of a bucket have a different {name!r}")
    return joined


def _whole(bucket: Bucket, value: Any) -> Any:
    if not isinstance(value, list):
        return value
    long = torch.zeros(bucket.flat.shape, dtype=value[0].dtype, device=bucket.flat.device)
    torch._foreach_copy_(bucket.views(long), value)
    return long


def _is_per_entry(value: Any, tensor: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == tensor.shape


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0


def _equal(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return torch.equal(value, other)
    return type(value) is type(other) and value == other
