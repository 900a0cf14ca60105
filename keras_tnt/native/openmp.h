// How torch's operators share their work: on as many threads as torch is told to use.
#pragma once
#include <cstdint>

static void share(void* threads, int64_t parts, void (*part)(void*, int64_t), void* data) {
#pragma omp parallel for schedule(dynamic) num_threads(*static_cast<int*>(threads))
  for (int64_t i = 0; i < parts; ++i) part(data, i);
}
