// The end of a global context block on CUDA: scale, shift, identity and ReLU in one pass. Half precision is computed
// and accumulated in float32.
#include "context_block.cuh"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace mmdet {
namespace {

constexpr int kSummed = 64;  // positions that a thread sums, or a half or quarter: each block leaves a part

template <typename scalar_t, typename T, int kPack>
__device__ __forceinline__ Pack<scalar_t, kPack> fuse(
    Pack<scalar_t, kPack> x, const Pack<T, kPack>& scale, const Pack<T, kPack>& shift,
    const Pack<scalar_t, kPack>& identity, bool relu) {
  for (int j = 0; j < kPack; ++j) {
    T value = fma(static_cast<T>(x.value[j]), scale.value[j], shift.value[j]);
    value += static_cast<T>(identity.value[j]);
    x.value[j] = static_cast<scalar_t>(relu && value < T(0) ? T(0) : value);  // NaN stays
  }
  return x;
}

// (N, C, P), a row of positions after the other.
template <typename scalar_t, typename T, int kPack>
__global__ void __launch_bounds__(kThreads) contiguous_kernel(
    int64_t packs, int64_t area, const scalar_t* x, const T* scale, const T* shift, const scalar_t* identity, bool relu,
    scalar_t* output) {
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < packs; i += int64_t{gridDim.x} * kThreads) {
    const int64_t row = divide(i * kPack, area);
    Pack<T, kPack> m, a;
    for (int j = 0; j < kPack; ++j) {
      m.value[j] = scale ? scale[row] : T(1);
      a.value[j] = shift ? shift[row] : T(0);
    }
    const auto other = load_or<kPack>(identity, i * kPack, scalar_t(0));
    store(output + i * kPack, fuse(load<kPack>(x + i * kPack), m, a, other, relu));
  }
}

// (N, P, C).
template <typename scalar_t, typename T, int kPack>
__global__ void __launch_bounds__(kThreads) channels_last_kernel(
    const __grid_constant__ Rows rows, const scalar_t* __restrict__ x, const T* __restrict__ scale,
    const T* __restrict__ shift, const scalar_t* __restrict__ identity, bool relu, scalar_t* __restrict__ output) {
  const Place place(rows);
  if (!place.inside) {
    return;
  }
  Pack<scalar_t, kPack> maps[kUnderWay], others[kUnderWay];
#pragma unroll
  for (int i = 0; i < kUnderWay; ++i) {
    if (i * rows.slices < place.left) {
      maps[i] = load<kPack>(x + (place.start + i * rows.stride) * kPack);
      others[i] = load_or<kPack>(identity, (place.start + i * rows.stride) * kPack, scalar_t(0));
    }
  }
  const int64_t parameter = (place.image * rows.columns + place.column) * kPack;
  const auto m = load_or<kPack>(scale, parameter, T(1)), a = load_or<kPack>(shift, parameter, T(0));
#pragma unroll
  for (int i = 0; i < kUnderWay; ++i) {
    if (i * rows.slices < place.left) {
      forget_conversions(maps[i]);
      forget_conversions(others[i]);
      store(output + (place.start + i * rows.stride) * kPack, fuse(maps[i], m, a, others[i], relu));
    }
  }
}

// Maps of the backward pass; null where they are not asked for.
template <typename scalar_t>
struct Maps {
  const scalar_t *grad, *x, *output;
  scalar_t *grad_x, *masked;
};

// A pack of each of the maps that are read.
template <typename scalar_t, int kPack>
struct Read {
  Pack<scalar_t, kPack> grad, x, output;

  __device__ __forceinline__ void load_from(const Maps<scalar_t>& maps, int64_t i) {
    grad = load<kPack>(maps.grad + i);
    x = load_or<kPack>(maps.x, i, scalar_t(0));
    output = load_or<kPack>(maps.output, i, scalar_t(0));
  }
};

// Gradient through the ReLU, its products with x, the gradient of x.
template <typename scalar_t, typename T, int kPack>
__device__ __forceinline__ void fuse_grad(
    const Maps<scalar_t>& maps, int64_t i, Read<scalar_t, kPack> read, const Pack<T, kPack>& scale,
    Pack<T, kPack>& sum, Pack<T, kPack>& dot) {
  auto& grad = read.grad;
  if (maps.output) {
    for (int j = 0; j < kPack; ++j) {  // NaN passes, as in PyTorch
      grad.value[j] = static_cast<T>(read.output.value[j]) <= T(0) ? static_cast<scalar_t>(T(0)) : grad.value[j];
    }
    store(maps.masked + i, grad);
  }
  for (int j = 0; j < kPack; ++j) {
    sum.value[j] += static_cast<T>(grad.value[j]);
  }
  if (maps.x) {
    for (int j = 0; j < kPack; ++j) {
      const T g = static_cast<T>(grad.value[j]);
      dot.value[j] = fma(g, static_cast<T>(read.x.value[j]), dot.value[j]);
      grad.value[j] = static_cast<scalar_t>(g * scale.value[j]);
    }
    store(maps.grad_x + i, grad);
  }
}

