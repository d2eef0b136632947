// Scratch memory of a launch, cut piece by piece.
#pragma once

#include <cstddef>

namespace hstu_ops::cuda {

// Pieces begin on 256 bytes. `memory` may be null when only their size matters.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<char*>(memory)) {}

  void* take(size_t bytes) {
    void* at = memory_ ? memory_ + bytes_ : nullptr;
    bytes_ += (bytes + 255) / 256 * 256;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  char* memory_;
  size_t bytes_ = 0;
};

}  // namespace hstu_ops::cuda
