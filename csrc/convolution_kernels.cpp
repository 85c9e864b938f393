// Convolutions, compiled for each instruction set. Images are unfolded block by block, so that a column for
// each output stays in the second-level cache until the matrix product has read it.
//
// Of a row (a b c) and a kernel of two, padding 1, the columns are  0 a b c
//                                                                   a b c 0.
#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "convolution.h"
#include "convolution_lines.h"
#include "matrix_products.h"
#include "variants.h"
#include "winograd.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

constexpr int64_t kBlockBytes = int64_t{1} << 18;
// Columns that a matrix product needs to be fast.
constexpr int64_t kLeastColumns = 64;

// Some images, or some rows of the outputs of one.
struct Block {
  int64_t image, images, row, rows;
};

template <class T>
class Run {
 public:
  Run(const Convolution& convolution, const ConvolutionPairs& pairs, void* to, int threads)
      : c_(convolution),
        pairs_(pairs),
        to_(static_cast<T*>(to)),
        rows_(c_.made(0)),
        columns_(c_.made(1)),
        points_(rows_ * columns_),
        pixels_(c_.size[0] * c_.size[1]),
        unfolded_(c_.of_kernels()[1]),
        point_(c_.kernel == std::array<int64_t, 2>{1, 1} && c_.stride == std::array<int64_t, 2>{1, 1} &&
               c_.padding == std::array<int64_t, 2>{0, 0}),
        tiles_(tiles_available()) {
    const int64_t multiplications = c_.images * points_ * unfolded_ * c_.outputs;
    shares_ = multiplications < kParallelProducts ? 1 : std::min<int64_t>(threads, c_.images);
    const int64_t fits = kBlockBytes / static_cast<int64_t>(sizeof(T)) / unfolded_;
    const int64_t width = std::max(kLeastColumns, fits);
    together_ = std::max<int64_t>(1, width / points_);
    band_ = together_ > 1 ? rows_ : std::min(rows_, std::max<int64_t>(1, width / columns_));
  }

