// Global context pooling on the CPU: each map is read, and each gradient written, once.
//
// A tile's rows are channels (contiguous layout) or positions (channels_last): the same two products of a matrix with
// a vector serve both.
#include "context_block.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

namespace mmdet {
namespace {

// output = input (zeros without) + a u + b v
template <typename T>
void add_vectors(const T* input, int64_t size, T a, const T* u, T b, const T* v, T* output, bool stream) {
  const Vec<T> factor_u(a), factor_v(b);
  for_vectors<T>(size, [&](int64_t i, int64_t n) {
    const auto start = input ? Vec<T>::loadu(input + i, n) : Vec<T>(T(0));
    const auto sum = at::vec::fmadd(factor_u, Vec<T>::loadu(u + i, n), start);
    store(at::vec::fmadd(factor_v, Vec<T>::loadu(v + i, n), sum), output + i, n, stream);
  });
}

// Each position's sum over channels of weight times x.
template <typename T>
void sum_channels(const Tile& tile, const T* x, const T* weight, T* output) {
  if (tile.map.channels_last) {
    dot_rows(x + tile.offset, tile.width, tile.stride, tile.map.channels, weight, output);
  } else {
    add_rows(x + tile.offset, tile.map.channels, tile.stride, tile.width, weight, output);
  }
}

// Each channel's sum over the tile's positions of weight times x. It comes after sum_channels, and begins with the
// rows that this read last: of a tile larger than the second-level cache they are still there.
template <typename T>
void sum_positions(const Tile& tile, const T* x, const T* weight, T* output) {
  if (tile.map.channels_last) {
    add_rows(x + tile.offset, tile.width, tile.stride, tile.map.channels, weight, output, true);
  } else {
    dot_rows(x + tile.offset, tile.map.channels, tile.stride, tile.width, weight, output, true);
  }
}

// The bias moves all logits alike, which changes no softmax.
std::tuple<at::Tensor, at::Tensor> context_pool(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  check_context_pool(x, weight, bias);
  const auto type = compute_type(x);
  const auto features = x.to(type).contiguous(layout_of(x)), w = weight.to(type).contiguous();
  const Map map(features);
  auto attention = at::empty({map.images, map.area}, features.options());
  auto context = at::empty({map.images, map.channels}, features.options());
  AT_DISPATCH_FLOATING_TYPES(type, "context_pool", [&] {
    const scalar_t *px = features.const_data_ptr<scalar_t>(), *pw = w.const_data_ptr<scalar_t>();
    scalar_t* pa = attention.mutable_data_ptr<scalar_t>();
    // Each tile's softmax has a maximum of its own, as in online softmax; the tiles are then brought to one.
    std::vector<scalar_t> parts(map.images * map.tiles * map.channels);
    std::vector<double> maximum(map.images * map.tiles), sum(map.images * map.tiles), factor(sum.size());
    for_tiles(map, [&](const Tile& tile) {
      scalar_t* a = pa + tile.image * map.area + tile.first;
      sum_channels(tile, px, pw, a);
      // Finite, so that logits of -infinity weigh nothing.
      const scalar_t top = std::max(*std::max_element(a, a + tile.width), std::numeric_limits<scalar_t>::lowest());
      at::vec::map([&](Vec<scalar_t> logit) { return (logit - Vec<scalar_t>(top)).exp(); }, a, a, tile.width);
      maximum[tile.index] = top;
      sum[tile.index] = at::vec::reduce_all<scalar_t>(
          [](Vec<scalar_t> left, Vec<scalar_t> right) { return left + right; }, a, tile.width);
      sum_positions(tile, px, a, parts.data() + tile.index * map.channels);
    });
    for (int64_t n = 0; map.tiles > 0 && n < map.images; ++n) {
      const int64_t begin = n * map.tiles, end = begin + map.tiles;
      const double top = *std::max_element(maximum.begin() + begin, maximum.begin() + end);
      double total = 0;
      for (int64_t i = begin; i < end; ++i) {
        factor[i] = std::exp(maximum[i] - top);
        total += factor[i] * sum[i];
      }
      for (int64_t i = begin; i < end; ++i) {
        factor[i] /= total;
        const Tile tile(map, i);
        scalar_t* a = pa + n * map.area + tile.first;
        const auto share = static_cast<scalar_t>(factor[i]);
        std::transform(a, a + tile.width, a, [&](scalar_t value) { return value * share; });
      }
    }
    sum_parts(
        parts.data(), map.images, map.tiles, map.channels,
        [&](int64_t n, int64_t part) { return factor[n * map.tiles + part]; }, context.mutable_data_ptr<scalar_t>());
  });
  return {context, attention};
}

// With attention a, context c and its gradient g: the logits' gradient is a_p (x_p . g - c . g), since c . g is the
// sum over q of a_q (x_q . g). `grad_map` is what x gets from elsewhere.
std::tuple<at::Tensor, at::Tensor> context_pool_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& grad_map, const at::Tensor& x, const at::Tensor& weight,
    const at::Tensor& context, const at::Tensor& attention) {
  const auto type = compute_type(x);
  const auto layout = layout_of(x);
  const auto features = x.to(type).contiguous(layout), w = weight.to(type).contiguous();
  const auto g = grad.to(type).contiguous(), c = context.contiguous(), a = attention.contiguous();
  const auto outer = grad_map ? grad_map->to(type).contiguous(layout) : at::Tensor();
  const Map map(features);
  auto grad_logits = at::empty_like(a);
  auto grad_x = at::empty(x.sizes(), features.options().memory_format(layout));
  auto grad_weight = at::empty(weight.sizes(), w.options());
  AT_DISPATCH_FLOATING_TYPES(type, "context_pool_backward", [&] {
    const scalar_t *px = features.const_data_ptr<scalar_t>(), *pg = g.const_data_ptr<scalar_t>();
    const scalar_t *pw = w.const_data_ptr<scalar_t>(), *pa = a.const_data_ptr<scalar_t>();
    const scalar_t *pc = c.const_data_ptr<scalar_t>(), *po = grad_map ? outer.const_data_ptr<scalar_t>() : nullptr;
    scalar_t *pl = grad_logits.mutable_data_ptr<scalar_t>(), *out = grad_x.mutable_data_ptr<scalar_t>();
    // In the order of the sums below: of a single position x_p . g is c . g to the last bit.
    std::vector<scalar_t> mean(map.images), parts(map.images * map.tiles * map.channels);
    for (int64_t n = 0; n < map.images; ++n) {
      const scalar_t *row = pc + n * map.channels, *gradient = pg + n * map.channels;
      if (map.channels_last) {
        dot_rows(row, 1, map.channels, map.channels, gradient, &mean[n]);
      } else {
        add_rows(row, map.channels, 1, 1, gradient, &mean[n]);
      }
    }
    for_tiles(map, [&](const Tile& tile) {
      const int64_t first = tile.image * map.area + tile.first;
      sum_channels(tile, px, pg + tile.image * map.channels, pl + first);
      for (int64_t p = first; p < first + tile.width; ++p) {
        pl[p] = pa[p] * (pl[p] - mean[tile.image]);
      }
      sum_positions(tile, px, pl + first, parts.data() + tile.index * map.channels);
    });
    // Rows as in memory: channels, or positions where the layout is channels_last.
    const int64_t rows = map.channels_last ? map.area : map.channels, size = map.channels_last ? map.channels : map.area;
    parallel_for(map.images * rows, rows_per_task(size), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / rows * size;
        const scalar_t* input = po ? po + i * size : nullptr;
        if (map.channels_last) {
          add_vectors(input, size, pa[i], pg + image, pl[i], pw, out + i * size, map.large);
        } else {
          add_vectors(input, size, pg[i], pa + image, pw[i % rows], pl + image, out + i * size, map.large);
        }
      }
    });
    sum_parts(
        parts.data(), 1, map.images * map.tiles, map.channels, [](int64_t, int64_t) { return 1.0; },
        grad_weight.mutable_data_ptr<scalar_t>());
  });
  return {grad_x.to(x.scalar_type()), grad_weight.to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CPU, m) {
  m.impl("context_pool", &context_pool);
  m.impl("context_pool_backward", &context_pool_backward);
}

}  // namespace mmdet
