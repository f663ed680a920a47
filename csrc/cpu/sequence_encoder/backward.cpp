// Two passes over a part of the rows: gradients of every row, a block of sequences at a time; then each weight's, a
// product over all of the part's rows at once. A weight's sum is thus built in the order of rows by whichever thread
// has that piece of it: no partial sums, no turns, and the same bits on any number of threads.
#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "packed_rows.h"
#include "sequence_encoder.h"

namespace crossan_fast::sequence_encoder {
namespace {

constexpr int64_t kPart = 1024;  // rows of a part: bounds the memory between the passes, not the batch

// What the first pass leaves for the second, of each row of a part: gradients of what products gave, and what
// entered them where the forward did not keep it.
template <class T>
struct Flow {
  struct Layer {
    Matrix<T> grad_qkv, grad_out, grad_widen, grad_narrow;
    Matrix<T> in, attended;
  };
  std::vector<Layer> layers;
  Matrix<T> grad_entered;  // of items and positions

  Flow(const Sizes& s, int64_t rows) : memory_(rows * width(s)) {
    T* data = memory_.data();
    const auto take = [&](int64_t stride) {
      const Matrix<T> matrix{data, stride};
      data += rows * stride;
      return matrix;
    };
    const int64_t wide = stride_of(s.width);
    for (int64_t l = 0; l < s.layers; ++l)
      layers.push_back(
          {take(stride_of(3 * s.width)), take(wide), take(stride_of(s.inner)), take(wide), take(wide), take(wide)});
    grad_entered = take(wide);
  }

 private:
  static int64_t width(const Sizes& s) {
    const int64_t wide = stride_of(s.width);
    return s.layers * (stride_of(3 * s.width) + stride_of(s.inner) + 4 * wide) + wide;
  }
  Buffer<T> memory_;
};

// Gradients of gains and biases: one vector of them, in each block its own, added up in the order of blocks.
template <class T>
struct Vectors {
  struct Layer {
    T *attention_gain, *attention_bias, *widen_bias, *narrow_bias, *forward_gain, *forward_bias;
  };
  T *gain, *bias;
  std::vector<Layer> layers;

  Vectors(const Sizes& s, T* data) : gain(data), bias(data + s.width) {
    data += 2 * s.width;
    const int64_t d = s.width;
    for (int64_t l = 0; l < s.layers; ++l, data += 5 * d + s.inner)
      layers.push_back({data, data + d, data + 5 * d, data + 2 * d, data + 3 * d, data + 4 * d});
  }
  static int64_t width(const Sizes& s) { return 2 * s.width + s.layers * (5 * s.width + s.inner); }
};

template <class T>
class Worker {
 public:
  Worker(const Sizes& sizes, const Inputs& inputs, const Weights<const T*>& weights, const Joined<T>& joined,
         int64_t rows)
      : s_(sizes),
        inputs_(inputs),
        weights_(weights),
        joined_(joined),
        attention_(sizes, inputs.dropout),
        wide_(stride_of(sizes.width)),
        g_(rows * wide_),
        z_(rows * wide_),
        factors_(sizes.width) {}

