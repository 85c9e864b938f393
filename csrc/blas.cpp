#include "blas.h"

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace hvp {
namespace {

Blas found;

// Whether a product comes out right. A BLAS of 64-bit integers reads the sizes as other numbers: here each is
// followed by zeros, so that it reads the same ones, and its own symbols have other names anyway.
template <class T>
bool works(Gemm<T> gemm) {
  const int sizes[] = {2, 0, 3, 0, 2, 0};  // m, n, k
  const int *const m = sizes, *const n = sizes + 2, *const k = sizes + 4;
  const T alpha = 2, beta = 1, a[] = {1, 2, 3, 4}, b[] = {1, 0, 1, 1, 0, 2};
  T c[] = {1, 1, 1, 1, 1, 1};
  gemm("N", "T", m, n, k, &alpha, a, m, b, n, &beta, c, m);
  // Columns first, a = [1 3; 2 4] and b = [1 1; 0 0; 1 2], so a b^T = [4 0 7; 6 0 10].
  const T expected[] = {9, 13, 1, 1, 15, 21};
  for (int i = 0; i < 6; ++i) {
    if (c[i] != expected[i]) return false;
  }
  return true;
}

}  // namespace

const Blas& blas() { return found; }

void find_blas(const std::string& library) {
  found = Blas{};
#ifdef _WIN32
  found.problem = "symbols of torch's libraries cannot be looked up on Windows";
#else
  void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) {
    found.problem = library + " is not loaded";
    return;
  }
  found.single = reinterpret_cast<Gemm<float> >(dlsym(handle, "sgemm_"));
  found.wide = reinterpret_cast<Gemm<double> >(dlsym(handle, "dgemm_"));
  found.set_threads = reinterpret_cast<int (*)(int)>(dlsym(handle, "MKL_Set_Num_Threads_Local"));
  if (found.single == nullptr || found.wide == nullptr) {
    found.problem = library + " has no symbol sgemm_ or dgemm_";
  } else if (!works(found.single) || !works(found.wide)) {
    found.problem = "sgemm_ or dgemm_ of " + library + " gives a wrong product";
  } else {
    found.problem.clear();
  }
#endif
}

}  // namespace hvp
