// Normalization by mean and variance, its derivative, and the derivative of that. In a group of m numbers,
// with x' = (x - mean) r, r = 1 / sqrt(variance + eps), <a> for the mean of a over the group and h = weight
// g:
//   value            weight x' + bias
//   backward         input: r (h - <h> - x' <h x'>); weight: sum g x'; bias: sum g
//   double backward  of these for the cotangents t, tw and tb:
//     grad:   weight r (t - <t> - x' <t x'>) + tw x' + tb
//     input:  r (tw g - <tw g>) - r^2 (<h x'> (t - <t>) + <t x'> (h - <h>))
//             - x' (r <tw g x'> + r^2 (<t h> - <h> <t> - 3 <h x'> <t x'>))
//     weight: sum g r (t - <t> - x' <t x'>)
// Without centring, mean, <h>, <t> and <tw g> are zero.
#pragma once

#include <cstdint>

#include "level.h"

namespace hvp {

// A sample has `images` images of `channels` x `points`. Statistics are those of a sample, in `groups` groups
// of channels. Batch normalization has one sample, with a group for each channel. A row is a sample with one
// image of one point.
struct NormalizedShape {
  bool rows;
  bool centred;        // of rows; images always are
  bool channels_last;  // of images: the channels of a point lie together
  int64_t samples, images, channels, points, groups;
};

struct Normalization : NormalizedShape {
  Level level = Level::kValue;
  bool wide = false;  // float64
  double eps = 0;
  const void *input = nullptr, *weight = nullptr,
             *bias = nullptr;  // weight and bias, one for each channel, may be null
  const void *grad = nullptr, *tangent = nullptr;
  const void *tangent_weight = nullptr, *tangent_bias = nullptr;  // may be null
  double *mean = nullptr,
         *variance = nullptr;  // samples x groups; the value writes them, the others read them
  void* output = nullptr;      // value: the value; double backward: for grad
  void *input_product = nullptr, *weight_product = nullptr, *bias_product = nullptr;
};

using NormalizationKernel = void (*)(const Normalization&, int threads);

}  // namespace hvp
