"""Operators under torch.compile: no graph breaks, and no new graph for another length.

    python examples/torch_compile.py

Shows: a function of plain torch and an operator, compiled with fullgraph=True and dynamic=True, for several lengths and
with gradients. On a GPU inductor compiles it; on the CPU "aot_eager" traces the same graphs and generates no code, so
that neither a C++ compiler nor Python.h is needed.
"""

import torch
import torch.nn.functional as F

import hybrid_ops

device = "cuda" if torch.cuda.is_available() else "cpu"
backend = "inductor" if device == "cuda" else "aot_eager"
torch.manual_seed(0)


def layer(x, z, norm_weight, weight):
    """The last third of a Mamba-2 mixer: a gated norm and a projection."""
    return F.linear(hybrid_ops.gated_rms_norm(x, z, norm_weight, group_size=32), weight)


graphs = []


def count(graph, inputs):
    """The backend, noting each graph that it is asked for."""
    graphs.append(graph)
    return torch._dynamo.lookup_backend(backend)(graph, inputs)


compiled = torch.compile(layer, backend=count, fullgraph=True, dynamic=True)
weights = [torch.ones(64, device=device, requires_grad=True), torch.randn(64, 64, device=device, requires_grad=True)]

for length in (100, 257, 1000):
    x, z, target = torch.randn(3, 2, length, 64, device=device)
    before = len(graphs)
    grads = [torch.autograd.grad((f(x, z, *weights) * target).sum(), weights) for f in (layer, compiled)]
    error = max(((a - b).norm() / a.norm()).item() for a, b in zip(*grads, strict=True))
    new = "compiled" if len(graphs) > before else "nothing to compile"
    print(f"length {length}: {new}; the gradients differ from eager's by {error:.0e}")
