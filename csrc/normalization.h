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

namespace hvp {

enum class Level : int { kValue, kBackward, kDoubleBackward };

struct Normalization {
  Level level;
  bool wide;           // float64
  bool centred;        // of rows; images always are
  bool channels_last;  // of images: the channels of a point lie together
  // A sample has `images` images of `channels` x `points`. Statistics are those of a sample, in `groups`
  // groups of channels. Batch normalization has one sample, with a group for each channel. A row is a sample
  // with one image of one point.
  int64_t samples, images, channels, points, groups;
  double eps;
  const void *input, *weight, *bias;  // weight and bias, one for each channel, may be null
  const void *grad, *tangent, *tangent_weight, *tangent_bias;  // the last two may be null
  double *mean, *variance;  // samples x groups; the value writes them, the others read them
  void* output;             // value: the value; double backward: for grad
  void *input_product, *weight_product, *bias_product;
};

using NormalizationKernel = void (*)(const Normalization&, int threads);

}  // namespace hvp
