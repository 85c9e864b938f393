// Batch and group normalization of images, channels first or last, compiled once for each instruction set.
// One pass over the images makes a few sums for each channel, a second one the results, of which each is a
// linear combination of the images with coefficients for each channel.
#include <algorithm>
#include <cmath>
#include <vector>

#include "normalization_strips.h"

namespace hvp {
namespace HVP_VARIANT {
namespace {

constexpr int64_t kTile = 64;     // points of one partial sum, and of what is kept in the first-level cache
constexpr int64_t kChunk = 1024;  // points of one task

template <class T, Level level>
class Images {
  using V = Vector<T>;
  static constexpr int64_t kLanes = Vectors<T>::kLanes;
  static constexpr int kQ = kSums<level>, kK = kCoefficients<level>;

 public:
  Images(const Normalization& given, int threads)
      : given_(given),
        threads_(threads),
        x_(static_cast<const T*>(given.input)),
        g_(level == Level::kValue ? x_ : static_cast<const T*>(given.grad)),  // never null, only unread
        t_(level == Level::kDoubleBackward ? static_cast<const T*>(given.tangent) : x_),
        first_(static_cast<T*>(level == Level::kBackward ? given.input_product : given.output)),
        second_(static_cast<T*>(level == Level::kValue ? given.output : given.input_product)),
        chunk_(given.channels_last ? std::min(kChunk, given.points) : given.points),
        chunks_((given.points + chunk_ - 1) / chunk_),
        shift_(given.samples * given.channels),
        scale_(given.samples * given.channels, T(1)) {}

  void run() {
    const int64_t cells = given_.samples * given_.channels;
    for (int64_t cell = 0; cell < cells; ++cell) {
      const int64_t sample = cell / given_.channels, channel = cell % given_.channels;
      if (level == Level::kValue) {
        shift_[cell] = x_[sample * given_.images * given_.channels * given_.points +
                          channel * (given_.channels_last ? 1 : given_.points)];
      } else {
        shift_[cell] = static_cast<T>(given_.mean[group(cell)]);
        scale_[cell] = static_cast<T>(inverse(group(cell)));
      }
    }
    sum();
    if (level == Level::kValue) {
      statistics();
      for (int64_t cell = 0; cell < cells; ++cell) shift_[cell] = static_cast<T>(given_.mean[group(cell)]);
    }
    coefficients();
    each([this](int64_t sample, int64_t start, int64_t points, int64_t, int64_t channel) {
      combine(sample, start, points, channel);
    });
  }

 private:
  // For each part of the images, in parallel: its sample, first element, points, number, and its channel
  // where channels come first.
  template <class Work>
  void each(const Work& work) const {
    const int64_t per_image = given_.channels_last ? chunks_ : given_.channels;
    const int64_t tasks = given_.samples * given_.images * per_image;
#pragma omp parallel for schedule(static) num_threads(threads_)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t image = task / per_image, part = task % per_image;
      if (given_.channels_last) {
        const int64_t begin = part * chunk_;
        work(image / given_.images, (image * given_.points + begin) * given_.channels,
             std::min(chunk_, given_.points - begin), task, int64_t{0});
      } else {
        work(image / given_.images, task * given_.points, given_.points, task, part);
      }
    }
  }

  int64_t group(int64_t cell) const {
    return cell / given_.channels * given_.groups +
           cell % given_.channels / (given_.channels / given_.groups);
  }

  double inverse(int64_t group) const { return 1 / std::sqrt(given_.variance[group] + given_.eps); }

  void sum() {
    const int64_t parts = given_.samples * given_.images * (given_.channels_last ? chunks_ : given_.channels);
    const int64_t width = given_.channels_last ? given_.channels : 1;
    std::vector<double> partial(static_cast<size_t>(parts * width * kQ));
    each([&](int64_t sample, int64_t start, int64_t points, int64_t number, int64_t channel) {
      double* const to = partial.data() + number * width * kQ;
      const T* const shift = shift_.data() + sample * given_.channels + channel;
      const T* const scale = scale_.data() + sample * given_.channels + channel;
      if (given_.channels_last) {
        for (int64_t p = 0; p < points; p += kTile) {
          sum_columns(start + p * given_.channels, std::min(kTile, points - p), shift, scale, to);
        }
      } else {
        sum_line(start, points, *shift, *scale, to);
      }
    });
    totals_ = std::vector<double>(static_cast<size_t>(given_.samples * given_.channels * kQ));
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t sample = part / (parts / given_.samples);
      const int64_t channel = given_.channels_last ? 0 : part % given_.channels;
      double* const to = totals_.data() + (sample * given_.channels + channel) * kQ;
      for (int64_t i = 0; i < width * kQ; ++i) to[i] += partial[part * width * kQ + i];
    }
    for (int64_t cell = 0; cell < given_.samples * given_.channels && level != Level::kValue; ++cell) {
      double* const s = totals_.data() + cell * kQ;
      const double away = rounded_off(cell) * inverse(group(cell));
      s[1] -= away * s[0];
      if (level == Level::kDoubleBackward) s[3] -= away * s[2];
    }
  }

