"""The state space dual scan of Mamba-2 over whole sequences: `ssd_chunk_scan`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks, _device
from ._csrc import ssd as _csrc_ssd
from ._library import Choice, define, explains
from ._torch import ssd as _torch_ssd
from ._torch import ssd_bwd as _torch_ssd_bwd
from .norm import gated_rms_norm

# kernels cut sequences into pieces of at most this many tokens: a split there is a split between pieces for all of them
_LARGEST_CHUNK = 128


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    chunk_size: int = 128,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_final_states: bool = False,
    state_interval: int = 0,
    seq_offsets: Tensor | None = None,
    state_dtype: torch.dtype | None = None,
    ssm_state: Tensor | None = None,
    read_slots: Tensor | None = None,
    write_slots: Tensor | None = None,
    interval_slots: Tensor | None = None,
    null_slot: int = -1,
    batch_invariant: bool = False,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Scan of Mamba-2's selective state space over sequences (prefill and training).

    For every head, with g = h // (nheads / ngroups), and step by step in t::

        dt'_t = clamp(softplus(dt_t + dt_bias), *dt_limit)          softplus only with dt_softplus
        S_t   = exp(dt'_t A) S_{t-1} + dt'_t x_t (outer) B_t[g]     S: (headdim, dstate)
        y_t   = (S_t C_t[g] + D x_t) * silu(z_t)

    and with `norm_weight`, over the features of all heads of a group::

        y_t   = y_t / sqrt(mean(y_t^2) + norm_eps) * norm_weight

    Args:
        x: (batch, seqlen, nheads, headdim), any strides.
        dt: (batch, seqlen, nheads), the step in units of 1/A, before bias and softplus.
        A: (nheads,), negative; float32 (float64 where x is).
        B, C: (batch, seqlen, ngroups, dstate), x's dtype; ngroups divides nheads.
        D: (nheads,) or (nheads, headdim), the skip weight.
        z: like x, the gate.
        dt_bias: (nheads,).
        dt_softplus: apply softplus to dt + dt_bias.
        dt_limit: (low, high) bounds of dt'; the default removes negative steps only. A clamped dt has no gradient.
        chunk_size: a power of two >= 16. It sets where states may be kept and where prompts may be cut (see
            `state_interval`, `batch_invariant`), never the meaning.
        initial_states: (B, nheads, headdim, dstate), any float dtype; None is zeros. Here and below B is batch, or the
            number of sequences when packed.
        seq_idx: (batch, seqlen) int32, the number of the sequence that a token belongs to. Where it changes the state
            starts from zero; negative is padding: y = 0, state unchanged. initial_states belong to the first sequence
            of a row, final_states are those after its last token. Not with `cu_seqlens` or `state_interval`.
        cu_seqlens: (nseq + 1,) int32, boundaries of sequences packed along seqlen; batch is 1. An empty sequence's
            final state is its initial state.
        return_final_states: also return the states after the last token, (B, nheads, headdim, dstate).
        state_interval: tokens, a multiple of chunk_size; 0 is off. Also return the states after every position p with
            (p + 1) % state_interval == 0: (batch, seqlen // state_interval + 1, nheads, headdim, dstate), each row from
            index 0; packed (total // state_interval + nseq, ...), sequence after sequence without gaps; the rest is 0.
        seq_offsets: (B,) int32 >= 0, the position of each sequence's first token (tokens read by earlier calls).
        state_dtype: of the returned states; None is float32 (float64 where x is).
        ssm_state: (nslots, nheads, headdim, dstate), any float dtype: a pool of states, read and written in place
            instead of initial_states and the returned states. Each slot is contiguous; slots may lie apart.
        read_slots: (B,) int32, rows of the pool that sequences start from; None starts all from zeros.
        write_slots: (B,) int32, rows that get the final states; None keeps none. They differ from each other and from
            rows that other sequences read.
        interval_slots: (B, m) int32, with state_interval: the j-th kept state of sequence b goes to
            row interval_slots[b, j]; states beyond m are not kept.
        null_slot: this slot, and any outside the pool, reads zeros and writes nothing.
        batch_invariant: a sequence's bits depend neither on the others nor on cuts at positions that are multiples of
            chunk_size (>= 128), given float32 states and `seq_offsets`.
        norm_weight: (nheads * headdim,), of `gated_rms_norm` behind the scan; None for no norm. Where the CUDA kernel
            gates and norms y itself, y goes through memory once, not three times.
        norm_eps: added to the mean square.
        out: y is written here; x's shape and dtype. Not where a gradient is needed.
        impl: "auto", "cuda", "triton" or "torch".

    Returns:
        y in x's dtype and shape, followed by the final states and the interval states where asked for; with a pool y
        alone.

    x in float32, bfloat16 or float16 (float64 on the CPU); D, z, dt, dt_bias, norm_weight in any of them. Arithmetic
    and the state between tokens are float32 (float64). Differentiable in all floating arguments, in y and in the
    returned states; not with a pool.

    Raises:
        ValueError, TypeError: an argument that is not the one expected; nothing has been written then.

    Source: Dao and Gu 2024, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
    State Space Duality", eq. 1 (recurrence) and section 6 (chunks).

    >>> x, dt = torch.randn(1, 100, 4, 8), torch.rand(1, 100, 4)
    >>> B, C = torch.randn(1, 100, 1, 16), torch.randn(1, 100, 1, 16)
    >>> y, states = hybrid_ops.ssd_chunk_scan(x, dt, -torch.ones(4), B, C, D=torch.ones(4), return_final_states=True)
    >>> y.shape, states.shape
    (torch.Size([1, 100, 4, 8]), torch.Size([1, 4, 8, 16]))
    """
    _device.check_impl(impl)
    slots = (read_slots, write_slots, interval_slots)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, seq_offsets)
    compute, low, high, run, normed = _check(
        *(*tensors, *slots, ssm_state, null_slot, return_final_states, state_dtype),
        *(dt_limit, chunk_size, state_interval, batch_invariant, dt_softplus, norm_weight, norm_eps, out, impl),
    )
    needs_grad = _checks.needs_grad(*tensors[:9], norm_weight)
    _checks.out(out, x, needs_grad)
    if norm_weight is not None and (needs_grad or not normed):
        arguments: dict[str, Any] = dict(
            **dict(D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit, chunk_size=chunk_size),
            **dict(initial_states=initial_states, seq_idx=seq_idx, cu_seqlens=cu_seqlens, seq_offsets=seq_offsets),
            **dict(return_final_states=return_final_states, state_interval=state_interval, state_dtype=state_dtype),
            **dict(ssm_state=ssm_state, read_slots=read_slots, write_slots=write_slots, interval_slots=interval_slots),
            **dict(null_slot=null_slot, batch_invariant=batch_invariant, impl=impl),
        )
        results = ssd_chunk_scan(x, dt, A, B, C, **arguments)
        y, *states = (results,) if isinstance(results, Tensor) else results
        y = _norm(y, z, norm_weight, norm_eps, B.shape[2], out, impl)
        return (y, *states) if states else y
    options = (dt_softplus, low, high, state_interval, null_slot, batch_invariant, norm_eps, impl)
    if ssm_state is not None:
        if needs_grad or _checks.needs_grad(ssm_state):
            raise ValueError("ssm_state must be None where a gradient is needed: pools are not differentiable")
        y = x.new_empty(*x.shape) if out is None else out
        _ssd_fwd_op(*tensors, *slots, y, None, None, ssm_state, norm_weight, *options, run=run)
        return y
    stored = state_dtype or compute
    if needs_grad:
        results = _SSDChunkScan.apply(*tensors, return_final_states, stored, options)
    else:
        results = _ssd_chunk_scan(*tensors, return_final_states, stored, options, out, run, norm_weight)
    return results[0] if len(results) == 1 else results


