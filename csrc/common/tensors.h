// What bindings.cpp reads of torch's tensors, through DLPack's C exchange API: a table of functions that torch.Tensor
// carries, so that nothing is compiled against torch or linked with it. An argument takes 20 to 40 ns; to ask for its
// attributes in Python, 300.
#pragma once

#include <Python.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

namespace hybrid_ops {

// What is used here of dlpack.h, version 1.3 or a later one of major version 1.
namespace dlpack {

constexpr std::int32_t kCuda = 2;      // a device_type
constexpr std::uint8_t kUnsigned = 1;  // a code

struct Tensor {
  void* data;
  std::int32_t device_type, device_index;
  std::int32_t ndim;
  std::uint8_t code, bits;  // of the dtype
  std::uint16_t lanes;
  std::int64_t *shape, *strides;  // the tensor's own
  std::uint64_t byte_offset;
};

struct ManagedTensor {
  std::uint32_t major, minor;
  void* context;
  void (*release)(ManagedTensor*);
  std::uint64_t flags;
  Tensor tensor;
};

using SetError = void (*)(void* context, const char* kind, const char* message);

struct ExchangeApi {
  std::uint32_t major, minor;
  ExchangeApi* previous;
  int (*allocate)(Tensor* like, ManagedTensor** out, void* context, SetError set_error);  // 0, or -1 and an error set
  void *export_owning, *import_owning;
  int (*view)(void* object, Tensor* out);  // 0, or -1 and a Python error
  int (*current_stream)(std::int32_t device_type, std::int32_t device_index, void** out);
};

}  // namespace dlpack

struct Torch {
  PyTypeObject* tensor = nullptr;
  const dlpack::ExchangeApi* api = nullptr;
};
inline Torch torch;

// To be called once with torch.Tensor; false and a Python error where it has no such table.
inline bool learn_tensor_type(PyObject* tensor) {
  PyObject* capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  if (capsule == nullptr) return false;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (api == nullptr) return false;
  if (api->major != 1 || api->view == nullptr || api->allocate == nullptr) {
    PyErr_Format(PyExc_ImportError, "torch.Tensor has DLPack %u.%u, not 1.x", api->major, api->minor);
    return false;
  }
  torch = {reinterpret_cast<PyTypeObject*>(Py_NewRef(tensor)), api};
  return true;
}

inline bool is_tensor(PyObject* object) { return PyObject_TypeCheck(object, torch.tensor) != 0; }

// signature(*arguments): bytes, which hold dtype, device, shape, strides and alignment to 16 bytes of every tensor and
// the places of all others, followed by those others but None. None where a tensor has no address.
inline PyObject* signature(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr std::size_t kWords = 512;
  constexpr std::int64_t kNone = -1, kOther = -2;
  std::int64_t words[kWords];
  std::size_t size = 0;
  Py_ssize_t others = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    dlpack::Tensor tensor;
    std::size_t needed = 1;
    const bool viewed = is_tensor(arguments[i]);
    if (viewed) {
      if (torch.api->view(arguments[i], &tensor) != 0) {
        PyErr_Clear();
        Py_RETURN_NONE;
      }
      needed += 2 * static_cast<std::size_t>(tensor.ndim);
    }
    if (size + needed > kWords) Py_RETURN_NONE;
    if (!viewed) {
      words[size++] = arguments[i] == Py_None ? kNone : kOther;
      others += arguments[i] != Py_None;
      continue;
    }
    const auto address = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
    words[size++] = tensor.ndim | address % 16 << 8 | std::int64_t{tensor.code} << 16 |
                    std::int64_t{tensor.bits} << 24 | std::int64_t{tensor.device_type} << 32 |
                    std::int64_t{tensor.device_index} << 48;
    for (const std::int64_t* values : {tensor.shape, tensor.strides}) {
      std::memcpy(words + size, values, sizeof(*values) * tensor.ndim);
      size += tensor.ndim;
    }
  }
  PyObject* bytes = PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words), sizeof(*words) * size);
  PyObject* key = bytes == nullptr ? nullptr : PyTuple_New(1 + others);
  if (key == nullptr) {
    Py_XDECREF(bytes);
    return nullptr;
  }
  PyTuple_SET_ITEM(key, 0, bytes);
  for (Py_ssize_t i = 0, place = 1; i < count; ++i)
    if (arguments[i] != Py_None && !is_tensor(arguments[i])) PyTuple_SET_ITEM(key, place++, Py_NewRef(arguments[i]));
  return key;
}

// Addresses of the first `count` of a tuple's tensors, 0 for None; false and a Python error where there are none.
inline bool read_addresses(PyObject* tensors, std::uintptr_t* addresses, Py_ssize_t count) {
  if (PyTuple_GET_SIZE(tensors) < count) {
    PyErr_Format(PyExc_TypeError, "expected %zd tensors, got %zd", count, PyTuple_GET_SIZE(tensors));
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* object = PyTuple_GET_ITEM(tensors, i);
    addresses[i] = 0;
    if (object == Py_None) continue;
    if (!is_tensor(object)) {
      PyErr_Format(PyExc_TypeError, "expected a torch.Tensor, got %s", Py_TYPE(object)->tp_name);
      return false;
    }
    dlpack::Tensor tensor;
    if (torch.api->view(object, &tensor) != 0) return false;
    addresses[i] = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
  }
  return true;
}

// Memory of torch's allocator that belongs to the device's current stream: whatever was launched there before it goes
// may use it. Costs the host half of what a tensor made in Python does: 1 us.
class Workspace {
 public:
  Workspace() = default;
  ~Workspace() {
    if (memory_ != nullptr) memory_->release(memory_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // To be called once; false and a Python error where there is not so much.
  bool allocate(std::int64_t bytes, std::int32_t device_type, std::int32_t device_index) {
    if (bytes == 0) return true;
    dlpack::Tensor like{.device_type = device_type,
                        .device_index = device_index,
                        .ndim = 1,
                        .code = dlpack::kUnsigned,
                        .bits = 8,
                        .lanes = 1,
                        .shape = &bytes};
    return torch.api->allocate(&like, &memory_, nullptr, raise_out_of_memory) == 0;
  }

  // 0 where no bytes were asked for.
  std::uintptr_t address() const {
    return memory_ == nullptr ? 0
                              : reinterpret_cast<std::uintptr_t>(memory_->tensor.data) + memory_->tensor.byte_offset;
  }

 private:
  static void raise_out_of_memory(void*, const char*, const char* message) {
    PyObject* module = PyImport_ImportModule("torch");
    PyObject* type = module == nullptr ? nullptr : PyObject_GetAttrString(module, "OutOfMemoryError");
    if (type != nullptr) PyErr_SetString(type, message);
    Py_XDECREF(type);
    Py_XDECREF(module);
  }

  dlpack::ManagedTensor* memory_ = nullptr;
};

}  // namespace hybrid_ops