  // What the rounding of a cell's mean has left out. It changes sums and constants, not what is done for each
  // number: sum g (x - mean) is sum g (x - rounded mean) - rounded_off sum g.
  double rounded_off(int64_t cell) const {
    return given_.mean[group(cell)] - static_cast<double>(static_cast<T>(given_.mean[group(cell)]));
  }

  void sum_columns(int64_t start, int64_t points, const T* shift, const T* scale, double* to) const {
    const int64_t stride = given_.channels;
    int64_t c = 0;
    for (; c + kLanes <= given_.channels; c += kLanes) {
      V sums[kQ] = {};
      add_strip<level>(x_ + start + c, g_ + start + c, t_ + start + c, points, stride, load<V>(shift + c),
                       load<V>(scale + c), sums);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        for (int q = 0; q < kQ; ++q) to[(c + lane) * kQ + q] += static_cast<double>(sums[q][lane]);
      }
    }
    for (; c < given_.channels; ++c) {
      T sums[kQ] = {};
      add_strip<level>(x_ + start + c, g_ + start + c, t_ + start + c, points, stride, shift[c], scale[c],
                       sums);
      for (int q = 0; q < kQ; ++q) to[c * kQ + q] += static_cast<double>(sums[q]);
    }
  }

  void sum_line(int64_t start, int64_t points, T shift, T scale, double* to) const {
    const int64_t vectors = points / kLanes;
    for (int64_t p = 0; p < vectors; p += kTile) {
      V sums[kQ] = {};
      const int64_t at = start + p * kLanes;
      add_strip<level>(x_ + at, g_ + at, t_ + at, std::min(kTile, vectors - p), kLanes, spread<V>(shift),
                       spread<V>(scale), sums);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        for (int q = 0; q < kQ; ++q) to[q] += static_cast<double>(sums[q][lane]);
      }
    }
    T rest[kQ] = {};
    const int64_t at = start + vectors * kLanes;
    add_strip<level>(x_ + at, g_ + at, t_ + at, points - vectors * kLanes, 1, shift, scale, rest);
    for (int q = 0; q < kQ; ++q) to[q] += static_cast<double>(rest[q]);
  }

  // Mean and variance of each group from those of its channels.
  void statistics() const {
    const double count = static_cast<double>(given_.images * given_.points);
    const int64_t members = given_.channels / given_.groups;
    for (int64_t group = 0; group < given_.samples * given_.groups; ++group) {
      const double* const sums = totals_.data() + group * members * kQ;
      const T* const shift = shift_.data() + group * members;
      double mean = 0, squares = 0;
      for (int64_t i = 0; i < members; ++i) mean += static_cast<double>(shift[i]) + sums[i * kQ] / count;
      mean /= static_cast<double>(members);
      for (int64_t i = 0; i < members; ++i) {
        const double own = sums[i * kQ] / count, away = static_cast<double>(shift[i]) + own - mean;
        squares += std::max(0.0, sums[i * kQ + 1] / count - own * own) + away * away;
      }
      given_.mean[group] = mean;
      given_.variance[group] = squares / static_cast<double>(members);
    }
  }

  static double at(const void* numbers, int64_t i, double otherwise) {
    return numbers == nullptr ? otherwise : static_cast<double>(static_cast<const T*>(numbers)[i]);
  }

  // From the sums; with the products for weight and bias.
  void coefficients() {
    const int64_t channels = given_.channels, members = channels / given_.groups;
    const double count = static_cast<double>(given_.images * given_.points * members);
    coefficients_ = std::vector<T>(static_cast<size_t>(given_.samples * kK * channels));
    std::vector<double> weight_product(channels), bias_product(channels);
    for (int64_t group = 0; group < given_.samples * given_.groups; ++group) {
      const int64_t sample = group / given_.groups, begin = group % given_.groups * members;
      const double* const sums = totals_.data() + group * members * kQ;
      const double r = inverse(group);
      double h = 0, hx = 0, t = 0, tx = 0, th = 0, wg = 0, wgx = 0;
      for (int64_t i = 0; i < members && level != Level::kValue; ++i) {
        const double* const s = sums + i * kQ;
        const double w = at(given_.weight, begin + i, 1);
        h += w * s[0] / count;
        hx += w * s[1] / count;
        if (level != Level::kDoubleBackward) continue;
        const double tw = at(given_.tangent_weight, begin + i, 0);
        t += s[2] / count;
        tx += s[3] / count;
        th += w * s[4] / count;
        wg += tw * s[0] / count;
        wgx += tw * s[1] / count;
      }
      for (int64_t i = 0; i < members; ++i) {
        const double* const s = sums + i * kQ;
        const double w = at(given_.weight, begin + i, 1);
        T* const k = coefficients_.data() + sample * kK * channels + begin + i;
        const double away = rounded_off(group * members + i);
        const auto set = [&](int index, double value) { k[index * channels] = static_cast<T>(value); };
        const auto set_affine = [&](int index, double slope,
                                    double constant) {  // slope (x - mean) + constant
          set(index, slope);
          set(index + 1, constant - slope * away);
        };
        if (level == Level::kValue) {
          set_affine(0, w * r, at(given_.bias, begin + i, 0));
        } else if (level == Level::kBackward) {
          set(0, w * r);
          set_affine(1, -r * r * hx, -r * h);
          weight_product[begin + i] += s[1];
          bias_product[begin + i] += s[0];
        } else {
          const double tw = at(given_.tangent_weight, begin + i, 0);
          set(0, w * r);
          set_affine(1, r * (tw - w * r * tx), at(given_.tangent_bias, begin + i, 0) - w * r * t);
          set(3, r * tw - r * r * tx * w);
          set(4, -r * r * hx);
          set_affine(5, -r * (r * wgx + r * r * (th - h * t - 3 * hx * tx)),
                     r * r * (hx * t + tx * h) - r * wg);
          weight_product[begin + i] += r * (s[4] - t * s[0] - tx * s[1]);
        }
      }
    }
    for (int64_t c = 0; c < channels && level != Level::kValue; ++c) {
      static_cast<T*>(given_.weight_product)[c] = static_cast<T>(weight_product[c]);
      if (level == Level::kBackward)
        static_cast<T*>(given_.bias_product)[c] = static_cast<T>(bias_product[c]);
    }
  }

  void combine(int64_t sample, int64_t start, int64_t points, int64_t channel) const {
    const T* const k = coefficients_.data() + sample * kK * given_.channels + channel;
    const T* const mean = shift_.data() + sample * given_.channels + channel;
    if (!given_.channels_last) {
      const int64_t vectors = points / kLanes, rest = start + vectors * kLanes;
      strip<V>(start, vectors, kLanes, spread<V>(*mean),
               [&](int i) { return spread<V>(k[i * given_.channels]); });
      strip<T>(rest, points - vectors * kLanes, 1, *mean, [&](int i) { return k[i * given_.channels]; });
      return;
    }
    for (int64_t p = 0; p < points; p += kTile) {
      const int64_t here = start + p * given_.channels, count = std::min(kTile, points - p);
      int64_t c = 0;
      for (; c + kLanes <= given_.channels; c += kLanes) {
        strip<V>(here + c, count, given_.channels, load<V>(mean + c),
                 [&](int i) { return load<V>(k + i * given_.channels + c); });
      }
      for (; c < given_.channels; ++c) {
        strip<T>(here + c, count, given_.channels, mean[c],
                 [&](int i) { return k[i * given_.channels + c]; });
      }
    }
  }

  template <class W, class Coefficient>
  HVP_INLINE void strip(int64_t start, int64_t points, int64_t stride, W mean,
                        const Coefficient& at_index) const {
    W k[kK];
    for (int i = 0; i < kK; ++i) k[i] = at_index(i);
    combine_strip<level>(x_ + start, g_ + start, t_ + start, first_ + start, second_ + start, points, stride,
                         mean, k);
  }

  const Normalization& given_;
  const int threads_;
  const T *const x_, *const g_, *const t_;
  T *const first_, *const second_;
  const int64_t chunk_, chunks_;
  std::vector<T> shift_, scale_, coefficients_;
  std::vector<double> totals_;
};

template <class T>
void run_level(const Normalization& given, int threads) {
  if (given.level == Level::kValue) {
    Images<T, Level::kValue>(given, threads).run();
  } else if (given.level == Level::kBackward) {
    Images<T, Level::kBackward>(given, threads).run();
  } else {
    Images<T, Level::kDoubleBackward>(given, threads).run();
  }
}

}  // namespace

void normalize_images(const Normalization& given, int threads) {
  given.wide ? run_level<double>(given, threads) : run_level<float>(given, threads);
}

}  // namespace HVP_VARIANT
}  // namespace hvp
