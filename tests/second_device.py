# SPDX-License-Identifier: Apache-2.0
"""A device beside the CPU, on a CPU: its tensors and the host's do not mix.

Each of its tensors is a wrapper of a CPU tensor, and operators run on that. As on a card, a CPU
tensor with dimensions beside one of the device in an operator is an error, and so is reading the
device's numbers by ``numpy``. A transfer is a copy. Unlike on a card, pinned memory is plain, work
is done when it is queued, and indexing by a list or by the host's tensor is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

SECOND = torch.device("privateuseone", 0)

_TRANSFERS = ("_to_copy", "to", "copy_", "_local_scalar_dense")
"""What may have operands on both, or a result on the other."""


class OnSecond(torch.Tensor):
    """A tensor of the second device.

    Attributes:
        place: what all of them say that they are on.
        made: told of the memory of each that is made.
    """

    place = SECOND
    made: Callable[[torch.UntypedStorage], None] = staticmethod(lambda storage: None)
    kept: torch.Tensor

    @staticmethod
    def __new__(cls, kept: torch.Tensor) -> OnSecond:
        with torch.inference_mode(False):  # a view of a tensor is of the tensor's kind
            tensor: OnSecond = torch.Tensor._make_wrapper_subclass(
                cls,
                kept.size(),
                strides=kept.stride(),
                storage_offset=kept.storage_offset(),
                dtype=kept.dtype,
                device=OnSecond.place,
            )
        tensor.kept = kept
        cls.made(kept.untyped_storage())
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # What torch does beneath the dispatcher.

    def tolist(self) -> Any:
        return self.kept.tolist()

    def data_ptr(self) -> int:
        return self.kept.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.kept.untyped_storage()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("a tensor of the second device has to be brought to the host first")

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnSecond({self.kept!r})"


class _Mode(TorchDispatchMode):
    """For what has no operand there: a factory that names the device, a transfer to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromHost(TorchFunctionMode):
    """What torch fills on the host with the dispatcher switched off."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and _is_second(kwargs.get("device")):
            del kwargs["device"]
            return func(*args, **kwargs, device="cpu").to(OnSecond.place)
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    given: list[torch.Tensor] = []

    def noted(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            given.append(value)
        return kept(value)

    own_args, own_kwargs = _mapped(noted, args), _mapped(noted, kwargs)
    there = any(isinstance(each, OnSecond) for each in given)
    if there and name not in _TRANSFERS:
        # A number without dimensions may come from the host.
        strangers = [each for each in given if not isinstance(each, OnSecond) and each.ndim]
        assert not strangers, f"{func}: operands on the host and on the second device"
    named = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.device)]
    result_there = _is_second(named[0]) if named else there
    if kwargs.get("pin_memory"):
        own_kwargs["pin_memory"] = False
    result = func(*own_args, **own_kwargs)
    # What was changed in place is returned as it came.
    known = {id(kept(each)): each for each in given}

    def placed(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        same = known.get(id(each))
        if same is not None and isinstance(same, OnSecond) == result_there:
            return same
        if same is not None:  # a transfer that had nothing to do
            each = each.clone()
        return OnSecond(each) if result_there else each

    return _mapped(placed, result)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """What an operator takes or returns, mapped: ``pytree`` takes several times as long."""
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(function, each) for each in value])
    if isinstance(value, dict):
        return {name: _mapped(function, each) for name, each in value.items()}
    return function(value)


def _is_second(device: Any) -> bool:
    return device is not None and torch.device(device).type == OnSecond.place.type


def kept(value: Any) -> Any:
    """A tensor's memory, which is the host's, and the CPU for the device; all else as it is."""
    if isinstance(value, OnSecond):
        return value.kept
    return torch.device("cpu") if isinstance(value, torch.device) and _is_second(value) else value


@contextlib.contextmanager
def second_device() -> Iterator[None]:
    """While it is open, tensors can be made there. torch knows the device from then on."""
    if not hasattr(torch, OnSecond.place.type):
        _setup_privateuseone_for_python_backend()
    with _FromHost(), _Mode():
        yield
