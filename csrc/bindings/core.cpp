// hstu_ops._core: the torch-free core for Python. Tests drive the C++ mask through it and benches count pairs with it;
// the ops do not need it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "core/bias.h"
#include "core/mask.h"

namespace py = pybind11;

namespace hstu_ops {
namespace {

void at_least(int value, int least, const char* name) {
  if (value < least) {
    throw std::invalid_argument(std::string("hstu_ops: ") + name + ": expected at least " + std::to_string(least) +
                                ", got " + std::to_string(value));
  }
}

Mask make_mask(int length, int num_targets, int contextual_seq_len, bool causal, int target_group_size,
               int max_attn_len, int min_full_attn_seq_len, int global_prefix_len) {
  at_least(length, 0, "length");
  at_least(num_targets, 0, "num_targets");
  at_least(contextual_seq_len, 0, "contextual_seq_len");
  at_least(target_group_size, 1, "target_group_size");
  at_least(max_attn_len, 0, "max_attn_len");
  at_least(min_full_attn_seq_len, 0, "min_full_attn_seq_len");
  at_least(global_prefix_len, 0, "global_prefix_len");
  if (num_targets > length) {
    throw std::invalid_argument("hstu_ops: num_targets: expected at most length = " + std::to_string(length) +
                                ", got " + std::to_string(num_targets));
  }
  MaskOptions options;
  options.causal = causal;
  options.target_group_size = target_group_size;
  options.max_attn_len = max_attn_len;
  options.min_full_attn_seq_len = min_full_attn_seq_len;
  options.global_prefix_len = global_prefix_len;
  return Mask::make(length, num_targets, contextual_seq_len, options);
}

using Spans = std::array<std::pair<int, int>, 3>;

Spans spans(const RowSpans& r) {
  return {{{r.prefix.lo, r.prefix.hi}, {r.window.lo, r.window.hi}, {r.group.lo, r.group.hi}}};
}

int64_t kept_pairs(const Mask& mask, int num_queries) {
  if (num_queries < -1 || num_queries > mask.len) {
    throw std::invalid_argument("hstu_ops: num_queries: expected at most length = " + std::to_string(mask.len) +
                                ", got " + std::to_string(num_queries));
  }
  return mask.kept_pairs(num_queries == -1 ? 0 : mask.len - num_queries);
}

// Masks of one length, a row of options each, in the order of make_mask's arguments. numpy is imported by the first
// call.
using OptionRows = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

Mask mask_of_row(int length, const OptionRows& options, py::ssize_t k) {
  const auto o = options.unchecked<2>();
  return make_mask(length, o(k, 0), o(k, 1), o(k, 2) != 0, o(k, 3), o(k, 4), o(k, 5), o(k, 6));
}

void expect_option_rows(const OptionRows& options) {
  if (options.ndim() != 2 || options.shape(1) != 7) {
    throw std::invalid_argument("hstu_ops: options: expected shape [K, 7]");
  }
}

py::array_t<bool> mask_matrices(int length, const OptionRows& options) {
  expect_option_rows(options);
  py::array_t<bool> out({options.shape(0), py::ssize_t{length}, py::ssize_t{length}});
  bool* next = out.mutable_data();
  for (py::ssize_t k = 0; k < options.shape(0); ++k) {
    const Mask mask = mask_of_row(length, options, k);
    for (int i = 0; i < length; ++i) {
      for (int j = 0; j < length; ++j) *next++ = mask.keep(i, j);
    }
  }
  return out;
}

// Half-open ranges, a row (begin, end) each.
using Ranges = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

py::array_t<uint8_t> mask_tiles(int length, const OptionRows& options, const Ranges& rows, const Ranges& columns) {
  expect_option_rows(options);
  if (rows.ndim() != 2 || rows.shape(1) != 2 || columns.ndim() != 2 || columns.shape(1) != 2) {
    throw std::invalid_argument("hstu_ops: rows, columns: expected shape [tiles, 2]");
  }
  const auto m = rows.unchecked<2>(), n = columns.unchecked<2>();
  py::array_t<uint8_t> out({options.shape(0), rows.shape(0), columns.shape(0)});
  uint8_t* next = out.mutable_data();
  for (py::ssize_t k = 0; k < options.shape(0); ++k) {
    const Mask mask = mask_of_row(length, options, k);
    for (py::ssize_t a = 0; a < rows.shape(0); ++a) {
      for (py::ssize_t b = 0; b < columns.shape(0); ++b) {
        const bool touches = mask.touches(m(a, 0), m(a, 1), n(b, 0), n(b, 1));
        *next++ = touches | mask.covers(m(a, 0), m(a, 1), n(b, 0), n(b, 1)) << 1;
      }
    }
  }
  return out;
}

int bucket(int64_t gap, const std::vector<int64_t>& boundaries) {
  return time_bucket(gap, boundaries.data(), static_cast<int>(boundaries.size()));
}

py::dict build_info() {
  py::dict info;
  info["version"] = HSTU_VERSION;
  info["compiler"] = HSTU_COMPILER;
  info["cpu_isas"] = HSTU_CPU_ISAS;
  info["cuda"] = HSTU_CUDA_VERSION;
  info["cuda_archs"] = HSTU_CUDA_ARCHS;
  return info;
}

void bind_mask(py::module_& m) {
  py::class_<Mask>(m, "Mask", "The columns that each row of one sequence keeps (see the README's mask table).")
      .def(py::init(&make_mask), py::kw_only(), py::arg("length"), py::arg("num_targets") = 0,
           py::arg("contextual_seq_len") = 0, py::arg("causal") = true, py::arg("target_group_size") = 1,
           py::arg("max_attn_len") = 0, py::arg("min_full_attn_seq_len") = 0, py::arg("global_prefix_len") = 0)
      .def_readonly("length", &Mask::len)
      .def_readonly("history", &Mask::history, "length - num_targets")
      .def_readonly("contextual", &Mask::contextual, "leading rows that see the whole history, at most history")
      .def("position", &Mask::position, py::arg("row"), "Logical position of a row.")
      .def(
          "row", [](const Mask& mask, int i) { return spans(mask.row(i)); }, py::arg("row"),
          "The kept columns of a row as (lo, hi) of prefix, window and own group; empty where lo >= hi.")
      .def(
          "rows", [](const Mask& mask, int m0, int m1) { return spans(mask.rows(m0, m1)); }, py::arg("m0"),
          py::arg("m1"), "Spans that hold row(i) for every i in [m0, m1).")
      .def("keep", &Mask::keep, py::arg("row"), py::arg("column"))
      .def("touches", &Mask::touches, py::arg("m0"), py::arg("m1"), py::arg("n0"), py::arg("n1"),
           "Must the tile rows [m0, m1) x columns [n0, n1) be visited?")
      .def("covers", &Mask::covers, py::arg("m0"), py::arg("m1"), py::arg("n0"), py::arg("n1"),
           "Is every element of the tile kept? May say no where some are not told apart cheaply.")
      .def("kept_pairs", &kept_pairs, py::arg("num_queries") = -1,
           "(row, column) pairs kept by the last num_queries rows, by default all of them.");
}

}  // namespace
}  // namespace hstu_ops

