// Factors of the backward's scores, which begin from the bias where there is one. Made by the launchers.
#pragma once

#include <cmath>

namespace hstu_ops::cuda::sm90 {

// Scores are `score` times what is summed up: products, and a bias times `bias`. A dense bias below `least` would
// overflow there; its SiLU is 0 as that of `least` is. biased: alphas below 2^-60 are taken for 2^-60, which leaves
// something to divide the bias by, and of the products nothing that counts.
struct ScoreFactors {
  float score, bias, least;

  ScoreFactors(double alpha, float argument, bool biased) {
    if (biased && std::abs(alpha) < 0x1p-60) alpha = 0x1p-60;
    score = static_cast<float>(alpha) * argument, bias = static_cast<float>(1 / alpha);
    least = std::abs(alpha) < 1 ? static_cast<float>(-0x1p127 * std::abs(alpha)) : -0x1p127f;
  }
};

}  // namespace hstu_ops::cuda::sm90
