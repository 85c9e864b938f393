// Convolutions with kernels of 3 x 3 and their derivatives by Winograd's minimal filtering: the
// multiplications are sixteen matrix products of channels and tiles, of a block of tiles at a time, which
// stays in the cache.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "convolution.h"
#include "matrix_products.h"
#include "winograd_transforms.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

// Sixteen matrices, one for each product of a tile. Their distance is such that a number of one and its like
// in the next ones do not push one another out of the first-level cache.
template <class T>
struct Products {
  int64_t leading, stride;  // of columns, and of matrices
  std::unique_ptr<T[]> data;

  // Vectors may reach beyond the last column.
  Products(int64_t rows, int64_t columns)
      : leading(rows),
        stride((rows * columns + Vectors<T>::kLanes + kPage - 1) / kPage * kPage + kApart),
        data(new T[kProducts * stride]) {}

  T* column(int64_t j) const { return data.get() + j * leading; }
  T* matrix(int k) const { return data.get() + k * stride; }

  static constexpr int64_t kPage = 4096 / sizeof(T), kApart = 320 / sizeof(T);
};

template <class T>
class Winograd {
 public:
  // Whether it is faster here than products of unfolded images.
  static bool fits(const Convolution& c) {
    constexpr std::array<int64_t, 2> kThree{3, 3}, kOne{1, 1};
    return c.kernel == kThree && c.stride == kOne && c.dilation == kOne &&
           std::max(c.padding[0], c.padding[1]) <= 2 && std::min(c.inputs, c.outputs) >= kLeastChannels;
  }

  Winograd(const Convolution& c, const ConvolutionPairs& pairs, void* to, int threads)
      : pairs_(pairs),
        to_(static_cast<T*>(to)),
        sums_(c.code == ConvolutionCode::kKernels),
        turned_(c.code == ConvolutionCode::kImages),
        images_(c.images),
        from_{turned_ ? c.outputs : c.inputs, turned_ ? c.made(0) : c.size[0],
              turned_ ? c.made(1) : c.size[1]},
        made_{turned_ ? c.inputs : c.outputs, turned_ ? c.size[0] : c.made(0),
              turned_ ? c.size[1] : c.made(1)},
        above_(turned_ ? 2 - c.padding[0] : c.padding[0]),
        left_(turned_ ? 2 - c.padding[1] : c.padding[1]),
        rows_((made_.rows + 1) / 2),
        columns_((made_.columns + 1) / 2) {
    const int64_t numbers =
        kProducts * (pairs.count * from_.channels + (sums_ ? pairs.count : 1) * made_.channels);
    const int64_t fit = std::max(kLeastTiles, kBytes / (numbers * static_cast<int64_t>(sizeof(T))));
    together_ = std::max<int64_t>(1, fit / (rows_ * columns_));
    band_ = together_ > 1 ? rows_ : std::min(rows_, std::max<int64_t>(1, fit / columns_));
    const int64_t multiplications = images_ * rows_ * columns_ * kProducts * from_.channels * made_.channels;
    shares_ = multiplications < kParallelProducts ? 1 : std::min<int64_t>(threads, images_);
  }

