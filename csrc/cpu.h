// Runs a step on the CPU.
#pragma once

#include "step.h"

namespace hvp {

bool has_avx2();

// The instruction set the kernels use on this machine.
const char* cpu_variant();

// Chunks are shared evenly among `threads`; results do not depend on their number.
void run_cpu(const Step& step, int threads);

}  // namespace hvp
