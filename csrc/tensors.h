// All that the extension knows of torch: a view of a tensor's memory, read through the DLPack 1.x C exchange
// table that torch.Tensor carries. This needs no torch headers, allocates nothing, and costs about as much as
// one attribute lookup.
#pragma once

#include <cstdint>

namespace hvp::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBFloat = 4 };

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dimensions;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeHeader {
  uint32_t major, minor;
  ExchangeHeader* previous;
};

struct ExchangeTable {
  ExchangeHeader header;
  void* allocate;  // unused here, as are the next two
  void* export_owned;
  void* import_owned;
  int (*view)(void* tensor, Tensor* out);                                 // -1 and a Python error on failure
  int (*current_stream)(int32_t device_type, int32_t index, void** out);  // likewise
};

constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsule = "dlpack_exchange_api";
constexpr uint32_t kMajor = 1;

}  // namespace hvp::dlpack
