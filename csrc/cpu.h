// Runs a step on the CPU.
#pragma once

#include "step.h"

namespace hvp {

// Chunks are shared evenly among `threads`; results do not depend on their number.
void run_cpu(const Step& step, int threads);

}  // namespace hvp
