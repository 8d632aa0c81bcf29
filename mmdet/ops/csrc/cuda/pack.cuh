// Reads and writes of 16 bytes by one thread.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
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

template <int kSize, typename T>
__device__ __forceinline__ void store(T* data, const Pack<T, kSize>& pack) {
  *reinterpret_cast<Pack<T, kSize>*>(data) = pack;
}

// A pack in registers of 32 bits: the compiler would take one for each half otherwise.
template <typename T, int kSize>
using Words = std::conditional_t<sizeof(Pack<T, kSize>) == sizeof(uint4), uint4, Pack<T, kSize>>;

template <int kSize, typename T>
__device__ __forceinline__ Words<T, kSize> load_words(const T* data) {
  return *reinterpret_cast<const Words<T, kSize>*>(data);
}

// As numbers to compute with. That of bfloat16 is the upper half of that of float, which the compiler does not see.
template <typename T, typename scalar_t, int kSize>
__device__ __forceinline__ Pack<T, kSize> unpack(const Words<scalar_t, kSize>& words) {
  Pack<T, kSize> result;
  if constexpr (std::is_same_v<scalar_t, at::BFloat16> && kSize == 8) {
    const uint32_t pairs[] = {words.x, words.y, words.z, words.w};
    for (int i = 0; i < 4; ++i) {
      result.value[2 * i] = __uint_as_float(pairs[i] << 16);
      result.value[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000);
    }
  } else {
    Pack<scalar_t, kSize> pack;
    std::memcpy(&pack, &words, sizeof(pack));
    for (int j = 0; j < kSize; ++j) {
      result.value[j] = static_cast<T>(pack.value[j]);
    }
  }
  return result;
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
