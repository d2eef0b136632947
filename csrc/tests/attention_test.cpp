// The CPU backend through the torch-free API: two jagged sequences with targets against the formula in double, the
// gradients against finite differences of it, and wrong content. Accuracy and options are tested from Python.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "core/jagged.h"
#include "core/launch.h"
#include "tests/check.h"

namespace hstu_ops {
namespace {

int serial_for(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  if (begin < end) body(begin, end, context);
  return 0;
}

const cpu::Executor kSerial{1, serial_for};

struct Workspace {
  explicit Workspace(size_t bytes) : data(std::aligned_alloc(64, (bytes / 64 + 1) * 64)) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(data); }
  void* data;
};

std::vector<double> noise(size_t count, unsigned seed) {
  std::vector<double> values(count);
  for (double& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<double>(seed >> 8) / (1 << 23) - 1;
  }
  return values;
}

struct Example {
  static constexpr int kHeads = 2, kDimQk = 5, kDimV = 3, kTotal = 13, kPositions = 6;
  std::vector<double> q = noise(kTotal * kHeads * kDimQk, 1), k = noise(kTotal * kHeads * kDimQk, 2);
  std::vector<double> v = noise(kTotal * kHeads * kDimV, 3), position_weight = noise(2 * kPositions - 1, 4);
  std::vector<int64_t> offsets = {0, 4, 4, kTotal};
  std::vector<int32_t> targets = {1, 0, 3};

  AttentionProblem problem() {
    AttentionProblem p;
    p.dtype = DType::kFloat64;
    p.heads = kHeads;
    p.dim_qk = kDimQk;
    p.dim_v = kDimV;
    p.q = {q.data(), kHeads * kDimQk, kDimQk};
    p.k = {k.data(), kHeads * kDimQk, kDimQk};
    p.v = {v.data(), kHeads * kDimV, kDimV};
    p.alpha = 0.7;
    p.scale.value = 0.25;
    p.jagged.batch = 3;
    p.jagged.total_q = p.jagged.total_kv = kTotal;
    p.jagged.offsets = {offsets.data(), true};
    p.jagged.num_targets = {targets.data(), false};
    p.mask.max_attn_len = 4;
    p.relative.position_weight = position_weight.data();
    p.relative.positions = kPositions;
    return p;
  }

  std::vector<double> formula() {
    const AttentionProblem p = problem();
    std::vector<double> out(v.size(), 0.0);
    for (int b = 0; b < 3; ++b) {
      const Sequence s = load_sequence(p.jagged, p.mask, b);
      for (int i = 0; i < s.mask.len; ++i) {
        for (int head = 0; head < kHeads; ++head) add_row(p, s, i, head, out);
      }
    }
    return out;
  }

  void add_row(const AttentionProblem& p, const Sequence& s, int i, int head, std::vector<double>& out) const {
    const auto index = [&](int row, int dim) { return ((s.begin_kv + row) * kHeads + head) * dim; };
    for (int j = 0; j < s.mask.len; ++j) {
      if (!s.mask.keep(i, j)) continue;
      double score = 0;
      for (int d = 0; d < kDimQk; ++d) score += q[index(i, kDimQk) + d] * k[index(j, kDimQk) + d];
      const int distance = s.mask.position(j) - s.mask.position(i) + kPositions - 1;
      score = p.alpha * score + position_weight[clamp_int(distance, 0, 2 * kPositions - 2)];
      const double weight = p.scale.value * score / (1 + std::exp(-score));
      for (int d = 0; d < kDimV; ++d) out[index(i, kDimV) + d] += weight * v[index(j, kDimV) + d];
    }
  }

  Status forward(std::vector<double>& out) {
    AttentionFwdParams params;
    params.problem = problem();
    params.out = {out.data(), kHeads * kDimV, kDimV};
    const Workspace workspace(cpu::attention_fwd_workspace(params, 1));
    return cpu::attention_fwd(params, workspace.data, kSerial);
  }
};

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

TEST(forward_matches_the_formula) {
  Example example;
  std::vector<double> out(example.v.size(), std::nan(""));
  const Status status = example.forward(out);
  CHECK(status.ok());
  const std::vector<double> expected = example.formula();
  for (size_t i = 0; i < out.size(); ++i) CHECK(std::abs(out[i] - expected[i]) < 1e-12);
}

TEST(backward_matches_finite_differences) {
  Example example;
  const std::vector<double> grad_out = noise(example.v.size(), 9);
  std::vector<double> grad_q(example.q.size(), std::nan("")), grad_k(grad_q), grad_v(example.v.size(), std::nan(""));
  std::vector<double> grad_table(example.position_weight.size(), std::nan(""));
  AttentionBwdParams params;
  params.problem = example.problem();
  params.grad_out = {const_cast<double*>(grad_out.data()), Example::kHeads * Example::kDimV, Example::kDimV};
  params.grad_q = {grad_q.data(), Example::kHeads * Example::kDimQk, Example::kDimQk};
  params.grad_k = {grad_k.data(), Example::kHeads * Example::kDimQk, Example::kDimQk};
  params.grad_v = {grad_v.data(), Example::kHeads * Example::kDimV, Example::kDimV};
  params.grad_position_weight = grad_table.data();
  const Workspace workspace(cpu::attention_bwd_workspace(params, 1));
  CHECK(cpu::attention_bwd(params, workspace.data, kSerial).ok());

  const auto check_gradient = [&](std::vector<double>& values, const std::vector<double>& gradient) {
    constexpr double kStep = 1e-5;
    for (size_t i = 0; i < values.size(); ++i) {
      const double value = values[i];
      values[i] = value + kStep;
      const double above = dot(example.formula(), grad_out);
      values[i] = value - kStep;
      const double below = dot(example.formula(), grad_out);
      values[i] = value;
      CHECK(std::abs((above - below) / (2 * kStep) - gradient[i]) < 1e-8);
    }
  };
  check_gradient(example.q, grad_q);
  check_gradient(example.k, grad_k);
  check_gradient(example.v, grad_v);
  check_gradient(example.position_weight, grad_table);
}

TEST(wrong_content_is_reported) {
  Example example;
  std::vector<double> out(example.v.size());
  example.offsets = {1, 4, 4, Example::kTotal};
  CHECK(!example.forward(out).ok());
  example.offsets = {0, 6, 4, Example::kTotal};
  CHECK(!example.forward(out).ok());
  example.offsets = {0, 4, 4, Example::kTotal + 1};
  CHECK(!example.forward(out).ok());
  example.offsets = {0, 4, 4, Example::kTotal};
  CHECK(example.forward(out).ok());
  example.targets = {5, 0, 0};
  CHECK(!example.forward(out).ok());
  example.targets = {0, -1, 0};
  CHECK(!example.forward(out).ok());
}

}  // namespace
}  // namespace hstu_ops
