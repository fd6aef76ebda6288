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

// n / d for any n and d below 2^31.
struct WideDivisor {
  unsigned long long inverse;
  int shift;

  __device__ __forceinline__ int of(unsigned n) const { return static_cast<int>(n * inverse >> shift); }
};

__host__ __device__ constexpr WideDivisor wide_divisor(unsigned d) {
  int shift = 31;
  while (d >> (shift - 31) != 0) ++shift;
  return {d == 0 ? 0 : (1ULL << shift) / d + 1, shift};
}

}  // namespace hybrid_ops
