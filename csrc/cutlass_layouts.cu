// What CUTLASS says about layouts that this library produces by itself: the oracle for its tests.
#include <cutlass/version.h>
#include <cute/tensor.hpp>
#include <cutlass/detail/sm100_blockscaled_layout.hpp>

#include "common/api.h"

namespace hybrid_ops {

std::string cutlass_version() {
  return std::to_string(CUTLASS_MAJOR) + "." + std::to_string(CUTLASS_MINOR) + "." + std::to_string(CUTLASS_PATCH);
}

// Where the block-scaled matrix instructions expect the scale of `row` and of the block-th 16 elements along columns,
// in a (rows, columns) operand: the "128x4" layout of NVFP4 scales.
std::int64_t scale_offset_128x4(std::int64_t row, std::int64_t block, std::int64_t rows, std::int64_t columns) {
  constexpr int kBlock = 16;
  const auto shape = cute::make_shape(static_cast<int>(rows), 1, static_cast<int>(columns), 1);
  const auto layout = cutlass::detail::Sm1xxBlockScaledConfig<kBlock>::tile_atom_to_shape_SFA(shape);
  return layout(static_cast<int>(row), static_cast<int>(block) * kBlock, 0);
}

}  // namespace hybrid_ops
