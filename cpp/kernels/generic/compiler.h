#pragma once

/// Hot functions take register values and constant indices; they must vanish into their callers.
#define ELUTQ_INLINE [[gnu::always_inline]] inline

/// Unrolls the next loop, whose count is a small constant, so that arrays indexed by it live in registers.
#if defined(__clang__)
#define ELUTQ_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ELUTQ_UNROLL _Pragma("GCC unroll 32")
#endif