  // The block's rows in `flow` start at `first`; sums of its own go to `own`, which holds zeros.
  void backward(const Packing& packing, size_t block, const Kept<const T>& all, const Flow<T>& flow, int64_t first,
                const Vectors<T>& own, Stored type, const void* grad_users, void* grad_items) {
    const auto [begin, count] = packing.rows[block];
    const int64_t* place = packing.place.data() + begin;
    const int64_t d = s_.width;
    const Matrix<T> g{g_.data(), wide_}, z{z_.data(), wide_};
    for (int64_t i = 0; i < count; ++i)
      convert_from(type, static_cast<const char*>(grad_users) + place[i] * d * bytes_of(type), g[i], d, T(1));
    for (int64_t l = s_.layers - 1; l >= 0; --l) {
      const auto layer = static_cast<size_t>(l);
      const auto& weights = weights_.layers[layer];
      const auto& kept = all.layers[layer];
      const auto& to = flow.layers[layer];
      const auto& sums = own.layers[layer];
      const Sites sites(l);
      const Matrix<T> grad_narrow = to.grad_narrow.from(first), grad_widen = to.grad_widen.from(first);
      const Matrix<T> grad_out = to.grad_out.from(first), grad_qkv = to.grad_qkv.from(first);
      for (int64_t i = 0; i < count; ++i) {
        normalise_backward(d, kept.forwarded[begin + i], *kept.forwarded_by[begin + i], weights.forward_gain, g[i],
                           z[i], sums.forward_gain, sums.forward_bias);
        drop(sites.forwarded, place[i], z[i], grad_narrow[i]);
        add(d, grad_narrow[i], sums.narrow_bias);
        affine(d, kept.attended[begin + i], weights.attention_gain, weights.attention_bias, to.attended[first + i]);
      }
      multiply<T>(count, s_.inner, d, grad_narrow.data, grad_narrow.stride, 1, plain(weights.narrow, s_.inner),
                  grad_widen.data, grad_widen.stride, Into::overwrite);
      for (int64_t i = 0; i < count; ++i) {
        relu_backward(s_.inner, kept.inner[begin + i], grad_widen[i]);
        add(s_.inner, grad_widen[i], sums.widen_bias);
      }
      multiply<T>(count, d, s_.inner, grad_widen.data, grad_widen.stride, 1, plain(weights.widen, d), z.data, z.stride,
                  Into::add);
      for (int64_t i = 0; i < count; ++i) {
        normalise_backward(d, kept.attended[begin + i], *kept.attended_by[begin + i], weights.attention_gain, z[i],
                           g[i], sums.attention_gain, sums.attention_bias);
        drop(sites.attended, place[i], g[i], grad_out[i]);
        if (l > 0) {
          const auto& below = weights_.layers[layer - 1];
          affine(d, all.layers[layer - 1].forwarded[begin + i], below.forward_gain, below.forward_bias,
                 to.in[first + i]);
        } else {
          std::copy_n(all.entered[begin + i], d, to.in[first + i]);
        }
      }
      multiply<T>(count, d, d, grad_out.data, grad_out.stride, 1, plain(weights.out, d), z.data, z.stride,
                  Into::overwrite);
      for (int64_t i = 0; i < packing.blocks[block].count; ++i) {
        const auto& sequence = packing.sequences[static_cast<size_t>(packing.blocks[block].first + i)];
        const int64_t row = sequence.first - begin;
        attention_.backward(sites.attention, sequence.count, place + row, kept.qkv.from(sequence.first),
                            kept.lse.from(sequence.first), z.from(row), grad_qkv.from(row));
      }
      multiply<T>(count, d, 3 * d, grad_qkv.data, grad_qkv.stride, 1, plain(joined_[l], d), g.data, g.stride,
                  Into::add);
    }
    for (int64_t i = 0; i < count; ++i) {
      T* to = flow.grad_entered[first + i];
      drop(0, place[i], g[i], z[i]);
      normalise_backward(d, all.normed[begin + i], *all.normed_by[begin + i], weights_.gain, z[i], to, own.gain,
                         own.bias);
      convert_to(inputs_.type, to, static_cast<char*>(grad_items) + place[i] * d * bytes_of(inputs_.type), d);
    }
  }

 private:
  static void add(int64_t width, const T* __restrict x, T* __restrict to) {
    for (int64_t c = 0; c < width; ++c) to[c] += x[c];
  }

  static void relu_backward(int64_t width, const T* __restrict kept, T* __restrict g) {
    for (int64_t c = 0; c < width; ++c) g[c] = kept[c] <= T(0) ? T(0) : g[c];
  }

  void drop(uint32_t site, int64_t place, const T* __restrict x, T* __restrict to) {
    if (!inputs_.dropout.on()) {
      std::copy_n(x, s_.width, to);
      return;
    }
    inputs_.dropout.draw(site, place, s_.width, factors_.data());
    for (int64_t c = 0; c < s_.width; ++c) to[c] = x[c] * factors_.data()[c];
  }

