"""Replace mamba_ssm's functions by changing one import.

    python examples/drop_in.py

Shows: `hybrid_ops.compat`, the functions of mamba_ssm and causal_conv1d by their own names and signatures; here the
inner part of a Mamba-2 mixer, as programs write it for those libraries. docs/compat.md lists every function, and how
each differs from the original.
"""

import torch

# from causal_conv1d import causal_conv1d_fn
# from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
# from mamba_ssm.ops.triton.selective_state_update import selective_state_update
# from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from hybrid_ops.compat.causal_conv1d import causal_conv1d_fn
from hybrid_ops.compat.mamba_ssm import mamba_chunk_scan_combined, rmsnorm_fn, selective_state_update

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
batch, seqlen, heads, headdim, groups, dstate = 2, 200, 8, 32, 2, 64
dim = heads * headdim

xBC = torch.randn(batch, dim + 2 * groups * dstate, seqlen, device=device)
weight, bias = torch.randn(xBC.shape[1], 4, device=device), torch.zeros(xBC.shape[1], device=device)
xBC = causal_conv1d_fn(xBC, weight, bias, activation="silu").transpose(1, 2)
x, B, C = xBC.split([dim, groups * dstate, groups * dstate], dim=-1)
x = x.unflatten(-1, (heads, headdim))
B, C = B.unflatten(-1, (groups, dstate)), C.unflatten(-1, (groups, dstate))

dt, z = torch.randn(batch, seqlen, heads, device=device), torch.randn(batch, seqlen, dim, device=device)
A = -torch.linspace(1, 16, heads, device=device)
D, dt_bias = torch.ones(heads, device=device), torch.zeros(heads, device=device)
scan = dict(chunk_size=256, D=D, dt_bias=dt_bias, dt_softplus=True)
y = mamba_chunk_scan_combined(x, dt, A, B, C, **scan)
norm_weight = torch.ones(dim, device=device)
out = rmsnorm_fn(y.flatten(2), norm_weight, None, z=z, group_size=dim // groups, norm_before_gate=False)
print(f"{heads} heads over {seqlen} tokens: {tuple(out.shape)}, root mean square {out.square().mean().sqrt():.3f}")

# decoding: the last token again, from the state before it
_, state = mamba_chunk_scan_combined(x[:, :-1], dt[:, :-1], A, B[:, :-1], C[:, :-1], **scan, return_final_states=True)
last = selective_state_update(
    state,
    x[:, -1],
    dt[:, -1, :, None].expand(-1, -1, headdim),
    A[:, None, None].expand(-1, headdim, dstate),
    B[:, -1],
    C[:, -1],
    D=D[:, None].expand(-1, headdim),
    dt_bias=dt_bias[:, None].expand(-1, headdim),
    dt_softplus=True,
)
difference = (last - y[:, -1]).abs().max() / y.abs().max()
print(f"selective_state_update gives the scan's last token to {difference:.0e}")