def _norm(
    y: Tensor, z: Tensor | None, weight: Tensor, eps: float, ngroups: int, out: Tensor | None, impl: str
) -> Tensor:
    """The norm behind a scan that has not gated its y."""
    normed = gated_rms_norm(
        y.flatten(2),
        None if z is None else z.flatten(2),
        weight,
        eps=eps,
        group_size=weight.shape[0] // ngroups,
        impl=impl,
    ).view(y.shape)
    return normed if out is None else out.copy_(normed)


@_checks.remembered
def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_offsets: Tensor | None,
    read_slots: Tensor | None,
    write_slots: Tensor | None,
    interval_slots: Tensor | None,
    ssm_state: Tensor | None,
    null_slot: int,
    return_final_states: bool,
    state_dtype: torch.dtype | None,
    dt_limit: tuple[float, float],
    chunk_size: int,
    state_interval: int,
    batch_invariant: bool,
    dt_softplus: bool,
    norm_weight: Tensor | None,
    norm_eps: float,
    out: Tensor | None,
    impl: str,
) -> tuple[torch.dtype, float, float, Callable[..., None] | None, bool]:
    """The dtype that states have unless asked otherwise, the bounds of dt', the CUDA kernel's launch, where that is
    what a plain call comes to, and whether it norms y."""
    compute = _check_inputs(x, dt, A, B, C, D, z, dt_bias)
    low, high = _check_options(dt_limit, chunk_size, state_interval, batch_invariant)
    _checks.number("null_slot", null_slot)
    _checks.number("norm_eps", norm_eps)
    if norm_weight is not None:
        features = x.shape[2] * x.shape[3]
        _checks.tensor("norm_weight", norm_weight, (features,), dtype=_floats(compute), device=x.device)
    nseq = _check_sequences(x, seq_idx, cu_seqlens, seq_offsets, state_interval)
    state_shape = (nseq, *x.shape[2:], B.shape[3])
    floats = _floats(compute)
    if initial_states is not None:
        _checks.tensor("initial_states", initial_states, state_shape, dtype=floats, device=x.device)
    if state_dtype is not None:
        _checks.one_of("state_dtype", state_dtype, floats)
    slots = dict(read_slots=read_slots, write_slots=write_slots, interval_slots=interval_slots)
    if ssm_state is not None:
        if initial_states is not None or return_final_states or state_dtype is not None:
            raise ValueError(
                "with ssm_state, initial_states and state_dtype must be None and return_final_states False: "
                "states are read from and written to the pool"
            )
        _check_pool(x, ssm_state, state_shape, slots, state_interval, null_slot, floats)
    else:
        for name, value in slots.items():
            if value is not None:
                raise ValueError(f"{name} must be None without ssm_state, got a tensor")
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, seq_offsets, *slots.values())
    run = None
    if _checks.eager_on_gpu(x):
        options = (dt_softplus, low, high, state_interval, null_slot, batch_invariant, norm_eps)
        stored = state_dtype or compute
        run = _cuda_launch(impl, tensors, out, return_final_states, stored, ssm_state, norm_weight, *options)
    return compute, low, high, run, norm_weight is not None and run is not None


