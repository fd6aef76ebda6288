// Division by a number that a launch knows, as a multiplication.
#pragma once

namespace hybrid_ops {

// n / d for d > 1; where d does not divide n, for n d < 2^32.
struct Divisor {
  unsigned inverse;

  __device__ __forceinline__ int of(int n) const {
    return static_cast<int>(__umulhi(static_cast<unsigned>(n), inverse));
  }
};

__host__ __device__ constexpr Divisor divisor(unsigned d) { return {0xffffffffu / d + 1}; }

}  // namespace hybrid_ops
