// What each part adds to the module hvp_engine._C.
#pragma once

#include <pybind11/pybind11.h>

namespace hvp {

void bind_attention(pybind11::module_& module);
void bind_plan(pybind11::module_& module);
void bind_recurrence(pybind11::module_& module);
void bind_program(pybind11::module_& module);
void bind_graph_contents(pybind11::module_& module);
void bind_plain_series(pybind11::module_& module);
void bind_recurrent(pybind11::module_& module);
void bind_cross_entropy(pybind11::module_& module);
void bind_normalization(pybind11::module_& module);

}  // namespace hvp
