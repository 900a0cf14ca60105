// Workspace arena: uninitialized float32 scratch buffers, aligned to a cache line and reused from
// call to call, which avoids page faults on freshly mapped memory. Freed blocks go to a free list
// that all threads of the process share. Allocation is best fit: it takes the smallest free block
// that is large enough, unless more than half of it would be wasted. Also defines the integer
// helpers `parts_of` (ceiling division) and `round_up`.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace {

// Ceiling division: the number of blocks of at most `most` items that cover n.
constexpr int64_t parts_of(int64_t n, int64_t most) { return (n + most - 1) / most; }

constexpr int64_t round_up(int64_t n, int64_t to) { return parts_of(n, to) * to; }

// RAII workspace: buffers are valid until the destructor returns them to the free list.
class Space {
 public:
  static constexpr int64_t aligned = 16;  // alignment in floats: a cache line of 64 bytes

  Space() = default;
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;

  ~Space() {
    if (taken.empty()) return;
    std::lock_guard<std::mutex> lock(guard());
    for (auto& block : taken) idle().insert(std::move(block));
  }

  // Allocates `size` uninitialized floats.
  float* take(int64_t size) {
    const int64_t lines = std::max<int64_t>(parts_of(size, aligned), 1);
    {
      std::lock_guard<std::mutex> lock(guard());
      const auto found = idle().lower_bound(lines);
      if (found != idle().end() && found->first <= 2 * lines)
        return keep(idle().extract(found));
    }
    Blocks made;
    return keep(made.extract(made.emplace(lines, new Line[lines])));
  }

  float* zeros(int64_t size) {
    float* at = take(size);
    std::fill_n(at, size, 0.0f);
    return at;
  }

 private:
  struct alignas(64) Line {
    float numbers[aligned];
  };
  using Blocks = std::multimap<int64_t, std::unique_ptr<Line[]>>;  // keyed by size in cache lines

  float* keep(Blocks::node_type block) {
    taken.push_back(std::move(block));
    return taken.back().mapped()[0].numbers;
  }

  // Both are leaked on purpose: threads may still compute while static destructors run.
  static std::mutex& guard() {
    static auto& it = *new std::mutex;
    return it;
  }
  static Blocks& idle() {
    static auto& them = *new Blocks;
    return them;
  }

  std::vector<Blocks::node_type> taken;
};

}  // namespace