  void run() const {
    const OneBlasThread alone(true);
    std::unique_ptr<T[]> kernels;  // of each share
    const int64_t weights = c_.outputs * unfolded_;
    if (c_.code == ConvolutionCode::kKernels) kernels.reset(new T[shares_ * weights]);
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(shares_)) if (shares_ > 1)
    for (int64_t share = 0; share < shares_; ++share) {
      const OneBlasThread also_here(shares_ > 1);
      this->share(c_.images * share / shares_, c_.images * (share + 1) / shares_,
                  kernels.get() + share * weights);
    }
    for (int64_t o = 0; kernels && o < c_.outputs; ++o) {
      for (int64_t k = 0; k < unfolded_; ++k) {
        const int64_t place = tiles_ ? o * unfolded_ + k : k * c_.outputs + o;
        T sum = kernels[place];
        for (int64_t share = 1; share < shares_; ++share) sum += kernels[share * weights + place];
        to_[o * unfolded_ + k] = sum;
      }
    }
  }

 private:
  // Images [begin, end); derivatives of kernels are summed in `kernels`.
  void share(int64_t begin, int64_t end, T* kernels) const {
    const int64_t width = std::min(together_, end - begin) * band_ * columns_;
    const std::unique_ptr<T[]> columns(new T[unfolded_ * width]), outputs(new T[c_.outputs * width]);
    for (int64_t image = begin; image < end; image += together_) {
      for (int64_t row = 0; row < rows_; row += band_) {
        const Block block{image, std::min(together_, end - image), row, std::min(band_, rows_ - row)};
        switch (c_.code) {
          case ConvolutionCode::kOutputs:
            make_outputs(block, columns.get(), outputs.get());
            break;
          case ConvolutionCode::kImages:
            make_images(block, columns.get(), outputs.get());
            break;
          case ConvolutionCode::kKernels:
            make_kernels(block, columns.get(), outputs.get(), kernels, image == begin && row == 0);
            break;
          case ConvolutionCode::kCount:
            break;
        }
      }
    }
  }

  // y (columns x outputs) <- unfolded x (columns x unfolded) w^T, by columns as in BLAS.
  void make_outputs(const Block& block, T* columns, T* outputs) const {
    const int64_t width = block.images * block.rows * columns_;
    const bool one = block.images == 1;
    T* const to = one ? outputs_at(to_, block) : outputs;
    for (int64_t i = 0; i < pairs_.count; ++i) {
      const Matrix x = unfold(static_cast<const T*>(pairs_.first[i].first), block, columns);
      multiply<T>({false, false, width, c_.outputs, unfolded_, T(1), x.data, x.leading,
                   static_cast<const T*>(pairs_.first[i].second), unfolded_, i == 0 ? T(0) : T(1), to,
                   one ? points_ : width},
                  1);
    }
    if (!one) exchange(block, outputs, to_, false);
  }

  // Unfolded x (columns x unfolded) <- y (columns x outputs) w, which is folded.
  void make_images(const Block& block, T* columns, T* outputs) const {
    const int64_t width = block.images * block.rows * columns_;
    const bool direct = point_ && block.images == 1;
    T* const to = direct ? to_ + block.image * c_.inputs * pixels_ + block.row * columns_ : columns;
    for (int64_t i = 0; i < pairs_.count; ++i) {
      const Matrix y = gathered(static_cast<const T*>(pairs_.first[i].first), block, outputs);
      multiply<T>({false, true, width, unfolded_, c_.outputs, T(1), y.data, y.leading,
                   static_cast<const T*>(pairs_.first[i].second), unfolded_, i == 0 ? T(0) : T(1), to,
                   direct ? pixels_ : width},
                  1);
    }
    if (!direct) fold(block, columns);
  }

  // w <- y^T (outputs x columns) unfolded x. Tiles are fast for the inner products of columns, which give w
  // as it is. BLAS takes a third of the time where y is turned over, and gives w by columns then.
  void make_kernels(const Block& block, T* columns, T* outputs, T* kernels, bool first) const {
    const int64_t width = block.images * block.rows * columns_;
    for (int64_t i = 0; i < pairs_.count; ++i) {
      const Matrix x = unfold(static_cast<const T*>(pairs_.first[i].first), block, columns);
      const T* const there = static_cast<const T*>(pairs_.first[i].second);
      const T beta = first && i == 0 ? T(0) : T(1);
      if (tiles_) {
        const Matrix y = gathered(there, block, outputs);
        multiply<T>({true, false, unfolded_, c_.outputs, width, T(1), x.data, x.leading, y.data, y.leading,
                     beta, kernels, unfolded_},
                    1);
      } else {
        turned(there, block, outputs);
        multiply<T>({false, false, c_.outputs, unfolded_, width, T(1), outputs, c_.outputs, x.data, x.leading,
                     beta, kernels, c_.outputs},
                    1);
      }
    }
  }

  // By columns, as in BLAS.
  struct Matrix {
    const T* data;
    int64_t leading;
  };

  template <class U>
  U* outputs_at(U* outputs, const Block& block) const {
    return outputs + block.image * c_.outputs * points_ + block.row * columns_;
  }

  // The outputs of a block as a matrix of a column for each of them.
  Matrix gathered(const T* outputs, const Block& block, T* scratch) const {
    if (block.images == 1) return {outputs_at(outputs, block), points_};
    exchange(block, scratch, const_cast<T*>(outputs), true);
    return {scratch, block.images * points_};
  }

  // The outputs of a block, all those of a point one after another.
  void turned(const T* outputs, const Block& block, T* to) const {
    const int64_t points = block.rows * columns_;
    for (int64_t n = 0; n < block.images; ++n) {
      turn_over(outputs_at(outputs, {block.image + n, 1, block.row, block.rows}), points_, c_.outputs, points,
                to + n * points * c_.outputs);
    }
  }

  // Between a matrix of columns for all images and the outputs, image by image.
  void exchange(const Block& block, T* matrix, T* outputs, bool gather) const {
    const size_t bytes = static_cast<size_t>(points_) * sizeof(T);
    for (int64_t n = 0; n < block.images; ++n) {
      for (int64_t o = 0; o < c_.outputs; ++o) {
        T* const here = matrix + (o * block.images + n) * points_;
        T* const there = outputs + ((block.image + n) * c_.outputs + o) * points_;
        std::memcpy(gather ? here : there, gather ? there : here, bytes);
      }
    }
  }

  Matrix unfold(const T* images, const Block& block, T* columns) const {
    if (point_ && block.images == 1)
      return {images + block.image * c_.inputs * pixels_ + block.row * columns_, pixels_};
    walk<const T>(images, block, columns, unfold_lines);
    return {columns, block.images * block.rows * columns_};
  }

  // Adds to the images, from zero at the first rows of each.
  void fold(const Block& block, T* columns) const {
    if (block.row == 0) {
      T* const first = to_ + block.image * c_.inputs * pixels_;
      std::fill(first, first + block.images * c_.inputs * pixels_, T(0));
    }
    walk<T>(to_, block, columns, fold_lines);
  }

  // `lines` of `n` elements: pixels `step` apart, lines of them `pitch`, and lines of columns `width`.
  static void unfold_lines(const T* pixels, int64_t step, int64_t pitch, T* columns, int64_t width,
                           int64_t lines, int64_t n) {
    if (step == 1 && n >= kLanes) return copy_lines(pixels, pitch, columns, width, lines, n);
    for (int64_t i = 0; i < lines; ++i, pixels += pitch, columns += width) {
      for (int64_t j = 0; j < n; ++j) columns[j] = pixels[j * step];
    }
  }

  static void fold_lines(T* pixels, int64_t step, int64_t pitch, const T* columns, int64_t width,
                         int64_t lines, int64_t n) {
    if (step == 1 && n >= kLanes) return add_lines(pixels, pitch, columns, width, lines, n);
    for (int64_t i = 0; i < lines; ++i, pixels += pitch, columns += width) {
      for (int64_t j = 0; j < n; ++j) pixels[j * step] += columns[j];
    }
  }

  // Calls visit(pixels, step, pitch, columns, width, lines, n) for the lines of each image and each element
  // of the kernel whose pixels are inside; where they are not, unfolding writes zeros.
  template <class Pixel, class Visit>
  void walk(Pixel* images, const Block& block, T* columns, Visit visit) const {
    const int64_t height = c_.size[0], across = c_.size[1], step = c_.stride[1];
    for (int64_t k = 0; k < unfolded_; ++k) {
      const int64_t channel = k / (c_.kernel[0] * c_.kernel[1]);
      const int64_t down = k / c_.kernel[1] % c_.kernel[0] * c_.dilation[0] - c_.padding[0];
      const int64_t right = k % c_.kernel[1] * c_.dilation[1] - c_.padding[1];
      // Columns j with 0 <= j step + right < across.
      const int64_t from = std::min(columns_, right < 0 ? (-right + step - 1) / step : 0);
      const int64_t to =
          std::max(from, std::min(columns_, right < across ? (across - right - 1) / step + 1 : 0));
      // Lines i with 0 <= (row + i) stride + down < height.
      const int64_t above = down < 0 ? (-down + c_.stride[0] - 1) / c_.stride[0] : 0;
      const int64_t below = down < height ? (height - down - 1) / c_.stride[0] + 1 : 0;
      const int64_t top = std::min(std::max<int64_t>(0, above - block.row), block.rows);
      const int64_t bottom = std::max(top, std::min(below - block.row, block.rows));
      for (int64_t n = 0; n < block.images; ++n) {
        T* const lines = columns + (k * block.images + n) * block.rows * columns_;
        if constexpr (std::is_const_v<Pixel>) clear_outside(lines, block.rows, top, bottom, from, to);
        if (to == from || bottom == top) continue;
        Pixel* const pixels = images + ((block.image + n) * c_.inputs + channel) * pixels_ + from * step +
                              right + ((block.row + top) * c_.stride[0] + down) * across;
        visit(pixels, step, c_.stride[0] * across, lines + top * columns_ + from, columns_, bottom - top,
              to - from);
      }
    }
  }

  // Columns outside of lines [top, bottom) and of columns [from, to) become zero.
  void clear_outside(T* lines, int64_t rows, int64_t top, int64_t bottom, int64_t from, int64_t to) const {
    std::fill(lines, lines + top * columns_, T(0));
    std::fill(lines + bottom * columns_, lines + rows * columns_, T(0));
    if (from == 0 && to == columns_) return;
    for (T* line = lines + top * columns_; line != lines + bottom * columns_; line += columns_) {
      for (int64_t j = 0; j < from; ++j) line[j] = T(0);
      for (int64_t j = to; j < columns_; ++j) line[j] = T(0);
    }
  }

  const Convolution& c_;
  const ConvolutionPairs& pairs_;
  T* const to_;
  const int64_t rows_, columns_, points_, pixels_;
  const int64_t unfolded_;  // pixels that an output is made of
  const bool point_;        // whether an image is its own unfolded one
  const bool tiles_;
  int64_t shares_;
  int64_t together_, band_;  // images, and rows of outputs, of a block
};

template <class T>
void run(const Convolution& convolution, const ConvolutionPairs& pairs, void* to, int threads) {
  Winograd<T>::fits(convolution) ? Winograd<T>(convolution, pairs, to, threads).run()
                                 : Run<T>(convolution, pairs, to, threads).run();
}

}  // namespace

void run_convolution(const Convolution& convolution, const ConvolutionPairs& pairs, void* to, int threads) {
  convolution.wide ? run<double>(convolution, pairs, to, threads)
                   : run<float>(convolution, pairs, to, threads);
}

}  // namespace HVP_VARIANT
}  // namespace hvp
