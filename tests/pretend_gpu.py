"""A GPU that is not there: tensors that say they are on a device and hold their numbers in main memory.

What is asked of it is computed on the CPU, so a whole run can be made and compared, under the rules that hold for a
GPU's tensors: no operation mixes devices, and none is one that torch's deterministic mode refuses there. What makes the
host wait for the device is counted.

`install` turns a whole process to it, for good: torch cannot take a device back. So it is for processes.fastgrpo.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path

import torch
from plain_varlen import plain_backward, plain_forward
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from fastgrpo.kernels.dense_attention import _plain_forward
from fastgrpo.kernels.varlen_kernels import Sequences, chosen

aten = torch.ops.aten
NAME = "pretended"
MAY_MIX_DEVICES = {aten.copy_.default, aten._foreach_copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
REFUSED_FOR_FLOATS = {aten.cumsum.default, aten.cumsum_.default, aten.histc.default}
"""Of those that torch.use_deterministic_algorithms lists."""
MEMORY = 1 << 37


def _histc(x, *args):  # a CPU has none of integers
    return aten.histc.default(x.double(), *args).to(x.dtype)


def _flash(q, k, v, dropout=0.0, causal=False, debug=False, *, scale):
    out, lse = _plain_forward(q, k, v, causal, scale)
    return out, lse, None, None, q.shape[2], k.shape[2], None, None, None


def _varlen_flash(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale):
    out, lse = plain_forward(*(x.double() for x in (q, k, v)), Sequences(cu_q, cu_k, max_q, max_k), causal, scale)
    return out.to(q), lse.float(), None, None, None


def _varlen_flash_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, offset, *, scale):
    wide = (x.double() for x in (grad, q, k, v, out, lse))
    grads = plain_backward(*wide, Sequences(cu_q, cu_k, max_q, max_k), causal, scale)
    return tuple(grad.to(q) for grad in grads)


INSTEAD = {
    aten.histc.default: _histc,
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._flash_attention_forward.default: _varlen_flash,
    aten._flash_attention_backward.default: _varlen_flash_backward,
}
"""How the CPU computes what a GPU alone has."""
DTYPES = {"auto": torch.float32, "bfloat16": torch.bfloat16}
NUM_WAITS = Path("waits.json")


class OnDevice(Tensor):
    """A tensor on the pretended GPU; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        self = Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device(NAME, 0), **layout)
        self.held = held
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (Tensor.data_ptr, Tensor.untyped_storage, Tensor.tolist):
            Gpu.here.waits["tolist"] += func is Tensor.tolist
            return func(args[0].held)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Gpu.here.compute(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        copied = OnDevice(self.held.clone())
        return nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)

    def __repr__(self):
        return f"OnDevice({self.held!r})"


class Gpu(TorchDispatchMode):
    """Computes what is asked of the device. waits: how often the host waited for it, by operation."""

    here: Gpu

    def __init__(self):
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.compute(func, args, kwargs or {})

    def compute(self, func, args, kwargs):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        ours = [x for x in tensors if isinstance(x, OnDevice)]
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if not ours and to != NAME:
            return func(*args, **kwargs)
        to_host = to == "cpu" or (func is aten.copy_.default and not isinstance(args[0], OnDevice))
        self.waits[func.__name__] += bool(ours) and (func in WAITS or to_host)
        self._check(func, tensors)
        if to == NAME:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        args, kwargs = tree_map(_held, args), tree_map(_held, kwargs)
        result = INSTEAD.get(func, func)(*args, **kwargs)
        if to_host:
            return result
        known = {id(x.held): x for x in ours}
        return tree_map(lambda x: known[id(x)] if id(x) in known else _on_device(x), result)

    def _check(self, func, tensors):
        on_host = [x for x in tensors if not isinstance(x, OnDevice) and x.ndim]
        on_device = len(on_host) < len(tensors)
        if on_host and on_device and func in INDEXING:
            self.waits[f"{func.__name__} with the host's indices"] += 1
        elif on_host and on_device and func not in MAY_MIX_DEVICES:
            raise AssertionError(f"{func}: a tensor of shape {tuple(on_host[0].shape)} is not on the device")
        if func in REFUSED_FOR_FLOATS and tensors[0].is_floating_point():
            raise AssertionError(f"{func}: torch's deterministic mode refuses it on a GPU")


def _held(x):
    return x.held if isinstance(x, OnDevice) else x


def _on_device(x):
    return OnDevice(x) if isinstance(x, Tensor) else x


class _FromNumbers(TorchFunctionMode):
    """torch.tensor and torch.as_tensor make their tensor where no dispatch mode sees it: on the host, then."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == NAME:
            return func(*args, **{**kwargs, "device": "cpu"}).to(NAME)
        return func(*args, **kwargs)


class _Module:
    """What torch asks of a device's module."""

    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    manual_seed_all = set_rng_state = staticmethod(lambda *_: None)
    get_rng_state = staticmethod(lambda *_: torch.empty(0))


def move(model: nn.Module) -> nn.Module:
    """The model's parameters and buffers on the device, in place and as they lie in memory."""
    moved = {id(p): nn.Parameter(OnDevice(p.data), p.requires_grad) for p in model.parameters()}
    for module in model.modules():
        module._parameters.update({n: moved[id(p)] for n, p in module._parameters.items() if p is not None})
        module._buffers.update({n: OnDevice(b) for n, b in module._buffers.items() if b is not None})
    return model


def install() -> None:
    """From now on this process has the device, and fastgrpo computes on it. The waits of each update are noted."""
    from fastgrpo import assemble, learners
    from fastgrpo.kernels.segment_attention import SegmentPlan
    from fastgrpo.learner.torch_learner import TorchLearner
    from fastgrpo.models import hf

    _setup_privateuseone_for_python_backend(NAME, _Module())
    Gpu.here = Gpu()
    Gpu.here.__enter__()
    _FromNumbers().__enter__()
    torch.use_deterministic_algorithms(True)
    load_model, update, make_plan = hf.load_model, TorchLearner.update, SegmentPlan.__init__

    def updated(self, batches, objective):
        batches, before = list(batches), copy.copy(Gpu.here.waits)
        result = update(self, batches, objective)
        with NUM_WAITS.open("a") as file:
            file.write(json.dumps({"batches": len(batches), "waits": Gpu.here.waits - before}) + "\n")
        return result

    def plan(self, segments, device="cpu", share=None, kernel=None):
        make_plan(self, segments, device, share, kernel or chosen())

    SegmentPlan.__init__ = plan
    hf.use_cpu_linear = lambda model: None
    hf.load_model = lambda path, *, device, dtype, **key: move(load_model(path, device="cpu", dtype=dtype, **key))
    learners.device_of = assemble.device_of = lambda config: (NAME, DTYPES[config.cluster.dtype])
    assemble.device_memory = lambda device: MEMORY
    TorchLearner.update = updated
