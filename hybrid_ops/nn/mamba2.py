"""The Mamba-2 mixer: projection, causal convolution, state-space scan, gated norm, projection."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..conv1d import causal_conv1d
from ..conv1d_update import causal_conv1d_update
from ..mamba2_step import mamba2_step
from ..ssd import ssd_chunk_scan
from ..ssd_update import ssd_state_update
from .norm import GatedRMSNorm


@dataclass
class Drafts:
    """Which of the last call's tokens count, where that is decided afterwards (speculative decoding).

    ssm_slots: (batch, 1 + drafts) int32, the rows of the SSM pool that take the state after each token of a call; the
    first column is 0 .. batch-1, as without drafts.
    num_accepted: (batch,) int32, how many tokens of the last call count. rollback: (batch,) int32, how many do not.
    """

    ssm_slots: Tensor
    num_accepted: Tensor
    rollback: Tensor

    @classmethod
    def new(cls, batch: int, drafts: int, device: torch.device | str | None) -> "Drafts":
        numbers = torch.arange(batch * (1 + drafts), dtype=torch.int32, device=device)
        ones = torch.ones(batch, dtype=torch.int32, device=device)
        return cls(numbers.view(1 + drafts, batch).T.contiguous(), ones, torch.zeros_like(ones))


@dataclass
class MambaState:
    """What one mixer remembers of each sequence; row i of both pools is sequence i's.

    conv: (batch, conv_dim, width - 1), the convolution's last inputs, oldest first. ssm: (batch, nheads, headdim,
    dstate). slots: (batch,) int32, 0 .. batch-1. Zero is the state before the first token.

    With `drafts`, conv has a column more for each draft, and ssm the rows of its ssm_slots.
    """

    conv: Tensor
    ssm: Tensor
    slots: Tensor
    drafts: Drafts | None = None

    def accepted(self) -> tuple[Tensor, Tensor]:
        """conv (batch, conv_dim, width - 1) and ssm (batch, ..) after the tokens that count."""
        if self.drafts is None:
            return self.conv, self.ssm
        rows, spare = self.slots.long(), self.drafts.ssm_slots.shape[1] - 1
        width = self.conv.shape[2] - spare
        first = spare - self.drafts.rollback.long()
        columns = first[:, None, None] + torch.arange(width, device=rows.device)
        slots = self.drafts.ssm_slots[rows, self.drafts.num_accepted.long() - 1]
        return self.conv.gather(2, columns.expand(-1, self.conv.shape[1], -1)), self.ssm[slots.long()]


class Mamba2Mixer(nn.Module):
    """Mamba-2's mixer, with H heads of P channels, G groups, N states and d_inner = H * P.

    ::

        z, xBC, dt = split(in_proj(u))                  # d_inner, d_inner + 2*G*N, H
        x, B, C    = split(silu(causal_conv1d(xBC)))    # d_inner, G*N, G*N
        dt         = clamp(softplus(dt + dt_bias))
        S_t        = exp(-exp(A_log) * dt_t) S_{t-1} + dt_t x_t B_t^T          # per head, (P, N)
        y_t        = S_t C_t + D x_t
        return out_proj(gated_norm(y, z))               # the norm over each of the G groups

    A_log, D and dt_bias are kept in float32 (float64 in a float64 module) whatever `dtype` is.

    Source: Dao and Gu 2024, "Transformers are SSMs", section 7 and eq. 2.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        head_dim: int,
        state_size: int,
        num_groups: int,
        conv_kernel: int = 4,
        chunk_size: int = 128,
        bias: bool = False,
        conv_bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner = num_heads * head_dim
        conv_dim = d_inner + 2 * num_groups * state_size
        self.num_heads, self.head_dim, self.num_groups, self.state_size = num_heads, head_dim, num_groups, state_size
        self.chunk_size = chunk_size
        self.split_sizes = [d_inner, conv_dim, num_heads]
        dtype = dtype or torch.get_default_dtype()
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.in_proj = nn.Linear(hidden_size, sum(self.split_sizes), bias=bias, device=device, dtype=dtype)
        # holds the weight (conv_dim, 1, width) and bias under the checkpoint's names; its forward is not used
        self.conv1d = nn.Conv1d(
            conv_dim, conv_dim, conv_kernel, groups=conv_dim, bias=conv_bias, device=device, dtype=dtype
        )
        self.A_log = nn.Parameter(torch.zeros(num_heads, device=device, dtype=state_dtype))
        self.D = nn.Parameter(torch.ones(num_heads, device=device, dtype=state_dtype))
        self.dt_bias = nn.Parameter(torch.zeros(num_heads, device=device, dtype=state_dtype))
        self.norm = GatedRMSNorm(d_inner, group_size=d_inner // num_groups, eps=eps, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_inner, hidden_size, bias=bias, device=device, dtype=dtype)

    @torch.no_grad()
    def init_states(self, dt_min: float = 0.001, dt_max: float = 0.1, dt_floor: float = 1e-4) -> None:
        """Draw A from [1, 16] and softplus(dt_bias) log-uniformly from [dt_min, dt_max]; D is 1."""
        self.A_log.uniform_(1, 16).log_()
        self.D.fill_(1)
        dt = torch.empty_like(self.dt_bias).uniform_(math.log(dt_min), math.log(dt_max)).exp_().clamp_(min=dt_floor)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(dt_bias) = dt

    def forward(
        self,
        u: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        state: MambaState | None = None,
        dt_limit: tuple[float, float] = (0.0, math.inf),
    ) -> Tensor:
        """Read whole sequences, or pieces of them that go on from `state`.

        Args:
            u: (batch, seqlen, hidden), or packed (1, total, hidden) with `cu_seqlens`.
            cu_seqlens: (nseq + 1,) int32.
            state: read and overwritten; without it every sequence starts from zero and gradients flow.
            dt_limit: dt is clamped to this interval.

        Returns:
            (batch, seqlen, hidden).
        """
        z, xBC, dt = self.in_proj(u).split(self.split_sizes, dim=-1)
        slots = None if state is None else state.slots
        xBC = causal_conv1d(
            xBC,
            self._conv_weight(),
            self.conv1d.bias,
            activation="silu",
            cu_seqlens=cu_seqlens,
            conv_state=None if state is None else state.conv,
            read_slots=slots,
            write_slots=slots,
        )
        x, B, C = self._split(xBC)  # type: ignore[arg-type]
        y = ssd_chunk_scan(
            x,
            dt,
            self._A(),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=dt_limit,
            chunk_size=self.chunk_size,
            cu_seqlens=cu_seqlens,
            ssm_state=None if state is None else state.ssm,
            read_slots=slots,
            write_slots=slots,
            z=z.unflatten(-1, (self.num_heads, self.head_dim)),
            norm_weight=self.norm.weight,
            norm_eps=self.norm.eps,
        )
        return self.out_proj(y.flatten(-2))  # type: ignore[union-attr]

    def step(self, u: Tensor, state: MambaState, *, dt_limit: tuple[float, float] = (0.0, math.inf)) -> Tensor:
        """The next tokens of every sequence: u (batch, seqlen, hidden) -> (batch, seqlen, hidden).

        `state` is read and overwritten. With drafts, it starts after the tokens of the last call that count, and keeps
        what it is after each of these. Without, a single token of each sequence is one `mamba2_step`.
        """
        zxbcdt, drafts = self.in_proj(u), state.drafts
        if drafts is None and u.shape[1] == 1:
            y = mamba2_step(
                zxbcdt[:, 0],
                state.conv,
                state.ssm,
                self._conv_weight(),
                self._A(),
                self.norm.weight,
                conv_bias=self.conv1d.bias,
                D=self.D,
                dt_bias=self.dt_bias,
                dt_limit=dt_limit,
                eps=self.norm.eps,
                group_size=self.norm.group_size,
                slots=state.slots,
            )
            return self.out_proj(y)[:, None]
        z, xBC, dt = zxbcdt.split(self.split_sizes, dim=-1)
        read, write = state.slots, state.slots
        if drafts is not None:
            read, write = drafts.ssm_slots, drafts.ssm_slots[:, : u.shape[1]]
        xBC = causal_conv1d_update(
            xBC,
            state.conv,
            self._conv_weight(),
            self.conv1d.bias,
            activation="silu",
            slots=state.slots,
            rollback=None if drafts is None else drafts.rollback,
        )
        x, B, C = self._split(xBC)
        y = ssd_state_update(
            state.ssm,
            x,
            dt,
            self._A(),
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=dt_limit,
            read_slots=read,
            write_slots=write,
            num_accepted=None if drafts is None else drafts.num_accepted,
        )
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _conv_weight(self) -> Tensor:
        return self.conv1d.weight.squeeze(1)

    def _A(self) -> Tensor:
        return -torch.exp(self.A_log if self.A_log.dtype == torch.float64 else self.A_log.float())

    def _split(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., conv_dim) -> x (..., H, P), B and C (..., G, N), views."""
        groups = self.num_groups * self.state_size
        x, B, C = xBC.split([self.split_sizes[0], groups, groups], dim=-1)
        return (
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            B.unflatten(-1, (self.num_groups, self.state_size)),
            C.unflatten(-1, (self.num_groups, self.state_size)),
        )
