// Reads and writes of 16 bytes by one thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <type_traits>

namespace mmdet {

template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T value[kSize];
};

template <int kSize, typename T>
__device__ __forceinline__ Pack<T, kSize> load(const T* data) {
  return *reinterpret_cast<const Pack<T, kSize>*>(data);
}

template <int kPack, typename T, typename W>
__device__ __forceinline__ Pack<T, kPack> load_as(const W* data) {
  const auto given = load<kPack>(data);
  Pack<T, kPack> pack;
  for (int j = 0; j < kPack; ++j) {
    pack.value[j] = static_cast<T>(given.value[j]);
  }
  return pack;
}

template <int kSize, typename T>
__device__ __forceinline__ void store(T* data, const Pack<T, kSize>& pack) {
  *reinterpret_cast<Pack<T, kSize>*>(data) = pack;
}

// Keeps the compiler from holding on to what it has converted a pack to, which takes twice the registers.
template <typename P>
__device__ __forceinline__ void forget_conversions(P& pack) {
  if constexpr (sizeof(P) % sizeof(uint32_t) == 0) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(P) / sizeof(uint32_t)); ++i) {
      asm volatile("" : "+r"(reinterpret_cast<uint32_t*>(&pack)[i]));
    }
  }
}

// 32-bit division is several times faster than 64-bit.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
}

// Whether rows of `size` elements can be read in packs, also by the narrower type of the two.
template <typename scalar_t, typename... Tensors>
bool in_packs(int64_t size, const Tensors&... tensors) {
  constexpr int64_t pack = 16 / sizeof(scalar_t);
  const auto aligned = [](const at::Tensor& t) {
    return !t.defined() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % (pack * t.element_size()) == 0;
  };
  return size % pack == 0 && (aligned(tensors) && ...);
}

// f(elements of a pack), a constant.
template <typename scalar_t, typename F>
void with_pack(bool packs, const F& f) {
  if (packs) {
    f(std::integral_constant<int, 16 / sizeof(scalar_t)>());
  } else {
    f(std::integral_constant<int, 1>());
  }
}

}  // namespace mmdet
