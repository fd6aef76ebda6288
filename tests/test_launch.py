import pytest
import torch

import hybrid_ops


@pytest.mark.gpu
def test_compile_only():
    """Kernels are compiled, in threads of autograd's too, and nothing is written; the next call runs them."""
    from hybrid_ops.triton_kernels import launch

    def tensors():
        y = torch.randn(3, 5, 24, device="cuda", requires_grad=True)
        return y, torch.arange(15, dtype=torch.int32, device="cuda").view(3, 5), y.detach().new_zeros(3, 24)

    y, rows, out = tensors()
    with launch.compile_only():
        hybrid_ops.moe_combine(y.detach().view(15, 24), rows, out=out)
        hybrid_ops.moe_combine(y.view(15, 24), rows).sum().backward()
    assert not out.any()
    y.grad = None
    hybrid_ops.moe_combine(y.detach().view(15, 24), rows, out=out)
    torch.testing.assert_close(out, y.detach().sum(1))
    hybrid_ops.moe_combine(y.view(15, 24), rows).sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))
