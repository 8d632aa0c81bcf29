// The transform of a global context block on CUDA, for a handful of images: a product takes as long as its weight takes
// to come, so each weight is read in the dtype that it has and once for several images.
#pragma once

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "context_block.cuh"

namespace mmdet {

template <typename T>
constexpr int kImages = 16 / sizeof(T);  // that a thread takes together: few, so that all multiprocessors have some

template <int kPack, typename T, typename W>
__device__ __forceinline__ Pack<T, kPack> load_as(const W* data) {
  return unpack<T, W, kPack>(load_words<kPack>(data));
}

// f(a type of parameters, the computing type): they are read as they are if all are alike, and no wider.
template <typename F>
void with_types(at::ScalarType compute, std::initializer_list<at::ScalarType> parameters, const F& f) {
  const auto type = *parameters.begin();
  const bool alike = std::all_of(parameters.begin(), parameters.end(), [=](auto other) { return other == type; });
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, alike && (compute == at::kDouble) == (type == at::kDouble) ? type : compute,
      "context_transform", [&] { f(scalar_t(), at::opmath_type<scalar_t>()); });
}

template <typename W>
at::Tensor as(const at::Tensor& tensor) {
  return cast(tensor, c10::CppTypeToScalarType<W>::value).contiguous();
}

// Packs of four columns, where these can be read so.
template <typename F>
void with_columns(int64_t size, std::initializer_list<const void*> data, const F& f) {
  const bool aligned = std::all_of(
      data.begin(), data.end(), [](const void* part) { return reinterpret_cast<uintptr_t>(part) % 32 == 0; });
  if (size % 4 == 0 && aligned) {
    f(std::integral_constant<int, 4>());
  } else {
    f(std::integral_constant<int, 1>());
  }
}

}  // namespace mmdet
