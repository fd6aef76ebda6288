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
  if (form.warps * form.teams > kMaxNormWarps || form.stages > kMaxNormStages) {
    throw std::runtime_error("norm: a CTA has at most 8 warps and 4 stages");
  }
  switch (form.dtype) {
    case DType::float32: return norm_with_type<float>(form, run);
    case DType::bfloat16: return norm_with_type<__nv_bfloat16>(form, run);
    case DType::float16: return norm_with_type<__half>(form, run);
    default: throw std::runtime_error("norm: x must be float32, bfloat16 or float16");
  }
}

// Launch for a grid of form.ctas CTAs in each group, with so many bytes of shared memory for each warp.
template <typename Params>
void norm_launch(void (*kernel)(Params), const Params& p, const NormForm& form, int bytes_of_warp, cudaStream_t stream,
                 const char* name) {
  const int shared = form.warps * form.teams * bytes_of_warp;
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared), name);
  }
  kernel<<<form.ctas * p.groups, dim3(32 * form.warps, form.teams), shared, stream>>>(p);
  check(cudaGetLastError(), name);
}

}  // namespace hybrid_ops
