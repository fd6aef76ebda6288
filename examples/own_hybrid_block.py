"""Write a hybrid block of your own from the modules and operators.

    python examples/own_hybrid_block.py

Shows: a block that runs a Mamba-2 mixer and attention side by side on the same norm (as some hybrids do, unlike
Nemotron-H, which alternates them), then a mixture of experts; and the same block token by token, with states.
"""

import torch
from torch import nn

import hybrid_ops
from hybrid_ops.nn import Attention, KVCache, Mamba2Mixer, MambaState, MoE


class ParallelBlock(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.Parameter(torch.ones(hidden)), nn.Parameter(torch.ones(hidden))
        self.mamba = Mamba2Mixer(hidden, num_heads=8, head_dim=32, state_size=64, num_groups=2)
        self.mamba.init_states()
        self.attention = Attention(hidden, num_heads=4, num_kv_heads=2, head_dim=32)
        self.experts = MoE(hidden, num_experts=16, topk=4, intermediate_size=64, shared_intermediate_size=128)

    def forward(self, x, state=None, cache=None, step=False):
        u = hybrid_ops.rms_norm(x, self.norm1)
        mixed = self.mamba.step(u, state) if step else self.mamba(u, state=state)
        # the sum with the residual stream and the next norm are one kernel
        u, x = hybrid_ops.rms_norm(mixed + self.attention(u, cache=cache), self.norm2, residual=x)
        return x + self.experts(u)


device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
block = ParallelBlock(128).to(device)
x = torch.randn(2, 40, 128, device=device)

at_once = block(x)
at_once.square().mean().backward()
missing = [name for name, p in block.named_parameters() if p.requires_grad and p.grad is None]
print(f"output {tuple(at_once.shape)}; parameters without a gradient: {len(missing)}")

# row i of each pool is sequence i's: the convolution's last 3 inputs, the SSM state, room for keys and values
state = MambaState(
    conv=torch.zeros(2, 8 * 32 + 2 * 2 * 64, 3, device=device),
    ssm=torch.zeros(2, 8, 32, 64, device=device),
    slots=torch.arange(2, dtype=torch.int32, device=device),
)
empty = torch.zeros(2, 2, 40, 32, device=device)
cache = KVCache(empty, empty.clone(), [0, 0], torch.zeros(2, dtype=torch.int64, device=device))
with torch.no_grad():
    pieces = [block(x[:, :30], state, cache)]
    for t in range(30, 40):
        cache.past, cache.positions = [t, t], torch.full((2,), t, device=device)
        pieces.append(block(x[:, t : t + 1], state, cache, step=True))
    difference = (torch.cat(pieces, 1) - at_once).abs().max()
print(f"30 tokens at once and 10 one by one differ from all at once by {difference:.0e}")
