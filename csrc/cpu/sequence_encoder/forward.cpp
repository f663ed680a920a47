#include "sequence_encoder.h"

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "packed_rows.h"

namespace crossan_fast::sequence_encoder {
namespace {

// Every weight as the right side of its product, packed once a call.
template <class T>
class Packed {
 public:
  struct Layer {
    RightSide<T> qkv, out, widen, narrow;
  };

  Packed(const Sizes& s, const Weights<const T*>& weights) : joined_(s, weights.layers) {
    const int64_t d = s.width, f = s.inner;
    struct Source {
      const T* weight;
      int64_t rows, columns;
      T* to;
    };
    struct Panel {
      size_t source;
      int64_t first;
    };
    const int64_t qkv = packed_size<T>(d, 3 * d), out = packed_size<T>(d, d), widen = packed_size<T>(d, f),
                  narrow = packed_size<T>(f, d), each = qkv + out + widen + narrow;
    memory_ = Buffer<T>(each * s.layers);
    std::vector<Source> sources;
    for (int64_t l = 0; l < s.layers; ++l) {
      const auto& layer = weights.layers[static_cast<size_t>(l)];
      T* to = memory_.data() + l * each;
      sources.push_back({joined_[l], 3 * d, d, to});
      sources.push_back({layer.out, d, d, to + qkv});
      sources.push_back({layer.widen, f, d, to + qkv + out});
      sources.push_back({layer.narrow, d, f, to + qkv + out + widen});
      layers_.push_back(
          {packed(to, d), packed(to + qkv, d), packed(to + qkv + out, d), packed(to + qkv + out + widen, f)});
    }
    std::vector<Panel> panels;
    for (size_t i = 0; i < sources.size(); ++i)
      for (int64_t first = 0; first < sources[i].rows; first += kPanel<T>) panels.push_back({i, first});
    const auto count = static_cast<int64_t>(panels.size());
    run_tasks(workers_for(count), count, [&](int64_t, int64_t i) {
      const Panel& panel = panels[static_cast<size_t>(i)];
      const Source& from = sources[panel.source];
      pack_panel(from.weight, int64_t{1}, from.columns, from.columns, panel.first, from.rows,
                 from.to + panel.first * from.columns);
    });
  }

  const Layer& operator[](int64_t layer) const { return layers_[static_cast<size_t>(layer)]; }

 private:
  Joined<T> joined_;
  Buffer<T> memory_;
  std::vector<Layer> layers_;
};

template <class T>
class Worker {
 public:
  // `rows`: of the longest block. Without a place to keep them, a block's numbers stay in the worker's own.
  Worker(const Sizes& sizes, const Inputs& inputs, const Weights<const T*>& weights, const Packed<T>& packed,
         int64_t rows, bool keeps)
      : s_(sizes),
        inputs_(inputs),
        weights_(weights),
        packed_(packed),
        attention_(sizes, inputs.dropout),
        wide_(stride_of(sizes.width)),
        x_(rows * wide_),
        y_(rows * wide_),
        factors_(sizes.width),
        own_(keeps ? 0 : rows * kept_width(sizes)),
        own_kept_(sizes, rows, own_.data()) {}

  const Kept<T>& own() const { return own_kept_; }

  // kept: whose row `first` is the block's first.
  void forward(const Packing& packing, size_t block, const Kept<T>& kept, int64_t first, Stored type, void* users) {
    const auto [begin, count] = packing.rows[block];
    const int64_t* place = packing.place.data() + begin;
    const Matrix<T> x{x_.data(), wide_}, y{y_.data(), wide_};
    enter(count, place, kept, first);
    for (int64_t l = 0; l < s_.layers; ++l) {
      const auto& own = kept.layers[static_cast<size_t>(l)];
      const auto& weights = weights_.layers[static_cast<size_t>(l)];
      const auto& right = packed_[l];
      const Sites sites(l);
      const int64_t d = s_.width;
      const Matrix<T> in = l == 0 ? kept.entered.from(first) : x;
      const Matrix<T> qkv = own.qkv.from(first), mixed = own.mixed.from(first), inner = own.inner.from(first);
      multiply<T>(count, 3 * d, d, in.data, in.stride, 1, right.qkv, qkv.data, qkv.stride, Into::overwrite);
      for (int64_t i = 0; i < packing.blocks[block].count; ++i) {
        const auto& sequence = packing.sequences[static_cast<size_t>(packing.blocks[block].first + i)];
        const int64_t row = sequence.first - begin;
        attention_.forward(sites.attention, sequence.count, place + row, qkv.from(row), own.lse.from(first + row),
                           mixed.from(row));
      }
      multiply<T>(count, d, d, mixed.data, mixed.stride, 1, right.out, y.data, y.stride, Into::overwrite);
      join(count, place, sites.attended, in, y, weights.attention_gain, weights.attention_bias,
           own.attended.from(first), own.attended_by.from(first), x);
      multiply<T>(count, s_.inner, d, x.data, x.stride, 1, right.widen, inner.data, inner.stride, Into::overwrite,
                  weights.widen_bias);
      for (int64_t i = 0; i < count; ++i) relu(s_.inner, inner[i]);
      multiply<T>(count, d, s_.inner, inner.data, inner.stride, 1, right.narrow, y.data, y.stride, Into::overwrite,
                  weights.narrow_bias);
      join(count, place, sites.forwarded, x, y, weights.forward_gain, weights.forward_bias, own.forwarded.from(first),
           own.forwarded_by.from(first), x);
    }
    const Matrix<T> last = s_.layers == 0 ? kept.entered.from(first) : x;
    for (int64_t i = 0; i < count; ++i)
      convert_to(type, last[i], static_cast<char*>(users) + place[i] * s_.width * bytes_of(type), s_.width);
  }

