"""RMSNorm and conv1d for sm_90a: numbers, then what the rules choose beside Triton, a copy of the same bytes, and the
configurations next to it.

PYTHONPATH=<repo root> python .gpu/norm2.py [numbers] [fwd] [bwd] [decode] [conv] [host]; each part in a process of its
own, so that one that hangs or faults takes no other with it. A neighbour that is 1% faster than the choice on every
shape is a better rule; else the rule stays.
"""
import itertools, math, random, statistics, subprocess, sys, time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
PARTS = {"numbers": 45, "fwd": 25, "bwd": 25, "decode": 20, "conv": 20, "host": 20}

if __name__ == "__main__" and len(sys.argv) == 1:
    for part, limit in PARTS.items():
        start = time.perf_counter()
        try:
            code = subprocess.run([sys.executable, __file__, part], timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = f"TIMEOUT {limit} s"
        print(f"== {part}: exit {code}, {time.perf_counter() - start:.0f} s\n", flush=True)
    raise SystemExit

import torch

import hybrid_ops
from hybrid_ops import _device, budget
from hybrid_ops._csrc import conv1d as conv_csrc, norm as csrc
from hybrid_ops._torch import conv1d as conv_plain, norm as plain

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
stream = torch.cuda.Stream()
torch.cuda.set_stream(stream)
SMS = _device.num_sms(0)
SHARED = 225 * 1024
begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def replay_us(calls, target_ms=1.5, replays=9):
    """Median microseconds of a call; `calls` are the same call on different inputs."""
    for call in calls:
        call()
    begin.record(); [call() for call in calls]; end.record(); end.synchronize()
    rounds = max(1, min(60, round(target_ms / max(begin.elapsed_time(end), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    times = []
    for i in range(replays):
        begin.record(); graph.replay(); end.record(); end.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) * 1000 / (rounds * len(calls)))
    return statistics.median(times)


def copy_us(nbytes):
    """A device copy that moves nbytes: half read, half written."""
    pairs = [torch.empty(2, max(nbytes // 4, 1), dtype=torch.int16, device="cuda") for _ in range(3)]
    return replay_us([lambda p=p: p[1].copy_(p[0]) for p in pairs], replays=13)


def timed(calls):
    try:
        return replay_us(calls)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "invalid" not in str(error):
            raise
        return math.inf


ratios, over = defaultdict(float), 0


def check(kind, label, got, ref, base, dtype):
    """hybrid_ops/budget.py's measure with one slice, on the GPU."""
    global over
    unit, tiny = torch.finfo(dtype).eps / 2, torch.finfo(F32).tiny
    got, ref, base = got.double(), ref.double(), base.to(dtype).double()
    worst = 0.0
    if got.numel():
        size = (ref.square().mean().sqrt().clamp(min=tiny), ref.abs().max().clamp(min=tiny))
        errors = lambda v: (float((v - ref).square().mean().sqrt() / size[0]), float((v - ref).abs().max() / size[1]))
        for mine, theirs, one in zip(errors(got), errors(base), (0.42 * unit, 0.72 * unit)):
            share = mine / (budget.FACTOR * max(theirs, one) + (2.0**-22 if dtype == F32 else 0.0))
            worst = max(worst, share if share == share else math.inf)
    ratios[kind] = max(ratios[kind], worst)
    if worst > 1:
        over += 1
        if over < 15:
            print(f"  OVER {worst:.2f}: {kind}: {label}", flush=True)


def nan(t, dtype=None):
    return None if t is None else torch.full(t.shape, float("nan"), dtype=dtype or t.dtype, device=t.device)


# ------------------------------------------------------------------ numbers


def norm_numbers():
    generator = torch.Generator("cuda").manual_seed(0)
    draw = random.Random(0)
    randn = lambda *shape: torch.randn(*shape, device="cuda", generator=generator)
    shapes = [(300, 1024, 8), (77, 128, 3), (33, 4096, 1), (9, 2688, 1), (40, 1280, 8), (21, 960, 2), (1, 1024, 8), (5, 4480, 1), (17, 2056, 2), (700, 512, 4)]
    count = 0
    for dtype, (rows, group, groups), form in itertools.product((BF16, F16, F32), shapes, ("gate", "before", "plain", "residual", "wide")):
        hidden = group * groups
        weight = (1 + randn(hidden)).to(draw.choice([dtype, F32]))
        sliced = lambda to: randn(rows, hidden + 16).to(to)[:, 8 : 8 + hidden] if draw.random() < 0.5 else randn(rows, hidden).to(to)
        x, dy = sliced(dtype), sliced(dtype)
        gated, before = form in ("gate", "before"), form == "before"
        z = sliced(dtype) if gated else None
        wide = F32 if form == "wide" else dtype
        residual = sliced(wide) * 4 if form in ("residual", "wide") else None
        y, h = nan(x), nan(residual)
        vectors = group * (4 if F32 in (dtype, wide) else 2) // 16
        configs, bwd_configs = [None], [None]
        for n in (1, 2, 3, 4, 5, 6):
            warps = -(-vectors // (32 * n))
            if warps <= 8:
                teams = draw.choice([t for t in (1, 2, 3, 4, 8) if t * warps <= 8])
                configs.append(csrc.Config(n, warps, teams))
                bwd_configs.append(csrc.BwdConfig(n, warps, teams, draw.choice([1, 3, 40]), draw.choice([1, 2, 2, 3])))
                if bwd_configs[-1].stages * n * warps * teams * 1536 > SHARED:
                    bwd_configs[-1] = bwd_configs[-1]._replace(stages=1)
        ref, base = ([nan(x, to), nan(h, to)] for to in (torch.float64, F32))
        up = lambda t, to: None if t is None else t.to(to)
        for (ry, rh), to in ((ref, torch.float64), (base, F32)):
            if residual is not None:
                rh.copy_((x.float() + residual.float()).to(wide))
            plain.norm_fwd(up(x, to) if rh is None else rh, up(z, to), None, up(weight, to), ry, None, 1e-5, group, before)
        label = f"{str(dtype)[6:]} {rows} x {groups} x {group} {form}"
        for config in configs:
            y, h = nan(x), nan(residual)
            csrc.norm(x, z, residual, weight, y, h, 1e-5, group, before, config)(x, z, residual, weight, y, h)
            check(f"fwd {str(dtype)[6:]}", f"{label} {config}", y, ref[0], base[0], dtype)
            if h is not None:
                assert torch.equal(h, ref[1].to(wide)), f"h: {label} {config}"
        # backward: of what the norm saw
        saw = x if residual is None else h
        dh = sliced(wide) if residual is not None and draw.random() < 0.8 else None
        results = []
        for to in (torch.float64, F32):
            du, dgate, dw = plain.norm_bwd(up(dy, to), up(saw, to), up(z, to), up(weight, to), 1e-5, group, before)
            results.append((du if dh is None else du + dh.to(to), dgate, dw))
        for config in bwd_configs:
            dx, dz, dweight = nan(x), nan(z), nan(weight)
            dresidual = nan(residual) if wide != dtype else None
            tensors = (dy, saw, z, weight, dh, dx, dz, dresidual, dweight)
            run = csrc.norm_bwd(*tensors, 1e-5, group, before, config)
            run(*tensors)
            for name, got, r, b in zip(("dx", "dz", "dweight", "dresidual"), (dx, dz, dweight, dresidual), (*results[0], results[0][0]), (*results[1], results[1][0])):
                if got is not None:
                    check(f"{name} {str(dtype)[6:]}", f"{label} {config}", got, r, b, dtype)
            again = nan(dweight)
            run(*tensors[:-1], again)
            assert torch.equal(again, dweight), f"not the same bits: {label} {config}"
        count += 1
    print(f"norm: {count} problems checked, {over} over; largest share of the budget:", {k: round(v, 2) for k, v in ratios.items()})
    # by the public functions
    x, r, w = randn(3, 5, 1024).to(BF16), randn(3, 5, 1024), randn(1024).to(BF16)
    for leaves in ([x, w], [x, w, r]):
        got = {}
        for impl in ("cuda", "torch"):
            ls = [t.clone().requires_grad_() for t in leaves]
            out = hybrid_ops.rms_norm(ls[0], ls[1], residual=ls[2] if len(ls) > 2 else None, impl=impl)
            out = out if isinstance(out, tuple) else (out,)
            got[impl] = [*out, *torch.autograd.grad([o.float().sin().sum() for o in out], ls)]
        for a, b in zip(got["cuda"], got["torch"]):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    assert hybrid_ops.explain("gated_rms_norm", group_size=1024).impl == "cuda"


def conv_numbers():
    generator = torch.Generator("cuda").manual_seed(0)
    draw = random.Random(0)
    randn = lambda *shape: torch.randn(*shape, device="cuda", generator=generator)
    count = 0
    ratios.clear()
    for dtype, packed, silu, _ in itertools.product((BF16, F16, F32), (False, True), (False, True), range(8)):
        dim, seqlen, batch = draw.choice([8, 72, 640, 1024]), draw.choice([1, 2, 3, 17, 70, 531]), 1 if packed else 3
        cu = torch.tensor([0, *sorted(draw.choices(range(seqlen + 1), k=6)), draw.choice([seqlen, max(0, seqlen - 9)])], dtype=torch.int32, device="cuda").sort()[0].int() if packed else None
        nseq = batch if cu is None else cu.numel() - 1
        other = draw.choice([dtype, F32])
        x = randn(batch, seqlen, dim + 16).to(dtype)[..., 8 : 8 + dim] if draw.random() < 0.5 else randn(batch, seqlen, dim).to(dtype)
        width = draw.choice([2, 3, 4])
        weight, bias = randn(dim, width).to(other), draw.choice([None, randn(dim).to(other)])
        history = draw.choice([None, randn(nseq, width - 1, dim).to(other).transpose(1, 2)])
        columns = -(-dim * x.element_size() // 512)
        tokens, stages = 4 * draw.choice([1, 2, 5, 30]), draw.choice([2, 3, 6])
        ctas = max(-(-columns // 4), draw.choice([1, 3, 50]))
        y = nan(x)
        tensors = (x, weight, bias, history, y, None, cu, None, None)
        conv_csrc.make_launch(*tensors, silu, -1, conv_csrc.Config(tokens, stages, ctas))(tensors)
        results = []
        for to in (torch.float64, F32):
            up = lambda t: None if t is None else t.to(to)
            places = conv_plain.rows_of(batch, seqlen, width - 1, x.device, cu, None)
            results.append(conv_plain.conv1d_fwd(up(x), up(weight), up(bias), up(history), places, silu)[0])
        if cu is not None:
            assert not y[:, int(cu[-1]) :].any(), "behind the sequences"
        check(f"conv {str(dtype)[6:]}", f"{tuple(x.shape)} width={width} silu={silu} packed={packed} T={tokens} stages={stages} ctas={ctas}", y, *results, dtype)
        count += 1
    print(f"conv ring: {count} problems checked, {over} over; largest share of the budget:", {k: round(v, 2) for k, v in ratios.items()})


def conv_bwd_numbers():
    """dx of both forms is the same bits; all of them within the budget of plain torch in float64."""
    generator = torch.Generator("cuda").manual_seed(0)
    draw = random.Random(0)
    randn = lambda *shape: torch.randn(*shape, device="cuda", generator=generator)
    count, other_bits = 0, 0
    ratios.clear()
    for dtype, packed, silu, _ in itertools.product((BF16, F16, F32), (False, True), (False, True), range(8)):
        dim, seqlen, batch = draw.choice([8, 72, 640, 1024]), draw.choice([1, 2, 3, 17, 70, 531]), 1 if packed else 3
        cu = torch.tensor([0, *sorted(draw.choices(range(seqlen + 1), k=6)), draw.choice([seqlen, max(0, seqlen - 9)])], dtype=torch.int32, device="cuda").sort()[0].int() if packed else None
        nseq, width = batch if cu is None else cu.numel() - 1, draw.choice([2, 3, 4])
        wide = lambda: randn(batch, seqlen, dim + 16).to(dtype)[..., 8 : 8 + dim] if draw.random() < 0.5 else randn(batch, seqlen, dim).to(dtype)
        x, dy, weight, bias = wide(), wide(), randn(dim, width).to(dtype), randn(dim).to(dtype)
        history = randn(nseq, width - 1, dim).to(dtype).transpose(1, 2) if draw.random() < 0.5 else None
        dfinal = randn(nseq, width - 1, dim).to(dtype).transpose(1, 2) if draw.random() < 0.5 else None
        columns = -(-dim * x.element_size() // 512)
        ring = conv_csrc.Config(4 * draw.choice([1, 2, 5, 30]), draw.choice([2, 3, 6]), max(-(-columns // 4), draw.choice([1, 3, 50])))
        found = []
        for config in (conv_csrc.Config(16), ring):
            grads = [nan(x), nan(weight), nan(bias), nan(history)]
            conv_csrc.conv1d_bwd(dy, dfinal, x, weight, bias, history, cu, *grads, silu, config)
            found.append(grads)
        other_bits += not torch.equal(found[0][0], found[1][0])
        results = []
        for to in (torch.float64, F32):
            up = lambda t: None if t is None else t.to(to)
            places = conv_plain.rows_of(batch, seqlen, width - 1, x.device, cu, None)
            results.append(conv_plain.conv1d_bwd(up(dy), up(dfinal), up(x), up(weight), up(bias), up(history), places, silu))
        for name, got, r, b in zip(("dx", "dweight", "dbias"), found[1], *results):
            check(f"{name} {str(dtype)[6:]}", f"{tuple(x.shape)} width={width} silu={silu} packed={packed} {tuple(ring)}", got, r, b, dtype)
        count += 1
    print(f"conv backward ring: {count} problems checked, {over} over, dx of {other_bits} differs from the other form's; largest share of the budget:", {k: round(v, 2) for k, v in ratios.items()})


# ------------------------------------------------------------------ norm sweeps

NORM = {  # rows, groups, size of a group, width of what z is a slice of (None: a residual); bars of forward and backward
    "Super gated 8 x 1024": (8192, 8, 1024, 18560),
    "Nano 3 gated 8 x 512": (8192, 8, 512, 10304),
    "Nano v2 gated 8 x 1280": (8192, 8, 1280, 22656),
    "residual 4096": (8192, 1, 4096, None),
    "residual 2688": (8192, 1, 2688, None),
    "residual 4480": (8192, 1, 4480, None),
}
BAR_FWD, BAR_BWD = 0.94, 0.88


def norm_set(rows, groups, group, wide):
    hidden = groups * group
    dense = lambda: torch.empty(rows, hidden, device="cuda", dtype=BF16).normal_()
    gated = wide is not None
    z = torch.empty(rows, wide, device="cuda", dtype=BF16).normal_()[:, :hidden] if gated else None
    return dict(
        x=dense(), z=z, residual=None if gated else dense(), weight=torch.rand(hidden, device="cuda", dtype=BF16) + 0.5,
        y=dense(), h=None if gated else dense(), dy=dense(), dh=None if gated else dense(), dx=dense(),
        dz=dense() if gated else None, dweight=torch.empty(hidden, device="cuda", dtype=BF16), group=group,
    )


def fwd_calls(sets, config):
    calls = []
    for s in sets:
        tensors = tuple(s[k] for k in ("x", "z", "residual", "weight", "y", "h"))
        run = csrc.norm(*tensors, 1e-5, s["group"], False, config)
        calls.append(lambda run=run, t=tensors: run(*t))
    return calls


def bwd_calls(sets, config):
    calls = []
    for s in sets:
        saw = s["x"] if s["h"] is None else s["h"]
        tensors = (s["dy"], saw, *(s[k] for k in ("z", "weight", "dh", "dx", "dz")), None, s["dweight"])
        run = csrc.norm_bwd(*tensors, 1e-5, s["group"], False, config)
        calls.append(lambda run=run, t=tensors: run(*t))
    return calls


def sweep(kind, bar, calls_of, triton_calls, chosen_of, neighbours, tensors_gated, tensors_residual):
    for case, shape in NORM.items():
        rows, groups, group, wide = shape
        sets = [norm_set(*shape) for _ in range(2 if group * groups > 9000 else 3)]
        copy = copy_us(2 * rows * groups * group * (tensors_residual if wide is None else tensors_gated))
        triton = timed(triton_calls(sets))
        chosen = chosen_of(rows, groups, group, 2, SMS)
        us = timed(calls_of(sets, chosen))
        others = sorted((timed(calls_of(sets, c)), tuple(c)) for c in dict.fromkeys(neighbours(chosen, rows, groups, group)) if c != chosen)
        print(f"{kind} {case}: copy {copy:.1f}, Triton {triton:.1f} ({copy / triton:.3f}), {tuple(chosen)} {us:.1f} "
              f"({copy / us:.3f}{'' if copy / us >= bar else ' UNDER ' + str(bar)}); next to it: "
              + "; ".join(f"{c} {t:.1f} ({copy / t:.3f})" for t, c in others[:4]), flush=True)
        del sets
        torch.cuda.empty_cache()


def fwd():
    def triton(sets):
        from hybrid_ops.triton_kernels import norm as kernels

        return [lambda s=s: kernels.norm(s["x"], s["z"], s["residual"], s["weight"], s["y"], s["h"], 1e-5, s["group"], False) for s in sets]

    def neighbours(chosen, rows, groups, group):
        for n in range(1, 7):
            warps = -(-(group // 8) // (32 * n))
            for teams in (1, 2, 4, 8):
                if warps * teams <= 8:
                    yield csrc.Config(n, warps, teams)

    sweep("fwd", BAR_FWD, fwd_calls, triton, csrc.config, neighbours, 3, 4)


def bwd():
    def triton(sets):
        from hybrid_ops.triton_kernels import norm_bwd as kernels

        return [lambda s=s: kernels.norm_bwd(s["dy"], s["x"] if s["h"] is None else s["h"], s["z"], s["weight"], s["dh"], s["dx"], s["dz"], None, s["dweight"], 1e-5, s["group"], False) for s in sets]

    def neighbours(chosen, rows, groups, group):
        n, warps, teams, *_ = chosen
        for per_sm in (1, 2, 3, 4):
            ctas = max(1, per_sm * SMS // groups)
            each = -(-rows // (ctas * teams))
            for stages in (2, 3, 4):
                if per_sm * stages * n * warps * teams * 1536 <= SHARED:
                    yield csrc.BwdConfig(n, warps, teams, -(-rows // (each * teams)), stages)

    sweep("bwd", BAR_BWD, bwd_calls, triton, csrc.bwd_config, neighbours, 5, 4)


def decode():
    """One row, or a few; Triton beside them, and two vectors of a lane."""
    from hybrid_ops.triton_kernels import norm as kernels

    for case in ("Super gated 8 x 1024", "Nano 3 gated 8 x 512", "Nano v2 gated 8 x 1280", "residual 4096", "residual 2688"):
        _, groups, group, wide = NORM[case]
        line = []
        for rows in (1, 4, 16, 64, 256):
            sets = [norm_set(rows, groups, group, wide) for _ in range(40 if rows < 256 else 10)]
            triton = timed([lambda s=s: kernels.norm(s["x"], s["z"], s["residual"], s["weight"], s["y"], s["h"], 1e-5, s["group"], False) for s in sets])
            chosen, large = csrc.config(rows, groups, group, 2, SMS), csrc.config(8192, groups, group, 2, SMS)
            line.append(f"x {rows}: {timed(fwd_calls(sets, chosen)):.2f}, as for many rows {timed(fwd_calls(sets, large)):.2f}, Triton {triton:.2f}")
        print(f"decode us, {case}: " + "; ".join(line), flush=True)


# ------------------------------------------------------------------ conv1d

CONV = {  # batch, seqlen, dim, a slice of in_proj, packed sequences
    "L8192 dim 10240": (1, 8192, 10240, False, 0),
    "same, slice of in_proj": (1, 8192, 10240, True, 0),
    "same, slice, packed 16": (1, 8192, 10240, True, 16),
    "b8 L2048 dim 6144 slice": (8, 2048, 6144, True, 0),
    "L4096 dim 10240": (1, 4096, 10240, False, 0),
    "L2048 dim 10240": (1, 2048, 10240, False, 0),
    "L512 dim 10240 (in L2)": (1, 512, 10240, False, 0),
    "L65536 dim 10240": (1, 65536, 10240, False, 0),
}


def conv_set(batch, seqlen, dim, strided, packed):
    wide = {10240: 18560, 6144: 10304}[dim]
    x = torch.empty(batch, seqlen, wide, device="cuda", dtype=BF16).normal_()[..., wide - 64 - dim : wide - 64] if strided else torch.empty(batch, seqlen, dim, device="cuda", dtype=BF16).normal_()
    cu = torch.linspace(0, seqlen, packed + 1, device="cuda").int() if packed else None
    weight, bias = torch.randn(dim, 4, device="cuda", dtype=BF16) * 0.5, torch.randn(dim, device="cuda", dtype=BF16) * 0.5
    return (x, weight, bias, None, torch.empty(batch, seqlen, dim, device="cuda", dtype=BF16), None, cu, None, None)


def conv_calls(sets, config=None):
    made = []
    for tensors in sets:
        launch = conv_csrc.make_launch(*tensors, True, -1, config)
        made.append(lambda launch=launch, t=tensors: launch(t))
    return made


def conv_bwd_calls(sets, config):
    """dx takes the place of y, dy is another tensor."""
    made = []
    for x, weight, bias, _, y, _, cu, _, _ in sets:
        tensors = (torch.randn_like(y), None, x, weight, bias, None, cu, y, weight.clone(), bias.clone(), None)
        made.append(lambda t=tensors: conv_csrc.conv1d_bwd(*t, True, config))
    return made


def conv():
    for case, shape in CONV.items():
        sets = [conv_set(*shape) for _ in range(2 if shape[1] > 60000 else 3)]
        copy = copy_us(4 * sets[0][0].numel())
        runs, chosen = (conv_csrc.config(*shape[:3], SMS, 2, in_pieces) for in_pieces in (False, True))
        line = []
        for config in dict.fromkeys((chosen, runs, conv_csrc.Config(12, 6, 2 * SMS))):
            us = timed(conv_calls(sets, config))
            line.append(f"{tuple(config)} {us:.1f} ({copy / us:.3f})")
        print(f"conv {case}: copy {copy:.1f}, chosen " + "; ".join(line), flush=True)
        copy = copy_us(6 * sets[0][0].numel())
        runs, chosen = (conv_csrc.bwd_config(*shape[:3], SMS, 2, in_pieces) for in_pieces in (False, True))
        line = []
        for config in dict.fromkeys((chosen, runs)):
            us = timed(conv_bwd_calls(sets, config))
            line.append(f"{tuple(config)} {us:.1f} ({copy / us:.3f})")
        print(f"conv backward {case}: copy {copy:.1f}, chosen " + "; ".join(line), flush=True)
        del sets
        torch.cuda.empty_cache()


# ------------------------------------------------------------------ host


def host():
    def us(call, number=50, repeats=40):
        for _ in range(30):
            call()
        each = []
        for _ in range(repeats):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(number):
                call()
            each.append((time.perf_counter() - start) * 1e6 / number)
        torch.cuda.synchronize()
        return statistics.median(each)

    x, z, w = (torch.randn(*s, device="cuda").to(BF16) for s in ((16, 4096), (16, 4096), (4096,)))
    print(f"host us, bar 25; zero_ of torch's {us(lambda: x.zero_()):.1f}")
    for impl in ("triton", "cuda", "auto"):
        print(f"  {impl}: rms_norm {us(lambda: hybrid_ops.rms_norm(x, w, impl=impl)):.1f}, residual {us(lambda: hybrid_ops.rms_norm(x, w, residual=z, impl=impl)):.1f}, "
              f"gated {us(lambda: hybrid_ops.gated_rms_norm(x, z, w, group_size=512, impl=impl)):.1f}", flush=True)
    leaves = [t.clone().requires_grad_() for t in (x, z, w)]
    for impl in ("triton", "cuda"):
        both = lambda: torch.autograd.grad(hybrid_ops.gated_rms_norm(*leaves, group_size=512, impl=impl), leaves, x)
        print(f"  {impl}: gated, forward and backward {us(both, 20, 20):.1f}", flush=True)


for part in sys.argv[1:]:
    for function in {"numbers": (norm_numbers, conv_numbers, conv_bwd_numbers), "fwd": (fwd,), "bwd": (bwd,), "decode": (decode,), "conv": (conv,), "host": (host,)}[part]:
        function()
