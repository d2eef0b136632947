// Counter-based dropout: whether an element is kept follows from the seed, its row and its column alone, so the
// backward pass computes it again and every device keeps the same elements. Twin of dropout_mask in Python.
#pragma once

#include <cstdint>

#include "core/macros.h"

namespace hstu_ops {

struct DropoutParams {
  uint32_t threshold = 0;                // the probability times 2^15; 0: nothing is dropped
  double scale = 1;                      // of what is kept
  const int64_t* seed_values = nullptr;  // [1], where the rows are; absent: seed
  int64_t seed = 0;

  HSTU_HD explicit operator bool() const { return threshold != 0; }
};

// Which of several blocks of columns an element belongs to.
enum class Section : uint32_t { kGate, kInput, kProduct };

// 8 random numbers of 15 bits; an element is kept if its own is at least the threshold.
struct RandomWords {
  uint32_t x0, x1, x2, x3;

  HSTU_HD uint32_t number(int i) const {
    const uint32_t word = i < 4 ? (i < 2 ? x0 : x1) : i < 6 ? x2 : x3;
    return (i % 2 ? word >> 16 : word) & 0x7fff;
  }
};

// Philox4x32-7 (Salmon et al., SC 2011).
HSTU_HD RandomWords philox(RandomWords x, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 7; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * x.x0, p1 = uint64_t{0xCD9E8D57} * x.x2;
    x = {static_cast<uint32_t>(p1 >> 32) ^ x.x1 ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ x.x3 ^ k1, static_cast<uint32_t>(p0)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return x;
}

// 128 bits of the seed, to be xored with the place of an element: seeds next to each other have nothing in common, and
// the key of the numbers themselves is 0, so that its schedule costs no instruction.
HSTU_HD RandomWords dropout_state(uint64_t seed) {
  return philox({0, 0, 0, 0}, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// The numbers of columns [8 * block, 8 * block + 8).
HSTU_HD RandomWords random_words(const RandomWords& state, uint64_t row, uint32_t block, Section section) {
  return philox({state.x0 ^ static_cast<uint32_t>(row), state.x1 ^ static_cast<uint32_t>(row >> 32), state.x2 ^ block,
                 state.x3 ^ static_cast<uint32_t>(section)},
                0, 0);
}

}  // namespace hstu_ops
