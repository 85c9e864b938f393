// Every op with real threads, for ThreadSanitizer: tensors of more than one chunk, once aligned and float,
// once neither.
#include "runtime.cpp"

int main() {
  const std::vector<int64_t> numels = {5000, 0, 3};
  std::vector<int64_t> offsets;
  std::vector<hvp::Slice> slices;
  int64_t size = 0;
  for (const int64_t numel : numels) {
    for (int64_t start = 0; start < numel; start += hvp::kChunk)
      slices.push_back(
          {static_cast<int64_t>(offsets.size()), start, size + start, std::min(numel - start, hvp::kChunk)});
    offsets.push_back(size);
    size += (numel + 15) / 16 * 16;
  }
  char error[300];
  for (int op = 0; op < hvp::kOpCount; ++op) {
    for (const bool wide : {false, true}) {
      std::vector<std::vector<float>> data;
      std::vector<const void*> products;
      for (const int64_t numel : numels) {
        data.emplace_back(numel + 4, 0.5f);
        products.push_back(data.back().data() + (wide ? 1 : 0));
      }
      std::vector<std::vector<double>> states(3, std::vector<double>(size + 16));
      for (auto& state : states) {
        for (int64_t i = 0; i < size; ++i)
          wide ? state[i] = 0.25 : reinterpret_cast<float*>(state.data())[i] = 0.25f;
      }
      std::vector<double> partials(3 * slices.size());
      const double values[] = {0.1, 0.3};
      void* pointers[] = {states[0].data(), states[1].data(), states[2].data()};
      const double* scalars[] = {values, values + 1};
      const int dtypes[] = {0, 0, 0};
      cuda_on_cpu_run(op, wide, pointers, scalars, 0.2, partials.data(), numels.size(), numels.data(),
                      offsets.data(), products.data(), dtypes, slices.data(), error, sizeof error);
      if (error[0] != '\0') return std::fprintf(stderr, "%s\n", error), 1;
    }
  }
  std::puts("no races");
}
