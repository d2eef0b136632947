// A minimal test runner: TEST(name) { CHECK(...); } in any file, run by main.cpp.
#pragma once

#include <cstdio>
#include <vector>

namespace hstu_ops::test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

inline int& failures() {
  static int count = 0;
  return count;
}

inline void check(bool good, const char* condition, const char* file, int line) {
  if (good) return;
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, condition);
  ++failures();
}

struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

}  // namespace hstu_ops::test

#define CHECK(condition) ::hstu_ops::test::check(condition, #condition, __FILE__, __LINE__)
#define TEST(name)                                                                 \
  static void test_##name();                                                       \
  static const ::hstu_ops::test::Registration register_##name(#name, test_##name); \
  static void test_##name()
