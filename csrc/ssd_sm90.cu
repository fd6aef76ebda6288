#include "ssd_sm90.cuh"

#include <algorithm>

#include "common/api.h"
#include "common/launch.cuh"
#include "common/tensor_map.cuh"
#include "ssd_pair_sm90.cuh"

namespace hybrid_ops {
namespace {

// In boxes of 64 tokens by 64 columns.
TensorMap tensor_map(std::uintptr_t data, const std::array<std::int64_t, 4>& sizes,
                     const std::array<std::int64_t, 3>& strides) {
  return tensor_map(data, DType::bfloat16, sizes, strides, {.tokens = kChunk, .columns = 64, .swizzled = true});
}

// See SsdConfig::kPaired.
bool is_paired(const SsdArgs& a) {
  return a.dstate > kStates && a.segments == 1 && a.turns == 1 && a.nheads / a.ngroups % 2 == 0 && a.num_sms >= 2;
}

// CTAs that share a sequence are a group; so many run at once.
std::int64_t count_groups(const SsdArgs& a) {
  const std::int64_t at_once = a.num_sms / (a.segments * a.turns);
  const std::int64_t together = a.normed ? a.nheads / a.ngroups : is_paired(a) ? 2 : 1;
  return std::min(a.nseq * a.nheads / a.heads, at_once / together * together);
}

// Bytes in the order in which they lie: pieces and flags, see ssd_segments.cuh; sums of squares, see ssd_norm.cuh.
struct WorkspaceParts {
  std::int64_t pieces = 0, flags = 0, squares = 0;
};

WorkspaceParts workspace_parts(const SsdArgs& a) {
  WorkspaceParts parts;
  if (a.segments > 1) {
    const std::int64_t walkers = (a.headdim > 64 ? 2 : 1) * (a.dstate > kStates ? 2 : 1);
    const std::int64_t each = 2 * count_groups(a) * walkers;
    parts.pieces = each * (a.segments + 1) * kPieceFloats * 4;
    parts.flags = each * a.segments * a.segments * 4 * 8;
  }
  if (a.normed) parts.squares = (a.batch * a.seqlen / kChunk + 2 * a.nseq + 1) * a.nheads * kChunk * 4;
  return parts;
}

template <auto kKernel, typename Config>
void launch(const SsdParams& p, const SsdArgs& a, Target target) {
  allow_shared_memory<kKernel>(Config::kSharedBytes, target.device);
  cudaLaunchAttribute together{};
  const bool clustered = p.paired || a.turns > 1;
  const bool cooperative = Config::kSplit || Config::kNormed;
  if (cooperative) {  // CTAs that share a sequence, or a group, wait for each other
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
  } else {
    together.id = cudaLaunchAttributeClusterDimension;
    together.val.clusterDim = {2, 1, 1};
  }
  std::array attributes{early_launch(), together};
  const cudaLaunchConfig_t config{
      .gridDim = dim3(static_cast<unsigned>(count_groups(a) * a.segments * a.turns)),
      .blockDim = dim3(Config::kThreads),
      .dynamicSmemBytes = Config::kSharedBytes,
      .stream = reinterpret_cast<cudaStream_t>(target.stream),
      .attrs = attributes.data(),
      .numAttrs = cooperative || clustered ? 2u : 1u,
  };
  check(cudaLaunchKernelEx(&config, kKernel, p), "ssd_kernel");
}

template <typename Config>
void launch_single(const SsdParams& p, const SsdArgs& a, Target target) {
  launch<ssd_kernel<Config>, Config>(p, a, target);
}

// y normed, where models need it.
void launch_normed(const SsdParams& p, const SsdArgs& a, Target target) {
  if (a.heads != 1 || a.turns != 1 || a.headdim > 80 || (a.headdim > 64 && a.segments > 1) || a.dstate > kStates ||
      count_groups(a) == 0)
    throw std::runtime_error("ssd: no such norm");
  if (a.headdim > 64) return launch_single<SsdConfig<80, 1, true, Sharing::none, true>>(p, a, target);
  if (a.segments > 1) return launch_single<SsdConfig<64, 1, true, Sharing::segments, true>>(p, a, target);
  launch_single<SsdConfig<64, 1, true, Sharing::none, true>>(p, a, target);
}

template <typename Config>
void launch_pair(const SsdParams& p, const SsdArgs& a, Target target) {
  launch<ssd_pair_kernel<Config>, Config>(p, a, target);
}

template <int kFeatures, int kHalves, bool kGated>
void launch_split(const SsdParams& p, const SsdArgs& a, Target target) {
  const auto launch = [&]<Sharing kSharing>() {
    launch_single<SsdConfig<kFeatures, kHalves, kGated, kSharing>>(p, a, target);
  };
  if (a.segments > 1) return launch.template operator()<Sharing::segments>();
  if (a.turns > 1) return launch.template operator()<Sharing::turns>();
  launch.template operator()<Sharing::none>();
}

template <int kFeatures, int kHalves>
void launch_gated(const SsdParams& p, bool gated, const SsdArgs& a, Target target) {
  if (!gated) return launch_split<kFeatures, kHalves, false>(p, a, target);
  launch_split<kFeatures, kHalves, true>(p, a, target);
}

}  // namespace

std::int64_t workspace_bytes(const SsdArgs& a) {
  const auto [pieces, flags, squares] = workspace_parts(a);
  return pieces + flags + squares;
}

void ssd_fwd(const SsdArgs& a, const SsdTensors& t, Target target) {
  const auto floats = [](std::uintptr_t data, DType dtype) {
    return Floats{reinterpret_cast<const void*>(data), dtype};
  };
  const auto states = [](std::uintptr_t data, DType dtype, std::int64_t stride, std::uintptr_t slots) {
    return States{reinterpret_cast<void*>(data), dtype, stride, reinterpret_cast<const int*>(slots)};
  };
  SsdParams p{};
  p.x_map = tensor_map(t.x, {a.batch, a.seqlen, a.nheads, a.headdim}, a.x_strides);
  p.B_map = tensor_map(t.B, {a.batch, a.seqlen, a.ngroups, a.dstate}, a.B_strides);
  p.C_map = tensor_map(t.C, {a.batch, a.seqlen, a.ngroups, a.dstate}, a.C_strides);
  if (a.plain_z) {
    p.plain_z = reinterpret_cast<const bf16*>(t.z);
    std::copy(a.z_strides.begin(), a.z_strides.end(), p.z_strides);
  } else if (t.z != 0) {
    p.z_map = tensor_map(t.z, {a.batch, a.seqlen, a.nheads, a.headdim}, a.z_strides);
  }
  p.y_map = tensor_map(t.y, {a.batch, a.seqlen, a.nheads, a.headdim}, a.y_strides);
  p.dt = floats(t.dt, a.dt_dtype);
  p.dt_bias = floats(t.dt_bias, a.dt_bias_dtype);
  p.D = floats(t.D, a.D_dtype);
  p.A = reinterpret_cast<const float*>(t.A);
  std::copy(a.dt_strides.begin(), a.dt_strides.end(), p.dt_strides);
  p.dt_bias_stride = a.dt_bias_stride;
  std::copy(a.D_strides.begin(), a.D_strides.end(), p.D_strides);
  p.y = reinterpret_cast<bf16*>(t.y);
  std::copy(a.y_strides.begin(), a.y_strides.end(), p.y_strides);
  p.cu_seqlens = reinterpret_cast<const int*>(t.cu_seqlens);
  p.seq_offsets = reinterpret_cast<const int*>(t.seq_offsets);
  p.initial = states(t.initial, a.initial_dtype, a.state_strides[0], t.read_slots);
  p.final = states(t.final, a.final_dtype, a.state_strides[1], t.write_slots);
  p.interval = states(t.interval, a.interval_dtype, a.state_strides[2], t.interval_slots);
  p.interval_base = reinterpret_cast<const int*>(t.interval_base);
  p.segments = a.segments;
  p.paired = is_paired(a);
  const auto [pieces, flags, squares] = workspace_parts(a);
  p.pieces = reinterpret_cast<float*>(t.workspace);
  p.flags = reinterpret_cast<uint64*>(t.workspace + pieces);
  p.ticket = a.ticket;
  p.squares = reinterpret_cast<float*>(t.workspace + pieces + flags);
  p.norm_weight = reinterpret_cast<const bf16*>(t.norm_weight);
  p.norm_eps = a.norm_eps;
  p.inverse_group = 1.f / static_cast<float>(a.nheads / a.ngroups * a.headdim);
  p.dt_min = a.dt_min;
  p.dt_max = a.dt_max;
  p.seqlen = static_cast<int>(a.seqlen);
  p.nseq = static_cast<int>(a.nseq);
  p.nheads = static_cast<int>(a.nheads);
  p.headdim = static_cast<int>(a.headdim);
  p.dstate = static_cast<int>(a.dstate);
  p.heads_per_group = static_cast<int>(a.nheads / a.ngroups);
  p.num_slots = static_cast<int>(a.num_slots);
  p.null_slot = a.null_slot;
  p.num_intervals = static_cast<int>(a.num_intervals);
  p.state_interval = static_cast<int>(a.state_interval);
  p.dt_softplus = a.dt_softplus;

  // a warp waits for all segments at once, a lane for each
  if (a.segments < 1 || a.segments > 32) throw std::runtime_error("ssd: segments must be 1 to 32");
  const bool pairs = a.headdim <= 64 && a.dstate <= kStates && a.nheads / a.ngroups % 2 == 0 && a.segments == 1;
  if (a.heads != 1 && !(a.heads == 2 && pairs && a.turns == 1)) throw std::runtime_error("ssd: no such pairs of heads");
  if (a.turns != 1 && !(a.turns == 2 && a.segments == 1))
    throw std::runtime_error("ssd: turns must be 1, or 2 of segments = 1");
  const DeviceGuard guard(target.device);
  const bool gated = t.z != 0;
  if (a.normed) {
    // kNoSum everywhere
    check(cudaMemsetAsync(p.squares, 0xFF, squares, reinterpret_cast<cudaStream_t>(target.stream)), "ssd: squares");
    return launch_normed(p, a, target);
  }
  if (a.heads == 2) {
    return gated ? launch_pair<PairConfig<true>>(p, a, target) : launch_pair<PairConfig<false>>(p, a, target);
  }
  if (a.dstate > kStates) return launch_gated<64, 2>(p, gated, a, target);
  if (a.headdim > 80) return launch_gated<128, 1>(p, gated, a, target);
  if (a.headdim > 64) return launch_gated<80, 1>(p, gated, a, target);
  return launch_gated<64, 1>(p, gated, a, target);
}

}  // namespace hybrid_ops
