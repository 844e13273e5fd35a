"""What the tests of the decoder layer's kernels share: one call against its twin in float64, forward and backward."""

import torch

TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative to the largest value of a tensor. Of a rounding in between, where the kernels round as Hugging Face does."""
BACKENDS = [
    ("torch", torch.float64),
    *((backend, dtype) for backend in ("torch", "triton") for dtype in (torch.float32, torch.bfloat16, torch.float16)),
]


def leaf(*shape, dtype, shift=0.0):
    """Numbers in dtype that ask for their gradient."""
    return (torch.randn(*shape) + shift).to(dtype).requires_grad_()


def assert_like_twin(ours, twin, inputs, dtype):
    """ours(*inputs) and twin(*inputs in float64), tensors or tuples of them, and every input's gradient, agree."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    before = [x.detach().clone() for x in inputs]
    outs, expected = as_tuple(ours(*inputs)), as_tuple(twin(*wide))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(as_tuple(ours(*inputs)), outs, strict=True))
    grads = [torch.randn(out.shape, dtype=torch.float64).to(dtype) for out in outs]
    torch.autograd.backward(outs, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    for out, want in zip(outs, expected, strict=True):
        assert out.dtype == dtype
        assert_near(out, want, TOLERANCE[dtype])
    for x, oracle, old in zip(inputs, wide, before, strict=True):
        assert x.grad.dtype == x.dtype
        assert_near(x.grad, oracle.grad, 4 * TOLERANCE[dtype])
        assert torch.equal(x, old)


def as_tuple(out):
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def assert_near(got, want, tolerance):
    assert got.shape == want.shape
    error, scale = (got.double() - want).abs().max(), want.abs().max()
    assert error <= tolerance * scale, f"{error / scale:.2e} of the largest value, {tolerance:.2e} allowed"


def kept_for_gradient(call, parameters):
    """Bytes of the storages that autograd keeps of a call, its parameters' left out."""
    known = {x.untyped_storage().data_ptr() for x in parameters}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        outs = call()
    del outs
    return sum(kept.values())
