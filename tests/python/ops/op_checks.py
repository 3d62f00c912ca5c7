"""What is checked of every op, whatever it computes. `args` is a dict of keyword arguments."""

import pytest
import torch

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 5e-2, "atol": 8e-2},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
}


def registered_operators():
    """The names of all operators of the library, without "torchgraft::"."""
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return {name.split(".")[0] for namespace, name in names if namespace == "torchgraft"}


def cast(args, dtype):
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in args.items()
    }


def differentiable(args):
    return [name for name, value in args.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def with_grad(args, names=None):
    """Copies, of which `names` (default: every floating tensor) require grad. Keeps strides."""
    names = differentiable(args) if names is None else names
    copies = {}
    for name, value in args.items():
        copies[name] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        if name in names:
            copies[name].requires_grad_()
    return copies


def gradients(function, args, names=None, weights=(1.0, 1.0)):
    """Gradients of a fixed random functional of both results. weights: how much each counts; None: not used."""
    copies = with_grad(args, names)
    results = function(**copies)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for result, weight in zip(results, weights, strict=True):
        direction = torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.dtype)
        if weight is not None and result.requires_grad:
            loss = loss + weight * (result * direction).sum()
    if isinstance(loss, torch.Tensor):
        loss.backward()
    return {name: copies[name].grad for name in (differentiable(args) if names is None else names)}


def assert_same_gradients(actual, expected, **tolerance):
    """Compares gradients. One that was not computed counts as zeros."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        want = expected[name]
        if value is None or want is None:
            present = value if value is not None else want
            assert present is None or not present.any(), f"{name}: gradient on one side only"
            continue
        torch.testing.assert_close(value, want, msg=lambda text, name=name: f"grad of {name}: {text}", **tolerance)


def check_forward_mode(op, args, name):
    """A tangent of any argument is refused: autograd would take the result's for zero."""
    for differentiated in differentiable(args):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(args[differentiated], torch.ones_like(args[differentiated]))
            with pytest.raises(NotImplementedError, match=f"{name}: expected tensors without tangents"):
                op(**args | {differentiated: dual})

        def function(value, differentiated=differentiated):
            return op(**args | {differentiated: value})[0]

        with pytest.raises(NotImplementedError, match=f"{name}: expected tensors without tangents"):
            torch.func.jvp(function, (args[differentiated],), (torch.ones_like(args[differentiated]),))


def check_values(op, reference, args, dtype):
    """Results and all gradients against the reference in float64."""
    expected = reference(**cast(args, torch.float64))
    actual = op(**args)
    for value, want in zip(actual, expected, strict=True):
        assert value.dtype == dtype
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), want, **TOLERANCE[dtype])
    assert_same_gradients(
        {name: None if grad is None else grad.double() for name, grad in gradients(op, args).items()},
        gradients(reference, cast(args, torch.float64)),
        **({"rtol": 1e-3, "atol": 1e-4} if dtype == torch.float32 else TOLERANCE[dtype]),
    )


def check_gradcheck(op, args):
    """Numerical against hand-written gradients, of output and gate, in every floating argument at once."""
    names = differentiable(args)
    copies = with_grad(args)

    def function(*tensors):
        results = op(**{**copies, **dict(zip(names, tensors, strict=True))})
        return tuple(result for result in results if result.requires_grad)

    assert torch.autograd.gradcheck(function, [copies[name] for name in names], atol=1e-6, rtol=1e-5)


def check_needs_grad(op, args):
    """One argument at a time: its gradient is that of the full backward, and the others get none."""
    everything = gradients(op, args)
    for name in differentiable(args):
        alone = gradients(op, args, names=[name])
        assert_same_gradients(alone, {name: everything[name]}, rtol=1e-10, atol=1e-12)


def check_one_result_used(op, args, reference):
    """Only one of the two results takes part in the loss: the other's incoming gradient is undefined."""
    for weights in ((1.0, None), (None, 1.0)):
        assert_same_gradients(
            gradients(op, args, weights=weights),
            gradients(reference, args, weights=weights),
            rtol=1e-9,
            atol=1e-10,
        )


def check_opcheck(op, args):
    """All of torch.library.opcheck: schema, autograd registration, fake tensors, AOT dispatch with dynamic shapes."""
    torch.library.opcheck(op, (), with_grad(args))
    torch.library.opcheck(op, (), args, test_utils=("test_schema", "test_faketensor"))


def check_scripted(op, scripted, args):
    """The scripted call gives what the eager one gives, gradients included."""
    for value, want in zip(scripted(**args), op(**args), strict=True):
        torch.testing.assert_close(value, want, rtol=0, atol=0)
    for _ in range(3):  # the profiling executor changes its mind after the first runs
        assert_same_gradients(gradients(scripted, args), gradients(op, args), rtol=0, atol=0)


def check_autocast(op, args, dtype=torch.bfloat16):
    """float32 arguments under autocast: the low dtype comes out, close to float32; gradients come back in float32."""
    expected = op(**args)
    with torch.autocast("cpu", dtype=dtype):
        actual = op(**args)
        grads = gradients(op, args)
    for value, want in zip(actual, expected, strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.float(), want, **TOLERANCE[dtype])
    assert all(grad is None or grad.dtype == torch.float32 for grad in grads.values())


def check_inference_modes(op, args):
    """Without grad mode nothing is recorded, and inference mode gives the same bits."""
    leaves = with_grad(args)
    with torch.no_grad():
        plain = op(**leaves)
    with torch.inference_mode():
        inference = op(**args)
    for value, other in zip(plain, inference, strict=True):
        assert not value.requires_grad
        torch.testing.assert_close(value, other, rtol=0, atol=0)


def check_meta(op, args):
    """Meta tensors in: the shapes, dtypes and strides of the real result out."""
    results = op(**args)
    on_meta = op(**{n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in args.items()})
    for value, meta in zip(results, on_meta, strict=True):
        assert (value.shape, value.dtype) == (meta.shape, meta.dtype)
        # A dimension of one element has no stride to speak of.
        strides = [(a, b) for size, a, b in zip(value.shape, value.stride(), meta.stride(), strict=True) if size > 1]
        assert all(a == b for a, b in strides) or value.numel() == 0
