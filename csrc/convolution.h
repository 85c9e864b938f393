// Convolutions of images and their derivatives, as matrix products of unfolded images.
#pragma once

#include <array>
#include <cstdint>

namespace hvp {

// With y[n, o, p] = sum_{c, k} x[n, c, at(p, k)] w[o, c, k], where at(p, k) = p stride + k dilation -
// padding:
enum class ConvolutionCode : int64_t {
  kOutputs,  // y from x and w
  kImages,   // the derivative with respect to x, from that with respect to y, and w
  kKernels,  // the derivative with respect to w, from x and that with respect to y
  kCount,
};

// What is made is the sum over pairs of factors. All tensors are dense, row after row.
struct Convolution {
  ConvolutionCode code;
  bool wide;  // float64
  int64_t images, inputs, outputs;
  std::array<int64_t, 2> size, kernel, stride, padding, dilation;

  // Rows and columns of y.
  int64_t made(int d) const {
    return (size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) / stride[d] + 1;
  }
  // x, w and y as matrices: a row for each image or output.
  std::array<int64_t, 2> of_images() const { return {images, inputs * size[0] * size[1]}; }
  std::array<int64_t, 2> of_kernels() const { return {outputs, inputs * kernel[0] * kernel[1]}; }
  std::array<int64_t, 2> of_outputs() const { return {images, outputs * made(0) * made(1)}; }
};

constexpr int64_t kMostConvolutionPairs = 6;

struct ConvolutionPair {
  const void *first, *second;
};

// The first of `count` pairs.
struct ConvolutionPairs {
  const ConvolutionPair* first;
  int64_t count;
};

using ConvolutionKernel = void (*)(const Convolution& convolution, const ConvolutionPairs& pairs, void* to,
                                   int threads);

}  // namespace hvp
