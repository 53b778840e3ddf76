// The Python face of the core: converts arguments and forwards. No logic lives here; one file per room that is bound.
#include "bindings/bindings.h"

NB_MODULE(_core, m) {
  m.doc() = "Compiled core of elutq. Private: import elutq.runtime, elutq.hlq or elutq.hf instead.";
  bind_engine(m);
  bind_kernels(m);
  bind_linear(m);
  bind_solver(m);
}
