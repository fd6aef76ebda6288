"""Caches whose step can be captured in a CUDA graph."""

import pytest
import torch

from .test_model import EXACT, MODELS, assert_same, build, tokens


def addresses(cache):
    layers = [vars(layer) for layer in cache.layers if layer is not None]
    return [t.data_ptr() for layer in layers for t in layer.values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("lengths", [(5, 5), (2, 9)])
def test_static_cache(lengths):
    """Its step takes positions from the device: as in a replay, the host's lengths are those of the capture."""
    model, ids = MODELS["moe"], tokens(2, 16)
    cache, static = model.new_cache(2), model.new_cache(2, max_length=16, static=True)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    for each in (cache, static):
        model(ids[:, : max(lengths)], attention_mask=mask, cache=each)
    memory = addresses(static)
    for token in ids[:, 9:].split(1, dim=1):
        expected = model(token, cache=cache)
        torch.testing.assert_close(model(token, cache=static), expected, **EXACT)
        static.lengths[:] = lengths
    static.lengths[:] = cache.lengths
    assert_same(static, cache, **EXACT)
    assert addresses(static) == memory
    static.lengths[:] = [16, 16]
    with pytest.raises(ValueError, match="max_length must be at least 17 for a static cache to go on, got 16"):
        model(ids[:, :1], cache=static)


def test_bad_static_cache():
    with pytest.raises(ValueError, match="max_length must be given for a static cache, got None"):
        MODELS["moe"].new_cache(2, static=True)
    with pytest.raises(ValueError, match="num_draft_tokens must be 0 in a static cache, got 2"):
        MODELS["moe"].new_cache(2, max_length=8, static=True, num_draft_tokens=2)


@pytest.mark.gpu
def test_static_cache_in_a_graph():
    model, ids = build("moe", torch.float32).cuda(), tokens(2, 32).cuda()
    cache, static = model.new_cache(2), model.new_cache(2, max_length=32, static=True)
    for each in (cache, static):
        model(ids[:, :9], cache=each)
        model(ids[:, 9:10], cache=each)
    token = ids[:, 10:11].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(token, cache=static)
    for column in ids[:, 10:].split(1, dim=1):
        token.copy_(column)
        graph.replay()
        # other kernels read the keys, so sums are in another order: the allowance of the parity with transformers
        torch.testing.assert_close(logits, model(column, cache=cache), rtol=1e-4, atol=1e-4)
