// Tiles and partial sums of the global context kernels on the CPU.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>

#ifdef CPU_CAPABILITY_AVX2
#include <immintrin.h>
#endif

#include "../context_block.h"
#include "vectors.h"

namespace mmdet {

constexpr int64_t kChannelsLastBytes = 512 << 10;    // of a tile
constexpr int64_t kMinWidth = 16, kMaxWidth = 2048;  // positions of a tile
constexpr int64_t kPartWidth = 512;                  // at most, of a tile that is a part of each of its rows
constexpr int64_t kCacheBytes = 32 << 20;            // the last-level cache
constexpr int64_t kBlock = 256;                      // channels whose partial sums are added side by side

// Positions of a tile, of `position` bytes each. With channels last a tile is one run of memory, best in a second-level
// cache. Otherwise it has a run for each channel: of an image that stays in a thread's share of the last level, most of
// it, the runs follow one another; of a larger one short runs come nearer to the second level.
inline int64_t tile_width(int64_t area, int64_t position, bool channels_last) {
  if (channels_last) {
    return std::clamp(kChannelsLastBytes / position, kMinWidth, kMaxWidth);
  }
  const int64_t fitting = kCacheBytes * 3 / 4 / at::get_num_threads() / position;
  return std::clamp(fitting, kMinWidth, fitting < area ? kPartWidth : kMaxWidth);
}

inline int64_t rows_per_task(int64_t row_size) {
  return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, row_size));
}

// Whether a map comes from and goes to memory, whatever is done with it.
inline bool exceeds_cache(const at::Tensor& map) {
  return static_cast<int64_t>(map.nbytes()) > kCacheBytes;
}

// Streamed: past the caches, which then need not read the old content first.
template <typename T>
inline void store(const Vec<T>& v, T* to, int64_t count, [[maybe_unused]] bool stream) {
#ifdef CPU_CAPABILITY_AVX2
  if (stream && count == Vec<T>::size() && reinterpret_cast<uintptr_t>(to) % sizeof(v) == 0) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<const __m256i&>(v));
    return;
  }
#endif
  v.store(to, count);
}

// at::parallel_for; what its threads streamed is visible after it.
template <typename F>
void parallel_for(int64_t count, int64_t grain, const F& body) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    body(begin, end);
#ifdef CPU_CAPABILITY_AVX2
    _mm_sfence();
#endif
  });
}

// A map (N, C, P) or, channels_last, (N, P, C), in tiles of `width` positions with all their channels, which stay in the
// cache. Every thread gets as many tiles.
struct Map {
  int64_t images, channels, area;
  bool channels_last, large;
  int64_t tiles, width;

  explicit Map(const at::Tensor& x)
      : images(x.size(0)),
        channels(x.size(1)),
        area(x.size(2) * x.size(3)),
        channels_last(layout_of(x) == at::MemoryFormat::ChannelsLast),
        large(exceeds_cache(x)) {
    tiles = divide_up(area, tile_width(area, std::max<int64_t>(channels, 1) * x.element_size(), channels_last));
    while (images * tiles % at::get_num_threads() != 0) {
      ++tiles;
    }
    width = tiles > 0 ? divide_up(divide_up(area, tiles), kMinWidth) * kMinWidth : kMinWidth;
    tiles = divide_up(area, width);
  }
};

struct Tile {
  const Map& map;
  int64_t index, image, first, width, offset, stride;

  Tile(const Map& map, int64_t index)
      : map(map),
        index(index),
        image(index / map.tiles),
        first(index % map.tiles * map.width),
        width(std::min(map.width, map.area - first)),
        offset(image * map.channels * map.area + first * (map.channels_last ? map.channels : 1)),
        stride(map.channels_last ? map.channels : map.area) {}
};

template <typename F>
void for_tiles(const Map& map, const F& body) {
  parallel_for(map.images * map.tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      body(Tile(map, i));
    }
  });
}

// (groups, parts, C) -> (groups, C): sum over parts in float64, each weighed by weight(group, part).
template <typename T, typename F>
void sum_parts(const T* parts, int64_t groups, int64_t count, int64_t channels, const F& weight, T* output) {
  const int64_t blocks = divide_up(channels, kBlock);
  at::parallel_for(0, groups * blocks, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / blocks, first = i % blocks * kBlock, size = std::min(kBlock, channels - first);
      std::array<double, kBlock> total{};
      for (int64_t part = 0; part < count; ++part) {
        const double factor = weight(group, part);
        const T* row = parts + (group * count + part) * channels + first;
        for (int64_t c = 0; c < size; ++c) {
          total[c] += factor * row[c];
        }
      }
      std::copy_n(total.begin(), size, output + group * channels + first);
    }
  });
}

constexpr int kRows = 8;  // read side by side
constexpr int64_t kAhead = 16;  // rows

// body(first, number of rows), the number being a constant; from the last rows to the first if asked.
template <typename F>
inline void for_rows(int64_t count, bool backwards, const F& body) {
  const int64_t blocks = count / kRows;
  for (int64_t i = 0; i < blocks; ++i) {
    body((backwards ? blocks - 1 - i : i) * kRows, std::integral_constant<int, kRows>());
  }
  for (int64_t i = blocks * kRows; i < count; ++i) {
    body(i, std::integral_constant<int, 1>());
  }
}

// output[i] = row i . v
template <typename T>
void dot_rows(
    const T* rows, int64_t count, int64_t stride, int64_t size, const T* v, T* output, bool backwards = false) {
  for_rows(count, backwards, [&](int64_t first, auto number) {
    const T* row = rows + first * stride;
    std::array<Vec<T>, number> sums{};
    for_vectors<T>(size, [&](int64_t i, int64_t n) {
      const auto factor = Vec<T>::loadu(v + i, n);
      for (int k = 0; k < number; ++k) {
        sums[k] = at::vec::fmadd(Vec<T>::loadu(row + k * stride + i, n), factor, sums[k]);
      }
    });
    for (int k = 0; k < number; ++k) {
      output[first + k] = sum_lanes(sums[k]);
    }
  });
}

// output = sum of v[i] times row i
template <typename T>
void add_rows(
    const T* rows, int64_t count, int64_t stride, int64_t size, const T* v, T* output, bool backwards = false) {
  std::fill_n(output, size, T(0));
  for_rows(count, backwards, [&](int64_t first, auto number) {
    const T* row = rows + first * stride;
    std::array<Vec<T>, number> factors;
    for (int k = 0; k < number; ++k) {
      factors[k] = Vec<T>(v[first + k]);
    }
    // Where rows lie apart the hardware does not foresee the next ones: each is asked for while another is added. Of
    // rows in one run, and of the last ones, the row itself is asked for, which is there.
    const T* next = stride > size && first + kAhead + number <= count ? row + kAhead * stride : row;
    for_vectors<T>(size, [&](int64_t i, int64_t n) {
      Vec<T> sum(T(0));
      for (int k = 0; k < number; ++k) {
        sum = at::vec::fmadd(factors[k], Vec<T>::loadu(row + k * stride + i, n), sum);
        __builtin_prefetch(next + k * stride + i, 0, 2);  // into the second level
      }
      (Vec<T>::loadu(output + i, n) + sum).store(output + i, n);
    });
  });
}

}  // namespace mmdet
