// Host side of both directions of RMSNorm: from a problem to the template that is compiled for it.
#pragma once

#include "common/api.h"
#include "common/launch.cuh"
#include "common/norm.cuh"

namespace hybrid_ops {

// Run::most<T, Stream, kGate>() vectors of a lane at most; run.operator()<T, Stream, kGate, kVectors>()
template <typename T, typename Stream, Gate kGate, int kVectors = 1, typename Run>
void norm_with_vectors(int vectors, const Run& run) {
  if (vectors == kVectors) return run.template operator()<T, Stream, kGate, kVectors>();
  if constexpr (kVectors < Run::template most<T, Stream, kGate>()) {
    return norm_with_vectors<T, Stream, kGate, kVectors + 1>(vectors, run);
  }
  throw std::runtime_error("norm: not compiled for " + std::to_string(vectors) + " vectors of a lane");
}

template <typename T, typename Run>
void norm_with_type(const NormForm& form, const Run& run) {
  if (form.gated && form.norm_before_gate) return norm_with_vectors<T, T, Gate::last>(form.vectors, run);
  if (form.gated) return norm_with_vectors<T, T, Gate::first>(form.vectors, run);
  if (form.stream_dtype == form.dtype) return norm_with_vectors<T, T, Gate::none>(form.vectors, run);
  return norm_with_vectors<T, float, Gate::none>(form.vectors, run);
}

template <typename Run>
void norm_dispatch(const NormForm& form, const Run& run) {
  switch (form.dtype) {
    case DType::float32: return norm_with_type<float>(form, run);
    case DType::bfloat16: return norm_with_type<__nv_bfloat16>(form, run);
    case DType::float16: return norm_with_type<__half>(form, run);
    default: throw std::runtime_error("norm: x must be float32, bfloat16 or float16");
  }
}

// So many CTAs for each group of features, of which neighbours come first.
inline dim3 norm_grid(const NormForm& form, std::int64_t ctas) {
  constexpr std::int64_t kMost = 65535;
  return dim3(static_cast<unsigned>(form.hidden / form.group_size), static_cast<unsigned>(std::min(ctas, kMost)),
              static_cast<unsigned>((ctas + kMost - 1) / kMost));
}

}  // namespace hybrid_ops
