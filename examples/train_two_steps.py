"""Train a small hybrid model for a few steps.

    python examples/train_two_steps.py [number of steps, default 2]

Shows: a model from a preset, its gradients through every operator, and the mixture of experts kept even without an
auxiliary loss: `balance` moves the router's bias after each step. The published models are trained the same way, with
another preset, or with `NemotronHForCausalLM.from_pretrained(folder)`.
"""

import sys

import torch
import torch.nn.functional as F

from hybrid_ops.models import NemotronHConfig, NemotronHForCausalLM
from hybrid_ops.nn import MoE

device = "cuda" if torch.cuda.is_available() else "cpu"
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2
torch.manual_seed(0)

config = NemotronHConfig.preset("tiny-moe")
model = NemotronHForCausalLM(config, device=device)
mixtures = [module for module in model.modules() if isinstance(module, MoE)]
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, layers {config.hybrid_override_pattern}")

text = torch.tensor(list(b"To be, or not to be, that is the question: " * 6), device=device)
ids = text[:256].view(2, 128)

for step in range(steps + 1):
    logits = model(ids)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    print(f"after {step} steps: loss {loss.item():.3f}")
    if step == steps:
        break
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    for moe in mixtures:
        moe.balance(rate=1e-3)
