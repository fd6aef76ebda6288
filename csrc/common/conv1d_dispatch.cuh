// Host side of both directions of the causal conv1d: from a problem to the template that is compiled for it.
#pragma once

#include "common/api.h"
#include "common/conv1d.cuh"
#include "common/launch.cuh"

namespace hybrid_ops {

// Blocks of kConvThreads for so many threads, which the kernels count in 32 bits.
inline unsigned conv1d_blocks(int64 threads) {
  if (threads >= 1LL << 32) throw std::runtime_error("conv1d: the grid would exceed 2^32 threads");
  return static_cast<unsigned>((threads + kConvThreads - 1) / kConvThreads);
}

// CTAs (channels, tiles): y and z together count the tiles, and the last of them may be none.
inline dim3 conv1d_grid(int64 columns, int64 tiles) {
  if (tiles >= 1LL << 31) throw std::runtime_error("conv1d: the grid would exceed 2^31 tiles");
  const unsigned z = static_cast<unsigned>((tiles + 65534) / 65535);
  return dim3(static_cast<unsigned>(columns), z == 0 ? 0 : static_cast<unsigned>((tiles + z - 1) / z), z);
}

// run.operator()<T, kWidth, kSilu, kPacked>()
template <typename T, int kWidth, typename Run>
void conv1d_with_form(bool silu, bool packed, const Run& run) {
  if (silu && packed) return run.template operator()<T, kWidth, true, true>();
  if (silu) return run.template operator()<T, kWidth, true, false>();
  if (packed) return run.template operator()<T, kWidth, false, true>();
  return run.template operator()<T, kWidth, false, false>();
}

template <typename T, typename Run>
void conv1d_with_width(std::int64_t width, bool silu, bool packed, const Run& run) {
  switch (width) {
    case 2: return conv1d_with_form<T, 2>(silu, packed, run);
    case 3: return conv1d_with_form<T, 3>(silu, packed, run);
    case 4: return conv1d_with_form<T, 4>(silu, packed, run);
    default: throw std::runtime_error("conv1d: width must be 2, 3 or 4, got " + std::to_string(width));
  }
}

template <typename Run>
void conv1d_dispatch(DType dtype, std::int64_t width, bool silu, bool packed, const Run& run) {
  switch (dtype) {
    case DType::float32: return conv1d_with_width<float>(width, silu, packed, run);
    case DType::bfloat16: return conv1d_with_width<__nv_bfloat16>(width, silu, packed, run);
    case DType::float16: return conv1d_with_width<__half>(width, silu, packed, run);
  }
}

}  // namespace hybrid_ops
