// Linear layers of the global context block's transform on the CPU. For a handful of images a product takes as long as
// its weight takes to come from memory: it is read once for all, and backward its gradient is written beside it.
#include "../context_transform.h"

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <functional>
#include <utility>
#include <vector>

#include "context_block.h"

namespace mmdet {
namespace {

constexpr int64_t kBand = 32;  // rows of a weight that are taken together

// body(band, first row, number of rows)
template <typename F>
void for_bands(int64_t rows, int64_t size, const F& body) {
  at::parallel_for(0, divide_up(rows, kBand), rows_per_task(kBand * size), [&](int64_t begin, int64_t end) {
    for (int64_t band = begin; band < end; ++band) {
      body(band, band * kBand, std::min(kBand, rows - band * kBand));
    }
  });
}

// (N, K), (R, K), (R,) -> (N, R)
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias) {
  const auto x = input.contiguous(), w = weight.contiguous(), b = bias.contiguous();
  const int64_t images = x.size(0), rows = w.size(0), size = w.size(1);
  auto output = at::empty({images, rows}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "linear", [&] {
    const scalar_t *px = x.const_data_ptr<scalar_t>(), *pw = w.const_data_ptr<scalar_t>();
    const scalar_t* pb = b.const_data_ptr<scalar_t>();
    scalar_t* out = output.mutable_data_ptr<scalar_t>();
    for_bands(rows, size, [&](int64_t, int64_t first, int64_t number) {
      for (int64_t n = 0; n < images; ++n) {
        scalar_t* row = out + n * rows + first;
        dot_rows(pw + first * size, number, size, size, px + n * size, row);
        std::transform(row, row + number, pb + first, row, std::plus<>());
      }
    });
  });
  return output;
}

// With grad (N, R): grad times weight, (N, K), and the transpose of grad times input, (R, K).
std::pair<at::Tensor, at::Tensor> linear_backward(
    const at::Tensor& grad, const at::Tensor& input, const at::Tensor& weight) {
  const auto g = grad.contiguous(), x = input.contiguous(), w = weight.contiguous();
  const int64_t images = x.size(0), rows = w.size(0), size = w.size(1), bands = divide_up(rows, kBand);
  auto grad_input = at::empty_like(x), grad_weight = at::empty_like(w);
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "linear_backward", [&] {
    const scalar_t *pg = g.const_data_ptr<scalar_t>(), *px = x.const_data_ptr<scalar_t>();
    const scalar_t* pw = w.const_data_ptr<scalar_t>();
    scalar_t* out = grad_weight.mutable_data_ptr<scalar_t>();
    std::vector<scalar_t> parts(images * bands * size);
    for_bands(rows, size, [&](int64_t band, int64_t first, int64_t number) {
      for (int64_t n = 0; n < images; ++n) {
        scalar_t* part = parts.data() + (n * bands + band) * size;
        add_rows(pw + first * size, number, size, size, pg + n * rows + first, part);
      }
      for (int64_t row = first; row < first + number; ++row) {
        for_vectors<scalar_t>(size, [&](int64_t i, int64_t count) {
          Vec<scalar_t> sum(scalar_t(0));
          for (int64_t n = 0; n < images; ++n) {
            const Vec<scalar_t> factor(pg[n * rows + row]);
            sum = at::vec::fmadd(factor, Vec<scalar_t>::loadu(px + n * size + i, count), sum);
          }
          sum.store(out + row * size + i, count);
        });
      }
    });
    sum_parts(
        parts.data(), images, bands, size, [](int64_t, int64_t) { return 1.0; },
        grad_input.mutable_data_ptr<scalar_t>());
  });
  return {grad_input, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CPU, m) {
  m.impl("context_transform", &context_transform<linear>);
  m.impl("context_transform_backward", &context_transform_backward<linear_backward>);
}

}  // namespace mmdet
