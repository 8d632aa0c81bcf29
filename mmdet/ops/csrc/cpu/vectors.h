// Rows of numbers by vectors of what the processor takes at once.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstdint>

namespace mmdet {

template <typename T>
using Vec = at::vec::Vectorized<T>;

// body(first, count) for each vector of a row; count is a constant but for the last.
template <typename T, typename F>
inline void for_vectors(int64_t size, const F& body) {
  constexpr int64_t step = Vec<T>::size();
  int64_t i = 0;
  for (; i + step <= size; i += step) {
    body(i, step);
  }
  if (i < size) {
    body(i, size - i);
  }
}

template <typename T>
inline T sum_lanes(const Vec<T>& v) {
  return at::vec::vec_reduce_all<T>([](Vec<T> a, Vec<T> b) { return a + b; }, v);
}

}  // namespace mmdet
