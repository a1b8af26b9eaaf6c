// Reading flows as numbers, which coupling.h describes.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace fasthyp::coupling {

inline constexpr int kMaxWidth = 1 << 20;

// One number after the other; throws std::invalid_argument for one that cannot be.
class PlanReader {
 public:
  explicit PlanReader(std::span<const std::int64_t> numbers) : numbers_(numbers) {}
  std::int64_t raw() {
    if (at_ >= numbers_.size()) throw std::invalid_argument("flow plan: too short");
    return numbers_[at_++];
  }
  int integer(const char* what, std::int64_t low, std::int64_t high) {
    const std::int64_t v = raw();
    if (v < low || v > high)
      throw std::invalid_argument(std::string("flow plan: ") + what + " must be in [" +
                                  std::to_string(low) + ", " + std::to_string(high) + "], got " +
                                  std::to_string(v));
    return static_cast<int>(v);
  }
  bool flag(const char* what) { return integer(what, 0, 1) != 0; }
  double real() { return std::bit_cast<double>(raw()); }
  std::vector<int> slots(const char* what, int count, int dim) {
    std::vector<int> v(count);
    for (int& s : v) s = integer(what, 0, dim - 1);
    return v;
  }
  bool done() const { return at_ == numbers_.size(); }

 private:
  std::span<const std::int64_t> numbers_;
  std::size_t at_ = 0;
};

inline bool distinct(std::vector<int> v) {
  std::sort(v.begin(), v.end());
  return std::adjacent_find(v.begin(), v.end()) == v.end();
}

}  // namespace fasthyp::coupling
