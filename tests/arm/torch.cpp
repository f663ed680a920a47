// What the library gets from torch and from libgomp when it is loaded, for a program that has neither.
#include "cpu/border.h"
#include "cpu/library.h"

namespace at {

Tensor Tensor::to(ScalarType type) const {
  if (type == type_) return *this;
  Tensor wide(sizes_, kDouble), out(sizes_, type);
  crossan_fast::convert_from<double>(crossan_fast::stored_type(type_), data_ptr(), wide.mutable_data_ptr<double>(),
                                     numel(), 1);
  crossan_fast::convert_to(crossan_fast::stored_type(type), wide.const_data_ptr<double>(), out.data_ptr(), numel());
  return out;
}

}  // namespace at

namespace crossan_fast::border {

Tensor empty(at::IntArrayRef shape, at::ScalarType type) { return {shape, type}; }

Tensor zeros(at::IntArrayRef shape, at::ScalarType type) {
  Tensor tensor(shape, type);
  tensor.zero_();
  return tensor;
}

}  // namespace crossan_fast::border

extern "C" {
void GOMP_parallel(void (*work)(void*), void* data, unsigned, unsigned) { work(data); }
int omp_get_thread_num() { return 0; }
int omp_get_num_threads() { return 1; }
}
