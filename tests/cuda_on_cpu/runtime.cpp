// csrc/cuda.cu, unchanged, over the stand-in for the CUDA runtime, and functions to call it from Python.
//
// A block's threads are fibers: each runs until its next barrier or shuffle, and goes on when all threads of
// the block, or of the warp, have come to the same one; anything else ends the program. Threads and blocks
// run in order, reversed or shuffled, as `cuda_on_cpu_order` says: what depends on the order is a race. With
// -DSYSTEM_THREADS a block's threads are threads of the system, for ThreadSanitizer.
#include "cuda_runtime.h"
#include CUDA_SOURCE

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <map>
#include <random>
#include <vector>
#ifdef SYSTEM_THREADS
#include <barrier>
#include <thread>
#endif

namespace cuda_on_cpu {

using Body = std::function<void()>;

thread_local Index thread_index;
Index block_index;
Index grid_size;

namespace {

constexpr unsigned kWarp = 32, kMostThreads = 1024;
enum Order { kInOrder, kReversed, kShuffled };
Order order_of_threads = kInOrder;
std::mt19937 generator(1);

unsigned threads_of_block = 0;
double slots[2][kMostThreads];
int predicates[2][kMostThreads];
unsigned exchanges[kMostThreads];  // by each thread so far; two sets of slots take turns

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "CUDA on a CPU: %s\n", what);
  std::abort();
}

std::vector<unsigned> ordered(unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  if (order_of_threads == kReversed) std::reverse(order.begin(), order.end());
  if (order_of_threads == kShuffled) std::shuffle(order.begin(), order.end(), generator);
  return order;
}

// Waits until all threads of the block, or of the warp, wait for the same.
void wait_for_block(unsigned what);
void wait_for_warp(unsigned what);

}  // namespace

void synchronize() { wait_for_block(1); }

int synchronize_or(int predicate) {
  const unsigned me = thread_index.x, turn = exchanges[me]++ % 2;
  predicates[turn][me] = predicate;
  wait_for_block(2);
  return std::any_of(predicates[turn], predicates[turn] + threads_of_block, [](int one) { return one != 0; });
}

double shuffle_down(unsigned mask, double value, unsigned delta) {
  if (mask != 0xffffffffu) fail("a shuffle of a part of a warp");
  const unsigned me = thread_index.x, turn = exchanges[me]++ % 2;
  slots[turn][me] = value;
  wait_for_warp(delta);
  return me % kWarp + delta < kWarp ? slots[turn][me + delta] : value;
}

namespace {

#ifdef SYSTEM_THREADS

std::barrier<>* block_barrier;
std::vector<std::barrier<>*> warp_barriers;

void wait_for_block(unsigned) { block_barrier->arrive_and_wait(); }
void wait_for_warp(unsigned) { warp_barriers[thread_index.x / kWarp]->arrive_and_wait(); }

void run_block(const Body& body) {
  block_barrier = new std::barrier<>(threads_of_block);
  for (unsigned warp = 0; warp < threads_of_block / kWarp; ++warp)
    warp_barriers.push_back(new std::barrier<>(kWarp));
  std::vector<std::thread> threads;
  for (const unsigned i : ordered(threads_of_block)) {
    threads.emplace_back([&body, i] {
      thread_index.x = i;
      body();
    });
  }
  for (std::thread& thread : threads) thread.join();
  delete block_barrier;
  for (std::barrier<>* barrier : warp_barriers) delete barrier;
  warp_barriers.clear();
}

#else

// Saves the registers that a call must preserve, and goes on with another stack.
extern "C" void cuda_on_cpu_switch(void** save, void* to);
asm(R"(
.text
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch,@function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

enum State { kRunning, kAtBlock, kAtWarp, kDone };
constexpr size_t kStack = 128 * 1024;

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  State state = kDone;
  unsigned what = 0;  // of the barriers or shuffles it waits for
};

std::vector<Fiber> fibers;
void* scheduler;
Fiber* active;
const Body* running;

void pause(State state, unsigned what) {
  active->state = state;
  active->what = what;
  cuda_on_cpu_switch(&active->stack_pointer, scheduler);
}

void wait_for_block(unsigned what) { pause(kAtBlock, what); }
void wait_for_warp(unsigned what) { pause(kAtWarp, what); }

void enter() {
  (*running)();
  pause(kDone, 0);
  fail("a thread ran on after its end");
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) fiber.stack = static_cast<char*>(std::aligned_alloc(64, kStack));
  auto** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // as if called: the stack is 16 bytes aligned before the return address
  *--top = reinterpret_cast<void*>(&enter);  // where the first switch returns to
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
  fiber.state = kRunning;
}

// Whether the threads [begin, end) wait in this state, all for the same; they go on then.
bool released(unsigned begin, unsigned end, State state) {
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].state != state || fibers[i].what != fibers[begin].what) return false;
  }
  for (unsigned i = begin; i < end; ++i) fibers[i].state = kRunning;
  return true;
}

