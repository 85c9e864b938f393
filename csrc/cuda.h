// Runs steps and recurrences on a CUDA device.
#pragma once

#include <string>

#include "recurrences.h"
#include "step.h"

namespace hvp {

// Why CUDA cannot be used on this machine; empty if it can.
std::string cuda_problem();

// Launches the step on `stream` of `device` without waiting for it; throws std::runtime_error naming the op.
void run_cuda(const Step& step, int device, void* stream);

// Launches a recurrence on its numbers, in the same way.
void run_recurrence_cuda(RecurrenceCode code, double* numbers, int device, void* stream);

}  // namespace hvp