def _floats(compute: torch.dtype) -> tuple[torch.dtype, ...]:
    """Dtypes of the smaller operands: float64 only where everything is computed so."""
    return _checks.FLOATS if compute == torch.float64 else _checks.FLOATS[:3]


def _check_inputs(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None
) -> torch.dtype:
    _checks.rank("x", x, (4,), "(batch, seqlen, nheads, headdim)")
    _checks.tensor("x", x, (None,) * 4)
    batch, seqlen, nheads, headdim = x.shape
    if nheads < 1 or headdim < 1:
        raise ValueError(f"x must have at least one head and one feature per head, got {tuple(x.shape)}")
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    floats = _floats(compute)
    _checks.tensor("dt", dt, (batch, seqlen, nheads), dtype=floats, device=x.device)
    _checks.tensor("A", A, (nheads,), dtype=compute, device=x.device)
    _checks.rank("B", B, (4,), "(batch, seqlen, ngroups, dstate)")
    _checks.tensor("B", B, (batch, seqlen, None, None), dtype=x.dtype, device=x.device)
    ngroups, dstate = B.shape[2:]
    if ngroups < 1 or nheads % ngroups:
        raise ValueError(f"B must have a number of groups that divides the {nheads} heads of x, got {tuple(B.shape)}")
    if dstate < 1:
        raise ValueError(f"B must have dstate >= 1, got {tuple(B.shape)}")
    _checks.tensor("C", C, B.shape, dtype=x.dtype, device=x.device)
    if D is not None:
        _checks.rank("D", D, (1, 2), "(nheads,) or (nheads, headdim)")
        _checks.tensor("D", D, (nheads, headdim)[: D.dim()], dtype=floats, device=x.device)
    if z is not None:
        _checks.tensor("z", z, x.shape, dtype=floats, device=x.device)
    if dt_bias is not None:
        _checks.tensor("dt_bias", dt_bias, (nheads,), dtype=floats, device=x.device)
    return compute


