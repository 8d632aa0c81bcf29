// RoIAlign on CUDA.
#include "roi_align.cuh"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

namespace mmdet {
namespace {

constexpr int64_t kElements = 2048;  // of a tile that does not pass through shared memory

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) pool_kernel(
    const RoiTiles tiles, const __grid_constant__ Pyramid<const scalar_t> features, const T* rois,
    const int64_t* levels, const __grid_constant__ Options options, scalar_t* output) {
  visit_elements(tiles, rois, levels, options, [&](int64_t i, const auto& roi, int64_t plane, int bin_y, int bin_x) {
    const scalar_t* cells = features.data[roi.level] + plane;
    T sum = 0;
    visit_bin(roi, options.levels[roi.level], bin_y, bin_x, [&](const auto& offsets, const auto& weights) {
      scalar_t corners[4] = {};  // all are on their way before the first is used
      for (int j = 0; j < 4; ++j) {
        if (weights[j] != T(0)) {
          corners[j] = cells[offsets[j]];
        }
      }
      for (int j = 0; j < 4; ++j) {
        sum += weights[j] * static_cast<T>(corners[j]);
      }
    });
    output[i] = static_cast<scalar_t>(sum);
  });
}

template <typename scalar_t, typename T, int kPack>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 3 : 2) pool_tiles_kernel(
    const RoiTiles tiles, const __grid_constant__ Pyramid<const scalar_t> features, const T* rois,
    const int64_t* levels, const __grid_constant__ Options options, scalar_t* output) {
  __shared__ SharedRoi<T> roi;
  scalar_t* tile = reinterpret_cast<scalar_t*>(shared_memory);
  const unsigned bins = options.height * options.width, width = options.width;
  for (int64_t t = blockIdx.x; t < tiles.count; t += gridDim.x) {
    const auto [k, first, count] = tiles.at(t);
    const unsigned lanes = count;
    share_roi(k, rois, levels, options, roi);
    __syncthreads();
    const Level& level = options.levels[roi.level];
    const scalar_t* feature = features.data[roi.level] + roi.image * level.image + first * kPack;
    for (unsigned i = threadIdx.x; i < lanes * bins; i += kThreads) {
      const unsigned bin = i / lanes, lane = i % lanes;
      const scalar_t* cells = feature + lane * kPack;
      Pack<T, kPack> sum = {};
      visit_bin(roi, level, bin / width, bin % width, [&](const auto& offsets, const auto& weights) {
        Words<scalar_t, kPack> words[4] = {};  // all are on their way before the first is used
        for (int j = 0; j < 4; ++j) {
          if (weights[j] != T(0)) {
            words[j] = load_words<kPack>(cells + offsets[j]);
          }
        }
        for (int j = 0; j < 4; ++j) {
          const auto corner = unpack<T, scalar_t, kPack>(words[j]);
          for (int c = 0; c < kPack; ++c) {
            sum.value[c] += weights[j] * corner.value[c];
          }
        }
      });
      for (int c = 0; c < kPack; ++c) {
        tile[tile_offset<kPack>(lane, bins) + c * bins + bin] = static_cast<scalar_t>(sum.value[c]);
      }
    }
    __syncthreads();
    scalar_t* target = output + (k * options.channels + first * kPack) * bins;
    for (unsigned i = threadIdx.x; i < lanes * bins; i += kThreads) {
      store(target + i * kPack, load<kPack>(tile + tile_offset<kPack>(i / bins, bins) + i % bins * kPack));
    }
  }
}

at::Tensor roi_align(
    at::TensorList features, const at::Tensor& rois, const std::optional<at::Tensor>& levels,
    at::ArrayRef<double> spatial_scales, int64_t height, int64_t width, int64_t sampling_ratio, bool aligned,
    double shift, std::optional<double> finest_scale) {
  check_roi_align(features, rois, levels, spatial_scales, height, width, sampling_ratio, finest_scale);
  const c10::cuda::CUDAGuard guard(rois.device());
  const bool channels_last = is_channels_last(features[0]);
  std::vector<int64_t> sizes{features[0].size(0), features[0].size(1)};
  std::vector<at::Tensor> inputs;
  for (const auto& feature : features) {
    inputs.push_back(feature.contiguous(memory_format(channels_last)));
    sizes.insert(sizes.end(), {feature.size(2), feature.size(3)});
  }
  auto output = at::empty({rois.size(0), sizes[1], height, width}, features[0].options());
  if (output.numel() == 0) {
    return output;
  }
  const RoiRule rule(sampling_ratio, aligned, shift, finest_scale);
  const auto options = make_options(sizes, spatial_scales, height, width, rule, channels_last);
  const auto assigned = levels ? levels->contiguous() : at::Tensor();
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, output.scalar_type(), "roi_align", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto boxes = rois.to(c10::CppTypeToScalarType<acc_t>::value).contiguous();
    const acc_t* box_data = boxes.const_data_ptr<acc_t>();
    const int64_t* level_data = levels ? assigned.const_data_ptr<int64_t>() : nullptr;
    scalar_t* output_data = output.mutable_data_ptr<scalar_t>();
    Pyramid<const scalar_t> pyramid{};
    bool packs = true;
    for (size_t i = 0; i < inputs.size(); ++i) {
      pyramid.data[i] = inputs[i].const_data_ptr<scalar_t>();
      packs = packs && in_packs<scalar_t>(sizes[1], inputs[i], output);
    }
    const bool tiled = in_tiles<scalar_t>(
        rois.size(0), options, packs, [&](auto pack, const RoiTiles& tiles, int64_t bytes) {
          pool_tiles_kernel<scalar_t, acc_t, pack><<<tiles.blocks(), kThreads, bytes, stream>>>(
              tiles, pyramid, box_data, level_data, options, output_data);
        });
    if (!tiled) {
      const auto tiles = tiles_of_elements(rois.size(0), options, kElements);
      pool_kernel<scalar_t, acc_t><<<tiles.blocks(), kThreads, 0, stream>>>(
          tiles, pyramid, box_data, level_data, options, output_data);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CUDA, m) {
  m.impl("roi_align", &roi_align);
}

}  // namespace mmdet
