// Memory to write on, used again from call to call: the system takes long to hand out new pages.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace {

// How many parts of at most `most` there are of n.
constexpr int64_t parts_of(int64_t n, int64_t most) { return (n + most - 1) / most; }

constexpr int64_t round_up(int64_t n, int64_t to) { return parts_of(n, to) * to; }

// Hands out memory until its end, when others may have it.
class Space {
 public:
  static constexpr int64_t aligned = 16;  // numbers, a line of memory, with which all begins

  Space() = default;
  Space(const Space&) = delete;
  Space& operator=(const Space&) = delete;

  ~Space() {
    if (taken.empty()) return;
    std::lock_guard<std::mutex> lock(guard());
    for (auto& block : taken) idle().insert(std::move(block));
  }

  // So many numbers, whatever stands there.
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
  using Blocks = std::multimap<int64_t, std::unique_ptr<Line[]>>;  // by their lines

  float* keep(Blocks::node_type block) {
    taken.push_back(std::move(block));
    return taken.back().mapped()[0].numbers;
  }

  // Both are never destroyed: threads may compute while the process ends.
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
