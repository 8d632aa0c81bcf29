// Pasting masks into boxes on the CPU, one column of pixels at a time.
#include "../paste_masks.h"
#include "simd.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

namespace mmdet {
namespace {

// What the pixels of a region's rows lie between, for all its columns: the row of cells above each pixel and the one
// below, column after column of cells with their padding (one column of zeros before, two after), and their weights.
template <typename T>
struct Rows {
  std::vector<T> upper, lower, north, south;

  Rows(const T* mask, int size, const Region& region, T low, T extent)
      : upper((size + 3) * region.rows), lower(upper.size()), north(region.rows), south(region.rows) {
    for (int64_t y = 0; y < region.rows; ++y) {
      const auto tap = tap_of(region.top + y, low, extent, size);
      north[y] = tap.first;
      south[y] = tap.second;
      for (int x = 0; x < size; ++x) {
        const int64_t place = (x + 1) * region.rows + y;
        upper[place] = tap.cell >= 0 && tap.cell < size ? mask[tap.cell * size + x] : T(0);
        lower[place] = tap.cell + 1 < size ? mask[(tap.cell + 1) * size + x] : T(0);
      }
    }
  }
};

// Which pixels of one column reach the threshold; `left` and `right` are the offsets of its columns of cells. std::fma
// is a slow function in the default copy, for CPUs without that instruction.
template <typename T>
MMDET_SIMD void sample(
    const Rows<T>& rows, int64_t left, int64_t right, T west, T east, T threshold, uint8_t* flags) {
  const T *a = rows.upper.data() + left, *b = rows.upper.data() + right;
  const T *c = rows.lower.data() + left, *d = rows.lower.data() + right;
  const T *north = rows.north.data(), *south = rows.south.data();
  const int64_t size = static_cast<int64_t>(rows.north.size());
  for (int64_t y = 0; y < size; ++y) {
    flags[y] = bilinear(a[y], b[y], c[y], d[y], north[y], south[y], west, east) >= threshold;
  }
}

// Eight flags of one byte each, 0 or 1, as eight bits.
uint64_t pack(const uint8_t* flags) {
  uint64_t bytes;
  std::memcpy(&bytes, flags, sizeof bytes);
  return bytes * 0x0102040810204080ULL >> 56;
}

template <typename T>
std::string paste(const T* mask, int size, const T* box, int64_t height, int64_t width, T threshold) {
  const Region region = region_of(box, height, width);
  const Rows<T> rows(mask, size, region, box[1], box[3] - box[1]);
  std::vector<uint8_t> flags(region.words() * kWord, 0);
  std::vector<uint64_t> bits(region.words());
  RunLengths runs;
  for (int64_t x = region.left; x < region.left + region.columns; ++x) {
    const auto tap = tap_of(x, box[0], box[2] - box[0], size);
    const int64_t left = (tap.cell + 1) * region.rows;
    sample(rows, left, left + region.rows, tap.first, tap.second, threshold, flags.data());
    for (int64_t word = 0; word < region.words(); ++word) {
      bits[word] = 0;
      for (int part = 0; part < kWord; part += 8) {
        bits[word] |= pack(flags.data() + word * kWord + part) << part;
      }
    }
    runs.add_column(bits.data(), region.rows, x * height + region.top);
  }
  return runs.text(height * width);
}

std::tuple<at::Tensor, at::Tensor> paste_masks(
    const at::Tensor& masks, const at::Tensor& boxes, int64_t height, int64_t width, double threshold) {
  check_paste(masks, boxes, height, width);
  const auto type = compute_type(masks);
  const auto probabilities = masks.to(type).contiguous(), corners = boxes.to(type).contiguous();
  const int size = static_cast<int>(masks.size(1));
  std::vector<std::string> texts(masks.size(0));
  AT_DISPATCH_FLOATING_TYPES(type, "paste_masks", [&] {
    const scalar_t* mask = probabilities.const_data_ptr<scalar_t>();
    const scalar_t* box = corners.const_data_ptr<scalar_t>();
    at::parallel_for(0, masks.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        texts[i] = paste(
            mask + i * size * size, size, box + 4 * i, height, width, static_cast<scalar_t>(threshold));
      }
    });
  });
  return joined(texts);
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet, CPU, m) {
  m.impl("paste_masks", &paste_masks);
}

}  // namespace mmdet
