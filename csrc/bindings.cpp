// hybrid_ops._cuda: sizes, strides and a stream go in as integers, tensors as they are. Compiled against neither torch
// nor CUDA, so one build serves every torch, and importing it needs no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <bit>
#include <random>

#include "common/api.h"
#include "common/tensors.h"

namespace py = pybind11;
using namespace hybrid_ops;

// A struct or array of addresses, for a tuple of as many tensors; or of one less, where the last is of a workspace.
template <typename Tensors>
Tensors addresses(const py::tuple& tensors, const Workspace* workspace = nullptr) {
  std::array<std::uintptr_t, sizeof(Tensors) / sizeof(std::uintptr_t)> found;
  const std::size_t count = found.size() - (workspace != nullptr);
  if (!read_addresses(tensors.ptr(), found.data(), count)) throw py::error_already_set();
  if (workspace != nullptr) found[count] = workspace->address();
  return std::bit_cast<Tensors>(found);
}

// What `launch` does, with as many bytes beside the tensors as workspace_bytes says.
template <typename Tensors, auto launch, typename Args>
void with_workspace(const Args& args, const py::tuple& tensors, int device, std::uintptr_t stream) {
  Workspace workspace;
  if (!workspace.allocate(workspace_bytes(args), dlpack::kCuda, device)) throw py::error_already_set();
  launch(args, addresses<Tensors>(tensors, &workspace), {device, stream});
}