PYBIND11_MODULE(_core, m) {
  m.doc() = "Bindings of the torch-free C++ core: mask, kept pairs, time buckets, build information.";
  hstu_ops::bind_mask(m);
  m.def("mask_matrices", &hstu_ops::mask_matrices, py::arg("length"), py::arg("options"),
        "keep() of K masks as bool [K, length, length]. options is int32 [K, 7]: num_targets, contextual_seq_len, "
        "causal, target_group_size, max_attn_len, min_full_attn_seq_len, global_prefix_len.");
  m.def("mask_tiles", &hstu_ops::mask_tiles, py::arg("length"), py::arg("options"), py::arg("rows"), py::arg("columns"),
        "Tiles of K masks as uint8 [K, R, C]: bit 0 is touches(), bit 1 covers(). rows int32 [R, 2] and columns "
        "int32 [C, 2] hold (begin, end); options as in mask_matrices.");
  m.def("bucket", &hstu_ops::bucket, py::arg("gap"), py::arg("boundaries"),
        "How many of the sorted boundaries are <= gap.");
  m.def("position_index", &hstu_ops::position_index, py::arg("row_position"), py::arg("col_position"),
        py::arg("positions"), "Entry of a position table of 2 * positions - 1 weights.");
  m.def("build_info", &hstu_ops::build_info);
}
