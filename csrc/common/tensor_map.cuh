// Host side: what TMA is to know of a tensor.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/dtype.h"
#include "common/hopper.cuh"
#include "common/launch.cuh"

namespace hybrid_ops {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));

struct Box {
  std::int64_t tokens, columns;  // of one row
  bool swizzled;  // the 16 bytes of columns, of which there are 128 bytes, by the last three bits of the token
};

// A (batch, seqlen, rows, columns) tensor, strides of the first three, in boxes.
inline TensorMap tensor_map(std::uintptr_t data, DType dtype, const std::array<std::int64_t, 4>& sizes,
                            const std::array<std::int64_t, 3>& strides, const Box& box) {
  static const auto encode =
      reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(driver_function("cuTensorMapEncodeTiled"));
  const auto [batch, seqlen, rows, columns] = sizes;
  const std::int64_t itemsize = dtype == DType::float32 ? 4 : 2;
  // where there is one row or sequence its stride means nothing, and may be one that TMA does not take
  const auto bytes = [&](std::int64_t size, std::int64_t stride) {
    return static_cast<cuuint64_t>(size == 1 ? 16 : itemsize * stride);
  };
  const cuuint64_t dimensions[4] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                                    static_cast<cuuint64_t>(seqlen), static_cast<cuuint64_t>(batch)};
  const cuuint64_t steps[3] = {bytes(rows, strides[2]), bytes(seqlen, strides[1]), bytes(batch, strides[0])};
  const cuuint32_t shape[4] = {static_cast<cuuint32_t>(box.columns), 1, static_cast<cuuint32_t>(box.tokens), 1};
  const cuuint32_t every[4] = {1, 1, 1, 1};
  const auto type = dtype == DType::float32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                    : dtype == DType::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  TensorMap map;
  const CUresult status = encode(reinterpret_cast<CUtensorMap*>(&map), type, 4, reinterpret_cast<void*>(data),
                                 dimensions, steps, shape, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 box.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status));
  return map;
}

}  // namespace hybrid_ops
