// deduplicate's border: its checks, its launch and its registration with torch.
#include "border.h"

namespace crossan_fast::border {
namespace {

std::tuple<Tensor, Tensor, Tensor> deduplicate(const Tensor& item_ids, int64_t capacity) {
  check_ids("item_ids", item_ids);
  TORCH_CHECK_VALUE(capacity >= 1, "capacity: expected at least 1, got ", capacity);
  TORCH_CHECK_VALUE(item_ids.numel() < (1 << 24), "item_ids: expected fewer than 2^24 places, got ", item_ids.numel());
  DeviceGuard guard(item_ids.device());
  Tensor places = item_ids.contiguous();
  auto options = places.options().dtype(at::kLong);
  Tensor ids = at::empty({capacity}, options), slots = at::empty(places.sizes(), options);
  Tensor counts = at::empty({capacity}, options);
  auto bytes = static_cast<int64_t>(crossan_deduplicate_workspace(places.numel(), capacity));
  Tensor workspace = at::empty({bytes}, options.dtype(at::kByte));
  check_code(
      crossan_deduplicate(places.const_data_ptr(), is_wide(places), places.numel(), capacity,
                          ids.mutable_data_ptr<int64_t>(), slots.mutable_data_ptr<int64_t>(),
                          counts.mutable_data_ptr<int64_t>(), workspace.mutable_data_ptr(), current_stream(places)),
      "deduplicate");
  return {ids, slots, counts};
}

}  // namespace
}  // namespace crossan_fast::border

CROSSAN_LIBRARY_FRAGMENT(CROSSAN_NAMESPACE, library) {
  library.def("deduplicate(Tensor item_ids, int capacity) -> (Tensor, Tensor, Tensor)");
}

CROSSAN_LIBRARY_IMPL(CROSSAN_NAMESPACE, CROSSAN_DISPATCH_KEY, library) {
  library.impl("deduplicate", &crossan_fast::border::deduplicate);
}