NormForm norm_form(std::array<int, 3> dtypes, std::array<std::int64_t, 3> sizes, bool gated, bool norm_before_gate,
                   float eps, std::array<int, 4> config) {
  return {
      .dtype = DType(dtypes[0]),
      .stream_dtype = DType(dtypes[1]),
      .weight_dtype = DType(dtypes[2]),
      .rows = sizes[0],
      .hidden = sizes[1],
      .group_size = sizes[2],
      .gated = gated,
      .norm_before_gate = norm_before_gate,
      .eps = eps,
      .vectors = config[0],
      .warps = config[1],
      .teams = config[2],
      .streaming = config[3] != 0,
  };
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ kernels of hybrid_ops; call the public functions of hybrid_ops instead";

  m.attr("FLOAT32") = static_cast<int>(DType::float32);
  m.attr("BFLOAT16") = static_cast<int>(DType::bfloat16);
  m.attr("FLOAT16") = static_cast<int>(DType::float16);
  m.attr("FLOAT8_E4M3FN") = static_cast<int>(DType::float8_e4m3);
  m.attr("INT8") = static_cast<int>(DType::int8);

  m.def(
      "learn_tensor_type",
      [](const py::type& tensor) {
        if (!learn_tensor_type(tensor.ptr())) throw py::error_already_set();
      },
      "To be called with torch.Tensor before anything else.", py::arg("tensor"));
  static PyMethodDef signature_method{"signature", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&signature)),
                                      METH_FASTCALL, "What calls of a kind have in common: see hybrid_ops._signature."};
  m.attr("signature") = py::reinterpret_steal<py::object>(PyCFunction_New(&signature_method, nullptr));

  py::class_<Conv1dArgs>(m, "Conv1d", "A convolution of one signature; the groups hold what Conv1dArgs in api.h names.")
      .def(py::init([](std::array<int, 4> dtypes, std::array<std::int64_t, 7> sizes,
                       std::array<std::int64_t, 2> x_strides, std::array<std::int64_t, 2> y_strides,
                       std::array<std::int64_t, 3> initial_strides, std::array<std::int64_t, 3> final_strides,
                       int null_slot, bool silu, std::array<int, 2> config) {
             const auto [batch, seqlen, dim, width, nseq, nslots, state_len] = sizes;
             return Conv1dArgs{
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
                 .channels = config[0],
                 .columns = config[1],
             };
           }),
           py::arg("dtypes"), py::arg("sizes"), py::arg("x_strides"), py::arg("y_strides"), py::arg("initial_strides"),
           py::arg("final_strides"), py::arg("null_slot"), py::arg("silu"), py::arg("config"))
      .def(
          "__call__",
          [](const Conv1dArgs& args, const py::tuple& tensors, int device, std::uintptr_t stream) {
            conv1d_fwd(args, addresses<Conv1dTensors>(tensors), {device, stream});
          },
          "Fill y and the states; tensors in the order of Conv1dTensors in api.h, None where absent.",
          py::arg("tensors"), py::arg("device"), py::arg("stream"));

  py::class_<Conv1dBwdArgs>(m, "Conv1dBwd", "Its gradients; the groups hold what Conv1dBwdArgs in api.h names.")
      .def(py::init([](std::array<int, 4> dtypes, std::array<std::int64_t, 6> sizes,
                       std::array<std::array<std::int64_t, 2>, 3> strides,
                       std::array<std::array<std::int64_t, 3>, 3> state_strides, bool silu, bool in_boxes) {
             const auto [batch, seqlen, dim, width, nseq, rows] = sizes;
             return Conv1dBwdArgs{
                 .dtype = DType(dtypes[0]),
                 .weight_dtype = DType(dtypes[1]),
                 .bias_dtype = DType(dtypes[2]),
                 .states_dtype = DType(dtypes[3]),
                 .batch = batch,
                 .seqlen = seqlen,
                 .dim = dim,
                 .width = width,
                 .nseq = nseq,
                 .rows = rows,
                 .dy_strides = strides[0],
                 .x_strides = strides[1],
                 .dx_strides = strides[2],
                 .initial_strides = state_strides[0],
                 .dfinal_strides = state_strides[1],
                 .dinitial_strides = state_strides[2],
                 .silu = silu,
                 .in_boxes = in_boxes,
             };
           }),
           py::arg("dtypes"), py::arg("sizes"), py::arg("strides"), py::arg("state_strides"), py::arg("silu"),
           py::arg("in_boxes"))
      .def("__call__", &with_workspace<Conv1dBwdTensors, conv1d_bwd, Conv1dBwdArgs>,
           "Fill dx, dweight, and dbias and dinitial_states where given; tensors in the order of Conv1dBwdTensors.",
           py::arg("tensors"), py::arg("device"), py::arg("stream"));

  py::class_<SsdArgs>(m, "SsdScan", "The forward of an SSD scan for tensors of given shapes: call it with them.")
      .def(py::init([](std::array<int, 6> dtypes, std::array<std::int64_t, 10> sizes,
                       std::array<std::array<std::int64_t, 3>, 7> strides, std::int64_t dt_bias_stride,
                       std::array<std::int64_t, 2> D_strides, bool dt_softplus, float dt_min, float dt_max,
                       int null_slot, bool plain_z, int segments, int heads, int turns, int num_sms, bool normed,
                       float norm_eps) {
             const auto [batch, seqlen, nheads, headdim, ngroups, dstate, nseq, num_slots, num_intervals, interval] =
                 sizes;
             std::random_device random;
             return SsdArgs{
                 .dt_dtype = DType(dtypes[0]),
                 .dt_bias_dtype = DType(dtypes[1]),
                 .D_dtype = DType(dtypes[2]),
                 .initial_dtype = DType(dtypes[3]),
                 .final_dtype = DType(dtypes[4]),
                 .interval_dtype = DType(dtypes[5]),
                 .batch = batch,
                 .seqlen = seqlen,
                 .nheads = nheads,
                 .headdim = headdim,
                 .ngroups = ngroups,
                 .dstate = dstate,
                 .nseq = nseq,
                 .num_slots = num_slots,
                 .num_intervals = num_intervals,
                 .state_interval = interval,
                 .x_strides = strides[0],
                 .B_strides = strides[1],
                 .C_strides = strides[2],
                 .z_strides = strides[3],
                 .y_strides = strides[4],
                 .dt_strides = strides[5],
                 .dt_bias_stride = dt_bias_stride,
                 .D_strides = D_strides,
                 .state_strides = strides[6],
                 .dt_softplus = dt_softplus,
                 .dt_min = dt_min,
                 .dt_max = dt_max,
                 .null_slot = null_slot,
                 .segments = segments,
                 .heads = heads,
                 .plain_z = plain_z,
                 .turns = turns,
                 .ticket = static_cast<std::uint64_t>(random()) << 32 | random(),
                 .num_sms = num_sms,
                 .normed = normed,
                 .norm_eps = norm_eps,
             };
           }),
           "The groups hold what SsdArgs in api.h names, in its order; strides: x, B, C, z, y, dt, states.",
           py::arg("dtypes"), py::arg("sizes"), py::arg("strides"), py::arg("dt_bias_stride"), py::arg("D_strides"),
           py::arg("dt_softplus"), py::arg("dt_min"), py::arg("dt_max"), py::arg("null_slot"), py::arg("plain_z"),
           py::arg("segments"), py::arg("heads"), py::arg("turns"), py::arg("num_sms"), py::arg("normed"),
           py::arg("norm_eps"))
      .def("__call__", &with_workspace<SsdTensors, ssd_fwd, SsdArgs>,
           "Fill y and the states; tensors in the order of SsdTensors in api.h, None where absent.", py::arg("tensors"),
           py::arg("device"), py::arg("stream"));

  py::class_<Conv1dUpdateArgs>(m, "Conv1dUpdate",
                               "An update of one signature; the groups hold what Conv1dUpdateArgs in api.h names.")
      .def(py::init([](std::array<int, 3> dtypes, std::array<std::int64_t, 4> sizes,
                       std::array<std::int64_t, 5> strides, int null_slot, bool silu) {
             const auto [batch, dim, width, nslots] = sizes;
             const auto [state_slot, state_column, x, y, slots] = strides;
             return Conv1dUpdateArgs{
                 .dtype = DType(dtypes[0]),
                 .weight_dtype = DType(dtypes[1]),
                 .bias_dtype = DType(dtypes[2]),
                 .batch = batch,
                 .dim = dim,
                 .width = width,
                 .nslots = nslots,
                 .state_slot_stride = state_slot,
                 .state_column_stride = state_column,
                 .x_stride = x,
                 .y_stride = y,
                 .slots_stride = slots,
                 .null_slot = null_slot,
                 .silu = silu,
             };
           }),
           py::arg("dtypes"), py::arg("sizes"), py::arg("strides"), py::arg("null_slot"), py::arg("silu"))
      .def(
          "__call__",
          [](const Conv1dUpdateArgs& args, const py::tuple& tensors, int device, std::uintptr_t stream) {
            conv1d_update(args, addresses<Conv1dUpdatePointers>(tensors), {device, stream});
          },
          py::arg("tensors"), py::arg("device"), py::arg("stream"));

  py::class_<SsdUpdateArgs>(m, "SsdUpdate",
                            "A decoding step of one signature; the groups hold what SsdUpdateArgs in api.h names.")
      .def(py::init([](std::array<int, 6> dtypes, std::array<std::int64_t, 10> sizes,
                       std::array<std::int64_t, 3> state_strides, std::array<std::int64_t, 3> scale_strides,
                       std::array<SsdUpdateArgs::TokenStrides, 6> token_strides,
                       std::array<std::int64_t, 10> small_strides, int null_slot, std::array<float, 2> dt_limit,
                       bool dt_softplus, bool store_each, bool store_last, std::array<int, 2> config, int num_sms) {
             const auto [batch, tokens, total, nslots, nheads, headdim, dstate, ngroups, read_width, write_width] =
                 sizes;
             const auto [A, dt_bias, D_head, D_p, read, read_column, write, write_column, accepted, bounds] =
                 small_strides;
             return SsdUpdateArgs{
                 .state_dtype = DType(dtypes[0]),
                 .dtype = DType(dtypes[1]),
                 .dt_dtype = DType(dtypes[2]),
                 .D_dtype = DType(dtypes[3]),
                 .z_dtype = DType(dtypes[4]),
                 .dt_bias_dtype = DType(dtypes[5]),
                 .batch = batch,
                 .tokens = tokens,
                 .total = total,
                 .nslots = nslots,
                 .nheads = nheads,
                 .headdim = headdim,
                 .dstate = dstate,
                 .ngroups = ngroups,
                 .read_width = read_width,
                 .write_width = write_width,
                 .state_strides = state_strides,
                 .scale_strides = scale_strides,
                 .x_strides = token_strides[0],
                 .z_strides = token_strides[1],
                 .y_strides = token_strides[2],
                 .dt_strides = token_strides[3],
                 .B_strides = token_strides[4],
                 .C_strides = token_strides[5],
                 .A_stride = A,
                 .dt_bias_stride = dt_bias,
                 .D_strides = {D_head, D_p},
                 .read_strides = {read, read_column},
                 .write_strides = {write, write_column},
                 .accepted_stride = accepted,
                 .bounds_stride = bounds,
                 .null_slot = null_slot,
                 .dt_min = dt_limit[0],
                 .dt_max = dt_limit[1],
                 .dt_softplus = dt_softplus,
                 .store_each = store_each,
                 .store_last = store_last,
                 .warps = config[0],
                 .rows = config[1],
                 .num_sms = num_sms,
             };
           }),
           py::arg("dtypes"), py::arg("sizes"), py::arg("state_strides"), py::arg("scale_strides"),
           py::arg("token_strides"), py::arg("small_strides"), py::arg("null_slot"), py::arg("dt_limit"),
           py::arg("dt_softplus"), py::arg("store_each"), py::arg("store_last"), py::arg("config"), py::arg("num_sms"))
      .def(
          "__call__",
          [](const SsdUpdateArgs& args, const py::tuple& tensors, int device, std::uintptr_t stream) {
            ssd_update(args, addresses<SsdUpdatePointers>(tensors), {device, stream});
          },
          py::arg("tensors"), py::arg("device"), py::arg("stream"));

  py::class_<SsdReplayArgs>(m, "SsdReplay",
                            "A replaying step of one signature; the groups hold what SsdReplayArgs in api.h names.")
      .def(py::init([](std::array<int, 6> dtypes, std::array<std::int64_t, 9> sizes,
                       std::array<std::array<std::int64_t, 3>, 4> slot_strides,
                       std::array<SsdReplayArgs::TokenStrides, 6> token_strides,
                       std::array<std::int64_t, 8> small_strides, int null_slot, std::array<float, 2> dt_limit,
                       bool dt_softplus, std::array<int, 3> config) {
             const auto [batch, tokens, nslots, nheads, headdim, dstate, ngroups, capacity, places] = sizes;
             const auto [ring, A, dt_bias, D_head, D_p, slots, rollback, write] = small_strides;
             return SsdReplayArgs{
                 .state_dtype = DType(dtypes[0]),
                 .dtype = DType(dtypes[1]),
                 .dt_dtype = DType(dtypes[2]),
                 .D_dtype = DType(dtypes[3]),
                 .z_dtype = DType(dtypes[4]),
                 .dt_bias_dtype = DType(dtypes[5]),
                 .batch = batch,
                 .tokens = tokens,
                 .nslots = nslots,
                 .nheads = nheads,
                 .headdim = headdim,
                 .dstate = dstate,
                 .ngroups = ngroups,
                 .capacity = capacity,
                 .places = places,
                 .state_strides = slot_strides[0],
                 .cache_x_strides = slot_strides[1],
                 .cache_B_strides = slot_strides[2],
                 .cache_dt_strides = slot_strides[3],
                 .ring_stride = ring,
                 .x_strides = token_strides[0],
                 .z_strides = token_strides[1],
                 .y_strides = token_strides[2],
                 .dt_strides = token_strides[3],
                 .B_strides = token_strides[4],
                 .C_strides = token_strides[5],
                 .A_stride = A,
                 .dt_bias_stride = dt_bias,
                 .D_strides = {D_head, D_p},
                 .slots_stride = slots,
                 .rollback_stride = rollback,
                 .write_stride = write,
                 .null_slot = null_slot,
                 .dt_min = dt_limit[0],
                 .dt_max = dt_limit[1],
                 .dt_softplus = dt_softplus,
                 .rows = config[0],
                 .warps = config[1],
                 .heads = config[2],
             };
           }),
           py::arg("dtypes"), py::arg("sizes"), py::arg("slot_strides"), py::arg("token_strides"),
           py::arg("small_strides"), py::arg("null_slot"), py::arg("dt_limit"), py::arg("dt_softplus"),
           py::arg("config"))
      .def(
          "__call__",
          [](const SsdReplayArgs& args, const py::tuple& tensors, int device, std::uintptr_t stream) {
            ssd_replay(args, addresses<SsdReplayPointers>(tensors), {device, stream});
          },
          py::arg("tensors"), py::arg("device"), py::arg("stream"));

  py::class_<Mamba2StepArgs>(m, "Mamba2Step",
                             "A mixer's decoding step of one signature; the groups hold what Mamba2StepArgs in api.h "
                             "names.")
      .def(py::init([](std::array<int, 8> dtypes, std::array<std::int64_t, 9> sizes,
                       std::array<std::int64_t, 2> row_strides, std::array<std::int64_t, 3> conv_strides,
                       std::array<std::int64_t, 3> state_strides, std::array<std::int64_t, 7> small_strides,
                       int null_slot, std::array<float, 2> dt_limit, float eps, bool dt_softplus, bool norm_before_gate,
                       std::array<int, 3> config) {
             const auto [batch, nslots, nheads, headdim, dstate, conv_dim, width, group_size, rows_per_group] = sizes;
             const auto [conv_bias, A, D_head, D_p, dt_bias, norm_weight, slots] = small_strides;
             return Mamba2StepArgs{
                 .dtype = DType(dtypes[0]),
                 .conv_state_dtype = DType(dtypes[1]),
                 .state_dtype = DType(dtypes[2]),
                 .conv_weight_dtype = DType(dtypes[3]),
                 .conv_bias_dtype = DType(dtypes[4]),
                 .D_dtype = DType(dtypes[5]),
                 .dt_bias_dtype = DType(dtypes[6]),
                 .norm_weight_dtype = DType(dtypes[7]),
                 .batch = batch,
                 .nslots = nslots,
                 .nheads = nheads,
                 .headdim = headdim,
                 .dstate = dstate,
                 .conv_dim = conv_dim,
                 .width = width,
                 .group_size = group_size,
                 .rows_per_group = rows_per_group,
                 .zxbcdt_stride = row_strides[0],
                 .y_stride = row_strides[1],
                 .conv_strides = conv_strides,
                 .state_strides = state_strides,
                 .conv_bias_stride = conv_bias,
                 .A_stride = A,
                 .D_strides = {D_head, D_p},
                 .dt_bias_stride = dt_bias,
                 .norm_weight_stride = norm_weight,
                 .slots_stride = slots,
                 .null_slot = null_slot,
                 .dt_min = dt_limit[0],
                 .dt_max = dt_limit[1],
                 .eps = eps,
                 .dt_softplus = dt_softplus,
                 .norm_before_gate = norm_before_gate,
                 .cluster = config[0],
                 .warps = config[1],
                 .crowded = config[2] != 0,
             };
           }),
           py::arg("dtypes"), py::arg("sizes"), py::arg("row_strides"), py::arg("conv_strides"),
           py::arg("state_strides"), py::arg("small_strides"), py::arg("null_slot"), py::arg("dt_limit"),
           py::arg("eps"), py::arg("dt_softplus"), py::arg("norm_before_gate"), py::arg("config"))
      .def(
          "__call__",
          [](const Mamba2StepArgs& args, const py::tuple& tensors, int device, std::uintptr_t stream) {
            mamba2_step(args, addresses<Mamba2StepPointers>(tensors), {device, stream});
          },
          py::arg("tensors"), py::arg("device"), py::arg("stream"));

  py::class_<NormArgs>(m, "Norm", "An RMSNorm of one signature; the groups hold what NormForm in api.h names.")
      .def(
          py::init([](std::array<int, 3> dtypes, std::array<std::int64_t, 3> sizes, std::array<std::int64_t, 4> strides,
                      bool gated, bool norm_before_gate, float eps, std::array<int, 4> config) {
            return NormArgs{norm_form(dtypes, sizes, gated, norm_before_gate, eps, config), strides};
          }),
          py::arg("dtypes"), py::arg("sizes"), py::arg("strides"), py::arg("gated"), py::arg("norm_before_gate"),
          py::arg("eps"), py::arg("config"))
      .def(
          "__call__",
          [](const NormArgs& args, const py::tuple& tensors, int device, std::uintptr_t stream) {
            norm_fwd(args, addresses<NormTensors>(tensors), {device, stream});
          },
          "Fill y, and h with a residual.", py::arg("tensors"), py::arg("device"), py::arg("stream"));

  py::class_<NormBwdArgs>(m, "NormBwd", "The gradients of an RMSNorm of one signature, as Norm.")
      .def(
          py::init([](std::array<int, 3> dtypes, std::array<std::int64_t, 3> sizes, std::array<std::int64_t, 3> strides,
                      bool gated, bool norm_before_gate, float eps, std::array<int, 5> config) {
            const auto [vectors, warps, teams, ctas, streaming] = config;
            const NormForm form =
                norm_form(dtypes, sizes, gated, norm_before_gate, eps, {vectors, warps, teams, streaming});
            return NormBwdArgs{form, strides, ctas};
          }),
          py::arg("dtypes"), py::arg("sizes"), py::arg("strides"), py::arg("gated"), py::arg("norm_before_gate"),
          py::arg("eps"), py::arg("config"))
      .def("__call__", &with_workspace<NormBwdTensors, norm_bwd, NormBwdArgs>,
           "Fill dx, dweight, and dz or dresidual where given; tensors in the order of NormBwdTensors.",
           py::arg("tensors"), py::arg("device"), py::arg("stream"));

  m.def("cutlass_version", &cutlass_version, "Version of the CUTLASS headers that the extension was built with.");
  m.def("scale_offset_128x4", &scale_offset_128x4,
        "Offset, by CUTLASS, of the NVFP4 scale of (row, block of 16 columns) in the layout \"128x4\".", py::arg("row"),
        py::arg("block"), py::arg("rows"), py::arg("columns"));
}