// (N, C, P): a block sums a row, one channel of an image. `dots` is null without x.
template <typename scalar_t, typename T, int kPack>
__global__ void __launch_bounds__(kThreads) contiguous_grad_kernel(
    int64_t area, const __grid_constant__ Maps<scalar_t> maps, const T* scale, T* sums, T* dots) {
  __shared__ T parts[2][kThreads];
  const int64_t row = blockIdx.x;
  Pack<T, kPack> factor, sum = {}, dot = {};
  for (int j = 0; j < kPack; ++j) {
    factor.value[j] = scale ? scale[row] : T(1);
  }
  for (int64_t p = threadIdx.x * kPack; p < area; p += kThreads * kPack) {
    Read<scalar_t, kPack> read;
    read.load_from(maps, row * area + p);
    fuse_grad(maps, row * area + p, read, factor, sum, dot);
  }
  parts[0][threadIdx.x] = parts[1][threadIdx.x] = 0;
  for (int j = 0; j < kPack; ++j) {
    parts[0][threadIdx.x] += sum.value[j];
    parts[1][threadIdx.x] += dot.value[j];
  }
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      parts[0][threadIdx.x] += parts[0][threadIdx.x + half];
      parts[1][threadIdx.x] += parts[1][threadIdx.x + half];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    sums[row] = parts[0][0];
    if (dots) {
      dots[row] = parts[1][0];
    }
  }
}

// (N, P, C): the slices of a block are added at last, and the blocks by another kernel. What is not there is known when
// this is compiled, so that more packs of the others can be under way.
template <typename scalar_t, typename T, int kPack, bool kScaled, bool kMasked>
__global__ void __launch_bounds__(kThreads) channels_last_grad_kernel(
    const __grid_constant__ Rows rows, Maps<scalar_t> maps, const T* __restrict__ scale, T* sums, T* dots) {
  constexpr int kReads = kScaled && kMasked ? 2 : 4;
  __shared__ Pack<T, kPack> parts[2][kThreads];
  if (!kScaled) {
    maps.x = nullptr;
  }
  if (!kMasked) {
    maps.output = nullptr;
  }
  const Place place(rows);
  Pack<T, kPack> sum = {}, dot = {};
  if (place.inside) {
    const auto factor = load_or<kPack>(scale, (place.image * rows.columns + place.column) * kPack, T(1));
    for (int first = 0; first * rows.slices < place.left; first += kReads) {
      Read<scalar_t, kPack> reads[kReads];
#pragma unroll
      for (int i = 0; i < kReads; ++i) {
        if ((first + i) * rows.slices < place.left) {
          reads[i].load_from(maps, (place.start + (first + i) * rows.stride) * kPack);
        }
      }
#pragma unroll
      for (int i = 0; i < kReads; ++i) {
        if ((first + i) * rows.slices < place.left) {
          forget_conversions(reads[i].grad);
          fuse_grad(maps, (place.start + (first + i) * rows.stride) * kPack, reads[i], factor, sum, dot);
        }
      }
    }
  }
  parts[0][threadIdx.x] = sum;
  parts[1][threadIdx.x] = dot;
  __syncthreads();
  if (place.inside && threadIdx.x < rows.wide) {
    for (int other = threadIdx.x + rows.wide; other < rows.slices * rows.wide; other += rows.wide) {
      for (int j = 0; j < kPack; ++j) {
        sum.value[j] += parts[0][other].value[j];
        dot.value[j] += parts[1][other].value[j];
      }
    }
    const int64_t part = (blockIdx.x / rows.groups * rows.columns + place.column) * kPack;
    store(sums + part, sum);
    if (dots) {
      store(dots + part, dot);
    }
  }
}

