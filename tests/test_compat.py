"""What all modules of `hybrid_ops.compat` have in common."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import torch

import hybrid_ops.compat
from hybrid_ops.compat import causal_conv1d, mamba_ssm, vllm
from hybrid_ops.compat import torch as compat_torch

from . import test_compat_mamba_ssm as mamba_ssm_cases
from . import test_compat_torch as torch_cases
from . import test_compat_vllm as vllm_cases
from .compat_cases import packed, randn, step_inputs
from .tensors import int32

FOLDER = Path(hybrid_ops.compat.__file__).parent
MODULES = ["mamba_ssm", "causal_conv1d", "vllm", "torch"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"hybrid_ops.compat.{name}")
    functions = {public: getattr(module, public) for public in (*module.__all__, *(["_scaled_mm"] * (name == "torch")))}
    for public, function in functions.items():
        names = dict(vars(module) | functions, torch=torch)
        (example,) = doctest.DocTestFinder(recurse=False).find(function, public, globs=names)
        assert example.examples, f"{public} has no example"
        assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER)))
def test_public_functions_only(path):
    """Nothing is computed here that hybrid_ops does not offer to everyone."""
    depth = len(path.relative_to(FOLDER).parts)  # dots that stay inside compat
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > depth:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert not any(name.startswith("_") for name in names), f"{path.name} imports {names}"


def calls():
    """A call of each function that `test_compiles` of its library does not compile."""
    yield (
        mamba_ssm.mamba_chunk_scan_combined,
        dict(
            **dict(zip(("x", "dt", "A", "B", "C"), packed([4, 3, 6])[0], strict=True)),
            **dict(chunk_size=16, cu_seqlens=int32(0, 4, 7, 13), return_varlen_states=True, return_final_states=True),
        ),
    )
    yield mamba_ssm.mamba_split_conv1d_scan_combined, mamba_ssm_cases.mixer_inputs(dmlp=2) | mamba_ssm_cases.NORM
    yield mamba_ssm.selective_state_update, step_inputs()
    yield mamba_ssm.rmsnorm_fn, dict(x=randn(2, 12), weight=randn(12), bias=None, z=randn(2, 12))
    yield mamba_ssm.layernorm_fn, dict(x=randn(2, 12), weight=randn(12), bias=randn(12), group_size=4)
    x, weight = randn(2, 6, 9), randn(6, 4)
    yield causal_conv1d.causal_conv1d_fn, dict(x=x, weight=weight, return_final_states=True)
    ring = dict(x=x, conv_state=randn(2, 6, 4), weight=weight, cache_seqlens=int32(3, 5))
    yield causal_conv1d.causal_conv1d_update, ring
    yield causal_conv1d.causal_conv1d_varlen_states, dict(x=randn(9, 6), cu_seqlens=int32(0, 4, 9), state_len=3)
    states = dict(final_states_out=randn(5, *vllm_cases.STATE), final_state_indices=int32(0, 3, -1))
    varlen = vllm_cases.varlen_inputs([20, 5, 40]) | states
    yield vllm.mamba_chunk_scan_combined_varlen, varlen | dict(return_intermediate_states=True)
    slots = dict(cache_indices=int32(4, 1, 5, 0), has_initial_state=vllm_cases.HAS)
    yield vllm.causal_conv1d_fn, vllm_cases.conv_inputs() | slots
    yield compat_torch.grouped_mm, dict(mat_a=randn(9, 5), mat_b=randn(3, 5, 4), offs=int32(4, 4, 7))
    yield compat_torch.grouped_mm, dict(mat_a=randn(3, 6, 5), mat_b=randn(3, 5, 4))
    names = ("mat_a", "mat_b", "scale_a", "scale_recipe_a", "scale_b", "scale_recipe_b")
    yield compat_torch.scaled_mm, dict(zip(names, torch_cases.tensorwise()[0], strict=True))


@pytest.mark.usefixtures("compile_once")  # dynamo traces torch's own new_empty
@pytest.mark.parametrize(("function", "arguments"), list(calls()), ids=lambda value: getattr(value, "__name__", ""))
def test_one_graph(function, arguments):
    """What is returned, and what is updated in place, as without torch.compile."""
    torch._dynamo.reset()
    results = []
    for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        copies = {  # expanded dimensions stay expanded
            name: value.clone() if isinstance(value, torch.Tensor) and 0 not in value.stride() else value
            for name, value in arguments.items()
        }
        results.append([run(**copies), [value for value in copies.values() if isinstance(value, torch.Tensor)]])
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.fixture
def mixer_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        num_heads=4, head_dim=8, hidden_size=16, state_size=8, n_groups=2, num_hidden_layers=2, vocab_size=20,
        chunk_size=8, expand=2, conv_kernel=4, hidden_act="silu",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Mamba2ForCausalLM(config)
    for parameter in model.parameters():  # at its initial values the model hides what the state does
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def swap(monkeypatch):
    """What a program does that imports from hybrid_ops.compat; transformers calls as mamba_ssm's examples do."""
    from transformers.models.mamba2 import modeling_mamba2 as modeling

    calls = []
    for name, function in {
        "mamba2_chunk_scan": mamba_ssm.mamba_chunk_scan_combined,
        "mamba2_split_conv1d_scan_combined": mamba_ssm.mamba_split_conv1d_scan_combined,
        "mamba2_selective_state_update": mamba_ssm.selective_state_update,
        "causal_conv1d_fn": causal_conv1d.causal_conv1d_fn,
        "causal_conv1d_update": causal_conv1d.causal_conv1d_update,
    }.items():
        if not hasattr(modeling, name):
            pytest.skip(f"this transformers has no {name} in its Mamba-2")

        def called(*args, function=function, **kwargs):
            calls.append(function.__name__)
            return function(*args, **kwargs)

        monkeypatch.setattr(modeling, name, called)
    return calls


def test_transformers_mamba2_trains(mixer_model, monkeypatch):
    tokens = torch.randint(0, 20, (2, 21))
    mixer_model.train()
    before = mixer_model(tokens, labels=tokens, use_cache=False).loss
    expected = torch.autograd.grad(before, list(mixer_model.parameters()))
    calls = swap(monkeypatch)
    loss = mixer_model(tokens, labels=tokens, use_cache=False).loss
    grads = torch.autograd.grad(loss, list(mixer_model.parameters()))
    assert set(calls) == {"mamba_split_conv1d_scan_combined"}
    torch.testing.assert_close(loss, before)
    for mine, theirs in zip(grads, expected, strict=True):  # float32, summed in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_transformers_mamba2_generates(mixer_model, monkeypatch):
    tokens = torch.randint(0, 20, (2, 21))
    options = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True, output_logits=True)
    mixer_model.eval()
    expected = mixer_model.generate(tokens, **options)
    calls = swap(monkeypatch)
    got = mixer_model.generate(tokens, **options)
    assert set(calls) == {
        *("mamba_chunk_scan_combined", "selective_state_update", "causal_conv1d_fn", "causal_conv1d_update")
    }
    assert got.sequences.equal(expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
