// The matrix product of the BLAS that torch itself uses, found by its symbol at run time.
#pragma once

#include <string>

namespace hvp {

template <class T>
using Gemm = void (*)(const char* transpose_a, const char* transpose_b, const int* m, const int* n,
                      const int* k, const T* alpha, const T* a, const int* lda, const T* b, const int* ldb,
                      const T* beta, T* c, const int* ldc);

struct Blas {
  Gemm<float> single = nullptr;
  Gemm<double> wide = nullptr;
  int (*set_threads)(int) = nullptr;  // of the calling thread; returns the setting before. MKL alone has it.
  std::string problem = "not looked for yet";  // empty where the functions above can be used

  template <class T>
  Gemm<T> gemm() const;
};

template <>
inline Gemm<float> Blas::gemm<float>() const {
  return single;
}
template <>
inline Gemm<double> Blas::gemm<double>() const {
  return wide;
}

// What has been found; `find_blas` looks in a library that is already loaded, and in what it links.
const Blas& blas();
void find_blas(const std::string& library);

}  // namespace hvp