template <typename T>
const T* data_or_null(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

at::Tensor context_fuse(
    const at::Tensor& x, const std::optional<at::Tensor>& scale, const std::optional<at::Tensor>& shift,
    const std::optional<at::Tensor>& identity, bool relu) {
  check_context_fuse(x, scale, shift, identity);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto type = compute_type(x);
  if (identity && identity->scalar_type() != x.scalar_type() && x.scalar_type() != type) {  // added before rounding
    return context_fuse(x.to(type), scale, shift, identity, relu).to(x.scalar_type());
  }
  const auto layout = layout_of(x);
  const auto features = x.contiguous(layout), mul = per_channel(scale, type), add = per_channel(shift, type);
  const auto other = identity ? cast(*identity, x.scalar_type()).contiguous(layout) : at::Tensor();
  const int64_t channels = x.size(1), area = x.size(2) * x.size(3);
  auto output = at::empty(x.sizes(), x.options().memory_format(layout));
  if (x.numel() == 0) {
    return output;
  }
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "context_fuse", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const scalar_t *map = features.const_data_ptr<scalar_t>(), *residual = data_or_null<scalar_t>(other);
    const acc_t *factor = data_or_null<acc_t>(mul), *term = data_or_null<acc_t>(add);
    scalar_t* out = output.mutable_data_ptr<scalar_t>();
    const bool channels_last = layout == at::MemoryFormat::ChannelsLast;
    with_pack<scalar_t>(in_packs<scalar_t>(channels_last ? channels : area, features, mul, add, other), [&](auto pack) {
      if (channels_last) {
        const Rows rows(x.size(0), channels, area, pack, kUnderWay);
        channels_last_kernel<scalar_t, acc_t, pack><<<x.size(0) * rows.chunks * rows.groups, kThreads, 0, stream>>>(
            rows, map, factor, term, residual, relu, out);
      } else {
        const int64_t count = x.numel() / pack, blocks = std::min<int64_t>(divide_up(count, kThreads), 1 << 20);
        contiguous_kernel<scalar_t, acc_t, pack><<<blocks, kThreads, 0, stream>>>(
            count, area, map, factor, term, residual, relu, out);
      }
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return output;
}

// What is returned is described at the CPU kernel.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> context_fuse_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& x, const std::optional<at::Tensor>& scale,
    const std::optional<at::Tensor>& output) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const auto type = compute_type(grad);
  const auto layout = layout_of(x ? *x : output ? *output : grad);
  const auto g = grad.contiguous(layout), mul = per_channel(scale, type);
  const auto features = x ? x->contiguous(layout) : at::Tensor();
  const auto y = output ? output->contiguous(layout) : at::Tensor();
  const int64_t images = grad.size(0), channels = grad.size(1), area = grad.size(2) * grad.size(3);
  const auto options = grad.options().memory_format(layout);
  auto grad_x = x ? at::empty(grad.sizes(), options) : at::empty({0}, grad.options());
  auto masked = output ? at::empty(grad.sizes(), options) : at::empty({0}, grad.options());
  const auto accumulated = grad.options().dtype(type);
  auto grad_scale = at::empty({x ? images : 0, channels}, accumulated);
  auto grad_shift = at::empty({images, channels}, accumulated);
  if (grad.numel() == 0) {
    return {grad_x, masked, grad_scale.zero_(), grad_shift.zero_()};
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, grad.scalar_type(), "context_fuse_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const Maps<scalar_t> maps{
        g.const_data_ptr<scalar_t>(), data_or_null<scalar_t>(features), data_or_null<scalar_t>(y),
        x ? grad_x.mutable_data_ptr<scalar_t>() : nullptr, output ? masked.mutable_data_ptr<scalar_t>() : nullptr};
    const acc_t* pm = data_or_null<acc_t>(mul);
    acc_t *sums = grad_shift.mutable_data_ptr<acc_t>(), *dots = x ? grad_scale.mutable_data_ptr<acc_t>() : nullptr;
    const bool channels_last = layout == at::MemoryFormat::ChannelsLast;
    const auto stream = c10::cuda::getCurrentCUDAStream();
    with_pack<scalar_t>(in_packs<scalar_t>(channels_last ? channels : area, g, features, y, mul), [&](auto pack) {
      if (!channels_last) {
        contiguous_grad_kernel<scalar_t, acc_t, pack><<<images * channels, kThreads, 0, stream>>>(
            area, maps, pm, sums, dots);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
        return;
      }
      Rows rows(images, channels, area, pack, kSummed);
      for (int part = 2; part <= 4 && images * rows.chunks * rows.groups < 4 * multiprocessors(); part *= 2) {
        rows = Rows(images, channels, area, pack, kSummed / part);
      }
      const auto parts = at::empty({x ? 2 : 1, images * rows.chunks, channels}, accumulated);
      acc_t *part_sums = parts.mutable_data_ptr<acc_t>(), *part_dots = part_sums + images * rows.chunks * channels;
      const auto kernel = x ? (output ? channels_last_grad_kernel<scalar_t, acc_t, pack, true, true>
                                      : channels_last_grad_kernel<scalar_t, acc_t, pack, true, false>)
                            : (output ? channels_last_grad_kernel<scalar_t, acc_t, pack, false, true>
                                      : channels_last_grad_kernel<scalar_t, acc_t, pack, false, false>);
      kernel<<<images * rows.chunks * rows.groups, kThreads, 0, stream>>>(
          rows, maps, pm, part_sums, x ? part_dots : nullptr);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
      sum_parts<acc_t>(images, rows.chunks, channels, part_sums, sums);
      if (x) {
        sum_parts<acc_t>(images, rows.chunks, channels, part_dots, dots);
      }
    });
  });
  return {grad_x, masked, grad_scale, grad_shift};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("context_fuse", &context_fuse);
  m.impl("context_fuse_backward", &context_fuse_backward);
}

}  // namespace mmdet
