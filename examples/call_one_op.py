"""Call two operators and ask which kernel runs them.

    python examples/call_one_op.py

Shows: RMSNorm with the residual add of the layer before it, Mamba-2's scan over a sequence and over its two halves,
`explain`, and what a wrong argument says. Uses the GPU where there is one.
"""

import torch

import hybrid_ops

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)

# the norm sees the sum of x and the residual, and returns the sum too
x, residual = torch.randn(2, 4, 256, device=device)
y, h = hybrid_ops.rms_norm(x, torch.ones(256, device=device), residual=residual)
print(f"rms_norm: mean square of the rows {y.square().mean():.3f}, of the sum before {h.square().mean():.3f}")

# Mamba-2's recurrence: 8 heads of 64 channels, 2 groups of B and C, states of 128 numbers a channel
x = torch.randn(1, 1000, 8, 64, device=device)
dt = torch.rand(1, 1000, 8, device=device)
A = -torch.linspace(0.01, 1, 8, device=device)
B, C = torch.randn(2, 1, 1000, 2, 128, device=device)
whole, last = hybrid_ops.ssd_chunk_scan(x, dt, A, B, C, return_final_states=True)

# the state is all that the second half needs of the first
first, second = slice(0, 600), slice(600, 1000)
_, state = hybrid_ops.ssd_chunk_scan(x[:, first], dt[:, first], A, B[:, first], C[:, first], return_final_states=True)
rest = hybrid_ops.ssd_chunk_scan(x[:, second], dt[:, second], A, B[:, second], C[:, second], initial_states=state)
difference = (rest - whole[:, second]).abs().max() / whole.abs().max()
print(f"ssd_chunk_scan: {tuple(whole.shape)}, states {tuple(last.shape)}; in two pieces it differs by {difference:.0e}")

for op in ("rms_norm", "ssd_chunk_scan"):
    choice = hybrid_ops.explain(op, device=device)
    print(f"explain: {op} runs in {choice.impl}, {choice.reason}")

try:
    hybrid_ops.ssd_chunk_scan(x, dt, A[:7], B, C)
except ValueError as error:
    print("a wrong argument:", error)