  const Sizes& s_;
  const Inputs& inputs_;
  const Weights<const T*>& weights_;
  const Joined<T>& joined_;
  Attention<T> attention_;
  int64_t wide_;
  Buffer<T> g_, z_, factors_;
};

// One weight's gradient: (grad +) left[rows, out]ᵀ · right[rows, in].
template <class T>
struct Product {
  Matrix<T> left;
  int64_t out;
  Matrix<const T> right;
  int64_t in;
  T* grad;
};

template <class T>
Matrix<const T> reading(Matrix<T> matrix) {
  return {matrix.data, matrix.stride};
}

template <class T>
std::vector<Product<T>> products(const Sizes& s, const Flow<T>& flow, const Kept<const T>& kept, int64_t begin,
                                 const Weights<T*>& grads) {
  std::vector<Product<T>> all;
  const int64_t d = s.width, f = s.inner;
  for (size_t l = 0; l < flow.layers.size(); ++l) {
    const auto& from = flow.layers[l];
    const auto& to = grads.layers[l];
    const Matrix<T> qkv = from.grad_qkv;
    int64_t column = 0;
    for (T* grad : {to.query, to.key, to.value}) {
      all.push_back({{qkv.data + column, qkv.stride}, d, reading(from.in), d, grad});
      column += d;
    }
    all.push_back({from.grad_out, d, kept.layers[l].mixed.from(begin), d, to.out});
    all.push_back({from.grad_widen, f, reading(from.attended), d, to.widen});
    all.push_back({from.grad_narrow, d, kept.layers[l].inner.from(begin), f, to.narrow});
  }
  return all;
}

// Pieces of about one panel a side: equal work, and both sides of a piece are read from L2.
template <class T>
void multiply_all(int64_t rows, const std::vector<Product<T>>& products, Into into) {
  constexpr int64_t kHeight = 11 * kRowsPerTile;
  struct Piece {
    size_t product;
    int64_t out, in;
  };
  std::vector<Piece> pieces;
  for (size_t i = 0; i < products.size(); ++i)
    for (int64_t out = 0; out < products[i].out; out += kHeight)
      for (int64_t in = 0; in < products[i].in; in += kPanel<T>) pieces.push_back({i, out, in});
  // A run of pieces a worker: neighbours share a side, which another core would have to fetch too.
  const auto count = static_cast<int64_t>(pieces.size()), workers = workers_for(count);
  run_workers(workers, [&](int64_t w) {
    for (int64_t i = w * count / workers; i < (w + 1) * count / workers; ++i) {
      const Piece& piece = pieces[static_cast<size_t>(i)];
      const Product<T>& p = products[piece.product];
      multiply<T>(std::min(kHeight, p.out - piece.out), std::min(kPanel<T>, p.in - piece.in), rows,
                  p.left.data + piece.out, 1, p.left.stride, plain(p.right.data + piece.in, p.right.stride),
                  p.grad + piece.out * p.in + piece.in, p.in, into);
    }
  });
}

template <class T>
void add_wide(int64_t count, const T* __restrict from, double* __restrict to) {
  for (int64_t c = 0; c < count; ++c) to[c] += static_cast<double>(from[c]);
}

template <class T>
void narrow_to(const double* from, int64_t count, T* to) {
  for (int64_t c = 0; c < count; ++c) to[c] = static_cast<T>(from[c]);
}

}  // namespace

template <class T>
void backward(const Sizes& s, const Inputs& inputs, const Weights<const T*>& weights, Stored type,
              const void* grad_users, const T* kept_data, void* grad_items, const Weights<T*>& grads) {
  const Packing packing(s, inputs.mask);
  const auto count = static_cast<int64_t>(packing.rows.size());
  const int64_t workers = workers_for(count), d = s.width;
  const Kept<const T> kept(s, packing.total(), kept_data);
  const Joined<T> joined(s, weights.layers);
  const Flow<T> flow(s, std::min(packing.total(), std::max(kPart, packing.longest_block())));
  std::vector<Worker<T>> each;
  each.reserve(static_cast<size_t>(workers));
  for (int64_t w = 0; w < workers; ++w) each.emplace_back(s, inputs, weights, joined, packing.longest_block());

  const int64_t wide = Vectors<T>::width(s);
  std::vector<T> partial;
  std::vector<double> total(static_cast<size_t>(wide)), positions(static_cast<size_t>(s.places * d));
  for (int64_t from = 0, end = 0; from < count; from = end) {
    const int64_t begin = packing.rows[static_cast<size_t>(from)].first;
    int64_t rows = 0;
    for (; end < count; ++end) {
      const int64_t more = packing.rows[static_cast<size_t>(end)].count;
      if (rows > 0 && rows + more > kPart) break;
      rows += more;
    }
    partial.assign(static_cast<size_t>((end - from) * wide), T(0));
    run_tasks(workers, end - from, [&](int64_t w, int64_t b) {
      const auto block = static_cast<size_t>(from + b);
      each[static_cast<size_t>(w)].backward(packing, block, kept, flow, packing.rows[block].first - begin,
                                            Vectors<T>(s, partial.data() + b * wide), type, grad_users, grad_items);
    });
    multiply_all(rows, products(s, flow, kept, begin, grads), from == 0 ? Into::overwrite : Into::add);
    for (int64_t b = 0; b < end - from; ++b) add_wide(wide, partial.data() + b * wide, total.data());
    for (int64_t i = 0; i < rows; ++i)
      add_wide(d, flow.grad_entered[i],
               positions.data() + packing.place[static_cast<size_t>(begin + i)] % s.places * d);
  }

  const int64_t unused = (s.window - s.places) * d;
  std::fill_n(grads.position, unused, T(0));
  narrow_to(positions.data(), s.places * d, grads.position + unused);
  const Vectors<double> sums(s, total.data());
  narrow_to(sums.gain, d, grads.gain);
  narrow_to(sums.bias, d, grads.bias);
  for (size_t l = 0; l < grads.layers.size(); ++l) {
    const auto& from = sums.layers[l];
    const auto& to = grads.layers[l];
    narrow_to(from.attention_gain, d, to.attention_gain);
    narrow_to(from.attention_bias, d, to.attention_bias);
    narrow_to(from.widen_bias, s.inner, to.widen_bias);
    narrow_to(from.narrow_bias, d, to.narrow_bias);
    narrow_to(from.forward_gain, d, to.forward_gain);
    narrow_to(from.forward_bias, d, to.forward_bias);
  }
  if (count > 0) return;
  for (const auto& to : grads.layers) {
    for (T* grad : {to.query, to.key, to.value, to.out}) std::fill_n(grad, d * d, T(0));
    for (T* grad : {to.widen, to.narrow}) std::fill_n(grad, s.inner * d, T(0));
  }
}

#define INSTANTIATE(T)                                                                                            \
  template void backward<T>(const Sizes&, const Inputs&, const Weights<const T*>&, Stored, const void*, const T*, \
                            void*, const Weights<T*>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace crossan_fast::sequence_encoder