void run_block(const Body& body) {
  running = &body;
  if (fibers.size() < threads_of_block) fibers.resize(threads_of_block);
  for (unsigned i = 0; i < threads_of_block; ++i) prepare(fibers[i]);
  const std::vector<unsigned> order = ordered(threads_of_block);
  for (unsigned done = 0; done < threads_of_block;) {
    bool moved = false;
    for (const unsigned i : order) {
      if (fibers[i].state != kRunning) continue;
      active = &fibers[i];
      thread_index.x = i;
      cuda_on_cpu_switch(&scheduler, active->stack_pointer);
      done += active->state == kDone;
      moved = true;
    }
    for (unsigned warp = 0; warp < threads_of_block; warp += kWarp)
      moved |= released(warp, warp + kWarp, kAtWarp);
    moved |= released(0, threads_of_block, kAtBlock);
    if (!moved) fail("threads wait for others that have ended, or that wait elsewhere");
  }
}

#endif

struct Kernel {
  std::function<void(void**)> call;
  size_t parameters;  // their bytes
};

template <int kCapacity>
Kernel step_of(const void* address) {
  using namespace hvp;
  auto* kernel =
      reinterpret_cast<void (*)(const Products<kCapacity>, const Shared)>(const_cast<void*>(address));
  return {[kernel](void** arguments) {
            kernel(*static_cast<Products<kCapacity>*>(arguments[0]), *static_cast<Shared*>(arguments[1]));
          },
          sizeof(Products<kCapacity>) + sizeof(Shared)};
}

std::map<const void*, Kernel> all_kernels() {
  using namespace hvp;
  std::map<const void*, Kernel> found;
  for (int op = 0; op < kOpCount; ++op) {
    for (const bool measure : {false, true}) {
      for (const bool wide : {false, true}) {
        const void* small = kernel_of<kSmall>(static_cast<OpCode>(op), measure, wide);
        const void* large = kernel_of<kLarge>(static_cast<OpCode>(op), measure, wide);
        found[small] = step_of<kSmall>(small);
        found[large] = step_of<kLarge>(large);
      }
    }
  }
  for (int code = 0; code < static_cast<int>(std::size(kRecurrences)); ++code) {
    const void* address = kernel_of(static_cast<RecurrenceCode>(code));
    auto* kernel = reinterpret_cast<void (*)(double*)>(const_cast<void*>(address));
    found[address] = {[kernel](void** arguments) { kernel(*static_cast<double**>(arguments[0])); },
                      sizeof(double*)};
  }
  found[reinterpret_cast<const void*>(total_kernel)] = {[](void** arguments) {
                                                          total_kernel(*static_cast<double**>(arguments[0]),
                                                                       *static_cast<int64_t*>(arguments[1]));
                                                        },
                                                        sizeof(double*) + sizeof(int64_t)};
  return found;
}

int64_t launches = 0;

}  // namespace
}  // namespace cuda_on_cpu

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t) {
  using namespace cuda_on_cpu;
  static const std::map<const void*, Kernel> kernels = all_kernels();
  const auto found = kernels.find(kernel);
  constexpr size_t kMostParameters = CUDART_VERSION >= 12010 ? 32764 : 4096;
  if (found == kernels.end() || found->second.parameters > kMostParameters || grid.x == 0 ||
      block.x > kMostThreads || block.x % kWarp != 0) {
    return cudaErrorInvalidValue;
  }
  threads_of_block = block.x;
  grid_size.x = grid.x;
  const Body body = [&] { found->second.call(arguments); };
  for (const unsigned index : ordered(grid.x)) {
    block_index.x = index;
    run_block(body);
  }
  ++launches;
  return cudaSuccess;
}

extern "C" {

void cuda_on_cpu_order(int order) { cuda_on_cpu::order_of_threads = static_cast<cuda_on_cpu::Order>(order); }

int64_t cuda_on_cpu_launches() { return cuda_on_cpu::launches; }

// Runs an op on `count` tensors; an error's text goes to `error`, empty if there is none.
void cuda_on_cpu_run(int op, int wide, void** states, const double** scalars, double damping,
                     double* partials, int64_t count, const int64_t* numels, const int64_t* offsets,
                     const void** products, const int* dtypes, const void* slices, char* error,
                     size_t error_size) {
  std::vector<hvp::Part> parts;
  std::vector<hvp::Product> read;
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) {
    parts.push_back({numels[i], offsets[i], rows});
    read.push_back({products[i], static_cast<hvp::DType>(dtypes[i]), {}});
    rows += (numels[i] + hvp::kChunk - 1) / hvp::kChunk;
  }
  hvp::Step step{
      static_cast<hvp::OpCode>(op),          wide != 0, {}, {}, damping, partials, parts, read, rows,
      static_cast<const hvp::Slice*>(slices)};
  std::copy(states, states + hvp::kOps[op].states, step.states);
  std::copy(scalars, scalars + hvp::kOps[op].scalars, step.scalars);
  error[0] = '\0';
  try {
    hvp::run_cuda(step, 0, nullptr);
  } catch (const std::runtime_error& raised) {
    std::snprintf(error, error_size, "%s", raised.what());
  }
}

// Runs a recurrence on its numbers.
void cuda_on_cpu_run_recurrence(int code, double* numbers) {
  hvp::run_recurrence_cuda(static_cast<hvp::RecurrenceCode>(code), numbers, 0, nullptr);
}

}  // extern "C"