def _check_options(
    dt_limit: tuple[float, float], chunk_size: int, state_interval: int, batch_invariant: bool
) -> tuple[float, float]:
    if len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"dt_limit must be (low, high) with 0 <= low <= high, got {dt_limit}")
    if chunk_size < 16 or chunk_size & (chunk_size - 1):
        raise ValueError(f"chunk_size must be a power of two >= 16, got {chunk_size}")
    if batch_invariant and chunk_size < _LARGEST_CHUNK:
        raise ValueError(f"chunk_size must be >= {_LARGEST_CHUNK} with batch_invariant, got {chunk_size}")
    if state_interval < 0 or state_interval % chunk_size:
        raise ValueError(f"state_interval must be a multiple of chunk_size={chunk_size} or 0, got {state_interval}")
    return float(dt_limit[0]), float(dt_limit[1])


def _check_sequences(
    x: Tensor, seq_idx: Tensor | None, cu_seqlens: Tensor | None, seq_offsets: Tensor | None, state_interval: int
) -> int:
    """The number of sequences with states of their own."""
    batch, seqlen = x.shape[:2]
    _checks.at_most_one(seq_idx=seq_idx, cu_seqlens=cu_seqlens)
    nseq = batch
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError(f"x must have batch 1 with cu_seqlens, got {tuple(x.shape)}")
        nseq = _checks.cu_seqlens(cu_seqlens, seqlen, x.device)
    if seq_idx is not None:
        _checks.tensor("seq_idx", seq_idx, (batch, seqlen), dtype=torch.int32, device=x.device)
        if state_interval:
            raise ValueError(f"state_interval must be 0 with seq_idx, got {state_interval}: use cu_seqlens")
    if seq_offsets is not None:
        _checks.tensor("seq_offsets", seq_offsets, (nseq,), dtype=torch.int32, device=x.device)
        if _checks.readable(seq_offsets) and nseq and int(seq_offsets.min()) < 0:
            raise ValueError(f"seq_offsets must not be negative, got {int(seq_offsets.min())}")
    return nseq


def _check_pool(
    x: Tensor,
    ssm_state: Tensor,
    state_shape: tuple[int, ...],
    slots: dict[str, Tensor | None],
    state_interval: int,
    null_slot: int,
    floats: tuple[torch.dtype, ...],
) -> None:
    _checks.tensor("ssm_state", ssm_state, (None, *state_shape[1:]), dtype=floats, device=x.device)
    if not ssm_state[0:1].is_contiguous():  # slots may lie apart, as in a pool that other caches share
        raise ValueError(f"ssm_state must have contiguous slots, got strides {ssm_state.stride()}")
    nslots, nseq = ssm_state.shape[0], state_shape[0]
    read, write, interval = slots["read_slots"], slots["write_slots"], slots["interval_slots"]
    if read is None and write is None and interval is None:
        raise ValueError("ssm_state must come with read_slots, write_slots or interval_slots, got none of them")
    if (state_interval > 0) != (interval is not None):
        raise ValueError(f"interval_slots and state_interval > 0 must come together, got {state_interval=}")
    for name, value, shape in (
        ("read_slots", read, (nseq,)),
        ("write_slots", write, (nseq,)),
        ("interval_slots", interval, (nseq, None)),
    ):
        if value is not None:
            _checks.slots(name, value, shape, nslots, null_slot, x.device)
    written = [t.flatten() for t in (write, interval) if t is not None]
    if not written:
        return
    _checks.distinct("write_slots and interval_slots", torch.cat(written), nslots, null_slot)
    if read is not None and _checks.readable(read):
        # sequences run side by side: none may overwrite what another has yet to read
        writer = {} if interval is None else dict.fromkeys(interval.flatten().tolist())
        writer |= {} if write is None else {slot: b for b, slot in enumerate(write.tolist())}
        for b, slot in enumerate(read.tolist()):
            if slot != null_slot and writer.get(slot, b) != b:
                raise ValueError(f"write_slots and interval_slots must not name a slot that is still read, got {slot}")