  void run() const {
    const OneBlasThread alone(true);
    std::vector<Products<T>> kernels;  // transformed, or sums of each share
    for (int64_t s = 0; s < (sums_ ? shares_ : 1); ++s) {
      kernels.emplace_back((sums_ ? 1 : pairs_.count) * from_.channels, made_.channels);
    }
    if (!sums_) transform(kernels[0]);
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(shares_)) if (shares_ > 1)
    for (int64_t s = 0; s < shares_; ++s) {
      const OneBlasThread also_here(shares_ > 1);
      share(images_ * s / shares_, images_ * (s + 1) / shares_, kernels[sums_ ? s : 0]);
    }
    if (sums_) transform_back(kernels);
  }

 private:
  static constexpr int64_t kLanes = Vectors<T>::kLanes;
  // What a block takes, about as much as a second-level cache has; but tiles enough for a fast product.
  static constexpr int64_t kBytes = int64_t{1} << 20, kLeastTiles = 64;
  static constexpr int64_t kLeastChannels = 8;

  // What all images have, at an input or an output.
  struct Planes {
    int64_t channels, rows, columns;

    template <class U>
    U* at(U* images, int64_t image, int64_t channel) const {
      return images + (image * channels + channel) * rows * columns;
    }
  };

  // Some images, or some rows of tiles of one.
  struct Block {
    int64_t image, images, row, rows, tiles;
  };

  // A column for each output, of numbers for each pair and each input.
  void transform(const Products<T>& to) const {
    Vector<T> g[9];
    for (int64_t o = 0; o < made_.channels; ++o) {
      for (int64_t p = 0; p < pairs_.count; ++p) {
        const T* const kernels = static_cast<const T*>(pairs_.first[p].second);
        for (int64_t c = 0; c < from_.channels; c += kLanes) {
          for (int64_t l = 0; l < std::min(kLanes, from_.channels - c); ++l) {
            const T* const kernel =
                kernels + 9 * (turned_ ? (c + l) * made_.channels + o : o * from_.channels + c + l);
            for (int i = 0; i < 9; ++i) g[i][l] = kernel[turned_ ? 8 - i : i];
          }
          transform_kernels<T>(g, to.column(o) + p * from_.channels + c, to.stride);
        }
      }
    }
  }

  void transform_back(const std::vector<Products<T>>& sums) const {
    const int64_t kernels = made_.channels * from_.channels;
    T* const total = sums[0].data.get();
    for (int64_t s = 1; s < shares_; ++s) {
      const T* const part = sums[s].data.get();
      for (int64_t k = 0; k < kProducts * sums[0].stride; ++k) total[k] += part[k];
    }
    Vector<T> g[9];
    for (int64_t k = 0; k < kernels; k += kLanes) {
      transform_kernels_back<T>(total + k, sums[0].stride, g);
      for (int64_t l = 0; l < std::min(kLanes, kernels - k); ++l) {
        for (int i = 0; i < 9; ++i) to_[9 * (k + l) + i] = g[i][l];
      }
    }
  }

  void share(int64_t begin, int64_t end, const Products<T>& kernels) const {
    const int64_t most = std::min(together_, end - begin) * band_ * columns_;
    // A column for each channel: of outputs those of all pairs are summed, of kernels all tiles of all pairs.
    const Products<T> inputs((sums_ ? pairs_.count : 1) * most + kLanes,
                             (sums_ ? 1 : pairs_.count) * from_.channels);
    const Products<T> outputs(inputs.leading, made_.channels);
    Phases<T> phases(band_ + 1, columns_ + 1);
    if (sums_) std::fill(kernels.data.get(), kernels.matrix(kProducts), T(0));
    for (int64_t image = begin; image < end; image += together_) {
      for (int64_t row = 0; row < rows_; row += band_) {
        const int64_t images = std::min(together_, end - image), rows = std::min(band_, rows_ - row);
        const Block block{image, images, row, rows, images * rows * columns_};
        sums_ ? add_kernels(block, phases, inputs, outputs, kernels)
              : make_outputs(block, phases, inputs, outputs, kernels);
      }
    }
  }

  void make_outputs(const Block& block, Phases<T>& phases, const Products<T>& inputs,
                    const Products<T>& outputs, const Products<T>& kernels) const {
    for (int64_t p = 0; p < pairs_.count; ++p) read_inputs(p, block, phases, inputs, p * from_.channels, 0);
    for (int k = 0; k < kProducts; ++k) {
      multiply<T>(
          {false, false, block.tiles, made_.channels, kernels.leading, T(1), inputs.matrix(k), inputs.leading,
           kernels.matrix(k), kernels.leading, T(0), outputs.matrix(k), outputs.leading},
          1);
    }
    for (int64_t o = 0; o < made_.channels; ++o) {
      const T* from = outputs.column(o);
      for (int64_t n = 0; n < block.images; ++n) {
        T* const plane = made_.at(to_, block.image + n, o);
        for (int64_t i = block.row; i < block.row + block.rows; ++i, from += columns_) {
          transform_outputs(from, outputs.stride, plane + 2 * i * made_.columns,
                            std::min<int64_t>(2, made_.rows - 2 * i), made_.columns);
        }
      }
    }
  }

  void add_kernels(const Block& block, Phases<T>& phases, const Products<T>& inputs,
                   const Products<T>& outputs, const Products<T>& kernels) const {
    for (int64_t p = 0; p < pairs_.count; ++p) {
      read_inputs(p, block, phases, inputs, 0, p * block.tiles);
      for (int64_t o = 0; o < made_.channels; ++o) {
        T* to = outputs.column(o) + p * block.tiles;
        for (int64_t n = 0; n < block.images; ++n, to += block.rows * columns_) {
          phases.read(made_.at(static_cast<const T*>(pairs_.first[p].second), block.image + n, o), made_.rows,
                      made_.columns, 2 * block.row, 0, block.rows);
          transform_outputs_back(phases, block.rows, columns_, to, outputs.stride);
        }
      }
    }
    for (int k = 0; k < kProducts; ++k) {
      multiply<T>(
          {true, false, from_.channels, made_.channels, pairs_.count * block.tiles, T(1), inputs.matrix(k),
           inputs.leading, outputs.matrix(k), outputs.leading, T(1), kernels.matrix(k), kernels.leading},
          1);
    }
  }

  // The images of a pair into columns from `column` on, from row `row` on.
  void read_inputs(int64_t pair, const Block& block, Phases<T>& phases, const Products<T>& inputs,
                   int64_t column, int64_t row) const {
    const T* const images = static_cast<const T*>(pairs_.first[pair].first);
    for (int64_t c = 0; c < from_.channels; ++c) {
      T* to = inputs.column(column + c) + row;
      for (int64_t n = 0; n < block.images; ++n, to += block.rows * columns_) {
        phases.read(from_.at(images, block.image + n, c), from_.rows, from_.columns, 2 * block.row - above_,
                    left_, block.rows + 1);
        transform_inputs(phases, block.rows, columns_, to, inputs.stride);
      }
    }
  }

  const ConvolutionPairs& pairs_;
  T* const to_;
  const bool sums_;  // derivatives of kernels are sums over all tiles
  // Derivatives of images are outputs of a convolution with the kernels turned by 180 degrees.
  const bool turned_;
  const int64_t images_;
  const Planes from_, made_;
  const int64_t above_, left_;    // padding
  const int64_t rows_, columns_;  // of tiles
  int64_t shares_;
  int64_t together_, band_;  // images, and rows of tiles, of a block
};

}  // namespace
}  // namespace HVP_VARIANT
}  // namespace hvp