 private:
  // Items and positions, LayerNorm, dropout.
  void enter(int64_t count, const int64_t* place, const Kept<T>& kept, int64_t first) {
    const int64_t d = s_.width, unused = s_.window - s_.places;
    for (int64_t i = 0; i < count; ++i) {
      T *normed = kept.normed[first + i], *to = kept.entered[first + i];
      const T* position = weights_.position + (unused + place[i] % s_.places) * d;
      convert_from(inputs_.type, static_cast<const char*>(inputs_.items) + place[i] * d * bytes_of(inputs_.type),
                   normed, d, T(1));
      for (int64_t c = 0; c < d; ++c) normed[c] += position[c];
      *kept.normed_by[first + i] = normalise(d, static_cast<T>(s_.eps), normed);
      affine(d, normed, weights_.gain, weights_.bias, to);
      drop(0, place[i], to);
    }
  }

  // x = LayerNorm(in + dropout(y)); `in` may be x.
  void join(int64_t count, const int64_t* place, uint32_t site, Matrix<T> in, Matrix<T> y, const T* gain, const T* bias,
            Matrix<T> normed, Matrix<T> by, Matrix<T> x) {
    for (int64_t i = 0; i < count; ++i) {
      drop(site, place[i], y[i]);
      T* to = normed[i];
      for (int64_t c = 0; c < s_.width; ++c) to[c] = in[i][c] + y[i][c];
      *by[i] = normalise(s_.width, static_cast<T>(s_.eps), to);
      affine(s_.width, to, gain, bias, x[i]);
    }
  }

  void drop(uint32_t site, int64_t place, T* x) {
    if (!inputs_.dropout.on()) return;
    inputs_.dropout.draw(site, place, s_.width, factors_.data());
    for (int64_t c = 0; c < s_.width; ++c) x[c] *= factors_.data()[c];
  }

  const Sizes& s_;
  const Inputs& inputs_;
  const Weights<const T*>& weights_;
  const Packed<T>& packed_;
  Attention<T> attention_;
  int64_t wide_;
  Buffer<T> x_, y_, factors_, own_;
  Kept<T> own_kept_;
};

}  // namespace

int64_t kept_width(const Sizes& sizes) { return Kept<float>(sizes, 0, nullptr).width(); }

template <class T>
void forward(const Sizes& s, const Inputs& inputs, const Weights<const T*>& weights, Stored type, void* users,
             T* kept) {
  const Packing packing(s, inputs.mask);
  const auto count = static_cast<int64_t>(packing.rows.size());
  const int64_t workers = workers_for(count);
  const Packed<T> packed(s, weights);
  const Kept<T> shared(s, packing.total(), kept);
  std::vector<Worker<T>> each;
  each.reserve(static_cast<size_t>(workers));
  for (int64_t w = 0; w < workers; ++w)
    each.emplace_back(s, inputs, weights, packed, packing.longest_block(), kept != nullptr);
  run_tasks(workers, count, [&](int64_t w, int64_t b) {
    Worker<T>& worker = each[static_cast<size_t>(w)];
    const auto block = static_cast<size_t>(b);
    if (kept)
      worker.forward(packing, block, shared, packing.rows[block].first, type, users);
    else
      worker.forward(packing, block, worker.own(), 0, type, users);
  });
}

#define INSTANTIATE(T) \
  template void forward<T>(const Sizes&, const Inputs&, const Weights<const T*>&, Stored, void*, T*);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace crossan_fast::sequence_encoder
