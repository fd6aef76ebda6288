// The second kernel of a sum over rows, which adds what CTAs of the first one have left, in their order.
#pragma once

namespace hybrid_ops {

// add(load(row)) for rows first, first + kStep, .. of those below `rows`. kAtOnce of them are under way at a time: a
// thread that waits for memory once has nearly all it is to add.
template <int kAtOnce, int kStep, typename Load, typename Add>
__device__ __forceinline__ void add_rows(int first, int rows, Load load, Add add) {
#pragma unroll 1
  for (; first < rows; first += kAtOnce * kStep) {
    decltype(load(0)) values[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * kStep < rows) values[i] = load(first + i * kStep);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) add(values[i]);
  }
}

}  // namespace hybrid_ops
