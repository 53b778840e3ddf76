#pragma once

#include <nanobind/nanobind.h>

/// One function per room that is bound; each adds its own to the module.
void bind_engine(nanobind::module_& m);
void bind_kernels(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_solver(nanobind::module_& m);
