// hybrid_ops._cuda: device pointers, sizes, strides and a stream go in as integers. Knows neither torch nor CUDA, so
// one build serves every torch, and importing it needs no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/api.h"

namespace py = pybind11;
using namespace hybrid_ops;

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ kernels of hybrid_ops; call the public functions of hybrid_ops instead";

  m.attr("FLOAT32") = static_cast<int>(DType::float32);
  m.attr("BFLOAT16") = static_cast<int>(DType::bfloat16);
  m.attr("FLOAT16") = static_cast<int>(DType::float16);

  m.def(
      "conv1d_fwd",
      [](std::array<std::uintptr_t, 9> pointers, std::array<int, 4> dtypes, std::array<std::int64_t, 7> sizes,
         std::array<std::int64_t, 2> x_strides, std::array<std::int64_t, 2> y_strides,
         std::array<std::int64_t, 3> initial_strides, std::array<std::int64_t, 3> final_strides, int null_slot,
         bool silu, int tokens_per_thread, int device, std::uintptr_t stream) {
        const auto [x, weight, bias, initial_states, y, final_states, cu_seqlens, read_slots, write_slots] = pointers;
        const auto [batch, seqlen, dim, width, nseq, nslots, state_len] = sizes;
        const Conv1dArgs args{
            .x = x,
            .weight = weight,
            .bias = bias,
            .initial_states = initial_states,
            .y = y,
            .final_states = final_states,
            .cu_seqlens = cu_seqlens,
            .read_slots = read_slots,
            .write_slots = write_slots,
            .dtype = DType(dtypes[0]),
            .weight_dtype = DType(dtypes[1]),
            .bias_dtype = DType(dtypes[2]),
            .states_dtype = DType(dtypes[3]),
            .batch = batch,
            .seqlen = seqlen,
            .dim = dim,
            .width = width,
            .nseq = nseq,
            .nslots = nslots,
            .state_len = state_len,
            .x_strides = x_strides,
            .y_strides = y_strides,
            .initial_strides = initial_strides,
            .final_strides = final_strides,
            .null_slot = null_slot,
            .silu = silu,
            .tokens_per_thread = tokens_per_thread,
        };
        conv1d_fwd(args, {device, stream});
      },
      "Fill y, and final_states where given; the groups hold what Conv1dArgs in api.h names, in its order.",
      py::arg("pointers"), py::arg("dtypes"), py::arg("sizes"), py::arg("x_strides"), py::arg("y_strides"),
      py::arg("initial_strides"), py::arg("final_strides"), py::arg("null_slot"), py::arg("silu"),
      py::arg("tokens_per_thread"), py::arg("device"), py::arg("stream"));

  m.def(
      "conv1d_bwd",
      [](std::array<std::uintptr_t, 12> pointers, std::array<int, 4> dtypes, std::array<std::int64_t, 5> sizes,
         std::array<std::array<std::int64_t, 2>, 3> strides, std::array<std::array<std::int64_t, 3>, 3> state_strides,
         bool silu, int tokens_per_thread, int device, std::uintptr_t stream) {
        const auto [dy, x, weight, bias, initial_states, dfinal_states, dx, dweight, dbias, dinitial_states, partials,
                    cu_seqlens] = pointers;
        const auto [batch, seqlen, dim, width, nseq] = sizes;
        const Conv1dBwdArgs args{
            .dy = dy,
            .x = x,
            .weight = weight,
            .bias = bias,
            .initial_states = initial_states,
            .dfinal_states = dfinal_states,
            .dx = dx,
            .dweight = dweight,
            .dbias = dbias,
            .dinitial_states = dinitial_states,
            .partials = partials,
            .cu_seqlens = cu_seqlens,
            .dtype = DType(dtypes[0]),
            .weight_dtype = DType(dtypes[1]),
            .bias_dtype = DType(dtypes[2]),
            .states_dtype = DType(dtypes[3]),
            .batch = batch,
            .seqlen = seqlen,
            .dim = dim,
            .width = width,
            .nseq = nseq,
            .dy_strides = strides[0],
            .x_strides = strides[1],
            .dx_strides = strides[2],
            .initial_strides = state_strides[0],
            .dfinal_strides = state_strides[1],
            .dinitial_strides = state_strides[2],
            .silu = silu,
            .tokens_per_thread = tokens_per_thread,
        };
        conv1d_bwd(args, {device, stream});
      },
      "Fill dx, dweight, and dbias and dinitial_states where given; the groups hold what Conv1dBwdArgs in api.h names, "
      "in its order.",
      py::arg("pointers"), py::arg("dtypes"), py::arg("sizes"), py::arg("strides"), py::arg("state_strides"),
      py::arg("silu"), py::arg("tokens_per_thread"), py::arg("device"), py::arg("stream"));

  m.def("cutlass_version", &cutlass_version, "Version of the CUTLASS headers that the extension was built with.");
  m.def("scale_offset_128x4", &scale_offset_128x4,
        "Offset, by CUTLASS, of the NVFP4 scale of (row, block of 16 columns) in the layout \"128x4\".", py::arg("row"),
        py::arg("block"), py::arg("rows"), py::arg("columns"));
}
