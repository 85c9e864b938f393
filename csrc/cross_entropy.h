// Cross-entropy of rows of logits, its derivative, and the derivative of that. For a row z with label y,
//   q_c = (1 - smoothing) w_y [c = y] + smoothing / classes w_c,   a = sum q,   p = softmax(z):
//   loss = a logsumexp(z) - sum q z,   d loss / dz = a p - q.
#pragma once

#include <cstdint>

#include "level.h"

namespace hvp {

struct CrossEntropy {
  Level level;
  bool wide;  // float64
  int64_t rows, classes, ignored;
  double smoothing;
  const int64_t* target;
  const void* weight;                   // one for each class, or null
  double weight_total;                  // their sum
  const void *logits, *grad, *tangent;  // rows x classes, dense; grad has one number for each row
  void* log_sum_exp;                    // of each row; the value writes it, the others read it
  void* per_row;                        // value: the losses; double backward: the derivatives for grad
  void* product;  // backward: grad (a p - q); double backward: grad a p (tangent - sum p tangent)
};

// Returns the first row whose label is out of range, or -1. Ignored rows have a loss and derivatives of 0.
using CrossEntropyKernel = int64_t (*)(const CrossEntropy&, int threads);

// y = log_softmax(z) = z - logsumexp(z). Its derivative for a cotangent g is g - exp(y) sum(g), and the
// derivatives of that for a tangent t are t - sum(exp(y) t) for g and -sum(g) exp(y) t for y.
struct LogSoftmax {
  Level level;
  bool wide;
  int64_t rows, classes;
  const void *given, *grad, *tangent;  // given: z for the value, y for the others
  void *first, *second;                // the result; double backward: those for g and y
};
using LogSoftmaxKernel = void (*)(const LogSoftmax&, int threads);

}  // namespace hvp
