// Cross-entropy of rows of logits, its derivative, and the derivative of that. For a row z with label y,
//   q_c = (1 - smoothing) w_y [c = y] + smoothing / classes w_c,   a = sum q,   p = softmax(z):
//   loss = a logsumexp(z) - sum q z,   d loss / dz = a p - q.
#pragma once

#include <cstdint>

namespace hvp {

struct CrossEntropy {
  bool wide;  // float64
  int64_t rows, classes, ignored;
  double smoothing;
  const int64_t* target;
  const void* weight;   // one for each class, or null
  double weight_total;  // their sum
  const void* logits;   // rows x classes, dense, as are all that follow
};

// All return the first row whose label is out of range, or -1. Ignored rows have a loss and derivatives of 0.
using CrossEntropyValue = int64_t (*)(const CrossEntropy&, void* losses, void* log_sum_exp, int threads);

// gradient <- grad (a p - q).
using CrossEntropyBackward = int64_t (*)(const CrossEntropy&, const void* grad, const void* log_sum_exp,
                                         void* gradient, int threads);

// The derivatives of sum tangent * gradient for grad and for the logits: `product` is
// grad a p (tangent - sum p tangent).
using CrossEntropyDoubleBackward = int64_t (*)(const CrossEntropy&, const void* tangent, const void* grad,
                                               const void* log_sum_exp, void* grad_product, void* product,
                                               int threads);

// y = log_softmax(z) = z - logsumexp(z). Its derivative for a cotangent g is g - exp(y) sum(g), and the
// derivatives of that for a tangent t are t - sum(exp(y) t) for g and -sum(g) exp(y) t for y.
struct LogSoftmax {
  bool wide;
  int64_t rows, classes;
  const void* output;  // of log_softmax
};
using LogSoftmaxValue = void (*)(bool wide, int64_t rows, int64_t classes, const void* input, void* output,
                                 int threads);
using LogSoftmaxBackward = void (*)(const LogSoftmax&, const void* grad, void* gradient, int threads);
using LogSoftmaxDoubleBackward = void (*)(const LogSoftmax&, const void* tangent, const void* grad,
                                          void* grad_product, void* product, int threads);

}  // namespace hvp