@explains("ssd_chunk_scan")
def _choose(
    *,
    device: str = "cuda",
    impl: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    seqlen: int = 8192,
    nheads: int = 128,
    headdim: int = 64,
    ngroups: int = 8,
    dstate: int = 128,
    state_interval: int = 0,
    batch_invariant: bool = False,
    norm: bool = False,
    **_: Any,
) -> Choice:
    x = torch.empty(batch, seqlen, nheads, headdim, dtype=dtype, device="meta")
    B = torch.empty(batch, seqlen, ngroups, dstate, dtype=dtype, device="meta")
    A = torch.empty(nheads, device="meta")
    refusal = _device.not_sm90(torch.device(device)) or _csrc_ssd.refusal(
        x, A, B, B, None, None, (), x, None, (), state_interval
    )
    chosen, reason = _device.choose(impl, torch.device(device), refusal)
    if chosen == "cuda":
        sms = _device.num_sms_to_explain(device)
        inside = norm and _csrc_ssd.norm_refusal(headdim, dstate, x, A.to(dtype), batch_invariant) is None
        problem = (batch, batch * seqlen, nheads, ngroups, headdim, dstate, batch_invariant, sms, inside)
        return Choice(chosen, _csrc_ssd.config(*problem)._asdict(), reason)
    if chosen != "triton":
        return Choice(chosen, dict(Q=_torch_ssd.chunk_of(headdim, dstate, state_interval)), reason)
    from .triton_kernels import ssd as kernels

    major, minor = _device.capability(torch.device(device).index or 0) if torch.cuda.is_available() else (9, 0)
    config = kernels.config(headdim, dstate, nheads // ngroups, dtype, state_interval, 10 * major + minor)
    return Choice(chosen, config._asdict(), reason)


def _choice(impl: str, tensors: tuple[Any, ...], state_interval: int) -> str:
    """`tensors`: those of the operator."""
    x, _, A, B, C, _, z, _, initial, seq_idx, cu_seqlens, seq_offsets = tensors[:12]
    read, write, interval_slots, y, final, interval, pool = tensors[12:]
    refusal = None
    if impl in ("auto", "cuda"):
        small = (cu_seqlens, seq_offsets, read, write, interval_slots)
        states = (initial, final, interval) if pool is None else (pool, pool, pool)
        refusal = _device.not_sm90(x.device) or _csrc_ssd.refusal(
            x, A, B, C, z, seq_idx, small, y, states[0], states[1:], state_interval
        )
    return _device.choose(impl, x.device, refusal)[0]


def _cuda_launch(
    impl: str,
    tensors: tuple[Any, ...],
    out: Tensor | None,
    return_final_states: bool,
    state_dtype: torch.dtype,
    pool: Tensor | None,
    norm_weight: Tensor | None,
    *options: Any,
) -> Callable[..., None] | None:
    """What the operator comes to for results that are yet to be allocated; None where it is not the CUDA kernel, or
    this is not to norm y."""
    x, state_interval = tensors[0], options[3]
    if norm_weight is not None and not _norms(tensors, norm_weight, options[5]):
        return None
    if pool is None:
        B, cu_seqlens = tensors[3], tensors[10]
        results = _new_results(x, B, cu_seqlens, return_final_states, state_dtype, state_interval, out, "meta")
    else:
        results = (x.new_empty(x.shape, device="meta") if out is None else out, None, None)
    if _choice(impl, (*tensors, *results, pool), state_interval) != "cuda":
        return None
    return _csrc_ssd.ssd_chunk_scan(*(*tensors, *results, pool, norm_weight, *options))


def _norms(tensors: tuple[Any, ...], norm_weight: Tensor, batch_invariant: bool) -> bool:
    """Whether the CUDA kernel, if it is taken, norms y itself."""
    x, B, z, cu_seqlens = tensors[0], tensors[3], tensors[6], tensors[10]
    batch, seqlen, nheads, headdim = x.shape
    ngroups, dstate = B.shape[2:]
    if not x.numel() or _csrc_ssd.norm_refusal(headdim, dstate, z, norm_weight, batch_invariant):
        return False
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sms = _device.num_sms(x.device.index)
    problem = (nseq, batch * seqlen, nheads, ngroups, headdim, dstate, batch_invariant, sms, True)
    return _csrc_ssd.config(*problem).normed


def _ssd_fwd(*arguments: Any) -> None:
    tensors, norm_weight, impl = arguments[:19], arguments[19], arguments[-1]
    chosen = _choice(impl, tensors, arguments[23])
    if norm_weight is not None and not (chosen == "cuda" and _norms(tensors, norm_weight, arguments[25])):
        raise ValueError("norm_weight must be None where no kernel norms y: hybrid_ops.ssd_chunk_scan does behind it")
    if chosen == "cuda":
        _csrc_ssd.ssd_chunk_scan(*arguments[:-1])(*arguments)
    elif chosen == "triton":
        from .triton_kernels import ssd as kernels

        kernels.ssd_chunk_scan(*tensors, *arguments[20:26])
    else:
        _torch_ssd.ssd_chunk_scan(*tensors, *arguments[20:26])


_ssd_fwd_op = define(
    "ssd_chunk_scan_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_states, Tensor? seq_idx, Tensor? cu_seqlens, Tensor? seq_offsets, Tensor? read_slots, "
    "Tensor? write_slots, Tensor? interval_slots, Tensor(a!) y, Tensor(b!)? final_states, Tensor(c!)? interval_states, "
    "Tensor(d!)? ssm_state, Tensor? norm_weight, bool dt_softplus, float dt_min, float dt_max, int state_interval, "
    "int null_slot, bool batch_invariant, float norm_eps, str impl)",
    _ssd_fwd,
)


def _new_results(
    x: Tensor,
    B: Tensor,
    cu_seqlens: Tensor | None,
    return_final_states: bool,
    state_dtype: torch.dtype,
    state_interval: int,
    out: Tensor | None,
    device: torch.device | str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, final states and interval states; the last two where they are asked for."""
    batch, seqlen, nheads, headdim = x.shape
    state = (nheads, headdim, B.shape[3])
    y = x.new_empty(*x.shape, device=device) if out is None else out
    nseq = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_states = interval_states = None
    if return_final_states:
        final_states = x.new_empty((nseq, *state), dtype=state_dtype, device=device)
    if state_interval:
        kept = seqlen // state_interval
        places = (batch, kept + 1) if cu_seqlens is None else (kept + nseq,)
        interval_states = x.new_empty((*places, *state), dtype=state_dtype, device=device)
    return y, final_states, interval_states


def _ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_offsets: Tensor | None,
    return_final_states: bool,
    state_dtype: torch.dtype,
    options: tuple[Any, ...],
    out: Tensor | None = None,
    run: Callable[..., None] | None = None,
    norm_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Allocate the results, fill them, and return those that were asked for."""
    y, final_states, interval_states = _new_results(
        x, B, cu_seqlens, return_final_states, state_dtype, options[3], out, x.device
    )
    _ssd_fwd_op(
        *(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, seq_offsets),
        *(None, None, None, y, final_states, interval_states, None, norm_weight),
        *options,
        run=run,
    )
    return tuple(t for t in (y, final_states, interval_states) if t is not None)


def _ssd_bwd(*arguments: Any) -> None:
    _torch_ssd_bwd.ssd_chunk_scan_bwd(*arguments)


_ssd_bwd_op = define(
    "ssd_chunk_scan_bwd(Tensor dy, Tensor? dfinal_states, Tensor? dinterval_states, Tensor x, Tensor dt, Tensor A, "
    "Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, Tensor? seq_idx, "
    "Tensor? cu_seqlens, Tensor? seq_offsets, Tensor(a!) dx, Tensor(b!) ddt, Tensor(c!) dA, Tensor(d!) dB, "
    "Tensor(e!) dC, Tensor(f!)? dD, Tensor(g!)? dz, Tensor(h!)? ddt_bias, Tensor(i!)? dinitial_states, "
    "bool dt_softplus, float dt_min, float dt_max, int state_interval)",
    _ssd_bwd,
)


class _SSDChunkScan(torch.autograd.Function):
    """Keeps the inputs alone: the backward recomputes states and decays, which would take more memory than they."""

    @staticmethod
    def forward(ctx, *arguments):  # type: ignore[override]
        ctx.save_for_backward(*arguments[:12])
        ctx.return_final_states, _, ctx.options = arguments[12:]
        return _ssd_chunk_scan(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *dstates):  # type: ignore[override]
        tensors = ctx.saved_tensors
        dt_softplus, dt_min, dt_max, state_interval = ctx.options[:4]
        dfinal_states = dstates[0] if ctx.return_final_states else None
        dinterval_states = dstates[-1] if state_interval else None
        grads = [None if t is None else t.new_empty(t.shape) for t in tensors[:9]]
        _ssd_bwd_op(dy, dfinal_states, dinterval_states, *tensors, *grads, dt_softplus, dt_min, dt_max, state_interval)
        return *grads, None, None, None, None, None, None
