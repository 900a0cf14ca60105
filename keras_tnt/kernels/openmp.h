// parallel_for of the torch operators: an OpenMP loop with dynamic scheduling, on as many threads
// as `torch.get_num_threads()` returns.
#pragma once
#include <cstdint>

// Calls part(data, i) for i in [0, parts). threads: pointer to the number of threads, an int.
static void share(void* threads, int64_t parts, void (*part)(void*, int64_t), void* data) {
#pragma omp parallel for schedule(dynamic) num_threads(*static_cast<int*>(threads))
  for (int64_t i = 0; i < parts; ++i) part(data, i);
}
