// Where the threads come from: see parallel.h.

#include "parallel.h"

Fork glassformer_fork = nullptr;
thread_local Team* glassformer_team = nullptr;

extern "C" void glassformer_pool(void* fork) { glassformer_fork = reinterpret_cast<Fork>(fork); }
