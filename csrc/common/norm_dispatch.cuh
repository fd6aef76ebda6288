// Host side of both directions of RMSNorm: from a problem to the template that is compiled for it.
#pragma once

#include "common/api.h"
#include "common/launch.cuh"
#include "common/norm.cuh"

namespace hybrid_ops {

// run.operator()<T, Stream, kGate, kVectors>()
template <typename T, typename Stream, Gate kGate, typename Run>
void norm_with_vectors(int vectors, const Run& run) {
  switch (vectors) {
    case 1: return run.template operator()<T, Stream, kGate, 1>();
    case 2: return run.template operator()<T, Stream, kGate, 2>();
    case 3: return run.template operator()<T, Stream, kGate, 3>();
    case 4: return run.template operator()<T, Stream, kGate, 4>();
    case 5: return run.template operator()<T, Stream, kGate, 5>();
    case 6: return run.template operator()<T, Stream, kGate, 6>();
    default: throw std::runtime_error("norm: a lane has 1 to 6 vectors, got " + std::to_string(vectors));
  }
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
  if (form.warps * form.teams > kMaxNormWarps) throw std::runtime_error("norm: a CTA has at most 8 warps");
  switch (form.dtype) {
    case DType::float32: return norm_with_type<float>(form, run);
    case DType::bfloat16: return norm_with_type<__nv_bfloat16>(form, run);
    case DType::float16: return norm_with_type<__half>(form, run);
    default: throw std::runtime_error("norm: x must be float32, bfloat16 or float16");
  }
}

// Of so many CTAs for each group of features.
inline dim3 norm_grid(const NormForm& form, std::int64_t ctas) {
  return dim3(static_cast<unsigned>(ctas * (form.hidden / form.group_size)));
}

inline dim3 norm_block(const NormForm& form) { return dim3(32 * form.warps, form.teams); }

}  // namespace hybrid_ops
