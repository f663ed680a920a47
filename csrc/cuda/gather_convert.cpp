// gather_convert's border: its checks, its launch and its registration with torch.
#include "border.h"

namespace crossan_fast::border {

Tensor gather_convert(const Tensor& states, const OptionalTensor& scales, const OptionalTensor& ids,
                      at::ScalarType dtype) {
  TORCH_CHECK_VALUE(states.dim() == 3, "states: expected shape [rows, levels, width], got ", states.sizes());
  TORCH_CHECK_VALUE(states.is_contiguous(), "states: expected a contiguous tensor, got strides ", states.strides());
  int kind = kind_of(states.scalar_type()), output_kind = kind_of(dtype);
  TORCH_CHECK_TYPE(kind >= 0, "states: expected float32, float16, bfloat16, float8_e4m3fn or int8, got ",
                   states.scalar_type());
  TORCH_CHECK_TYPE(output_kind >= 0 && output_kind <= 2, "dtype: expected float32, float16 or bfloat16, got ", dtype);
  at::Device device = ids ? ids->device() : states.device();
  bool reachable = states.device() == device || (states.is_cpu() && states.is_pinned());
  TORCH_CHECK_VALUE(reachable && device.type() == kDeviceType, "states: expected device ", device,
                    " or pinned host memory, got ", states.device());
  if (scales) {
    check_tensor("scales", *scales, {states.size(0), states.size(1)}, at::kFloat, states.device());
    TORCH_CHECK_VALUE(scales->is_contiguous(), "scales: expected a contiguous tensor, got strides ", scales->strides());
    TORCH_CHECK_VALUE(scales->device() == device || scales->is_pinned(), "scales: expected device ", device,
                      " or pinned host memory, got ", scales->device());
  }
  if (ids) {
    check_ids("ids", *ids);
    TORCH_CHECK_VALUE(ids->dim() == 1, "ids: expected shape [items], got ", ids->sizes());
  }
  DeviceGuard guard(device);
  OptionalTensor rows = contiguous(ids);
  int64_t count = rows ? rows->size(0) : states.size(0);
  Tensor output = at::empty({count, states.size(1), states.size(2)}, states.options().dtype(dtype).device(device));
  check_code(crossan_gather_convert(states.const_data_ptr(), pointer<const float>(scales), pointer<const void>(rows),
                                    is_wide(rows), states.size(0), count, states.size(1), states.size(2), kind,
                                    output.mutable_data_ptr(), output_kind, current_stream(output)),
             "gather_convert");
  keep_until_read(states, output);
  if (scales) keep_until_read(*scales, output);
  return output;
}

}  // namespace crossan_fast::border

CROSSAN_LIBRARY_FRAGMENT(CROSSAN_NAMESPACE, library) {
  library.def("gather_convert(Tensor states, Tensor? scales, Tensor? ids, ScalarType dtype) -> Tensor");
}

CROSSAN_LIBRARY_IMPL(CROSSAN_NAMESPACE, CROSSAN_DISPATCH_KEY, library) {
  library.impl("gather_convert", &crossan_fast::border::gather_convert);
}
