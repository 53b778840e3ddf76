#pragma once

#include "solver/column_search.h"

namespace elutq {

/// Chooses codes column by column, with the build for this machine. The result does not depend on the instruction set.
/// Throws std::invalid_argument when a dimension is outside what ColumnSearch states.
void choose_columns(const ColumnSearch& search);

}  // namespace elutq
